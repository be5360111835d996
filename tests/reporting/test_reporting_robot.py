"""Reports of policies: groups, tables and sentences with figures worked out by hand, and the page."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser

import pytest

from xdfast.reporting import PolicyRecord, RunRecord, build_report
from xdfast.reporting.media import choose_clips
from xdfast.reporting.policy_plots import policy_curves, stages, styles
from xdfast.reporting.policy_tables import averages, baseline_of, by_task, policy_table
from xdfast.reporting.policy_words import differing_settings, findings, remarks

LATENCY = {"batch": 1, "runs": 50, "p50": 40.0, "p95": 50.0, "encode": 20.0, "denoise": 18.0, "steps": 10, "how": "cpu"}
COST = {
    "encoder_macs": 300_000_000, "pictures": 2, "condition_macs": 1_000_000, "step_macs": 8_000_000, "steps": 10,
    "macs": 681_000_000, "encoder_params": 11_000_000, "denoiser_params": 1_000_000,
}  # fmt: skip
STAGES = {
    "silhouette": 0.25, "metric": "Euclidean", "stages": ["approach", "done"], "counts": [4, 4], "labels": [0, 1] * 4,
    "points": [[float(i), float(i % 3)] for i in range(8)], "perplexity": 2.0, "frames": 8, "rule": "progress",
}  # fmt: skip


def record(method="from scratch", seed=0, solved=5, of=10, task="metaworld/drawer-open-v3", **fields) -> PolicyRecord:
    config = {"task": task, "model": "resnet18", "steps": 400, "batch_size": 32, "seed": seed, "encoder": "joint"}
    history = [{"kind": "train", "epoch": 0, "step": 10 * (i + 1), "loss": 1 / (i + 1)} for i in range(5)]
    values = {
        "config": {**config, **fields.pop("config", {})},
        "history": history,
        "model_name": "resnet18",
        "steps": 400,
        "demos": 10,
        "norm": "group",
        "source": f"{method} source",
        "episodes": [{"seed": 100 + i, "success": i < solved, "steps": 50 + i} for i in range(of)],
        "evaluated": {"which": "last", "max_steps": None},
        **fields,
    }
    metrics = {"success": solved / of} if of else {}
    return PolicyRecord(f"{task[-6:]}-{method}-{seed}", method, seed, "policy", metrics, task=task, **values)


def several() -> list[PolicyRecord]:
    """Three seeds each; differences to scratch are 1, 2 and 3 tenths."""
    return [record("from scratch", s, solved=5 - s) for s in range(3)] + [
        record("distilled (kd)", s, solved=6, config={"model": f"runs/kd-s{s}"}) for s in range(3)
    ]


def test_table_by_hand() -> None:
    tasks, notes = by_task(several())
    scratch, distilled = policy_table(tasks)
    assert notes == [] and (scratch["label"], distilled["label"]) == ("from scratch", "distilled (kd)")
    assert scratch["per_run"] == [0.5, 0.4, 0.3] and (scratch["solved"], scratch["episodes"]) == (12, 30)
    assert scratch["success"]["mean"] == pytest.approx(0.4)
    assert scratch["success"]["half_width"] == pytest.approx(
        4.302653 * 0.1 / 3**0.5, rel=1e-6
    )  # Student's t, 2 degrees
    # Wilson at 12 of 30, z = 1.959964: (0.4 + z²/60 ± z sqrt(0.24/30 + z²/3600)) / (1 + z²/30)
    assert scratch["wilson"] == pytest.approx([0.245906, 0.576796], abs=1e-5)
    assert scratch["mean_steps"] == pytest.approx((sum(range(50, 55)) + sum(range(50, 54)) + sum(range(50, 53))) / 12)
    assert (
        scratch["to_scratch"] is None and distilled["scratch"] == "from scratch" and distilled["equal_budget"] is True
    )
    gained = distilled["to_scratch"]
    assert gained["paired"] and gained["n"] == 3 and gained["mean"] == pytest.approx(0.2)
    assert gained["half_width"] == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)


def test_sentences_tell_both_ways_and_when_nothing_is_shown() -> None:
    def told(records):
        tasks, _ = by_task(records)
        return " ".join(findings(policy_table(tasks), averages(tasks)))

    assert (
        "distilled (kd) is 20.0 points above from scratch (95 % interval ± 24.8, 3 seeds, paired, includes zero"
        in told(several())
    )
    worse = [record(seed=s, solved=9) for s in (0, 1)] + [record("ImageNet", s, solved=2) for s in (0, 1)]
    assert "ImageNet is 70.0 points below from scratch (95 % interval ± 0.0, 2 seeds, paired)" in told(worse)
    assert "from scratch is the best of them: 90.0 % ± 0.0 success (2 training seeds, 18 of 20 episodes" in told(worse)
    single = [record(solved=5), record("ImageNet", solved=5)]
    assert "ImageNet is equal to from scratch (one training run each, so this may be chance)" in told(single)


def test_averages_over_tasks_by_hand() -> None:
    records = several() + [
        copy.deepcopy(r) for r in several() if r.seed != 2
    ]  # a second task, in which seed 2 is missing
    for r in records[6:]:
        r.task, r.metrics["success"] = "metaworld/reach-v3", r.metrics["success"] + 0.2
    tasks, _ = by_task(records)
    scratch, distilled = averages(tasks)
    assert scratch["tasks"] == 2 and scratch["n"] == 2
    assert scratch["success"]["mean"] == pytest.approx(((0.5 + 0.7) / 2 + (0.4 + 0.6) / 2) / 2)
    assert distilled["to_scratch"]["mean"] == pytest.approx(0.15) and distilled["equal_budget"] is True
    assert findings(policy_table(tasks), averages(tasks))[0].startswith("Over 2 tasks distilled (kd) has the highest")
    assert averages(by_task(several())[0]) == []


def test_unequal_budgets_and_other_traps_are_told() -> None:
    records = [
        record(),
        record("distilled (kd)", steps=800, demos=20, config={"steps": 800}, of=20, remarks=["x was gone"]),
        record("ImageNet", evaluated={"which": "best", "max_steps": 99}),
    ]
    tasks, _ = by_task(records)
    text = " ".join(remarks(tasks))
    assert "not an equal budget, the training steps differ (from scratch 400, distilled (kd) 800, ImageNet 400)" in text
    assert "the demonstrations differ (from scratch 10, distilled (kd) 20" in text
    assert "not evaluated in the same episodes" in text and "different numbers of steps (99, the task's)" in text
    assert "was evaluated with the policy that did best" in text and "kd)-0: x was gone" in text
    assert "one training run per task" in text
    assert policy_table(tasks)[1]["equal_budget"] is False
    assert differing_settings(tasks)["rows"] == {"steps": ["400", "800", "400"]}


def test_the_baseline_has_the_same_architecture_and_budget_or_is_the_only_one() -> None:
    mine = record("ImageNet", model_name="resnet50", steps=800)
    (task,), _ = by_task([mine, record(), record(model_name="resnet50", config={"steps": 500}, steps=800)])
    assert baseline_of(task.groups[0], task.groups).model_name == "resnet50"
    (task,), _ = by_task([mine, record()])
    assert baseline_of(task.groups[0], task.groups) is task.groups[1]
    (task,), _ = by_task([mine, record(config={"lr": 1}), record(config={"lr": 2})])
    assert baseline_of(task.groups[0], task.groups) is None  # two as near as each other
    assert {g.label for g in task.groups[1:]} == {"from scratch · resnet18 (lr=1)", "from scratch · resnet18 (lr=2)"}


def test_the_same_run_twice_is_no_repetition_and_looking_more_often_is_no_other_method() -> None:
    (task,), notes = by_task([record(), record(), record(seed=1, config={"evaluate_every": 100, "episodes": 50})])
    assert len(task.groups) == 1 and len(task.groups[0].runs) == 2 and "not an independent repetition" in notes[0]


def test_a_run_without_evaluation_stays_in_the_table() -> None:
    (row,) = policy_table(by_task([record(of=0, solved=0, episodes=[])])[0])
    assert row["success"] is None and row["n"] == 0 and row["wilson"] is None


def test_videos_fit_into_their_room_and_missing_files_are_named(tmp_path) -> None:
    records = []
    for method in ("from scratch", "ImageNet"):
        videos = {}
        for name in ("success-100", "success-101", "success-102", "failure-109"):
            videos[name] = tmp_path / f"{method}-{name}.mp4"
            videos[name].write_bytes(b"x" * 100)
        records.append(record(method, videos=videos))
    records[0].videos["failure-108"] = tmp_path / "gone.mp4"
    tasks, _ = by_task(records)
    clips = choose_clips(tasks)
    assert len(clips.shown) == 6 and [clip.name for clip in clips.left_out] == ["success-102"] * 2
    assert len(clips.missing) == 1 and "gone.mp4 is not there any more" in clips.missing[0]
    assert clips.shown[0].words == "seed 100, solved in 50 steps"
    little = choose_clips(tasks, most_bytes=450)  # each group's first success and failure come first
    assert [clip.name for clip in little.shown] == ["success-100", "failure-109"] * 2


def test_pictures() -> None:
    (task,), _ = by_task(several())
    curve = policy_curves(task, styles([task]))
    assert curve is not None and "success" not in curve.alt  # one value at the end would be no curve
    for run in task.groups[0].runs:
        run.history = [*run.history, *({"kind": "val", "step": 20 * i, "success": 0.1 * i} for i in (1, 2))]
    told = policy_curves(task, styles([task]))
    assert told is not None and "success in evaluations during training" in told.alt
    assert "silhouette score 0.250" in stages(STAGES, "s").alt
    assert "none" in stages({**STAGES, "silhouette": None, "rule": "time"}, "s").alt


class Page(HTMLParser):
    """What is in the page, and whether all tags are closed."""

    VOID = frozenset({"meta", "br", "link", "img", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids |= {value for key, value in attrs if key == "id"}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_whole_page(tmp_path) -> None:
    clip, strip = tmp_path / "v.mp4", tmp_path / "s.png"
    clip.write_bytes(b"video")
    strip.write_bytes(b"picture")
    evil = "<script>alert(1)</script>"
    records = several()
    records.append(record(evil, source=evil, remarks=[evil], task="metaworld/drawer-open-v3"))
    records[0].videos, records[0].saliency, records[0].stages = {"success-100": clip}, strip, STAGES
    records[0].latency, records[0].cost = LATENCY, COST
    records[1].saliency = records[-1].saliency = tmp_path / "none.png"
    report = build_report([], [], tmp_path / "page", title=f"{evil} T", policies=records)
    text = report.path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and page.all("script") == [] and "&lt;script&gt;" in text
    assert page.ids >= {"success", "decision", "training", "videos", "saliency", "stages", "settings", "environment"}
    assert "accuracy" not in page.ids and "confusion" not in page.ids
    (video,) = page.all("video")
    assert video["src"] == "data:video/mp4;base64,dmlkZW8=" and {"controls", "muted", "loop", "playsinline"} <= set(
        video
    )
    (image,) = page.all("img")
    assert image["src"] == "data:image/png;base64,cGljdHVyZQ==" and image["alt"]
    anchors = {attrs["href"] for attrs in page.all("a")}
    assert anchors == {f"#{x}" for x in page.ids if f"#{x}" in anchors} and len(anchors) == 8
    for cell in ("40.0 ± 24.8", "+20.0 ± 24.8", "12 of 30 (25 to 58 %)", "2 × 0.3", "10 × 0.008", "0.681", "1.36"):
        assert f"<td>{cell}</td>" in text, cell
    assert json.loads(report.json_path.read_text(encoding="utf-8"), parse_constant=pytest.fail) == report.data
    robot = report.data["robot"]
    assert robot["stages"][0]["silhouette"] == 0.25 and robot["videos"][0]["file"] == str(clip)
    assert any("none.png is not there any more" in remark for remark in robot["remarks"])
    assert len(report.data["runs"]) == 7 and report.data["accuracy"] == []


def test_image_runs_and_policies_share_a_page(tmp_path) -> None:
    image = RunRecord("d", "RSD", 0, "distill", {"top1": 0.8}, config={"data": "digits"}, model_name="resnet18")
    report = build_report([image], [], tmp_path / "page.html", policies=[record()], measure_speed=False)
    page = Page(report.path.read_text(encoding="utf-8"))
    assert page.open == [] and page.ids >= {"success", "accuracy", "settings"}
    assert [run["kind"] for run in report.data["runs"]] == ["distill", "policy"]
    alone = build_report([image], [], tmp_path / "alone.html", measure_speed=False)
    assert "robot" not in alone.data and "success" not in Page(alone.path.read_text(encoding="utf-8")).ids


def test_nothing_to_report(tmp_path) -> None:
    with pytest.raises(ValueError, match="at least one run record"):
        build_report([], [], tmp_path / "page.html", policies=[])
    with pytest.raises(ValueError, match="at least one run record"):
        by_task([])
