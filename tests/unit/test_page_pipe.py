# SPDX-License-Identifier: MIT
"""Page pipes: merging, entries in every dialect against protobuf, holes against the parent's table."""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path

import pytest
from images_builder import Entry, Task, build_chain, pagemap_image, read_entries

from lazyd.dump.core import PageKind, PagemapFormat, PagePipe, Run
from lazyd.image import Dialect, load

PAGE = 4096
BASE = 0x7F00_0000_0000
ZERO, PARENT, DUMPED = PageKind.ZERO, PageKind.PARENT, PageKind.DUMPED
WORDS = {ZERO: "zero", PARENT: "parent", DUMPED: "dumped"}


def make(runs: list[tuple[int, int, PageKind, bool]]) -> PagePipe:
    pipe = PagePipe()
    for page, pages, kind, lazy in runs:
        pipe.add(BASE + page * PAGE, pages, kind, lazy=lazy)
    return pipe


def random_pages(chance: random.Random, pages: int) -> list[tuple[PageKind, bool] | None]:
    """What each page of a stretch is, in runs of random lengths."""
    found: list[tuple[PageKind, bool] | None] = []
    while len(found) < pages:
        what = chance.choice([None, (ZERO, True), (PARENT, True), (PARENT, False), (DUMPED, True), (DUMPED, False)])
        found += [what] * chance.randint(1, 5)
    return found[:pages]


def pipe_of(pages: list[tuple[PageKind, bool] | None], chance: random.Random) -> PagePipe:
    """A pipe that is told of the pages in pieces of random lengths."""
    pipe = PagePipe()
    at = 0
    while at < len(pages):
        length = 1
        while at + length < len(pages) and pages[at + length] == pages[at] and chance.random() < 0.5:
            length += 1
        what = pages[at]
        if what is not None:
            pipe.add(BASE + at * PAGE, length, what[0], lazy=what[1])
        at += length
    return pipe


def model_runs(pages: list[tuple[PageKind, bool] | None]) -> list[Run]:
    """The runs there must be: as long as pages are alike."""
    runs: list[Run] = []
    for number, what in enumerate(pages):
        if what is None:
            continue
        at = BASE + number * PAGE
        if runs and runs[-1].end == at and (runs[-1].kind, runs[-1].lazy) == what:
            runs[-1] = runs[-1]._replace(pages=runs[-1].pages + 1)
        else:
            runs.append(Run(at, 1, *what))
    return runs


@pytest.mark.parametrize("seed", range(50))
def test_neighbours_merge_with_their_own_kind_only(seed):
    chance = random.Random(seed)
    pages = random_pages(chance, chance.randint(1, 200))
    pipe = pipe_of(pages, chance)
    assert list(pipe) == model_runs(pages)
    for kind in PageKind:
        assert pipe.pages(kind) == sum(1 for what in pages if what and what[0] is kind)
    assert pipe.lazy_pages == pages.count((DUMPED, True))


def written(pipe: PagePipe, form: PagemapFormat, pages_id: int = 7) -> bytes:
    with tempfile.TemporaryFile() as image:
        length = pipe.write_pagemap(image.fileno(), pages_id, form)
        image.seek(0)
        content = image.read()
    assert len(content) == length
    return content


@pytest.mark.parametrize(
    ("form", "dialect"),
    [
        (PagemapFormat(Dialect.FLAGS), "flags"),
        (PagemapFormat(Dialect.FLAGS, wide=True), "flags64"),
        (PagemapFormat(Dialect.BOOLEANS), "booleans"),
    ],
)
@pytest.mark.parametrize("seed", range(20))
def test_entries_are_what_protobuf_writes(form, dialect, seed):
    chance = random.Random(seed)
    pages = random_pages(chance, 300)
    entries = [
        Entry(run.start, run.pages, WORDS[run.kind], run.lazy)
        for run in model_runs(pages)
        if run.kind is not ZERO or dialect == "booleans"
    ]
    assert written(pipe_of(pages, chance), form) == pagemap_image(entries, dialect, 7)


def test_holes_are_lazy_only_where_that_is_asked_for():
    pipe = make([(0, 1, PARENT, True), (1, 1, DUMPED, True)])
    entries = [Entry(BASE, 1, "parent", lazy=False), Entry(BASE + PAGE, 1, "dumped", lazy=True)]
    assert written(pipe, PagemapFormat(lazy_holes=False)) == pagemap_image(entries, "flags", 7)


def test_a_run_of_more_than_32_bits_of_pages_is_cut():
    pipe = PagePipe()
    pipe.add(0x10000, (1 << 32) + 5, ZERO)
    entries = [Entry(0x10000, (1 << 32) - 1, "zero"), Entry(0x10000 + ((1 << 32) - 1) * PAGE, 6, "zero")]
    assert written(pipe, PagemapFormat(Dialect.BOOLEANS)) == pagemap_image(entries, "booleans", 7)


