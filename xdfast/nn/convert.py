"""``route``: a model of transformer layers → the same model with a router and gates, every original module in its place."""

from __future__ import annotations

import contextlib
import copy as copying
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xdfast.nn.branches import Branch, ModuleBranch
from xdfast.nn.convert_hf import RoutedDecoder, check_version, decoder_branches, first_of_each_kind
from xdfast.nn.convert_timm import Described, block_branches
from xdfast.nn.gates import GateFunction
from xdfast.nn.router import LayerRouter
from xdfast.nn.steps import RoutedBlocks, routed_stacks
from xdfast.ops._checks import check_choice
from xdfast.ops._costs import check_always_on, check_reachable, check_target

__all__ = ["Routed", "route"]

Describe = Callable[[nn.Module], Sequence[Branch] | None]

#: Tokens of a sample where the model does not tell; costs of layers are hardly other shares at other lengths.
_TOKENS = 256


@dataclass(frozen=True)
class Routed:
    """What :func:`route` did; ``model.xdfast_route``.

    Attributes:
        target_flops: fraction of the routed layers' FLOPs to train for.
        always_on: layers that are never skipped, from 0.
        costs: FLOPs of each decision [L][S] for a sample of ``tokens`` tokens.
        tokens: T.
        blocks: name of the stack in the model; empty: it is the model.
        options: arguments of :func:`route` that make the same again from the original; JSON-able.
        described: whether ``describe`` was given, which is code and in no file.
    """

    target_flops: float
    always_on: tuple[int, ...]
    costs: tuple[tuple[float, ...], ...]
    tokens: int
    blocks: str
    options: dict[str, Any]
    described: bool


