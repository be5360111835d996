"""One table of tolerances: (quantity, dtype) → relative error against the fp64 reference, with the reason.

"value" is |a − b| / |b|; "gradient" is ‖a − b‖ / ‖b‖ over the whole tensor (a vector comparison: single entries of a
gradient may be near zero).
"""

from __future__ import annotations

import torch

TOLERANCES: dict[tuple[str, torch.dtype | str], float] = {
    # The promise for fp64, far above rounding (1e-16 · D).
    ("value", torch.float64): 1e-10,
    ("gradient", torch.float64): 1e-10,
    # fp32 statistics and products: rounding 6e-8 · sqrt(terms); measured 1e-7, promised 1e-5.
    ("value", torch.float32): 1e-6,
    ("gradient", torch.float32): 5e-6,
    # Half inputs are compared with the fp64 result of the same rounded inputs, so only the output's rounding is left:
    # the loss is fp32; the gradient is rounded to 8 (bf16) or 11 (fp16) bits twice, when it is saved and when it is
    # multiplied by the incoming gradient: 2 · 2⁻⁸ and 2 · 2⁻¹¹.
    ("value", torch.bfloat16): 1e-6,
    ("gradient", torch.bfloat16): 8e-3,
    ("value", torch.float16): 1e-6,
    ("gradient", torch.float16): 1e-3,
    # Operands of the two products rounded to 8 bits (2⁻⁹ each), the Gram or correlation matrix once more; errors of the
    # terms of a sum are independent. Diagonal and statistics stay fp32. The promise is 2e-2.
    ("value", "bfloat16 products"): 2e-3,
    ("gradient", "bfloat16 products"): 1e-2,
    # Routed branches: norm, two products, an activation, a sum; half inputs are rounded between them (2⁻⁸ and 2⁻¹¹ each).
    ("routed", torch.float64): 1e-12,
    ("routed", torch.float32): 2e-6,
    ("routed", torch.bfloat16): 1e-2,
    ("routed", torch.float16): 1.5e-3,
    # A short convolution and its norm: sums of a few hundred terms; measured 2e-7. Two dozen of them, one after another: 1e-6.
    ("conv_rows", torch.float32): 1e-6,
    ("packed unet", torch.float32): 5e-6,
}

#: Views against Pillow's resize, in steps of 0..255. torch's and Pillow's 8-bit kernels round their weights to 15 and 22
#: bits, and Pillow clamps between its two passes, where bicubic overshoots: on noise (the worst picture for it) up to 20.
#: "mean" is per image; photographs of ImageNet have 0.03, the promise for them is 0.25. "dali" is DALI's own resize, as used
#: on a GPU: 0.16 to 0.18 on ImageNet; jitter multiplies it by up to 1.4 three times (the worst of 250 had 0.77).
VIEW_LSB: dict[str, float] = {
    "photographs": 0.25,
    "mean": 0.5,
    "bilinear": 1,
    "bicubic": 24,
    "lanczos": 0,
    "dali mean": 0.25,
    "dali mean, jittered": 0.8,
}

#: Exported files against eager PyTorch in float32, |a − b| over max(1, largest |b|): other orders of the same sums, 6e-8 ·
#: sqrt(terms); measured 2e-8 to 3e-6. The promise is 1e-4.
DEPLOY = 1e-5


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64 (absolute where the expected norm is 0)."""
    actual, expected = actual.detach().double(), expected.detach().double()
    norm = expected.norm()
    return float((actual - expected).norm() / (norm if norm > 0 else 1))
