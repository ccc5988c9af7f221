# SPDX-License-Identifier: MIT
"""Dumping a real task's memory: what a zero hole is and is not, and what goes wrong in one clear line."""

from __future__ import annotations

import fcntl
import itertools
import os
import struct
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pages_victim as pv
import pytest
from dump_harness import dump, entry_kinds, read_back
from images_builder import Entry, Task, build_checkpoint, read_entries
from pages_victim import BASE, PAGE, RW, Victim, word_page

from lazyd.dump.core import (
    Area,
    AreaKind,
    AreaList,
    PageKind,
    PagemapFormat,
    PagePipe,
    Progress,
    Scanner,
    Source,
    Track,
    track_method,
)
from lazyd.dump.memory import MemoryDump, dump_memory
from lazyd.dump.transfer import ImageType, LocalImages, MemoryImage
from lazyd.errors import DumpError, ImageError, SystemCallError
from lazyd.image import Dialect, Kind, load
from lazyd.image.verify import verify
from lazyd.image.writer import ImagesWriter

BOOLEANS, FLAGS = PagemapFormat(Dialect.BOOLEANS), PagemapFormat(Dialect.FLAGS)

# ---- the zero hole, as a table ----

# What a page was when the parent was dumped, and what happens to it then: (name, before, after).
CLASSES = ["unmapped", "untouched", "zero", "data", "zeros of its own"]


def set_up(victim: Victim, at: int, what: str) -> None:
    """Bring the page at `at`, which is unmapped, into a state."""
    if what == "unmapped":
        return
    victim.map(at, 1)
    if what == "zero":
        victim.read(at, 1)
    elif what == "data":
        victim.write(at, 1, at)
    elif what == "zeros of its own":
        victim.write(at, 1, 0)


def change(victim: Victim, at: int, before: str, after: str) -> None:
    """Bring it from one state into another; from a state into itself: nothing is done to it."""
    if before == after:
        return
    if before != "unmapped":
        victim.command("unmap", at, 1)
    set_up(victim, at, after)


# What the second dump must say of a page, by (before, after). Zero is decided before parent, parent before dumped.
DECISIONS = {
    **{(before, "unmapped"): None for before in CLASSES},
    **{(before, "untouched"): None for before in CLASSES},
    **{(before, "zero"): "zero" for before in CLASSES},
    **{(before, "data"): "dumped" for before in CLASSES},
    **{(before, "zeros of its own"): "dumped" for before in CLASSES},
    ("data", "data"): "parent",
    ("zeros of its own", "zeros of its own"): "parent",
}


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("form", [BOOLEANS, FLAGS], ids=["booleans", "flags"])
def test_each_class_and_each_order_of_decisions(victim, tmp_path, form, lazy):
    """All pairs of states, in one task: what is written, what is left out, what a reader gets."""
    if track_method() is Track.NONE:
        pytest.skip("this kernel tracks no writes: Linux 6.7")
    pairs = list(itertools.product(CLASSES, CLASSES))
    assert set(pairs) == set(DECISIONS)
    # Two pages apart, so that each is an entry of its own.
    places = {pair: BASE + 2 * number * PAGE for number, pair in enumerate(pairs)}
    for (before, _), at in places.items():
        set_up(victim, at, before)
    # A page that is clean and not zero anywhere, so that there is always a parent to speak of.
    victim.map(BASE - 2 * PAGE, 1)
    victim.write(BASE - 2 * PAGE, 1, 77)

    def areas() -> list[Area]:
        return [a._replace(lazy=lazy) for a in victim.areas(BASE - 2 * PAGE, pv.TOP)]

    dump(victim, tmp_path / "0", areas(), form=form, track=True)
    for (before, after), at in places.items():
        change(victim, at, before, after)
    counts = dump(victim, tmp_path / "1", areas(), parent=tmp_path / "0", form=form)
    name = f"pagemap-{victim.pid}.img"
    found = entry_kinds(tmp_path / "1", name, form)
    for pair, at in places.items():
        expected = DECISIONS[pair]
        if expected == "zero" and form is FLAGS:
            expected = None
        assert found.get(at) == expected, pair
    assert counts.zero == 5
    assert counts.parent == 3
    assert counts.dumped == 8
    # What a reader makes of it: bytes from here, bytes from the parent, zeros said so, and zeros unsaid.
    pages = read_back(tmp_path / "1", name, form)
    with load(tmp_path / "1", form.dialect.value) as checkpoint:
        extents = {at: extent for extent in checkpoint.tasks[0].extents for at in range(extent.start, extent.end, PAGE)}
    assert not verify(tmp_path / "1", form.dialect.value)
    for (before, after), at in places.items():
        if after == "unmapped":
            continue
        assert pages.get(at, bytes(PAGE)) == victim.memory(at), (before, after)
        kind = extents[at].kind if at in extents else None
        if DECISIONS[before, after] in ("parent", "dumped"):
            assert kind is Kind.DUMPED
            # The booleans dialect cannot say of a page that it is not lazy.
            assert extents[at].lazy is (lazy or form is BOOLEANS)
        else:
            assert kind is (Kind.ZERO if after == "zero" and form is BOOLEANS else None)


