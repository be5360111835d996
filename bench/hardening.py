"""The long form of tests/hardening, and the page of what it found: ``make harden``.

``python -m xdfast.bench.hardening [PART…]`` runs the parts (all without a name) one after another and writes
``bench/results/cpu/hardening.json`` and the tables of ``docs/hardening.md``. A part that was run before is replaced, the others
are kept. ``--page`` only rewrites the tables. A part that fails is written down as failed, and the exit status is 1.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

__all__ = ["BEGIN", "END", "PARTS", "main", "page"]

BEGIN, END = "<!-- hardening -->", "<!-- /hardening -->"
RESULTS, DOCS = Path("bench/results/cpu/hardening.json"), Path("docs/hardening.md")
#: Part → what pytest is told.
PARTS: dict[str, list[str]] = {
    "losses": ["tests/hardening/test_hardening_sweep.py", "-k", "test_losses"],
    "ops": ["tests/hardening/test_hardening_sweep.py", "-k", "test_ops"],
    "bad-input": ["tests/hardening/test_hardening_bad_input.py"],
    "images": ["tests/hardening/test_hardening_files.py", "-k", "test_images"],
    "demonstrations": ["tests/hardening/test_hardening_files.py", "-k", "test_demonstrations"],
    "run-folders": ["tests/hardening/test_hardening_runs.py"],
    "kills": ["tests/hardening/test_hardening_kills.py"],
}


def run_part(name: str, seed: int) -> dict[str, Any]:
    """One part in a pytest of its own: its cases, seconds, and pytest's closing line."""
    with tempfile.TemporaryDirectory() as folder:
        tally = Path(folder) / "tally.json"
        env = {
            **os.environ,
            "XDFAST_HARDEN": "long",
            "XDFAST_HARDEN_SEED": str(seed),
            "XDFAST_HARDEN_TALLY": str(tally),
        }
        command = [
            str(Path(sys.executable).parent / "pytest"),
            "-q",
            "-m",
            "not gpu",
            "-p",
            "no:cacheprovider",
            *PARTS[name],
        ]
        began = time.monotonic()
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seconds = time.monotonic() - began
        rows = json.loads(tally.read_text(encoding="utf-8")) if tally.is_file() else []
    if done.returncode:
        print(done.stdout[-8000:])
    closing = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return {"seed": seed, "seconds": round(seconds, 1), "passed": done.returncode == 0, "pytest": closing, "rows": rows}


def page(results: dict[str, Any]) -> str:
    """Tables of a hardening.json, as Markdown."""
    lines = [
        "| part | cases | seed | minutes | result |", "| --- | ---: | ---: | ---: | --- |",
        *(
            f"| {name} | {_cases(part)} | {part['seed']} | {part['seconds'] / 60:.1f} | "
            f"{'all held' if part['passed'] else 'failed'} |"
            for name, part in results["parts"].items()
        ),
        "", f"On {results['machine']}.",
    ]  # fmt: skip
    for name, part in results["parts"].items():
        if name in ("losses", "ops"):
            lines += ["", f"### {name.capitalize()}", "", *_by_dtype(part["rows"], name)]
        else:
            lines += ["", f"### {name.replace('-', ' ').capitalize()}", "", *_by_outcome(part["rows"])]
    return "\n".join(lines)


def _cases(part: dict[str, Any]) -> int:
    return sum(row["cases"] for row in part["rows"] if "promises" not in row["part"])


def _by_dtype(rows: list[dict[str, Any]], part: str) -> list[str]:
    dtypes = ("float64", "float32", "bfloat16", "float16")
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for row in rows:
        if row["part"] == part:
            found[row["name"]][row["outcome"]] = row["cases"]
    lines = [f"| {part} | cases | {' | '.join(dtypes)} |", f"| --- | ---: |{' ---: |' * len(dtypes)}"]
    for name, by in sorted(found.items()):
        lines.append(f"| `{name}` | {sum(by.values())} | {' | '.join(str(by.get(d, 0)) for d in dtypes)} |")
    promises = [row for row in rows if row["part"] != part]
    told = ", ".join(
        f"{row['name']} ({row['cases']})" for row in sorted(promises, key=lambda r: (-r["cases"], r["name"]))
    )
    return [*lines, "", f"Promises looked at: {told}."] if told else lines


def _by_outcome(rows: list[dict[str, Any]]) -> list[str]:
    outcomes = sorted({row["outcome"] for row in rows})
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for row in rows:
        found[row["name"]][row["outcome"]] = row["cases"]
    lines = [f"| what | {' | '.join(outcomes)} |", f"| --- |{' ---: |' * len(outcomes)}"]
    return [
        *lines,
        *(f"| {name} | {' | '.join(str(by.get(o, 0)) for o in outcomes)} |" for name, by in sorted(found.items())),
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    only_page = "--page" in given
    wanted = [name for name in given if not name.startswith("--")] or ([] if only_page else list(PARTS))
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        print(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    seed = int(os.environ.get("XDFAST_HARDEN_SEED", "2026"))
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"parts": {}}
    for name in wanted:
        results["parts"][name] = part = run_part(name, seed)
        results["machine"] = _machine()
        results["parts"] = {key: results["parts"][key] for key in PARTS if key in results["parts"]}
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{name}: {_cases(part)} cases in {part['seconds']:.0f} s; {part['pytest']}", flush=True)
    if DOCS.is_file() and results["parts"]:
        text = DOCS.read_text(encoding="utf-8")
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        DOCS.write_text(f"{head}{BEGIN}\n{page(results)}\n{END}{tail}", encoding="utf-8")
    return 0 if all(part["passed"] for part in results["parts"].values()) else 1


def _machine() -> str:
    import torch

    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


if __name__ == "__main__":
    sys.exit(main())
