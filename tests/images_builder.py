# SPDX-License-Identifier: MIT
"""Write images directories for tests: made up ones in every dialect, and chains cut out of real dumps.

Everything is written with the protobuf modules, never with the code under test.

- build_checkpoint() writes a directory from a list of Task.
- chain_from_dump() turns one flat real dump into a chain of N directories: every page is in one of them,
  stale copies are in older ones, holes in younger ones, and each level cuts its entries at places of its own.
- booleans_from_dump() rewrites a directory in the booleans dialect, with zero holes.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lazyd.image.pb import core_pb2, inventory_pb2, mm_pb2, pagemap_pb2, pstree_pb2

PAGE = 4096
COMMON = 0x54564319
MAGICS = {
    "inventory": (0x58313116,),
    "pstree": (COMMON, 0x50273030),
    "mm": (COMMON, 0x57492820),
    "pagemap": (COMMON, 0x56084025),
    "core": (COMMON, 0x55053847),
}
DIALECTS = ("booleans", "flags", "flags64")
"""flags64 is the 32-byte era: the page count is in field 5, field 2 is 0."""

PE_PARENT, PE_LAZY, PE_PRESENT = 1, 2, 4
TASK_ALIVE, TASK_DEAD = 1, 2
LAZY_VMA = {"prot": 3, "flags": 0x22, "status": 1 | 1 << 9}


class Entry(NamedTuple):
    """What a pagemap entry says, whatever its dialect. `data` None: a pattern of the address."""

    start: int
    pages: int
    kind: str = "dumped"  # dumped, zero, parent, remote
    lazy: bool = True
    data: bytes | None = None

    @property
    def end(self) -> int:
        return self.start + self.pages * PAGE


class Task(NamedTuple):
    """A task to write. Without `vmas` it gets one lazy VMA for every group of touching entries."""

    pid: int
    entries: Sequence[Entry] = ()
    ppid: int = 0
    zombie: bool = False
    vmas: Sequence[dict] | None = None
    comm: str = "task"
    pages_id: int | None = None


def page_pattern(address: int, salt: int = 0) -> bytes:
    """The bytes of a made up page: different for every address and salt, never zeros."""
    return struct.pack("<QQ", address | 1, salt + 0x9E3779B97F4A7C15) * (PAGE // 16)


def entry_data(entry: Entry, salt: int = 0) -> bytes:
    """The bytes of a dumped entry."""
    if entry.data is not None:
        assert len(entry.data) == entry.pages * PAGE
        return entry.data
    return b"".join(page_pattern(entry.start + i * PAGE, salt) for i in range(entry.pages))


def frame(kind: str, bodies: Iterable[bytes]) -> bytes:
    """An image with its magics and records."""
    pieces = [struct.pack("<I", magic) for magic in MAGICS[kind]]
    for body in bodies:
        pieces += (struct.pack("<I", len(body)), body)
    return b"".join(pieces)


def unframe(content: bytes, kind: str) -> list[bytes]:
    """The records of an image."""
    at = 4 * len(MAGICS[kind])
    bodies = []
    while at < len(content):
        (length,) = struct.unpack_from("<I", content, at)
        bodies.append(content[at + 4 : at + 4 + length])
        at += 4 + length
    return bodies


def pagemap_entry(entry: Entry, dialect: str) -> pagemap_pb2.PagemapEntry:
    """The message for an entry in a dialect."""
    wide = dialect == "flags64"
    message = pagemap_pb2.PagemapEntry(vaddr=entry.start, nr_pages=0 if wide else entry.pages)
    if dialect == "booleans":
        if entry.kind == "parent":
            message.in_parent = True
        elif entry.kind == "zero":
            message.zero_or_flags = 1
        elif entry.kind == "remote":
            message.lazy_or_nr_pages = 1
        return message
    flags = {"dumped": PE_PRESENT, "parent": PE_PARENT, "zero": 0, "remote": PE_LAZY}[entry.kind]
    message.zero_or_flags = flags | (PE_LAZY if entry.lazy and entry.kind in ("dumped", "parent") else 0)
    if wide:
        message.lazy_or_nr_pages = entry.pages
    return message


def pagemap_image(entries: Iterable[Entry], dialect: str, pages_id: int = 1) -> bytes:
    """A whole pagemap image."""
    head = pagemap_pb2.PagemapHead(pages_id=pages_id).SerializeToString()
    bodies = [pagemap_entry(entry, dialect).SerializeToString() for entry in entries]
    return frame("pagemap", [head, *bodies])


def write_pages(path: Path, entries: Iterable[Entry], salt: int = 0) -> None:
    """Write the pages image of some entries."""
    with path.open("wb") as pages:
        for entry in entries:
            if entry.kind == "dumped":
                pages.write(entry_data(entry, salt))


def vmas_around(entries: Sequence[Entry]) -> list[dict]:
    """One lazy VMA for each group of entries that touch."""
    vmas: list[dict] = []
    for entry in entries:
        if vmas and vmas[-1]["end"] == entry.start:
            vmas[-1]["end"] = entry.end
        else:
            vmas.append({"start": entry.start, "end": entry.end, **LAZY_VMA})
    return vmas


def write_mm(path: Path, vmas: Iterable[dict]) -> None:
    """Write an mm image; a VMA is a dict of fields of VmaEntry, of which only start and end must be given."""
    defaults = {"pgoff": 0, "shmid": 0, "fd": -1, **LAZY_VMA}
    mm = mm_pb2.Mm(vmas=[mm_pb2.VmaEntry(**{**defaults, **vma}) for vma in vmas])
    path.write_bytes(frame("mm", [mm.SerializeToString()]))


def build_checkpoint(
    directory: Path,
    tasks: Sequence[Task],
    *,
    dialect: str = "flags",
    parent: Path | None = None,
    version: int = 2,
    salt: int = 0,
) -> Path:
    """Write an images directory; `salt` makes the pages of one directory differ from another's."""
    assert dialect in DIALECTS
    directory.mkdir(parents=True)
    inventory = inventory_pb2.Inventory(img_version=version).SerializeToString()
    (directory / "inventory.img").write_bytes(frame("inventory", [inventory]))
    tree = [
        pstree_pb2.PstreeEntry(pid=task.pid, ppid=task.ppid, pgid=task.pid, sid=task.pid, threads=[task.pid])
        for task in tasks
    ]
    (directory / "pstree.img").write_bytes(frame("pstree", [entry.SerializeToString() for entry in tree]))
    for number, task in enumerate(tasks, 1):
        state = TASK_DEAD if task.zombie else TASK_ALIVE
        core = core_pb2.Core(tc=core_pb2.TaskCore(task_state=state, comm=task.comm)).SerializeToString()
        (directory / f"core-{task.pid}.img").write_bytes(frame("core", [core]))
        if task.zombie:
            continue
        pages_id = task.pages_id or number
        vmas = vmas_around(task.entries) if task.vmas is None else task.vmas
        write_mm(directory / f"mm-{task.pid}.img", vmas)
        image = pagemap_image(task.entries, dialect, pages_id)
        (directory / f"pagemap-{task.pid}.img").write_bytes(image)
        write_pages(directory / f"pages-{pages_id}.img", task.entries, salt)
    if parent is not None:
        (directory / "parent").symlink_to(os.path.relpath(parent, directory))
    return directory


