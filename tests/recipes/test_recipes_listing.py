"""What ``xdfast recipes`` says: every recipe, numbers that stand in files, and a page that is up to date."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml
from doc_blocks import parse_only

from xdfast.bench.recipes import gather, page
from xdfast.cli import main, parse_config
from xdfast.pipeline import DistillConfig
from xdfast.recipes import listing, load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[2]

#: Published numbers as the summary of arXiv 2507.21844 gives them: RSD; without a teacher, KD, OFA.
RSD = {
    "rsd-cifar100-swin-t-resnet18": (83.92, 74.01, 78.74, 80.54),
    "rsd-cifar100-vit-s-mobilenetv2": (81.68, 73.68, 72.77, 78.45),
    "rsd-cifar100-convnext-t-deit-t": (82.46, 68.00, 72.99, 75.76),
    "rsd-cifar100-convnext-t-resmlp-s12": (84.21, 66.56, 72.25, 81.22),
    "rsd-imagenet-swin-t-resnet18": (72.13, 69.75, None, 71.85),
    "rsd-imagenet-convnext-t-swin-n": (77.70, 75.53, None, 77.50),
    "rsd-imagenet-convnext-t-resmlp-s12": (78.41, 76.65, None, 77.53),
}


def test_the_table_has_every_recipe_with_its_command(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    for name in recipe_names():
        assert f"--recipe {name} " in text
    assert "top-1 83.92 % (scratch 74.01, KD 78.74, OFA 80.54)" in " ".join(text.replace("│", " ").split())


def test_one_recipe_in_full(capsys) -> None:
    assert main(["recipes", "rsd-imagenet-convnext-t-swin-n"]) == 0
    head, _, settings = capsys.readouterr().out.partition("\n\n")
    assert head.splitlines() == [
        "rsd-imagenet-convnext-t-swin-n: RSD, ImageNet-1k: ConvNeXt-T → Swin-N",
        "extends    rsd-imagenet-vit",
        "published  top-1 77.70 % (scratch 75.53, OFA 77.50); arXiv 2507.21844, main results",
        "ours       –",
        "command    xdfast distill --recipe rsd-imagenet-convnext-t-swin-n --data /data/imagenet "
        "--out runs/rsd-imagenet-convnext-t-swin-n",
    ]
    assert yaml.safe_load(settings) == load_recipe("rsd-imagenet-convnext-t-swin-n").settings


def test_a_file_of_yours_and_an_unknown_name(tmp_path, capsys) -> None:
    (tmp_path / "mine.yaml").write_text("extends: policy-metaworld\nsteps: 5\n", encoding="utf-8")
    assert main(["recipes", str(tmp_path / "mine.yaml")]) == 0
    assert "\nsteps: 5\n" in capsys.readouterr().out
    assert main(["recipes", "policy-metaword"]) == 1
    assert "Did you mean 'policy-metaworld'" in capsys.readouterr().err


def test_json_is_the_same_for_one_and_for_all(capsys) -> None:
    assert main(["recipes", "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in everything] == recipe_names()
    assert main(["recipes", "vla-metaworld", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one == next(row for row in everything if row["name"] == "vla-metaworld")
    assert {figure["value"] for figure in one["ours"]} == {82.0, 72.67, 64.67}


@pytest.mark.parametrize("name", recipe_names())
def test_commands_are_what_the_parser_takes(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    _, *words = shlex.split(recipe.command)
    (tmp_path / "runs" / "vla-metaworld").mkdir(parents=True)
    (tmp_path / "runs" / "vla-metaworld" / "config.yaml").write_text("kind: vla\n", encoding="utf-8")
    config = parse_only(words)
    assert config.out == f"runs/{name}"
    config.validate()


def test_published_numbers() -> None:
    for name in recipe_names():
        if not name.startswith(("rsd-cifar100-", "rsd-imagenet-")) or not load_recipe(name).extends:
            continue
        facts = load_recipe(name).published
        found = tuple(facts.get(key) for key in ("value", "scratch", "kd", "ofa"))
        assert facts["metric"] == "top1" and facts["source"].startswith("arXiv 2507.21844")
        assert found == RSD.get(name, (None, None, None, None)), name


def test_figures_are_those_of_the_committed_runs() -> None:
    assert listing.figures() == gather(ROOT / "bench" / "results")  # if not: make figures
    assert {figure["recipe"] for figure in listing.figures()} <= set(recipe_names())
    assert all((ROOT / figure["file"]).is_file() for figure in listing.figures())


def test_the_page_is_up_to_date() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page(text) == text  # if not: make figures
    assert all(f"`{name}`" in text for name in recipe_names())


def test_a_page_without_its_markers() -> None:
    with pytest.raises(ValueError, match="lacks <!-- recipes -->"):
        page("# Recipes\n")


@pytest.mark.parametrize(
    ("recipe", "file", "runs"),
    [
        ("policy-metaworld", "policy_metaworld.json", None),
        ("vla-metaworld", "actdistill.json", ["vla"]),
        ("actdistill-metaworld", "actdistill.json", ["half"]),
        ("actdistill-metaworld-experts", "actdistill_eighth.json", ["eighth"]),
        ("vla-metaworld-words", "actdistill_words.json", ["vla"]),
        ("actdistill-metaworld-words", "actdistill_words.json", ["words", "words-1", "words-2"]),
    ],
)
def test_our_runs_had_the_recipes_settings(recipe: str, file: str, runs) -> None:
    """A figure stands beside a recipe only if the run's recorded settings are the recipe's."""
    values = json.loads((ROOT / "bench" / "results" / "cpu" / file).read_text(encoding="utf-8"))
    wanted = load_recipe(recipe).settings
    checked = 0
    for run in values["runs"]:
        if runs is None or run["name"] in runs:
            recorded = run.get("settings") or run["config"]
            assert {key: recorded[key] for key in wanted} == wanted, run["name"]
            checked += 1
    assert checked == (9 if runs is None else len(runs))


def test_the_small_x_distill_ran_with_its_recipe() -> None:
    values = json.loads((ROOT / "bench" / "results" / "cpu" / "cifar10_unlabelled.json").read_text(encoding="utf-8"))
    _, _, *flags = shlex.split(values["commands"][1])
    _, _, *short = shlex.split(load_recipe("xdistill-cifar10").command)
    ran = parse_config(DistillConfig, flags, "distill").to_dict()
    assert parse_config(DistillConfig, short, "distill").to_dict() == {**ran, "out": "runs/xdistill-cifar10"}
