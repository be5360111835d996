"""``push`` and ``pull``: a trained model with its card to the Hugging Face hub, and back; or to a folder and back."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdfast._version import __version__
from xdfast.deploy.card import CardFacts, model_card
from xdfast.deploy.hub import LOCAL, Target, fetch_folder, parse_target, send_folder
from xdfast.models import create_model
from xdfast.models.checkpoint import CheckpointError
from xdfast.models.students import CONFIG_FILE, WEIGHTS_FILE
from xdfast.pipeline.config import load_yaml, save_yaml
from xdfast.pipeline.folder import RunResult

__all__ = ["Published", "pull", "push"]

log = logging.getLogger("xdfast")

#: Kind → files of its model, the one with the weights first.
_MODEL_FILES = {
    "student": (WEIGHTS_FILE, CONFIG_FILE),
    "policy": ("policy.safetensors", "policy.json"),
    "vla": ("vla.safetensors", "vla.json"),
}
_FIGURES = {
    "top1": "top-1",
    "top5": "top-5",
    "knn": "k-NN top-1",
    "linear_probe": "linear probe top-1",
    "cka": "CKA to the teacher",
    "success": "success rate",
}


@dataclass(frozen=True)
class Published:
    """What :func:`push` did.

    Attributes:
        where: URL of the commit, or the folder.
        files: names of what was sent.
        card: text of the model card.
    """

    where: str
    files: tuple[str, ...]
    card: str


def push(
    model: str | Path | RunResult,
    to: str,
    *,
    license: str | None = None,
    exported: str | Path | None = None,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
) -> Published:
    """Publishes a student or policy: safetensors, its config, a model card (recipe, metrics, FLOPs, licence, how to load it with
    plain timm), the settings of the run as ``recipe.yaml``, and exported files if there are any.

    Paths of this machine are cut to their last part before anything is sent.

    Args:
        model: a run or its folder, or the folder of a saved student, policy or VLA.
        to: ``"OWNER/NAME"`` (or ``"hf-hub:OWNER/NAME"``) on the hub, made if missing; ``"local-dir:PATH"``: a folder.
        license: of the weights, as the hub spells it (``"apache-2.0"``, ``"cc-by-nc-4.0"``…). Without one the card says that
            none was stated.
        exported: folder that :func:`xdfast.export` wrote; it is sent along as ``exported/``.
        private: a repository that is made anew is yours alone; False: everybody's.
        revision: branch, made if missing; default: main.
        message: of the commit.

    Returns:
        :class:`Published`.

    Raises:
        FileNotFoundError: no model there, or no export.
        ConnectionError: the hub cannot be reached or refuses.
        ValueError: ``to`` is neither a repository nor a folder; weights that nothing can rebuild from the files alone.

    Example:
        >>> xd.push("runs/flowers", "me/flowers-resnet18", license="apache-2.0")  # doctest: +SKIP
        >>> xd.push("runs/flowers", "local-dir:shelf/flowers").files              # doctest: +SKIP
        ('README.md', 'config.json', 'model.safetensors', 'recipe.yaml')
    """
    target = parse_target(to, "to")
    path = model.path if isinstance(model, RunResult) else Path(model).expanduser()
    kind, folder = _find(path)
    if license is None:
        log.warning("no licence given (license=…, --license): the card will say that none was stated")
    with tempfile.TemporaryDirectory(prefix="xdfast-push-") as aside:
        stage = Path(aside)
        weights, config = _MODEL_FILES[kind]
        shutil.copyfile(folder / weights, stage / weights)
        values = _public(_json(folder / config))
        (stage / config).write_text(json.dumps(values, indent=2), encoding="utf-8")
        recipe = _recipe(path, values)
        if recipe:
            save_yaml(stage / "recipe.yaml", recipe)
        record = _copy_export(exported, stage)
        title = str(target).rpartition("/")[2] if target.folder is None else target.folder.name
        facts = _facts(kind, folder, path, values, recipe, target, title, license, record)
        card = model_card(facts)
        (stage / "README.md").write_text(card, encoding="utf-8")
        files = tuple(sorted(str(f.relative_to(stage)) for f in stage.rglob("*") if f.is_file()))
        log.info("sending %d files to %s", len(files), target)
        said = message or f"{title}, by xdfast {__version__}"
        where = send_folder(stage, target, private=private, revision=revision, message=said)
    return Published(where, files, card)


def pull(source: str, out: str | Path | None = None, *, revision: str | None = None) -> Path:
    """A published model as a folder that ``create_model``, ``load_encoder``, ``load_policy``, ``finetune`` and ``export`` take.

    Only weights as safetensors, JSON, YAML, text and exported graphs are fetched, and the weights are read before the folder is
    returned; no code of the repository runs.

    Args:
        source: ``"OWNER/NAME"`` (or ``"hf-hub:…"``), or ``"local-dir:PATH"``.
        out: folder for the files; default: the hub's cache, or the local folder itself.
        revision: branch, tag or commit.

    Raises:
        ConnectionError: the hub cannot be reached, or has no such repository.
        FileNotFoundError: no such folder, or no model in it.
        CheckpointError: damaged or cut short.
    """
    target = parse_target(source, "source")
    folder = fetch_folder(target, None if out is None else Path(out).expanduser(), revision=revision)
    kind, folder = _find(folder)
    _check_weights(folder / _MODEL_FILES[kind][0])
    log.info("%s: a %s in %s", target, kind, folder)
    return folder


def _find(path: Path) -> tuple[str, Path]:
    """(kind, folder of its files) of a run or a saved model."""
    for kind, (weights, config) in _MODEL_FILES.items():
        for folder in (path / kind, path):
            if (folder / config).is_file() and (folder / weights).is_file():
                if kind == "student" and "architecture" not in _json(folder / config):
                    raise ValueError(
                        f"{folder} holds the weights of a module of yours, which nobody could rebuild from the files; "
                        "publish it with its code"
                    )
                return kind, folder
    raise FileNotFoundError(
        f"{path} holds no student, policy or VLA (no {' or '.join(c for _, c in _MODEL_FILES.values())} with its weights); pass "
        "the folder of a run or of a saved model"
    )


def _check_weights(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                opened.get_slice(name).get_shape()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut short ({error}); pull it again") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy or write the model again") from error


def _public(value: Any) -> Any:
    """Without the folders of this machine: paths keep their last part."""
    if isinstance(value, dict):
        return {key: _public(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(part) for part in value]
    if not isinstance(value, str):
        return value
    name, at, rest = value.partition("@")
    if at and rest.startswith(("/", "~", "./", "../")):  # NAME@/path/to/weights
        return f"{name}@{Path(rest).name}"
    prefix, colon, path = value.partition(":")
    if colon and path.startswith(("/", "~")) and prefix.replace("-", "").isalnum():  # unlabelled:/data/photos
        return f"{prefix}:{Path(path).name}"
    return Path(value).name if value.startswith(("/", "~", "./", "../")) else value


def _recipe(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run, from its folder or from the model's own file."""
    file = path / "config.yaml"
    kept = _kept(config)
    found = load_yaml(file) if file.is_file() else dict(kept.get("config") or {})
    if not file.is_file() and "kind" in kept:
        found = {"kind": kept["kind"], **found}
    hidden = {
        "out",
        "weights",
        "workers",
        "device",
        "progress",
        "overwrite",
        "tensorboard",
        "log_every",
        "checkpoint_seconds",
    }
    return _public({key: value for key, value in found.items() if key not in hidden and value is not None})


