"""Models named by their code: ``net.py:Net`` and ``package.module:Net``."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from own_net import CODE
from safetensors.torch import save_file

from xdfast.models import create_model, save_student
from xdfast.models.checkpoint import CheckpointError
from xdfast.models.own import TRUSTED, allow, is_own, rebuildable, split_weights

MIXER = "timm.models.mlp_mixer:MlpMixer"
SMALL = {"patch_size": 8, "num_blocks": 2, "embed_dim": 16}


@pytest.fixture(autouse=True)
def nothing_trusted(monkeypatch) -> None:
    monkeypatch.setenv(TRUSTED, "")


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
    spec = f"{file}:Net@{tmp_path}/w.safetensors"
    again = create_model(spec, num_classes=5, frozen=True)
    assert torch.equal(again.net.conv.weight, model.net.conv.weight)
    assert torch.equal(again.net.head.weight, model.net.head.weight)
    with pytest.raises(CheckpointError, match="head.weight"):
        create_model(spec, num_classes=6)
    save_file(
        create_model(f"{file}:Net").net.state_dict(), tmp_path / "w.safetensors"
    )  # of the class's own three classes
    other = create_model(spec, num_classes=6)
    assert other.num_classes == 6 and other.net.head.weight.shape == (6, 8)


def test_a_saved_student_knows_how_it_was_made(file, tmp_path) -> None:
    model = create_model(f"{file}:Net", num_classes=5, image_size=48, options={"width": 6}).eval()
    save_student(model, tmp_path / "student")
    again = create_model(f"{file}:Net@{tmp_path}/student/model.safetensors").eval()
    x = torch.rand(2, 3, 48, 48)
    assert torch.equal(again(x).logits, model(x).logits) and again.image_size == 48
    (tmp_path / "student/config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        create_model(f"{file}:Net@{tmp_path}/student/model.safetensors")


@pytest.mark.parametrize("name", ["Net", "fixed"])
def test_a_student_with_another_classifier_than_it_was_made_with(file, tmp_path, name) -> None:
    model = create_model(f"{file}:{name}", num_classes=4).eval()
    model.reset_classifier(9)
    save_student(model, tmp_path / "student")
    again = create_model(tmp_path / "student").eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x).logits, model(x).logits) and again.num_classes == 9
    assert len(again.net.head._forward_pre_hooks) == 1


def test_a_mixer_of_other_classes_and_size(tmp_path) -> None:
    first = create_model(MIXER, num_classes=10, image_size=32, options=SMALL)
    save_student(first, tmp_path / "a")
    second = create_model(tmp_path / "a", num_classes=4).eval()
    save_student(second, tmp_path / "b")
    again = create_model(tmp_path / "b").eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x).logits, second(x).logits) and again.num_classes == 4
    with pytest.raises(CheckpointError):  # a mixer's weights are of one size
        create_model(tmp_path / "a", image_size=64)


def test_a_function_that_changes_a_model_of_timm_is_not_taken_for_timms(tmp_path) -> None:
    code = (
        "import timm, torch\n"
        "def make(num_classes):\n"
        "    return timm.create_model('test_resnet', num_classes=num_classes, act_layer=torch.nn.SiLU)\n"
    )
    (tmp_path / "net.py").write_text(code)
    model = create_model(f"{tmp_path}/net.py:make", num_classes=3, image_size=32).eval()
    save_student(model, tmp_path / "student")
    again = create_model(tmp_path / "student").eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x).logits, model(x).logits)
    assert "SiLU" in repr(again.net) and "architecture" not in json.loads(
        (tmp_path / "student/config.json").read_text()
    )


def test_other_code_is_another_name(file) -> None:
    before = create_model(f"{file}:Net").name
    Path(file).write_text(CODE.replace("nn.Conv2d(3, width, 3)", "nn.Conv2d(3, width, 5)"))
    after = create_model(f"{file}:Net")
    assert before.startswith(f"{file}:Net#") and after.name != before and after.net.conv.kernel_size == (5, 5)


def test_a_folder_does_not_choose_what_code_runs(file, tmp_path, monkeypatch) -> None:
    save_student(create_model(f"{file}:Net", num_classes=5), tmp_path / "student")
    monkeypatch.delenv(TRUSTED)  # as in a new process
    with pytest.raises(ValueError, match=r"code that is not run unasked: name it .*my net.py:Net@.*XDFAST_OWN_CODE="):
        create_model(tmp_path / "student")
    (tmp_path / "payload.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    for spec in ("os:system", "payload:X", "antigravity:X", "torch.hub:load"):
        config["xdfast"]["own"] = {"spec": spec, "arguments": {"command": f"touch {tmp_path}/ran"}}
        (tmp_path / "student" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="not run unasked"):
            create_model(tmp_path / "student")
    assert not (tmp_path / "ran").exists()
    assert rebuildable(MIXER) and not rebuildable("timm:create_model") and not rebuildable("no_such_module:Net")


def test_code_the_user_trusts(file, tmp_path, monkeypatch) -> None:
    save_student(create_model(f"{file}:Net", num_classes=5), tmp_path / "student")
    monkeypatch.setenv(TRUSTED, f"a.b:C;{file}:Net")
    assert create_model(tmp_path / "student").num_classes == 5
    monkeypatch.delenv(TRUSTED)
    allow(f"{file}:Net")
    assert create_model(tmp_path / "student").num_classes == 5


def test_arguments_that_no_file_can_hold_are_not_saved(tmp_path) -> None:
    model = create_model(MIXER, num_classes=3, image_size=32, options={**SMALL, "act_layer": torch.nn.ReLU})
    save_student(model, tmp_path / "student")
    with pytest.raises(ValueError, match="make the module yourself"):
        create_model(tmp_path / "student")


@pytest.mark.parametrize("facts", [None, [], "x"])
def test_a_config_with_a_strange_part_of_ours(tmp_path, facts) -> None:
    save_student(create_model("test_resnet", num_classes=3, image_size=32), tmp_path / "student")
    file = tmp_path / "student" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "xdfast": facts}))
    assert create_model(tmp_path / "student").num_classes == 3


def test_where_the_weights_begin() -> None:
    assert split_weights("a/net.py:Net@w/x.pt") == ("a/net.py:Net", "w/x.pt")
    assert split_weights("/home/a@b/net.py:Net@w.pt") == ("/home/a@b/net.py:Net", "w.pt")
    assert split_weights("/home/a@b/net.py:Net") is None and split_weights("resnet18@w.pt") is None


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
