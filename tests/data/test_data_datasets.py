"""Python objects as images: torch's and torchvision's data sets, and what they may not return."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from xdfast.data import BadImage, DatasetSource, ImageLoader, open_source


class Items(torch.utils.data.Dataset):
    """Returns the given items."""

    def __init__(self, items, **attributes) -> None:
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int):
        return self.items[i]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR10's files on disk, with 40 + 20 images in place of 60000."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("data_batch_1", "test_batch"):
        count = 40 if name == "data_batch_1" else 20
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(count)]}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    cls = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cls, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(cls, "test_list", [["test_batch", None]])
    monkeypatch.setattr(cls, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    return tmp_path / "data"


def test_torchvision_by_name(cifar, monkeypatch):
    train, val = (open_source(f"torchvision:CIFAR10:{cifar}", split=s) for s in ("train", "val"))
    assert (len(train), len(val)) == (40, 20) and train.classes == val.classes and train.classes[6] == "frog"
    assert train.part == "train" and train.in_memory and train.path(3) == "torchvision:CIFAR10[3]"
    np.testing.assert_array_equal(train.load(3), train.dataset.data[3])
    monkeypatch.setenv("XDFAST_DATA", str(cifar))
    assert len(open_source("torchvision:cifar10", labels_per_class=1)) == 10


def test_torchvision_names_and_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="no data set 'CIFAR01'. Did you mean .*'CIFAR10'.* It has: "):
        open_source("torchvision:CIFAR01")
    for name in ("CIFAR10", "Flowers102"):
        with pytest.raises(
            FileNotFoundError, match=rf"torchvision:{name} is not in {tmp_path} .*FOLDER\), or add \?download"
        ):
            open_source(f"torchvision:{name}:{tmp_path}", split="val")
    with pytest.raises(ValueError, match=r"the only option is \?download"):
        open_source("torchvision:CIFAR10?fetch")
    for name in ("emnist", "ImageFolder", "FakeData", "VisionDataset", "Kinetics"):
        with pytest.raises(ValueError, match=r"build torchvision.datasets.\w+\(…\) yourself"):
            open_source(f"torchvision:{name}")


def test_an_image_folder_object_splits_as_the_folder_does(make_folder):
    root = make_folder({"a": 9, "b": 5})
    dataset = torchvision.datasets.ImageFolder(str(root))
    for split in ("train", "val"):
        ours, theirs = open_source(root, split=split), open_source(dataset, split=split)
        assert [ours.key(i) for i in range(len(ours))] == [theirs.key(i) for i in range(len(theirs))]
        assert ours.labels.tolist() == theirs.labels.tolist() and ours.classes == theirs.classes
        np.testing.assert_array_equal(ours.load(1), theirs.load(1))
        assert ours.path(0) == theirs.path(0) and not theirs.in_memory
    part = DatasetSource(torch.utils.data.Subset(dataset, [10, 2]))
    assert part.key(0) == "b/1.png" and part.labels.tolist() == [1, 0] and part.classes == ["a", "b"]


def test_fake_data_has_no_targets_and_is_read_once_for_them():
    dataset = torchvision.datasets.FakeData(12, (3, 8, 8), num_classes=3)
    before = torch.random.get_rng_state()
    source = DatasetSource(dataset)
    assert torch.random.get_rng_state().equal(before)
    assert source.labels.tolist() == [int(dataset[i][1]) for i in range(12)] and source.name == "FakeData"
    np.testing.assert_array_equal(source.load(5), dataset[5][0])


def test_tensors_arrays_and_pictures_give_the_same_pixels(picture):
    image = picture(0)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    source = DatasetSource(Items([(x, 0) for x in (image, array, tensor, tensor.float() / 255, tensor.double() / 255)]))
    for i in range(5):
        np.testing.assert_array_equal(source.load(i), array)
    gray = tensor[:1]
    source = DatasetSource(Items([(x, 0) for x in (gray, gray[0], gray[0].numpy(), image.convert("L"))]))
    assert [source.load(i).mode for i in range(4)] == ["RGB"] * 4
    np.testing.assert_array_equal(source.load(1), np.repeat(gray[0].numpy()[..., None], 3, 2))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(4, 8, 8), TypeError, "expected a tensor"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, "uint8 tensor or a float one"),
        (torch.full((3, 8, 8), 2.0), ValueError, "leave normalisation out"),
        (torch.full((3, 8, 8), float("nan")), ValueError, "must lie in"),
        (np.zeros((8, 8, 4), np.uint8), TypeError, "expected a PIL image"),
        (np.zeros((2, 8, 8, 3), np.uint8), TypeError, "expected a PIL image"),
        (np.zeros((8, 8, 3), np.float32), TypeError, "expected a PIL image"),
        ("a/path.png", TypeError, "got str"),
    ],
)
def test_images_of_another_form(image, error, message):
    with pytest.raises(error, match=message):
        DatasetSource(Items([(image, 0)])).load(0)


@pytest.mark.parametrize(
    "label",
    ["3", None, 1.0, True, np.float32(1.5), torch.tensor(1.5), torch.tensor([1, 2]), torch.tensor(True)],
    ids=repr,
)
def test_labels_must_be_integers(picture, label):
    with pytest.raises(TypeError, match=r"Items\[0\]: a label must be one integer"):
        DatasetSource(Items([(picture(0), label)]))


def test_labels_of_every_integer_kind(picture):
    labels = [0, np.int32(1), torch.tensor(2), torch.tensor([3]), np.uint8(4), np.array(5)]
    assert DatasetSource(Items([(picture(0), v) for v in labels])).labels.tolist() == list(range(6))
    with pytest.raises(ValueError, match=r"Items\[1\]: labels must be ≥ 0, got -1"):
        DatasetSource(Items([(picture(0), 0), (picture(0), -1)]))


def test_known_labels_are_not_read_and_names_are_found(picture):
    items = Items([None, None], targets=[1, 0], classes=["a", ("b", "bee"), 3])
    assert DatasetSource(items).classes == ["a", "b, bee", "3"]
    assert DatasetSource(items, name="toy").path(1) == "toy[1]"
    mapped = Items([(picture(0), 7)], targets=[1], target_transform=lambda y: 7)
    assert DatasetSource(mapped).labels.tolist() == [7]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield 0, 0

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (Stream(), TypeError, "a stream cannot be shuffled"),
        (iter([1]), TypeError, "len\\(\\) and \\[i\\]"),
        (torchvision.datasets.CIFAR10, TypeError, "got the class CIFAR10"),
        (Items([]), ValueError, "Items is empty"),
        (Items([{"image": 1}]), TypeError, r"Items\[0\] must be \(image, label\), got dict"),
        (Items([(1,)]), TypeError, r"must be \(image, label\)"),
        (torch.utils.data.TensorDataset(torch.zeros(2, 3, 4, 4)), TypeError, "must be"),
    ],
)
def test_what_is_no_dataset(data, error, message):
    with pytest.raises(error, match=message):
        open_source(data)


class Lazy(torch.utils.data.Dataset):
    """Opens files and does not read them."""

    def __init__(self, paths, **attributes) -> None:
        self.paths = paths
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int):
        return Image.open(self.paths[i]), 0


def test_a_truncated_file_opened_lazily_is_bad(tmp_path, picture, encoded, monkeypatch):
    data = encoded(picture(0, (64, 64)), "JPEG")
    (tmp_path / "0.jpg").write_bytes(data)
    (tmp_path / "1.jpg").write_bytes(data[:-400])
    (tmp_path / "2.jpg").write_bytes(b"x")
    source = DatasetSource(Lazy([tmp_path / f"{i}.jpg" for i in range(3)], targets=[0, 0, 0]))
    assert source.load(0).size == (64, 64)
    for i in (1, 2):
        with pytest.raises(BadImage, match=rf"Lazy\[{i}\]"):
            source.load(i)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="decompression bomb"):
        source.load(0)
    with pytest.raises(ValueError, match=r"Lazy\[0\]: cannot be read, so its label is not known"):
        DatasetSource(Lazy([tmp_path / "2.jpg"]))


class Noisy(torch.utils.data.TensorDataset):
    """A dataset of the user's with its own random transform."""

    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        return image // 2 + random.randrange(100), label


def test_a_random_dataset_is_seeded_by_epoch_and_sample_and_never_cached():
    dataset = Noisy(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6))
    source = DatasetSource(dataset)
    assert not source.in_memory and DatasetSource(torch.utils.data.TensorDataset(*dataset.tensors)).in_memory

    def images(epoch, workers, batch_size):
        loader = ImageLoader(source, batch_size, 8, train=True, workers=workers)
        rows = {int(i): image for b in loader.epoch(epoch) for i, image in zip(b.ids, b.images)}
        loader.close()
        return torch.stack([rows[i] for i in range(6)])

    first = images(0, 0, 2)
    assert first.equal(images(0, 2, 3)) and not first.equal(images(1, 0, 2)) and first.float().std() > 1
