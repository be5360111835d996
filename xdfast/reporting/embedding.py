"""Features in two dimensions (t-SNE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xdfast.reporting.svg import Picture, drawing, legend, new_figure

__all__ = ["project", "tsne"]

_MOST_POINTS = 2000
_LEAST_POINTS = 8
_NAMED = 20  # classes in the legend


def project(features: Any, seed: int = 0) -> tuple[np.ndarray, float]:
    """t-SNE of ``[M, F]`` features: (``[M, 2]`` positions, perplexity).

    Standardised by one common scale, started from PCA, fixed seed; perplexity 30, less for few points (M − 1) / 4.

    Raises:
        ValueError: fewer than 8 points, or values that are not finite.

    Reference:
        van der Maaten and Hinton, "Visualizing Data using t-SNE", JMLR 9, 2008.
    """
    from sklearn.manifold import TSNE

    x = np.asarray(features, dtype=np.float32)
    if x.ndim != 2 or len(x) < _LEAST_POINTS:
        raise ValueError(f"t-SNE needs features [M, F] of at least {_LEAST_POINTS} images, got {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("t-SNE needs finite features, got NaN or Inf")
    x = x - x.mean(0)
    x /= max(float(x.std()), 1e-12)
    perplexity = min(30.0, (len(x) - 1) / 4)
    # PCA gives at most F directions; a one-dimensional feature gets an empty second one.
    x = np.pad(x, ((0, 0), (0, max(0, 2 - x.shape[1]))))
    method = "exact" if len(x) <= 250 else "barnes_hut"  # the tree pays off only for more points
    model = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, learning_rate="auto", method=method)
    return model.fit_transform(x), perplexity


def tsne(embedding: Mapping[str, Any] | None, classes: Sequence[str], name: str) -> Picture | None:
    """Features of validation images, coloured by true class; wrong predictions are crosses.

    At most 2,000 images (evenly picked). None without an embedding or with fewer than 8 images.
    """
    if not embedding or len(embedding.get("features", ())) < _LEAST_POINTS:
        return None
    count = len(embedding["features"])
    keep = np.linspace(0, count - 1, min(count, _MOST_POINTS)).round().astype(int)
    labels = np.asarray(embedding["labels"])[keep]
    guesses = np.asarray(embedding.get("predictions", np.full(count, -1)))[keep]
    places, perplexity = project(np.asarray(embedding["features"])[keep])
    present = sorted({int(label) for label in labels})
    named = len(present) <= _NAMED
    figure, (ax,) = new_figure(5.6, 4.6)
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    colours = _colours(len(present))
    wrong = (guesses >= 0) & (guesses != labels)
    for number, label in enumerate(present):
        mine = labels == label
        text = str(classes[label]) if 0 <= label < len(classes) else str(label)
        for part, marker, size in ((mine & ~wrong, "o", 9), (mine & wrong, "x", 16)):
            if part.any() or marker == "o":
                ax.scatter(
                    places[part, 0],
                    places[part, 1],
                    s=size,
                    marker=marker,
                    color=colours[number],
                    linewidths=0 if marker == "o" else 1,
                    alpha=0.8,
                    label=text[:24] if marker == "o" else None,
                    rasterized=len(keep) > 500,  # thousands of vector marks make the page slow
                )
        if named:  # the name at the middle of its class: readable without telling colours apart
            middle = np.median(places[mine], axis=0)
            ax.annotate(
                text[:12],
                middle,
                ha="center",
                va="center",
                fontsize=8,
                color="black",
                bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": colours[number], "alpha": 0.85, "lw": 1},
            )
    if named:
        legend(ax, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.6)
    marks = "" if not wrong.any() else " Crosses are images it got wrong."
    many = "" if named else f" {len(present)} classes: near colours are near class numbers, without a legend."
    figure.set_dpi(160)
    return drawing(
        figure,
        f"Features of {name}",
        f"t-SNE of {len(keep):,} validation images of {len(present)} classes.",
        f"t-SNE of the penultimate features, perplexity {perplexity:.0f}, PCA start, fixed seed; colours are true "
        f"classes.{marks}{many} Distances between clusters mean nothing.",
    )


def _colours(count: int) -> list[Any]:
    import matplotlib

    if count <= 10:
        # Paul Tol's "muted" without its palest tones, in an order that keeps neighbours apart
        tones = "#4477aa #ee6677 #228833 #ccaa22 #66bbdd #aa3377 #8a8f98 #e08a1e #7a5bd0 #8c6d46"
        return tones.split()[:count]
    if count <= _NAMED:
        return [matplotlib.colormaps["tab20"](i) for i in range(count)]
    return [matplotlib.colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]
