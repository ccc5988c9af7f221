# SPDX-License-Identifier: MIT
"""The C decoder against protobuf, and the flattener against a dictionary of pages."""

from __future__ import annotations

import os
import struct
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from images_builder import PAGE, Entry, frame, page_pattern, pagemap_image, read_entries, unframe

from lazyd.errors import ImageError
from lazyd.image.pagemap import Dialect, Extent, FlatTable, Kind, decide_dialect, locate, read_pagemap
from lazyd.image.pb import pagemap_pb2

USER_END = (1 << 47) - PAGE
BASE = 0x7F0000000000
NAME = Path("pagemap-1.img")


def decode(content: bytes, name: Path = NAME):
    fd = os.memfd_create("pagemap")
    try:
        os.write(fd, content)
        return read_pagemap(name, fd)
    finally:
        os.close(fd)


def entries_of(words: list[tuple[int, int, str, bool]], unit: int = PAGE) -> list[Entry]:
    """Turn (gap, length, kind, lazy) in pages into sorted, disjoint entries."""
    at, entries = BASE, []
    for gap, length, kind, lazy in words:
        at += gap * unit
        entries.append(Entry(at, length, kind, lazy))
        at += length * PAGE
    return entries


kinds = st.sampled_from(["dumped", "zero", "parent", "remote"])
words = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), kinds, st.booleans()), max_size=9)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1 << 20),
            st.integers(1, 1 << 12),
            st.sampled_from([None, False, True]),
            st.one_of(st.none(), st.integers(0, 7)),
            st.sampled_from(["none", "bool", "count"]),
            st.booleans(),
        ),
        max_size=30,
    ),
    st.integers(0, (1 << 32) - 1),
)
def test_the_decoder_reads_what_protobuf_wrote(fields, pages_id):
    at, bodies, expected = 0, [], []
    head = pagemap_pb2.PagemapHead(pages_id=pages_id)
    for gap, pages, three, four, five, five_value in fields:
        at += gap * PAGE
        message = pagemap_pb2.PagemapEntry(vaddr=at, nr_pages=pages)
        if three is not None:
            message.in_parent = three
        if four is not None:
            message.zero_or_flags = four
        if five == "bool":
            message.lazy_or_nr_pages = int(five_value)
        elif five == "count":
            message.nr_pages, message.lazy_or_nr_pages = 0, pages
        bodies.append(message.SerializeToString())
        expected.append((at, pages))
        at += pages * PAGE
    content = frame("pagemap", [head.SerializeToString(), *bodies])
    decoded = decode(content)
    assert decoded.pages_id == pages_id
    assert len(decoded) == len(expected)
    assert list(decoded) == expected
    parsed = [pagemap_pb2.PagemapEntry.FromString(body) for body in unframe(content, "pagemap")[1:]]
    assert [m.vaddr for m in parsed] == [start for start, _ in decoded]


@pytest.mark.parametrize("order", [(1, 2, 4), (4, 2, 1), (2, 4, 1)])
def test_fields_may_come_in_any_order_and_the_last_of_a_kind_counts(order):
    values = {1: BASE, 2: 5, 4: 4}
    body = b"\x08\x00" + b"".join(_field(number, values[number]) for number in order)
    expected = pagemap_pb2.PagemapEntry.FromString(body)
    assert list(decode(frame("pagemap", [b"\x08\x01", body]))) == [(expected.vaddr, expected.nr_pages)]


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _field(number: int, value: int, wire_type: int = 0) -> bytes:
    return _varint(number << 3 | wire_type) + _varint(value)


def expected_pages(levels: list[list[Entry]], dialect: str) -> dict[int, tuple]:
    """The model: what every page is, by looking at pages one at a time, the oldest image first."""
    table: dict[int, tuple] = {}
    for number in range(len(levels) - 1, -1, -1):
        parent, table, offset = table, {}, 0
        for entry in levels[number]:
            lazy = dialect == "booleans" or {"zero": False, "remote": True}.get(entry.kind, entry.lazy)
            for address in range(entry.start, entry.end, PAGE):
                if entry.kind == "dumped":
                    table[address] = (Kind.DUMPED, number, offset, lazy)
                    offset += PAGE
                elif entry.kind == "zero":
                    table[address] = (Kind.ZERO, 0, 0, lazy)
                elif entry.kind == "remote":
                    table[address] = (Kind.REMOTE, 0, 0, lazy)
                elif address in parent:
                    table[address] = (*parent[address][:3], lazy)
                else:
                    table[address] = (Kind.BROKEN, 0, number, lazy)
    return table


