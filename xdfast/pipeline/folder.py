"""A run's folder: whose it is, whether it is finished, what is in it.

config.yaml       the settings          metrics.jsonl   rows of training and validation
policy/           a robot's policy      policy-best/    the best in evaluations during training
vla/              a policy of several tasks, told by a sentence; tasks/ its evaluation in each
stage1/           of ActDistill: a run of its own, with heads/ and targets/, the teacher's answers
resume.pt         to continue           student/        the result, loadable by plain timm
summary.json      final figures; its presence means the run is finished
projectors.safetensors                  of feature losses: student features → the teacher's
evaluation.json, embedding.npz          written by evaluate; of a policy episodes.jsonl, videos/, saliency.png
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from xdfast import distributed
from xdfast.models import FeatureModel, create_model
from xdfast.models.checkpoint import CheckpointError, atomic_write
from xdfast.models.own import allow, code_hash, is_own, split_weights
from xdfast.pipeline.config import RunConfig, load_yaml, save_yaml
from xdfast.pipeline.journal import read_history

__all__ = ["RunResult", "finish", "load_run", "model_source", "open_folder", "read_record"]

log = logging.getLogger("xdfast")

PROJECTORS_FILE = "projectors.safetensors"
_OURS = (
    "config.yaml",
    "metrics.jsonl",
    "resume.pt",
    "summary.json",
    PROJECTORS_FILE,
    "evaluation.json",
    "embedding.npz",
    "student",
    "policy",
    "policy-best",
    "vla",
    "tasks",
    "heads",
    "targets",
    "videos",
    "saliency.png",
    "episodes.jsonl",
    "tensorboard",
)


@dataclass
class RunResult:
    """A finished ``distill`` or ``finetune`` run.

    Attributes:
        kind: "distill", "finetune", "policy" or "vla".
        path: its folder.
        config: the settings, plain values.
        metrics: final figures: top1, top5, loss (validation), seconds, images_per_s, steps; of a policy success,
            best_success, seconds, samples_per_s, steps.
        bad_images: path → reason of images that could not be read.
    """

    kind: str
    path: Path
    config: dict[str, Any]
    metrics: dict[str, float]
    bad_images: dict[str, str] = field(default_factory=dict)

    @cached_property
    def student(self) -> FeatureModel:
        """The trained model with its own normalisation, in eval mode; ``.student.net`` is the plain timm model."""
        if self.kind in ("policy", "vla"):
            raise AttributeError(f"{self.path} is the run of a policy: it has a .policy, no .student")
        return create_model(str(self.path / "student")).eval()

    @cached_property
    def policy(self) -> Any:
        """The trained policy of a robot's run, in eval mode: a DiffusionPolicy, or a CompactVLA of several tasks."""
        if self.kind == "vla":
            from xdfast.robot.vla import load_vla

            return load_vla(self.path)
        if self.kind != "policy":
            raise AttributeError(f"{self.path} is a {self.kind} run: it has a .student, no .policy")
        from xdfast.robot.policy_files import load_policy

        return load_policy(self.path)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl."""
        return read_history(self.path / "metrics.jsonl")

    def __repr__(self) -> str:
        figures = ", ".join(f"{k}={v:.4g}" for k, v in self.metrics.items())
        return f"RunResult({self.kind}, {self.path}, {figures})"


def open_folder(config: RunConfig, kind: str) -> tuple[Path, RunResult | None]:
    """Makes or re-opens ``config.out``; the second value is the finished run, if it is one.

    A local model that has changed since is another setting: a run must not pass for one that started from it.

    Raises:
        ValueError: the folder holds a run with other settings; names them, with both values.
        NotADirectoryError: the path is a file.
        PermissionError: the folder cannot be written.
    """
    out = Path(config.out).expanduser()
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out must be a folder, but {out} is a file")
    settings = {"kind": kind, **config.to_dict(), "weights": _weights_of(config)}

    def prepare() -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f"cannot make the output folder {out}: {error}") from error
        path = out / "config.yaml"
        if path.is_file():
            saved = {**config.defaults(), **load_yaml(path)}  # a run of an older version lacks settings that are new
            settings["weights"] = {**(saved.get("weights") or {}), **settings["weights"]}  # a source may be gone by now
            differing = [k for k in settings if k not in config.FREE and saved.get(k) != settings[k]]
            if differing and not _holds_work(out):
                log.info("%s was begun with other settings, but nothing was trained; taking it over", out)
                differing = []
            if differing and not config.overwrite:
                facts = "; ".join(f"{k}: {saved.get(k)!r} there, {settings[k]!r} asked for" for k in differing)
                raise ValueError(
                    f"{out} holds a run with other settings ({facts}). Choose another out folder, use the same settings to "
                    "continue it, or overwrite=True (--overwrite) to throw it away"
                )
            if differing:
                log.warning("overwriting the run in %s (differs in %s)", out, ", ".join(differing))
                for name in _OURS:
                    target = out / name
                    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        atomic_write(path, lambda aside: save_yaml(aside, settings))

    if distributed.is_main():
        prepare()
    distributed.barrier()
    return out, load_run(out) if (out / "summary.json").is_file() else None


def _holds_work(out: Path) -> bool:
    """Whether anything would be lost: a run that failed before its first checkpoint holds no more than its settings."""
    return any((out / name).exists() for name in _OURS if name not in ("config.yaml", "metrics.jsonl", "tensorboard"))


def _weights_of(config: RunConfig) -> dict[str, str]:
    """Setting → hash of the weights, for models that are local files (published weights never change), and of code in a file."""
    found = {}
    specs = {key: getattr(config, key, None) for key in ("teacher", "student", "model")}
    specs |= {f"teacher {number}": spec for number, spec in enumerate(getattr(config, "more_teachers", ()), 2)}
    for key, spec in specs.items():
        if not isinstance(spec, str):
            continue
        code = (split_weights(spec) or (spec, ""))[0]
        if is_own(code):
            allow(code)  # named in this call; a folder of its weights may be loaded from now on
            if hashed := code_hash(code):
                found[f"{key} code"] = hashed
        folder = Path(str(model_source(spec)) if not spec.startswith("object:") else spec)
        if (folder / "vla").is_dir():
            folder = folder / "vla"
            name = "vla.safetensors" if (folder / "vla.safetensors").is_file() else "hf_vla.safetensors"
        elif (folder / "policy" / "policy.safetensors").is_file():  # a policy, for its encoder
            folder, name = folder / "policy", "policy.safetensors"
        else:
            name = "model.safetensors"
        file = folder / name if folder.is_dir() else Path((split_weights(spec) or spec.partition("@"))[-1]).expanduser()
        if file.is_file():
            digest = hashlib.sha256()
            with open(file, "rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            found[key] = digest.hexdigest()[:16]
    return found


def finish(out: Path, kind: str, config: RunConfig, metrics: dict[str, float], bad: dict[str, str]) -> RunResult:
    """Writes summary.json, the mark of a finished run, and returns the result."""
    summary = {"kind": kind, "metrics": metrics, "bad_images": bad}
    if distributed.is_main():
        atomic_write(
            out / "summary.json", lambda aside: aside.write_text(json.dumps(summary, indent=2), encoding="utf-8")
        )
    distributed.barrier()
    return RunResult(kind, out, config.to_dict(), metrics, bad)


def load_run(path: str | Path) -> RunResult:
    """A finished run from its folder.

    A relative path among its settings (teacher, model, data) that leads nowhere from here is looked for from the folders above
    the run, where it began: reports are made from elsewhere, and folders of runs are moved as a whole.

    Raises:
        FileNotFoundError: no run there, or one that is not finished.
        CheckpointError: summary.json is damaged.
        ValueError: config.yaml is damaged.
    """
    path = Path(path)
    if not (path / "summary.json").is_file():
        state = (
            "an unfinished run; the command that started it continues it"
            if (path / "config.yaml").is_file()
            else "no run"
        )
        raise FileNotFoundError(f"{path} holds {state} (no summary.json)")
    config = load_yaml(path / "config.yaml")
    summary = read_record(path / "summary.json", {"kind": str, "metrics": dict, "bad_images": dict})
    kind = config.pop("kind", summary["kind"])
    config.pop("weights", None)
    return RunResult(kind, path, _found_again(config, path), summary["metrics"], summary["bad_images"])


def _found_again(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    for key in ("teacher", "student", "model", "encoder", "data", "val_data", "demos"):
        named = config.get(key)
        if not isinstance(named, str) or not named or Path(named).is_absolute() or Path(named).exists():
            continue
        if "/" not in named and key not in ("data", "val_data", "demos"):
            continue  # a model's name, not the folder that happens to be called so
        places = (above / named for above in folder.resolve().parents)
        found = next((place for place in places if place.exists()), None)
        if found is not None:
            config[key] = str(found)
    return config


def read_record(file: Path, fields: dict[str, type], known: Collection[str] = ()) -> dict[str, Any]:
    """A JSON file that a verb wrote; ``fields`` are those it must have, ``known`` all that it can have (empty: any).

    Raises:
        CheckpointError: damaged; the message names file and way out.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of UnicodeDecodeError and JSONDecodeError as well
        reason = str(error)
    else:
        if not isinstance(values, dict):
            reason = f"it holds a {type(values).__name__}"
        else:
            wrong = [name for name, kind in fields.items() if not isinstance(values.get(name), kind)]
            strange = [name for name in values if known and name not in known]
            if not wrong and not strange:
                return values
            reason = f"{', '.join(wrong)} missing or of another type" if wrong else f"nothing has {', '.join(strange)}"
    raise CheckpointError(f"{file} is damaged ({reason}); delete it and give the command that wrote it again")


def model_source(value: Any) -> Any:
    """What create_model takes: a module, or a spec where a run's folder stands for its student."""
    if isinstance(value, RunResult):
        return str(value.path / "student")
    if isinstance(value, (str, Path)) and (Path(value) / "student" / "config.json").is_file():
        return str(Path(value) / "student")
    if isinstance(value, str) and value.startswith("object:"):
        raise ValueError(f"the run was started with a Python object ({value}); pass that object again to continue it")
    return value
