"""The model card: what a stranger has to know about a model, as ``README.md`` with the hub's metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml

__all__ = ["CardFacts", "model_card"]


@dataclass(frozen=True)
class CardFacts:
    """Attributes:
    title: of the page.
    summary: one or two sentences.
    usage: Python that loads the model.
    about_inputs: size, normalisation; a sentence.
    recipe: the settings of the run.
    made: by which command, from which teacher; a sentence.
    figures: name → value, in the order of the table.
    measured: on what, a sentence.
    license: as the hub spells it, or None.
    library: ``"timm"`` or ``"xdfast"``.
    task: the hub's pipeline tag.
    tags: further ones.
    classes: names.
    accuracy: (data, top-1 in [0, 1]) for the hub's own table, or None.
    exported: content of ``export.json``, or None.
    """

    title: str
    summary: str
    usage: str
    about_inputs: str
    recipe: Mapping[str, Any]
    made: str
    figures: Mapping[str, str]
    measured: str = ""
    license: str | None = None
    library: str = "timm"
    task: str = "image-classification"
    tags: Sequence[str] = ()
    classes: Sequence[str] = field(default_factory=tuple)
    accuracy: tuple[str, float] | None = None
    exported: Mapping[str, Any] | None = None


def model_card(facts: CardFacts) -> str:
    """The text of ``README.md``, its metadata as huggingface_hub writes it."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    results = None
    if facts.accuracy is not None:
        data, top1 = facts.accuracy
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=data,
                dataset_name=data,
                metric_type="accuracy",
                metric_value=top1,
            )
        ]
    card_data = ModelCardData(
        license=facts.license,
        library_name=facts.library,
        pipeline_tag=facts.task,
        tags=["xdfast", *facts.tags],
        model_name=facts.title,
        eval_results=results,
    )
    shown = list(facts.classes)[:20]
    licence = (
        f"The weights: {facts.license}."
        if facts.license
        else "Not stated by whoever published these weights: ask before you use them."
    )
    card = ModelCard.from_template(
        card_data,
        template_str=files("xdfast.deploy").joinpath("card.md.j2").read_text(encoding="utf-8"),
        title=facts.title,
        summary=facts.summary,
        usage=facts.usage,
        about_inputs=facts.about_inputs,
        classes=", ".join(shown) + (f", … ({len(facts.classes)})" if len(facts.classes) > len(shown) else ""),
        figures=list(facts.figures.items()),
        measured=facts.measured,
        exported=_exported(facts.exported),
        made=facts.made,
        recipe=yaml.safe_dump(dict(facts.recipe), sort_keys=False, allow_unicode=True).strip(),
        licence=f"{licence} A student can inherit conditions from its teacher and its data.",
    )
    return str(card)


def _exported(data: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if data is None:
        return None
    rows = []
    for graph in data["graphs"]:
        for file in graph["files"]:
            error = f"{file['parity']['max_abs']:.1e}"
            for row in file["latency"] or [None]:
                times = (
                    ("", "", "")
                    if row is None
                    else (str(row["batch"]), f"{row['p50_ms']:.2f}", f"{row['speedup']:.2f}")
                )
                rows.append((f"`{file['file']}`", error, *times))
    return {"device": data["device"], "threads": data["threads"], "rows": rows}
