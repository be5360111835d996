"""Routed models on disk, and the loss that holds their budget."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from xdfast._optional import require
from xdfast.losses import BudgetLoss
from xdfast.models.checkpoint import CheckpointError, atomic_write
from xdfast.models.students import WEIGHTS_FILE, _rebuilds
from xdfast.models.weights import read_weights, state_dict_misfit
from xdfast.nn import BudgetShift, LayerRouter, Routed, route, routed_stacks
from xdfast.nn.router import check_finished

__all__ = ["ROUTE_FILE", "budget_loss", "hold_budget", "load_routed", "save_routed"]

ROUTE_FILE = "route.json"
_FORMAT = 1


def budget_loss(model: nn.Module, **options: Any) -> BudgetLoss:
    """The loss that trains a routed model down to the target it was made for; call it with the decision of a pass.

    Args:
        model: made by :func:`xdfast.nn.route`.
        options: of :class:`xdfast.losses.BudgetLoss` (``weight``, ``norm``, ``decisive``, …).

    Raises:
        ValueError: a model that is not routed.

    Example:
        >>> import timm, torch, xdfast.nn
        >>> from xdfast.models import budget_loss
        >>> model = xdfast.nn.route(timm.create_model("test_vit"), 0.6)
        >>> criterion, stack = budget_loss(model), xdfast.nn.routed_stacks(model)[0]
        >>> _ = model(torch.randn(2, 3, 160, 160))
        >>> criterion(stack.decision.gates) > 0
        tensor(True)
    """
    made = _record(model)
    loss = BudgetLoss(made.target_flops, [list(row) for row in made.costs], made.always_on, **options)
    parameter = next(model.parameters(), None)
    return loss if parameter is None else loss.to(parameter.device)


def hold_budget(model: nn.Module, momentum: float = 0.1) -> BudgetShift:
    """Lets the router of a model keep the model's budget at every training step by itself; see :class:`xdfast.nn.BudgetShift`.

    ``target_flops`` of what is returned may be lowered step by step. After training, ``router.fold_budget()`` makes the model
    one that can be saved; :func:`xdfast.nn.calibrate_model` then sets the threshold for data like the user's.

    Args:
        model: made by :func:`xdfast.nn.route`, with a router that learns; changed in place.
        momentum: of the running mean of the cuts.

    Raises:
        ValueError: a model that is not routed, or whose router does not learn.

    Example:
        >>> import timm, torch, xdfast.nn
        >>> from xdfast.models import hold_budget
        >>> model = xdfast.nn.route(timm.create_model("test_vit"), 0.5)
        >>> hold = hold_budget(model)
        >>> stack = xdfast.nn.routed_stacks(model)[0]
        >>> _ = model(torch.randn(16, 3, 160, 160))
        >>> bool(stack.decision.gates.mean() <= 0.5)
        True
    """
    made, router = _record(model), routed_stacks(model)[0].router
    if type(router) is not LayerRouter:
        raise ValueError(f"a budget is held by a LayerRouter, this model has {type(router).__name__}")
    hold = BudgetShift(made.target_flops, [list(row) for row in made.costs], made.always_on, momentum)
    router.hold = hold.to(router.head.bias.device).train(router.training)
    return hold


def save_routed(model: nn.Module, folder: str | Path) -> Path:
    """Writes ``model.safetensors`` and ``route.json``, which says how to build the model and how to route it.

    A model that timm or transformers can build is named there with its options (those that
    :func:`xdfast.models.create_model` remembered, the image size, the decoder's configuration). Of any other the weights are
    saved, and :func:`load_routed` needs ``base``.

    Args:
        model: made by :func:`xdfast.nn.route`.
        folder: made if missing.

    Raises:
        ValueError: a model that is not routed, with an own ``LayerRouter`` class, or with a router that still holds its budget
            batch by batch (:func:`hold_budget`).
        CheckpointError: the files cannot be written; earlier ones are unharmed.
    """
    made, folder = _record(model), Path(folder)
    stack = routed_stacks(model)[0]
    check_finished(stack.router)
    facts = {
        "format": _FORMAT,
        "base": _base(model, made),
        "route": {**made.options, "gate": stack.gate.kind},  # a schedule may have changed it
        "described": made.described,
    }
    text = json.dumps(facts, indent=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder}: {error}") from error
    # tied weights share memory, which safetensors refuses: each name gets a copy of its own
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    atomic_write(folder / WEIGHTS_FILE, lambda aside: save_file(tensors, aside, metadata={"format": "pt"}))
    atomic_write(folder / ROUTE_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))
    return folder


def load_routed(folder: str | Path, base: nn.Module | None = None) -> Any:
    """The model that :func:`save_routed` wrote, in eval mode on the CPU. Nothing is downloaded and no code of the files runs.

    Args:
        folder: with ``model.safetensors`` and ``route.json``.
        base: the model before routing (its weights do not matter), where the file cannot name it; it is copied. For a stack
            routed with ``describe`` a routed model.

    Raises:
        FileNotFoundError: no such folder or files.
        CheckpointError: damaged, of a newer version, weights of another model, or a base that must be given.
        ImportError: the model is of transformers, which is not installed.
    """
    folder = Path(folder)
    facts = _read(folder / ROUTE_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}; expected a folder that save_routed wrote")
    state = read_weights(folder / WEIGHTS_FILE)
    if base is not None and routed_stacks(base):
        model: Any = copy.deepcopy(base)
    elif facts["described"]:
        raise CheckpointError(
            f"{folder}: the model was routed with describe=, which is code; pass base=, routed likewise"
        )
    else:
        model = route(base if base is not None else _build(facts["base"], folder), **facts["route"], check=False)
    try:
        # assigned, not copied: the file's precision is the model's, and what is not in the file (RoPE's fp32) is not rounded
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(state_dict_misfit(type(model).__name__, str(folder / WEIGHTS_FILE), error)) from error
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def _record(model: nn.Module) -> Routed:
    made = getattr(model, "xdfast_route", None)
    if not isinstance(made, Routed):
        raise ValueError(f"{type(model).__name__} is not routed; use xdfast.nn.route(model, target_flops=...)")
    return made


def _base(model: Any, made: Routed) -> dict[str, Any]:
    """How to build the model before routing."""
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    config: Any = getattr(model, "config", None)
    if kind.startswith("transformers.") and hasattr(config, "to_dict"):
        return {"kind": "transformers", "class": type(model).__name__, "config": json.loads(config.to_json_string())}
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    options = dict(getattr(model, "xdfast_options", {}))
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        options.setdefault("img_size", list(size) if isinstance(size, (tuple, list)) else size)
    if architecture:
        twin = _Twin(model, made)
        if _rebuilds(architecture, twin, options):
            classes = int(getattr(model, "num_classes", 0) or 0)
            return {"kind": "timm", "architecture": architecture, "num_classes": classes, "options": options}
    return {"kind": "module", "class": kind}


class _Twin(nn.Module):
    """The parameters that a routed model had before, for comparison."""

    def __init__(self, model: nn.Module, made: Routed) -> None:
        super().__init__()
        prefix = f"{made.blocks}." if made.blocks else ""
        added = (f"{prefix}router.", f"{prefix}gate.")
        self.num_classes = getattr(model, "num_classes", 0)
        self._state = {k: v for k, v in model.state_dict().items() if not k.startswith(added)}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._state


def _build(base: dict[str, Any], folder: Path) -> nn.Module:
    try:
        if base["kind"] == "timm":
            import timm

            return timm.create_model(base["architecture"], num_classes=base["num_classes"], **base["options"])
        if base["kind"] == "transformers":
            transformers: Any = require("transformers", "vla", purpose=f"{base['class']} in {folder}")
            network = getattr(transformers, base["class"], None)
            if network is None:
                raise CheckpointError(f"{folder}: this version of transformers has no {base['class']}; pass base=")
            config = {**base["config"]}
            return network(transformers.AutoConfig.for_model(config.pop("model_type"), **config))
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: the model in {ROUTE_FILE} cannot be built ({error}); pass base=") from error
    raise CheckpointError(
        f"{folder} holds the weights of a {base.get('class')}, which nobody but you can build; pass base="
    )


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} holds no {file.name}; expected a folder that save_routed wrote")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        version = facts["format"]
        missing = {"base", "route", "described"} - set(facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); save the model again") from error
    if version != _FORMAT:
        raise CheckpointError(f"{file} has format {version!r}, this version of xdfast reads {_FORMAT}")
    if missing:
        raise CheckpointError(f"{file} is damaged ({', '.join(sorted(missing))} missing); save the model again")
    return facts