def pages_of(extents) -> dict[int, tuple]:
    pages = {}
    for extent in extents:
        step = PAGE if extent.kind is Kind.DUMPED else 0
        for i in range(extent.pages):
            address = extent.start + i * PAGE
            assert address not in pages
            pages[address] = (extent.kind, extent.source, extent.offset + i * step, extent.lazy)
    return pages


def flatten(levels: list[list[Entry]], dialect: str):
    table = FlatTable(Dialect.BOOLEANS if dialect == "booleans" else Dialect.FLAGS)
    for number in range(len(levels) - 1, -1, -1):
        pagemap = decode(pagemap_image(levels[number], dialect))
        size = sum(e.pages for e in levels[number] if e.kind == "dumped") * PAGE
        assert table.push(pagemap, number, Path("pages-1.img"), size) == size
    used = table.used_levels(len(levels))
    return used, table.finish({level: level for level in used}, len(levels))


@settings(max_examples=300, deadline=None)
@given(st.lists(words, min_size=1, max_size=6), st.sampled_from(["booleans", "flags", "flags64"]))
@example([[(0, 6, "parent", True)], [(1, 1, "parent", False), (1, 2, "dumped", True)], []], "flags")
def test_a_flat_table_says_of_every_page_what_the_chain_says(chain, dialect):
    levels = [entries_of(level) for level in chain]
    used, extents = flatten(levels, dialect)
    expected = expected_pages(levels, dialect)
    assert pages_of(extents) == expected
    assert used == sorted({source for kind, source, *_ in expected.values() if kind is Kind.DUMPED})
    by_kind = extents.pages_by_kind()
    assert by_kind == {kind: sum(what[0] is kind for what in expected.values()) for kind in Kind}
    rows = list(extents)
    assert rows == sorted(rows)
    for one, two in pairwise(rows):
        same = (one.kind, one.lazy, one.source) == (two.kind, two.lazy, two.source)
        step = one.pages * PAGE if one.kind is Kind.DUMPED else 0
        assert not (one.end == two.start and same and one.offset + step == two.offset), "not merged"


def test_the_buffer_holds_rows_of_24_bytes_and_outlives_the_table():
    _, extents = flatten([[Entry(BASE, 3), Entry(BASE + 4 * PAGE, 1, "zero")]], "flags")
    buffer = extents.buffer
    rows = list(extents)
    del extents
    unpacked = [struct.unpack_from("<QQIHBB", buffer, at) for at in range(0, len(buffer), 24)]
    assert unpacked == [(r.start, r.offset, r.pages, r.source, r.kind.value, r.lazy) for r in rows]
    assert rows[0] == Extent(BASE, 3, Kind.DUMPED, source=0, offset=0, lazy=True)


@pytest.mark.parametrize("pages", [(1 << 32) - 1, 1 << 32, (1 << 33) + 1, (USER_END >> 12) - 16])
def test_a_run_that_no_row_can_hold_is_split(pages):
    _, extents = flatten([[Entry(0x10000, pages, "zero")]], "flags64")
    assert sum(extent.pages for extent in extents) == pages
    assert [e.start for e in extents][1:] == [e.end for e in extents][:-1]
    assert extents[len(extents) - 1].end == 0x10000 + pages * PAGE
    _, hole = flatten([[Entry(0x10000, pages, "parent")], [Entry(0x10000, pages, "zero")]], "flags64")
    assert [tuple(e) for e in hole] == [tuple(e._replace(lazy=True)) for e in extents]


def test_a_million_one_page_entries():
    entry = struct.Struct("<IBQ")
    count = 1 << 20
    bodies = []
    for index in range(count):
        body = _field(1, BASE + index * 2 * PAGE) + b"\x10\x01\x20\x06"
        bodies.append(struct.pack("<I", len(body)) + body)
    content = frame("pagemap", [b"\x08\x01"]) + b"".join(bodies)
    assert entry.size == 13
    fd = os.memfd_create("pagemap")
    with os.fdopen(fd, "wb") as image:
        image.write(content)
        image.flush()
        pagemap = read_pagemap(NAME, fd)
    assert len(pagemap) == count
    table = FlatTable(Dialect.FLAGS)
    table.push(pagemap, 0, Path("pages-1.img"), count * PAGE)
    extents = table.finish({0: 0}, 1)
    assert len(extents) == count
    assert extents[count - 1] == Extent(
        BASE + (count - 1) * 2 * PAGE, 1, Kind.DUMPED, lazy=True, source=0, offset=(count - 1) * PAGE
    )


# The dialect.


def message(**fields) -> bytes:
    return pagemap_pb2.PagemapEntry(**fields).SerializeToString()


