"""Mixed precision where the hardware has it, and float32, told, where it would only be slower."""

from __future__ import annotations

import pytest
import torch

import xdfast
from xdfast.pipeline import loop

CPU = torch.device("cpu")


def _config(amp: str) -> xdfast.PolicyConfig:
    return xdfast.PolicyConfig(task="my-robot", out="unused", amp=amp)


def _inside(amp: str) -> torch.dtype:
    with loop.autocast(_config(amp), CPU):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.fixture(autouse=True)
def _asked_anew():
    loop._cpu_computes.cache_clear()
    yield
    loop._cpu_computes.cache_clear()


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_this_machine_computes_in_what_onednn_has_kernels_for(amp, dtype) -> None:
    has = getattr(torch.ops.mkldnn, f"_is_mkldnn_{amp}_supported")()
    assert _inside(amp) == (dtype if has else torch.float32)
    assert _inside("none") == torch.float32


@pytest.mark.parametrize("supported", [True, False])
def test_a_cpu_without_instructions_is_told_once(supported, monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    with caplog.at_level("INFO", logger="xdfast"):
        found = [_inside("bf16") for _ in range(2)]
    assert found == [torch.bfloat16 if supported else torch.float32] * 2
    assert caplog.text.count("amp=bf16: this CPU has no instructions for it") == (0 if supported else 1)
