# SPDX-License-Identifier: MIT
"""Chains of incremental dumps of a task that writes, maps, unmaps, moves and drops memory in between.

A model knows what every page should be; the kernel is asked at each dump whether the model is right, and the images
are read back by a reader of the tests' own.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from pathlib import Path

import pages_victim as pv
import pytest
from dump_harness import dump, entry_kinds, read_back
from pages_victim import BASE, PAGE, RW, Victim, word_page

from lazyd.dump.core import PagemapFormat, Track, track_method
from lazyd.image import Dialect, Kind, load
from lazyd.image.verify import verify

ARENA = 400
FILE_PAGES = 64
FORMS = {
    "flags": PagemapFormat(Dialect.FLAGS),
    "flags, eager holes": PagemapFormat(Dialect.FLAGS, lazy_holes=False),
    "flags, wide": PagemapFormat(Dialect.FLAGS, wide=True),
    "booleans": PagemapFormat(Dialect.BOOLEANS),
}


def file_page(number: int) -> bytes:
    return bytes([number + 1]) * PAGE


class Page:
    """What the model knows of a page: its bytes, whether a file backs it, and whether it may be used now."""

    __slots__ = ("data", "file", "usable")

    def __init__(self, file: int | None = None) -> None:
        self.file = file
        self.usable = True
        self.data = bytes(PAGE) if file is None else file_page(file)

    def drop(self) -> None:
        """MADV_DONTNEED."""
        self.data = bytes(PAGE) if self.file is None else file_page(self.file)


class Model:
    """A task and what its memory should be."""

    def __init__(self, victim: Victim, chance: random.Random, folder: Path) -> None:
        self.victim = victim
        self.chance = chance
        self.pages: dict[int, Page] = {}
        self.word = 1
        self.file = folder / "mapped"
        self.file.write_bytes(b"".join(file_page(number) for number in range(FILE_PAGES)))

    def span(self, most: int = 40) -> tuple[int, int]:
        """Some pages of the arena."""
        first = self.chance.randrange(ARENA)
        return first, min(self.chance.randint(1, most), ARENA - first)

    def held(self, most: int = 40) -> tuple[int, int] | None:
        """Some pages that are mapped."""
        first, count = self.span(most)
        while first < ARENA and first not in self.pages:
            first += 1
        length = 0
        while length < count and first + length in self.pages:
            length += 1
        return (first, length) if length else None

    def step(self) -> None:
        """Do one thing to the task and to the model."""
        actions = [self.map] * 2 + [self.write] * 6 + [self.move] * 2
        actions += [self.unmap, self.read, self.drop, self.protect, self.map_file, self.leave_mapping, self.fork]
        self.chance.choice(actions)()

    def map(self) -> None:
        first, count = self.span()
        self.victim.map(BASE + first * PAGE, count)
        self.pages.update({page: Page() for page in range(first, first + count)})

    def map_file(self) -> None:
        first, count = self.span(20)
        at = self.chance.randrange(FILE_PAGES - count)
        path = str(self.file)
        self.victim.command("mapfile", BASE + first * PAGE, count, RW, pv.MAP_PRIVATE, at, path)
        self.pages.update({first + i: Page(at + i) for i in range(count)})

    def unmap(self) -> None:
        first, count = self.span(30)
        self.victim.command("unmap", BASE + first * PAGE, count)
        for page in range(first, first + count):
            self.pages.pop(page, None)

    def write(self) -> None:
        span = self.held()
        if span is None or not all(self.pages[page].usable for page in range(span[0], sum(span))):
            return
        first, count = span
        step = self.chance.choice([1, 1, 2, 5])
        self.victim.write(BASE + first * PAGE, count, self.word, step)
        for page in range(first, first + count, step):
            self.pages[page].data = word_page(self.word + page - first)
        self.word += 1000

    def read(self) -> None:
        span = self.held()
        if span is not None and all(self.pages[page].usable for page in range(span[0], sum(span))):
            self.victim.read(BASE + span[0] * PAGE, span[1])

    def drop(self) -> None:
        span = self.held()
        if span is not None:
            self.victim.advise(BASE + span[0] * PAGE, span[1], pv.MADV_DONTNEED)
            for page in range(span[0], sum(span)):
                self.pages[page].drop()

    def protect(self) -> None:
        span = self.held()
        if span is not None:
            usable = self.chance.random() < 0.6
            self.victim.command("protect", BASE + span[0] * PAGE, span[1], RW if usable else pv.PROT_NONE)
            for page in range(span[0], sum(span)):
                self.pages[page].usable = usable

    def _move(self, flags: int) -> dict[int, Page] | None:
        span = self.held(20)
        if span is None:
            return None
        # Inside one VMA: what mremap does with several depends on the kernel, and where it stops on how many it met.
        at = BASE + span[0] * PAGE
        vma = next(m for m in self.victim.mappings() if m.start <= at < m.end)
        first, count = span[0], min(span[1], (vma.end - at) // PAGE)
        to = self.chance.randrange(ARENA - count)
        if first < to + count and to < first + count:
            return None
        self.victim.move(at, count, BASE + to * PAGE, flags)
        moved = {page: self.pages.pop(page) for page in range(first, first + count)}
        self.pages.update({page - first + to: what for page, what in moved.items()})
        return moved

    def move(self) -> None:
        self._move(0)

    def leave_mapping(self) -> None:
        """MREMAP_DONTUNMAP."""
        for page, what in (self._move(pv.MREMAP_DONTUNMAP) or {}).items():
            self.pages[page] = Page(what.file)
            self.pages[page].usable = what.usable

    def fork(self) -> None:
        """A child that writes into what it shares with the task until then."""
        span = self.held(10)
        if span is None or not all(self.pages[page].usable for page in range(span[0], sum(span))):
            return
        child = self.victim.command("fork", BASE + span[0] * PAGE, span[1], 1 << 40)
        pv.end(child)
        self.victim.command("reap", child)

    def check_kernel(self) -> None:
        """Ask the kernel whether all of this is so."""
        mapped = {
            (at - BASE) // PAGE
            for mapping in self.victim.mappings()
            if BASE <= mapping.start < BASE + ARENA * PAGE
            for at in range(mapping.start, mapping.end, PAGE)
        }
        assert mapped == set(self.pages), "the model does not know what is mapped"
        for page, what in self.pages.items():
            assert self.victim.memory(BASE + page * PAGE) == what.data, f"the model is wrong about page {page}"

    def expected(self) -> dict[int, bytes]:
        """What a restored task must have."""
        return {BASE + page * PAGE: what.data for page, what in self.pages.items()}

    def restored(self, found: dict[int, bytes]) -> dict[int, bytes]:
        """What a restored task has, by what the images have: the rest is zeros, or the file's."""
        return {
            BASE + page * PAGE: found.get(
                BASE + page * PAGE, bytes(PAGE) if what.file is None else file_page(what.file)
            )
            for page, what in self.pages.items()
        }