def test_holes_merge_with_their_own_kind_only(victim, tmp_path):
    if track_method() is Track.NONE:
        pytest.skip("this kernel tracks no writes: Linux 6.7")
    victim.map(BASE, 12)
    for at, kind in enumerate("dddzzzpppppp"):
        if kind == "z":
            victim.read(BASE + at * PAGE, 1)
        else:
            victim.write(BASE + at * PAGE, 1, at + 1)
    areas = victim.areas(BASE, pv.TOP)
    dump(victim, tmp_path / "0", areas, form=BOOLEANS, track=True)
    victim.write(BASE, 3, 100)
    victim.advise(BASE + 9 * PAGE, 2, pv.MADV_DONTNEED)
    victim.read(BASE + 9 * PAGE, 1)
    dump(victim, tmp_path / "1", areas, parent=tmp_path / "0", form=BOOLEANS)
    entries = read_entries(tmp_path / "1" / f"pagemap-{victim.pid}.img", "booleans")[1]
    assert [((e.start - BASE) // PAGE, e.pages, e.kind) for e in entries] == [
        (0, 3, "dumped"),
        (3, 3, "zero"),
        (6, 3, "parent"),
        (9, 1, "zero"),
        (11, 1, "parent"),
    ]


def test_zero_pages_cost_nothing(victim, tmp_path):
    """A GiB that was only read: no byte of it is written, in either dialect."""
    pages = 1 << 18
    victim.map(BASE, pages)
    victim.read(BASE, pages)
    for form in (BOOLEANS, FLAGS):
        path = tmp_path / form.dialect.value
        counts = dump(victim, path, victim.areas(BASE, pv.TOP), form=form)
        assert (counts.zero, counts.dumped, counts.bytes) == (pages, 0, 0)
        assert (path / "pages-1.img").stat().st_size == 0
        assert (path / f"pagemap-{victim.pid}.img").stat().st_size < 64


def test_memory_of_every_protection_is_read(victim, tmp_path):
    victim.map(BASE, 200)
    victim.write(BASE, 200, 1)
    for start, prot in [(3, pv.PROT_NONE), (4, 1), (60, pv.PROT_NONE), (61, pv.PROT_NONE), (199, pv.PROT_NONE)]:
        victim.command("protect", BASE + start * PAGE, 1, prot)
    victim.command("protect", BASE + 100 * PAGE, 70, pv.PROT_NONE)
    dump(victim, tmp_path / "images", victim.areas(BASE, pv.TOP), form=FLAGS)
    found = read_back(tmp_path / "images", f"pagemap-{victim.pid}.img", FLAGS)
    assert found == {BASE + i * PAGE: word_page(1 + i) for i in range(200)}


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_threads_write_what_one_would(victim, tmp_path, step, threads):
    pages = 20_000
    victim.map(BASE, pages)
    victim.write(BASE, pages, 1, step)
    with ImagesWriter(tmp_path / "images", parent=None) as writer, victim.stopped():
        dump_memory(victim.pid, victim.areas(BASE, pv.TOP), LocalImages(writer, FLAGS, threads=threads))
        writer.publish()
    content = (tmp_path / "images/pages-1.img").read_bytes()
    assert content == b"".join(word_page(1 + i) for i in range(0, pages, step))


@pytest.mark.parametrize("expected", [0, PAGE, 10 * PAGE + 5, 1000 * PAGE, 5000 * PAGE])
def test_room_for_another_number_of_pages_than_come(victim, tmp_path, expected):
    """What was made ready is too much, too little, or right: the image is as long as its pages, and right."""
    victim.map(BASE, 3000)
    victim.write(BASE, 3000, 1, 3)
    with ImagesWriter(tmp_path / "images", parent=None) as writer, victim.stopped():
        images = LocalImages(writer, FLAGS)
        memory = MemoryDump(images)
        memory._prepared[victim.pid] = images.open(MemoryImage(ImageType.TASK, victim.pid), expected)
        memory.dump(victim.pid, victim.areas(BASE, pv.TOP))
        memory.finish()
        writer.publish()
    image = tmp_path / "images/pages-1.img"
    assert image.read_bytes() == b"".join(word_page(1 + i) for i in range(0, 3000, 3))
    assert image.stat().st_blocks * 512 <= 1000 * PAGE + 65536, "what was reserved was not given back"


def test_shared_memory_is_dumped_once(victim, tmp_path):
    """An object that two mappings show is in one image, as long as the furthest mapping sees it."""
    victim.map(BASE, 20, RW, pv.MAP_SHARED)
    victim.write(BASE + 2 * PAGE, 3, 7)
    victim.command("remap", BASE, 0, 20, pv.MREMAP_MAYMOVE | pv.MREMAP_FIXED, BASE + (1 << 30))  # a second view
    victim.write(BASE + (1 << 30) + 9 * PAGE, 1, 70)
    areas = victim.areas(BASE, pv.TOP)
    assert len({area.shmid for area in areas}) == 1
    assert len(areas) == 2
    counts = dump(victim, tmp_path / "images", areas, form=FLAGS)
    assert (counts.shared_dumped, counts.dumped) == (4, 0)
    found = read_back(tmp_path / "images", f"pagemap-shmem-{areas[0].shmid}.img", FLAGS)
    assert found == {
        2 * PAGE: word_page(7),
        3 * PAGE: word_page(8),
        4 * PAGE: word_page(9),
        9 * PAGE: word_page(70),
    }


# ---- what goes wrong ----


def test_a_poisoned_page_fails_the_dump_and_is_named(victim, tmp_path):
    victim.map(BASE, 4)
    victim.write(BASE, 2, 1)
    uffd = victim.uffd()
    try:
        fcntl.ioctl(uffd, 0xC018AA3F, struct.pack("<QQQ", 0xAA, 1 << 14, 0))  # UFFDIO_API, POISON
        fcntl.ioctl(uffd, 0xC020AA00, struct.pack("<QQQQ", BASE, 4 * PAGE, 1, 0))  # UFFDIO_REGISTER, missing
        fcntl.ioctl(uffd, 0xC020AA08, struct.pack("<QQQq", BASE + 3 * PAGE, PAGE, 0, 0))  # UFFDIO_POISON
        with pytest.raises(DumpError, match=rf"task {victim.pid}: the page at {BASE + 3 * PAGE:#x} cannot be read"):
            dump(victim, tmp_path / "images", victim.areas(BASE, pv.TOP))
    finally:
        os.close(uffd)
    assert not (tmp_path / "images").exists()
    victim.read(BASE, 2)  # it goes on


@contextmanager
def small_disk(folder: Path, size: str):
    """A filesystem of its own that is soon full."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("track", [False, True])
def test_a_full_disk(victim, tmp_path, track):
    if track and track_method() is Track.NONE:
        pytest.skip("this kernel tracks no writes: Linux 6.7")
    victim.map(BASE, 1000)
    victim.write(BASE, 1000, 1)
    with small_disk(tmp_path / "disk", "1m") as disk:
        full = r"images/pages-1\.img: write: ENOSPC, no space left on device \(make room there"
        with pytest.raises(SystemCallError, match=full):
            dump(victim, disk / "images", victim.areas(BASE, pv.TOP), track=track)
        assert not list(disk.iterdir()), "something is left"
    assert victim.memory(BASE) == word_page(1)
    # And what was tracked then is not believed: nothing was published.
    counts = dump(victim, tmp_path / "images", victim.areas(BASE, pv.TOP), form=BOOLEANS, track=track)
    assert (counts.dumped, counts.parent) == (1000, 0)


def pipe_with_hole(at: int, pages: int) -> PagePipe:
    pipe = PagePipe()
    pipe.add(at, pages, PageKind.PARENT)
    return pipe


def test_a_parent_hole_that_the_parent_does_not_have(tmp_path):
    entries = [Entry(BASE, 2), Entry(BASE + 2 * PAGE, 2, "zero"), Entry(BASE + 5 * PAGE, 1)]
    parent = build_checkpoint(tmp_path / "old", [Task(7, entries)], dialect="booleans")
    with ImagesWriter(tmp_path / "new", parent=parent) as writer:
        images = LocalImages(writer, BOOLEANS)
        transfer = images.open(MemoryImage(ImageType.TASK, 7))
        transfer.write_hole(pipe_with_hole(BASE + PAGE, 3))
        with pytest.raises(DumpError, match=rf"{parent}, pagemap-7\.img, address {BASE + 4 * PAGE:#x}: .*no bytes"):
            transfer.write_hole(pipe_with_hole(BASE + PAGE, 5))
        other = images.open(MemoryImage(ImageType.TASK, 8))
        with pytest.raises(DumpError, match=rf"{parent}: no pagemap-8\.img"):
            other.write_hole(pipe_with_hole(BASE, 1))
        images.close()


def cut_pages(images: Path) -> None:
    os.truncate(images / "pages-1.img", PAGE)


def remove_pages(images: Path) -> None:
    (images / "pages-1.img").unlink()


def cut_pagemap(images: Path) -> None:
    os.truncate(images / "pagemap-7.img", (images / "pagemap-7.img").stat().st_size - 1)


@pytest.mark.parametrize("level", ["parent", "grandparent"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [(cut_pages, "too short"), (remove_pages, "missing"), (cut_pagemap, "truncated")],
)
def test_a_chain_that_is_not_whole(tmp_path, damage, reason, level):
    grandparent = build_checkpoint(tmp_path / "grandparent", [Task(7, [Entry(BASE, 4)])])
    entries = [Entry(BASE, 2, "parent"), Entry(BASE + 4 * PAGE, 2)]
    parent = build_checkpoint(tmp_path / "parent", [Task(7, entries)], parent=grandparent)
    with ImagesWriter(tmp_path / "new", parent=parent) as writer:
        LocalImages(writer, FLAGS).open(MemoryImage(ImageType.TASK, 7)).close()
    damage(tmp_path / level)
    with (
        ImagesWriter(tmp_path / "new", parent=parent) as writer,
        pytest.raises(ImageError, match=reason) as error,
    ):
        LocalImages(writer, FLAGS).open(MemoryImage(ImageType.TASK, 7))
    assert error.value.path.parent == tmp_path / level


@pytest.mark.parametrize(("dialect", "form"), [("booleans", FLAGS), ("flags", BOOLEANS), ("flags64", BOOLEANS)])
def test_a_parent_in_another_dialect(tmp_path, dialect, form):
    """A chain is in one dialect: readers decide by all of it."""
    parent = build_checkpoint(tmp_path / "old", [Task(7, [Entry(BASE, 2)])], dialect=dialect)
    other = "booleans" if dialect == "booleans" else "flags"
    with (
        ImagesWriter(tmp_path / "new", parent=parent) as writer,
        pytest.raises(ImageError, match=rf"in the {other} dialect.*--pagemap-format {other}"),
    ):
        LocalImages(writer, form).open(MemoryImage(ImageType.TASK, 7))


def test_a_task_that_is_gone(pages_binary, tmp_path):
    with Victim(pages_binary) as victim:
        victim.map(BASE, 1)
        victim.write(BASE, 1, 1)
        areas = victim.areas(BASE, pv.TOP)
    with (
        ImagesWriter(tmp_path / "images", parent=None) as writer,
        pytest.raises(SystemCallError, match="the task is gone"),
    ):
        dump_memory(victim.pid, areas, LocalImages(writer))
    assert not list(tmp_path.iterdir())


def test_a_task_that_dies_while_it_is_dumped(victim, tmp_path):
    victim.map(BASE, 1000)
    victim.write(BASE, 1000, 1)
    areas = victim.areas(BASE, pv.TOP)
    pipe = PagePipe()
    with Scanner(victim.pid) as scanner:
        scanner.scan(AreaList(areas), pipe)
        with ImagesWriter(tmp_path / "images", parent=None) as writer:
            transfer = LocalImages(writer).open(MemoryImage(ImageType.TASK, victim.pid))
            victim.close()
            with pytest.raises(DumpError, match=r"cannot be read \(ESRCH\)"):
                transfer.write_pages(pipe, Source(victim.pid), Progress())
            transfer.close()


def test_a_dump_can_be_watched_and_cancelled(victim, tmp_path):
    pages = 1 << 18
    victim.map(BASE, pages)
    victim.write(BASE, pages, 1)
    with ImagesWriter(tmp_path / "images", parent=None) as writer:
        memory = MemoryDump(LocalImages(writer, threads=1))
        failed: list[BaseException] = []

        def run() -> None:
            try:
                memory.dump(victim.pid, victim.areas(BASE, pv.TOP))
            except DumpError as error:
                failed.append(error)

        with victim.stopped():
            thread = threading.Thread(target=run)
            thread.start()
            end = time.monotonic() + 20
            while memory.progress.copied_bytes < pages * PAGE // 50:
                assert time.monotonic() < end
                time.sleep(0.0005)
            memory.progress.cancel()
            thread.join()
        memory.close()
    assert [str(error) for error in failed] == ["cancelled"]
    assert memory.progress.copied_bytes < pages * PAGE
    assert memory.expected_bytes == pages * PAGE
    assert not list(tmp_path.iterdir())


def test_areas_that_make_no_sense_are_the_callers_fault(victim):
    area = Area(BASE, BASE + PAGE, AreaKind.PRIVATE_ANON)
    for areas in ([area, area], [area._replace(end=BASE)], [area._replace(start=BASE + 1)]):
        with pytest.raises(ValueError, match="sorted, disjoint"):
            AreaList(areas)
