# SPDX-License-Identifier: MIT
"""Which pages of a real task a dump takes: by both ways of looking, against what the task was told to do."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import time
from pathlib import Path

import pages_victim as pv
import pytest
from pages_victim import BASE, PAGE, RW, Victim

from lazyd.dump.core import Area, AreaKind, AreaList, PageKind, PagePipe, ScanMethod, Scanner

HUGE = 512
ZERO, DUMPED = PageKind.ZERO, PageKind.DUMPED


def scan(victim: Victim, areas: list[Area], method: ScanMethod) -> dict[int, tuple[PageKind, bool]]:
    """What each page is, by one way of looking."""
    pipe = PagePipe()
    with Scanner(victim.pid, method) as scanner:
        scanner.scan(AreaList(areas), pipe)
    runs = list(pipe)
    for before, after in itertools.pairwise(runs):
        assert before.end <= after.start
        touch = before.end == after.start
        assert not touch or (before.kind, before.lazy) != (after.kind, after.lazy), "neighbours of one kind"
    assert {kind: pipe.pages(kind) for kind in PageKind} == {
        kind: sum(run.pages for run in runs if run.kind is kind) for kind in PageKind
    }
    return {run.start + i * PAGE: (run.kind, run.lazy) for run in runs for i in range(run.pages)}


def both(victim: Victim, areas: list[Area]) -> dict[int, tuple[PageKind, bool]]:
    """The same by both ways, which must agree; by one where the kernel has only that (Linux 6.7 has both)."""
    by_word = scan(victim, areas, ScanMethod.PAGEMAP)
    assert scan(victim, areas, ScanMethod.AUTO) == by_word
    return by_word


def test_both_ways_are_looked_at(victim):
    with Scanner(victim.pid) as scanner:
        if scanner.method is not ScanMethod.IOCTL:
            pytest.skip("no PAGEMAP_SCAN: Linux 6.7")
    with Scanner(victim.pid, ScanMethod.PAGEMAP) as scanner:
        assert scanner.method is ScanMethod.PAGEMAP


def kinds(victim: Victim, address: int, pages: int) -> list[PageKind | None]:
    """What the pages of a part of the task are, in order."""
    found = both(victim, victim.areas(pv.BASE, pv.TOP))
    return [found.get(address + i * PAGE, (None,))[0] for i in range(pages)]


def test_anonymous_memory(victim):
    at = victim.map(BASE, 8)
    victim.write(at, 2, 1)
    victim.read(at + 3 * PAGE, 2)
    victim.write(at + 6 * PAGE, 1, 0)  # zeros, but a page of its own
    assert kinds(victim, at, 8) == [DUMPED, DUMPED, None, ZERO, ZERO, None, DUMPED, None]
    victim.advise(at, 1, pv.MADV_DONTNEED)
    victim.read(at + PAGE, 1)
    assert kinds(victim, at, 2) == [None, DUMPED]
    victim.read(at, 1)
    victim.write(at + 3 * PAGE, 1, 9)
    assert kinds(victim, at, 5) == [ZERO, DUMPED, None, DUMPED, ZERO]


def test_what_may_not_be_read_is_dumped_all_the_same(victim):
    at = victim.map(BASE, 4)
    victim.write(at, 2, 1)
    victim.read(at + 2 * PAGE, 1)
    victim.command("protect", at, 4, pv.PROT_NONE)
    assert kinds(victim, at, 4) == [DUMPED, DUMPED, ZERO, None]


def test_huge_pages(victim):
    at = victim.map(BASE, 4 * HUGE)
    victim.advise(at, 4 * HUGE, pv.MADV_HUGEPAGE)
    victim.write(at, 1, 1)
    victim.read(at + HUGE * PAGE, 1)
    victim.read(at + 2 * HUGE * PAGE, 1)
    victim.write(at + (2 * HUGE + 7) * PAGE, 1, 1)
    words = victim.words(at, 3 * HUGE)
    if not all(words[: 2 * HUGE]):
        pytest.skip("no huge pages to be had")
    found = kinds(victim, at, 4 * HUGE)
    assert found[:HUGE] == [DUMPED] * HUGE
    assert found[HUGE : 2 * HUGE] == [ZERO] * HUGE
    # A write into the huge zero page gives a huge page, or splits it: the kernel's choice, and both ways see it.
    assert found[2 * HUGE + 7] is DUMPED
    assert set(found[2 * HUGE : 3 * HUGE]) <= {DUMPED, ZERO}
    assert found[3 * HUGE :] == [None] * HUGE
    victim.advise(at + 3 * PAGE, 1, pv.MADV_DONTNEED)
    assert kinds(victim, at, 5) == [DUMPED, DUMPED, DUMPED, None, DUMPED]


def test_private_file_pages_are_dumped_where_they_differ_from_the_file(victim, tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(256)) * (8 * PAGE // 256))
    victim.command("mapfile", BASE, 8, RW, pv.MAP_PRIVATE, 0, str(tmp_path / "file"))
    victim.read(BASE, 3)
    victim.write(BASE + PAGE, 1, 1)
    victim.write(BASE + 5 * PAGE, 2, 1)
    assert kinds(victim, BASE, 8) == [None, DUMPED, None, None, None, DUMPED, DUMPED, None]
    victim.advise(BASE + 5 * PAGE, 1, pv.MADV_DONTNEED)
    assert kinds(victim, BASE, 8) == [None, DUMPED, None, None, None, None, DUMPED, None]


def test_guard_pages_are_no_pages(victim):
    at = victim.map(BASE, 6)
    victim.write(at, 6, 1)
    try:
        victim.advise(at + 2 * PAGE, 2, pv.MADV_GUARD_INSTALL)
    except OSError:
        pytest.skip("no guard pages: Linux 6.13")
    assert kinds(victim, at, 6) == [DUMPED, DUMPED, None, None, DUMPED, DUMPED]
    victim.advise(at + 3 * PAGE, 1, pv.MADV_GUARD_REMOVE)
    assert kinds(victim, at, 6) == [DUMPED, DUMPED, None, None, DUMPED, DUMPED]
    victim.read(at + 3 * PAGE, 1)
    assert kinds(victim, at, 6) == [DUMPED, DUMPED, None, ZERO, DUMPED, DUMPED]


def test_pages_of_a_forked_task_are_those_of_both(victim):
    at = victim.map(BASE, 4)
    victim.write(at, 2, 1)
    victim.read(at + 2 * PAGE, 1)
    child = victim.command("fork", at, 1, 7)
    try:
        assert kinds(victim, at, 4) == [DUMPED, DUMPED, ZERO, None]
    finally:
        subprocess.run(["kill", "-9", str(child)], check=True)
        victim.command("reap", child)


def test_markers_of_write_protection_are_no_pages(victim, tmp_path):
    """A page that was protected and then dropped leaves a marker in a file mapping; so does protecting nothing."""
    import fcntl  # noqa: PLC0415
    import struct  # noqa: PLC0415

    (tmp_path / "file").write_bytes(bytes(8 * PAGE))
    victim.command("mapfile", BASE, 4, RW, pv.MAP_PRIVATE, 0, str(tmp_path / "file"))
    victim.write(BASE, 2, 1)
    anon = victim.map(BASE + 16 * PAGE, 4)
    victim.write(anon, 1, 1)
    uffd = victim.uffd()
    with open(uffd, "rb", closefd=True) as handle:  # noqa: PTH123  a descriptor
        # UFFDIO_API with WP_ASYNC, UFFDIO_REGISTER for write-protection, UFFDIO_WRITEPROTECT of all of it
        try:
            fcntl.ioctl(handle, 0xC018AA3F, struct.pack("<QQQ", 0xAA, 1 << 15, 0))
        except OSError:
            pytest.skip("no asynchronous write-protection: Linux 6.7")
        for start in (BASE, anon):
            fcntl.ioctl(handle, 0xC020AA00, struct.pack("<QQQQ", start, 4 * PAGE, 2, 0))
            fcntl.ioctl(handle, 0xC018AA06, struct.pack("<QQQ", start, 4 * PAGE, 1))
        victim.advise(BASE, 1, pv.MADV_DONTNEED)
        assert [word >> 62 & 1 for word in victim.words(BASE, 4)] == [1, 0, 1, 1], "no markers here: nothing is tested"
        assert kinds(victim, BASE, 4) == [None, DUMPED, None, None]
        assert kinds(victim, anon, 4) == [DUMPED, None, None, None]


@contextlib.contextmanager
def swap_file(path: Path):
    """Some swap on a file of our own."""
    path.write_bytes(bytes(16 << 20))
    path.chmod(0o600)
    made = subprocess.run(["mkswap", str(path)], capture_output=True, check=False)
    on = made.returncode == 0 and subprocess.run(["swapon", str(path)], capture_output=True, check=False)
    if not on or on.returncode:
        pytest.skip("no swap to be had here")
    try:
        yield
    finally:
        subprocess.run(["swapoff", str(path)], check=True)


def test_swapped_pages_are_dumped(victim, tmp_path):
    at = victim.map(BASE, 64)
    victim.write(at, 32, 1)
    with swap_file(tmp_path / "swap"):
        victim.advise(at, 64, pv.MADV_PAGEOUT)
        swapped = sum(word >> 62 & 1 for word in victim.words(at, 32))
        assert swapped, "nothing was swapped"
        assert kinds(victim, at, 64) == [DUMPED] * 32 + [None] * 32
    assert kinds(victim, at, 64) == [DUMPED] * 32 + [None] * 32


@pytest.mark.parametrize("runs", [511, 512, 513, 1024, 4095, 4096, 4097, 8192, 20_000])
def test_many_runs(victim, runs):
    """More runs than the kernel, and than we, take at a time: none is lost, none comes twice."""
    at = victim.map(BASE, 2 * runs)
    victim.write(at, 2 * runs, 1, 2)
    assert kinds(victim, at, 2 * runs) == [DUMPED, None] * runs


def test_lazy_areas_and_areas_that_are_not(victim):
    at = victim.map(BASE, 6)
    victim.write(at, 6, 1)
    cut = [
        Area(at, at + 2 * PAGE, AreaKind.PRIVATE_ANON, lazy=True),
        Area(at + 2 * PAGE, at + 3 * PAGE, AreaKind.PRIVATE_ANON),
        Area(at + 3 * PAGE, at + 6 * PAGE, AreaKind.PRIVATE_ANON, lazy=True),
    ]
    pipe = PagePipe()
    with victim.stopped(), Scanner(victim.pid) as scanner:
        scanner.scan(AreaList(cut), pipe)
    assert [(run.start, run.pages, run.lazy) for run in pipe] == [
        (at, 2, True),
        (at + 2 * PAGE, 1, False),
        (at + 3 * PAGE, 3, True),
    ]
    assert pipe.lazy_pages == 5


def test_whole_task_and_the_vdso(victim):
    """All of a task, by both ways; every page of the vdso; no page of a file that is only mapped."""
    found = both(victim, [a for a in victim.areas() if a.kind is not AreaKind.SHARED_ANON])
    vdso = next(m for m in victim.mappings() if m.path == "[vdso]")
    assert all(found[at][0] is DUMPED for at in range(vdso.start, vdso.end, PAGE))
    text = next(m for m in victim.mappings() if m.permissions == "r-xp" and m.inode)
    assert not [at for at in range(text.start, text.end, PAGE) if at in found]
    for address, (kind, _) in found.items():
        if kind is ZERO:
            assert victim.memory(address) == bytes(PAGE)


def test_sparse_memory_costs_what_is_there(victim):
    """64 GiB with one page in each GiB: milliseconds, where a look at every page takes a second."""
    at = victim.map(BASE, 16 << 20, RW, pv.MAP_PRIVATE)
    victim.write(at, 16 << 20, 1, 1 << 18)
    areas = victim.areas(BASE, pv.TOP)
    best = 1.0
    for _ in range(5):
        pipe = PagePipe()
        before = time.monotonic()
        with Scanner(victim.pid) as scanner:
            if scanner.method is not ScanMethod.IOCTL:
                pytest.skip("no PAGEMAP_SCAN: Linux 6.7")
            scanner.scan(AreaList(areas), pipe)
        best = min(best, time.monotonic() - before)
        assert pipe.pages(DUMPED) == 64
    assert best < 0.05
    assert len(scan(victim, areas, ScanMethod.PAGEMAP)) == 64