def start(victim: Victim, seed: int, folder: Path) -> Model:
    model = Model(victim, random.Random(seed), folder)
    for _ in range(10):
        model.map()
        model.write()
    return model


@pytest.fixture(autouse=True)
def _can_track():
    if track_method() is Track.NONE:
        pytest.skip("this kernel tracks no writes: Linux 6.7")


def run_chain(victim, folder: Path, form: PagemapFormat, depth: int, seed: int) -> None:
    """Dump a chain and check every level of it; the last is a dump that does not track."""
    model = start(victim, seed, folder)
    name = f"pagemap-{victim.pid}.img"
    known: dict[Path, dict[int, bytes]] = {}
    parents = 0
    for level in range(depth):
        for _ in range(model.chance.randint(0, 15)):
            model.step()
        path = folder / str(level)
        counts = dump(
            victim,
            path,
            victim.areas(BASE, pv.TOP),
            parent=folder / str(level - 1) if level else None,
            form=form,
            track=level + 1 < depth,
            while_stopped=model.check_kernel,
        )
        assert model.restored(read_back(path, name, form, known)) == model.expected(), f"level {level}"
        assert not verify(path, form.dialect.value), f"level {level}"
        kinds = list(entry_kinds(path, name, form).values())
        assert kinds.count("parent") == counts.parent
        assert kinds.count("dumped") == counts.dumped
        assert kinds.count("zero") == (counts.zero if form.has_zero_holes else 0)
        parents += counts.parent
    assert depth == 1 or parents > 50, "nothing was ever clean: nothing is tested"
    # And as lazyd itself reads the whole chain.
    with load(path, form.dialect.value) as checkpoint:
        by_kind = checkpoint.tasks[0].extents.pages_by_kind()
        assert by_kind[Kind.BROKEN] == by_kind[Kind.REMOTE] == 0
        assert by_kind[Kind.DUMPED] + by_kind[Kind.ZERO] == len(read_back(path, name, form, known))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize(("depth", "seeds"), [(1, 3), (5, 3)])