def test_a_million_entries_are_written_fast(tmp_path):
    pipe = PagePipe()
    for number in range(1_000_000):
        pipe.add(BASE + 2 * number * PAGE, 1, DUMPED, lazy=True)
    fd = os.open(tmp_path / "pagemap-1.img", os.O_RDWR | os.O_CREAT)
    before = time.monotonic()
    pipe.write_pagemap(fd, 1, PagemapFormat())
    took = time.monotonic() - before
    os.close(fd)
    assert took < 1
    pages_id, entries = read_entries(tmp_path / "pagemap-1.img")
    assert (pages_id, len(entries), entries[-1].start) == (1, 1_000_000, BASE + 1_999_998 * PAGE)


def parent_table(directory: Path, levels: list[list[Entry]]):
    """The flat table of a chain that was written with protobuf, the youngest level first."""
    leaf = build_chain(directory, [[Task(1, entries)] for entries in levels])
    with load(leaf) as checkpoint:
        return checkpoint.tasks[0].extents


def entry(page: int, pages: int, kind: str = "dumped") -> Entry:
    return Entry(BASE + page * PAGE, pages, kind)


def test_parent_holes_are_looked_up_however_the_parent_is_cut(tmp_path):
    parent = parent_table(
        tmp_path,
        [
            [entry(0, 2), entry(2, 3, "parent"), entry(5, 1), entry(8, 2), entry(12, 1, "zero")],
            [entry(0, 1), entry(1, 2), entry(3, 1), entry(4, 4)],
        ],
    )
    covered = [(0, 1), (0, 6), (1, 4), (3, 3), (8, 2), (9, 1), (12, 1)]
    for page, pages in covered:
        assert make([(page, pages, PARENT, True)]).first_hole_not_in(parent) is None
    # The first page that is missing, whether the hole begins there, runs into it, or spans a gap.
    for page, pages, missing in [(6, 1, 6), (5, 2, 6), (0, 20, 6), (7, 2, 7), (8, 3, 10), (13, 1, 13), (12, 2, 13)]:
        assert make([(page, pages, PARENT, True)]).first_hole_not_in(parent) == BASE + missing * PAGE
    assert make([(6, 2, DUMPED, True), (10, 2, ZERO, True)]).first_hole_not_in(parent) is None
    several = make([(0, 1, PARENT, True), (5, 1, PARENT, False), (9, 1, PARENT, True), (11, 1, PARENT, True)])
    assert several.first_hole_not_in(parent) == BASE + 11 * PAGE


def test_bytes_that_only_a_page_server_has_are_no_parent(tmp_path):
    parent = parent_table(tmp_path, [[entry(0, 1), entry(1, 1, "remote")]])
    assert make([(0, 2, PARENT, True)]).first_hole_not_in(parent) == BASE + PAGE


@pytest.mark.parametrize("seed", range(50))
def test_holes_against_a_model(tmp_path, seed):
    chance = random.Random(seed)
    size = 60
    has = [chance.random() < 0.8 for _ in range(size)]
    entries, at = [], 0
    while at < size:
        length = chance.randint(1, 6)
        if all(has[at : at + length]):
            entries.append(entry(at, min(length, size - at), chance.choice(["dumped", "dumped", "zero"])))
        else:
            has[at : at + length] = [False] * len(has[at : at + length])
        at += length
    parent = parent_table(tmp_path, [entries])
    pages = random_pages(chance, size)
    missing = [i for i, what in enumerate(pages) if what and what[0] is PARENT and not has[i]]
    pipe = pipe_of(pages, chance)
    assert pipe.first_hole_not_in(parent) == (BASE + missing[0] * PAGE if missing else None)
    pipe.require_parent(parent)
    for number in missing:
        pages[number] = (DUMPED, pages[number][1])
    assert list(pipe) == model_runs(pages)
    assert pipe.pages(PARENT) == sum(1 for what in pages if what and what[0] is PARENT)
    assert pipe.first_hole_not_in(parent) is None


def test_punching_takes_what_is_replaced_and_nothing_else(tmp_path):
    levels = [[entry(0, 4), entry(4, 2, "parent"), entry(6, 2)], [entry(3, 4)]]
    leaf = build_chain(tmp_path, [[Task(1, entries)] for entries in levels])
    before = [(tmp_path / str(n) / "pages-1.img").read_bytes() for n in (0, 1)]
    pipe = make(
        [(1, 2, DUMPED, True), (3, 1, PARENT, True), (4, 1, ZERO, True), (5, 1, PARENT, True), (6, 1, DUMPED, True)]
    )
    with load(leaf) as checkpoint:
        fds = [os.open(source.path, os.O_RDWR) for source in checkpoint.sources]
        try:
            assert pipe.punch(checkpoint.tasks[0].extents, fds) == 4 * PAGE
        finally:
            for fd in fds:
                os.close(fd)
    after = [(tmp_path / str(n) / "pages-1.img").read_bytes() for n in (0, 1)]
    # Level 0 holds pages 0-3, 6, 7; level 1 holds 3-6, of which 4 and 5 show.
    for number, punched in [(0, {1, 2, 4}), (1, {1})]:
        pages = len(before[number]) // PAGE
        assert len(after[number]) == len(before[number])
        for i in range(pages):
            old, new = (content[i * PAGE : (i + 1) * PAGE] for content in (before[number], after[number]))
            assert new == (bytes(PAGE) if i in punched else old), (number, i)
