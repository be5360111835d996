"""Images in TFRecords: framing and Examples written here by other code, labels, parts, damage, several processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from xdfast.data import BadImage, ImageLoader, open_source
from xdfast.data.tf_example import bytes_range, first_int, masked_crc, parse_example
from xdfast.data.tfrecord import TFRecordSource

# --- A writer of its own: the CRC bit by bit, messages put together from the inside out ---


def masked(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            carry = (crc ^ byte >> bit) & 1
            crc = crc >> 1 ^ (0x82F63B78 if carry else 0)
    crc = ~crc & 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = []
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def chunk(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(value, packed: bool = True) -> bytes:
    if isinstance(value, bytes):
        return chunk(1, chunk(1, value))
    if isinstance(value, float):
        return chunk(2, chunk(1, struct.pack("<f", value)))
    return chunk(3, chunk(1, varint(value)) if packed else varint(1 << 3) + varint(value))


def example(features: dict, packed: bool = True) -> bytes:
    entries = (chunk(1, chunk(1, k.encode()) + chunk(2, feature(v, packed))) for k, v in features.items())
    return chunk(1, b"".join(entries))


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))


@pytest.fixture
def features(picture, encoded) -> Callable[..., dict]:
    def make(i: int, label: int, text: str | None = None, **more) -> dict:
        made = {"image/height": 10, "image/encoded": encoded(picture(i)), "image/class/label": label, "image/x": 0.5}
        return {**made, **({"image/class/text": text.encode()} if text is not None else {}), **more}

    return make


@pytest.fixture
def make_records(tmp_path: Path) -> Callable[..., Path]:
    """``make_records([features, …] or [bytes, …], "train-00000-of-00001")``."""

    def make(examples: Sequence[dict | bytes], name: str = "train-00000-of-00001", packed: bool = True) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = (e if isinstance(e, bytes) else example(e, packed) for e in examples)
        path.write_bytes(b"".join(map(record, data)))
        return path

    return make


def keys(source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def test_the_crc_is_that_of_the_format():
    assert (
        masked(b"123456789") == masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) % 2**32
    )
    rng = np.random.default_rng(0)
    for _ in range(50):
        data = rng.bytes(8)
        assert masked(data) == masked_crc(data)


@pytest.mark.parametrize("packed", [True, False])
def test_records_give_pixels_labels_and_names(make_records, features, picture, encoded, packed):
    path = make_records([features(i, label) for i, label in enumerate((1000, 1, 1000, 20))], packed=packed)
    source = open_source(path, val_fraction=None)
    assert isinstance(source, TFRecordSource) and source.classes == ["1", "20", "1000"] and source.part is None
    assert source.labels.tolist() == [2, 0, 2, 1] and source.labels.dtype == np.int64
    for i in range(4):
        np.testing.assert_array_equal(source.load(i), picture(i))
    assert source.read(2) == encoded(picture(2)) and source.size(0) == (12, 10)
    assert source.key(3) == "train-00000-of-00001/3" and source.path(3) == f"{path}:3"


def test_classes_are_called_by_their_texts(make_records, features, caplog):
    named = [
        features(0, 2, "tench, Tinca tinca"),
        features(1, 135, "crane"),
        features(2, 10, "bird"),
        features(3, 518, "crane"),
    ]
    source = TFRecordSource(make_records(named))
    assert source.classes == ["tench, Tinca tinca", "bird", "crane (135)", "crane (518)"]
    assert source.labels.tolist() == [0, 2, 1, 3]
    for other in (features(4, 10, "fish"), features(4, 7), features(4, 7, "")):  # two texts, none, an empty one
        assert TFRecordSource(make_records([*named, other])).classes[0] == "2"
    assert TFRecordSource(make_records([*named, features(4, 10)])).classes[1] == "bird"


def test_other_names_of_the_features(make_records, encoded, picture):
    records = [
        {"image": encoded(picture(i)), "label": -i, "file_name": f"n{i}.png".encode(), "wnid": b"n%d" % i}
        for i in (0, 1)
    ]
    path = make_records(records)
    with pytest.raises(
        ValueError, match=r"no record has an image 'image/encoded' .* found: 'image', 'label', 'file_name'"
    ):
        open_source(path)
    names = dict(image_key="image", label_key="label", filename_key="file_name")
    source = TFRecordSource(path, **names)
    assert source.classes == ["-1", "0"] and source.path(1) == f"{path}:1 (n1.png)" and source.key(1).endswith("/1")
    assert TFRecordSource(path, **names, text_key="wnid").classes == ["n1", "n0"]
    with pytest.raises(ValueError, match="an integer label 'wnid'"):
        TFRecordSource(path, image_key="image", label_key="wnid")


def test_the_example_of_a_strange_writer():
    inner = chunk(1, b"a") + chunk(2, feature(b"1"))
    unknown = (
        varint(9 << 3) + varint(300) + varint(9 << 3 | 5) + b"abcd" + varint(9 << 3 | 1) + b"abcdefgh" + chunk(9, b"x")
    )
    data = (
        unknown
        + chunk(1, unknown + chunk(1, unknown + inner))
        + chunk(1, chunk(1, chunk(2, feature(-7)) + chunk(1, b"b")))
    )
    found = parse_example(data, 0, len(data))
    start, end = bytes_range(data, found["a"])
    assert data[start:end] == b"1" and first_int(data, found["b"]) == -7
    assert (
        first_int(data, found["a"]) is None and bytes_range(data, found["b"]) is None and first_int(data, None) is None
    )
    assert first_int(chunk(1, b""), found["b"]._replace(start=0, end=2)) is None  # an empty list


def test_a_folder_a_range_a_wildcard_and_a_list_are_the_same(make_records, features):
    names = [f"s/train-{k:05d}-of-00003" for k in range(3)]
    folder = {make_records([features(k, k), features(k + 3, 0)], name).parent for k, name in enumerate(names)}.pop()
    forms = [folder, f"{folder}/train-{{00000..00002}}-of-00003", f"{folder}/train-*-of-00003",
             [f"{folder}/train-{{00002,00000}}-of-00003", f"{folder}/train-00001-of-00003"]]  # fmt: skip
    sources = [open_source(form, val_fraction=None) for form in forms]
    assert {len(source) for source in sources} == {6} and len({source.fingerprint() for source in sources}) == 1
    with pytest.raises(FileNotFoundError, match="1 of 4 shards do not exist: '.*train-00003-of-00003'"):
        open_source(f"{folder}/train-{{00000..00003}}-of-00003")


def test_files_missing_from_a_numbered_set_are_named(make_records, features, caplog):
    folder = make_records([features(0, 1)], "s/train-00000-of-00003").parent
    make_records([features(0, 1)], "s/train-00002-of-00003")
    assert len(open_source(folder, val_fraction=None)) == 2
    assert "1 of the 3 files train-…-of-00003 are missing, such as number 1" in caplog.text


def test_train_and_validation_files_are_the_parts(make_records, features):
    make_records([features(0, 3, "c"), features(1, 1, "a"), features(2, 2, "b")], "s/train-00000-of-00001")
    folder = make_records([features(3, 3, "c")], "s/validation-00000-of-00001").parent
    train, val = (open_source(folder, split=split) for split in ("train", "val"))
    assert (train.part, val.part) == ("train", "val") and train.classes == val.classes == ["a", "b", "c"]
    assert val.labels.tolist() == [2] and keys(val) == ["validation-00000-of-00001/0"]
    make_records([features(3, 4)], "s/validation-00000-of-00001")
    with pytest.raises(ValueError, match="the validation shards have labels that the training shards lack: '4'"):
        open_source(folder, split="val")


def test_moved_files_have_the_same_split_and_fingerprint(make_records, features, tmp_path):
    path = make_records([features(i, i % 2) for i in range(10)], "s/all.tfrecord")
    before = [open_source(path.parent, split=split) for split in ("train", "val")]
    shutil.copytree(path.parent, tmp_path / "moved")
    after = [open_source(tmp_path / "moved", split=split) for split in ("train", "val")]
    for a, b in zip(before, after):
        assert keys(a) == keys(b) and a.fingerprint() == b.fingerprint()
    assert (len(before[0]), len(before[1])) == (8, 2)


# --- Damage ---


def test_a_truncated_file_gives_the_whole_records(make_records, features, caplog):
    path = make_records([features(i, i) for i in range(3)])
    whole = path.read_bytes()
    last = len(whole) - len(record(example(features(2, 2))))
    for cut, message in (
        (len(whole) - 1, "it ends inside record 2"), (last + 20, "it ends inside record 2 (8 of"),
        (last + 5, "it ends inside the length of record 2"),
    ):  # fmt: skip
        caplog.clear()
        path.write_bytes(whole[:cut])
        source = TFRecordSource(path)
        assert len(source) == 2 and source.load(1)
        assert message in caplog.text and "the 2 records before it are used" in caplog.text
        assert caplog.text.count("train-00000-of-00001") == 1


def test_a_damaged_length_is_found_by_its_crc(make_records, features, caplog):
    path = make_records([features(i, i) for i in range(3)])
    at = len(record(example(features(0, 0))))
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert len(TFRecordSource(path)) == 1
    assert f"the length of record 1 (byte {at}) is damaged: its CRC differs" in caplog.text


def test_records_without_image_or_label_are_left_out(make_records, features, caplog):
    no_label = {k: v for k, v in features(1, 1).items() if "label" not in k}
    path = make_records([features(0, 1), no_label, b"\xff" * 40, b"", features(4, 2), chunk(1, b"\x0a\x7fx")])
    source = TFRecordSource(path)
    assert keys(source) == ["train-00000-of-00001/0", "train-00000-of-00001/4"] and source.load(1)
    assert f"left out 4 record(s) without an image or a label, such as {path}:1 (no 'image/class/label')" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.tfrecord is an empty file"),
        (b"\x89PNG and much more text", "is not a TFRecord file .*another format, damaged or cut short"),
        (b"\x1f\x8b\x08 and much more text", "is not a TFRecord file .it is compressed: unpack it with gunzip"),
        (b"x", "is not a TFRecord file .it ends inside the length of record 0"),
        (record(b"no example"), "features found: none that can be parsed: .*a.tfrecord:0"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "a.tfrecord").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "a.tfrecord")


def test_a_damaged_image_is_named_with_file_and_record(make_records, features):
    path = make_records([features(i, i, **{"image/filename": b"n%d.JPEG" % i}) for i in range(3)])
    source = TFRecordSource(path)
    data = bytearray(path.read_bytes())
    start = int(source._offset[1])
    data[start : start + 60] = bytes(60)
    path.write_bytes(data)
    with pytest.raises(BadImage, match=r"train-00000-of-00001:1 \(n1.JPEG\): not an image"):
        source.load(1)
    assert source.load(2).size == (12, 10)
    os.truncate(path, len(data) - 1)
    with pytest.raises(BadImage, match=r":0 \(n0.JPEG\): the shard has changed since it was indexed"):
        TFRecordSource.load(pickle.loads(pickle.dumps(source)), 0)


# --- Processes ---


def _pixels(source: TFRecordSource, i: int, queue) -> None:
    queue.put(np.asarray(source.load(i)))


def test_an_open_source_survives_fork_and_pickling(make_records, features, picture):
    source = TFRecordSource(make_records([features(i, i) for i in range(4)]))
    source.load(0)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_pixels, args=(source, 3, queue))
    process.start()
    np.testing.assert_array_equal(queue.get(timeout=60), picture(3))
    process.join()
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.load(3), picture(3))
    assert copy.fingerprint() == source.fingerprint()


def test_workers_read_files_together(make_records, features):
    paths = [make_records([features(10 * k + i, i) for i in range(3)], f"{k}.tfrecord") for k in range(3)]
    source = TFRecordSource(paths)
    source.load(0)
    alone, together = (ImageLoader(source, batch_size=3, image_size=8, train=True, workers=w).epoch(0) for w in (0, 2))
    for a, b in zip(alone, together, strict=True):
        assert a.images.equal(b.images) and a.ids.equal(b.ids) and not a.bad


def test_records_written_by_the_tfrecord_package(tmp_path, picture, encoded):
    tfrecord = pytest.importorskip("tfrecord")
    path = tmp_path / "theirs.tfrecord"
    writer = tfrecord.TFRecordWriter(str(path))
    for i in range(6):
        image = encoded(picture(i))
        text = b"cat" if i % 2 else b"dog"
        writer.write(
            {
                "image/encoded": (image, "byte"),
                "image/class/label": (i % 2 + 1, "int"),
                "image/class/text": (text, "byte"),
            }
        )
    writer.close()
    source = open_source(path, val_fraction=None)
    assert source.classes == ["dog", "cat"] and source.labels.tolist() == [0, 1] * 3
    for i in range(6):
        np.testing.assert_array_equal(source.load(i), picture(i))