def route(
    model: nn.Module,
    target_flops: float = 0.5,
    *,
    unit: str = "sample",
    branches: int = 1,
    gate: str | GateFunction = "hard_st",
    always_on: Sequence[int] = (0, -1),
    keys: str = "all",
    executor: str = "auto",
    router: LayerRouter | dict[str, Any] | None = None,
    sparse_train: bool = False,
    explore: float = 0.05,
    blocks: str | None = None,
    describe: Describe | None = None,
    tokens: int | None = None,
    copy: bool = True,
    check: bool = True,
) -> Any:
    r"""Gives every residual layer of a model a gate, and the model a router that sets them all from the first layer's input.

    .. math::
        x \leftarrow x + g_{ls} \, f_{ls}(\mathrm{norm}(x)), \quad g \in [0, 1]^{U \times L \times S}

    The list of layers is replaced by a routed stack of the same name with the same layers in it: parameters keep their
    names, and with all gates 1 the model computes what it did. A new router leaves nearly everything on. Train with
    ``xdfast.models.budget_loss(model)`` until the model costs ``target_flops``; save with ``xdfast.models.save_routed``.

    Understood are, without copying their code: timm's vision transformers (ViT, DeiT, DINOv2 with LayerScale and registers, EVA,
    BEiT), MLP-Mixer, ResMLP and gMLP; any list of blocks with timm's names ``norm1, attn, norm2, mlp``; decoders of Hugging
    Face (Llama, Qwen, SmolLM, Mistral, Phi-3, Gemma) with their KV caches. ``describe`` teaches it others.

    * ``model(x)``, ``forward_features``, ``forward_intermediates`` and ``output_hidden_states`` work as before, and forward
      hooks on a layer see its output. Attention maps of decoders are of the active sequences alone.
    * In decoders gates are fixed per sequence when its prompt is read and kept with the cache, ``generate()`` works.
    * DropPath and dropout act in training as before; with ``sparse_train`` they must be 0.
    * Linear maps that are exchanged afterwards (LoRA, quantisation) may not be seen: exchange them first.

    Args:
        model: see above; with one such stack, or ``blocks`` says which.
        target_flops: r*, in (0, 1]: what the routed layers shall cost, as a fraction of all of them.
        unit: what is routed, ``"sample"``, ``"block"`` or ``"token"``; layers whose code is called as it is, and all decoders,
            take samples.
        branches: decisions per layer: 1, or 2 (attention and MLP apart).
        gate: kind of :class:`xdfast.nn.GateFunction`, or one.
        always_on: layers that always run. In a decoder the first layer of each kind of attention is added: models read the
            length of a cache from them.
        keys, executor, sparse_train, explore: see :class:`xdfast.nn.RoutedStack`.
        router: options of :class:`xdfast.nn.LayerRouter` (``hidden``, ``groups``, ``block_rows``, …), or one.
        blocks: name of the list of layers, such as ``"vision.blocks"``.
        describe: layer → its branches (:mod:`xdfast.nn.branches`), for other layers; :func:`xdfast.nn.whole_block` takes any
            layer [B, T, D] → [B, T, D] as one branch.
        tokens: T for which costs are counted; default: the model's, or 256.
        copy: change a copy, so that ``student = route(teacher)`` leaves the teacher as it is; False changes ``model`` itself.
        check: run a few tokens through the layers before and after, and refuse to convert if they differ.

    Returns:
        The model, routed; ``model.xdfast_route`` is :class:`Routed`, its stack :func:`xdfast.nn.routed_stacks`.

    Raises:
        ValueError: no residual layers known to it, or several lists of them; a target outside (0, 1] or below what
            ``always_on`` costs; layers that compute something else than their parts say; options that do not go together.
        ImportError: a decoder of transformers before 5.

    Reference:
        ActDistill, arXiv 2511.18082; why not h · g: docs/routed.md.

    Example:
        >>> import timm, torch, xdfast.nn
        >>> vit = timm.create_model("test_vit").eval()
        >>> student = xdfast.nn.route(vit, target_flops=0.6)
        >>> x = torch.randn(2, 3, 160, 160)
        >>> with torch.no_grad(), xdfast.nn.fixed_gates(student, torch.ones(2, 6)):
        ...     bool((student(x) - vit(x)).abs().max() < 1e-5)
        True
    """
    check_target(target_flops)
    if routed_stacks(model):
        raise ValueError("this model is routed already; route the original, with other options")
    if copy:
        model = copying.deepcopy(model)
    name, layers, described, decoder = _find(model, blocks, describe)
    owner = model.get_submodule(name.rpartition(".")[0]) if name else model
    takes = sorted({argument for layer in described for argument in layer.takes})
    config = getattr(owner, "config", None)
    if decoder:
        check_version(layers[0])
        always_on = (*always_on, *first_of_each_kind(config, len(layers)))
    on = check_always_on(always_on, len(layers))
    gates = gate if isinstance(gate, GateFunction) else GateFunction(gate)
    _check_options(layers, described, unit=unit, branches=branches, sparse_train=sparse_train, decoder=decoder)
    made = _router(router, described[0].dim, len(layers), unit, branches)
    kind: type[RoutedBlocks] = RoutedDecoder if decoder else RoutedBlocks
    stack = kind(
        layers, [layer.branches for layer in described], made, takes=takes, gate=gates, unit=unit, always_on=on, keys=keys,
        executor=executor, sparse_train=sparse_train, explore=explore,
    )  # fmt: skip
    length = tokens or _tokens(owner) or _TOKENS
    costs = stack.costs(length, made.branches)
    check_reachable(target_flops, on, costs)
    like = next((p for p in layers[0].parameters() if p.is_floating_point()), None)
    if like is not None:
        stack.router.to(device=like.device, dtype=like.dtype)  # type: ignore[union-attr]
        stack.gate.to(like.device)
    stack.train(model.training)
    if check and (like is None or not like.is_meta):
        if isinstance(stack, RoutedDecoder):
            _check_decoder(owner, name, stack)
        else:
            _check_blocks(layers, described, length)
    if name:
        setattr(owner, name.rpartition(".")[2], stack)
    result = model if name else stack
    options = {
        "target_flops": target_flops, "unit": unit, "branches": branches, "gate": gates.kind, "always_on": list(on),
        "keys": keys, "executor": executor, "router": _router_options(made), "sparse_train": sparse_train,
        "explore": explore, "blocks": name, "tokens": length,
    }  # fmt: skip
    table = tuple(tuple(row) for row in costs.tolist())
    result.xdfast_route = Routed(target_flops, on, table, length, name, options, describe is not None)  # type: ignore[assignment]
    return result


