# SPDX-License-Identifier: MIT
"""Loading: from a directory to tasks, each with VMAs and a flat table of extents, and the open pages images.

Everything is read and checked before the first byte of a page is used, and nothing is written. Where load()
stops at the first problem, verify() hands in a report of its own and goes on; that is why every step gives
its problem to `report` and then goes on with what is left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from lazyd.errors import ImageError
from lazyd.image import chain
from lazyd.image.directory import ImagesDirectory, TaskState, Vma
from lazyd.image.framing import open_image, read_error
from lazyd.image.pagemap import (
    Dialect,
    ExtentTable,
    FlatTable,
    Kind,
    Pagemap,
    decide_dialect,
    find_evidence,
    locate,
    read_pagemap,
    uses_field_5,
)
from lazyd.tuples import NamedTuple

# A row of struct lz_extent names its source in 16 bits.
MAX_SOURCES = 1 << 16

Report = Callable[[ImageError], None]


class PagesImage(NamedTuple):
    """A pages image that some extent needs: open for reading, `size` bytes long."""

    path: Path
    fd: int
    size: int


class TaskImage(NamedTuple):
    """A task. Pids are those of the images: of its innermost pid namespace. A zombie has no memory."""

    pid: int
    ppid: int
    is_zombie: bool
    vmas: list[Vma]
    extents: ExtentTable


class Checkpoint:
    """A loaded checkpoint. It owns the descriptors in `sources` until close()."""

    def __init__(
        self,
        path: Path,
        tasks: list[TaskImage],
        sources: list[PagesImage],
        *,
        dialect: Dialect,
        dialect_reason: str,
        chain_paths: list[Path],
        wide_header: bool,
    ) -> None:
        self.path = path
        self.tasks = tasks
        self.sources = sources
        self.dialect = dialect
        self.dialect_reason = dialect_reason
        self.chain_paths = chain_paths
        self.wide_header = wide_header
        """Field 5 holds page counts: the dumper speaks the 32-byte header to page servers."""

    @property
    def depth(self) -> int:
        """How many directories the chain has; 1 without a parent."""
        return len(self.chain_paths)

    def close(self) -> None:
        """Close the pages images; a second call does nothing."""
        sources, self.sources = self.sources, []
        for source in sources:
            os.close(source.fd)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SharedImages(NamedTuple):
    """What objects of shared memory hold, by their id. `sources` are open until close()."""

    tables: dict[int, ExtentTable]
    sources: list[PagesImage]

    def close(self) -> None:
        """Close the pages images."""
        for source in self.sources:
            os.close(source.fd)


class MemoryImages(NamedTuple):
    """The memory of one task. `sources` are open until close()."""

    extents: ExtentTable
    sources: list[PagesImage]

    def close(self) -> None:
        """Close the pages images."""
        for source in self.sources:
            os.close(source.fd)


class TaskFiles(NamedTuple):
    """A task before its extents are known."""

    pid: int
    ppid: int
    is_zombie: bool
    vmas: list[Vma]


class LevelMap(NamedTuple):
    """One pagemap image of one directory, and what was seen of its pages image (None: there is none)."""

    pagemap: Pagemap
    pages_path: Path
    pages_status: os.stat_result | None

    @property
    def pages_bytes(self) -> int | None:
        """Size of the pages image."""
        return None if self.pages_status is None else self.pages_status.st_size


class Level(NamedTuple):
    """One directory of the chain. Its pagemap images by name; None: it is there, but bad and reported."""

    path: Path
    maps: dict[str, LevelMap | None]


class Flat(NamedTuple):
    """A pagemap name flattened over the chain. `whole` is False where a problem was met (and reported)."""

    table: FlatTable
    whole: bool


def pagemap_name(pid: int) -> str:
    """Return the name of a task's pagemap image."""
    return f"pagemap-{pid}.img"


def shared_name(number: int) -> str:
    """Return the name of the pagemap image of an object of shared memory."""
    return f"pagemap-shmem-{number}.img"


def check_inventory(directory: ImagesDirectory, level: int, report: Report) -> None:
    """Check a directory's version. Ancestors may lack an inventory: old pre-dumps wrote none."""
    try:
        directory.check_inventory()
    except ImageError as error:
        report(error)
    except FileNotFoundError:
        if level == 0:
            report(ImageError(directory.path, "no inventory.img in it: not a directory of CRIU images"))


