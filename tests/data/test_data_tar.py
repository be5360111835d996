"""Images in tars: WebDataset shards and class folders, labels, parts, damage, several processes."""

from __future__ import annotations

import gc
import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from xdfast.data import BadImage, ImageLoader, open_source
from xdfast.data.shard_files import _MAX_OPEN
from xdfast.data.tar import TarSource


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[..., Path]:
    """``make_tar([("000.jpg", bytes), …], "train-0.tar")``; a dict will do as well."""

    def make(members: Sequence[tuple[str, bytes]] | dict[str, bytes], name: str = "data.tar", **options) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
            for member, data in members.items() if isinstance(members, dict) else members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return make


@pytest.fixture
def samples(picture, encoded) -> Callable[..., dict[str, bytes]]:
    """``samples([7, 3])`` → 000000.png, 000000.cls with 7, …; ``label(value)`` makes the label's bytes."""

    def make(labels: Sequence, kind: str = "cls", start: int = 0, label=lambda v: str(v).encode()) -> dict[str, bytes]:
        members: dict[str, bytes] = {}
        for i, value in enumerate(labels, start):
            members[f"{i:06d}.png"] = encoded(picture(i))
            if value is not None:
                members[f"{i:06d}.{kind}"] = label(value)
        return members

    return make


def keys(source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def test_a_shard_gives_pixels_labels_and_names(make_tar, samples, picture, encoded):
    path = make_tar(samples([10, 9, 10, 2]))
    source = open_source(path, val_fraction=None)
    assert isinstance(source, TarSource) and source.classes == ["2", "9", "10"] and source.part is None
    assert source.labels.tolist() == [2, 1, 2, 0] and source.labels.dtype == np.int64
    for i in range(4):
        np.testing.assert_array_equal(source.load(i), picture(i))
    assert source.read(2) == encoded(picture(2)) and source.size(0) == (12, 10)
    assert source.key(1) == "data.tar/000001.png" and source.path(1) == f"{path}:000001.png"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_long_names(make_tar, samples, format):
    long = "é犬" * 30 if format != tarfile.USTAR_FORMAT else "a" * 80
    members = {f"./{long}/{long}/{name}" if format != tarfile.USTAR_FORMAT else f"./{long}/{name}": data
               for name, data in samples([1, 0]).items()}  # fmt: skip
    source = TarSource(make_tar(members, format=format))
    assert source.labels.tolist() == [1, 0] and source.key(0).startswith(f"data.tar/{long}/") and source.load(1)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"label": 4}, "4"), ({"cls": "tench"}, "tench"), ({"class": 0, "caption": "a fish"}, "0"),
        ({"label": None, "cls": 3, "class": 8}, "3"),
    ],
)  # fmt: skip
def test_labels_from_json(make_tar, samples, content, name):
    source = TarSource(make_tar(samples([content], "json", label=lambda v: json.dumps(v).encode())))
    assert source.classes == [name]


def test_cls_comes_before_json_and_json_before_txt(make_tar, samples):
    both = {**samples([5, 6]), **samples([{"label": 1}] * 2, "json", label=lambda v: json.dumps(v).encode())}
    assert TarSource(make_tar(both)).classes == ["5", "6"]
    texts = samples(["x", "x"], "txt")
    assert TarSource(make_tar({**both, **texts}, "b.tar")).classes == ["5", "6"]
    no_cls = {name: data for name, data in {**both, **texts}.items() if not name.endswith(".cls")}
    assert TarSource(make_tar(no_cls, "c.tar")).classes == ["1"]
    captions = samples([{"caption": "x"}] * 2, "json", label=lambda v: json.dumps(v).encode())
    assert TarSource(make_tar({**captions, **texts}, "d.tar")).classes == ["x"]


@pytest.mark.parametrize(
    ("texts", "classes"),
    [
        (["cat\n", "dog", "cat", "dog"], ["cat", "dog"]),
        (["3", "07", "10"], ["3", "7", "10"]),  # integers may all differ
        (["a cat on a mat", "a dog", "a cat", "two dogs"], None),
        (["cat", "cat", "cat", "c" * 65], None),
        (["cat", "cat", "cat\ndog", "cat\ndog"], None),
    ],
)
def test_texts_are_class_names_or_captions(make_tar, samples, texts, classes):
    path = make_tar(samples(texts, "txt"))
    if classes is not None:
        assert TarSource(path).classes == classes
        return
    with pytest.raises(
        ValueError, match=r"no labels for its 4 images: the .txt members are captions .*unlabelled:FOLDER"
    ):
        TarSource(path)


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        (None, None, "no image has a .cls, .json or .txt member beside it"),
        ("cls", "tench", "the .cls members are not integers"),
        ("cls", "1.0", "the .cls members are not integers"),
        ("json", '{"caption": "x"}', "no integer or text under 'label', 'cls' or 'class'"),
        ("json", '{"label": true}', "no integer or text"),
        ("json", '{"label": 1.5, "cls": [1]}', "no integer or text"),
        ("json", "[1", "no integer or text"),
        ("json", '{"label": "\\ud800"}', "no integer or text"),
        ("json", "[" * 100_000, "no integer or text"),
    ],
)
def test_no_labels(make_tar, samples, kind, value, why):
    members = samples([value, value], kind) if kind else samples([None, None])
    with pytest.raises(ValueError, match=f"data.tar: no labels for its 2 images: .*{why}"):
        TarSource(make_tar(members))