def _find(
    model: nn.Module, wanted: str | None, describe: Describe | None
) -> tuple[str, list[nn.Module], list[Described], bool]:
    """(name, layers, their branches, whether they are a decoder's) of the stack to route."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Sequential, nn.ModuleList)) and len(m)}
    if wanted is not None:
        if wanted not in lists:
            raise ValueError(
                f"the model has no list of layers {wanted!r}; it has {', '.join(map(repr, lists)) or 'none'}"
            )
        lists = {wanted: lists[wanted]}
    elif describe is not None and len(lists) > 1:
        raise ValueError(f"with describe say which layers: blocks= one of {', '.join(map(repr, lists))}")
    found: list[tuple[str, list[nn.Module], list[Described], bool]] = []
    for name, module in lists.items():
        layers = list(module.children())
        read = [_described(layer, describe) for layer in layers]
        if all(layer is not None for layer in read):
            decoder = describe is None and all(decoder_branches(layer) is not None for layer in layers)
            found.append((name, layers, [layer for layer in read if layer is not None], decoder))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(repr(name) for name, *_ in found)
        raise ValueError(f"the model has {len(found)} lists of residual layers, {names}; say which with blocks=")
    seen = sorted({type(layer).__name__ for module in lists.values() for layer in module.children()})
    raise ValueError(
        f"{type(model).__name__} has no list of residual layers that can be routed (blocks with norm1, attn, norm2, mlp as in "
        f"timm, or decoder layers as in Hugging Face's Llama); its lists hold {', '.join(seen) or 'nothing'}. For others "
        "give blocks= and describe=, for instance describe=xdfast.nn.whole_block"
    )


def _described(layer: nn.Module, describe: Describe | None) -> Described | None:
    if describe is None:
        return decoder_branches(layer) or block_branches(layer)
    branches = describe(layer)
    if not branches:
        return None
    widths = [p.shape[-1] for p in layer.parameters() if p.dim() == 1]
    width = min(widths, default=0)  # the narrowest vector is a norm's or an output's bias
    return Described(tuple(branches), width)


def _check_options(
    layers: list[nn.Module], described: list[Described], *, unit: str, branches: int, sparse_train: bool, decoder: bool
) -> None:
    check_choice("unit", unit, ("sample", "block", "token"))
    most = {len(layer.branches) for layer in described}
    if branches not in (1, *most) or (branches > 1 and len(most) > 1):
        raise ValueError(f"branches is 1, or the number of branches of every layer, {sorted(most)}; got {branches!r}")
    mixing = [b for layer in described for b in layer.branches if isinstance(b, ModuleBranch) and not b.rowwise]
    if unit != "sample" and (mixing or decoder):
        raise ValueError(
            f"unit={unit!r} needs attention that can take some tokens alone; {type(layers[0]).__name__} is called as it is, with "
            "whole samples: use unit='sample'"
        )
    random = [m for layer in layers for m in layer.modules() if drop_rate(m) > 0]
    if sparse_train and random:
        raise ValueError(
            f"sparse_train computes listed rows without {type(random[0]).__name__}; build the model with drop rates 0"
        )


def drop_rate(module: nn.Module) -> float:
    """The rate at which a module drops what passes through it: of dropout and stochastic depth; 0 for any other."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    return float(getattr(module, "drop_prob", None) or 0) if type(module).__name__ == "DropPath" else 0.0


