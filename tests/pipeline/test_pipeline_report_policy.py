"""``report`` of policies: names of encoders, evaluations and files that are missing."""

from __future__ import annotations

import json
import shutil

import pytest
from policy_parts import write_demos

import xdfast
from xdfast.pipeline.folder import RunResult, load_run
from xdfast.pipeline.report_policy import encoder_name, policy_records

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "crop": 20, "feature_dim": 8, "unet_widths": (16, 32), "train_steps": 20, "inference_steps": 4, "noise_draws": 2,
    "batch_size": 8, "steps": 6, "warmup_steps": 1, "log_every": 2, "progress": False, "device": "cpu", "episodes": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, RunResult]:
    out = tmp_path_factory.mktemp("report")
    own = write_demos(out / "own", task="my-robot")
    drawer = write_demos(out / "drawer")
    return {
        "own": xdfast.finetune("test_resnet", task="my-robot", demos=str(own), out=str(out / "own-s0"), **SMALL),
        "drawer": xdfast.finetune("test_resnet", task="drawer-open", demos=str(drawer), out=str(out / "d-s0"), **SMALL),
    }


def evaluated(run: RunResult, solved: int, videos: dict[str, str]) -> None:
    """Leaves in the folder what ``evaluate`` writes."""
    episodes = [{"seed": s, "success": s < solved, "steps": 10} for s in range(4)]
    figures = {"success": solved / 4, "success_low": 0.0, "success_high": 1.0, "episodes": 4.0, "solved": float(solved)}
    latency = {"batch": 1, "runs": 5, "p50": 4.0, "p95": 5.0, "encode": 2.0, "denoise": 2.0, "steps": 4, "how": "cpu"}
    values = {
        "model": run.path.name, "path": str(run.path), "task": "t", "metrics": figures, "episodes": episodes,
        "videos": videos, "latency": latency, "saliency": "saliency.png", "settings": {"which": "last", "max_steps": None},
    }  # fmt: skip
    (run.path / "evaluation.json").write_text(json.dumps(values), encoding="utf-8")


def test_page_of_an_evaluated_run(runs, tmp_path) -> None:
    folder = shutil.copytree(runs["own"].path, tmp_path / "run")
    evaluated(load_run(folder), 3, {"success-0": "videos/success-0.mp4", "failure-3": "videos/failure-3.mp4"})
    (folder / "videos").mkdir()
    (folder / "videos" / "success-0.mp4").write_bytes(b"video")
    page = xdfast.report(folder, out=tmp_path / "r.html")
    data = json.loads(page.json_path.read_text(encoding="utf-8"))
    text = page.path.read_text(encoding="utf-8")
    assert "<title>Robot policies</title>" in text and "data:video/mp4;base64,dmlkZW8=" in text
    (row,) = data["robot"]["table"]
    assert (row["label"], row["task"], row["solved"], row["episodes"]) == ("from scratch", "my-robot", 3, 4)
    assert data["robot"]["counted"][0]["macs"] > 0 and data["robot"]["latency"][0]["p50"] == 4.0
    assert data["robot"]["encoders"][0]["norm"] == "group"
    (stages,) = data["robot"]["stages"]
    assert stages["stages"] == ["early", "middle", "late"] and -1 <= stages["silhouette"] <= 1
    told = " ".join(data["robot"]["remarks"])
    assert "failure-3.mp4 is not there any more" in told and "saliency.png is not there any more" in told


def test_what_cannot_be_evaluated_is_said(runs, monkeypatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "disable")
    own, drawer = policy_records([runs["own"], runs["drawer"]])
    assert "task 'my-robot' is not simulated" in own.remarks[0]
    assert drawer.remarks[0].startswith("was not evaluated, and cannot be here: ")
    assert own.episodes == drawer.episodes == [] and own.demos == 3 and own.steps == 6
    report = xdfast.report([runs["own"], runs["drawer"]], out=runs["own"].path / "r.html")
    assert all(row["success"] is None for row in report.data["robot"]["table"])


def test_demonstrations_that_are_gone_cost_only_their_picture(runs, tmp_path) -> None:
    run = runs["own"]
    moved = RunResult("policy", run.path, {**run.config, "demos": str(tmp_path / "gone")}, run.metrics)
    (record,) = policy_records([moved])
    assert record.stages is None and any("no demonstrations at" in text for text in record.remarks)
    counted = RunResult(
        "policy", run.path, {**run.config, "demos": "10"}, run.metrics
    )  # an expert's, collected nowhere
    (record,) = policy_records([counted])
    assert record.stages is None and any("no picture of the task's stages" in text for text in record.remarks)


def test_names_of_encoders(tmp_path) -> None:
    (tmp_path / "kd-s3" / "student").mkdir(parents=True)
    (tmp_path / "kd-s3" / "config.yaml").write_text("kind: distill\n", encoding="utf-8")
    summary = {"kind": "distill", "metrics": {"steps": 9}, "bad_images": {}}
    (tmp_path / "kd-s3" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (tmp_path / "mine").mkdir()

    def name(model, **settings) -> str:
        return encoder_name(RunResult("policy", tmp_path, {"model": str(model), "encoder": "joint", **settings}, {}))

    assert name("resnet18") == "from scratch"
    assert name("resnet18", encoder="frozen") == "from scratch, frozen"
    assert name("resnet18", model_pretrained=True) == "ImageNet"
    assert name("vit_small_patch14_dinov2.lvd142m", model_pretrained=True) == "DINOv2"
    assert name(tmp_path / "kd-s3") == "distilled (kd)" == name(tmp_path / "kd-s3" / "student")
    assert name(tmp_path / "mine") == "student mine"
    assert name("resnet18@/x/w-s1.safetensors", encoder="frozen") == "weights w, frozen"
    assert name("object:Net") == "module Net"
