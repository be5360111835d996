"""Speed: who is measured how, what is skipped, what the ratio and the memory mean. No time is asserted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xdfast.models import create_model
from xdfast.reporting import compare_speed
from xdfast.reporting.memory import activation_bytes
from xdfast.reporting.speed import ratio_interval


class Small(nn.Module):
    """Counts its calls in a shared list, to see the order."""

    def __init__(self, name: str, seen: list[str], width: int = 4) -> None:
        super().__init__()
        self.name_, self.seen = name, seen
        self.conv = nn.Conv2d(3, width, 3, padding=1)

    def forward(self, x):
        self.seen.append(self.name_)
        assert not self.training
        return self.conv(x).mean((2, 3))


def test_rounds_interleave_and_all_models_run_equally_often() -> None:
    seen: list[str] = []
    models = {name: Small(name, seen).train() for name in "abc"}
    table = compare_speed(models, dict.fromkeys("abc", 8), (1,), baseline="a", rounds=20, min_time=0)
    tail = seen[-60:]
    groups = [tail[i : i + 3] for i in range(0, 60, 3)]
    assert all(sorted(group) == ["a", "b", "c"] for group in groups)
    assert len({tuple(group) for group in groups}) > 1  # the order changes
    assert all(model.training for model in models.values())
    row = table.row("b", 1)
    assert row.rounds == 20 and row.calls == 1
    assert row.p50_ms <= row.p95_ms
    assert row.images_per_s == pytest.approx(1e3 / row.p50_ms)
    assert row.speedup_low <= row.speedup <= row.speedup_high
    assert table.row("a", 1).speedup == 1.0 == table.row("a", 1).speedup_low


def test_facts_of_the_machine_and_the_wrapper() -> None:
    model = create_model("test_resnet", pretrained=False, image_size=32)
    table = compare_speed({"net": model}, batch_sizes=(1, 2), rounds=3, seconds=1e4)
    assert [row.batch_size for row in table.rows] == [1, 2]
    assert table.rows[0].image_size == 32 and table.rows[0].dtype == "float32"
    assert table.rows[0].speedup is None
    assert table.threads == torch.get_num_threads() and table.torch_version == torch.__version__
    assert table.device == "cpu" and table.device_name and "live tensor storages" in table.memory_method
    assert table.to_dict()["rows"][0]["model"] == "net"


def test_memory_is_the_peak_of_live_storages() -> None:
    class Chain(nn.Module):
        def forward(self, x):
            a = x + 1  # 1 unit live
            b = torch.cat([a, a])  # 3 units
            del a
            c = b.view(-1)[:4] * 2  # a view costs nothing; 4 numbers
            return c + 1

    images = torch.zeros(1, 3, 32, 32)
    unit = images.numel() * 4
    assert activation_bytes(Chain(), images) == 3 * unit
    # the weights and the input are not activations
    assert activation_bytes(nn.Conv2d(3, 1, 1, bias=False), images) == 32 * 32 * 4


def test_what_does_not_fit_is_listed_not_hidden() -> None:
    seen: list[str] = []
    told: list[float] = []
    table = compare_speed(
        {"a": Small("a", seen)}, {"a": 32}, (1, 10**6), seconds=0.2, progress=lambda what, share: told.append(share)
    )
    assert [row.batch_size for row in table.rows] == [1]
    assert table.skipped and "a at batch 1000000" in table.skipped[0]
    assert told[-1] == 1.0 and told == sorted(told)


def test_out_of_memory_is_listed_and_smaller_batches_stay() -> None:
    class Greedy(nn.Module):
        def forward(self, x):
            if len(x) > 2:
                raise torch.OutOfMemoryError("no more")
            return x.mean((2, 3))

    table = compare_speed({"g": Greedy()}, {"g": 8}, (2, 4, 8), rounds=3, seconds=1e4)
    assert [row.batch_size for row in table.rows] == [2]
    assert "g at batch 4: out of memory" in table.skipped[0] and "batch 8" in table.skipped[1]


def test_the_ratio_is_of_medians_and_its_interval_contains_it() -> None:
    assert ratio_interval([4.0, 4.0, 4.0], [2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    ratio, low, high = ratio_interval([4.0, 5.0, 3.0, 4.0, 100.0], [2.0, 2.5, 1.5, 2.0, 50.0])
    assert ratio == 2.0 and low <= 2.0 <= high  # an outlier that hits both moves nothing


def test_half_precision_runs() -> None:
    table = compare_speed({"a": Small("a", [])}, {"a": 8}, (2,), rounds=3, amp="bf16")
    assert table.amp == "bf16"


def test_bad_arguments_are_named() -> None:
    net = {"a": Small("a", [])}
    with pytest.raises(ValueError, match="at least one model"):
        compare_speed({})
    with pytest.raises(ValueError, match="no model is called 'b'; there are: a"):
        compare_speed(net, baseline="b")
    with pytest.raises(ValueError, match=r"image_sizes\['a'\] must be a whole number ≥ 1, got -1"):
        compare_speed(net, {"a": -1})
    with pytest.raises(ValueError, match="batch_sizes"):
        compare_speed(net, batch_sizes=(0,))
    with pytest.raises(ValueError, match="amp must be"):
        compare_speed(net, amp="int8")
    with pytest.raises(ValueError, match=r"vit cannot run with image_size=100.*built for 160"):
        compare_speed({"vit": create_model("test_vit", pretrained=False)}, {"vit": 100})
