# SPDX-License-Identifier: MIT
"""Pages that were copied before the task was stopped: which are taken, and that they come to lie in order."""

from __future__ import annotations

import os
import random
import tempfile

import pytest

from lazyd.dump.core import EarlyPages, PageKind, PagePipe

PAGE = 4096
BASE = 0x7F00_0000_0000
BATCH = (256 << 10) // PAGE
BYTE = {True: b"E", False: b"L"}


def content(number: int, *, is_early: bool) -> bytes:
    """What a page holds; one that was written since holds something else than before."""
    return (BYTE[is_early] + number.to_bytes(7, "little")) * (PAGE // 8)


def random_numbers(chance: random.Random, span: int, most: int) -> list[int]:
    """The numbers of some pages, in runs of up to so many."""
    found: list[int] = []
    at = 0
    while at < span:
        length = chance.randint(1, most)
        if chance.random() < 0.6:
            found += range(at, min(at + length, span))
        at += length
    return found


def pipe_of(kinds: dict[int, PageKind], lazy: set[int]) -> PagePipe:
    pipe = PagePipe()
    for number, kind in kinds.items():
        pipe.add(BASE + number * PAGE, 1, kind, lazy=number in lazy)
    return pipe


def write(fd: int, pages: list[bytes]) -> None:
    for index, page in enumerate(pages):
        os.pwrite(fd, page, index * PAGE)


@pytest.mark.parametrize(("span", "most"), [(30, 3), (200, 70), (3000, 900)])
def test_random_pages_against_sets(span, most):
    """A model: sets of numbers. What is clean and was copied keeps its early bytes, all else has the late ones."""
    chance = random.Random(span)
    moved = 0
    for _ in range(60 if span < 1000 else 12):
        early_numbers = random_numbers(chance, span, most)
        lazy = set(random_numbers(chance, span, most))
        early = EarlyPages(pipe_of(dict.fromkeys(early_numbers, PageKind.DUMPED), lazy))
        batches = -(-len(early_numbers) // BATCH)
        for batch in range(batches):
            early.done[batch] = chance.random() < 0.8
        copied = {number for place, number in enumerate(early_numbers) if early.done[place // BATCH]}
        # Most pages stay; some are gone, some new, some written.
        there = {number for number in early_numbers if chance.random() < 0.97}
        there |= {number for number in random_numbers(chance, span, most) if chance.random() < 0.1}
        kinds = {
            number: chance.choices([PageKind.PARENT, PageKind.DUMPED, PageKind.ZERO], [8, 1, 1])[0]
            for number in sorted(there)
        }
        pipe = pipe_of(kinds, lazy)
        pipe.match_early(early)
        taken = {number for number, kind in kinds.items() if kind is PageKind.PARENT and number in copied}
        late = [number for number, kind in kinds.items() if kind is not PageKind.ZERO and number not in taken]
        whole = sorted(taken | set(late))
        assert pipe.pages(PageKind.PARENT) == len(taken)
        assert pipe.pages(PageKind.DUMPED) == len(late)
        settled = pipe.settled()
        expected = {
            number: PageKind.ZERO if kind is PageKind.ZERO else PageKind.DUMPED for number, kind in kinds.items()
        }
        assert list(settled) == list(pipe_of(expected, lazy))
        assert settled.lazy_pages == len(lazy & set(whole))
        with tempfile.TemporaryFile() as image, tempfile.TemporaryFile() as file:
            write(image.fileno(), [content(number, is_early=True) for number in early_numbers])
            write(file.fileno(), [content(number, is_early=False) for number in late])
            pipe.merge_early(early, image.fileno(), file.fileno())
            for place, number in enumerate(whole):
                page = os.pread(image.fileno(), PAGE, place * PAGE)
                assert page == content(number, is_early=number in taken), f"page {number} at {place}"
        moved += sum(place != early_numbers.index(n) for place, n in enumerate(whole[:50]) if n in taken)
    assert moved, "nothing had to be moved: nothing is tested"


def test_what_cannot_be_read_or_written_is_an_error():
    early = EarlyPages(pipe_of({0: PageKind.DUMPED, 1: PageKind.DUMPED}, set()))
    early.done[0] = 1
    pipe = pipe_of({1: PageKind.PARENT, 2: PageKind.DUMPED}, set())
    pipe.match_early(early)
    with tempfile.TemporaryFile() as image, tempfile.TemporaryFile() as file:
        write(image.fileno(), [content(0, is_early=True), content(1, is_early=True)])
        with pytest.raises(OSError, match="Input/output error"):  # the late page is not there
            pipe.merge_early(early, image.fileno(), file.fileno())
        file.write(content(2, is_early=False))
        file.flush()
        reading = os.open(f"/proc/self/fd/{image.fileno()}", os.O_RDONLY)
        try:
            with pytest.raises(OSError, match="Bad file descriptor"):
                pipe.merge_early(early, reading, file.fileno())
        finally:
            os.close(reading)
