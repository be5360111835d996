"""Writing a source as class folders, and reading it back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xdfast.data import BadImage, DatasetSource, SubsetSource, open_source, write_image_folder


@pytest.mark.parametrize("format", ["png", "jpg"])
def test_round_trip(tmp_path, format):
    source = SubsetSource(open_source("sklearn:digits", val_fraction=None), np.arange(40))
    folder = write_image_folder(source, tmp_path / "out", format=format)
    again = open_source(folder, val_fraction=None)
    assert again.classes == source.classes and np.bincount(again.labels).tolist() == np.bincount(source.labels).tolist()
    for i in range(len(again)):
        number = int(again.key(i).split("/")[1].removesuffix(f".{format}"))
        assert again.labels[i] == source.labels[number]
        difference = np.asarray(again.load(i)).astype(int) - np.asarray(source.load(number))
        assert abs(difference).max() <= (0 if format == "png" else 16)  # of 255, at quality 95


def toy(classes: list[str]) -> DatasetSource:
    dataset = torch.utils.data.TensorDataset(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
    dataset.classes = classes
    return DatasetSource(dataset)


def test_what_cannot_be_written(tmp_path, make_folder):
    with pytest.raises(ValueError, match="format must be 'png' or 'jpg', got 'gif'"):
        write_image_folder(toy(["a", "b"]), tmp_path / "x", format="gif")
    for name in ("", ".hidden", "../up", "a/b", "nul\0"):
        with pytest.raises(ValueError, match="cannot be a folder name"):
            write_image_folder(toy(["a", name]), tmp_path / "x")
    with pytest.raises(ValueError, match="two classes are called 'crane'"):  # as in ImageNet's list of names
        write_image_folder(toy(["crane", "crane"]), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="root is not empty"):
        write_image_folder(toy(["a", "b"]), make_folder({"a": 1}))


def test_an_unreadable_image_is_named(tmp_path, make_folder):
    root = make_folder({"a": 2})
    (root / "a" / "1.png").write_bytes(b"x")
    with pytest.raises(BadImage, match="a/1.png"):
        write_image_folder(open_source(root, val_fraction=None), tmp_path / "out")
