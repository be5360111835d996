"""Students as encoders: plain timm, plain torchvision, frozen BatchNorm."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from xdfast.models import create_model, load_encoder, save_student


@pytest.fixture
def run(tmp_path):
    """A folder as a run leaves it, with a ResNet-18 whose statistics are not the initial ones."""
    torch.manual_seed(0)
    # timm starts the last norm of each block at zero, which would hide the block and its gradients.
    student = create_model("resnet18", num_classes=5, image_size=64, options={"zero_init_last": False})
    student.train()
    with torch.no_grad():
        for _ in range(3):
            student(torch.rand(4, 3, 64, 64))
    save_student(student.eval(), tmp_path / "student", classes=list("abcde"), extra={})
    return tmp_path, student


def test_timm_and_torchvision_load_it(run) -> None:
    folder, student = run
    images = student.prepare(torch.rand(2, 3, 64, 64))
    expected = student.net(images)
    by_timm = timm.create_model(f"local-dir:{folder / 'student'}", pretrained=True).eval()
    torch.testing.assert_close(by_timm(images), expected)
    by_torchvision = torchvision.models.resnet18(num_classes=5).eval()
    by_torchvision.load_state_dict(load_file(folder / "student" / "model.safetensors"))
    torch.testing.assert_close(by_torchvision(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["as-trained", "frozen"])
def test_an_encoder_gives_the_students_features(run, norm) -> None:
    folder, student = run
    encoder = load_encoder(folder, norm=norm)
    images = torch.rand(3, 3, 50, 70)
    assert encoder.num_classes == 0 and encoder.image_size == 64
    torch.testing.assert_close(encoder.eval()(images).features, student(images).features, rtol=1e-4, atol=1e-5)
    assert load_encoder(folder / "student", image_size=96).image_size == 96


def test_frozen_statistics_stay_and_the_rest_learns(run) -> None:
    folder, _ = run
    encoder = load_encoder(folder, norm="frozen").train()
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in encoder.modules())
    before = {name: value.clone() for name, value in encoder.net.state_dict().items()}
    images = torch.rand(2, 3, 64, 64)
    one = encoder(images[:1]).features  # a batch of one, in training mode
    torch.testing.assert_close(one, encoder(images).features[:1], rtol=1e-4, atol=1e-5)
    encoder(images).features.square().sum().backward()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter -= 1e-3 * parameter.grad
    after = encoder.net.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {n for n in before if "bn" in n or "downsample.1" in n}
    # either loads the other's weights
    load_encoder(folder).net.load_state_dict(after, strict=False)


def test_a_group_norm_student_needs_no_freezing(tmp_path) -> None:
    student = create_model("resnet18", num_classes=0, image_size=64, options={"norm_layer": "groupnorm"}).eval()
    save_student(student, tmp_path / "student", classes=[], extra={})
    encoder = load_encoder(tmp_path, norm="frozen")
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(encoder(images).features, student(images).features)
    assert any(isinstance(part, nn.GroupNorm) for part in encoder.modules())


def test_what_is_wrong_is_named(run, tmp_path) -> None:
    folder, _ = run
    with pytest.raises(ValueError, match="Did you mean 'frozen'?"):
        load_encoder(folder, norm="frosen")
    with pytest.raises(FileNotFoundError, match="no student in"):
        load_encoder(tmp_path / "nothing")
