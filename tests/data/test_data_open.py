"""``open_source``: what the user may write, and the split into train and val."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xdfast.data import ImageSource, SubsetSource, open_source
from xdfast.data._rng import hash64, hash_int, uniform
from xdfast.data.open import keep_per_class, split_indices


class Named(ImageSource):
    """Images that are only names: ``{class: [names]}``."""

    def __init__(self, files: dict[str, list[str]]) -> None:
        self.name, self.classes = "named", sorted(files)
        self.files = [f"{c}/{n}" for c in self.classes for n in files[c]]
        self.labels = np.array([k for k, c in enumerate(self.classes) for _ in files[c]], dtype=np.int64)

    def load(self, i: int) -> Image.Image:
        return Image.new("RGB", (4, 4))

    def path(self, i: int) -> str:
        return self.files[i]


def keys(source: ImageSource) -> list[str]:
    return [source.key(i) for i in range(len(source))]


file_names = st.lists(st.text("abcdé犬", min_size=1, max_size=4), unique=True, min_size=1, max_size=15)
class_files = st.dictionaries(st.sampled_from("pqrs"), file_names, min_size=1)


@settings(max_examples=60, deadline=None)
@given(files=class_files, seed=st.integers(-5, 2**63), fraction=st.floats(0.01, 0.99))
def test_the_parts_are_disjoint_complete_and_stratified(files, seed, fraction):
    source = Named(files)
    if max(map(len, files.values())) < 2:
        with pytest.raises(ValueError, match="the validation part is empty"):
            split_indices(source, "val", seed, fraction)
        return
    train, val = (split_indices(source, s, seed, fraction) for s in ("train", "val"))
    assert sorted([*train, *val]) == list(range(len(source)))
    assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all()
    for label, name in enumerate(source.classes):
        count, held = len(files[name]), int((source.labels[val] == label).sum())
        assert abs(held - count * fraction) <= 1 and held < count and (held >= 1 or count == 1)


@settings(max_examples=60, deadline=None)
@given(files=class_files, seed=st.integers(0, 99), data=st.data())
def test_the_split_depends_on_names_and_seed_only(files, seed, data):
    files = {**files, "z": ["1", "2", "3"]}

    def val(files):
        source = Named(files)
        return {source.key(i) for i in split_indices(source, "val", seed, 0.3)}

    before = val(files)
    assert before == val({c: data.draw(st.permutations(n)) for c, n in files.items()})
    grown = {**files, "z": ["new", *files["z"]]}
    after = val(grown)
    assert {k for k in before if k[0] != "z"} == {k for k in after if k[0] != "z"}  # other classes stay as they are
    assert len((before ^ after) - {"z/new"}) <= 1  # of the class itself one image may change sides
    assert len(val({**files, "y": ["1", "2"]}) ^ before) == 1


def test_seeds_and_purposes_give_other_choices():
    source = Named({"a": [str(i) for i in range(40)]})
    first = split_indices(source, "val", 0, 0.5)
    assert not np.array_equal(first, split_indices(source, "val", 1, 0.5))
    assert not np.array_equal(first, keep_per_class(source, 20, 0))


def test_single_images_stay_in_training_and_are_named(caplog):
    source = Named({"a": ["1"], "b": ["1", "2"]})
    assert keys(SubsetSource(source, split_indices(source, "train", 0, 0.5)))[0] == "a/1"
    split_indices(source, "val", 0, 0.5)
    assert "no validation image of 1 class(es) with a single image: a" in caplog.text


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_fraction_of_none_uses_everything(make_folder, split):
    assert len(open_source(make_folder({"a": 3, "b": 1}), split=split, val_fraction=None)) == 4


def test_labels_per_class_keeps_some_of_each_and_more_adds_to_them(make_folder, caplog):
    root = make_folder({"a": 10, "b": 10, "c": 3})
    few, more = (
        open_source(root, val_fraction=None, labels_per_class=np.int64(n) if n == 2 else n, seed=3) for n in (2, 5)
    )
    assert np.bincount(few.labels).tolist() == [2, 2, 2] and np.bincount(more.labels).tolist() == [5, 5, 3]
    assert set(keys(few)) < set(keys(more)) and "'c' has 3; all of those are kept" in caplog.text
    train = open_source(root, labels_per_class=1)
    val = open_source(root, split="val")
    assert len(train) == 3 and train.part == "train" and not set(keys(train)) & set(keys(val))


@pytest.mark.parametrize("value", [0, -1, True, 2.5, 2.0, "10", "many", float("nan"), [1]])
def test_labels_per_class_must_be_a_count(make_folder, value):
    with pytest.raises(ValueError, match="labels_per_class must be an integer ≥ 1"):
        open_source(make_folder({"a": 2}), labels_per_class=value)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan"), "0.2", True])
def test_val_fraction_must_be_a_fraction(make_folder, value):
    with pytest.raises(ValueError, match="val_fraction must be between 0 and 1"):
        open_source(make_folder({"a": 2}), val_fraction=value)


def test_split_must_be_train_or_val(make_folder):
    with pytest.raises(ValueError, match="split must be 'train' or 'val', got 'test'"):
        open_source(make_folder({"a": 2}), split="test")


def test_a_missing_path_offers_what_lies_near(make_folder, tmp_path, monkeypatch):
    make_folder({"imagenet/a": 1, "cifar/a": 1})
    with pytest.raises(FileNotFoundError, match="there is no 'imagnet' in .*root. Did you mean 'imagenet'?"):
        open_source(tmp_path / "root" / "imagnet")
    with pytest.raises(FileNotFoundError, match="no 'Root' in .* Did you mean 'root'?"):
        open_source(str(tmp_path / "Root" / "imagenet"))
    with pytest.raises(FileNotFoundError, match="It holds 'cifar', 'imagenet'"):
        open_source(tmp_path / "root" / "zzzzzzzz")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="That folder is empty"):
        open_source(tmp_path / "none" / "x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="Did you mean 'root'?"):
        open_source("rot")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data is empty"),
        ("torchvison:CIFAR10", "neither a path nor a known source. Did you mean 'torchvision'?"),
        ("Torchvision:CIFAR10", "Did you mean 'torchvision'?"),
        ("sklern:digits", "Did you mean 'sklearn'?"),
        ("torchvison:CIFAR10?download", "neither a path nor a known source. Did you mean 'torchvision'?"),
        ("unlabeled:/data", "neither a path nor a known source. Did you mean 'unlabelled'?"),
        ("unlabelled:", "needs the folder of the images after the colon"),
        ("https://example.org/x.zip", "neither a path nor a known source. Expected a folder"),
        ("sklearn:digit", "no images called 'digit'. Did you mean 'digits'?"),
    ],
)
def test_misspelt_sources(text, message):
    with pytest.raises(ValueError, match=message):
        open_source(text)


def test_files_that_are_no_archives(tmp_path, make_zip, picture, encoded):
    (tmp_path / "data.bin").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="is a file but not a zip archive, tar or TFRecord file"):
        open_source(tmp_path / "data.bin")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a folder nor a file"):
        open_source(tmp_path / "pipe")
    path = make_zip({f"{c}/1.png": encoded(picture(0)) for c in "ab"}, "no_extension")
    assert len(open_source(path, val_fraction=None)) == 2


def test_what_is_a_folder_of_shards_is_told_by_names(tmp_path, make_folder):
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("0.tar", "README.md", ".hidden"):
        (shards / name).write_bytes(b"")
    with pytest.raises(ValueError, match="0.tar is an empty file"):  # so it was taken for a tar
        open_source(shards)
    (shards / "train-00000-of-00001").write_bytes(b"")
    with pytest.raises(ValueError, match="has tars \\('0.tar'\\) and TFRecords \\('train-00000-of-00001'\\)"):
        open_source(shards)
    with pytest.raises(ValueError, match="matches 'README.md': a pattern may name tars or TFRecord files"):
        open_source(f"{shards}/{{0.tar,README.md}}")
    folder = make_folder({"cat": 2, "dog": 2})
    (folder / "beside.tar").write_bytes(b"")  # class folders stay class folders
    assert open_source(folder, val_fraction=None).classes == ["cat", "dog"]


@pytest.mark.parametrize("name", ["a.tfrecord", "a.TFRecords", "a.tfrec", "train-00000-of-01024", "x.tfrecord-0-of-2"])
def test_tfrecords_are_told_by_names(tmp_path, name):
    (tmp_path / name).write_bytes(b"not one")
    for data in (tmp_path, tmp_path / name, f"{tmp_path}/*"):
        with pytest.raises(ValueError, match="is not a TFRecord file"):
            open_source(data)


def test_unlabelled_takes_every_image_below_a_folder(make_folder, tmp_path):
    root = make_folder({".": 3, "train/x": 4, "val/deep/er": 3, ".hidden": 2})
    (root / "notes.txt").write_text("x")
    source = open_source(f"unlabelled:{root}", val_fraction=None)
    assert source.classes == ["unlabelled"] and source.labels.tolist() == [0] * 10 and source.part is None
    assert keys(source) == sorted(keys(source)) and keys(source)[3] == "train/x/0.png" and keys(source)[0] == "0.png"
    assert source.load(9).size == source.size(0) == (12, 10) and source.path(3) == f"{root}/train/x/0.png"
    assert source.read(0) == (root / "0.png").read_bytes()
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint() and copy.load(5).size == (12, 10)
    train, val = (open_source(f"unlabelled:{root}", split=split) for split in ("train", "val"))
    assert (len(train), len(val)) == (8, 2) and sorted(keys(train) + keys(val)) == keys(source)
    root.rename(tmp_path / "moved")
    assert open_source(f"unlabelled:{tmp_path}/moved", val_fraction=None).fingerprint() == source.fingerprint()


def test_unlabelled_errors(tmp_path, make_zip):
    with pytest.raises(FileNotFoundError, match="there is no 'none' in"):
        open_source(f"unlabelled:{tmp_path}/none")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no images in the folder or below it \(1 other files\)"):
        open_source(f"unlabelled:{tmp_path}/empty")
    with pytest.raises(ValueError, match="data.zip is not a folder; 'unlabelled:' takes a folder of images"):
        open_source(f"unlabelled:{make_zip({'a.png': b'x'})}")


@pytest.mark.parametrize("data", [None, 3, b"path", ["a", "b"], [], ["a.tar", "b.tfrecord"], {"a": 1}, 2.5])
def test_data_of_another_type(data):
    with pytest.raises(TypeError, match="data must be a folder of class folders, a zip archive"):
        open_source(data)


def test_a_part_cannot_serve_as_the_other(make_folder):
    source = open_source(make_folder({"a": 4}), split="train")
    assert open_source(source, split="train") is source
    with pytest.raises(ValueError, match="was opened as the 'train' part and cannot serve as 'val'"):
        open_source(source, split="val")


def test_digits_ship_with_scikit_learn():
    train, val = (open_source("sklearn:digits", split=s) for s in ("train", "val"))
    assert len(train) + len(val) == 1797 and train.classes == [str(i) for i in range(10)]
    assert train.in_memory and train.load(0).size == (8, 8) and train.short_side() == 8
    assert abs(len(val) / 1797 - 0.2) < 0.01 and not set(keys(train)) & set(keys(val))
    assert train.fingerprint() != val.fingerprint() == open_source("sklearn:digits", split="val").fingerprint()


def test_hashes_of_arrays_and_integers_agree_and_mix():
    ids = np.arange(-3, 1000)
    bits = hash64(7, -1, ids)
    assert [int(b) for b in bits[:9]] == [hash_int(7, -1, i) for i in range(-3, 6)]
    assert len(set(bits.tolist())) == len(ids) and hash_int(1, 2) != hash_int(2, 1)
    values = uniform(bits)
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.05
