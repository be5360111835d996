"""What ``xdfast recipes`` and docs/recipes.md say of our own runs, gathered from ``bench/results``.

``python -m xdfast.bench.recipes`` (a part of ``make figures``), in the repository: writes ``xdfast/recipes/results.json`` and the
tables of ``docs/recipes.md`` between their markers. Every figure belongs to a file that holds the run; nothing is typed in.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

__all__ = ["BEGIN", "END", "gather", "main", "page"]

BEGIN, END = "<!-- recipes -->", "<!-- /recipes -->"


def gather(results: Path) -> list[dict[str, Any]]:
    """Figures of recipes from the files under ``bench/results/cpu``."""
    found: list[dict[str, Any]] = []
    for file, read in (
        ("policy_metaworld.json", _policies),
        ("vla_metaworld.json", _vla),
        ("actdistill.json", partial(_actdistill, teacher="vla-metaworld", student="actdistill-metaworld")),
        (
            "actdistill_eighth.json",
            partial(_actdistill, teacher="vla-metaworld", student="actdistill-metaworld-experts"),
        ),
        (
            "actdistill_words.json",
            partial(_actdistill, teacher="vla-metaworld-words", student="actdistill-metaworld-words"),
        ),
        ("cifar10_unlabelled.json", _cifar10),
        ("policy_encoders.json", _encoders),
        ("compare_cifar10.json", _compare),
    ):
        if file == "compare_cifar10.json" and not (results / "cpu" / file).is_file():
            continue  # not run yet
        values = json.loads((results / "cpu" / file).read_text(encoding="utf-8"))
        found += [{**figure, "file": f"bench/results/cpu/{file}"} for figure in read(values)]
    return found


def _policies(values: dict[str, Any]) -> list[dict[str, Any]]:
    return _successes(values, "policy-metaworld")


def _encoders(values: dict[str, Any]) -> list[dict[str, Any]]:
    return _successes(values, "suite-encoders")


def _successes(values: dict[str, Any], recipe: str) -> list[dict[str, Any]]:
    machine = values["machine"]
    device = f"{machine['threads']} core of {machine['cpu']}"
    rows = []
    for row in values["rows"]:
        encoder = row.get("encoder", "scratch")
        encoder = {"scratch": "from scratch", "distilled": "distilled by make demo-robot"}.get(encoder, encoder)
        what = f"{_short(row['task'])}, encoder {encoder}"
        success, seconds, half = row["success"], row["train_seconds"], row["half_width"]
        rows.append(_row(recipe, what, "success", success, row["runs"], device, seconds, half))
    return rows


def _vla(values: dict[str, Any]) -> list[dict[str, Any]]:
    device, seconds = values["machine"].partition(",")[0], values["training"]["seconds"]
    return [_solved("vla-metaworld", "5 tasks", values["solved"], values["episodes"], device, seconds)]


def _actdistill(values: dict[str, Any], *, teacher: str, student: str) -> list[dict[str, Any]]:
    from xdfast.reporting.tables import summarize

    device, tasks = values["environment"]["processor"], f"{values['vla']['success']['total']['tasks']} tasks"
    runs = {run["name"]: run for run in values["runs"]}
    rows = []
    for column in values["vla"]["columns"]:
        if column["role"] not in ("teacher", "learned"):
            continue
        trained = column["per_run"]
        recipe = teacher if column["role"] == "teacher" else student
        what = tasks if column["role"] == "teacher" else f"{tasks}, {column['label']} of the layers' FLOPs"
        metrics = [runs[one["run"]]["metrics"] for one in trained]
        seconds = fmean(m["seconds"] + m.get("seconds_stage1", 0.0) for m in metrics)
        solved, episodes = (sum(one[key] for one in trained) for key in ("solved", "episodes"))
        if len(trained) == 1:
            rows.append(_solved(recipe, what, solved, episodes, device, seconds))
        else:
            over = summarize([one["rate"] for one in trained])
            what += f", {solved} of {episodes} episodes"
            rows.append(_row(recipe, what, "success", over.mean, over.n, device, seconds, over.half_width))
    return rows


def _cifar10(values: dict[str, Any]) -> list[dict[str, Any]]:
    what = f"features of a teacher of {100 * values['teacher_top1']:.1f} % top-1"
    return [_row("xdistill-cifar10", what, "knn", values["evaluation"]["knn"], 1, values["machine"], None, None)]


def _compare(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each pair: from scratch, KD and RSD."""
    device, rows = values["environment"]["processor"], []
    for row in values["rows"]:
        if row["method"] in ("scratch", "kd", "rsd") and row["top1"]:
            what, top1 = f"{row['pair']}, {row['method']}", row["top1"]
            rows.append(
                _row("compare-cifar10", what, "top1", top1["mean"], top1["n"], device, None, top1["half_width"])
            )
    return rows


def _solved(recipe: str, what: str, solved: int, episodes: int, device: str, seconds: float) -> dict[str, Any]:
    from xdfast.reporting.intervals import wilson_interval

    row = _row(
        recipe, f"{what}, {solved} of {episodes} episodes", "success", solved / episodes, 1, device, seconds, None
    )
    low, high = wilson_interval(solved, episodes)
    return {**row, "low": round(100 * low, 2), "high": round(100 * high, 2), "interval": "Wilson's, of the episodes"}


def _row(
    recipe: str,
    what: str,
    metric: str,
    value: float,
    seeds: int,
    device: str,
    seconds: float | None,
    half: float | None,
) -> dict[str, Any]:
    around = None if half is None else (round(100 * max(0, value - half), 2), round(100 * min(1, value + half), 2))
    return {
        "recipe": recipe,
        "what": what,
        "metric": metric,
        "value": round(100 * value, 2),
        "low": around[0] if around else None,
        "high": around[1] if around else None,
        "interval": "95 % over seeds" if around else None,
        "seeds": seeds,
        "device": device,
        "hours": None if seconds is None else round(seconds / 3600, 3),
    }


def _short(task: str) -> str:
    return task.removeprefix("metaworld/").removesuffix("-v3")


def page(text: str) -> str:
    """A page with the tables between its markers made anew.

    Raises:
        ValueError: it lacks the markers.
    """
    from xdfast.recipes.listing import markdown

    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN} … {END}")
    return f"{before}{begin}\n\n{markdown()}\n\n{end}{after}"


def main(root: Path = Path(".")) -> None:
    """Writes both files under the repository's root."""
    rows = gather(root / "bench" / "results")
    text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    (root / "xdfast" / "recipes" / "results.json").write_text(text, encoding="utf-8")
    file = root / "docs" / "recipes.md"
    file.write_text(page(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
