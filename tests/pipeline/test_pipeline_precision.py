"""Mixed precision where the hardware has it, and float32, told, where it would only be slower."""

from __future__ import annotations

import json

import pytest
import torch

import xdfast
from xdfast.pipeline import precision

CPU = torch.device("cpu")


def _config(amp: str) -> xdfast.PolicyConfig:
    return xdfast.PolicyConfig(task="my-robot", out="unused", amp=amp)


def _inside(amp: str) -> torch.dtype:
    with precision.autocast(_config(amp), CPU):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.fixture(autouse=True)
def _asked_anew():
    precision.cpu_computes.cache_clear()
    yield
    precision.cpu_computes.cache_clear()


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
    assert caplog.text.count("bf16: this CPU has no instructions for it") == (0 if supported else 1)


@pytest.mark.parametrize("supported", [True, False])
def test_a_teacher_in_half_precision_is_one_where_that_pays(supported, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    assert precision.computed_precision("bf16", torch.device("cuda")) == ("bf16", torch.bfloat16)
    assert precision.computed_precision("float32", CPU) == ("float32", None)
    assert precision.computed_precision("bf16", CPU) == (("bf16", torch.bfloat16) if supported else ("float32", None))
    run = xdfast.distill(
        teacher="test_vit", teacher_pretrained=False, teacher_size=32, teacher_precision="bf16", student="test_resnet",
        student_size=32, data="sklearn:digits", labels_per_class=2, epochs=1, batch_size=10, augment="none", workers=0, loss="mse",
        ce_weight=0.0, monitor=0, cache=str(tmp_path / "store"), cache_views=1, progress=False, device="cpu",
        out=str(tmp_path / "run"),
    )  # fmt: skip
    assert run.metrics is not None
    facts = json.loads((tmp_path / "store" / "manifest.json").read_text(encoding="utf-8"))["facts"]
    assert facts["precision"] == ("bf16" if supported else "float32")  # what was computed, not what was asked for
