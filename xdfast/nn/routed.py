"""A stack of residual layers that computes only what its gates ask for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xdfast.nn.branches import Branch
from xdfast.nn.gates import GateFunction
from xdfast.nn.path_graphs import PathGraphs
from xdfast.nn.routed_flops import RoutedFlops, count_routed, stack_costs
from xdfast.nn.router import LayerRouter
from xdfast.ops import _backends
from xdfast.ops._checks import check_choice
from xdfast.ops._extension import cpp_available
from xdfast.ops.route import RoutePlan, make_plan
from xdfast.ops.routed.rows import CppRows, RowPasses, TorchRows
from xdfast.ops.routed.triton import carried_statistics

__all__ = ["EXECUTORS", "UNITS", "Decision", "RoutedStack"]

log = logging.getLogger("xdfast")

EXECUTORS = ("auto", "dense_mask", "cpu", "planned", "list", "graph", "switch")
UNITS = ("sample", "block", "token")
#: For one sample on a GPU; see :class:`xdfast.nn.path_graphs.PathGraphs`.
_GRAPHS = ("graph", "switch")


@dataclass(frozen=True)
class Decision:
    """What the last forward pass decided.

    Attributes:
        gates: [U, L, S] with their gradient; always-on layers are 1.
        probabilities: [U, L, S] of the router, or None where gates were given.
        plan: the lists that were computed; None with ``dense_mask``.
        executor: which executor ran.
    """

    gates: Tensor
    probabilities: Tensor | None
    plan: RoutePlan | None
    executor: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Decision:
        """Without its gradient, which torch refuses to copy: a model can be copied between its passes."""
        probabilities = None if self.probabilities is None else self.probabilities.detach().clone()
        return Decision(self.gates.detach().clone(), probabilities, self.plan, self.executor)


class RoutedStack(nn.Module):
    r"""Layers of residual branches with one gate each: x ← x + g · f(norm(x)), the same in training and inference.

    Decisions for all layers are made once, from the input of the first; then every branch computes its listed rows alone.

    ===============  ====================================================================================================
    ``executor``     when it wins
    ===============  ====================================================================================================
    ``dense_mask``   training: every branch computes all rows and is multiplied by its gate, which gives every gate its
                     gradient. Never faster than the model without gates.
    ``cpu``          inference on the CPU: gather, normalise and add back in C++, prepared weights, fused activation.
    ``planned``      row counts are read once (on a GPU: one wait), then library products of exactly that size: wide
                     layers, large batches; and ``sparse_train`` on any device.
    ``list``         counts stay on the GPU: no wait, can be captured in a CUDA graph; small and middle sizes.
    ``graph``        one sample on a GPU: the decision is read once, then the active layers' CUDA graphs are replayed; a
                     skipped layer costs nothing.
    ``switch``       the same as one CUDA graph, in which the kernels of skipped layers are switched off: one launch. Where
                     decisions seldom change from one step to the next; needs cuda-bindings.
    ``auto``         ``dense_mask`` (or ``planned`` with ``sparse_train``) where a gradient is recorded; else ``cpu`` or
                     ``planned`` by the device.
    ===============  ====================================================================================================

    Args:
        layers: the modules whose branches these are; they keep their names 0 … L − 1, so that a checkpoint of the dense
            stack fits.
        branches: per layer its residual branches in order (:mod:`xdfast.nn.branches`).
        router: gives logits from the stack's input; None: ``gates`` must be given, or everything runs.
        gate: logits → gates; its threshold decides.
        unit: what is routed: whole samples, blocks of ``router.block_rows`` tokens, or tokens.
        always_on: layers that always run; negative ones count from the end.
        keys: for tokens and blocks: attention sees ``"all"`` tokens (as a model converted from a dense one expects) or the
            ``"active"`` ones alone (cheapest; for models trained so).
        executor: see above.
        sparse_train: train with the lists too: a training step then costs the active share; gates of what did not run
            get no gradient, so a fraction ``explore`` of it runs with weight 0.
        explore: fraction of the inactive units that runs to be learnt about, in ``sparse_train``.

    Shape:
        x [B, T, D] → [B, T, D]; gates [U, L] or [U, L, S], U = B, B·T/G or B·T.

    Raises:
        ValueError: unknown options, sizes that do not fit, NaN gates (on the CPU).
        RuntimeError: an executor that cannot run here.

    Reference:
        ActDistill, arXiv 2511.18082; why not h · g: docs/routed.md.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        branches: Sequence[Sequence[Branch]],
        router: LayerRouter | None = None,
        *,
        gate: GateFunction | None = None,
        unit: str = "sample",
        always_on: Sequence[int] = (0, -1),
        keys: str = "all",
        executor: str = "auto",
        sparse_train: bool = False,
        explore: float = 0.05,
    ) -> None:
        super().__init__()
        if not layers or len(layers) != len(branches) or not all(branches):
            raise ValueError(
                f"a routed stack needs layers with residual branches, got {len(layers)} layers and branches for {len(branches)}"
            )
        self.unit = check_choice("unit", unit, UNITS)
        self.keys = check_choice("keys", keys, ("all", "active"))
        self.executor = check_choice("executor", executor, EXECUTORS)
        if not 0 <= explore <= 1:
            raise ValueError(f"explore is a fraction in [0, 1], got {explore!r}")
        self.sparse_train, self.explore = sparse_train, explore
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)
        self._branches = tuple(tuple(row) for row in branches)
        self.num_layers = len(layers)
        self.always_on = tuple(sorted({self._layer(i) for i in always_on}))
        self.router, self.gate = router, gate or GateFunction()
        self.branches = router.branches if router is not None else 1
        if router is not None:
            self._check_router(router)
        self.decision: Decision | None = None
        self._told = False
        self._graphs: PathGraphs | None = None  # made on first use, not copied

    def _layer(self, number: int) -> int:
        if not -self.num_layers <= number < self.num_layers:
            raise ValueError(f"always_on names layer {number}, but the stack has layers 0 to {self.num_layers - 1}")
        return number % self.num_layers

    def _check_router(self, router: LayerRouter) -> None:
        if router.num_layers != self.num_layers:
            raise ValueError(f"the router decides for {router.num_layers} layers, the stack has {self.num_layers}")
        if router.branches not in (1, *{len(row) for row in self._branches}):
            raise ValueError(
                f"the router has {router.branches} decisions per layer, the layers have {len(self._branches[0])} branches"
            )
        within = {"none": "token", "block": "block"}.get(router.pool, "sample")
        if within != self.unit:
            raise ValueError(f"unit={self.unit!r}, but a router with pool={router.pool!r} decides per {within}")

    def branches_of(self, layer: int) -> tuple[Branch, ...]:
        """The residual branches of a layer, in order."""
        return self._branches[layer]

    def costs(self, tokens: int, branches: int | None = None) -> Tensor:
        """FLOPs of each decision for one sample of T tokens [L, S] float64, for budgets and calibration; S = 1 joins a layer's
        branches (default: as the router decides)."""
        return stack_costs(self, tokens, branches)

    def flops(self, tokens: int, decided: RoutePlan | Decision | None = None) -> RoutedFlops:
        """FLOPs of a pass over samples of T tokens: dense, asked for, executed; default: of the last decision."""
        return count_routed(self, tokens, decided)

    def route(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(gates [U, L, S], probabilities or None) for an input [B, T, D]; everything on without a router."""
        if self.router is None:
            return x.new_ones(self._units(x), self.num_layers, 1), None
        logits = self.router(x, mask)
        logits = logits.flatten(0, -3) if logits.dim() == 4 else logits
        return self.gate(logits), self.gate.probabilities(logits)

    def forward(
        self, x: Tensor, gates: Tensor | None = None, *, mask: Tensor | None = None, **context: Any
    ) -> Tensor:  # [B, T, D] → [B, T, D]
        if x.dim() != 3:
            raise ValueError(f"a routed stack takes [B, T, D], got {list(x.shape)}")
        probabilities = None
        if gates is None:
            gates, probabilities = self.route(x, mask)
        gates = self._forced_on(self._checked(gates, x))
        executor, _ = self.choose(x, gates)
        if executor == "dense_mask":
            plan, out = None, self._dense_mask(x, gates, context)
        else:
            plan = self.plan(x, gates, host=executor != "list")
            out = self._listed(x, plan, executor, context)
        self.decision = Decision(gates, probabilities, plan, executor)
        return out

    def plan(self, x: Tensor, gates: Tensor, *, host: bool = True) -> RoutePlan:
        """The lists for an input [B, T, D] and its gates; ``host`` reads the counts (one wait on a GPU)."""
        rows = x.shape[0] * x.shape[1] // gates.shape[0]
        force = None
        if self.sparse_train and self.training and self.explore > 0:
            force = ~self.active(gates) & (torch.rand_like(gates, dtype=torch.float32) < self.explore)
        hard = self.gate.scale == "hard"
        if not hard:
            # The threshold stays on the device, and may differ by decision: what is off becomes 0, with its gradient.
            gates = torch.where(self.active(gates), gates, gates - gates.detach())
        plan = make_plan(
            gates, rows_per_unit=rows, samples=x.shape[0], threshold=0.5 if hard else 0.0, hard=hard, force=force
        )
        return plan.to_host() if host else plan

    def active(self, gates: Tensor) -> Tensor:
        """Which gates [U, L, S] let their branch run, bool: those above one half, or of soft gates above the threshold of
        their decision; 1 always does."""
        gates = gates.detach()
        if self.gate.scale == "hard":  # decided by the threshold already
            return gates > 0.5
        return (gates > self.gate.threshold.to(gates.device)) | (gates >= 1)

    def refold(self) -> None:
        """Forgets what was prepared from the weights (packed, folded, captured); the next pass prepares it anew.

        Needed only after writes on a GPU that PyTorch does not see: ``weight.data.mul_(2)``, kernels of one's own. Optimisers'
        steps, in-place operations, ``load_state_dict`` and ``to`` are seen, and so is ``.data`` on the CPU.
        """
        self._graphs = None
        for row in self._branches:
            for branch in row:
                branch.refold()

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedStack:
        self.refold()  # the copies would stay on the old device; and memory that is used again has old addresses
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.refold()
        super()._load_from_state_dict(*args)

    def choose(self, x: Tensor, gates: Tensor | None = None) -> tuple[str, str]:
        """(executor that runs for ``x`` now, why).

        Raises:
            RuntimeError: the one asked for cannot run here; the message says what can.
        """
        learning = torch.is_grad_enabled() and (
            x.requires_grad
            or (gates is not None and gates.requires_grad)
            or any(p.requires_grad for p in self.parameters())
        )
        device = x.device.type
        if self.executor == "auto":
            if learning and not self.sparse_train:
                if not self.training and not self._told:
                    self._told = True
                    log.warning(
                        "a routed stack in eval mode computes everything, because a gradient is recorded: call it under "
                        "torch.no_grad() to skip what is off"
                    )
                return "dense_mask", "a gradient is recorded: every gate gets its own"
            if learning:
                return "planned", "sparse_train: rows that do not run cost nothing and get no gradient"
            return ("cpu", "inference on the CPU") if device == "cpu" else ("planned", f"inference on {device}")
        if self.executor == "cpu" and device != "cpu":
            raise RuntimeError(f"executor='cpu' takes tensors on the CPU, x is on {device}; use 'planned' or 'list'")
        if self.executor == "cpu" and learning:
            raise RuntimeError("executor='cpu' has no gradient; use torch.no_grad(), 'dense_mask', or sparse_train")
        if self.executor in ("list", *_GRAPHS) and device != "cuda":
            what = "keeps counts on a GPU" if self.executor == "list" else "replays CUDA graphs"
            raise RuntimeError(f"executor={self.executor!r} {what}; on {device} use 'cpu' or 'planned'")
        if self.executor in _GRAPHS and learning:
            raise RuntimeError(
                f"executor={self.executor!r} has no gradient; use torch.no_grad(), 'dense_mask', or sparse_train"
            )
        return self.executor, "asked for"

    # --- executors

    def _dense_mask(self, x: Tensor, gates: Tensor, context: dict[str, Any]) -> Tensor:
        for number in range(self.num_layers):
            x = self._dense_layer(x, gates, number, context)
        return x

    def _dense_layer(self, x: Tensor, gates: Tensor, number: int, context: dict[str, Any]) -> Tensor:
        for branch_number, branch in enumerate(self._branches[number]):
            seen = None
            if self.keys == "active" and self.unit != "sample":
                on = self.active(gates)
                seen = self._per_token(x, on[:, number, min(branch_number, on.shape[2] - 1)])
            g = self._per_token(x, gates[:, number, min(branch_number, gates.shape[2] - 1)])
            x = x + g[..., None].to(x.dtype) * branch.dense(x, seen=seen, **context)
        return x

    def _per_token(self, x: Tensor, gates: Tensor) -> Tensor:  # [U] → [B, T], or [B, 1] for samples
        batch, tokens, _ = x.shape
        if self.unit == "sample":
            return gates[:, None]
        return gates.unflatten(0, (batch, -1)).repeat_interleave(tokens * batch // gates.shape[0], 1)

    def _listed(self, x: Tensor, plan: RoutePlan, executor: str, context: dict[str, Any]) -> Tensor:
        if executor in _GRAPHS:
            if context:
                raise RuntimeError(
                    f"executor={executor!r} passes nothing on to the layers, got {', '.join(context)}; use 'planned'"
                )
            switched = executor == "switch"
            if self._graphs is None or self._graphs.switched != switched:
                self._graphs = PathGraphs(self, switched)
            return self._graphs(x, plan)
        flat = x.reshape(-1, x.shape[2])
        if not torch.is_grad_enabled():
            flat = flat.clone()  # the branches then add in place
        rows = self._rows(x) if executor == "cpu" else None
        if executor == "list" and not torch.is_grad_enabled():
            return self.carry(flat, plan, x.shape[1], context).view(x.shape)
        for number in range(self.num_layers):
            flat = self._listed_layer(flat, x.shape[1], plan, number, rows, context)
        return flat.view(x.shape)

    def _listed_layer(
        self, flat: Tensor, tokens: int, plan: RoutePlan, number: int, rows: RowPasses | None, context: dict[str, Any]
    ) -> Tensor:
        """One layer for rows [R, D]; in place where no gradient is recorded."""
        learning = torch.is_grad_enabled()
        for branch_number, branch in enumerate(self._branches[number]):
            route = plan.of(number, branch_number)
            if route.units == 0:
                continue
            if rows is not None:
                branch.infer(flat, route, tokens, rows, keys=self.keys, **context)
            else:
                flat = branch.routed(flat, route, tokens, keys=self.keys, in_place=not learning, **context)
        return flat

    def carry(self, x: Tensor, plan: RoutePlan, tokens: int, context: dict[str, Any]) -> Tensor:
        """The executor ``list`` without gradients, in place on x [R, D]: no value of the plan is known to the host."""
        if context:
            raise RuntimeError(
                f"executor='list' passes nothing on to the layers, got {', '.join(context)}; use 'planned'"
            )
        statistics = carried_statistics(x)
        for number, row in enumerate(self._branches):
            for branch_number, branch in enumerate(row):
                branch.carried(x, statistics, plan.of(number, branch_number), tokens, keys=self.keys)
        return x

    @staticmethod
    def _rows(x: Tensor) -> RowPasses:
        ok, _ = cpp_available("cpu")
        wide = x.dtype == torch.float64 or _backends.forced() in ("torch", "reference")
        return TorchRows() if wide or not ok else CppRows()

    # --- checks

    def _units(self, x: Tensor) -> int:
        if self.unit == "sample":
            return x.shape[0]
        rows = 1 if self.unit == "token" else getattr(self.router, "block_rows", None) or 1
        return x.shape[0] * x.shape[1] // rows

    def _checked(self, gates: Tensor, x: Tensor) -> Tensor:
        if not isinstance(gates, Tensor) or not gates.dtype.is_floating_point:
            kind = gates.dtype if isinstance(gates, Tensor) else type(gates).__name__
            raise TypeError(f"gates must be a floating-point tensor [U, L] or [U, L, S], got {kind}; use gates.float()")
        gates = gates.unsqueeze(-1) if gates.dim() == 2 else gates
        most = max(len(row) for row in self._branches)
        units = self._units(x)
        if self.unit == "block" and self.router is None:
            units = gates.shape[0]  # blocks are as long as the gates say
        fits = gates.dim() == 3 and gates.shape[:2] == (units, self.num_layers) and gates.shape[2] in (1, most)
        if not fits or gates.shape[0] % x.shape[0] or (x.shape[0] * x.shape[1]) % gates.shape[0]:
            raise ValueError(
                f"gates must be [{units}, {self.num_layers}] or [{units}, {self.num_layers}, {most}] for x {list(x.shape)} with "
                f"unit={self.unit!r}, got {list(gates.shape)}"
            )
        if gates.device.type == "cpu" and not torch.compiler.is_compiling():  # looking is free
            bad = int((~((gates >= 0) & (gates <= 1))).sum())
            if bad:
                raise ValueError(f"{bad} gates are NaN or outside [0, 1]; gates are probabilities or 0 and 1")
        return gates

    def _forced_on(self, gates: Tensor) -> Tensor:
        if not self.always_on:
            return gates
        gates = gates.clone()
        for layer in self.always_on:  # a mask made on the host would have to be copied, and a GPU would wait for it
            gates.select(1, layer).fill_(1)
        return gates

    def extra_repr(self) -> str:
        return f"unit={self.unit!r}, always_on={self.always_on}, keys={self.keys!r}, executor={self.executor!r}"
