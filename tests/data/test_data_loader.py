"""``ImageLoader``: the same batches whatever the workers, ranks, interruptions and damaged files."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdfast.data import Augment, Batch, ImageLoader, open_source
from xdfast.data.batches import PADDING, EpochPlan
from xdfast.data.loader import choose_workers
from xdfast.data.views import Views
from xdfast.data.worker_death import is_death

STRONG = {
    "rrc": Augment(auto_augment="rand-m9-mstd0.5-inc1"),
    "pad": Augment(train_crop="pad", auto_augment="rand-m9-mstd0.5-inc1"),
    "plain": Augment(train_crop="pad"),
}


@pytest.fixture
def source(make_folder):
    return open_source(make_folder({"a": 9, "b": 8, "c": 6}), val_fraction=None)


def same(a: Batch, b: Batch) -> bool:
    return all(getattr(a, n).equal(getattr(b, n)) for n in ("images", "labels", "ids", "valid")) and a.bad == b.bad


def read(loader: ImageLoader, epoch: int = 0, start: int = 0) -> list[Batch]:
    batches = list(loader.epoch(epoch, start=start))
    loader.close()
    return batches


@pytest.mark.parametrize("kind", STRONG)
def test_workers_and_interruptions_change_nothing(source, kind):
    def loader(workers):
        return ImageLoader(source, 4, 16, train=True, augment=STRONG[kind], seed=3, workers=workers)

    whole = {epoch: read(loader(0), epoch) for epoch in (0, 1)}
    for workers in (1, 2):
        other = loader(workers)  # both epochs by the same processes
        for epoch in (0, 1):
            assert all(map(same, other.epoch(epoch), whole[epoch]))
        other.close()
    for workers, start in ((0, 1), (0, 4), (2, 3), (0, 5)):
        tail = read(loader(workers), 1, start)
        assert len(tail) == 5 - start and all(map(same, tail, whole[1][start:]))
    images = [torch.cat([b.images for b in whole[e]]) for e in (0, 1)]
    ids = [torch.cat([b.ids for b in whole[e]]) for e in (0, 1)]
    assert not ids[0].equal(ids[1]) and not images[0].equal(images[1])
    assert len(ids[0].unique()) == 20  # 23 images: the last, incomplete batch is dropped
    for batch in whole[0]:
        assert (
            batch.images.shape == (4, 3, 16, 16)
            and batch.images.dtype == torch.uint8
            and batch.images.is_contiguous(memory_format=torch.channels_last)
        )
        assert batch.labels.dtype == batch.ids.dtype == torch.int64 and batch.valid.all() and len(batch) == 4
        assert batch.labels.tolist() == source.labels[batch.ids].tolist()


def test_a_view_does_not_depend_on_the_batch_it_is_in(source):
    def views(batch_size, rank, world_size):
        loader = ImageLoader(source, batch_size, 16, True, STRONG["rrc"], rank=rank, world_size=world_size, workers=0)
        return {int(i): image for b in loader.epoch(4) for i, image in zip(b.ids, b.images)}

    alone, shared = views(23, 0, 1), {**views(5, 0, 2), **views(5, 1, 2)}
    assert len(alone) == 23 and len(shared) == 20 and all(alone[i].equal(image) for i, image in shared.items())


def test_the_cache_of_images_in_memory_is_not_seen(monkeypatch):
    digits = open_source("sklearn:digits", labels_per_class=5)

    def epochs(cached):
        monkeypatch.setattr("xdfast.data.reader._CACHE_BYTES", 2**29 if cached else 0)
        loader = ImageLoader(digits, 16, 12, True, STRONG["pad"], workers=0)
        return [b for e in (0, 1, 0) for b in loader.epoch(e)]

    cached, fresh = epochs(True), epochs(False)
    assert all(map(same, cached, fresh)) and all(map(same, cached[:3], cached[6:]))
    kept = ImageLoader(digits, 16, 12, False, workers=0)
    first = read(kept)
    for batch in first:
        batch.images.zero_()  # what is handed out is the caller's
    assert all(b.images.any() for b in read(kept))


def test_evaluation_is_in_order_and_the_same_in_every_epoch(source):
    loader = ImageLoader(source, 4, 16, train=False, workers=0)
    batches = read(loader)
    assert torch.cat([b.ids for b in batches]).tolist() == list(range(23)) and len(batches[-1]) == 3
    assert all(map(same, batches, read(loader, 7)))
    assert all(map(same, batches[2:], read(loader, 0, 2)))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_left_as_found(source, workers):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    read(ImageLoader(source, 4, 16, True, STRONG["rrc"], workers=workers))
    source.short_side()
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    assert before[:2] == after[:2] and before[2].equal(after[2])


# ---- damaged images


@pytest.fixture
def damaged(make_folder):
    """23 images of which one is cut short and one is text; (source, their ids)."""
    root = make_folder({"a": 9, "b": 8, "c": 6})
    whole = (root / "b" / "3.png").read_bytes()
    (root / "b" / "3.png").write_bytes(whole[: len(whole) // 2])
    (root / "c" / "5.png").write_text("no image")
    return open_source(root, val_fraction=None), (12, 22)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_with_another_image(damaged, workers, caplog):
    source, bad = damaged
    loader = ImageLoader(source, 23, 16, True, workers=workers)
    intact = ImageLoader(source, 23, 16, True, workers=0)
    for epoch in (0, 1, 2):
        (batch,) = loader.epoch(epoch)
        slots = intact._plan.order(epoch)
        replaced = batch.ids.numpy() != slots
        assert sorted(slots[replaced]) == list(bad) and batch.valid.all()
        assert not set(batch.ids.tolist()) & set(bad)
        assert batch.labels.tolist() == source.labels[batch.ids].tolist()
        assert batch.images.flatten(1).any(1).all()
        assert same(batch, next(intact.epoch(epoch)))
    assert set(loader.bad) == {source.path(i) for i in bad}
    assert "not an image" in loader.bad[source.path(22)]
    lines = [r.getMessage() for r in caplog.records if "skipped an unreadable image" in r.getMessage()]
    assert len(lines) == 4 and sum(source.path(12) in line for line in lines) == 2  # once for each of the two loaders
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_keeps_the_row(damaged, workers):
    source, bad = damaged
    loader = ImageLoader(source, 8, 16, False, workers=workers)
    batches = read(loader)
    ids, valid, labels = (torch.cat([getattr(b, n) for b in batches]) for n in ("ids", "valid", "labels"))
    assert ids.tolist() == list(range(23)) and labels.tolist() == source.labels.tolist()
    assert (~valid).nonzero().flatten().tolist() == list(bad) and not batches[1].images[4].any()
    assert set(loader.bad) == {source.path(i) for i in bad}


@pytest.mark.parametrize("train", [True, False])
def test_too_many_damaged_images_end_the_run(damaged, train):
    source, bad = damaged
    with pytest.raises(RuntimeError, match="2 of 23 images of .*root cannot be read, more than max_bad=1") as error:
        read(ImageLoader(source, 23, 16, train, max_bad=1, workers=0))
    assert all(source.path(i) in str(error.value) for i in bad)


def test_bad_images_of_an_earlier_part_count_but_are_not_named_again(damaged, caplog):
    source, bad = damaged
    loader = ImageLoader(source, 23, 16, False, workers=0)
    loader.bad.update({source.path(i): "earlier" for i in bad})
    read(loader)
    assert len(loader.bad) == 2 and "skipped" not in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_at_all(make_folder, workers):
    root = make_folder({"a": 2, "b": 1})
    for file in root.rglob("*.png"):
        file.write_bytes(b"x")
    source = open_source(root, val_fraction=None)
    with pytest.raises(RuntimeError, match="none of 3 images drawn to replace it"):
        read(ImageLoader(source, 2, 16, True, workers=workers))
    with pytest.raises(RuntimeError, match="3 of 3 images of .* cannot be read"):
        read(ImageLoader(source, 2, 16, False, workers=workers))
    with pytest.raises(ValueError, match="none of the 3 images looked at can be read"):
        source.short_side()


# ---- ranks


@settings(max_examples=150, deadline=None)
@given(count=st.integers(1, 60), batch=st.integers(1, 9), world=st.integers(1, 7))
def test_ranks_share_every_evaluation_image_once(count, batch, world):
    plans = [EpochPlan(count, batch, False, 0, r, world, None) for r in range(world)]
    parts = [[b.ids for b in plan.batches(5, 0)] for plan in plans]
    assert {len(p) for p in parts} == {plans[0].batches_per_epoch}
    for pieces in zip(*parts):
        assert len({len(p) for p in pieces}) == 1 and 1 <= len(pieces[0]) <= batch
    ids = np.concatenate([i for p in parts for i in p])
    assert sorted(ids[ids != PADDING]) == list(range(count)) and (ids == PADDING).sum() < world


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 60),
    batch=st.integers(1, 9),
    world=st.integers(1, 7),
    epoch=st.integers(0, 9),
    drop=st.booleans(),
)
def test_ranks_train_on_disjoint_images_in_equal_steps(count, batch, world, epoch, drop):
    if count < world:
        with pytest.raises(ValueError, match=f"{count} training images cannot be shared by {world} processes"):
            EpochPlan(count, batch, True, 0, 0, world, drop)
        return
    plans = [EpochPlan(count, batch, True, 1, r, world, drop) for r in range(world)]
    parts = [[b.ids for b in plan.batches(epoch, 0)] for plan in plans]
    assert {len(p) for p in parts} == {plans[0].batches_per_epoch} and len(parts[0]) >= 1
    for pieces in zip(*parts):
        assert len({len(p) for p in pieces}) == 1
    ids = np.concatenate([i for p in parts for i in p])
    assert ids.min() >= 0 and ids.max() < count
    if drop:
        assert len(set(ids.tolist())) == len(ids) > count - batch * world
    else:
        assert set(ids.tolist()) == set(range(count)) and len(ids) - count < world
    for start in range(len(parts[0]) + 1):
        assert all(map(np.array_equal, (b.ids for b in plans[-1].batches(epoch, start)), parts[-1][start:]))


def test_orders_are_permutations_that_differ():
    plan = EpochPlan(50, 5, True, 0, 0, 1, None)
    orders = {tuple(plan.order(e)) for e in range(5)} | {tuple(EpochPlan(50, 5, True, 1, 0, 1, None).order(0))}
    assert len(orders) == 6 and all(sorted(o) == list(range(50)) for o in orders)


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 60), st.integers(1, 9), st.integers(1, 4), st.integers(2, 5), st.integers(0, 9))
def test_repeated_augmentation_shows_new_views_of_fewer_images(count, batch, world, repeats, epoch):
    plans = [EpochPlan(count, batch, True, 1, r, world, False, repeats=repeats) for r in range(world)]
    assert plans[0].batches_per_epoch == EpochPlan(count, batch, True, 1, 0, world, False).batches_per_epoch
    parts = [list(plan.batches(epoch, 0)) for plan in plans]
    shown = []
    for number in range(plans[0].batches_per_epoch):  # dealt like cards: back into one row
        rows = [zip(p[number].ids.tolist(), p[number].views.tolist()) for p in parts]
        shown += [pair for row in zip(*rows) for pair in row]
    shown = shown[:count]  # behind it the last step is filled up
    assert len(set(shown)) == count and len({image for image, _ in shown}) == -(-count // repeats)
    assert {view for _, view in shown} <= set(range(epoch * repeats, (epoch + 1) * repeats))
    first = plans[0].order(epoch)[: -(-count // repeats)]
    assert [image for image, _ in shown] == np.repeat(first, repeats)[:count].tolist()
    for start in range(len(parts[0]) + 1):
        assert all(
            map(np.array_equal, (b.views for b in plans[0].batches(epoch, start)), (b.views for b in parts[0][start:]))
        )


def test_repeats_need_views_of_their_own():
    for other in ({"views": 4}, {"exact": True}):
        with pytest.raises(ValueError, match="repeats=3 shows some images several times"):
            EpochPlan(50, 5, True, 0, 0, 1, None, repeats=3, **other)
    with pytest.raises(ValueError, match="repeats must be an integer ≥ 1"):
        EpochPlan(50, 5, True, 0, 0, 1, None, repeats=0)
    plan = next(EpochPlan(50, 5, False, 0, 0, 1, None, repeats=3).batches(2, 0))  # evaluation knows nothing of it
    assert plan.ids.tolist() == [0, 1, 2, 3, 4] and plan.views.tolist() == [0] * 5


def test_more_ranks_than_evaluation_images(source):
    few = open_source("sklearn:digits", labels_per_class=1)
    for rank in (9, 10, 15):
        (batch,) = read(ImageLoader(few, 4, 8, False, rank=rank, world_size=16, workers=0))
        here = rank < 10
        assert batch.valid.tolist() == [here] and batch.ids.tolist() == [rank if here else -1]
        assert (batch.labels.tolist() == [-100]) != here


def test_a_small_training_set_gives_one_batch_of_all(source):
    loader = ImageLoader(source, 64, 8, True, workers=0)
    (batch,) = read(loader)
    assert sorted(batch.ids.tolist()) == list(range(23)) and loader.batch_size == 23 and loader.batches_per_epoch == 1


# ---- use


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer ≥ 1"),
        ({"batch_size": 2.0}, "batch_size must be"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\)"),
        ({"workers": -1}, "workers must be 'auto' or an integer ≥ 0"),
        ({"workers": "two"}, "workers must be"),
        ({"workers": True}, "workers must be"),
        ({"world_size": 24}, "use at most 23 processes"),
        ({"augment": Augment(auto_augment="rand-nonsense")}, "auto_augment 'rand-nonsense'"),
    ],
)
def test_settings_out_of_range(source, settings, message):
    with pytest.raises(ValueError, match=message):
        ImageLoader(**{"source": source, "batch_size": 4, "image_size": 8, "train": True, **settings})


def test_epochs_out_of_range_are_refused_at_the_call(source):
    loader = ImageLoader(source, 4, 8, True, workers=0)
    with pytest.raises(ValueError, match="epoch must be ≥ 0"):
        loader.epoch(-1)
    for start in (-1, 6):
        with pytest.raises(ValueError, match=r"start must be in \[0, 5\]"):
            loader.epoch(0, start=start)


def test_two_epochs_at_once_need_two_loaders(source):
    loader = ImageLoader(source, 4, 8, True, workers=2)
    first = loader.epoch(0)
    next(first)
    expected = read(ImageLoader(source, 4, 8, True, workers=0), 1)
    assert all(map(same, loader.epoch(1), expected))  # a half-read epoch leaves nothing behind
    with pytest.raises(RuntimeError, match="use a second ImageLoader"):
        next(first)
    loader.close()


def test_close_ends_the_workers_also_within_an_epoch(source):
    loader = ImageLoader(source, 4, 8, True, workers=2)
    batches = loader.epoch(0)
    next(batches)
    processes = list(loader._engine._loader._iterator._workers)
    loader.close()
    assert len(processes) == 2 and not any(p.is_alive() for p in processes)
    with pytest.raises(RuntimeError, match="was closed"):
        next(batches)
    assert len(read(loader)) == 5
    loader.close()


def test_a_killed_worker_is_named_where_its_batch_is_waited_for(source):
    loader = ImageLoader(source, 1, 8, True, workers=2)
    batches = loader.epoch(1, start=2)
    next(batches)
    victim = loader._engine._loader._iterator._workers[1]
    os.kill(victim.pid, signal.SIGKILL)
    time.sleep(0.2)  # within the training step: nothing is raised here
    with pytest.raises(
        RuntimeError, match=rf"a loader process died: worker 1 \(pid {victim.pid}\) by SIGKILL"
    ) as error:
        list(batches)
    text = str(error.value)
    assert "lower workers or batch_size" in text and "continues from its last checkpoint" in text
    number = int(re.search(r"batch (\d+) of epoch 1 that was waited for", text)[1])
    expected = int(loader._plan.order(1)[number])
    assert number > 2 and f"samples {expected}: {source.path(expected)}. " in text
    assert str(error.value.__cause__).startswith("DataLoader worker (pid")
    assert len(read(loader)) == 23  # a new epoch starts new processes


def test_a_worker_that_is_killed_with_torchs_lock_in_its_hands(source):
    loader = ImageLoader(source, 1, 8, True, workers=2)
    batches = loader.epoch(1, start=2)
    next(batches)
    iterator = loader._engine._loader._iterator
    lock = iterator._workers_done_event._event._cond  # which workers take for each batch; nobody will give it back
    lock.acquire()
    os.kill(iterator._workers[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"a loader process died: worker 1 \(pid \d+\) by SIGKILL"):
        list(batches)
    for process in iterator._workers:
        process.join(5)
    assert not any(process.is_alive() for process in iterator._workers)
    assert len(read(loader)) == 23


def test_what_a_dying_worker_breaks_is_taken_for_its_death():
    """A connection breaks before its process counts as ended."""
    processes = [multiprocessing.get_context("fork").Process(target=time.sleep, args=(s,)) for s in (0.2, 60)]
    for process in processes:
        process.start()
    assert is_death(ConnectionResetError(), processes) and processes[0].exitcode == 0
    assert not is_death(ConnectionResetError(), processes[1:])  # a user's data set may raise such things, too
    processes[1].kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_for_everybody_do_not_end_workers(source, number):
    loader = ImageLoader(source, 1, 8, True, workers=2)
    batches = loader.epoch(0)
    next(batches)
    processes = list(loader._engine._loader._iterator._workers)
    for process in processes:
        os.kill(process.pid, number)
    time.sleep(0.2)
    assert len(list(batches)) == 22 and all(process.is_alive() for process in processes)
    loader.close()
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("sleep", [0, 60])
def test_workers_end_with_their_parent_even_if_they_hang(tmp_path, make_folder, sleep):
    run = f"""