def build_chain(directory: Path, levels: Sequence[Sequence[Task]], *, dialect: str = "flags") -> Path:
    """Write directories 0 (the youngest), 1 … below `directory`, each the parent of the last; return 0."""
    parent = None
    for number in range(len(levels) - 1, -1, -1):
        parent = build_checkpoint(directory / str(number), levels[number], dialect=dialect, parent=parent, salt=number)
    assert parent is not None
    return parent


def read_entries(pagemap: Path, dialect: str = "flags") -> tuple[int, list[Entry]]:
    """The pages id and the entries of a real pagemap image, without their data."""
    head, *bodies = unframe(pagemap.read_bytes(), "pagemap")
    entries = []
    for body in bodies:
        message = pagemap_pb2.PagemapEntry.FromString(body)
        if dialect == "booleans":
            kind = "parent" if message.in_parent else "zero" if message.zero_or_flags else "dumped"
            kind = "remote" if message.lazy_or_nr_pages else kind
            entries.append(Entry(message.vaddr, message.nr_pages, kind))
            continue
        flags = message.zero_or_flags if message.HasField("zero_or_flags") else PE_PRESENT
        kind = "dumped" if flags & PE_PRESENT else "parent" if flags & PE_PARENT else "zero"
        if kind == "zero" and flags & PE_LAZY:
            kind = "remote"
        pages = message.nr_pages or message.lazy_or_nr_pages
        entries.append(Entry(message.vaddr, pages, kind, bool(flags & PE_LAZY)))
    return pagemap_pb2.PagemapHead.FromString(head).pages_id, entries