def read_task(directory: ImagesDirectory, pid: int, ppid: int, report: Report) -> TaskFiles | None:
    """Read a task's VMAs, or make sure that it is a zombie; None after a problem."""
    try:
        try:
            return TaskFiles(pid, ppid, is_zombie=False, vmas=directory.read_mm(pid))
        except FileNotFoundError:
            path = directory.path / f"mm-{pid}.img"
        try:
            core = directory.read_core(pid)
        except FileNotFoundError:
            reason = f"missing, and so is core-{pid}.img, which would say whether the task is a zombie"
            raise ImageError(path, reason) from None
        if core.state not in (TaskState.DEAD, TaskState.ZOMBIE):
            raise ImageError(path, f"missing, and core-{pid}.img does not say that the task is a zombie")
        return TaskFiles(pid, ppid, is_zombie=True, vmas=[])
    except ImageError as error:
        report(error)
        return None


def read_tasks(directory: ImagesDirectory, report: Report) -> list[TaskFiles]:
    """Read the tasks of the youngest directory, parents before children."""
    try:
        entries = directory.read_pstree()
    except ImageError as error:
        report(error)
        return []
    tasks = (read_task(directory, entry.pid, entry.ppid, report) for entry in entries)
    return [task for task in tasks if task is not None]


def read_level_map(directory: ImagesDirectory, name: str) -> LevelMap | None:
    """Decode a pagemap image and look at its pages image; None if the directory has no such pagemap."""
    path = directory.path / name
    try:
        fd = open_image(directory.fd, path)
    except FileNotFoundError:
        return None
    try:
        pagemap = read_pagemap(path, fd)
    finally:
        os.close(fd)
    pages_name = f"pages-{pagemap.pages_id}.img"
    try:
        status = os.stat(pages_name, dir_fd=directory.fd)
    except FileNotFoundError:
        status = None
    except OSError as error:
        raise read_error(directory.path / pages_name, error) from error
    return LevelMap(pagemap, directory.path / pages_name, status)


def read_level(directory: ImagesDirectory, names: list[str], report: Report) -> Level:
    """Decode the named pagemap images of a directory, as far as it has them."""
    maps: dict[str, LevelMap | None] = {}
    for name in names:
        try:
            found = read_level_map(directory, name)
            if found is not None:
                maps[name] = found
        except ImageError as error:
            report(error)
            maps[name] = None
    return Level(directory.path, maps)


def flatten(levels: list[Level], name: str, dialect: Dialect, report: Report) -> Flat:
    """Flatten one pagemap name over the chain, the oldest image first, and free what it was decoded into.

    A directory without the image ends the chain for it: what is older does not show.
    """
    table = FlatTable(dialect)
    whole = True
    for number in range(len(levels) - 1, -1, -1):
        maps = levels[number].maps
        if name not in maps:
            table.clear()
            continue
        level = maps[name]
        if level is None:
            table.clear()
            whole = False
            continue
        try:
            named = table.push(level.pagemap, number, level.pages_path, level.pages_bytes)
            if (level.pages_bytes or 0) > named:
                # Cut at the end of a record, a pagemap looks whole; its pages image gives it away.
                has = f"{level.pages_path.name}, which has {level.pages_bytes}"
                raise ImageError(level.pagemap.path, f"truncated: it names {named} bytes of {has}")
        except ImageError as error:
            report(error)
            table.clear()
            whole = False
        level.pagemap.close()
    return Flat(table, whole)


def report_broken_holes(
    levels: list[Level], name: str, extents: ExtentTable, report: Report, *, whole_chain: bool = True
) -> None:
    """Report every parent hole of the youngest image that no ancestor covers.

    Without the whole chain nothing is known of the holes of its last directory: they are left out.
    """
    index = extents.find(Kind.BROKEN)
    while index < len(extents):
        hole = extents[index]
        index = extents.find(Kind.BROKEN, index + 1)
        if hole.offset + 1 == len(levels) and not whole_chain:
            continue
        level = levels[hole.offset]
        reason = f"broken chain: {hole.pages} pages are in the parent, but "
        if hole.offset + 1 == len(levels):
            reason += f"{level.path} has no parent"
        else:
            parent = levels[hole.offset + 1]
            reason += f"{parent.path} has no " + ("entry there" if name in parent.maps else name)
        path = level.path / name
        report(ImageError(path, reason, offset=locate(path, hole.start), address=hole.start))