def decide(*bodies: bytes, asked: str = "auto", has_parent: bool = False) -> Dialect:
    image = decode(frame("pagemap", [b"\x08\x01", *bodies]))
    dialect, reason = decide_dialect([image], asked, has_parent=has_parent)
    assert reason
    return dialect


A, B = BASE, BASE + 16 * PAGE
PLAIN = message(vaddr=A, nr_pages=1)
ONE = message(vaddr=B, nr_pages=1, zero_or_flags=1)


@pytest.mark.parametrize(
    ("bodies", "expected"),
    [
        ((message(vaddr=A, nr_pages=1, zero_or_flags=4), ONE), Dialect.FLAGS),
        ((message(vaddr=A, nr_pages=1, zero_or_flags=2), ONE), Dialect.FLAGS),
        ((message(vaddr=A, nr_pages=0, zero_or_flags=1, lazy_or_nr_pages=1), ONE), Dialect.FLAGS),
        ((message(vaddr=A, nr_pages=0, zero_or_flags=1, lazy_or_nr_pages=9), ONE), Dialect.FLAGS),
        ((PLAIN, ONE), Dialect.BOOLEANS),
        ((message(vaddr=A, nr_pages=2, lazy_or_nr_pages=1), ONE), Dialect.BOOLEANS),
    ],
)
@pytest.mark.parametrize("has_parent", [False, True])
def test_evidence_decides_the_dialect(bodies, expected, has_parent):
    assert decide(*bodies, has_parent=has_parent) is expected


@pytest.mark.parametrize("bodies", [(), (ONE,), (PLAIN,), (message(vaddr=A, nr_pages=1, in_parent=True), ONE)])
def test_without_evidence_a_parent_says_flags(bodies):
    assert decide(*bodies, has_parent=True) is Dialect.FLAGS
    assert decide(*bodies, has_parent=False) is Dialect.BOOLEANS


def test_an_option_overrides_what_would_be_decided():
    assert decide(PLAIN, ONE, asked="flags") is Dialect.FLAGS
    assert decide(ONE, has_parent=True, asked="booleans") is Dialect.BOOLEANS


def test_evidence_is_gathered_over_all_images():
    flags = decode(frame("pagemap", [b"\x08\x01", message(vaddr=A, nr_pages=1, zero_or_flags=4)]), Path("x"))
    bare = decode(frame("pagemap", [b"\x08\x01", PLAIN]), Path("y"))
    with pytest.raises(ImageError, match=r"mix two dialects.*x .offset 14") as caught:
        decide_dialect([flags, bare], "auto", has_parent=False)
    assert (caught.value.path, caught.value.offset, caught.value.address) == (Path("y"), 14, A)


def test_a_dialect_that_entries_cannot_mean_is_refused_even_if_asked_for(tmp_path):
    path = tmp_path / "pagemap-1.img"
    for body, words in (
        (message(vaddr=B, nr_pages=1, zero_or_flags=4), "field 4 is 4"),
        (message(vaddr=B, nr_pages=0, lazy_or_nr_pages=1), "field 2 is 0"),
        (message(vaddr=B, nr_pages=2, lazy_or_nr_pages=2), "field 5 is 2"),
    ):
        path.write_bytes(frame("pagemap", [b"\x08\x01", PLAIN, body]))
        image = decode(path.read_bytes(), path)
        with pytest.raises(ImageError, match=f"{words}, which the booleans dialect never says") as caught:
            FlatTable(Dialect.BOOLEANS).push(image, 0, Path("pages-1.img"), 8 * PAGE)
        assert (caught.value.offset, caught.value.address) == (14 + 4 + len(PLAIN), B)


def test_locate_finds_the_record_of_an_address(tmp_path):
    path = tmp_path / "pagemap-1.img"
    path.write_bytes(frame("pagemap", [b"\x08\x01", PLAIN, ONE]))
    assert locate(path, A) == 14
    assert locate(path, A + PAGE) is None
    assert locate(path, B + PAGE - 1) == 14 + 4 + len(PLAIN)
    assert locate(tmp_path / "none", A) is None


def test_the_builder_and_the_model_agree_on_a_round_trip(tmp_path):
    entries = [Entry(BASE, 2), Entry(BASE + 8 * PAGE, 1, "parent", lazy=False)]
    for dialect in ("flags", "flags64"):
        path = tmp_path / f"{dialect}.img"
        path.write_bytes(pagemap_image(entries, dialect, 7))
        assert read_entries(path) == (7, entries)
    assert page_pattern(BASE) != page_pattern(BASE, 1)