def test_samples_without_a_label_and_further_images_are_left_out(make_tar, samples, caplog):
    members = samples([1, None, 0, "x"])
    members["000002.mask.png"] = members["000002.png"]
    source = TarSource(make_tar(members))
    assert keys(source) == ["data.tar/000000.png", "data.tar/000002.png"]
    assert "left out 2 image(s) without a readable .cls label, such as '000001.png'" in caplog.text
    assert "left out 1 image(s) that are not the first of their sample, such as '000002.mask.png'" in caplog.text


def test_the_last_of_two_members_with_one_name_counts(make_tar, samples, picture):
    first, second = samples([1, 2]), samples([3], start=9)
    again = [("000000.png", second["000009.png"]), ("./000000.cls", b"5")]
    source = TarSource(make_tar([*first.items(), *again]))
    assert source.classes == ["2", "5"] and source.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(source.load(0), picture(9))


def test_links_dots_and_hidden_members_are_left_out(make_tar, samples, caplog, tmp_path):
    members = samples([1, 0])
    data = members["000000.png"]
    path = make_tar(
        {**members, "../x.png": data, ".hidden.png": data, "._000001.png": data, "__MACOSX/000001.png": data}
    )
    with tarfile.open(path, "a") as tar:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("pipe.png", tarfile.FIFOTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "000000.png"
            tar.addfile(link)
        folder = tarfile.TarInfo("c.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert len(TarSource(path)) == 2
    assert "left out 1 member(s) with '..' in the name, such as '../x.png'" in caplog.text
    assert "left out 3 member(s) that are links or special files, such as 'a.png'" in caplog.text


# --- Several shards ---


@pytest.fixture
def shards(make_tar, samples) -> Callable[..., Path]:
    """Shards of two samples each in one folder; ``shards(["train-00.tar", …], "folder")``."""

    def make(names: Sequence[str], folder: str = "shards", classes: int = 2) -> Path:
        for k, name in enumerate(names):
            path = make_tar(samples([i % classes for i in (2 * k, 2 * k + 1)], start=2 * k), f"{folder}/{name}")
        return path.parent

    return make


def test_a_folder_a_range_a_wildcard_and_a_list_are_the_same(shards, picture):
    folder = shards([f"s-{k:02d}.tar" for k in (9, 10, 11, 8)])
    (folder / "README.md").write_text("about")
    forms = [folder, f"{folder}/s-{{08..11}}.tar", f"{folder}/s-*.tar", f"{folder}/s-{{08,09,1?}}.tar",
             [f"{folder}/s-10.tar", f"{folder}/s-{{11,08,09}}.tar"]]  # fmt: skip
    prints = set()
    for form in forms:
        source = open_source(form, val_fraction=None)
        assert isinstance(source, TarSource) and len(source) == 8
        prints.add(source.fingerprint())
    assert len(prints) == 1
    assert keys(source)[:2] == ["s-08.tar/000006.png", "s-08.tar/000007.png"]
    np.testing.assert_array_equal(source.load(0), picture(6))


@pytest.mark.parametrize("width", ["{1..10}", "{01..10}", "{001..010}"])
def test_a_range_is_as_wide_as_it_is_written(shards, width):
    digits = len(width.split("..")[1]) - 1 if width[1] == "0" else 0
    folder = shards([f"s{k:0{digits}d}.tar" for k in range(1, 11)])
    assert len(TarSource(f"{folder}/s{width}.tar")) == 20


def test_what_is_missing_is_named(shards, tmp_path):
    folder = shards(["s-0.tar", "s-2.tar"])
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards do not exist: '.*s-1.tar'"):
        open_source(f"{folder}/s-{{0..2}}.tar")
    with pytest.raises(FileNotFoundError, match="there is no 'sharts' in .* Did you mean 'shards'"):
        open_source(f"{tmp_path}/sharts/s-0.tar")
    with pytest.raises(FileNotFoundError, match=r"no file matches '.*/t-\*.tar'"):
        open_source(f"{folder}/t-*.tar")
    with pytest.raises(ValueError, match="means 0 files; a range counts up"):
        open_source(f"{folder}/s-{{1..0}}.tar")
    with pytest.raises(ValueError, match="means 1000000000000 files; .* at most 100000 shards"):
        open_source(f"{folder}/s-{{0..999999}}{{0..999999}}.tar")
    with pytest.raises(ValueError, match=r"the braces in .* mean nothing; write \{0000..0012\}"):
        open_source(f"{folder}/s-{{0-2}}.tar")
    with pytest.raises(ValueError, match="holds no shards"):
        TarSource(tmp_path)
    with pytest.raises(ValueError, match="the list of shards is empty"):
        TarSource([])


def test_braces_in_a_real_name_are_no_pattern(make_tar, samples):
    assert len(TarSource(make_tar(samples([0, 1]), "{0..3}.tar"))) == 2


def test_two_shards_of_one_name_are_refused(shards):
    a, b = shards(["s.tar"], "a"), shards(["s.tar"], "b")
    with pytest.raises(ValueError, match="two shards have the same name: .*a/s.tar and .*b/s.tar"):
        TarSource([a / "s.tar", b / "s.tar"])
    assert len(TarSource([a, a / "s.tar"])) == 2  # the same file twice is one


def test_the_names_of_shards_say_train_and_val(shards, caplog):
    folder = shards(["in1k-train-0.tar", "in1k-train-1.tar", "in1k-validation-0.tar"])
    train, val = (open_source(folder, split=split) for split in ("train", "val"))
    assert (train.part, val.part, len(train), len(val)) == ("train", "val", 4, 2)
    assert train.classes == val.classes == ["0", "1"] and keys(val)[0] == "in1k-validation-0.tar/000004.png"
    (folder / "in1k-validation-0.tar").rename(folder / "other.tar")
    assert open_source(folder, val_fraction=None).part is None
    shards(["val-0.tar"])
    with pytest.raises(ValueError, match="has train and val shards, but the names of '.*other.tar' say neither"):
        open_source(folder)


def test_one_pattern_for_both_parts(shards):
    folder = shards([*(f"train-{k:02d}.tar" for k in range(3)), "val-0.tar", "val-1.tar"])
    sizes = [
        len(open_source(f"{folder}/{{train-{{00..02}},val-{{0,1}}}}.tar", split=split)) for split in ("train", "val")
    ]
    assert sizes == [6, 4]


def test_classes_are_those_of_training(make_tar, samples):
    make_tar(samples([0, 5, 7]), "s/train.tar")
    val = make_tar(samples([7]), "s/val.tar")
    source = open_source(val.parent, split="val")
    assert source.classes == ["0", "5", "7"] and source.labels.tolist() == [2]
    make_tar(samples([6, 7]), "s/val.tar")
    with pytest.raises(ValueError, match="the validation shards have labels that the training shards lack: '6'"):
        open_source(val.parent, split="val")


def test_validation_shards_without_labels(make_tar, samples):
    make_tar(samples([0, 5]), "s/train.tar")
    folder = make_tar(samples([None, None]), "s/test.tar").parent
    assert len(open_source(folder, split="train")) == 2
    with pytest.raises(
        ValueError, match="the validation shards hold no labelled image; .* move those shards elsewhere"
    ):
        open_source(folder, split="val")


def test_moved_shards_have_the_same_split_and_fingerprint(shards, tmp_path):
    folder = shards(["a.tar", "b.tar", "c.tar", "d.tar"])
    before = [open_source(folder, split=split) for split in ("train", "val")]
    shutil.copytree(folder, tmp_path / "else" / "where")
    after = [open_source(tmp_path / "else" / "where", split=split) for split in ("train", "val")]
    for a, b in zip(before, after):
        assert keys(a) == keys(b) and a.fingerprint() == b.fingerprint()
    assert before[0].fingerprint() != before[1].fingerprint()


# --- Class folders in a tar ---


@pytest.fixture
def members(picture, encoded) -> dict[str, bytes]:
    return {f"{c}/{i}.v1.png": encoded(picture(10 * k + i)) for k, c in enumerate(("cat", "dog")) for i in range(3)}


def test_class_folders_split_like_the_unpacked_folder(make_tar, members, tmp_path, picture):
    path = make_tar({f"./wrap/{name}": data for name, data in members.items()})
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "unpacked")
    for split in ("train", "val"):
        packed, unpacked = open_source(path, split=split), open_source(tmp_path / "unpacked", split=split)
        assert isinstance(packed.source, TarSource) and keys(packed) == keys(unpacked)
        assert packed.labels.tolist() == unpacked.labels.tolist() and packed.classes == ["cat", "dog"]
        np.testing.assert_array_equal(packed.load(0), unpacked.load(0))


def test_folders_beside_captions_are_taken_for_classes_with_a_warning(make_tar, members, caplog):
    captions = {name.replace(".v1.png", ".txt"): f"photo of {name}".encode() for name in members}
    assert TarSource(make_tar({**members, **captions})).classes == ["cat", "dog"]
    assert (
        "the .txt members are captions" in caplog.text and "the folders inside are taken for the classes" in caplog.text
    )


def test_train_and_val_inside_a_tar(make_tar, members):
    data = members["cat/0.v1.png"]
    path = make_tar({"train/a/1.png": data, "train/b/1.png": data, "val/a/1.png": data, "val/b/2.png": data})
    source = TarSource(path, split="val")
    assert source.part == "val" and source.classes == ["a", "b"] and keys(source) == ["a/1.png", "b/2.png"]


def test_class_folders_over_train_and_val_tars(make_tar, members):
    data = members["cat/0.v1.png"]
    make_tar({name: data for name in ("a/1.png", "c/1.png")}, "s/train-0.tar")
    make_tar({"b/1.png": data}, "s/train-1.tar")
    folder = make_tar({"c/9.png": data, "a/9.png": data}, "s/val.tar").parent
    train, val = (TarSource(folder, split=split) for split in ("train", "val"))
    assert train.classes == val.classes == ["a", "b", "c"]
    assert val.labels.tolist() == [0, 2] and val.part == "val" and train.labels.tolist() == [0, 1, 2]
    make_tar({"d/9.png": data, "a/9.png": data}, "s/val.tar")
    with pytest.raises(ValueError, match="the training tars have no class 'd'"):
        TarSource(folder, split="val")
    make_tar({"train/a/9.png": data, "val/a/9.png": data}, "s/val.tar")
    with pytest.raises(ValueError, match="both the names of the tars and the folders inside say train and val"):
        TarSource(folder, split="val")


# --- Damage ---


def test_a_truncated_tar_gives_what_is_whole(make_tar, samples, caplog):
    path = make_tar(samples(range(5)))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        last, before = tar.getmember("000004.png"), tar.getmember("000003.png")
    for cut, count, message in (
        (last.offset_data + 100, 4, "data.tar: it ends inside '000004.png' (100 of"),
        (last.offset + 100, 4, "damaged"),
        (before.offset_data + before.size, 3, "left out 1 image(s) without a readable .cls label"),
        (last.offset, 4, "it has no end mark, so members may be missing"),
    ):
        caplog.clear()
        path.write_bytes(whole[:cut])
        source = TarSource(path)
        assert len(source) == count and message in caplog.text and caplog.text.count("copy or download it again") == 1
        assert all(source.load(i) for i in range(count))


def test_a_damaged_header_ends_the_tar_with_a_warning(make_tar, samples, caplog):
    path = make_tar(samples(range(4)))
    with tarfile.open(path) as tar:
        at = tar.getmember("000002.png").offset
    data = bytearray(path.read_bytes())
    data[at : at + 512] = b"\xff" * 512
    path.write_bytes(data)
    assert len(TarSource(path)) == 2 and f"the header at byte {at} is damaged" in caplog.text


@pytest.mark.parametrize(("mode", "tool"), [("w:gz", "gunzip"), ("w:bz2", "bunzip2"), ("w:xz", "unxz")])
@pytest.mark.parametrize("name", ["data.tar", "data.tar.gz"])
def test_compressed_tars_are_refused_with_the_remedy(make_tar, samples, mode, tool, name):
    path = make_tar(samples([0, 1]), f"s/{name}", mode=mode)
    for data in (path, path.parent):
        with pytest.raises(ValueError, match=f"{name} is compressed, .* unpack it with `{tool} {name}`"):
            open_source(data)


def test_empty_tars_and_what_is_no_tar(make_tar, samples, tmp_path, encoded, picture):
    with pytest.raises(ValueError, match="data.tar is an empty tar"):
        open_source(make_tar({}))
    for content, message in ((b"", "is an empty file"), (b"x" * 2000, "is not a readable tar archive")):
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(ValueError, match=f"bad.tar {message}"):
            open_source(tmp_path / "bad.tar")
    with pytest.raises(ValueError, match="no images inside; expected samples such as"):
        open_source(make_tar({"a.txt": b"x"}))


def test_a_damaged_image_is_named_with_shard_and_member(make_tar, samples):
    path = make_tar(samples([0, 1, 0]), "s-0.tar")
    source = TarSource(path)
    data = bytearray(path.read_bytes())
    start = int(source._offset[1])
    data[start : start + 60] = bytes(60)
    path.write_bytes(data)
    with pytest.raises(BadImage, match=r"s-0.tar:000001.png: not an image") as error:
        source.load(1)
    assert str(error.value).count("000001.png") == 1 and source.load(2).size == (12, 10)
    loader = ImageLoader(source, batch_size=3, image_size=8, train=False, workers=0)
    assert [list(batch.bad) for batch in loader.epoch(0)] == [[f"{path}:000001.png"]]


def test_a_shard_that_changed_or_went_is_not_read(make_tar, samples):
    path = make_tar(samples([0, 1]))
    changed, shorter, gone = TarSource(path), TarSource(path), TarSource(path)
    shorter.load(0)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(512))
    with pytest.raises(BadImage, match=r"data.tar:000000.png: the shard has changed since it was indexed"):
        changed.load(0)
    os.truncate(path, int(shorter._offset[1]) + 5)  # behind an open descriptor
    with pytest.raises(BadImage, match=r"data.tar:000001.png: the shard ends inside this image \(5 of"):
        shorter.load(1)
    path.unlink()
    with pytest.raises(BadImage, match=r"data.tar:000000.png: the shard cannot be read \(No such file"):
        gone.load(0)


