"""The image loader against a torchvision DataLoader and DALI's own random crop; see xdfast.bench.data.

    XDFAST_BENCH_IMAGES=/path/to/class/folders pytest bench/bench_data.py --benchmark-json=bench/results/cpu/data.json

Without ``XDFAST_BENCH_IMAGES`` the JPEGs are made, of smooth noise.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali")
pytest.importorskip("psutil")

from xdfast.bench.data import MUST_REACH, STRETCH, make_photographs, measure, one_pass, open_images, our_loader
from xdfast.bench.harness import machine

_FOLDER = "XDFAST_BENCH_IMAGES"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[Path, str]:
    """(class folders of JPEGs, what they are)"""
    given = os.environ.get(_FOLDER)
    if given:
        return Path(given), f"photographs of {_FOLDER}"
    return make_photographs(tmp_path_factory.mktemp("photographs")), "made of noise at several scales, seed 0"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def bench_data_cpu(benchmark, images, interpolation: str) -> None:
    root, what = images
    load = os.getloadavg()[0]  # ratios move by a tenth on a busy machine
    found = measure(root, interpolation)
    about = {**machine(), "load_before": load}
    benchmark.extra_info.update(machine=about, what=what, target=MUST_REACH, stretch=STRETCH, **found)
    loader = our_loader(open_images(root), interpolation, "dali")
    benchmark.pedantic(one_pass(loader), rounds=5, iterations=1, warmup_rounds=1)
    loader.close()
