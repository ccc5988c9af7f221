# SPDX-License-Identifier: MIT
# ruff: noqa: ANN401  what comes from cffi has no static type
"""The typed face of the C decoder and flattener of pagemap images (cbits/pagemap.c), and their only importer.

Reading is in two steps because an entry has no meaning before the dialect of its whole chain is known:
read_pagemap() decodes an image as written and tells what it has seen; decide_dialect() weighs that up over
all images; FlatTable.push() then lays image upon image, the oldest first.
"""

from __future__ import annotations

import errno
import os
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

from lazyd.enums import Enum
from lazyd.errors import ImageError
from lazyd.hints import Any
from lazyd.image._pagemap import ffi, lib
from lazyd.image.framing import read_error
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SIZE, ImageAddress

# struct lz_extent
_ROW = struct.Struct("<QQIHBB")
ROW_BYTES = _ROW.size
_LAZY_AT = struct.calcsize("<QQIHB")


class Dialect(Enum):
    """The two ways of using fields 4 and 5 of a pagemap entry; FLAGS covers both of its eras."""

    BOOLEANS = "booleans"
    FLAGS = "flags"


class Kind(Enum):
    """What the bytes of an extent are (enum lz_kind)."""

    DUMPED = 1
    ZERO = 2
    REMOTE = 3
    BROKEN = 4