class _Sources:
    """The pages images that extents need, numbered as they turn up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.opened: list[PagesImage] = []
        self._numbers: dict[Path, int] = {}

    def number(self, level: LevelMap) -> int:
        """Return the index of a pages image, opening it where it is new."""
        path = level.pages_path
        if path in self._numbers:
            return self._numbers[path]
        if len(self.opened) == MAX_SOURCES:
            raise ImageError(self.path, f"more than {MAX_SOURCES} pages images in use: the most that is supported")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise read_error(path, error) from error
        now, then = os.fstat(fd), level.pages_status
        self.opened.append(PagesImage(path, fd, now.st_size))
        if then is None or (now.st_dev, now.st_ino, now.st_size) != (then.st_dev, then.st_ino, then.st_size):
            raise ImageError(path, "it changed while the images were being read")
        self._numbers[path] = len(self.opened) - 1
        return self._numbers[path]

    def close(self) -> None:
        """Close what was opened."""
        for source in self.opened:
            os.close(source.fd)


def _stop(error: ImageError) -> None:
    raise error


def load(path: Path, dialect: str = "auto") -> Checkpoint:
    """Load a checkpoint, with its chain of parents, or raise ImageError.

    `dialect` is "auto", "booleans" or "flags"; see decide_dialect. The caller closes the checkpoint.
    """
    levels: list[Level] = []
    tasks: list[TaskFiles] = []
    names: list[str] = []
    for directory in chain.walk_chain(path):
        check_inventory(directory, len(levels), _stop)
        if not levels:
            tasks = read_tasks(directory, _stop)
            names = [pagemap_name(task.pid) for task in tasks if not task.is_zombie]
        levels.append(read_level(directory, names, _stop))
    for name in names:
        if name not in levels[0].maps:
            raise ImageError(path / name, "missing, though the task has memory")
    pagemaps = _pagemaps(levels)
    chosen, reason = decide_dialect(pagemaps, dialect, has_parent=len(levels) > 1)
    wide = chosen is Dialect.FLAGS and uses_field_5(pagemaps)
    del pagemaps

    sources = _Sources(path)
    try:
        images = []
        for task in tasks:
            extents = (
                ExtentTable.empty() if task.is_zombie else _extents(levels, pagemap_name(task.pid), chosen, sources)
            )
            images.append(TaskImage(*task, extents))
    except BaseException:
        sources.close()
        raise
    return Checkpoint(
        path,
        images,
        sources.opened,
        dialect=chosen,
        dialect_reason=reason,
        chain_paths=[level.path for level in levels],
        wide_header=wide,
    )


def load_shared(path: Path, ids: Sequence[int], dialect: str = "auto") -> SharedImages:
    """Load the objects of shared memory of a checkpoint, with its chain of parents, or raise ImageError.

    `dialect`: see load(). The caller closes it.
    """
    names = [shared_name(number) for number in ids]
    levels = [read_level(directory, names, _stop) for directory in chain.walk_chain(path)] if ids else []
    for name in names:
        if name not in levels[0].maps:
            raise ImageError(path / name, "missing, though the task has shared memory")
    chosen, _ = decide_dialect(_pagemaps(levels), dialect, has_parent=len(levels) > 1)
    sources = _Sources(path)
    try:
        tables = {number: _extents(levels, shared_name(number), chosen, sources) for number in ids}
    except BaseException:
        sources.close()
        raise
    return SharedImages(tables, sources.opened)


def load_memory(path: Path, pid: int, dialect: str = "auto") -> MemoryImages:
    """Load the memory of one task, with its chain of parents, or raise ImageError. No other image need be there.

    `dialect`: see load(). The caller closes it.
    """
    name = pagemap_name(pid)
    levels = [read_level(directory, [name], _stop) for directory in chain.walk_chain(path)]
    if name not in levels[0].maps:
        raise ImageError(path / name, "missing: nothing is known of this task")
    pagemaps = _pagemaps(levels)
    if dialect == "auto" and find_evidence(pagemaps) is None:
        # What this one does not show, those beside it may: a dump writes all in one dialect.
        names = [entry.name for entry in path.glob("pagemap-[0-9]*.img")]
        pagemaps += _pagemaps([read_level(directory, names, _stop) for directory in chain.walk_chain(path)])
    chosen, _ = decide_dialect(pagemaps, dialect, has_parent=len(levels) > 1)
    del pagemaps
    sources = _Sources(path)
    try:
        return MemoryImages(_extents(levels, name, chosen, sources), sources.opened)
    except BaseException:
        sources.close()
        raise


def _pagemaps(levels: list[Level]) -> list[Pagemap]:
    return [found.pagemap for level in levels for found in level.maps.values() if found is not None]


def _extents(levels: list[Level], name: str, dialect: Dialect, sources: _Sources) -> ExtentTable:
    table = flatten(levels, name, dialect, _stop).table
    numbers: dict[int, int] = {}
    for number in table.used_levels(len(levels)):
        used = levels[number].maps[name]
        assert used is not None, "load stops at the first bad image"
        numbers[number] = sources.number(used)
    extents = table.finish(numbers, len(levels))
    report_broken_holes(levels, name, extents, _stop)
    return extents
