"""``create_model``: from what the user wrote to a model with weights, or to an error that says what to do."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdfast.errors import nearest
from xdfast.models.checkpoint import CheckpointError
from xdfast.models.features import FeatureModel
from xdfast.models.own import TRUSTED, build_own, code_hash, is_own, rebuildable, same_code, split_weights
from xdfast.models.students import CONFIG_FILE, WEIGHTS_FILE
from xdfast.models.weights import fetch_failed, read_weights, state_dict_misfit

__all__ = ["create_model"]

log = logging.getLogger("xdfast")

#: DINOv2 was trained at 518 px with 14 px patches; for distillation 224 (16×16 patches) is the practice.
_DINOV2_SIZE = 224


def create_model(
    spec: str | Path | nn.Module,
    *,
    num_classes: int | None = None,
    pretrained: bool | None = None,
    image_size: int | None = None,
    taps: Sequence[str] = (),
    frozen: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    options: dict[str, Any] | None = None,
) -> FeatureModel:
    """A teacher or student with its own input size and normalisation.

    Args:
        spec: one of

            - a timm name, ``"resnet18"`` or ``"vit_small_patch14_dinov2.lvd142m"``;
            - ``"net.py:Net"`` or ``"package.module:Net"``: a class or function of your own, called with ``options``, and with
              ``num_classes``, ``img_size`` and ``pretrained`` if it has these parameters;
            - ``"NAME@/path/to/weights"``: either of them with weights from a .safetensors, .pt or .pth file;
            - a folder that :func:`xdfast.distill`, :func:`xdfast.finetune` or timm's ``save_for_hf`` wrote;
            - ``"hf-hub:OWNER/REPOSITORY"``;
            - an ``nn.Module``, used as it is (a copy of it if ``frozen``), or a :class:`FeatureModel`.
        num_classes: C of the classifier. If the weights have another one, it is replaced by a new, random one. Default: as
            in the weights, or timm's for the name.
        pretrained: for a timm name: with its published weights, from the hub or its cache. Default: if ``frozen``.
        image_size: input size in pixels; default: the model's own (224 for DINOv2; position embeddings are resampled).
        taps, frozen, dtype: see :class:`FeatureModel`.
        device: where the model is put.
        options: further arguments of ``timm.create_model``, such as ``{"drop_path_rate": 0.1}``.

    Raises:
        ValueError: unknown name (the nearest are offered), options the architecture does not take, or code that fails.
        TypeError: no model, or code that makes none.
        FileNotFoundError: no such file or folder.
        CheckpointError: damaged weights, or weights of another architecture.
        ConnectionError: the published weights could not be fetched; both ways out are named.

    Example:
        >>> student = create_model("test_resnet", num_classes=10, image_size=32)
        >>> student(torch.rand(2, 3, 64, 64)).logits.shape
        torch.Size([2, 10])
    """
    shared: dict[str, Any] = {"taps": tuple(taps), "frozen": frozen, "dtype": dtype}
    if isinstance(spec, nn.Module):
        return _from_module(spec, num_classes, image_size, shared).to(device)
    if not isinstance(spec, (str, Path)):
        raise TypeError(f"a model must be a timm name, NAME@file, a folder or an nn.Module, got {spec!r:.80}")
    text = str(spec)
    options = dict(options or {})
    wanted = frozen if pretrained is None else pretrained
    if text.startswith("local-dir:") or Path(text).is_dir():
        name, net, size = _from_folder(Path(text.removeprefix("local-dir:")), image_size, options)
    elif is_own(text):
        name, net, size = _from_code(text, num_classes, wanted, image_size, options)
    elif (own := split_weights(text)) is not None:
        name, net, size = _from_code_and_weights(own[0], Path(own[1]).expanduser(), num_classes, image_size, options)
    elif "@" in text and not text.startswith("hf-hub:"):
        name, net, size = _from_file(text, image_size, options)
    else:
        name, net, size = _from_name(text, num_classes, wanted, image_size, options)
    model = FeatureModel(net, name=name, image_size=size, **shared)
    if num_classes is not None and num_classes != model.num_classes:
        if model.num_classes:
            log.info(
                "%s: a new classifier for %d classes takes the place of the one for %d",
                name,
                num_classes,
                model.num_classes,
            )
        model.reset_classifier(num_classes)
        if frozen:
            model.requires_grad_(False)
    return model.to(device)


def _from_module(
    net: nn.Module, num_classes: int | None, image_size: int | None, shared: dict[str, Any]
) -> FeatureModel:
    facts: dict[str, Any] = {}
    if isinstance(net, FeatureModel):
        facts = {"name": net.name, "image_size": net.image_size, "mean": net.mean, "std": net.std}
        if (
            not shared["frozen"]
            and not shared["taps"]
            and shared["dtype"] is None
            and image_size in (None, net.image_size)
        ):
            model = net
        else:
            net = net.net
    if not isinstance(net, FeatureModel):
        if shared["frozen"] or shared["dtype"] is not None:
            net = copy.deepcopy(net)  # the caller's own stays trainable and keeps its precision
        facts["image_size"] = image_size or facts.get("image_size") or _module_size(net)
        model = FeatureModel(net, **facts, **shared)
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    return model


def _module_size(net: nn.Module) -> int | None:
    """Input size of a module timm made with img_size, which its pretrained_cfg does not tell."""
    embed = getattr(net, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    return int(size[0]) if isinstance(size, (tuple, list)) else None


def _from_folder(folder: Path, image_size: int | None, options: dict[str, Any]) -> tuple[str, nn.Module, int]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no model (no {CONFIG_FILE}); expected a folder that distill, finetune or timm's save_for_hf wrote"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy or write the model again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is damaged (it holds a {type(config).__name__}); copy or write the model again")
    if "architecture" not in config:
        facts = _facts(config)
        own = facts.get("own") or {}
        if rebuildable(str(own.get("spec"))):
            return _rebuilt(own["spec"], facts, folder / WEIGHTS_FILE, image_size, options)
        if own:
            raise ValueError(
                f"{folder} holds the weights of {own.get('spec')}, code that is not run unasked: name it in front of them, "
                f"{own.get('spec')}@{folder / WEIGHTS_FILE}, or in the environment, {TRUSTED}={own.get('spec')}"
            )
        raise ValueError(
            f"{folder} holds the weights of {facts.get('module', 'an unknown module')}, which timm cannot rebuild: make the module "
            f"yourself, load {folder / 'model.safetensors'} with safetensors.torch.load_model, and pass the module"
        )
    try:
        cfg = config.get("pretrained_cfg", config)
        saved = dict(config.get("model_args") or {})
        size = image_size or int(cfg.get("input_size", (3, 224, 224))[-1])
        if cfg.get("fixed_input_size"):
            saved["img_size"] = size
        saved |= options
        net = _build(f"local-dir:{folder}", config["architecture"], pretrained=True, source=str(folder), **saved)
    except CheckpointError:
        raise
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    except Exception as error:  # a damaged file makes timm and safetensors raise almost any type
        raise CheckpointError(
            f"the model in {folder} cannot be built again ({type(error).__name__}: {error}); {CONFIG_FILE} or the weights beside "
            "it are damaged: copy or write the model again"
        ) from error
    _remember(net, saved)
    return config["architecture"], net, size


def _facts(config: Any) -> dict[str, Any]:
    """xdfast's own part of a model's config.json."""
    found = config.get("xdfast") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def _from_code(
    spec: str, num_classes: int | None, pretrained: bool, image_size: int | None, options: dict[str, Any]
) -> tuple[str, nn.Module, int]:
    net = build_own(spec, num_classes=num_classes, pretrained=pretrained, image_size=image_size, options=options)
    facts: dict[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    size = image_size or options.get("img_size") or _module_size(net) or (facts.get("input_size") or (3, 224))[-1]
    digest = code_hash(spec)  # other code is another model, to a teacher's cache too
    return spec + (f"#{digest[:8]}" if digest else ""), net, int(size)


def _rebuilt(
    spec: str, facts: dict[str, Any], weights: Path, image_size: int | None, options: dict[str, Any]
) -> tuple[str, nn.Module, int]:
    """A model of the user's code as :func:`save_student` left it; ``facts`` are those beside the weights."""
    arguments = {**(facts.get("own") or {}).get("arguments", {}), **options}
    classes = facts.get("num_classes")
    size = image_size or facts.get("image_size")
    name, net, size = _from_code(spec, classes, False, size, arguments)
    if classes is not None:
        seen = FeatureModel(net, image_size=size)
        if seen.num_classes != classes:
            seen.reset_classifier(classes)
        seen.unwatch()
    _load(net, read_weights(weights), name, str(weights))
    return name, net, size


