"""``xdfast cache``: what is in the teacher caches, whether it is sound, and filling one before training."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from xdfast import distributed
from xdfast.data.store import StoreCheck, TeacherStore
from xdfast.pipeline.config import DistillConfig
from xdfast.pipeline.journal import ProgressLine
from xdfast.pipeline.precision import autocast
from xdfast.pipeline.teacher import CachedTeacher, cache_root, stores
from xdfast.pipeline.teachers import Teachers

__all__ = ["build_cache", "find_stores", "remove_store", "verify_store"]

log = logging.getLogger("xdfast")


def find_stores(folder: str | Path | None = None) -> list[TeacherStore]:
    """Stores, opened for reading: the one in ``folder``, those under it, or those of ``cache="auto"``.

    Raises:
        FileNotFoundError: ``folder`` holds none.
        ValueError: one is damaged.
    """
    if folder is None:
        return [TeacherStore.load(path) for path in stores()]
    folder = Path(folder).expanduser()
    if (folder / "manifest.json").is_file():
        return [TeacherStore.load(folder)]
    found = list(stores(folder))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no teacher cache; `xdfast cache info` lists those under {cache_root()}"
        )
    return [TeacherStore.load(path) for path in found]


def verify_store(folder: str | Path, *, repair: bool = False, progress: bool = True) -> StoreCheck:
    """Reads every row and checks it against its CRC.

    Args:
        folder: of the store.
        repair: forgets damaged rows, so that the next run computes them again.
        progress: a bar with ETA.

    Raises:
        FileNotFoundError, ValueError: see :meth:`TeacherStore.load`.
    """
    store = TeacherStore.load(folder)
    if repair:
        store.close()
        layout = store.layout
        store = TeacherStore.open(
            folder, store.facts, samples=layout.samples, views=layout.views, outputs=layout.outputs, dtype=layout.dtype
        )
    line = ProgressLine("verify", store.total, enabled=progress)
    with store:
        try:
            return store.verify(lambda done, total: line.update(done, f"of {total:,} rows"), forget=repair)
        finally:
            line.close()


def remove_store(folder: str | Path) -> int:
    """Deletes a store; returns the bytes it took on disk.

    Raises:
        FileNotFoundError, ValueError: the folder is not a store: nothing is deleted.
    """
    folder = Path(folder).expanduser()
    TeacherStore.load(folder).close()
    files = [path for path in folder.iterdir() if path.is_file()]
    size = sum(path.stat().st_blocks * 512 for path in files)
    shutil.rmtree(folder)
    return size


def build_cache(config: DistillConfig | None = None, **settings: Any) -> TeacherStore:
    """Fills the teacher cache that ``distill`` with the same settings would fill while it trains.

    For many students of one teacher, or a machine for the teacher and another for the student. Interrupted, the same call
    continues; under ``torchrun`` the ranks share the rows.

    Args:
        config, settings: as for :func:`xdfast.distill`; ``cache="none"`` stands for ``"auto"``, ``out`` is not needed.

    Returns:
        The store, complete; of several teachers, which fill one each, the first one's.

    Raises:
        ValueError: see :func:`xdfast.distill`.
        StoreFull: no room; what was written is kept.
    """
    from xdfast.pipeline.distill import prepare

    if config is None:
        config = DistillConfig.from_dict({"out": "", **_specs(settings)}, source="build_cache()")
    if config.cache == "none":
        config.cache = "auto"
    config.validate()
    distributed.init()
    objects = {key: settings.get(key) for key in ("teacher", "student", "data", "val_data")}
    parts = prepare(config, monitored=False, **objects)
    teacher = parts.task.teacher
    filled = []
    for member in teacher.members if isinstance(teacher, Teachers) else (teacher,):
        assert isinstance(member, CachedTeacher)
        with autocast(config, distributed.device_for_rank(config.device)):
            done = member.fill()
        store = member.store
        log.info("%s: %d rows computed by this process, %s in all", store.folder, done, f"{store.count:,}")
        filled.append(store)
    for other in filled[1:]:
        other.close()
    return filled[0]


def _specs(settings: dict[str, Any]) -> dict[str, Any]:
    from xdfast.pipeline.train_run import as_spec

    models_and_data = ("teacher", "student", "data", "val_data")

    def spec(value: Any) -> Any:
        return [as_spec(x) for x in value] if isinstance(value, (list, tuple)) else as_spec(value)

    return {k: spec(v) if k in models_and_data and v is not None else v for k, v in settings.items()}
