"""Files for deployment: what onnxruntime and torch.export make of them is what PyTorch makes; errors that name the reason."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from policy_parts import make_policy
from tolerances import DEPLOY
from torch import Tensor, nn
from vla_parts import make_vla, observation, routed_vla, split_decisions

import xdfast
from xdfast.deploy import ExportError, export_graphs, image_graph, measure_parity
from xdfast.models import create_model, save_student
from xdfast.pipeline.export import export, graphs_of
from xdfast.robot import save_policy
from xdfast.robot.vla import Observation

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(1200)]  # exporters are slow on a busy machine

ort = pytest.importorskip("onnxruntime")


class Small(nn.Module):
    """Convolution, norm, a linear layer: seconds to export."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def small():
    torch.manual_seed(0)
    return create_model(Small(), image_size=16)


def session(file):
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A saved ResNet with class names, exported from its folder."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = create_model("test_resnet", num_classes=3, image_size=32).eval()
    save_student(model, folder / "run" / "student", classes=["cat", "dog", "eel"])
    done = export(folder / "run", out=folder / "out", batches=(1, 3), latency_seconds=0.2, progress=False)
    return model, done


def test_onnxruntime_agrees_with_eager_at_any_batch(classifier) -> None:
    model, done = classifier
    running = session(done.path / "model.onnx")
    assert [i.name for i in running.get_inputs()] == ["images"]
    assert [o.name for o in running.get_outputs()] == ["features", "logits"]
    for batch in (1, 2, 7):  # 2 and 7 are not among those that the export compared
        images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = model(images)
        features, logits = running.run(None, {"images": images.numpy()})
        for found, wanted in ((features, expected.features), (logits, expected.logits)):
            far = np.abs(found - wanted.numpy()).max()
            assert far <= 1e-4  # the promise
            assert far <= DEPLOY * max(1.0, float(wanted.abs().max()))


def test_torch_export_agrees_and_needs_no_xdfast_to_load(classifier) -> None:
    model, done = classifier
    extra = {"xdfast.json": ""}
    module = torch.export.load(done.path / "model.pt2", extra_files=extra).module()
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(module(images)[1], model(images).logits, rtol=DEPLOY, atol=DEPLOY)
    assert json.loads(extra["xdfast.json"])["classes"] == ["cat", "dog", "eel"]


def test_the_record_says_what_a_user_has_to_know(classifier) -> None:
    model, done = classifier
    data = json.loads((done.path / "export.json").read_text(encoding="utf-8"))
    assert data == done.data
    (graph,) = data["graphs"]
    assert graph["classes"] == ["cat", "dog", "eel"] and graph["num_classes"] == 3
    assert graph["preprocessing"]["mean"] == list(model.mean) and graph["preprocessing"]["input_size"] == [3, 32, 32]
    assert graph["inputs"][0]["shape"] == ["batch", 3, 32, 32]
    assert [file["format"] for file in graph["files"]] == ["pt2", "onnx"]
    for file in graph["files"]:
        assert file["bytes"] == (done.path / file["file"]).stat().st_size > 100_000
        assert file["parity"]["agrees"] and file["parity"]["max_abs"] <= 1e-4 and file["parity"]["batches"] == [1, 3]
        assert [row["batch"] for row in file["latency"]] == [1, 3]
        assert all(row["p50_ms"] > 0 and row["rounds"] >= 5 for row in file["latency"])
        assert all(row["low"] <= row["speedup"] <= row["high"] for row in file["latency"])
    assert graph["files"][1]["opset"] >= 18 and "onnxruntime" in graph["files"][1]["runs_by"]
    assert data["packages"]["torch"] == torch.__version__ and len(data["weights"]) == 64
    assert sorted(p.name for p in done.path.iterdir()) == ["export.json", "model.onnx", "model.pt2"]
    import onnx

    onnx.checker.check_model(str(done.path / "model.onnx"))
    inside = {p.key: p.value for p in onnx.load(done.path / "model.onnx").metadata_props}
    assert json.loads(inside["xdfast"])["preprocessing"] == graph["preprocessing"]


