"""Several taps: modules of two architectures compared, live and from the cache."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file

import xdfast
from xdfast.data.store import TeacherStore
from xdfast.models import create_model, pool_tap, tap_widths

SETTINGS = {
    "teacher": "test_vit",
    "teacher_pretrained": False,
    "teacher_size": 32,
    "student": "test_resnet",
    "student_size": 32,
    "data": "sklearn:digits",
    "labels_per_class": 12,
    "loss": "mse+rsd:0.01",
    "ce_weight": 0.0,
    "aad_expansion": 0.0,
    "taps": {"layer2": "blocks.1", "layer3": "blocks.3"},
    "epochs": 3,
    "batch_size": 20,
    "augment": "small",
    "optimizer": "adamw",
    "lr": 1e-3,
    "workers": 0,
    "progress": False,
    "device": "cpu",
    "monitor": 100,
}


def test_every_tap_has_a_projector_and_a_term(tmp_path) -> None:
    run = xdfast.distill(**SETTINGS, out=str(tmp_path / "run"))
    row = next(row for row in run.history if row["kind"] == "train")
    terms = {"mse", "rsd", "mse_at_layer2", "mse_at_layer3", "rsd_at_layer2", "rsd_at_layer3"}
    assert terms <= {key.removeprefix("loss_") for key in row}
    assert row["loss"] == pytest.approx(sum(row[f"loss_{term}"] for term in terms), rel=1e-4)
    saved = load_file(run.path / "projectors.safetensors")
    ours = tap_widths(create_model("test_resnet", image_size=32, taps=("layer2", "layer3"), pretrained=False))
    assert {name.partition(".")[0] for name in saved} == terms
    assert all(
        value.shape[1] == ours["layer2" if "layer2" in name else "layer3"]
        for name, value in saved.items()
        if "_at_" in name
    )
    assert timm.create_model(f"local-dir:{run.path / 'student'}", pretrained=True) is not None


def test_taps_are_cached_as_well(tmp_path) -> None:
    runs = [
        xdfast.distill(
            **SETTINGS, cache=str(tmp_path / "store"), cache_views=1, cache_dtype="float32", out=str(tmp_path / name)
        )
        for name in ("first", "again")
    ]
    store = TeacherStore.load(tmp_path / "store")
    assert store.complete and set(store.layout.outputs) == {"features", "tap:blocks.1", "tap:blocks.3"}
    a, b = (run.student.state_dict() for run in runs)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("shape", "places"),
    [((2, 5), None), ((2, 7, 5), 1), ((2, 5, 4, 4), (2, 3)), ((2, 4, 4, 5), (1, 2)), ((2, 4, 4, 4), (2, 3))],
)
def test_outputs_of_every_kind_become_vectors(shape, places) -> None:
    output = torch.randn(*shape, dtype=torch.float64)
    expected = output if places is None else output.mean(places)
    torch.testing.assert_close(pool_tap(output, "x"), expected.float())


def test_what_cannot_be_compared_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"shape \[1, 2, 3, 4, 5\]"):
        pool_tap(torch.zeros(1, 2, 3, 4, 5), "loss")
    with pytest.raises(ValueError, match="gives tuple"):
        pool_tap((torch.zeros(1),), "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layer9.*layer"):
        xdfast.distill(**{**SETTINGS, "taps": {"layer9": "blocks.1"}}, out=str(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"blocks\.77"):
        xdfast.distill(**{**SETTINGS, "taps": {"layer2": "blocks.77"}}, out=str(tmp_path / "b"))
    with pytest.raises(ValueError, match="compared by feature losses"):
        settings = {**SETTINGS, "loss": "rsd-logits", "teacher_options": {"num_classes": 10}}
        xdfast.distill(**settings, out=str(tmp_path / "c"))