def dialect_of(pagemap: Path) -> str:
    """flags64 if a real image (of a stock CRIU) has page counts in field 5, else flags."""
    bodies = unframe(pagemap.read_bytes(), "pagemap")[1:]
    wide = any(pagemap_pb2.PagemapEntry.FromString(body).HasField("lazy_or_nr_pages") for body in bodies)
    return "flags64" if wide else "flags"


def task_pids(directory: Path) -> list[int]:
    """The tasks of a directory that have memory."""
    bodies = unframe((directory / "pstree.img").read_bytes(), "pstree")
    pids = [pstree_pb2.PstreeEntry.FromString(body).pid for body in bodies]
    return [pid for pid in pids if (directory / f"mm-{pid}.img").exists()]


def _pieces(start: int, pages: int, longest: int, chance: random.Random) -> Iterator[tuple[int, int]]:
    """Cut a run at random places."""
    while pages:
        length = min(pages, chance.randint(1, longest))
        yield start, length
        start += length * PAGE
        pages -= length


class _LevelWriter:
    """A pagemap and a pages image in the making."""

    def __init__(self, directory: Path, pid: int, pages_id: int, chance: random.Random) -> None:
        self.pagemap = directory / f"pagemap-{pid}.img"
        self.pages = (directory / f"pages-{pages_id}.img").open("wb")
        self.pages_id = pages_id
        self.chance = chance
        self.entries: list[Entry] = []
        self._until_cut = 0

    def add(self, start: int, pages: int, kind: str, *, lazy: bool) -> None:
        """Add pages, joined to the entry before where they continue it, but cut now and then all the same."""
        while pages:
            last = self.entries[-1] if self.entries else None
            joins = last is not None and (last.end, last.kind, last.lazy) == (start, kind, lazy)
            if not joins or self._until_cut == 0:
                self._until_cut = self.chance.randint(1, 200)
                self.entries.append(Entry(start, 0, kind, lazy))
            take = min(pages, self._until_cut)
            last = self.entries[-1]
            self.entries[-1] = last._replace(pages=last.pages + take)
            self._until_cut -= take
            start += take * PAGE
            pages -= take

    def finish(self, dialect: str) -> None:
        """Write what has been added."""
        self.pages.close()
        self.pagemap.write_bytes(pagemap_image(self.entries, dialect, self.pages_id))