# --- Processes ---


def _pixels(source: TarSource, i: int, queue) -> None:
    queue.put(np.asarray(source.load(i)))


def test_an_open_source_survives_fork_and_pickling(shards, picture):
    source = TarSource(shards(["a.tar", "b.tar"]))
    source.load(0)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_pixels, args=(source, 3, queue))
    process.start()
    np.testing.assert_array_equal(queue.get(timeout=60), picture(3))
    process.join()
    copy = pickle.loads(pickle.dumps(source))  # what spawn does
    np.testing.assert_array_equal(copy.load(3), picture(3))
    assert copy.fingerprint() == source.fingerprint() and source.load(1)


def test_workers_read_shards_together(shards):
    source = TarSource(shards([f"{k}.tar" for k in range(4)]))
    source.load(0)
    alone, together = (ImageLoader(source, batch_size=3, image_size=8, train=True, workers=w).epoch(0) for w in (0, 2))
    for a, b in zip(alone, together, strict=True):
        assert a.images.equal(b.images) and a.ids.equal(b.ids) and not a.bad


def test_few_descriptors_are_kept_of_many_shards(shards, picture):
    source = TarSource(shards([f"{k:03d}.tar" for k in range(_MAX_OPEN + 5)]))
    gc.collect()  # sources of other tests
    opened_before = len(os.listdir("/dev/fd"))
    for i in [*range(0, len(source), 2), 1]:
        np.testing.assert_array_equal(source.load(i), picture(i))
    assert len(source._files._open) == _MAX_OPEN and len(os.listdir("/dev/fd")) - opened_before == _MAX_OPEN
    del source
    assert len(os.listdir("/dev/fd")) == opened_before