def _router(given: LayerRouter | dict[str, Any] | None, dim: int, layers: int, unit: str, branches: int) -> LayerRouter:
    if isinstance(given, LayerRouter):
        return given
    pool = {"token": "none", "block": "block"}.get(unit, "meanmax")
    options = {"dim": dim, "branches": branches, "hidden": min(512, dim), "pool": pool, **(given or {})}
    return LayerRouter(num_layers=layers, **options)


def _router_options(router: LayerRouter) -> dict[str, Any]:
    groups = [[group.start, group.stop] for group in router.groups]
    return {
        "dim": router.dim, "branches": router.branches, "hidden": router.hidden, "pool": router.pool,
        "groups": None if groups == [[None, None]] else groups, "bias_init": router.bias_init,
        "block_rows": router.block_rows, "standardise": router.standardise is not None,
    }  # fmt: skip


def _tokens(owner: Any) -> int | None:
    """T of a timm model."""
    patches = getattr(getattr(owner, "patch_embed", None) or getattr(owner, "stem", None), "num_patches", None)
    return patches + getattr(owner, "num_prefix_tokens", 0) if isinstance(patches, int) else None


# --- is it the same?


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, mode in training.items():
            m.training = mode


def _noise(shape: tuple[int, ...], like: nn.Module) -> Tensor:
    parameter = next(p for p in like.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(parameter)


def _differ(before: Tensor, after: Tensor) -> bool:
    scale = float(before.double().abs().max())
    # the same modules are called: other roundings at most, but for a sum in another order
    return (
        not float((before.double() - after.double()).abs().max())
        <= (1e-4 if before.dtype.itemsize > 2 else 0.1) * scale
    )


def _check_blocks(layers: list[nn.Module], described: list[Described], tokens: int) -> None:
    for number, (layer, parts) in enumerate(zip(layers, described)):
        if not any(True for _ in layer.parameters()):
            continue
        with _evaluating(layer):
            mixing = any(isinstance(b, ModuleBranch) and not b.rowwise for b in parts.branches)
            x = _noise((2, tokens if mixing else 5, parts.dim), layer)  # some modules are built for one T
            try:
                y, before = x, layer(x)
                for branch in parts.branches:
                    y = y + branch.dense(y)
            except (RuntimeError, TypeError, ValueError, AssertionError) as error:
                raise ValueError(
                    f"layer {number}, {type(layer).__name__}, does not take [B, T, D] = {list(x.shape)} as a residual layer "
                    f"would ({error}); give describe= (and router={{'dim': …}}), or check=False if it is right nevertheless"
                ) from error
        if not isinstance(before, Tensor) or before.shape != y.shape or _differ(before, y):
            raise ValueError(
                f"layer {number}, {type(layer).__name__}, computes something else than x + attention(norm(x)), then "
                "x + mlp(norm(x)) of its parts; give describe=, for instance describe=xdfast.nn.whole_block"
            )


def _check_decoder(owner: Any, name: str, stack: RoutedDecoder) -> None:
    """Four tokens through the whole decoder, as it was and with all gates 1. Leaves the original in place."""
    attribute = name.rpartition(".")[2]
    layers = getattr(owner, attribute)
    executor = stack.executor

    def states() -> Tensor:
        output = owner(inputs_embeds=x, use_cache=False)
        return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]

    with _evaluating(owner):
        x = _noise((2, 4, stack.router.dim), layers)  # type: ignore[union-attr]
        try:
            before = states()
            stack.executor, stack.given_gates = "dense_mask", x.new_ones(2, stack.num_layers)
            stack.eval()
            setattr(owner, attribute, stack)
            after = states()
        except TypeError as error:
            raise ValueError(
                f"{type(owner).__name__} cannot be compared with its original ({error}); check=False"
            ) from error
        finally:
            stack.executor, stack.given_gates = executor, None
            setattr(owner, attribute, layers)
            stack.decision = None
    stack.train(owner.training)
    if _differ(before, after):
        raise ValueError(
            f"{type(layers[0]).__name__} computes something else than x + attention(norm(x)), then x + mlp(norm(x)) of its parts "
            "(some scale their branches): such decoders cannot be routed"
        )
