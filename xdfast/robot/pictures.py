"""What a policy does to camera pictures before its encoder sees them: checked, cropped, brought to [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["batch_of", "check_pictures", "crop", "crop_cameras"]


def check_pictures(images: Tensor, cameras: Sequence[str], n_obs: int, image_size: tuple[int, int]) -> None:
    """Whether pictures are uint8 ``[B, K, T, H, W, 3]`` of these cameras.

    Raises:
        ValueError: another shape (a camera is missing, another size) or dtype.
    """
    size = (*image_size, 3)
    if images.ndim != 6 or images.shape[1:3] != (len(cameras), n_obs) or images.shape[3:] != size:
        raise ValueError(
            f"expected images [B, {len(cameras)}, {n_obs}, {size[0]}, {size[1]}, 3] of cameras "
            f"{', '.join(cameras)}, got {list(images.shape)}"
        )
    if images.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images (0..255), got {images.dtype}")


def crop_cameras(images: Tensor, size: int, *, at_random: bool) -> Tensor:
    """``[B, K, T, H, W, 3]`` → ``[B, K, T, S, S, 3]``: one window per sample and camera, at random or in the middle."""
    return crop(images.flatten(0, 1), size, at_random=at_random).unflatten(0, images.shape[:2])


def crop(images: Tensor, size: int, *, at_random: bool) -> Tensor:
    """``[N, T, H, W, 3]`` → ``[N, T, S, S, 3]``: one window per row, at random or in the middle."""
    rows, _, height, width = images.shape[:4]
    if at_random and (height > size or width > size):
        top = torch.randint(0, height - size + 1, (rows,))
        left = torch.randint(0, width - size + 1, (rows,))
        return torch.stack([images[i, :, y : y + size, x : x + size] for i, (y, x) in enumerate(zip(top, left))])
    top, left = (height - size) // 2, (width - size) // 2  # type: ignore[assignment]
    return images[:, :, top : top + size, left : left + size]


def batch_of(pixels: Tensor) -> Tensor:
    """``[..., 3, S, S]`` → ``[N, 3, S, S]``, channels last in memory as they were."""
    return pixels.flatten(0, -4).contiguous(memory_format=torch.channels_last)
