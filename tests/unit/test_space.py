# SPDX-License-Identifier: MIT
"""The address-space model of the engine against a naive one: a dictionary with an entry a page."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from lazyd.uffd._engine import ffi, lib

PAGE = 4096
BASE = 0x7000_0000_0000
PAGES = 160  # far more than a word of states, so that runs cross words

MISSING, PRESENT, REMOVED = lib.LZ_MISSING, lib.LZ_PRESENT, lib.LZ_REMOVED
DUMPED, ZERO, REMOTE = lib.LZ_KIND_DUMPED, lib.LZ_KIND_ZERO, lib.LZ_KIND_REMOTE


@dataclass
class Naive:
    """What each run page shows and how it is: {run page: (image page, state)}; image page -> source offset."""

    image: dict[int, tuple[int, int] | None]  # image page -> (kind, offset)
    pages: dict[int, tuple[int, int]] = field(default_factory=dict)

    def copy(self) -> Naive:
        return Naive(self.image, dict(self.pages))

    def unmap(self, first: int, count: int) -> None:
        for page in range(first, first + count):
            self.pages.pop(page, None)

    def remap(self, first: int, to: int, count: int) -> None:
        moved = {page - first + to: self.pages.pop(page) for page in range(first, first + count) if page in self.pages}
        self.unmap(to, count)
        self.pages.update(moved)

    def mark(self, first: int, count: int, state: int) -> None:
        for page in range(first, first + count):
            if page in self.pages:
                self.pages[page] = (self.pages[page][0], state)

    def is_missing(self, page: int) -> bool:
        if page not in self.pages or self.pages[page][1] != MISSING:
            return False
        row = self.image.get(self.pages[page][0])
        return row is not None and row[0] != ZERO

    def missing(self, first: int = 0, end: int = 1 << 60) -> list[int]:
        return [page for page in sorted(self.pages) if first <= page < end and self.is_missing(page)]


extents = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 30), st.sampled_from([DUMPED, DUMPED, ZERO, REMOTE])),
    max_size=10,
)
vmas = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 70)), min_size=1, max_size=5)
place = st.integers(0, PAGES + 40)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("unmap"), place, st.integers(1, 60), place),
        st.tuples(st.just("remap"), place, st.integers(1, 60), place),
        st.tuples(st.just("remove"), place, st.integers(1, 60), place),
        st.tuples(st.just("present"), place, st.integers(1, 60), place),
        st.tuples(st.just("fill"), place, st.integers(1, 60), place),
        st.tuples(st.just("fork"), place, st.integers(1, 60), place),
    ),
    max_size=40,
)


def check_same(arena, space, naive: Naive) -> None:
    regions = [lib.lz_space_region(arena, space, number)[0] for number in range(space.regions)]
    shown: dict[int, tuple[int, int]] = {}
    end = 0
    for region in regions:
        assert region.start >= end, "regions overlap or are out of order"
        assert region.pages > 0
        end = region.start + region.pages * PAGE
        for page in range(region.pages):
            address = region.start + page * PAGE
            shown[(address - BASE) // PAGE] = (
                (region.image_start - BASE) // PAGE + page,
                lib.lz_space_state(arena, space, address),
            )
    assert shown == naive.pages
    # The runs of missing pages, found region by region in bounded steps, are the naive model's, with their offsets.
    found: list[int] = []
    run = ffi.new("struct lz_run *")
    for number, region in enumerate(regions):
        page = 0
        while lib.lz_space_next_missing(arena, space, number, page, region.pages, 7, run):
            assert 0 < run.pages <= 7
            assert run.start == region.start + run.page * PAGE
            for i in range(run.pages):
                run_page = (run.start - BASE) // PAGE + i
                found.append(run_page)
                kind, offset = naive.image[naive.pages[run_page][0]]
                assert run.kind == kind
                if kind == DUMPED:
                    assert run.offset + i * PAGE == offset
            page = run.page + run.pages
    assert found == naive.missing()


@settings(max_examples=400, deadline=None)
@given(extents, vmas, operations)
def test_space_matches_a_naive_model(rows, mapped, steps) -> None:
    image: dict[int, tuple[int, int] | None] = {}
    table = []
    at = offset = 0
    for gap, pages, kind in rows:
        at += gap
        here = offset if kind == DUMPED else 0
        table.append({"start": BASE + at * PAGE, "offset": here, "pages": pages, "source": 0, "kind": kind, "lazy": 1})
        for i in range(pages):
            image[at + i] = (kind, offset + i * PAGE)
        at += pages
        offset += pages * PAGE if kind == DUMPED else 0
    naive = Naive(image)
    ranges = []
    at = 0
    for gap, pages in mapped:
        at += gap
        ranges.append({"start": BASE + at * PAGE, "end": BASE + (at + pages) * PAGE})
        naive.pages.update({at + i: (at + i, MISSING) for i in range(pages)})
        at += pages

    error = ffi.new("int *")
    arena = lib.lz_arena_new(error)
    assert arena != ffi.NULL
    try:
        space = ffi.new("struct lz_space *")
        c_table, c_ranges = ffi.new("struct lz_extent[]", table), ffi.new("struct lz_vma[]", ranges)
        assert lib.lz_space_init(arena, space, c_table, len(table), c_ranges, len(ranges)) == 0
        forks: list[tuple[object, Naive]] = []
        check_same(arena, space, naive)
        for name, first, count, to in steps:
            start, end = BASE + first * PAGE, BASE + (first + count) * PAGE
            assert lib.lz_space_count_missing(arena, space, start, end) == len(naive.missing(first, first + count))
            if name == "unmap":
                assert lib.lz_space_unmap(arena, space, start, end) == 0
                naive.unmap(first, count)
            elif name == "remap":
                if abs(to - first) < count:
                    continue  # the kernel refuses ranges that overlap
                assert lib.lz_space_remap(arena, space, start, BASE + to * PAGE, count * PAGE) == 0
                naive.remap(first, to, count)
            elif name == "remove":
                lib.lz_space_remove(arena, space, start, end)
                naive.mark(first, count, REMOVED)
            elif name == "present":
                lib.lz_space_mark(arena, space, start, count, PRESENT)
                naive.mark(first, count, PRESENT)
            elif name == "fill":
                run = ffi.new("struct lz_run *")
                number = lib.lz_space_find(arena, space, start)
                assert (number >= 0) == (first in naive.pages)
                if number >= 0:
                    region = lib.lz_space_region(arena, space, number)[0]
                    page = (start - region.start) // PAGE
                    if lib.lz_space_next_missing(arena, space, number, page, region.pages, count, run):
                        lib.lz_space_mark(arena, space, run.start, run.pages, PRESENT)
                        naive.mark((run.start - BASE) // PAGE, run.pages, PRESENT)
            else:
                child = ffi.new("struct lz_space *")
                assert lib.lz_space_fork(arena, space, child) == 0
                forks.append((child, naive.copy()))
            check_same(arena, space, naive)
        # What the parent did later has not touched its children, and the last to go frees the table.
        lib.lz_space_drop(arena, space)
        for child, then in forks:
            check_same(arena, child, then)
            lib.lz_space_drop(arena, child)
    finally:
        lib.lz_arena_free(arena)


def test_init_refuses_rows_out_of_order() -> None:
    error = ffi.new("int *")
    arena = lib.lz_arena_new(error)
    space = ffi.new("struct lz_space *")
    row = {"offset": 0, "pages": 2, "source": 0, "kind": DUMPED, "lazy": 1}
    good, overlapping = {"start": BASE, **row}, {"start": BASE + PAGE, **row}
    none = ffi.new("struct lz_vma[]", 0)
    for rows in (
        [overlapping, good],
        [good, overlapping],
        [{**good, "start": BASE + 1}],
        [{**good, "pages": 0}],
    ):
        table = ffi.new("struct lz_extent[]", rows)
        assert lib.lz_space_init(arena, space, table, len(rows), none, 0) < 0
    for ranges in ([{"start": BASE, "end": BASE}], [{"start": BASE + 1, "end": BASE + PAGE}]):
        vmas = ffi.new("struct lz_vma[]", ranges)
        assert lib.lz_space_init(arena, space, ffi.NULL, 0, vmas, len(ranges)) < 0
    lib.lz_arena_free(arena)