def test_the_table_has_a_row_for_every_format_and_batch(classifier, capsys) -> None:
    from rich.console import Console

    Console(width=200).print(classifier[1].table)
    text = capsys.readouterr().out
    assert "max abs error" in text and "onnx" in text and "eager" in text
    assert classifier[1].table.row_count == 6


@pytest.mark.slow
def test_a_whole_decision_in_onnxruntime(tmp_path) -> None:
    policy = make_policy(scheduler="ddpm")
    policy.action_norm.fit(torch.full((4,), -3.0), torch.full((4,), 5.0))
    save_policy(policy, tmp_path / "policy")
    done = xdfast.export(tmp_path, out=tmp_path / "out", batches=(1, 2), latency_seconds=0, progress=False)
    running = session(done.path / "policy.onnx")
    images = torch.randint(0, 256, (3, 1, 1, 24, 24, 3), dtype=torch.uint8)
    state, noise = torch.randn(3, 1, 9), policy.noise(3)
    (found,) = running.run(None, {"images": images.numpy(), "state": state.numpy(), "noise": noise.numpy()})
    expected = policy.act(images, state, noise=noise).numpy()
    assert found.shape == (3, 8, 4)
    assert np.abs(found - expected).max() <= DEPLOY * max(1.0, np.abs(expected).max())


@pytest.mark.slow
def test_the_parts_in_a_loop_of_onnxruntime_are_a_decision(tmp_path) -> None:
    policy = make_policy(scheduler="ddpm", prediction="epsilon")
    policy.action_norm.fit(torch.full((4,), -3.0), torch.full((4,), 5.0))
    done = export(policy, out=tmp_path, formats=["onnx"], parts=True, batches=[2], latency_seconds=0, progress=False)
    encode, step = (session(tmp_path / f"{name}.onnx") for name in ("encode", "step"))
    images = torch.randint(0, 256, (3, 1, 1, 24, 24, 3), dtype=torch.uint8)
    state, noise = torch.randn(3, 1, 9), policy.noise(3)
    (film,) = encode.run(None, {"images": images.numpy(), "state": state.numpy()})
    x = noise[0].numpy()
    for index in range(4):
        feed = {"sample": x, "film": film, "index": np.array([index]), "added_noise": noise[1 + index].numpy()}
        (x,) = step.run(None, feed)
    facts = done.data["graphs"][0]["actions"]
    first, last = facts["rows"]
    actions = (x[:, first:last] - np.float32(facts["offset"])) / np.float32(facts["scale"])
    assert np.abs(actions - policy.act(images, state, noise=noise).numpy()).max() <= 1e-4


@pytest.mark.slow
def test_a_routed_vla_skips_layers_under_conditions(tmp_path) -> None:
    import onnx

    vla = routed_vla(make_vla(layers=3))
    seen = observation(vla, 6)
    split_decisions(vla, Observation(*seen))
    done = export(vla, out=tmp_path, latency_seconds=0, progress=False)
    assert [node.op_type for node in onnx.load(tmp_path / "vla.onnx").graph.node].count("If") >= 1
    assert done.data["graphs"][0]["batch"] == 1
    running, module = session(tmp_path / "vla.onnx"), torch.export.load(tmp_path / "vla.pt2").module()
    decisions = set()
    for row in range(6):
        one = tuple(part[row : row + 1] for part in seen)
        expected = vla.act(*one)
        decisions.add(tuple(vla.layers.decision.gates.flatten().tolist()))
        feed = dict(zip(("images", "state", "instruction"), (part.numpy() for part in one)))
        assert np.abs(running.run(None, feed)[0] - expected.numpy()).max() <= DEPLOY
        torch.testing.assert_close(module(*one)[0], expected, rtol=DEPLOY, atol=DEPLOY)
    assert len(decisions) > 1  # the conditions went both ways


