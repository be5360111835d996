"""Class folders on disk: which files are images of which class."""

from __future__ import annotations

import os

import numpy as np
import pytest

from xdfast.data import open_source
from xdfast.data.folder import FolderSource


def names(source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def test_classes_are_sorted_and_files_belong_to_them(make_folder):
    source = FolderSource(make_folder({"dog": 2, "cat/deep/er": 1, "cat": 1}))
    assert source.classes == ["cat", "dog"]
    assert names(source) == ["cat/0.png", "cat/deep/er/0.png", "dog/0.png", "dog/1.png"]
    assert source.labels.tolist() == [0, 0, 1, 1] and source.labels.dtype == np.int64
    assert source.part is None and len(source) == 4
    assert source.load(0).size == source.size(0) == (12, 10) and source.load(0).mode == "RGB"
    assert source.path(-1) == str(source.path(3)).replace("dog/0", "dog/1")
    with pytest.raises(IndexError):
        source.path(4)


@pytest.mark.parametrize("train", ["train", "Train", "training"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "test", "Testing"])
def test_parts_are_found_under_their_usual_names(make_folder, train, val):
    root = make_folder({f"{train}/a": 2, f"{train}/b": 1, f"{val}/a": 1, f"{val}/b": 3})
    for split, labels in (("train", [0, 0, 1]), ("val", [0, 1, 1, 1])):
        source = open_source(root, split=split)
        assert source.part == split and source.labels.tolist() == labels and names(source)[0] == "a/0.png"


def test_val_is_preferred_to_test_and_an_unlabelled_test_set_is_not_used(make_folder, picture):
    root = make_folder({"train/a": 4, "val/a": 1, "test/a": 3})
    assert len(open_source(root, split="val")) == 1
    other = make_folder({"train/a": 10, "test": 2}, "other")
    assert len(open_source(other, split="val")) == 2 and len(open_source(other, split="train")) == 8


def test_train_alone_is_split(make_folder):
    root = make_folder({"train/a": 5, "train/b": 5})
    train, val = (open_source(root, split=s, val_fraction=0.4) for s in ("train", "val"))
    assert sorted(names(train) + names(val)) == sorted(f"{c}/{i}.png" for c in "ab" for i in range(5))
    assert len(val) == 4


def test_a_class_called_train_is_a_class(make_folder):
    source = FolderSource(make_folder({"bus": 2, "train": 3}))
    assert source.classes == ["bus", "train"] and source.part is None and len(source) == 5


def test_wrapping_folders_are_stepped_into(make_folder):
    source = FolderSource(make_folder({"download/v1/cat": 2, "download/v1/dog": 1}))
    assert source.classes == ["cat", "dog"] and names(source)[0] == "cat/0.png"


def test_a_wrapping_folder_that_links_to_itself_ends(make_folder):
    root = make_folder({"cat": 1}, "x")
    (root / "cat" / "0.png").unlink()
    (root / "cat").rmdir()
    (root / "again").symlink_to(root)
    with pytest.raises(ValueError, match="no images"):
        FolderSource(root)


def test_hidden_and_system_files_are_no_images(make_folder):
    root = make_folder({"cat": 2, "dog": 1, "__MACOSX/cat": 1, "lost+found": 0, ".cache": 1, "cat/@eaDir": 1})
    (root / "cat" / "._0.png").write_bytes(b"resource fork")
    (root / "cat" / "Thumbs.db").write_bytes(b"x")
    (root / "cat" / "notes.txt").write_text("x")
    (root / "labels.csv").write_text("x")
    assert names(FolderSource(root)) == ["cat/0.png", "cat/1.png", "dog/0.png"]


def test_macos_leftovers_beside_a_wrapping_folder(make_folder):
    assert FolderSource(make_folder({"wrap/cat": 1, "wrap/dog": 1, "__MACOSX/wrap": 1})).classes == ["cat", "dog"]


def test_links_are_followed_but_not_in_a_circle(make_folder):
    root = make_folder({"cat": 2, "dog": 1})
    away = make_folder({"more": 1}, "away")
    (root / "cat" / "more").symlink_to(away / "more")
    (root / "cat" / "itself").symlink_to(root / "cat")
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "loop").symlink_to(root / "cat" / "loop")
    assert names(FolderSource(root)) == ["cat/0.png", "cat/1.png", "cat/more/0.png", "dog/0.png"]


