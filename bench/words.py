"""What a routed policy of several tasks goes by: the words, or the picture?

    python -P -m xdfast.bench.words runs/vla runs/words … --out words.json --figure words.png

Demonstrations of other seeds than the training's, each sample told the instruction of every task in turn. Of a student whose layers
are routed: which share of the samples takes the path that the words' task usually takes, and which the picture's. Of any policy:
its own loss against the demonstrated actions, which must rise with the wrong words if the words matter.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from xdfast.bench.imitation import held_out, options
from xdfast.nn import routed_stacks
from xdfast.pipeline.actdistill_task import embedded
from xdfast.robot.vla import instructions_of

__all__ = ["draw", "followed", "main", "measure"]


@torch.no_grad()
def measure(run: str, *, demos: str = "6", seed: int = 5000) -> dict[str, Any]:
    """Every sample of every task under every task's instruction.

    Args:
        run, demos, seed: as of :func:`xdfast.bench.imitation.held_out`, which says what is raised.

    Returns:
        ``tasks``; ``loss[i][j]``, the policy's own, of pictures of task i with words of task j; ``paths[i][j]``, path → samples
        (None: layers are not routed); ``samples`` by task.
    """
    vla, tasks = held_out(run, demos=demos, seed=seed)
    spec, stacks = vla.spec, routed_stacks(vla)
    words = vla.tokenizer.encode_all([instructions_of(task)[0] for task, _ in tasks], spec.text_length)
    loss = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    paths = [[Counter[str]() for _ in tasks] for _ in tasks]
    samples = [0] * len(tasks)
    for picture, (_, batches) in enumerate(tasks):
        for batch in batches:
            count = len(batch.actions)
            samples[picture] += count
            for told, sentence in enumerate(words):
                seen = replace(batch, instruction=sentence.expand(count, -1))
                states = vla.layers(embedded(vla, seen))
                loss[picture, told] += float(vla.chunk_loss(states, batch.actions)) * count
                if stacks:
                    on = stacks[0].decision.gates.amax(2) > 0.5
                    paths[picture][told].update("".join(str(int(x)) for x in row) for row in on.tolist())
    loss /= torch.tensor(samples, dtype=torch.float64)[:, None]
    return {
        "run": Path(run).name,
        "tasks": [task for task, _ in tasks],
        "samples": samples,
        "loss": [[round(value, 5) for value in row] for row in loss.tolist()],
        "paths": [[dict(cell) for cell in row] for row in paths] if stacks else None,
    }


def followed(paths: Sequence[Sequence[dict[str, int]]]) -> dict[str, Any]:
    """Of samples whose words ask for another task than the picture shows: the shares that take the usual path of each.

    A task's usual path is the most frequent one with its own pictures and words. Pairs of tasks that share a usual path say
    nothing and are left out.

    Args:
        paths: of :func:`measure`.

    Returns:
        ``usual`` path of each task; ``words[i][j]`` and ``picture[i][j]``, shares (None: not told apart, or i = j); ``mean`` of
        both.
    """
    usual = [max(row[i], key=lambda path: row[i][path]) for i, row in enumerate(paths)]
    shares: dict[str, list[list[float | None]]] = {"words": [], "picture": []}
    for i, row in enumerate(paths):
        apart = [usual[i] != usual[j] for j in range(len(row))]
        for name, wanted in (("words", usual), ("picture", [usual[i]] * len(row))):
            shares[name].append(
                [cell.get(wanted[j], 0) / sum(cell.values()) if apart[j] else None for j, cell in enumerate(row)]
            )
    known = {name: [x for row in table for x in row if x is not None] for name, table in shares.items()}
    mean = {name: sum(values) / len(values) if values else None for name, values in known.items()}
    return {"usual": usual, **shares, "mean": mean}


def draw(row: dict[str, Any], told: dict[str, Any], file: Path) -> None:
    """A heat map: pictures downwards, words across, the share that goes the words' way."""
    from matplotlib.figure import Figure

    names = [task.rpartition("/")[2].removesuffix("-v3") for task in row["tasks"]]
    values = torch.tensor([[float("nan") if x is None else 100 * x for x in line] for line in told["words"]])
    figure = Figure(figsize=(1.6 + 0.85 * len(names), 1.4 + 0.62 * len(names)), layout="constrained", dpi=130)
    axes = figure.subplots()
    shown = axes.imshow(values.numpy(), vmin=0, vmax=100, cmap="cividis", aspect="auto")
    for (i, j), value in ((divmod(n, len(names)), float(v)) for n, v in enumerate(values.flatten())):
        text = "own" if i == j else "same path" if value != value else f"{value:.0f}"
        axes.text(
            j, i, text, ha="center", va="center", color="black" if value > 55 or value != value else "white", fontsize=8
        )
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("task that the words ask for")
    axes.set_ylabel("task of the picture")
    axes.set_title(f"{row['run']}: samples on the path of the words' task, %", fontsize=10)
    figure.colorbar(shown)
    figure.savefig(file)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a few figures for each run; ``--out`` keeps all, ``--figure`` draws the first routed run."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args(argv)
    rows, drawn = [], False
    for run in given.runs:
        row = measure(run, demos=given.demos, seed=given.seed)
        loss = torch.tensor(row["loss"])
        own = float(loss.diagonal().mean())
        wrong = float((loss.sum() - loss.diagonal().sum()) / max(len(loss) * (len(loss) - 1), 1))
        line = f"{row['run']}: loss {own:.4f} with its task's words, {wrong:.4f} with another's"
        if row["paths"] is not None:
            row["followed"] = followed(row["paths"])
            mean = row["followed"]["mean"]
            if mean["words"] is None:
                line += "; one path for all tasks"
            else:
                line += f"; path of the words' task {100 * mean['words']:.0f} %, of the picture's {100 * mean['picture']:.0f} %"
                if given.figure is not None and not drawn:
                    draw(row, row["followed"], given.figure)
                    drawn = True
        rows.append(row)
        print(line)
    if given.figure is not None and not drawn:
        print("no picture: no run has layers that are routed by task", file=sys.stderr)
    if given.out is not None:
        result = {"demos": given.demos, "seed": given.seed, "rows": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