def test_threads_share_few_descriptors(shards, monkeypatch):
    monkeypatch.setattr("xdfast.data.shard_files._MAX_OPEN", 2)
    source = TarSource(shards([f"{k}.tar" for k in range(6)]))
    expected = [source.read(i) for i in range(len(source))]
    with ThreadPoolExecutor(8) as pool:
        order = [i % len(source) for i in range(3000)]
        assert list(pool.map(source.read, order)) == [expected[i] for i in order]


def test_shards_written_by_webdataset(tmp_path, picture):
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(f"file:{tmp_path}/train-%04d.tar", maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"n{i:04d}", "png": picture(i), "cls": i % 3, "json": {"label": 77}})
    source = open_source(f"{tmp_path}/train-{{0000..0002}}.tar", val_fraction=None)
    assert source.classes == ["0", "1", "2"] and source.labels.tolist() == [i % 3 for i in range(10)]
    assert source.key(9) == "train-0002.tar/n0009.png"
    read_by_them = list(wds.WebDataset(f"{tmp_path}/train-{{0000..0002}}.tar", shardshuffle=False).decode("pil"))
    for i, sample in enumerate(read_by_them):
        np.testing.assert_array_equal(source.load(i), sample["png"])
        assert source.labels[i] == sample["cls"]
