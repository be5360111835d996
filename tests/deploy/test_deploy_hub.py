"""Publishing: files and card of a student or policy, to a folder and through huggingface_hub to a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from hub_server import Hub
from policy_parts import make_policy
from vla_parts import make_vla

import xdfast
from xdfast.deploy.hub import parse_target
from xdfast.models import CheckpointError, create_model, save_student
from xdfast.pipeline import DistillConfig
from xdfast.pipeline.folder import finish, open_folder
from xdfast.reporting import count_flops
from xdfast.robot import save_policy
from xdfast.robot.vla import save_vla

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished distillation, as distill leaves it; nothing was trained."""
    out = tmp_path_factory.mktemp("runs") / "flowers"
    config = DistillConfig(
        teacher="vit_small_patch16_224@/home/someone/weights/teacher.safetensors",
        student="test_resnet",
        data="unlabelled:/home/someone/flowers",
        val_data="/home/someone/val",
        out=str(out),
    )
    open_folder(config, "distill")
    torch.manual_seed(0)
    model = create_model("test_resnet", num_classes=3, image_size=32).eval()
    save_student(model, out / "student", classes=["rose", "tulip", "oak"], extra={"config": config.to_dict()})
    return finish(out, "distill", config, {"top1": 0.875, "top5": 1.0, "seconds": 3.0}, {})


def card_of(text: str):
    from huggingface_hub import ModelCard

    return ModelCard(text)


def test_a_folder_that_plain_timm_loads(run, tmp_path) -> None:
    done = xdfast.push(run, f"local-dir:{tmp_path / 'shelf'}", license="apache-2.0")
    assert done.files == ("README.md", "config.json", "model.safetensors", "recipe.yaml")
    assert done.where == str(tmp_path / "shelf")
    assert sorted(p.name for p in (tmp_path / "shelf").iterdir()) == list(done.files)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'shelf'}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs(images), run.student.net(images))
    assert theirs.pretrained_cfg["label_names"] == ["rose", "tulip", "oak"]


def test_the_card(run, tmp_path) -> None:
    done = xdfast.push(run.path, f"local-dir:{tmp_path / 'flowers-resnet'}", license="cc-by-4.0")
    card = card_of((tmp_path / "flowers-resnet" / "README.md").read_text(encoding="utf-8"))
    data = card.data.to_dict()
    assert data["license"] == "cc-by-4.0" and data["library_name"] == "timm"
    assert data["pipeline_tag"] == "image-classification"
    assert data["tags"] == ["xdfast", "knowledge-distillation"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.875, "val")
    text = done.card
    cost = count_flops(run.student, 32)
    assert f"| FLOPs (2 per multiply-add, counted) | {cost.flops / 1e9:.3g} G |" in text
    assert f"| parameters | {cost.params / 1e6:.3g} M |" in text
    assert "| top-1 | 87.5 % |" in text and "| top-5 | 100.0 % |" in text
    assert "teacher: vit_small_patch16_224@teacher.safetensors" in text and "loss: " in text
    assert "The weights: cc-by-4.0." in text
    assert "Classes: rose, tulip, oak." in text
    code = text.split("```python\n")[1].split("```")[0]
    assert 'timm.create_model("local-dir:flowers-resnet", pretrained=True)' in code
    compile(code, "card", "exec")


def test_the_cards_code_runs(run, tmp_path, monkeypatch) -> None:
    from PIL import Image

    done = xdfast.push(run, f"local-dir:{tmp_path / 'flowers'}", license="mit")
    monkeypatch.chdir(tmp_path)
    names = {"image": Image.new("RGB", (48, 40), (200, 30, 60))}
    exec(done.card.split("```python\n")[1].split("```")[0], names)
    assert names["logits"].shape == (1, 3)