import sys, time
from xdfast.data import DatasetSource, ImageLoader, open_source
from xdfast.data.folder import FolderSource

class Slow(FolderSource):
    def load(self, i):
        time.sleep({sleep} * (i > 3))
        return super().load(i)

loader = ImageLoader(Slow(sys.argv[1]), 2, 8, False, workers=2, decoder="pillow")
batches = loader.epoch(0)
next(batches)
print(*(p.pid for p in loader._engine._loader._iterator._workers), flush=True)
"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", run, str(make_folder({"a": 20}))], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2 and time.monotonic() - began < 55
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids) or not Path("/proc").exists()


def test_an_error_within_a_worker_is_not_taken_for_its_death(source):
    loader = ImageLoader(source, 4, 8, True, workers=1)
    loader._engine._loader.dataset.views = None
    with pytest.raises(AttributeError, match="in DataLoader worker process 0"):
        read(loader)
    loader.close()


def test_workers_are_chosen_by_what_there_is_to_do(source, monkeypatch):
    digits = open_source("sklearn:digits")
    small, large = Views(Augment(train_crop="pad"), 8, True, 0), Views(Augment(), 224, True, 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert choose_workers(digits, small, 1) == 0
    assert choose_workers(digits, large, 1) == choose_workers(source, small, 1) == choose_workers(source, large, 2) == 8
    assert choose_workers(source, large, 4) == 4 and choose_workers(source, large, 64) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # 16 machines with 4 ranks each
    assert choose_workers(source, large, 64) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_plans_are_shown_before_their_batches(source, workers):
    loader = ImageLoader(source, 4, 8, train=True, workers=workers)
    shown: list[list[int]] = []
    loader.watch = lambda plan: shown.append(plan.ids.tolist())
    for number, batch in enumerate(loader.epoch(0)):
        assert len(shown) > number and shown[number] == batch.slots.tolist()
    assert len(shown) == loader.batches_per_epoch
    loader.close()


def test_threads_have_a_limit_of_their_own(source, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    large = Views(Augment(), 224, True, 0)
    assert choose_workers(source, large, 1) == 8 and choose_workers(source, large, 1, 32) == 32
