"""What a routed stack costs: without gates, by its gates, and as its executor runs it.

FLOPs are 2 per multiply-add of linear maps, Q Kᵀ and P V; element-wise work is not counted, and causal attention counts
whole, as in torch's and fvcore's counters.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xdfast.nn.branches import AttentionBranch, Branch, MLPBranch, ModuleBranch
from xdfast.ops._flops import missing_formulas
from xdfast.ops.route import RoutePlan

if TYPE_CHECKING:
    from xdfast.nn.routed import Decision, RoutedStack

__all__ = ["TILE", "RoutedFlops", "count_routed", "stack_costs"]

#: Rows of a tile of the list executor's kernels: its last tile of a list is padded up to it.
TILE = 128


@dataclass(frozen=True)
class RoutedFlops:
    """FLOPs of one forward pass of a routed stack, the whole batch.

    Attributes:
        dense: every branch for every row, no router.
        nominal: what the gates ask for: listed rows, and for attention pairs of listed queries and the keys they see; with
            the router.
        executed: what the executor multiplies, with the router. ``dense_mask``: everything. ``cpu``, ``planned``: exactly the
            listed rows, and with ``keys="all"`` keys and values of all rows. ``list``: the last tile of a list as a whole;
            attention exactly (blocks beyond a sample's rows end before their first product).
        router: of the router; 0 where the gates were given.
        executor: which one it was counted for.
        active: nominal share of listed rows over all branches, weighted by their cost.
    """

    dense: int
    nominal: int
    executed: int
    router: int
    executor: str
    active: float

    @property
    def fraction_executed(self) -> float:
        """executed / dense."""
        return self.executed / self.dense

    @property
    def fraction_nominal(self) -> float:
        """nominal / dense."""
        return self.nominal / self.dense

    @property
    def ideal(self) -> float:
        """Speedup over the dense stack if time were proportional to what the gates ask for; infinite if that is nothing."""
        return self.dense / self.nominal if self.nominal else float("inf")

    def fraction_of_ideal(self, speedup: float) -> float:
        """A measured speedup over the dense stack as a fraction of :attr:`ideal`."""
        return speedup / self.ideal

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "fraction_executed": self.fraction_executed, "fraction_nominal": self.fraction_nominal}


def stack_costs(stack: RoutedStack, tokens: int, branches: int | None = None) -> Tensor:
    """FLOPs of each decision for one sample of that many tokens [L, S] float64; S = 1 joins the branches of a layer.

    Raises:
        ValueError: fewer than one token, or a module whose cost nobody knows.
    """
    if tokens < 1:
        raise ValueError(f"a sample has at least one token, got {tokens}")
    decisions = stack.branches if branches is None else branches
    costs = torch.zeros(stack.num_layers, decisions, dtype=torch.float64)
    for layer in range(stack.num_layers):
        for number, branch in enumerate(stack.branches_of(layer)):
            costs[layer, min(number, decisions - 1)] += 2 * _macs(stack, branch, tokens, tokens, tokens * tokens)
    return costs


def count_routed(
    stack: RoutedStack,
    tokens: int,
    decided: RoutePlan | Decision | None = None,
    *,
    executor: str | None = None,
    tile: int = TILE,
) -> RoutedFlops:
    """Counts a pass from its plan or decision; it reads them from the device.

    Args:
        stack: the stack.
        tokens: T, of a sample.
        decided: a decision, or a plan; None: the stack's last decision.
        executor: count as if this one had run.
        tile: rows of a tile of the list executor.

    Raises:
        ValueError: nothing was decided yet, or a decision for another number of tokens.
    """
    decided = stack.decision if decided is None else decided
    if decided is None:
        raise ValueError("the stack has decided nothing yet: run it once, or give a plan")
    plan = decided if isinstance(decided, RoutePlan) else decided.plan
    if plan is not None and plan.rows != plan.samples * tokens:
        raise ValueError(f"the decision is for samples of {plan.rows // plan.samples} tokens, not {tokens}")
    if isinstance(decided, RoutePlan):
        listed = asked = _rows_of_plan(decided)
        ran, routed = "planned" if executor is None else executor, stack.router is not None
        rows_per_unit = decided.rows_per_unit
    else:
        ran = decided.executor if executor is None else executor
        routed = decided.probabilities is not None
        rows_per_unit = _rows_per_unit(stack, tokens, decided)
        asked = _rows_of_gates(stack, tokens, decided.gates, rows_per_unit)
        listed = asked if decided.plan is None else _rows_of_plan(decided.plan)
    samples, decisions = asked.shape[2], asked.shape[1]
    router = samples * stack.router.flops(tokens) if routed and stack.router is not None else 0
    whole = rows_per_unit == tokens
    dense = nominal = executed = 0
    for layer in range(stack.num_layers):
        for number, branch in enumerate(stack.branches_of(layer)):
            every = 2 * samples * _macs(stack, branch, tokens, tokens, tokens * tokens)
            dense += every
            at = min(number, decisions - 1)
            rows, pairs = _seen(asked[layer, at], tokens, stack.keys)
            nominal += 2 * _macs(stack, branch, tokens, rows, pairs)
            if ran == "dense_mask":
                executed += every
                continue
            rows, pairs = _seen(listed[layer, at], tokens, stack.keys)
            everywhere = isinstance(branch, AttentionBranch) and stack.keys == "all" and not whole
            if rows == 0 and not (everywhere and ran == "list"):  # only the host can leave a branch out
                continue
            padded = min(-(-rows // tile) * tile, samples * tokens) if ran == "list" else rows
            executed += 2 * _macs(stack, branch, tokens, padded, pairs)
            if everywhere:
                executed += 2 * (samples * tokens - padded) * _keys_and_values(branch)
    active = nominal / dense if dense else 0.0
    return RoutedFlops(dense, nominal + router, executed + router, router, ran, active)


def _seen(per_sample: Tensor, tokens: int, keys: str) -> tuple[int, int]:
    """(listed rows, pairs of a listed query and a key it sees) from rows per sample [B]."""
    rows = per_sample.to(torch.int64)
    seen = rows if keys == "active" else torch.where(rows > 0, tokens, 0)
    return int(rows.sum()), int((rows * seen).sum())


def _rows_of_plan(plan: RoutePlan) -> Tensor:  # [L, S, B]
    return plan.offsets.diff(dim=-1).cpu()


def _rows_of_gates(stack: RoutedStack, tokens: int, gates: Tensor, rows_per_unit: int) -> Tensor:  # [L, S, B]
    units = tokens // rows_per_unit
    active = stack.active(gates).unflatten(0, (-1, units)).sum(1)  # [B, L, S]
    return (active * rows_per_unit).permute(1, 2, 0).cpu()


def _rows_per_unit(stack: RoutedStack, tokens: int, decision: Decision) -> int:
    if decision.plan is not None:
        return decision.plan.rows_per_unit
    if stack.unit == "block":
        rows = getattr(stack.router, "block_rows", None)
        if rows is None:
            raise ValueError("the length of a block is not known from given gates without a plan; give the plan")
        return int(rows)
    return tokens if stack.unit == "sample" else 1


def _keys_and_values(branch: Any) -> int:
    """Multiply-adds of a row's keys and values."""
    return branch.qkv[0].in_features * 2 * branch.kv_heads * branch.width


def _macs(stack: RoutedStack, branch: Branch, tokens: int, rows: int, pairs: int) -> int:
    """Multiply-adds of a branch for that many rows, with attention over that many pairs of query and key."""
    if isinstance(branch, AttentionBranch):
        linear = sum(x.in_features * x.out_features for x in (*branch.qkv, branch.proj))
        return rows * linear + 2 * pairs * branch.heads * branch.width
    if isinstance(branch, MLPBranch):
        return branch.macs(rows, tokens)
    known = branch.macs(tokens, tokens)
    if known == 0 and isinstance(branch, ModuleBranch):
        known = _counted(stack, branch, tokens)
    return known * rows // tokens


def _counted(stack: RoutedStack, branch: ModuleBranch, tokens: int) -> int:
    """Multiply-adds of any module for one sample, counted by torch."""
    width, like = _width(stack), next(stack.parameters(), torch.empty(0))
    training = [m for m in stack.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=missing_formulas()) as counter:
            branch.dense(like.new_zeros(1, tokens, width))
    except Exception as error:
        raise ValueError(
            f"the cost of {type(branch.inner).__name__} is not known, and it cannot be tried on [1, {tokens}, {width}] "
            f"({error}); give its ModuleBranch macs_per_row"
        ) from error
    finally:
        for module in training:
            module.training = True
    return int(counter.get_total_flops()) // 2


def _width(stack: RoutedStack) -> int:
    if stack.router is not None:
        return stack.router.dim
    for layer in range(stack.num_layers):
        for branch in stack.branches_of(layer):
            if isinstance(branch, AttentionBranch):
                return branch.qkv[0].in_features
            if isinstance(branch, MLPBranch):
                return branch.inner[0].in_features
            norm = getattr(branch, "norm", None)
            if norm is not None and norm.weight is not None:
                return norm.weight.shape[-1]
    raise ValueError("the width of the stack is not known: give its ModuleBranch macs_per_row")
