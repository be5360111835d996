"""create_model: names, files, folders, modules; each with its own size and normalisation, and errors that say what to do."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import xdfast
from xdfast.models import CheckpointError, FeatureModel, create_model, save_student, weights_hash

# One of each way timm ends a model: Linear after pooling, pooled tokens, norm before the head, convolutional head, two heads.
FAMILIES = [
    ("test_resnet", {}),
    ("test_vit", {}),
    ("test_convnext", {}),
    ("test_efficientnet", {}),
    ("test_mambaout", {}),
    ("mobilenetv3_small_050", {}),
    ("vgg11_bn", {"image_size": 32}),
    ("deit_tiny_distilled_patch16_224", {"image_size": 32}),
    ("mixer_s32_224", {"image_size": 64}),
    ("swin_tiny_patch4_window7_224", {"image_size": 56, "options": {"depths": (1, 1), "num_heads": (2, 4)}}),
]


@pytest.mark.parametrize(("name", "settings"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_features_and_logits_are_timms_own(name: str, settings: dict) -> None:
    settings = {"image_size": 64, **settings}
    if name == "test_vit":
        settings["image_size"] = 160
    model = create_model(name, num_classes=7, **settings).eval()
    images = torch.rand(2, 3, 40, 40)
    with torch.no_grad():
        output = model(images)
        x = model.prepare(images)
        spatial = model.net.forward_features(x)
        expected = model.net.forward_head(spatial, pre_logits=True).flatten(1)
        logits = model.net(x)
    assert output.features.shape == (2, model.num_features)
    torch.testing.assert_close(output.features, expected)
    torch.testing.assert_close(output.logits, logits)
    assert model.num_classes == 7
    assert isinstance(model.classifier, nn.Module)


def test_prepare_is_the_models_own_size_mean_and_std() -> None:
    model = create_model("test_resnet", image_size=48)
    images = torch.rand(2, 3, 96, 96)
    x = model.prepare(images)
    assert x.shape == (2, 3, 48, 48)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.mean, model.std))
    resized = nn.functional.interpolate(images, size=(48, 48), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(x, (resized - mean) / std)
    bytes_ = (images * 255).round().to(torch.uint8)
    torch.testing.assert_close(model.prepare(bytes_), model.prepare(bytes_.float() / 255))
    assert create_model("vit_tiny_patch16_224").mean != create_model("resnet18").mean  # each keeps its own


def test_prepare_refuses_what_is_not_a_batch_of_rgb_images() -> None:
    model = create_model("test_resnet")
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\], got \(3, 8, 8\)"):
        model.prepare(torch.rand(3, 8, 8))
    with pytest.raises(ValueError, match="got \\(2, 1, 8, 8\\)"):
        model.prepare(torch.rand(2, 1, 8, 8))
    with pytest.raises(TypeError, match="uint8 .* or floating point .* got torch.int64"):
        model.prepare(torch.zeros(2, 3, 8, 8, dtype=torch.int64))


def test_teacher_at_224_and_student_at_32_in_one_batch() -> None:
    teacher = create_model("vit_tiny_patch16_224", pretrained=False, frozen=True, options={"depth": 1})
    student = create_model("test_resnet", image_size=32)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert teacher.prepare(images).shape[-1] == 224
    assert teacher(images).features.shape == (2, 192)
    assert student(images).features.shape == (2, student.num_features)


def test_dinov2_comes_at_224_without_its_classifier() -> None:
    model = create_model("vit_small_patch14_dinov2", pretrained=False, options={"depth": 1})
    assert (model.image_size, model.num_features, model.num_classes) == (224, 384, 0)
    output = model(torch.rand(1, 3, 32, 32))
    assert output.logits is None
    assert model.net.patch_embed.grid_size == (16, 16)


def test_frozen_model_has_no_gradient_and_stays_in_eval_mode() -> None:
    model = create_model("test_resnet", pretrained=False, frozen=True)
    model.train()
    assert not model.training and not model.net.training
    before = copy.deepcopy(model.state_dict())
    output = model(torch.rand(4, 3, 32, 32, requires_grad=True))
    assert not output.features.requires_grad and not output.logits.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    output.features.requires_grad_(True)  # not an inference tensor: a loss may save it for backward
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_teacher_answers_in_float32(dtype: torch.dtype) -> None:
    full = create_model("test_vit", pretrained=False, frozen=True)
    half = create_model(full, frozen=True, dtype=dtype)
    images = torch.rand(2, 3, 160, 160)
    assert next(half.net.parameters()).dtype == dtype
    assert next(full.net.parameters()).dtype == torch.float32  # the caller's own is a copy apart
    output = half(images)
    assert output.features.dtype == output.logits.dtype == torch.float32
    torch.testing.assert_close(output.features, full(images).features, rtol=0.1, atol=0.1)


def test_taps_and_their_names() -> None:
    model = create_model("test_resnet", taps=("layer2", "layer3.0"))
    output = model(torch.rand(2, 3, 64, 64))
    assert set(output.taps) == {"layer2", "layer3.0"}
    assert output.taps["layer2"].ndim == 4
    twin = copy.deepcopy(model)  # an EMA is a deep copy: its hooks must fill its own taps
    with torch.no_grad():
        next(twin.net.parameters()).zero_()
    images = torch.rand(2, 3, 64, 64)
    assert not torch.equal(model(images).taps["layer2"], twin(images).taps["layer2"])
    with pytest.raises(ValueError, match="no sub-module 'layer22' to tap. Did you mean 'layer2"):
        create_model("test_resnet", taps=("layer22",))


def test_any_module_with_a_linear_classifier() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    net.train()
    model = create_model(net, image_size=16)
    assert net.training  # looking at it changed nothing
    assert (model.num_features, model.num_classes) == (8, 5)
    output = model(torch.rand(3, 3, 16, 16))
    torch.testing.assert_close(model.classifier(output.features), output.logits)
    twin = copy.deepcopy(model)
    assert twin(torch.rand(3, 3, 16, 16)).features.shape == (3, 8)
    model = create_model(net, image_size=16, num_classes=9)
    assert model(torch.rand(3, 3, 16, 16)).logits.shape == (3, 9)


def test_a_module_without_classifier_gives_features_only() -> None:
    model = create_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), image_size=16)
    output = model(torch.rand(2, 3, 16, 16))
    assert output.features.shape == (2, 8) and output.logits is None and model.classifier is None
    with pytest.raises(ValueError, match=r"no nn.Linear classifier to replace"):
        model.reset_classifier(3)
    with pytest.raises(ValueError, match=r"must map images .* got \(2, 8, 14, 14\)"):
        create_model(nn.Conv2d(3, 8, 3), image_size=16)


def test_teacher_module_is_copied_and_student_module_is_not() -> None:
    net = timm.create_model("test_resnet", num_classes=4)
    teacher = create_model(net, frozen=True)
    assert teacher.net is not net and all(p.requires_grad for p in net.parameters())
    assert create_model(net).net is net
    student = FeatureModel(net)
    assert create_model(student) is student


def test_weights_from_a_file_of_either_kind(tmp_path) -> None:
    source = timm.create_model("test_resnet", num_classes=6)
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "b.pth")
    torch.save({"teacher": source.state_dict(), "epoch": 3}, tmp_path / "c.pt")
    for file in ("a.safetensors", "b.pth", "c.pt"):
        model = create_model(f"test_resnet@{tmp_path / file}")
        assert model.num_classes == 6
        assert weights_hash(model.net) == weights_hash(source)
    other = create_model(f"test_resnet@{tmp_path / 'a.safetensors'}", num_classes=3)
    assert other.num_classes == 3
    assert torch.equal(other.net.conv1[0].weight, source.conv1[0].weight)


def test_dinov2_from_a_local_file_is_resampled_to_224(tmp_path) -> None:
    source = timm.create_model("vit_small_patch14_dinov2", depth=1)  # at its own 518 px
    save_file(source.state_dict(), tmp_path / "dinov2.safetensors")
    model = create_model(
        f"vit_small_patch14_dinov2@{tmp_path / 'dinov2.safetensors'}", frozen=True, options={"depth": 1}
    )
    assert model.image_size == 224
    assert model.net.pos_embed.shape[1] == 16 * 16 + (source.pos_embed.shape[1] - 37 * 37)
    assert torch.equal(model.net.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_weights_that_do_not_fit_or_cannot_be_read(tmp_path) -> None:
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(CheckpointError, match=r"do not fit test_resnet: \d+ missing \(.*another architecture"):
        create_model(f"test_resnet@{tmp_path / 'vit.safetensors'}")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        create_model(f"test_resnet@{tmp_path / 'none.pth'}")
    whole = (tmp_path / "vit.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:1000])
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    for file in ("cut.safetensors", "cut.pth"):
        with pytest.raises(CheckpointError, match=f"{file} cannot be read as weights"):
            create_model(f"test_vit@{tmp_path / file}")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match=r"no tensors by name; its keys are \['epoch'\]"):
        create_model(f"test_vit@{tmp_path / 'empty.pth'}")


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path) -> None:
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        create_model(f"test_vit@{tmp_path / 'evil.pth'}")
    assert not (tmp_path / "ran").exists()


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown model 'resnet81'. Did you mean 'resnet"):
        create_model("resnet81")
    with pytest.raises(ValueError, match=r"no published weights 'a1_in2k'. Did you mean 'a1_in1k'"):
        create_model("resnet18.a1_in2k")
    with pytest.raises(ValueError, match="needs its architecture in front"):
        create_model("weights/model.pth")
    with pytest.raises(TypeError, match="timm name"):
        create_model(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not take all of {'depht': 3.*unexpected keyword argument 'depht'"):
        create_model("test_vit", pretrained=False, options={"depht": 3})


def test_missing_weights_name_both_ways_out(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConnectionError, match=r"vit_small_patch14_dinov2 could not be fetched.*hub.*vit_small_patch14_dinov2@/path"
    ):
        create_model("vit_small_patch14_dinov2", frozen=True)
    with pytest.raises(ValueError, match="none are published"):
        create_model("darknet17", pretrained=True)


def test_the_saved_student_is_the_same_model(tmp_path) -> None:
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = create_model("vit_tiny_patch16_224", num_classes=3, image_size=32, options=options).eval()
    save_student(model, tmp_path / "s", classes=["a", "b", "c"], extra={"metrics": {"top1": 0.5}})
    loaded = create_model(tmp_path / "s").eval()
    assert (loaded.name, loaded.image_size, loaded.num_classes) == ("vit_tiny_patch16_224", 32, 3)
    assert (loaded.mean, loaded.std) == (model.mean, model.std)
    assert weights_hash(loaded.net) == weights_hash(model.net)
    plain = timm.create_model(f"local-dir:{tmp_path / 's'}", pretrained=True).eval()
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(plain(model.prepare(x)), loaded(x).logits, rtol=0, atol=0)
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["xdfast"]["metrics"] == {"top1": 0.5} and config["label_names"] == ["a", "b", "c"]
    save_student(loaded, tmp_path / "t")  # and again, from what was loaded
    assert weights_hash(create_model(tmp_path / "t").net) == weights_hash(model.net)
    assert create_model(tmp_path / "t", num_classes=8).num_classes == 8
    assert create_model(tmp_path / "t", image_size=48).net.patch_embed.grid_size == (6, 6)


def test_a_module_timm_cannot_rebuild_is_saved_as_weights(tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    save_student(create_model(net, image_size=8), tmp_path / "mine")
    with pytest.raises(ValueError, match="torch.nn.modules.container.Sequential, which timm cannot rebuild"):
        create_model(tmp_path / "mine")
    altered = timm.create_model("test_vit", depth=1)  # timm does not tell that it was made with depth=1
    save_student(create_model(altered), tmp_path / "altered")
    assert "architecture" not in json.loads((tmp_path / "altered" / "config.json").read_text())


def test_folders_that_hold_no_model(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no model"):
        create_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        create_model(tmp_path)


def test_tied_weights_can_be_saved(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(12, 12)
            self.b = nn.Linear(12, 12)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x.flatten(1)))

    save_student(create_model(Tied(), image_size=2), tmp_path / "tied")
    assert (tmp_path / "tied" / "model.safetensors").is_file()


def test_public_name_and_compile() -> None:
    model = xdfast.create_model("test_resnet", num_classes=4, image_size=32).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(compiled(images).logits, model(images).logits)