def test_chain(pages_binary, tmp_path, depth, seeds, form):
    for seed in range(seeds):
        with Victim(pages_binary) as victim:
            folder = tmp_path / str(seed)
            folder.mkdir()
            run_chain(victim, folder, form, depth, seed)


@pytest.mark.parametrize("form", [FORMS["flags"], FORMS["booleans"]], ids=["flags", "booleans"])
def test_deep_chain(victim, tmp_path, form):
    run_chain(victim, tmp_path, form, 50, 7)


def test_auto_dedup_frees_what_is_replaced_and_breaks_nothing(victim, tmp_path):
    form = FORMS["booleans"]
    model = start(victim, 3, tmp_path)
    name = f"pagemap-{victim.pid}.img"
    punched: list[int] = []
    written = 0
    for level in range(8):
        for _ in range(8):
            model.step()
            model.write()
        path, parent = tmp_path / str(level), tmp_path / str(level - 1) if level else None
        areas = victim.areas(BASE, pv.TOP)
        written += dump(victim, path, areas, parent=parent, form=form, track=True, punched=punched).bytes
        # Read all of the chain again: what was punched must not be what shows.
        assert model.restored(read_back(path, name, form)) == model.expected()
        assert not verify(path, "booleans")
        assert allocated(tmp_path) == written - sum(punched)
    assert sum(punched) > 50 * PAGE


def allocated(folder: Path) -> int:
    """How many bytes the pages images hold, by the kernel's word for data and holes."""
    total = 0
    for path in folder.glob("*/pages-*.img"):
        with path.open("rb") as pages:
            at, end = 0, path.stat().st_size
            with contextlib.suppress(OSError):  # ENXIO: no data from here on
                while at < end:
                    data = os.lseek(pages.fileno(), at, os.SEEK_DATA)
                    at = os.lseek(pages.fileno(), data, os.SEEK_HOLE)
                    total += at - data
    return total


def test_without_a_tracker_all_is_dumped_again(victim, tmp_path):
    form = FORMS["flags"]
    model = start(victim, 5, tmp_path)
    areas = victim.areas(BASE, pv.TOP)
    first = dump(victim, tmp_path / "0", areas, form=form)
    second = dump(victim, tmp_path / "1", areas, parent=tmp_path / "0", form=form)
    assert (second.dumped, second.parent) == (first.dumped, 0)
    found = read_back(tmp_path / "1", f"pagemap-{victim.pid}.img", form)
    assert model.restored(found) == model.expected()
    shutil.rmtree(tmp_path / "0")
    assert verify(tmp_path / "1"), "it names a parent that is gone"