def test_no_path_of_this_machine_is_published(run, tmp_path) -> None:
    xdfast.push(run, f"local-dir:{tmp_path / 'shelf'}")
    for file in (tmp_path / "shelf").iterdir():
        assert b"/home/someone" not in file.read_bytes(), file
        assert str(run.path).encode() not in file.read_bytes(), file
    assert "unlabelled:flowers" in (tmp_path / "shelf" / "recipe.yaml").read_text()


def test_without_a_licence_the_card_and_the_log_say_so(run, tmp_path, caplog) -> None:
    done = xdfast.push(run, f"local-dir:{tmp_path / 'shelf'}")
    assert "no licence given" in caplog.text
    assert "Not stated by whoever published these weights" in done.card
    assert "license" not in card_of(done.card).data.to_dict()


def test_pull_gives_what_the_other_verbs_take(run, tmp_path) -> None:
    shelf = f"local-dir:{tmp_path / 'shelf'}"
    xdfast.push(run, shelf)
    (tmp_path / "shelf" / "evil.bin").write_bytes(b"a pickle")
    assert xdfast.pull(shelf) == tmp_path / "shelf"
    folder = xdfast.pull(shelf, tmp_path / "copy")
    assert folder == tmp_path / "copy" and not (folder / "evil.bin").exists()
    assert xdfast.create_model(folder).num_classes == 3
    assert xdfast.load_encoder(folder).num_classes == 0
    again = xdfast.push(folder, f"local-dir:{tmp_path / 'third'}")  # without its run: the file knows the recipe
    assert "student: test_resnet" in again.card


def test_damage_is_noticed(run, tmp_path) -> None:
    shelf = f"local-dir:{tmp_path / 'shelf'}"
    xdfast.push(run, shelf)
    weights = tmp_path / "shelf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors is damaged or cut short .*; pull it again"):
        xdfast.pull(shelf, tmp_path / "copy")
    (tmp_path / "shelf" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        xdfast.pull(shelf)


def test_a_policy_and_a_vla(tmp_path, monkeypatch) -> None:
    policy, vla = make_policy(), make_vla()
    save_policy(policy, tmp_path / "a" / "policy")
    save_vla(vla, tmp_path / "b" / "vla")
    (tmp_path / "shelf").mkdir()
    monkeypatch.chdir(tmp_path / "shelf")
    for name, model in (("a", policy), ("b", vla)):
        done = xdfast.push(tmp_path / name, f"local-dir:{name}", license="mit")
        data = card_of(done.card).data.to_dict()
        assert data["pipeline_tag"] == "robotics" and data["library_name"] == "xdfast"
        assert "FLOPs of a decision" in done.card
        names: dict = {}
        exec(done.card.split("```python\n")[1].split("```")[0], names)  # what the card tells a stranger to do
        loaded = names["policy"]
        for key, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key])


@pytest.mark.timeout(1200)
def test_exported_files_go_along(run, tmp_path) -> None:
    xdfast.export(run, out=tmp_path / "out", formats=["pt2"], batches=[1], latency_seconds=0.1, progress=False)
    done = xdfast.push(run, f"local-dir:{tmp_path / 'shelf'}", exported=tmp_path / "out")
    assert {"exported/export.json", "exported/model.pt2"} <= set(done.files)
    assert "| `model.pt2` |" in done.card
    assert str(run.path) not in (tmp_path / "shelf" / "exported" / "export.json").read_text()
    with pytest.raises(FileNotFoundError, match="holds no finished export"):
        xdfast.push(run, f"local-dir:{tmp_path / 'shelf'}", exported=tmp_path)


def test_what_cannot_be_published(run, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no student, policy or VLA"):
        xdfast.push(tmp_path, "me/x")
    for bad in (str(tmp_path), "./shelf", "name", "a/b/c", "../x"):
        with pytest.raises(ValueError, match="must be OWNER/NAME, a repository of the hub, or local-dir:PATH"):
            xdfast.push(run, bad)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="needs a folder"):
        xdfast.push(run, f"local-dir:{tmp_path / 'file'}")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        xdfast.pull(f"local-dir:{tmp_path / 'nothing'}")
    mine = create_model(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)), image_size=4)
    save_student(mine, tmp_path / "mine")
    with pytest.raises(ValueError, match="weights of a module of yours"):
        xdfast.push(tmp_path / "mine", "me/x")
    assert parse_target("hf-hub:me/x", "to") == parse_target("me/x", "to") == "me/x"


