"""AAD, the projector between a student's embedding and its teacher's."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["AAD"]


class AAD(nn.Sequential):
    r"""Architecture-agnostic decoupling module, h(·) in the RSD paper; used in training only.

    .. math::
        h(f) = W_2 \, \mathrm{GELU}(\mathrm{BN}(W_1 f)), \quad W_1 \in R^{\gamma d_s \times d_s},
        \; W_2 \in R^{d_t \times \gamma d_s}

    No biases; weights from a normal distribution truncated at ±2 with std 0.02. With ``expansion=0`` it is the
    paper's "without AAD" ablation: one linear map d_s → d_t. Parameters: γ d_s² + γ d_s d_t + 2 γ d_s.

    Args:
        in_features: student width d_s.
        out_features: teacher width d_t.
        expansion: γ, width of the hidden layer in units of d_s; 0 for a single linear map.

    Shape:
        input [N, d_s], output [N, d_t]. In training N ≥ 2 (batch statistics).

    Raises:
        ValueError: a width < 1, a negative or not finite expansion, an input of another shape, N < 2 in training.

    Reference:
        Zhang et al., "Cross-Architecture Distillation Made Simple with Redundancy Suppression", ICCV 2025,
        arXiv 2507.21844, "Architecture-Agnostic Decoupling".

    Example:
        >>> import torch, xdfast
        >>> xdfast.AAD(512, 768)(torch.randn(4, 512)).shape
        torch.Size([4, 768])
    """

    def __init__(self, in_features: int, out_features: int, expansion: float = 2) -> None:
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer (a feature width), got {value!r}")
        if not 0 <= expansion < float("inf"):
            raise ValueError(f"expansion must be a finite number ≥ 0 (0: one linear map), got {expansion!r}")
        hidden = int(expansion * in_features)
        if expansion == 0:
            layers: list[nn.Module] = [nn.Linear(in_features, out_features, bias=False)]
        elif hidden < 1:
            raise ValueError(
                f"expansion {expansion!r} leaves no hidden unit for in_features={in_features}; "
                f"use 0 or more than {1 / in_features:g}"
            )
        else:
            layers = [
                nn.Linear(in_features, hidden, bias=False),
                nn.BatchNorm1d(hidden),
                nn.GELU(),
                nn.Linear(hidden, out_features, bias=False),
            ]
        super().__init__(*layers)
        self.in_features, self.out_features = in_features, out_features
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)

    def forward(self, features: Tensor) -> Tensor:  # [N, d_s] → [N, d_t]
        if features.dim() != 2 or features.shape[1] != self.in_features:
            raise ValueError(f"AAD expects features of shape [N, {self.in_features}], got {list(features.shape)}")
        if self.training and len(self) > 1 and features.shape[0] < 2:
            raise ValueError(
                "AAD needs at least 2 samples in training (batch normalisation), got 1; use drop_last=True"
            )
        return super().forward(features)