def _from_code_and_weights(
    spec: str, weights: Path, num_classes: int | None, image_size: int | None, options: dict[str, Any]
) -> tuple[str, nn.Module, int]:
    beside = weights.parent / CONFIG_FILE
    if beside.is_file():  # a saved student: it knows how it was made
        try:
            facts = _facts(json.loads(beside.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{beside} is damaged ({error}); copy or write the model again") from error
        if same_code(str((facts.get("own") or {}).get("spec")), spec):
            return _rebuilt(spec, facts, weights, image_size, options)
    state = read_weights(weights)
    try:  # the weights' own classes first; a classifier for others is put in afterwards
        name, net, size = _from_code(spec, None, False, image_size, options)
        _load(net, state, name, str(weights))
    except (CheckpointError, ValueError):
        if num_classes is None:
            raise
        name, net, size = _from_code(spec, num_classes, False, image_size, options)
        _load(net, state, name, str(weights))
    return name, net, size


def _load(net: nn.Module, state: dict[str, torch.Tensor], name: str, source: str) -> None:
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(state_dict_misfit(name, source, error)) from error


def _from_file(text: str, image_size: int | None, options: dict[str, Any]) -> tuple[str, nn.Module, int]:
    name, _, path = text.partition("@")
    cfg = _registered(name)
    state = read_weights(Path(path).expanduser())
    heads = cfg.classifier if isinstance(cfg.classifier, (tuple, list)) else (cfg.classifier,)
    # files of older timm name the classifier of Swin "head", which is "head.fc" now
    heads = [name for head in heads if head for name in dict.fromkeys((head, head.removesuffix(".fc")))]
    rows = [state[f"{head}.weight"].shape[0] for head in heads if f"{head}.weight" in state]
    classes = rows[0] if rows else 0
    size, sized = _sized(cfg, name, image_size, options)
    overlay = {"state_dict": state, "num_classes": classes, "label_offset": 0, "custom_load": False}
    net = _build(name, name, pretrained=True, source=path, num_classes=classes, pretrained_cfg_overlay=overlay, **sized)
    for facts in (net.pretrained_cfg, net.default_cfg):
        facts.pop("state_dict", None)  # or a second copy of the weights would live as long as the model
    _remember(net, sized)
    return name, net, size


def _from_name(
    name: str, num_classes: int | None, pretrained: bool, image_size: int | None, options: dict[str, Any]
) -> tuple[str, nn.Module, int]:
    if name.startswith("hf-hub:"):
        sized = dict(options) | ({"img_size": image_size} if image_size else {})
        net = _build(name, name, pretrained=True, source=name, **sized)
        _remember(net, sized)
        return net.pretrained_cfg["architecture"], net, image_size or int(net.pretrained_cfg["input_size"][-1])
    cfg = _registered(name)
    size, sized = _sized(cfg, name, image_size, options)
    if pretrained:  # whole, as published; a classifier for other classes is put in afterwards
        net = _build(name, name, pretrained=True, source=name, **sized)
    else:
        classes = {} if num_classes is None else {"num_classes": num_classes}
        net = _build(name, name, pretrained=False, source=name, **classes, **sized)
    _remember(net, sized)
    return name, net, size


def _registered(name: str) -> Any:
    """timm's facts about a name.

    Raises:
        ValueError: there is no such model, or no such set of weights for it.
    """
    import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        hint = nearest(base, timm.list_models())
        if Path(name).suffix in (".pt", ".pth", ".safetensors") or "/" in name:
            hint += " A weights file needs its architecture in front: NAME@/path/to/weights; a saved model is given as its folder."
        raise ValueError(f"unknown model {name!r}.{hint} timm.list_models('*resnet*') lists what there is")
    if tag and name not in timm.list_pretrained(f"{base}.*"):
        known = [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]
        raise ValueError(
            f"{base} has no published weights {tag!r}.{nearest(tag, known)} There are: {', '.join(known) or 'none'}"
        )
    return timm.get_pretrained_cfg(name)


def _sized(cfg: Any, name: str, image_size: int | None, options: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """(input size, options with img_size where the architecture is built for one size)."""
    default = int(cfg.input_size[-1]) if cfg is not None and cfg.input_size else 224
    if "dinov2" in name:
        default = _DINOV2_SIZE
    size = int(image_size or options.get("img_size") or default)
    if size < 1:
        raise ValueError(f"image_size must be ≥ 1 pixel, got {image_size!r}")
    fixed = cfg is not None and cfg.fixed_input_size
    return size, {**options, "img_size": size} if fixed else dict(options)


def _build(spec: str, name: str, *, pretrained: bool, source: str, **arguments: Any) -> Any:
    """timm.create_model, with its errors in the user's terms."""
    import timm

    try:
        return timm.create_model(spec, pretrained=pretrained, **arguments)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        shown = {k: v for k, v in arguments.items() if k not in ("pretrained_cfg_overlay", "num_classes")}
        raise ValueError(f"{name} does not take all of {shown} ({error})") from error
    except (AssertionError, ValueError) as error:
        raise ValueError(f"{name} cannot be built with {_shown(arguments)}: {error}") from error
    except (OSError, RuntimeError, KeyError) as error:
        if not pretrained:
            raise
        if "size mismatch" in str(error) or "Missing key" in str(error) or "Unexpected key" in str(error):
            raise CheckpointError(state_dict_misfit(name, source, error)) from error
        if source != name or name.startswith("hf-hub:"):
            raise CheckpointError(f"cannot read the weights of {name} from {source}: {error}") from error
        raise fetch_failed(name, error) from error


def _shown(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if k != "pretrained_cfg_overlay"}


def _remember(net: nn.Module, options: dict[str, Any]) -> None:
    """Keeps the arguments the network was built with: the saved student must be rebuilt with the same."""
    net.xdfast_options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}  # type: ignore[assignment]