def chain_from_dump(
    dump: Path, directory: Path, levels: int, *, seed: int = 0, lazy_holes: bool = True, stale: float = 0.5
) -> Path:
    """Turn one flat dump into a chain of `levels` directories below `directory`; return the youngest.

    `lazy_holes`: a hole has the lazy flag of the page it stands for (lazyd fills it); without, it is parent
    only, as stock writes it (the restorer fills it). `stale`: how much of what a younger image has dumped is
    in an older one too, with other bytes; divided by the depth, so that deep chains stay small.
    """
    chance = random.Random(seed)
    paths = [directory / str(number) for number in range(levels)]
    for number, path in enumerate(paths):
        path.mkdir(parents=True)
        if number:
            shutil.copy2(dump / "inventory.img", path)
        if number + 1 < levels:
            (path / "parent").symlink_to(f"../{number + 1}")
    pids = task_pids(dump)
    moved = {f"pagemap-{pid}.img" for pid in pids}
    for pid in pids:
        source = dump / f"pagemap-{pid}.img"
        pages_id, entries = read_entries(source)
        dialect = dialect_of(source)
        moved.add(f"pages-{pages_id}.img")
        writers = [_LevelWriter(path, pid, pages_id, chance) for path in paths]
        with (dump / f"pages-{pages_id}.img").open("rb") as pages:
            for entry in entries:
                if entry.kind != "dumped":
                    writers[0].add(entry.start, entry.pages, entry.kind, lazy=entry.lazy)
                    continue
                for start, length in _pieces(entry.start, entry.pages, 100, chance):
                    data = pages.read(length * PAGE)
                    owner = chance.randrange(levels)
                    for number, writer in enumerate(writers):
                        if number < owner:
                            writer.add(start, length, "parent", lazy=entry.lazy and lazy_holes)
                        elif number == owner:
                            writer.add(start, length, "dumped", lazy=entry.lazy)
                            writer.pages.write(data)
                        elif chance.random() < stale * min(1, 4 / levels):
                            writer.add(start, length, "dumped", lazy=entry.lazy)
                            writer.pages.write(bytes([0xA5, number & 0xFF]) * (length * PAGE // 2))
        for writer in writers:
            writer.finish(dialect)
    for other in dump.iterdir():
        if other.name not in moved and other.is_file() and not other.is_symlink():
            shutil.copy2(other, paths[0])
    return paths[0]


def _zero_runs(entry: Entry, data: bytes) -> Iterator[Entry]:
    """Cut a dumped entry into dumped runs (with their data) and zero runs."""
    zero = bytes(PAGE)
    first = 0
    kinds = [data[i * PAGE : (i + 1) * PAGE] == zero for i in range(entry.pages)]
    for page in range(1, entry.pages + 1):
        if page == entry.pages or kinds[page] != kinds[first]:
            start, pages = entry.start + first * PAGE, page - first
            if kinds[first]:
                yield Entry(start, pages, "zero")
            else:
                yield Entry(start, pages, "dumped", data=data[first * PAGE : page * PAGE])
            first = page


def booleans_from_dump(dump: Path, directory: Path) -> Path:
    """Rewrite a flat dump in the booleans dialect; zero pages, dumped or in no entry, become zero holes."""
    directory.mkdir(parents=True)
    moved = set()
    for pid in task_pids(dump):
        pages_id, entries = read_entries(dump / f"pagemap-{pid}.img")
        moved |= {f"pagemap-{pid}.img", f"pages-{pages_id}.img"}
        mm = mm_pb2.Mm.FromString(unframe((dump / f"mm-{pid}.img").read_bytes(), "mm")[0])
        holes = [(v.start, v.end) for v in mm.vmas if v.flags & 0x22 == 0x22 and not v.status & 0x100C]
        written: list[Entry] = []
        at = 0
        with (
            (dump / f"pages-{pages_id}.img").open("rb") as pages,
            (directory / f"pages-{pages_id}.img").open("wb") as out,
        ):
            for entry in entries:
                written += _gaps(holes, at, entry.start)
                at = entry.end
                if entry.kind != "dumped":
                    written.append(entry)
                    continue
                for run in _zero_runs(entry, pages.read(entry.pages * PAGE)):
                    if run.data is not None:
                        out.write(run.data)
                    written.append(run._replace(data=None))
            written += _gaps(holes, at, 1 << 47)
        (directory / f"pagemap-{pid}.img").write_bytes(pagemap_image(written, "booleans", pages_id))
    for other in dump.iterdir():
        if other.name not in moved and other.is_file() and not other.is_symlink():
            shutil.copy2(other, directory)
    return directory


def _gaps(areas: Sequence[tuple[int, int]], start: int, end: int) -> Iterator[Entry]:
    """Zero entries for what lies in the areas and in [start, end)."""
    for area_start, area_end in areas:
        first, last = max(start, area_start), min(end, area_end)
        if first < last:
            yield Entry(first, (last - first) // PAGE, "zero")
