# SPDX-License-Identifier: MIT
"""Rewrite a real dump: into a chain of parents, or into the booleans dialect with zero holes.

Stock CRIU makes no chains here (the kernel has no soft-dirty bits), so they are made from a real dump:
every run of pages is given to one level, younger levels get a parent hole there, and the next older ones
may hold a stale copy, as in life. Each level's entries are cut anew, so that a hole rarely has the
borders of what fills it.

This codec is its own, a page long, so that it shares no mistake with lazyd's.
"""

from __future__ import annotations

import random
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import harness

PAGE = 4096
PAGEMAP_MAGIC = struct.pack("<II", 0x54564319, 0x56084025)
PARENT, LAZY, PRESENT = 1, 2, 4
ZERO_HOLE = 1 << 20  # not a CRIU flag: a zero hole, which only the booleans dialect can say


@dataclass
class Entry:
    """One pagemap entry."""

    start: int
    pages: int
    flags: int

    @property
    def end(self) -> int:
        """Return the address after the last page."""
        return self.start + self.pages * PAGE


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(message: bytes) -> dict[int, int]:
    found, at = {}, 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = number()
        assert key & 7 == 0, "pagemaps hold varints only"
        found[key >> 3] = number()
    return found


def _message(fields: dict[int, int]) -> bytes:
    body = b"".join(_varint(key << 3) + _varint(value) for key, value in fields.items())
    return struct.pack("<I", len(body)) + body


def read_pagemap(path: Path) -> tuple[int, list[Entry], bool]:
    """Return the pages id, the entries, and whether criu 4.2 or later wrote them; for the flags dialect."""
    data = path.read_bytes()
    assert data[:8] == PAGEMAP_MAGIC
    at, records = 8, []
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        records.append(_fields(data[at + 4 : at + 4 + length]))
        at += 4 + length
    entries = [Entry(r[1], r.get(5) or r[2], r.get(4, PRESENT)) for r in records[1:]]
    return records[0][1], entries, any(5 in r for r in records[1:])


def write_pagemap(path: Path, pages_id: int, entries: list[Entry], dialect: str) -> None:
    """Write entries as `narrow` (flags, criu to 4.1), `wide` (flags, from 4.2) or `booleans`."""
    out = [PAGEMAP_MAGIC, _message({1: pages_id})]
    for entry in entries:
        if dialect == "wide":
            fields = {1: entry.start, 2: 0, 4: entry.flags, 5: entry.pages}
        elif dialect == "narrow":
            fields = {1: entry.start, 2: entry.pages, 4: entry.flags}
        else:
            fields = {1: entry.start, 2: entry.pages}
            if entry.flags & ZERO_HOLE:
                fields[4] = 1
            elif not entry.flags & PRESENT:
                assert entry.flags & PARENT
                fields[3] = 1
        out.append(_message(fields))
    path.write_bytes(b"".join(out))


def merged_and_cut(entries: list[Entry], random_: random.Random) -> list[Entry]:
    """Join neighbours that say the same, then cut them at random pages."""
    joined: list[Entry] = []
    for entry in entries:
        if joined and joined[-1].end == entry.start and joined[-1].flags == entry.flags:
            joined[-1].pages += entry.pages
        else:
            joined.append(Entry(entry.start, entry.pages, entry.flags))
    cut = []
    for entry in joined:
        at, left = entry.start, entry.pages
        while left:
            pages = min(left, random_.choice((1, 3, 17, 64, 500, 5000)))
            cut.append(Entry(at, pages, entry.flags))
            at += pages * PAGE
            left -= pages
    return cut


def split_into_chain(images: Path, out: Path, depth: int, seed: int = 1, eager_share: float = 0.2) -> Path:
    """Spread a dump's pages over OUT/level-0 (the youngest, returned) and `depth` parents.

    `eager_share` of the youngest level's holes lack the lazy flag, so that the restorer fills them.
    """
    random_ = random.Random(seed)
    levels = [out / f"level-{number}" for number in range(depth + 1)]
    for number, level in enumerate(levels):
        level.mkdir(parents=True)
        for path in images.iterdir():
            pages = path.name.startswith(("pagemap-", "pages-"))
            if path.is_file() and not pages and (number == 0 or path.name == "inventory.img"):
                shutil.copy(path, level)
        if number < depth:
            (level / "parent").symlink_to(f"../level-{number + 1}")
    for path in images.glob("pagemap-*.img"):
        pages_id, entries, wide = read_pagemap(path)
        if path.name.startswith("pagemap-shmem"):
            shutil.copy(path, levels[0])
            shutil.copy(images / f"pages-{pages_id}.img", levels[0])
            continue
        tables: list[list[tuple[Entry, bytes]]] = [[] for _ in levels]
        with (images / f"pages-{pages_id}.img").open("rb") as pages:
            for entry in entries:
                assert entry.flags & PRESENT
                at, left = entry.start, entry.pages
                while left:
                    count = min(left, random_.randint(1, 40))
                    _spread(tables, (at, pages.read(count * PAGE), entry.flags), random_, eager_share)
                    at += count * PAGE
                    left -= count
        for level, table in zip(levels, tables, strict=True):
            with (level / f"pages-{pages_id}.img").open("wb") as pages:
                for _, data in table:
                    pages.write(data)
            cut = merged_and_cut([entry for entry, _ in table], random_)
            write_pagemap(level / path.name, pages_id, cut, "wide" if wide else "narrow")
    return levels[0]


