"""``export``: from a run, a folder or a model to files for deployment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from xdfast.models import FeatureModel, create_model, load_routed, weights_hash
from xdfast.models.routed import ROUTE_FILE
from xdfast.models.students import CONFIG_FILE
from xdfast.pipeline.folder import RunResult

if TYPE_CHECKING:
    from xdfast.deploy import Exported, Graph
    from xdfast.robot import DiffusionPolicy
    from xdfast.robot.vla import CompactVLA

__all__ = ["export", "graphs_of"]


def export(
    model: str | Path | nn.Module | RunResult,
    *,
    out: str | Path,
    formats: str | Sequence[str] = ("pt2", "onnx"),
    pixels: str = "unit",
    outputs: str | Sequence[str] = (),
    parts: bool = False,
    skip: bool = True,
    image_size: int | None = None,
    device: str = "cpu",
    batches: Sequence[int] = (1, 8),
    tolerance: float = 1e-4,
    latency_seconds: float = 5.0,
    progress: bool = True,
) -> Exported:
    """Writes a student or a robot's policy as files that run without xdfast, and proves that they say the same.

    Every graph is traced once by ``torch.export``; each file is loaded again as its users load it, compared with PyTorch at
    every batch size, and timed beside it in turns. ``export.json`` keeps inputs, outputs, preprocessing, class names, errors
    and times.

    ==========  =======================  ==================================================================
    ``formats``  file                     runs by
    ==========  =======================  ==================================================================
    ``pt2``     ``model.pt2``            ``torch.export.load(file).module()``, any device it was made on
    ``onnx``    ``model.onnx``           onnxruntime and whatever else reads ONNX; needs ``xdfast[deploy]``
    ``aoti``    ``model.aoti.pt2``       ``torch._inductor.aoti_load_package(file)``: compiled for this kind of machine
    ==========  =======================  ==================================================================

    Args:
        model: folder of a run (its student, policy or VLA), of a saved student, policy, VLA or routed model; a timm name,
            ``NAME@/path/weights``, or the object itself.
        out: folder for the files.
        formats: see above.
        pixels: of image models: ``"unit"`` takes RGB in [0, 1], ``"uint8"`` 0 to 255 (mean and std inside both);
            ``"normalised"`` takes what the network takes, mean and std are stated in the record.
        outputs: of image models, of ``"features"`` and ``"logits"``; default: both, or what there is.
        parts: of diffusion policies: ``encode`` and ``step`` instead of the whole decision.
        skip: of routed models: layers that are off are not computed, one sample at a time (conditions in the graph);
            False: any batch, all layers computed and multiplied by their gates.
        image_size: of image models; default: their own.
        device: "cpu", "cuda"…
        batches: sizes that are compared and timed.
        tolerance: largest difference to PyTorch, relative to max(1, largest output).
        latency_seconds: for timing each graph; 0 leaves it out.
        progress: tell what is being done.

    Returns:
        :class:`xdfast.deploy.Exported` with ``.path``, ``.files``, ``.data`` and ``.table``.

    Raises:
        ExportError: an operator that a format lacks (it is named), or a file that disagrees with PyTorch. It is a RuntimeError.
        ImportError: onnx, onnxscript or onnxruntime are missing.
        FileNotFoundError: no model there.
        ValueError: a bad setting, or one that has no meaning for this model.

    Example:
        >>> done = export("runs/flowers", out="exported/flowers")            # doctest: +SKIP
        >>> done.data["graphs"][0]["files"][1]["parity"]["max_abs"] < 1e-4   # doctest: +SKIP
        True
    """
    from xdfast.deploy import export_graphs

    formats = (formats,) if isinstance(formats, str) else tuple(formats)
    outputs = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    graphs, source = graphs_of(model, pixels=pixels, outputs=outputs, parts=parts, skip=skip, image_size=image_size)
    inner = graphs[0].eager or graphs[0].module
    return export_graphs(
        graphs,
        out,
        formats=formats,
        device=device,
        tolerance=tolerance,
        batches=batches,
        latency_seconds=latency_seconds,
        record={"source": source, "weights": weights_hash(inner)},
        progress=progress,
    )


def graphs_of(
    model: Any,
    *,
    pixels: str = "unit",
    outputs: Sequence[str] = (),
    parts: bool = False,
    skip: bool = True,
    image_size: int | None = None,
) -> tuple[list[Graph], str]:
    """(what :func:`export` writes, where it comes from); arguments and errors as there."""
    from xdfast.deploy import image_graph, policy_graphs, vla_graph

    found: Any
    found, classes, source = _open(model, image_size)
    kind = _kind(found)
    alien = {
        "pixels": pixels != "unit" and kind != "image",
        "outputs": bool(outputs) and kind != "image",
        "image_size": image_size is not None and kind != "image",
        "parts": parts and kind != "policy",
    }
    for name, wrong in alien.items():
        if wrong:
            meant = "a diffusion policy" if name == "parts" else "an image model"
            raise ValueError(f"{name} is a setting of {meant}; {source} is {_WORDS[kind]}")
    if kind == "policy":
        return policy_graphs(found, parts=parts), source
    if kind == "vla":
        return [vla_graph(found, skip=skip)], source
    return [image_graph(found, pixels=pixels, outputs=outputs, classes=classes, skip=skip)], source


_WORDS = {"policy": "a robot's policy", "vla": "a policy of several tasks", "image": "an image model"}


def _kind(model: nn.Module) -> str:
    if isinstance(model, FeatureModel):
        return "image"
    from xdfast.robot.policy import DiffusionPolicy

    return "policy" if isinstance(model, DiffusionPolicy) else "vla"


def _open(
    model: Any, image_size: int | None
) -> tuple[FeatureModel | DiffusionPolicy | CompactVLA | Any, list[str], str]:
    """(model, class names, where it comes from)."""
    if isinstance(model, RunResult):
        model = model.path
    if isinstance(model, (str, Path)):
        text = str(model)
        folder = Path(text.removeprefix("local-dir:")).expanduser()
        return (*_from_folder(folder, image_size), text) if folder.is_dir() else (_made(text, image_size), [], text)
    if not isinstance(model, nn.Module):
        raise TypeError(f"export takes a run, a folder, a model's name or an nn.Module, got {type(model).__name__}")
    if _robots(model):
        return model, [], f"object:{type(model).__name__}"
    found = create_model(model, image_size=image_size)
    return found, [], f"object:{found.name}"


def _made(text: str, image_size: int | None) -> FeatureModel:
    """A timm name: with its published weights, for nobody deploys random ones."""
    return create_model(
        text, pretrained=None if "@" in text or text.startswith("hf-hub:") else True, image_size=image_size
    )


def _from_folder(folder: Path, image_size: int | None) -> tuple[Any, list[str]]:
    for inner in (folder, folder / "policy"):
        if (inner / "policy.json").is_file():
            from xdfast.robot import load_policy

            return load_policy(inner), []
    for inner in (folder, folder / "vla"):
        if (inner / "vla.json").is_file() or (inner / "hf_vla.json").is_file():
            from xdfast.robot.vla import load_vla

            return load_vla(inner), []
    if (folder / ROUTE_FILE).is_file():
        return create_model(load_routed(folder), image_size=image_size), []
    inner = folder / "student" if (folder / "student" / CONFIG_FILE).is_file() else folder
    return create_model(inner, image_size=image_size), _classes(inner)


def _classes(folder: Path) -> list[str]:
    """Names in a saved student's ``config.json``, which was read before, so it is sound."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return list(config.get("label_names") or config.get("xdfast", {}).get("classes") or [])


def _robots(model: nn.Module) -> bool:
    """Whether a module is a robot's policy; asked by its methods, so that robots' packages are not needed for images."""
    return hasattr(model, "spec") and (hasattr(model, "decide") or hasattr(model, "unnormalised"))