@pytest.mark.slow
def test_a_routed_image_model_of_timm(tmp_path) -> None:
    import timm

    model = xdfast.route(timm.create_model("test_vit", num_classes=3).eval(), 0.6)
    with torch.no_grad():
        model.blocks.router.head.weight.normal_()
    xdfast.save_routed(model, tmp_path / "routed")
    done = export(tmp_path / "routed", out=tmp_path / "out", formats=["onnx"], skip=False, batches=[3], progress=False)
    assert done.data["graphs"][0]["files"][0]["parity"]["max_abs"] <= 1e-4
    assert "all layers are computed" in done.data["graphs"][0]["routing"]


@pytest.mark.slow
def test_aotinductor_agrees_at_any_batch(tmp_path) -> None:
    done = export(small(), out=tmp_path, formats=["aoti"], batches=(1, 3), latency_seconds=0.2, progress=False)
    (file,) = done.data["graphs"][0]["files"]
    assert file["file"] == "model.aoti.pt2" and file["parity"]["max_abs"] <= 1e-4
    from torch._inductor import aoti_load_package

    images = torch.rand(7, 3, 16, 16)
    with torch.no_grad():
        expected = small().eval()(images).logits
    torch.testing.assert_close(
        aoti_load_package(str(done.files["model.aoti.pt2"]))(images)[1], expected, rtol=DEPLOY, atol=DEPLOY
    )