def test_a_broken_link_is_an_unreadable_image_and_a_pipe_is_none(make_folder):
    root = make_folder({"cat": 1})
    (root / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "cat" / "pipe.png")
    source = FolderSource(root)
    assert names(source) == ["cat/0.png", "cat/gone.png"]
    with pytest.raises(RuntimeError, match="gone.png: No such file"):
        source.load(1)


def test_names_of_any_alphabet_and_of_none(make_folder, picture):
    root = make_folder({"кошка": 1, "犬 🐕": 1})
    broken = os.fsdecode(os.fsencode(str(root / "кошка")) + b"/\xff.png")  # not UTF-8
    with open(broken, "wb") as file:
        file.write(b"garbage")
    source = FolderSource(root)
    assert source.classes == ["кошка", "犬 🐕"] and source.load(2).size == (12, 10)
    with pytest.raises(RuntimeError) as error:
        source.load(1)
    str(error.value).encode()  # printable
    assert len(source.fingerprint()) == 64


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"": 0}, "root is empty; expected CLASS/image.jpg"),
        ({"": 3}, "holds 3 images but no class sub-folders"),
        ({"cat": 0, "dog": 0}, "no images in its 2 sub-folders"),
        ({"cat": 1, "dog": 0}, "no images in class folder 'dog'"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "val/c": 1}, "only in train/: 'b'; only in val/: 'c'"),
        ({"train/a": 1, "val": 2}, "val has no class sub-folders"),
        ({"train": 2}, "holds 2 images but no class sub-folders"),
        ({"val/a": 1, "test/a": 1}, "'test', 'val' but no train/"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(make_folder, counts, message):
    with pytest.raises(ValueError, match=message):
        FolderSource(make_folder(counts))


def test_a_class_without_validation_images_is_fine(make_folder, caplog):
    source = FolderSource(make_folder({"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 0}), split="val")
    assert source.classes == ["a", "b"] and source.labels.tolist() == [0] and "no images of class 'b'" in caplog.text


def test_extensions_in_any_case_and_the_found_ones_are_listed(make_folder):
    root = make_folder({"cat": 1})
    (root / "cat" / "0.png").rename(root / "cat" / "0.PNG")
    assert len(FolderSource(root)) == 1
    (root / "cat" / "0.PNG").rename(root / "cat" / "0.npy")
    with pytest.raises(ValueError, match=r"found 1 \.npy"):
        FolderSource(root)


def test_a_folder_that_may_not_be_read(make_folder, monkeypatch):
    root = make_folder({"cat": 1, "dog": 1})
    scandir = os.scandir

    def forbidden(path):  # tests may run as root, who may read everything
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(PermissionError, match="dog may not be read .* give this user read and execute rights"):
        FolderSource(root)


def test_the_fingerprint_follows_names_not_places(make_folder):
    first, second = make_folder({"a": 2, "b": 1}, "one"), make_folder({"a": 2, "b": 1}, "two")
    before = FolderSource(first).fingerprint()
    assert before == FolderSource(second).fingerprint()
    (second / "a" / "1.png").rename(second / "b" / "1.png")
    assert before != FolderSource(second).fingerprint()


def test_probes_for_the_size_come_from_all_classes(make_folder):
    root = make_folder({"a": 20, "b": 0}, size=(8, 8))
    make_folder({"b": 60}, size=(40, 40))
    assert FolderSource(root).short_side() == 40
