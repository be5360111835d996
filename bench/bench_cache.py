"""An epoch with a live ViT-L/14 teacher against one that reads the teacher cache; see xdfast.bench.cache.

    XDFAST_BENCH_IMAGES=/path/to/class/folders pytest bench/bench_cache.py --benchmark-json=bench/results/cpu/cache.json

Without ``XDFAST_BENCH_IMAGES`` the images are made.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("psutil")

from xdfast.bench.cache import MUST_REACH, STRETCH, measure
from xdfast.bench.data import make_photographs
from xdfast.bench.harness import machine


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("teacher", ["vit_large_patch14_dinov2", "vit_small_patch14_dinov2"])
def bench_cache_cpu(benchmark, tmp_path, teacher: str) -> None:
    given = os.environ.get("XDFAST_BENCH_IMAGES")
    root = Path(given) if given else make_photographs(tmp_path / "photographs", count=20)
    load = os.getloadavg()[0]
    found = benchmark.pedantic(lambda: measure(root, tmp_path / "store", teacher), rounds=1, iterations=1)
    about = {**machine(), "load_before": load}
    benchmark.extra_info.update(machine=about, target=MUST_REACH, stretch=STRETCH, **found)
    assert found["weights_differ"] <= 1e-6


@pytest.mark.gpu
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("decoder", ["dali", "dali-gpu"])
def bench_cache_cuda(benchmark, tmp_path, decoder: str) -> None:
    """ViT-L/14 → ResNet-18 on a GPU: images/s live, cached, and in a plain PyTorch loop; bfloat16."""
    pytest.importorskip("nvidia.dali")
    given = os.environ.get("XDFAST_BENCH_IMAGES")
    root = Path(given) if given else make_photographs(tmp_path / "photographs", count=250)
    found = benchmark.pedantic(
        lambda: measure(
            root, tmp_path / "store", "vit_large_patch14_dinov2", device="cuda", batch=128, images=1024,
            workers=min(16, os.cpu_count() or 1), decoder=decoder, amp=True, plain=True, budget=90,
        ),
        rounds=1, iterations=1,
    )  # fmt: skip
    benchmark.extra_info.update(machine=machine(), target=MUST_REACH, stretch=STRETCH, **found)
