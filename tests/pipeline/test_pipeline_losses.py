"""Any losses together, on what each method compares: terms, projectors, options; errors before any work."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file

import xdfast
from xdfast.cli import parse_config
from xdfast.data.store import TeacherStore
from xdfast.models import create_model, pool_tap
from xdfast.nn import AAD, ContrastHeads, HintRegressor, OFAProjector, to_grid
from xdfast.pipeline.config import DistillConfig
from xdfast.pipeline.distill import build_task
from xdfast.pipeline.terms import terms_of, waits_for_ranks

SETTINGS = {
    "teacher": "test_vit",
    "teacher_pretrained": False,
    "teacher_size": 32,
    "teacher_options": {"num_classes": 10},
    "student": "test_resnet",
    "student_size": 32,
    "data": "sklearn:digits",
    "labels_per_class": 4,
    "epochs": 1,
    "batch_size": 10,
    "augment": "none",
    "optimizer": "adamw",
    "lr": 1e-3,
    "log_every": 1,
    "workers": 0,
    "progress": False,
    "device": "cpu",
}
EVERY = "kd+dkd+dist+ofa+rkd+crd+mse+rsd:0.05+rsd-logits+barlow-twins+fitnet"
TAPS = {"layer2": "blocks.1", "layer1": "logits", "layer4": "logits"}


def config(**settings) -> DistillConfig:
    return DistillConfig.from_dict({**SETTINGS, "out": "o", **settings})


def task_of(settings: DistillConfig):
    """The task of a config around small models, with labels of 20 images."""
    modules = tuple(x for x in settings.taps.values() if x != "logits")
    teacher = create_model("test_vit", num_classes=10, image_size=32, frozen=True, taps=modules, pretrained=False)
    student = create_model("test_resnet", num_classes=10, image_size=32, taps=tuple(settings.taps), pretrained=False)
    return build_task(settings, student, teacher, 10, torch.arange(20) % 10), student, teacher


def test_all_losses_together_train_and_leave_a_plain_student(tmp_path) -> None:
    settings = {**SETTINGS, "loss": EVERY, "taps": TAPS, "mixup": 0.5}
    run = xdfast.distill(**settings, out=str(tmp_path / "run"))
    row = next(row for row in run.history if row["kind"] == "train")
    whole = {name.partition(":")[0] for name in EVERY.split("+")} - {"fitnet"}
    at_taps = {f"{name}_at_layer2" for name in ("rkd", "mse", "rsd", "barlow-twins", "fitnet")}
    stages = {"ofa_at_layer1", "ofa_at_layer4"}
    terms = {"ce"} | whole | at_taps | stages
    logged = {key.removeprefix("loss_") for key in row if key.startswith("loss_")}
    assert terms == logged - {"rsd_diagonal", "rsd-logits_diagonal"}
    assert row["loss"] == pytest.approx(sum(row[f"loss_{term}"] for term in terms), rel=1e-4)
    saved = load_file(run.path / "projectors.safetensors")
    projected = {"crd", "mse", "rsd", "barlow-twins"} | (at_taps - {"rkd_at_layer2"}) | stages
    assert {name.partition(".")[0] for name in saved} == projected
    student = timm.create_model(f"local-dir:{run.path / 'student'}", pretrained=True)
    assert {name.split(".")[0] for name in student.state_dict()} == {
        "conv1",
        "bn1",
        "layer1",
        "layer2",
        "layer3",
        "layer4",
        "fc",
    }
    bank = torch.load(run.path / "resume.pt", weights_only=True)["task"]["losses.crd.student_bank"]
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(len(bank)))  # every image was seen once


def test_every_term_is_its_loss_of_what_the_method_compares() -> None:
    settings = config(loss=EVERY, taps=TAPS, tap_weight=0.5, loss_options={"fitnet.grid": 2})
    task, student, teacher = task_of(settings)
    task.eval()
    torch.manual_seed(1)
    images, targets, ids = torch.rand(6, 3, 32, 32), torch.arange(6), torch.arange(6) * 3
    told, taught = teacher(images), task.teacher.targets(images, None)
    torch.manual_seed(2)
    values = task(images, targets, ids, **{f"teacher_{kind}": value for kind, value in taught.items()})
    output, through = student(images), task.projectors
    inside, theirs = output.taps["layer2"], told.taps["blocks.1"]
    mine, his = pool_tap(inside, "a"), pool_tap(theirs, "b")
    logits = (output.logits, told.logits)
    torch.manual_seed(2)
    expected = {
        "kd": xdfast.KDLoss()(*logits),
        "dkd": xdfast.create_loss("dkd")(*logits, targets),
        "dist": xdfast.create_loss("dist")(*logits),
        "ofa": xdfast.create_loss("ofa")(*logits, targets),
        "ofa_at_layer1": 0.5 * xdfast.create_loss("ofa")(through["ofa_at_layer1"](output.taps["layer1"]), told.logits, targets),
        "rkd": xdfast.create_loss("rkd")(output.features, told.features),
        "rkd_at_layer2": 0.5 * xdfast.create_loss("rkd")(mine, his),
        "mse": xdfast.FeatureMSELoss()(through["mse"](output.features), told.features),
        "rsd": xdfast.RSDLoss(weight=0.05)(through["rsd"](output.features), told.features),
        "rsd-logits": xdfast.RSDLoss(weight=0.1)(*logits),
        "rsd_at_layer2": xdfast.RSDLoss(weight=0.025)(through["rsd_at_layer2"](mine), his),
        "fitnet_at_layer2": 0.25
        * (through["fitnet_at_layer2"](inside) - to_grid(theirs, 2, teacher.net.num_prefix_tokens)).square().mean(),
        "crd": task.losses["crd"](*through["crd"](output.features, told.features), ids),
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value.detach(), msg=lambda text, name=name: f"{name}: {text}")
    kinds = {"features": AAD, "ofa_at_layer4": OFAProjector, "fitnet_at_layer2": HintRegressor, "crd": ContrastHeads}
    assert all(isinstance(through[key], kind) for key, kind in kinds.items() if key in through)
    # a rank without rows takes part with every trained weight
    task.train()
    task.eval()
    task(torch.zeros(2, 3, 32, 32), None)["loss"].backward()
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)


def test_options_reach_the_losses_and_weights_the_terms() -> None:
    options = {"dkd.beta": 8, "rsd.reduction": "feature", "kd.temperature": 2.0, "crd.negatives": 5}
    task, *_ = task_of(config(loss="dkd+rsd+kd:0.5+crd+mse", loss_options=options, kappa=0.3, statistics="global"))
    losses = task.losses
    assert (losses["dkd"].beta, losses["dkd"].alpha, losses["kd"].temperature) == (8, 1, 2)
    assert (losses["rsd"].kappa, losses["rsd"].reduction, losses["rsd"].statistics) == (0.3, "feature", "global")
    assert losses["crd"].negatives == 5 and losses["crd"].samples == 20
    assert [losses[name].weight for name in ("dkd", "rsd", "kd", "crd", "mse")] == [1, 0.1, 0.5, 0.8, 1]
    task, *_ = task_of(config(loss="dkd+rsd+kd:0.5", loss_weight=3.0))
    assert [losses.weight for losses in task.losses.values()] == [3, 3, 0.5]


def test_options_on_the_command_line_and_in_a_recipe(tmp_path) -> None:
    flags = ["--teacher", "a", "--student", "b", "--data", "c", "--out", "d"]
    more = ["--loss", "dkd+rsd", "--loss-options", "dkd.beta", "8", "rsd.reduction", "mean", "--statistics", "global"]
    made = parse_config(DistillConfig, flags + more, "distill")
    made.validate()
    assert made.loss_options == {"dkd.beta": 8, "rsd.reduction": "mean"} and made.statistics == "global"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("loss: dkd\nloss_options: {dkd.beta: 0.5}\n", encoding="utf-8")
    made = parse_config(DistillConfig, [f"--recipe={recipe}", *flags], "distill")
    made.validate()
    assert made.options_of("dkd") == {"beta": 0.5}
    made = parse_config(DistillConfig, ["--recipe", "rsd-imagenet-cnn", *flags, "--statistics", "global"], "distill")
    assert made.options_of("rsd")["statistics"] == "global"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dkd", "loss_options": {"dkd.bet": 1}}, "dkd has no option 'bet'.*Did you mean 'beta'"),
        (
            {"loss": "dkd", "loss_options": {"rsd.kappa": 1}},
            r"'rsd\.kappa' must be LOSS\.OPTION of a loss in use \(dkd\)",
        ),
        ({"loss": "dkd", "loss_options": {"beta": 1}}, "'beta' must be LOSS.OPTION"),
        ({"loss": "dkd", "loss_options": {"dkd.beta": -1}}, "beta must be finite and ≥ 0, got -1"),
        ({"loss": "crd", "loss_options": {"crd.samples": 3}}, "crd has no option 'samples'"),
        ({"loss": "rsd", "statistics": "globl"}, "statistics must be one of local, global"),
        ({"loss": "dkdd"}, "unknown 'dkdd'.*Did you mean 'dkd'"),
        ({"teacher_weights": (1.0, 2.0)}, "teacher_weights must name 1 weights"),
        ({"teacher": ["a", "b"], "teacher_weights": (1.0, -1.0)}, "teacher_weights must be finite and ≥ 0"),
        ({"teacher": ["a", "b"], "teacher_size": [1, 2, 3]}, "more_teacher_sizes must name 1 sizes"),
    ],
)
def test_bad_settings_are_named_before_any_work(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings).validate()


@pytest.mark.parametrize(
    ("loss", "taps", "message"),
    [
        ("fitnet+kd", {}, "'fitnet' compares modules inside the networks; name some with taps"),
        ("fitnet", {"layer1": "logits"}, "stages of 'ofa', but loss='fitnet' has none"),
        ("rsd", {"layer1": "logits"}, "stages of 'ofa', but loss='rsd' has none"),
        ("dkd", {"layer1": "blocks.1"}, "compared by feature losses, but loss='dkd' has none"),
        ("crd", {"layer1": "blocks.1"}, "compared by feature losses, but loss='crd' has none"),
    ],
)
def test_taps_that_do_not_fit_the_losses(loss, taps, message) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(config(loss=loss, taps=taps))


def test_the_papers_blocks_at_four_stages() -> None:
    taps = {f"blocks.{n}": "logits" for n in range(4)}
    teacher = create_model("test_resnet", num_classes=10, image_size=32, frozen=True, pretrained=False)
    student = create_model("test_vit2", num_classes=10, image_size=32, taps=tuple(taps), pretrained=False)
    task = build_task(config(loss="ofa", taps=taps), student, teacher, 10)
    assert [len(projector.branch.blocks) for projector in task.projectors.values()] == [3, 2, 1, 1]


def test_swin_n_from_convnext_t_trains_along_what_tests_nn_counts() -> None:
    taps = {f"layers.{n}": "logits" for n in range(4)}
    swin_n = {"embed_dim": 64, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16)}
    name = "swin_tiny_patch4_window7_224"
    student = create_model(name, num_classes=1000, options=swin_n, taps=tuple(taps), pretrained=False)
    teacher = create_model("convnext_tiny", frozen=True, pretrained=False)
    task = build_task(config(loss="ofa+rsd", taps=taps), student, teacher, 1000)
    counts = {key: sum(p.numel() for p in projector.parameters()) for key, projector in task.projectors.items()}
    assert sum(p.numel() for p in student.parameters()) == 9_599_940
    assert counts.pop("rsd") == 1_312_768
    assert sum(counts.values()) == 28_187_040 and len(counts) == 4


def test_maps_and_stages_are_cached_as_well(tmp_path) -> None:
    settings = {
        **SETTINGS, "loss": "fitnet+ofa", "teacher": "test_resnet", "student": "test_vit2", "epochs": 2,
        "taps": {"blocks.2": "layer2", "blocks.0": "logits"}, "loss_options": {"fitnet.grid": 2},
    }  # fmt: skip
    cached = {"cache": str(tmp_path / "store"), "cache_views": 1, "cache_dtype": "float32"}
    first = xdfast.distill(**settings, **cached, out=str(tmp_path / "first"))
    again = xdfast.distill(**settings, **cached, out=str(tmp_path / "again"))
    outputs = TeacherStore.load(tmp_path / "store").layout.outputs
    width = (
        create_model("test_resnet", pretrained=False, taps=("layer2",))(torch.zeros(1, 3, 64, 64))
        .taps["layer2"]
        .shape[1]
    )
    assert outputs == {"logits": 10, "map2:layer2": 4 * width}
    a, b = first.student.state_dict(), again.student.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_which_losses_need_all_ranks_in_every_step() -> None:
    made = {name: xdfast.create_loss(name) for name in ("rsd", "dkd", "rkd", "barlow-twins")}
    assert not any(waits_for_ranks(loss) for loss in made.values())
    assert waits_for_ranks(xdfast.RSDLoss(statistics="global"))
    assert waits_for_ranks(xdfast.BarlowTwinsLoss(gather_distributed=True))
    assert waits_for_ranks(xdfast.create_loss("crd", samples=5))
    assert [term.key for term in terms_of(made, {}, number=2)] == ["rsd_t2", "dkd_t2", "rkd_t2", "barlow-twins_t2"]