def _copy_export(exported: str | Path | None, stage: Path) -> dict[str, Any] | None:
    if exported is None:
        return None
    from xdfast.deploy.write import RECORD

    folder = Path(exported).expanduser()
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(f"{folder} holds no finished export (no {RECORD}); `xdfast export` writes one")
    record = _public(_json(folder / RECORD))
    (stage / "exported").mkdir()
    for graph in record["graphs"]:
        for file in graph["files"]:
            for part in folder.glob(f"{file['file']}*"):  # large ONNX files have their weights beside them
                shutil.copyfile(part, stage / "exported" / part.name)
    (stage / "exported" / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
    return record


def _facts(
    kind: str,
    folder: Path,
    path: Path,
    config: dict[str, Any],
    recipe: dict[str, Any],
    target: Target,
    title: str,
    license: str | None,
    record: dict[str, Any] | None,
) -> CardFacts:
    described = _student_facts(folder, config) if kind == "student" else _policy_facts(kind, folder)
    metrics = _metrics(path, config)
    figures = {
        _FIGURES[k]: f"{v:.4g}" if k == "cka" else f"{100 * v:.1f} %" for k, v in metrics.items() if k in _FIGURES
    }
    data = str(recipe.get("val_data") or recipe.get("data") or "")
    named = str(target) if target.folder is None else f"{LOCAL}{target.folder.name}"
    teacher = recipe.get("teacher")
    made = f"By xdfast {__version__}"
    made += f", distilled from the teacher `{teacher}`" if teacher else ""
    made += ". The settings, which `xdfast VERB --recipe recipe.yaml` takes once the verb and the local paths are filled in:"
    return CardFacts(
        title=title,
        usage=described["usage"].format(hub=f"hf-hub:{target}" if target.folder is None else named, source=named),
        summary=described["summary"] + (f" Distilled from `{teacher}`." if teacher else ""),
        about_inputs=described["inputs"],
        recipe=recipe,
        made=made if recipe else "The settings of its training are not known: it was published without its run.",
        figures={**figures, **described["figures"]},
        measured=f"Accuracy on `{data}`, validation part." if data and figures and kind == "student" else "",
        license=license,
        library="timm" if kind == "student" else "xdfast",
        task=described["task"],
        tags=("knowledge-distillation",) if teacher else (),
        classes=described.get("classes", ()),
        accuracy=(data, metrics["top1"]) if data and "top1" in metrics else None,
        exported=record,
    )


def _metrics(path: Path, config: dict[str, Any]) -> dict[str, float]:
    """What ``evaluate`` found, else what the run ended with."""
    for file in (path / "evaluation.json", path / "summary.json"):
        if file.is_file():
            found = _json(file)
            metrics = found.get("metrics", found)
            return {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return dict(_kept(config).get("metrics") or {})


def _kept(config: dict[str, Any]) -> dict[str, Any]:
    """What xdfast wrote beside the model: of a student under "xdfast" in timm's file, of a policy (where that is the version) at
    the top."""
    own = config.get("xdfast")
    return own if isinstance(own, dict) else config


def _student_facts(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    from xdfast.reporting import count_flops

    model = create_model(folder).eval()
    cost = count_flops(model, model.image_size)
    size, classes = model.image_size, config.get("label_names") or []
    usage = (
        "import timm\n\n"
        'model = timm.create_model("{hub}", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        "logits = model(transform(image)[None])  # image: a PIL picture"
    )
    mean, std = (", ".join(f"{x:g}" for x in values) for values in (model.mean, model.std))
    return {
        "usage": usage,
        "summary": f"A {model.name} for images, {size} × {size} pixels, {model.num_classes or 'no'} classes.",
        "inputs": f"Input: RGB {size} × {size}, in [0, 1], minus mean ({mean}), over std ({std}).",
        "figures": {
            "FLOPs (2 per multiply-add, counted)": f"{cost.flops / 1e9:.3g} G",
            "parameters": f"{cost.params / 1e6:.3g} M",
        },
        "classes": classes,
        "task": "image-classification" if model.num_classes else "image-feature-extraction",
    }


def _policy_facts(kind: str, folder: Path) -> dict[str, Any]:
    from xdfast.reporting import count_flops

    model: Any
    if kind == "policy":
        from xdfast.robot import load_policy
        from xdfast.robot.cost import count_decision

        model, usage = load_policy(folder), "import xdfast as xd\n\npolicy = xd.load_policy"
        macs = count_decision(model).macs
    else:
        from xdfast.deploy import vla_graph
        from xdfast.robot.vla import load_vla

        model = load_vla(folder)
        usage = "import xdfast as xd\nfrom xdfast.robot.vla import load_vla\n\npolicy = load_vla"
        graph = vla_graph(model, skip=False)
        macs = count_flops(graph.module, inputs=graph.example(1, _generator())).macs
    spec = model.spec
    height, width = spec.image_size
    cameras = ", ".join(spec.cameras) or "none"
    return {
        "usage": usage + '(xd.pull("{source}"))',
        "summary": f"A robot's policy for {spec.task or 'an unnamed task'}: {spec.action_dim} numbers per action.",
        "inputs": f"Input: uint8 pictures {height} × {width} of cameras: {cameras}; {spec.state_dim} numbers of proprioception. "
        "Normalisation of pictures, states and actions is part of the files.",
        "figures": {
            "FLOPs of a decision, all layers (2 per multiply-add, counted)": f"{2 * macs / 1e9:.3g} G",
            "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.3g} M",
        },
        "task": "robotics",
    }


def _generator() -> Any:
    import torch

    return torch.Generator().manual_seed(0)