def test_the_command_line(run, tmp_path, capsys) -> None:
    from xdfast.cli import main

    shelf = f"local-dir:{tmp_path / 'shelf'}"
    assert main(["push", "--model", str(run.path), "--to", shelf, "--license", "mit"]) == 0
    assert (
        f"README.md, config.json, model.safetensors, recipe.yaml\nwritten to {tmp_path / 'shelf'}"
        in capsys.readouterr().out
    )
    assert main(["pull", "--source", shelf, "--out", str(tmp_path / "copy")]) == 0
    assert f"written to {tmp_path / 'copy'}" in capsys.readouterr().out
    assert main(["pull", "--source", "nothing"]) == 1
    assert "source must be OWNER/NAME" in capsys.readouterr().err


_CLIENT = """
import json, logging, sys, timm, torch, xdfast
run, out = sys.argv[1:]
torch.set_num_threads(1)
done = xdfast.push(run, "me/flowers", license="mit", message="first")
branch = xdfast.push(run, "hf-hub:me/flowers", license="mit", revision="dev", private=False)
folder = xdfast.pull("me/flowers", out)
cached = xdfast.pull("me/flowers", revision="dev")
images = torch.rand(2, 3, 32, 32)
theirs = timm.create_model("hf-hub:me/flowers", pretrained=True).eval()
ours = xdfast.create_model(folder).eval().net
with torch.no_grad():
    same = torch.equal(theirs(images), ours(images))
try:
    xdfast.pull("me/nothing")
    refused = ""
except ConnectionError as error:
    refused = str(error)
facts = {"where": done.where, "files": done.files, "same": same, "refused": refused}
print(json.dumps({**facts, "cached": (cached / "model.safetensors").is_file()}))
"""


def client(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = {**kept, "PYTHONSAFEPATH": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_huggingface_hub_and_timm_against_a_server(run, tmp_path) -> None:
    with Hub(token="hf_test") as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test"}
        done = client(_CLIENT, str(run.path), str(tmp_path / "out"), **settings)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["same"] and told["cached"]
        assert told["where"].startswith(f"{hub.url}/me/flowers/commit/")
        assert "refuses me/nothing" in told["refused"] and "no such repository" in told["refused"]
        (name,) = hub.repositories
        repository = hub.repositories[name]
        assert name == "me/flowers" and repository["private"] is True  # private unless asked otherwise
        assert set(told["files"]) <= set(repository["branches"]["main"])
        assert (
            repository["branches"]["main"]["model.safetensors"] == (run.path / "student/model.safetensors").read_bytes()
        )
        assert 'timm.create_model("hf-hub:me/flowers"' in repository["branches"]["main"]["README.md"].decode()
        assert set(repository["branches"]) == {"main", "dev"}
        wrong = "import sys, xdfast; xdfast.push(sys.argv[1], 'me/flowers')"
        refused = client(wrong, str(run.path), **{**settings, "HF_TOKEN": "hf_wrong"})
    assert refused.returncode == 1 and "hf auth login" in refused.stderr and "ConnectionError" in refused.stderr


@pytest.mark.slow  # huggingface_hub tries again five times
@pytest.mark.timeout(1200)
def test_a_hub_that_is_not_there(tmp_path) -> None:
    code = "import xdfast; xdfast.pull('me/flowers')"
    done = client(code, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path), HF_TOKEN="hf_test")
    assert done.returncode == 1
    assert "http://127.0.0.1:9 cannot be reached for me/flowers" in done.stderr and "local-dir:PATH" in done.stderr
