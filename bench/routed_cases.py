"""Inputs of the routed benchmark: stacks of real layers, batches, and gates of several kinds at a given active share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from xdfast.errors import nearest
from xdfast.nn.branches import AttentionBranch, Branch, MLPBranch
from xdfast.nn.routed import RoutedStack

__all__ = ["DTYPES", "GATES", "SIZES", "RoutedCase", "Size", "build", "default_cases"]


@dataclass(frozen=True)
class Size:
    """A stack: ``kind`` "vit" (timm's blocks) or "llama" (RMSNorm, SwiGLU, grouped queries, causal)."""

    dim: int
    heads: int
    layers: int
    tokens: int = 197
    kind: str = "vit"
    kv_heads: int = 0
    hidden: int = 0


SIZES = {
    "S": Size(384, 6, 6),
    "B": Size(768, 12, 4),
    "L": Size(1024, 16, 4),
    "llama": Size(1024, 16, 4, 292, "llama", 4, 2816),
    "llama-7b": Size(4096, 32, 4, 292, "llama", 8, 11008),
    "vla-7b": Size(4096, 32, 32, 292, "llama", 32, 11008),  # all 32 layers of Llama 2 7B, OpenVLA's backbone
    "tiny": Size(64, 2, 3, 16),
    "llama-tiny": Size(64, 4, 3, 12, "llama", 2, 96),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: exact: that share of the samples in every layer (of the layers, for a batch of one); bernoulli: each by chance; path: a
#: batch of one, step after step, decisions correlated in time; tokens, clustered: that share of every sample's tokens,
#: scattered or in runs.
GATES = ("exact", "bernoulli", "path", "tokens", "clustered")
_STEPS = 8  # of a path
_RUN = 16  # tokens of a run, about


@dataclass(frozen=True)
class RoutedCase:
    """A stack, a batch and its gates at several active shares.

    Attributes:
        size: of :data:`SIZES`.
        batch: B.
        dtype: of :data:`DTYPES`.
        gates: of :data:`GATES`.
        shares: active shares.
        keys: with tokens for units: whose keys attention sees.
        train: forward and backward instead of inference.
    """

    size: str
    batch: int = 16
    dtype: str = "float32"
    gates: str = "exact"
    shares: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.0)
    keys: str = "all"
    train: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("size", self.size, SIZES),
            ("dtype", self.dtype, DTYPES),
            ("gates", self.gates, GATES),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; it is one of {', '.join(known)}.{nearest(value, known)}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(f"shares are active fractions in [0, 1], at least one, got {list(self.shares)}")
        if self.gates == "path" and self.batch != 1:
            raise ValueError(f"gates='path' follows one sample through time: batch must be 1, got {self.batch}")
        if self.by_token and SIZES[self.size].kind == "llama":
            raise ValueError(f"gates={self.gates!r} are of tokens; size {self.size!r} attends causally: use S, B or L")

    @property
    def by_token(self) -> bool:
        """Whether units are tokens."""
        return self.gates in ("tokens", "clustered")

    @property
    def middle(self) -> float:
        """The share nearest to one half, where memory and errors are looked at."""
        return min(self.shares, key=lambda share: abs(share - 0.5))

    def input(self, device: str = "cpu") -> Tensor:
        """x [B, T, D]."""
        size = SIZES[self.size]
        x = torch.randn(self.batch, size.tokens, size.dim, generator=torch.Generator().manual_seed(0))
        return x.to(device, DTYPES[self.dtype])

    def gates_at(self, share: float, device: str = "cpu") -> list[Tensor]:
        """Gates [U, L] of each step: one, for a path several."""
        size = SIZES[self.size]
        generator = torch.Generator().manual_seed(1)
        made = _make(self.gates, share, self.batch, size.tokens, size.layers, generator)
        return [gates.to(device) for gates in made]

    def __str__(self) -> str:
        keys = f" keys={self.keys}" if self.by_token else ""
        return f"{self.size} B={self.batch} {self.dtype} {self.gates}{keys}" + (" training" if self.train else "")


def _make(kind: str, share: float, batch: int, tokens: int, layers: int, generator: torch.Generator) -> list[Tensor]:
    def noise(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    if kind == "bernoulli":
        return [(noise(batch, layers) < share).float()]
    if kind == "path":
        steps = [noise(layers) < share]
        while len(steps) < _STEPS:
            changes = noise(layers) < 0.15
            steps.append(torch.where(changes, noise(layers) < share, steps[-1]))
        return [step.float()[None] for step in steps]
    if kind == "exact" and batch == 1:
        return [_top(noise(layers), share)[None]]
    if kind == "exact":
        return [_top(noise(layers, batch), share).T.contiguous()]
    score = noise(layers * batch, 1, tokens)
    if kind == "clustered":
        score = functional.avg_pool1d(functional.pad(score, (_RUN // 2, _RUN - 1 - _RUN // 2), mode="reflect"), _RUN, 1)
    return [_top(score[:, 0], share).unflatten(0, (layers, batch)).flatten(1).T.contiguous()]


def _top(score: Tensor, share: float) -> Tensor:
    """1 for that share of the last dimension, exactly, the highest scores."""
    chosen = score.topk(round(share * score.shape[-1]), -1).indices
    return torch.zeros_like(score).scatter_(-1, chosen, 1.0)


class _Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size, width = size, size.dim // size.heads
        self.qkv = nn.Linear(size.dim, (size.heads + 2 * size.kv_heads) * width, bias=False)
        self.proj = nn.Linear(size.dim, size.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads, shared = self.size.heads, self.size.kv_heads
        q, k, v = self.qkv(x).unflatten(-1, (heads + 2 * shared, -1)).transpose(1, 2).split((heads, shared, shared), 1)
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.proj(o.transpose(1, 2).flatten(2))


class _SwiGLU(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate = nn.Linear(size.dim, size.hidden, bias=False)
        self.up = nn.Linear(size.dim, size.hidden, bias=False)
        self.down = nn.Linear(size.hidden, size.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class _LlamaLayer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(size.dim, eps=1e-6), nn.RMSNorm(size.dim, eps=1e-6)
        self.attn, self.mlp = _Attention(size), _SwiGLU(size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _llama(size: Size) -> tuple[list[nn.Module], list[list[Branch]]]:
    layers = [_LlamaLayer(size) for _ in range(size.layers)]
    branches: list[list[Branch]] = []
    for x in layers:
        attention = AttentionBranch(
            x.norm1, x.attn.qkv, x.attn.proj, size.heads, kv_heads=size.kv_heads, causal=True, whole=[x.attn]
        )
        branches.append([attention, MLPBranch(x.norm2, (x.mlp.gate, x.mlp.up), "swiglu", x.mlp.down, whole=[x.mlp])])
    return list(layers), branches


def _vit(size: Size) -> tuple[list[nn.Module], list[list[Branch]]]:
    from timm.models.vision_transformer import Block

    layers = [Block(size.dim, size.heads, qkv_bias=True) for _ in range(size.layers)]
    branches: list[list[Branch]] = []
    for x in layers:
        attention = AttentionBranch(x.norm1, x.attn.qkv, x.attn.proj, size.heads, whole=[x.attn])
        branches.append([attention, MLPBranch(x.norm2, x.mlp.fc1, "gelu", x.mlp.fc2, whole=[x.mlp])])
    return list(layers), branches


def build(case: RoutedCase, device: str = "cpu") -> RoutedStack:
    """The case's stack with fixed random weights, nothing always on; gates are given."""
    size = SIZES[case.size]
    # made where it runs: 6 billion random numbers take a CPU minutes
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        layers, branches = (_llama if size.kind == "llama" else _vit)(size)
    stack = RoutedStack(
        layers, branches, unit="token" if case.by_token else "sample", keys=case.keys, always_on=(), sparse_train=case.train
    )  # fmt: skip
    return stack.to(device, DTYPES[case.dtype]).train(case.train)


def default_cases(device: str = "cpu", shares: Sequence[float] | None = None) -> list[RoutedCase]:
    """What ``make bench-routed`` and ``bench/gpu.sh`` measure."""
    if device == "cuda":
        cases = [RoutedCase(size, batch, "bfloat16") for size in ("S", "B", "L") for batch in (4, 16, 64)]
        cases += [RoutedCase("llama-7b", batch, "bfloat16", shares=(1.0, 0.5, 0.25)) for batch in (4, 16)]
        cases += [RoutedCase(size, 1, "bfloat16", "path", (1.0, 0.5)) for size in ("S", "B", "L", "llama-7b")]
        cases += [RoutedCase("B", 64, "bfloat16", "bernoulli", (0.5, 0.25))]
        cases += [RoutedCase("B", 64, "bfloat16", kind, (0.5, 0.25), "active") for kind in ("tokens", "clustered")]
        cases += [RoutedCase("B", 64, "bfloat16", shares=(0.5,), train=True)]
        cases += [
            RoutedCase("vla-7b", 1, "bfloat16", "path", (0.5,)),
            RoutedCase("vla-7b", 16, "bfloat16", shares=(0.5,)),
        ]
    else:
        cases = [RoutedCase(size, 16, dtype) for dtype in ("bfloat16", "float32") for size in ("S", "B")]
        cases += [RoutedCase("S", 16, "float32", shares=(0.5,), train=True)]
        cases += [
            RoutedCase(size, 1, dtype, "path", (1.0, 0.5)) for dtype in ("bfloat16", "float32") for size in ("S", "B")
        ]
        cases += [RoutedCase("S", 16, "bfloat16", "bernoulli", (0.5, 0.25))]
        cases += [RoutedCase("S", 16, "bfloat16", "clustered", (0.5, 0.25), keys) for keys in ("active", "all")]
        cases += [RoutedCase("llama", 4, "bfloat16", shares=(1.0, 0.5, 0.25))]
    if shares:
        cases = [RoutedCase(**{**vars(case), "shares": tuple(shares)}) for case in cases]
    return cases
