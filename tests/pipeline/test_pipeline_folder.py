"""Runs that are read from elsewhere than where they began."""

from __future__ import annotations

import json

import yaml

from xdfast.pipeline import load_run


def write_run(folder, **config) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"kind": "distill", **config}))
    (folder / "summary.json").write_text(json.dumps({"kind": "distill", "metrics": {}, "bad_images": {}}))


def test_relative_paths_are_found_from_the_folders_above_the_run(tmp_path, monkeypatch) -> None:
    began, elsewhere = tmp_path / "began", tmp_path / "elsewhere"
    write_run(began / "runs" / "teacher")
    for folder in (began / "photos", began / "resnet18", elsewhere):
        folder.mkdir()
    settings = {"teacher": "runs/teacher", "student": "resnet18", "data": "photos", "val_data": "gone", "demos": "30"}
    write_run(began / "runs" / "deep" / "student", **settings)
    monkeypatch.chdir(began)
    assert load_run("runs/deep/student").config == settings
    monkeypatch.chdir(elsewhere)
    found = load_run(began / "runs" / "deep" / "student").config
    assert found == settings | {"teacher": str(began / "runs" / "teacher"), "data": str(began / "photos")}
    began.rename(tmp_path / "moved")
    found = load_run("../moved/runs/deep/student").config
    assert found["teacher"] == str(tmp_path / "moved" / "runs" / "teacher")
    write_run(elsewhere / "runs" / "teacher")  # what is there from here comes first
    assert load_run("../moved/runs/deep/student").config["teacher"] == "runs/teacher"