# --- what goes wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": ["onxn"]}, "unknown format 'onxn'; there are pt2, onnx, aoti. Did you mean 'onnx'"),
        ({"formats": []}, "formats must name at least one of pt2, onnx, aoti"),
        ({"tolerance": 0}, "tolerance must be > 0, got 0"),
        ({"batches": []}, "batches must hold at least one size"),
        ({"batches": [0]}, "batches are whole numbers ≥ 1, got 0"),
        ({"latency_seconds": -1}, "latency_seconds must be ≥ 0, got -1"),
        ({"parts": True}, "parts is a setting of a diffusion policy; object:Small is an image model"),
    ],
)
def test_bad_settings(settings, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        export(small(), out=tmp_path / "x", **settings)
    assert not (tmp_path / "x").exists()


def test_settings_of_images_do_not_fit_a_policy() -> None:
    for settings in ({"pixels": "uint8"}, {"outputs": ["logits"]}, {"image_size": 32}):
        with pytest.raises(
            ValueError, match=f"{next(iter(settings))} is a setting of an image model; .* a robot's policy"
        ):
            graphs_of(make_policy(), **settings)


def test_no_model(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no model"):
        export(tmp_path, out=tmp_path / "x")
    with pytest.raises(TypeError, match="an nn.Module, got int"):
        export(3, out=tmp_path / "x")
    with pytest.raises(ValueError, match="unknown model 'resnet19'"):
        export("resnet19", out=tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="out must be a folder"):
        export(small(), out=tmp_path / "file", formats=["pt2"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="torch sees no CUDA device here; use device='cpu'"):
        export(small(), out=tmp_path / "x", formats=["pt2"], device="cuda")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_told_before_any_work(package, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what import then finds is what it finds without the package
    with pytest.raises(ImportError, match=rf'{package} is needed for ONNX files .* pip install "xdfast\[deploy\]"'):
        export(small(), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_aotinductor_without_a_compiler(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(RuntimeError, match=r"AOTInductor \(formats='aoti'\) needs a C\+\+ compiler"):
        export(small(), out=tmp_path / "x", formats=["aoti"])


def test_a_decision_on_values_names_the_line(tmp_path) -> None:
    class Decides(Small):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if y.sum() > 0:  # a value, known at run time alone
                y = y * 2
            return y

    with pytest.raises(ExportError, match="model cannot be exported by torch.export.*if y.sum\\(\\) > 0.*torch.where"):
        export(create_model(Decides(), image_size=16), out=tmp_path, formats=["pt2"], progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_onnx_lacks_is_named(tmp_path) -> None:
    @torch.library.custom_op("xdtest::thing", mutates_args=())
    def thing(x: Tensor) -> Tensor:
        return x.clone()

    thing.register_fake(lambda x: torch.empty_like(x))

    class Uses(Small):
        def forward(self, x: Tensor) -> Tensor:
            return thing(super().forward(x))

    with pytest.raises(
        ExportError, match=r"model cannot be exported by torch.onnx: operator xdtest.thing.*formats='onnx'"
    ):
        export(create_model(Uses(), image_size=16), out=tmp_path, formats=["onnx"], progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_disagrees_is_not_written(tmp_path) -> None:
    (tmp_path / "export.json").write_text("an older one")
    graph = image_graph(small())
    shifted = graph.module.model.net.head

    class Other(nn.Module):
        """What PyTorch would compute with another bias."""

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            features, logits = graph.module(images)
            return features, logits + 1e-3

    from dataclasses import replace

    wrong = replace(graph, eager=Other())
    with pytest.raises(
        ExportError, match=r"model.pt2 does not agree with PyTorch: 0.001 absolute, .* tolerance of 0.0001"
    ):
        export_graphs([wrong], tmp_path, formats=["pt2"], progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["export.json"]
    assert (tmp_path / "export.json").read_text() == "an older one" and shifted.bias is not None


def test_parity_counts_nan_as_far_and_refuses_a_model_of_nan() -> None:
    graph = image_graph(small())
    device = torch.device("cpu")

    def broken(inputs):
        features, logits = graph.run_eager(inputs)
        return features, torch.full_like(logits, float("nan"))

    parity = measure_parity(graph, broken, device, batches=[2], tolerance=1e-4)
    assert not parity.agrees and parity.outputs["logits"] == float("inf") and parity.outputs["features"] == 0
    exact = measure_parity(graph, graph.run_eager, device, batches=[1, 4], tolerance=1e-4)
    assert exact.agrees and exact.max_abs == 0
    with pytest.raises(ExportError, match=r"gives logits \[2\] at batch 2, PyTorch \[2, 3\]"):
        measure_parity(graph, lambda i: (graph.run_eager(i)[0], torch.zeros(2)), device, batches=[2], tolerance=1e-4)
    with torch.no_grad():
        graph.module.model.net.head.bias.fill_(float("nan"))
    with pytest.raises(ExportError, match="model itself gives logits that is not finite"):
        measure_parity(graph, graph.run_eager, device, batches=[2], tolerance=1e-4)


def test_the_command_line(tmp_path, capsys) -> None:
    from xdfast.cli import main

    save_student(create_model("test_resnet", num_classes=2, image_size=32), tmp_path / "student")
    out = str(tmp_path / "out")
    command = [
        "export",
        "--model",
        str(tmp_path),
        "--out",
        out,
        "--formats",
        "pt2",
        "--latency-seconds",
        "0.1",
        "--batches",
        "1",
    ]
    assert main(command) == 0
    told = capsys.readouterr()
    assert "max abs error" in told.out and f"written to {out}" in told.out
    assert "torch.export" in told.err and "writing model.pt2" in told.err  # progress
    assert main(["export", "--model", str(tmp_path), "--out", out, "--formats", "tflite"]) == 1
    assert "unknown format 'tflite'" in capsys.readouterr().err


def test_one_format_may_be_given_as_a_word(tmp_path) -> None:
    """Found by tests/hardening: its letters were taken for formats."""
    done = export(
        small(), out=tmp_path, formats="pt2", outputs="logits", batches=(1,), latency_seconds=0, progress=False
    )
    assert list(done.files) == ["model.pt2"]
    with pytest.raises(ValueError, match="unknown format 'pt3'.*Did you mean 'pt2'"):
        export(small(), out=tmp_path, formats="pt3", progress=False)
