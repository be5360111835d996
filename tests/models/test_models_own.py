"""Models named by their code: ``net.py:Net`` and ``package.module:Net``."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xdfast.models import create_model, save_student
from xdfast.models.checkpoint import CheckpointError
from xdfast.models.own import is_own, rebuildable

MIXER = "timm.models.mlp_mixer:MlpMixer"
SMALL = {"patch_size": 8, "num_blocks": 2, "embed_dim": 16}
CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int = 8, num_classes: int = 3):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, num_classes)
    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))

def fixed():
    return Net(4, 7)

def broken():
    return nn.Linear("many", 1)

def wrong():
    return "no module"

number = 5
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "my net.py"
    path.write_text(CODE)
    return str(path)


@pytest.mark.parametrize(
    ("spec", "own"),
    [
        ("net.py:Net", True), ("/a b/net.py:make_net", True), (MIXER, True), ("net:Net", True), ("resnet18", False),
        ("hf-hub:owner/name", False), ("local-dir:folder", False), ("object:torch.nn.Linear", False), ("net.py", False),
        ("a/b:Net", False), ("vit_small_patch14_dinov2.lvd142m", False),
    ],
)  # fmt: skip
def test_what_names_code(spec, own) -> None:
    assert is_own(spec) is own


def test_a_class_of_a_file(file) -> None:
    model = create_model(f"{file}:Net", num_classes=5, image_size=32, options={"width": 6})
    out = model(torch.rand(2, 3, 40, 40))
    assert (model.num_features, model.num_classes, model.image_size) == (6, 5, 32) and out.logits.shape == (2, 5)
    again = create_model(f"{file}:Net", num_classes=5, options={"width": 6})
    assert type(again.net) is type(model.net) and again.image_size == 224
    assert type(pickle.loads(pickle.dumps(model.net))) is type(model.net)


def test_a_function_with_a_classifier_of_its_own_gets_another(file) -> None:
    assert create_model(f"{file}:fixed").num_classes == 7
    assert create_model(f"{file}:fixed", num_classes=5).num_classes == 5


def test_a_class_of_a_package_is_saved_and_made_again(tmp_path) -> None:
    model = create_model(MIXER, num_classes=10, image_size=32, options=SMALL).eval()
    assert model.image_size == 32 and model.num_features == 16
    save_student(model, tmp_path / "student")
    again = create_model(tmp_path / "student").eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x).logits, model(x).logits) and again.num_classes == 10


def test_weights_of_a_file_of_code(file, tmp_path) -> None:
    model = create_model(f"{file}:Net", num_classes=5)
    save_file(model.net.state_dict(), tmp_path / "w.safetensors")
    again = create_model(f"{file}:Net@{tmp_path}/w.safetensors", options={"num_classes": 5}, frozen=True)
    assert torch.equal(again.net.conv.weight, model.net.conv.weight)
    with pytest.raises(CheckpointError, match="head.weight"):
        create_model(f"{file}:Net@{tmp_path}/w.safetensors", options={"num_classes": 6})


def test_a_folder_does_not_choose_what_code_runs(file, tmp_path) -> None:
    save_student(create_model(f"{file}:Net", num_classes=5), tmp_path / "student")
    with pytest.raises(ValueError, match=r"code that is not run unasked: name it in front of them, .*my net.py:Net@"):
        create_model(tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    config["xdfast"]["own"] = {"spec": "os:system", "arguments": {"command": f"touch {tmp_path}/ran"}}
    (tmp_path / "student" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not run unasked"):
        create_model(tmp_path / "student")
    assert not (tmp_path / "ran").exists()
    assert rebuildable(MIXER) and not rebuildable("os:system") and not rebuildable("no_such_module:Net")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("Ned", ValueError, "has no 'Ned'. Did you mean 'Net'?"),
        ("broken", ValueError, "cannot be built with {} .TypeError"),
        ("wrong", TypeError, "must make an nn.Module, got str"),
        ("number", TypeError, "must be a class or function that makes a module, got int"),
    ],
)
def test_code_that_makes_no_model(file, name, error, message) -> None:
    with pytest.raises(error, match=message):
        create_model(f"{file}:{name}")


def test_wrong_places_and_arguments(file, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file .*/none.py"):
        create_model(f"{tmp_path}/none.py:Net")
    with pytest.raises(ValueError, match="module no.such.place cannot be imported"):
        create_model("no.such.place:Net")
    with pytest.raises(ValueError, match="has no argument 'widht'. Did you mean 'width'"):
        create_model(f"{file}:Net", options={"widht": 3})
    (tmp_path / "bad.py").write_text("import torch\n1 / 0\n")
    with pytest.raises(ValueError, match=r"bad.py cannot be imported \(ZeroDivisionError"):
        create_model(f"{tmp_path}/bad.py:Net")