class Extent(NamedTuple):
    """A row of a flat table. `source` and `offset` mean something for dumped runs only."""

    start: ImageAddress
    pages: int
    kind: Kind
    lazy: bool
    source: int
    offset: int

    @property
    def end(self) -> ImageAddress:
        """The first address behind the run."""
        return ImageAddress(self.start + self.pages * PAGE_SIZE)

    def part(self, start: int, end: int) -> Extent:
        """Return what of a dumped run lies in a range that it overlaps."""
        start, end = max(start, self.start), min(end, self.end)
        offset = self.offset + start - self.start
        return self._replace(start=ImageAddress(start), pages=(end - start) // PAGE_SIZE, offset=offset)


class Pagemap:
    """A decoded pagemap image whose dialect is still open. Its memory is C's: close() gives it back."""

    def __init__(self, path: Path, raw: Any) -> None:
        self.path = path
        self._raw = raw

    def __len__(self) -> int:
        return int(self._raw.count)

    @property
    def pages_id(self) -> int:
        """The number in the name of the pages image that holds this image's dumped runs."""
        return int(self._raw.pages_id)

    @property
    def seen(self) -> int:
        """What the entries use: bits of enum lz_seen."""
        return int(self._raw.seen)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (image address, pages) of each entry; for tests and people, not for speed."""
        for index in range(len(self)):
            entry = self._raw.entries[index]
            yield int(entry.word) & -PAGE_SIZE, int(entry.pages)

    def close(self) -> None:
        """Free the entries; a second call does nothing."""
        lib.lz_pagemap_free(self._raw)


def _plain_words(code: int, first: int, second: int) -> str:
    """Return what is wrong, from an lz_bad code and its two numbers."""
    match code:
        case lib.LZ_BAD_MAGIC:
            return f"not a pagemap image: magic {first:#x} instead of {second:#x}"
        case lib.LZ_BAD_TRUNCATED:
            return f"truncated: {first} bytes wanted here, {second} are there"
        case lib.LZ_BAD_LENGTH:
            return f"garbled: a record of {first} bytes (no entry takes more than {second})"
        case lib.LZ_BAD_NO_HEAD:
            return "truncated: no head record"
        case lib.LZ_BAD_VARINT:
            return "garbled: not a protobuf message"
        case lib.LZ_BAD_UNKNOWN_FIELD:
            return f"unknown field {first}: written by a later version, perhaps with compressed pages"
        case lib.LZ_BAD_WIRE_TYPE:
            return f"garbled: field {first} has wire type {second}"
        case lib.LZ_BAD_MISSING_FIELD:
            return f"garbled: the record lacks field {first}"
        case lib.LZ_BAD_FIELD_RANGE:
            return f"garbled: field {first} is {second}, more than 32 bits hold"
        case lib.LZ_BAD_FLAG_BITS:
            return f"unknown flags: field 4 is {first:#x}, known are 0x1 parent, 0x2 lazy, 0x4 present"
        case lib.LZ_BAD_COUNTS:
            return f"contradictory: {first} pages in field 2, {second} in field 5"
        case lib.LZ_BAD_UNALIGNED:
            return "the address is not page-aligned"
        case lib.LZ_BAD_NO_PAGES:
            return "an entry of no pages"
        case lib.LZ_BAD_USER_SPACE:
            return f"{first} pages from here are not inside user space, which ends at {second:#x}"
        case lib.LZ_BAD_UNSORTED:
            return f"unsorted: the entry before starts at {first:#x}"
        case lib.LZ_BAD_OVERLAP:
            return f"overlaps the entry before, {first:#x}-{second:#x}"
        case lib.LZ_BAD_COMBINATION:
            fields = f"field 3 is {first & 1}, field 4 is {first >> 1 & 7}, field 5 is {first >> 4}"
            dialect = "booleans" if second == lib.LZ_DIALECT_BOOLEANS else "flags"
            return f"contradictory for the {dialect} dialect: {fields}"
        case lib.LZ_BAD_NOT_BOOLEAN:
            return f"field {first} is {second}, which the booleans dialect never says"
        case _:
            raise AssertionError(code)


def _image_error(path: Path, error: Any) -> ImageError:
    reason = _plain_words(error.code, int(error.detail[0]), int(error.detail[1]))
    return ImageError(
        path,
        reason,
        offset=int(error.offset) if error.has_offset else None,
        address=int(error.address) if error.has_address else None,
    )


def read_pagemap(path: Path, fd: int) -> Pagemap:
    """Decode the pagemap image behind fd, which stays the caller's; `path` is its name in errors."""
    raw = ffi.new("struct lz_pagemap *")
    error = ffi.new("struct lz_pagemap_error *")
    result = lib.lz_pagemap_read(fd, raw, error)
    if result == -errno.EBADMSG:
        raise _image_error(path, error)
    if result == -errno.ENOMEM:
        raise MemoryError
    if result < 0:
        raise read_error(path, OSError(-result, os.strerror(-result)))
    return Pagemap(path, ffi.gc(raw, lib.lz_pagemap_free))


def locate(path: Path, address: int) -> int | None:
    """Return the offset of the record that covers an image address, or None if it cannot be had."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        offset = ffi.new("uint64_t *")
        return int(offset[0]) if lib.lz_pagemap_locate(fd, address, offset) == 0 else None
    finally:
        os.close(fd)


def find_evidence(pagemaps: list[Pagemap]) -> tuple[Dialect, str] | None:
    """Return the dialect that these images prove, and by what; ImageError if they prove both."""
    seen = 0
    for pagemap in pagemaps:
        seen |= pagemap.seen
    flags = next((p for p in pagemaps if p.seen & lib.LZ_SEEN_FLAGS), None)
    bare = None
    if seen & lib.LZ_SEEN_FIELD_4:
        bare = next((p for p in pagemaps if p.seen & lib.LZ_SEEN_BARE), None)
    if flags is not None:
        flags_where = f"at address {int(flags._raw.flags_address):#x} in {flags.path}"
        flags_where += f" (offset {int(flags._raw.flags_offset)})"
        if bare is None:
            return Dialect.FLAGS, f"flags {flags_where}"
        # The odd one out is the bare entry: every writer of flags gives each entry a field 4.
        reason = f"corrupt: the images mix two dialects: a dumped entry without field 4 here, flags {flags_where}"
        offset, address = int(bare._raw.bare_offset), int(bare._raw.bare_address)
        raise ImageError(bare.path, reason, offset=offset, address=address)
    if bare is not None:
        where = f"at address {int(bare._raw.bare_address):#x} in {bare.path}"
        return Dialect.BOOLEANS, f"a dumped entry without field 4 {where}, though others have it"
    if seen & lib.LZ_SEEN_LAZY_BOOL:
        return Dialect.BOOLEANS, "no proof, but field 5 stands beside page counts in field 2"
    return None


def decide_dialect(pagemaps: list[Pagemap], asked: str, *, has_parent: bool) -> tuple[Dialect, str]:
    """Decide how all the images of a chain are to be read, and say why.

    `asked` is "auto" or the name of a dialect, which then is taken whatever the evidence (entries that it
    cannot mean are refused when they are read). With evidence of both dialects the images are corrupt.
    """
    if asked != "auto":
        return Dialect(asked), "as told"
    evidence = find_evidence(pagemaps)
    if evidence is not None:
        return evidence
    if has_parent:
        return Dialect.FLAGS, "no evidence in any entry; the directory has a parent"
    return Dialect.BOOLEANS, "no evidence in any entry; the directory has no parent"


def check_dialect(pagemaps: list[Pagemap], dialect: Dialect) -> None:
    """Raise ImageError if any of these images is not in a dialect, or would be read in another one beside it."""
    foreign = lib.LZ_SEEN_FLAGS if dialect is Dialect.BOOLEANS else lib.LZ_SEEN_BARE | lib.LZ_SEEN_LAZY_BOOL
    for pagemap in pagemaps:
        if pagemap.seen & foreign:
            other = Dialect.FLAGS if dialect is Dialect.BOOLEANS else Dialect.BOOLEANS
            reason = f"in the {other.value} dialect: a dump on top of it must be, too (--pagemap-format {other.value})"
            raise ImageError(pagemap.path, reason)


def uses_field_5(pagemaps: list[Pagemap]) -> bool:
    """Say whether any entry has field 5: in the flags dialect, that it is of the 32-byte era."""
    return any(pagemap.seen & lib.LZ_SEEN_FIELD_5 for pagemap in pagemaps)


class ExtentTable:
    """The flat table of a task: rows of struct lz_extent, sorted by image address and disjoint.

    `buffer` stays valid as long as anybody holds it, also without the table.
    """

    def __init__(self, rows: Any, count: int) -> None:
        self._rows = rows
        self._count = count

    @classmethod
    def empty(cls) -> ExtentTable:
        """Return the table of a task that has no memory."""
        return cls(ffi.NULL, 0)

    def __len__(self) -> int:
        return self._count

    @property
    def buffer(self) -> memoryview:
        """The rows as bytes, ROW_BYTES each."""
        if not self._count:
            return memoryview(b"")
        return memoryview(ffi.buffer(self._rows, self._count * ROW_BYTES))

    def __getitem__(self, index: int) -> Extent:
        if not 0 <= index < self._count:
            raise IndexError(index)
        row = self._rows[index]
        return Extent(ImageAddress(row.start), row.pages, Kind(row.kind), bool(row.lazy), row.source, row.offset)

    def __iter__(self) -> Iterator[Extent]:
        for index in range(self._count):
            yield self[index]

    def rows(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Yield the rows as (start, pages, kind, lazy, source, offset): the fast way over all of them."""
        for start, offset, pages, source, kind, lazy in _ROW.iter_unpack(self.buffer):
            yield start, pages, kind, lazy, source, offset

    def pages_by_kind(self) -> dict[Kind, int]:
        """Return how many pages there are of each kind."""
        pages = ffi.new("uint64_t[5]")
        lib.lz_table_pages(self._view(), pages)
        return {kind: int(pages[kind.value]) for kind in Kind}

    def find(self, kind: Kind, start: int = 0) -> int:
        """Return the index of the first row of a kind from `start` on, or len(self)."""
        return int(lib.lz_table_find_kind(self._view(), start, kind.value))

    def filled_by_restorer(self) -> list[tuple[int, int]]:
        """Return the ranges of dumped pages that are not lazy, in order of address."""
        lazy = bytes(memoryview(self.buffer).cast("B")[_LAZY_AT::ROW_BYTES])
        found = []
        index = lazy.find(0)
        while index >= 0:
            if (extent := self[index]).kind is Kind.DUMPED:
                found.append((int(extent.start), int(extent.end)))
            index = lazy.find(0, index + 1)
        return found

    def within(self, ranges: Iterable[tuple[int, int]]) -> Iterator[Extent]:
        """Yield the dumped runs that lie in any of these ranges, cut to them, in order of address."""
        done = 0
        for first, end in sorted(ranges):
            start = max(first, done)
            done = max(done, end)
            index = bisect_right(self, start, key=lambda extent: int(extent.end))
            while start < end and index < len(self) and (extent := self[index]).start < end:
                if extent.kind is Kind.DUMPED:
                    yield extent.part(start, end)
                index += 1

    def _view(self) -> Any:
        return ffi.new("struct lz_table *", {"rows": self._rows, "count": self._count})


class FlatTable:
    """A table that grows image by image, the oldest of the chain first."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = lib.LZ_DIALECT_BOOLEANS if dialect is Dialect.BOOLEANS else lib.LZ_DIALECT_FLAGS
        self._table = ffi.gc(ffi.new("struct lz_table *"), lib.lz_table_free)

    def clear(self) -> None:
        """Forget all rows: an image of the chain has no pagemap, so that nothing below it shows."""
        lib.lz_table_free(self._table)

    def push(self, pagemap: Pagemap, level: int, pages_image: Path, pages_image_bytes: int | None) -> int:
        """Lay an image over its ancestors; return how many bytes of its pages image it names.

        `level` numbers the image in its chain; pages_image_bytes None: there is no pages image.
        """
        error = ffi.new("struct lz_pagemap_error *")
        result = lib.lz_table_push(self._table, pagemap._raw, level, self._dialect, pages_image_bytes or 0, error)
        if result == -errno.ENOMEM:
            raise MemoryError
        if result < 0:
            raise self._push_error(pagemap, error, pages_image, pages_image_bytes)
        return int(self._table.image_bytes)

    def _push_error(self, pagemap: Pagemap, error: Any, pages_image: Path, size: int | None) -> ImageError:
        address = int(error.address)
        offset = locate(pagemap.path, address)
        if error.code == lib.LZ_BAD_PAGES_SHORT:
            run_offset, run_pages = int(error.detail[0]), int(error.detail[1])
            where = f"{pagemap.path} (offset {offset})" if offset is not None else str(pagemap.path)
            wants = f"{where} has {run_pages} pages from byte {run_offset} of it"
            if size is None:
                return ImageError(pages_image, f"missing: {wants}", address=address)
            return ImageError(pages_image, f"too short, it ends here: {wants}", offset=size, address=address)
        failure = _image_error(pagemap.path, error)
        return ImageError(pagemap.path, failure.reason, offset=offset, address=address)

    def used_levels(self, levels: int) -> list[int]:
        """Return the levels whose pages images the rows still need."""
        used = ffi.new("uint8_t[]", levels)
        lib.lz_table_used(self._table, used, levels)
        return [level for level, flag in enumerate(ffi.buffer(used)) if flag != b"\0"]

    def finish(self, source_of_level: dict[int, int], levels: int) -> ExtentTable:
        """Name sources instead of levels and hand the rows over; this object is empty afterwards."""
        names = ffi.new("uint16_t[]", levels)
        for level, source in source_of_level.items():
            names[level] = source
        lib.lz_table_finish(self._table, names, levels)
        rows, count = self._table.rows, int(self._table.count)
        self._table.rows, self._table.count = ffi.NULL, 0
        return ExtentTable(ffi.gc(rows, lib.lz_rows_free), count)
