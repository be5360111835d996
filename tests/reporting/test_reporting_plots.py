"""Pictures: valid inline SVG, their words, few and many classes, missing parts."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from xdfast.reporting import RunRecord
from xdfast.reporting.embedding import project, tsne
from xdfast.reporting.groups import group_runs
from xdfast.reporting.plots import confusion_matrix, curves, methods, styles, tradeoff


def record(method="RSD", seed=0, top1: float | None = 0.9) -> RunRecord:
    rows = [{"kind": "train", "epoch": e, "step": e, "loss": 2.0 / (e + 1) + seed / 10} for e in range(3)]
    rows += [{"kind": "val", "epoch": e, "step": e, "top1": 0.3 * e, "loss": None} for e in range(3)]
    metrics = {} if top1 is None else {"top1": top1}
    return RunRecord(f"{method}{seed}", method, seed, "distill", metrics, history=rows, model_name="net")


def check(picture) -> None:
    ElementTree.fromstring(picture.svg.replace("xlink:href", "href"))  # well-formed
    assert picture.svg.startswith('<svg role="img" aria-label="')
    assert "#010203" not in picture.svg
    assert 'id="figure_1"' not in picture.svg
    assert picture.alt


def test_curves_and_methods() -> None:
    groups, _ = group_runs([record(), record(seed=1, top1=0.94), record("from scratch"), record("KD", top1=None)])
    picture = curves(groups)
    check(picture)
    assert "currentColor" in picture.svg and "validation top-1" in picture.svg and "from scratch" in picture.svg
    dots = methods(groups)
    check(dots)
    assert "RSD 92.0 ± 25.4 % (n = 2)" in dots.alt and "from scratch 90.0 % (n = 1)" in dots.alt
    assert "KD" not in dots.alt
    look = styles(groups)
    assert len({s["color"] for s in look.values()}) == 3 and len({s["marker"] for s in look.values()}) == 3


def test_nothing_to_draw() -> None:
    bare = RunRecord("a", "RSD", None, "distill", {})
    groups, _ = group_runs([bare])
    assert curves(groups) is None and methods(groups) is None
    assert tradeoff([{"x": 1.0, "top1": None, "name": "a", "role": "student"}], "x", "t") is None
    assert confusion_matrix([[0, 0], [0, 0]], ["a", "b"], "x") is None
    assert tsne(None, [], "x") is None
    assert tsne({"features": np.zeros((3, 2)), "labels": np.zeros(3)}, [], "x") is None


def test_confusion_is_normalised_by_row_and_told_in_words() -> None:
    picture = confusion_matrix([[9, 1], [5, 5]], ["<cat>", "dog"], "best")
    check(picture)
    assert ">90</text>" in picture.svg.replace("\n", "") or "90" in picture.svg
    assert "70.0 % of 20 images" in picture.alt
    assert "dog taken for <cat> (50 %)" in picture.caption
    assert "<cat>" not in picture.svg


def test_confusion_of_many_classes_has_class_numbers() -> None:
    counts = np.random.default_rng(0).integers(0, 5, (200, 200))
    picture = confusion_matrix(counts, [f"class {i}" for i in range(200)], "best")
    check(picture)
    assert "class number" in picture.svg
    assert picture.svg.count("<text") < 80


@pytest.mark.parametrize(("points", "classes"), [(12, 3), (90, 30)])
def test_tsne(points, classes) -> None:
    labels = np.arange(points) % classes
    features = np.eye(classes)[labels] * 5 + np.random.default_rng(0).normal(size=(points, classes))
    found = {"features": features, "labels": labels, "predictions": np.roll(labels, 0)}
    picture = tsne(found, [str(i) for i in range(classes)], "RSD")
    check(picture)
    assert f"{points} validation images of {classes} classes" in picture.alt
    assert ("without a legend" in picture.caption) == (classes > 20)


def test_projection_is_repeatable_separates_and_checks() -> None:
    labels = np.arange(60) % 2
    features = labels[:, None] * 50.0 + np.random.default_rng(0).normal(size=(60, 4))
    a, perplexity = project(features)
    b, _ = project(features)
    np.testing.assert_array_equal(a, b)
    assert perplexity == 59 / 4
    gap = np.linalg.norm(a[labels == 0].mean(0) - a[labels == 1].mean(0))
    assert gap > a[labels == 0].std()
    assert project(features[:, :1])[0].shape == (60, 2)
    with pytest.raises(ValueError, match="at least 8"):
        project(features[:3])
    with pytest.raises(ValueError, match="finite"):
        project(features * np.nan)


def test_tradeoff_names_its_points() -> None:
    points = [
        {"x": 10.0, "top1": 0.8, "name": "big", "role": "teacher"},
        {"x": 1.0, "top1": 0.7, "name": "small", "role": "student"},
    ]
    picture = tradeoff(points, "GMACs (counted)", "Accuracy and cost")
    check(picture)
    assert "big (teacher)" in picture.svg and "small 70.0 % at 1" in picture.alt