def _spread(tables, run: tuple[int, bytes, int], random_: random.Random, eager_share: float) -> None:
    """Give one run to a level; put holes above it and, for some, what it was earlier below it."""
    start, data, flags = run
    count, depth = len(data) // PAGE, len(tables) - 1
    owner = random_.randint(0, depth)
    for level in range(owner):
        hole = PARENT | (flags & LAZY)
        if level == 0 and random_.random() < eager_share:
            hole = PARENT  # as stock writes it: the restorer fills it before the task runs
        tables[level].append((Entry(start, count, hole), b""))
    tables[owner].append((Entry(start, count, flags), data))
    covered = False
    for level in range(min(owner + 2, depth), owner, -1):
        kind = random_.random()
        if kind < 0.5:
            stale = bytes([0xE0 + level % 16]) * len(data)
            tables[level].append((Entry(start, count, flags), stale))
            covered = True
        elif kind < 0.75 and covered:
            tables[level].append((Entry(start, count, PARENT | (flags & LAZY)), b""))
        else:
            covered = False


def private_anonymous_vmas(suite: str, images: Path, pid: int) -> list[tuple[int, int]]:
    """Return the ranges that restore leaves to lazy pages, by crit."""
    (mm,) = harness.crit(suite, images / f"mm-{pid}.img")
    map_private, map_anonymous, map_locked, map_hugetlb = 0x2, 0x20, 0x2000, 0x40000
    vsyscall, vdso, vvar = 4, 8, 1 << 12
    return [
        (vma["start"], vma["end"])
        for vma in mm["vmas"]
        if vma["flags"] & (map_private | map_anonymous) == map_private | map_anonymous
        and not vma["flags"] & (map_locked | map_hugetlb)
        and not vma["status"] & (vsyscall | vdso | vvar)
    ]


def to_booleans(suite: str, images: Path, out: Path, seed: int = 1) -> tuple[Path, int]:
    """Rewrite a dump or a chain into the booleans dialect under OUT.

    Most of what no entry covers inside a lazy VMA becomes a zero hole of the youngest level; the rest stays
    uncovered. Returns the youngest directory and how many pages the zero holes have.
    """
    random_ = random.Random(seed)
    total = 0
    source, target = images, out / "level-0"
    for number in range(10_000):
        target.mkdir(parents=True)
        for path in source.iterdir():
            if path.is_file() and not path.name.startswith("pagemap-"):
                (target / path.name).hardlink_to(path)
        for path in source.glob("pagemap-*.img"):
            if path.name.startswith("pagemap-shmem"):
                shutil.copy(path, target)
                continue
            pages_id, entries, _ = read_pagemap(path)
            if number == 0:
                pid = int(path.stem.removeprefix("pagemap-"))
                holes = _zero_holes(private_anonymous_vmas(suite, images, pid), entries, random_)
                total += sum(hole.pages for hole in holes)
                entries = sorted([*entries, *holes], key=lambda entry: entry.start)
            write_pagemap(target / path.name, pages_id, entries, "booleans")
        if not (source / "parent").is_symlink():
            return out / "level-0", total
        (target / "parent").symlink_to(f"../level-{number + 1}")
        source, target = (source / "parent").resolve(), out / f"level-{number + 1}"
    raise AssertionError("a circular chain")


def _zero_holes(vmas: list[tuple[int, int]], entries: list[Entry], random_: random.Random) -> list[Entry]:
    holes = []
    for start, end in vmas:
        at = start
        inside = [entry for entry in entries if entry.end > start and entry.start < end]
        for stop, after in [*((entry.start, entry.end) for entry in inside), (end, end)]:
            while at < stop:
                pages = min((stop - at) // PAGE, random_.choice((1, 2, 9, 300, 1 << 20)))
                if random_.random() < 0.8:
                    holes.append(Entry(at, pages, ZERO_HOLE))
                at += pages * PAGE
            at = max(at, after)
    return holes
