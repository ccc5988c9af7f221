# SPDX-License-Identifier: MIT
"""Which pages are clean since the dump before: each way in which memory can change between two dumps.

Each case tells the task what to do between two dumps and states what the second one must dump again. The bytes that
both images then have are compared with the task's own, so that a page that is wrongly clean shows twice.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pages_victim as pv
import pytest
from dump_harness import dump, entry_kinds, read_back
from kernel_harness import task_state
from pages_victim import BASE, PAGE, RW, Victim

from lazyd.dump import tracker as tracker_module
from lazyd.dump.core import Area, AreaKind, AreaList, PagemapFormat, Scanner, Track, track_method
from lazyd.dump.tracker import Tracker, needs_uffd, take
from lazyd.image import Dialect
from lazyd.image.verify import verify

BOOLEANS = PagemapFormat(Dialect.BOOLEANS)
FAR = BASE + 0x1000 * PAGE


@pytest.fixture(autouse=True)
def _can_track():
    if track_method() is Track.NONE:
        pytest.skip("this kernel tracks no writes: Linux 6.7")


class Case:
    """A task that is dumped again and again, each time on top of the last."""

    def __init__(self, victim: Victim, folder: Path) -> None:
        self.victim = victim
        self.folder = folder
        self.number = 0
        self.track = track_method()

    def areas(self) -> list[Area]:
        return self.victim.areas(pv.BASE, pv.TOP)

    def dump(self, **options):
        """Dump, and see that the chain reads back as the task's memory is."""
        path = self.folder / str(self.number)
        parent = options.pop("parent", self.folder / str(self.number - 1) if self.number else None)
        truth: dict[int, bytes] = {}

        def look():
            for area in self.areas():
                for at in range(area.start, area.end, PAGE):
                    word = self.victim.words(at, 1)[0]
                    if word >> 62 & 3 and not word >> 58 & 1:
                        truth[at] = self.victim.memory(at)

        areas = options.pop("areas", None) or self.areas()
        counts = dump(self.victim, path, areas, parent=parent, form=BOOLEANS, track=True, while_stopped=look, **options)
        self.number += 1
        found = read_back(path, f"pagemap-{self.victim.pid}.img", BOOLEANS)
        covered = {at for area in areas for at in range(area.start, area.end, PAGE)}
        files = {at for a in areas if a.kind is AreaKind.PRIVATE_FILE for at in range(a.start, a.end, PAGE)}
        for at, data in truth.items():
            if at in covered and at not in files:
                assert found.get(at, bytes(PAGE)) == data, f"a stale page at {at - BASE >> 12:#x}"
        assert not verify(path, "booleans")
        return counts

    def check(self, address: int, expected: str) -> None:
        """See that the last dump has of some pages what it should.

        Where the kernel has soft-dirty bits, a mapping that is merged with a new one is dirty all over: clean pages may
        be dumped again, but nothing else may differ.
        """
        found = self.kinds(address, len(expected))
        if self.track is Track.SOFT_DIRTY:
            expected = "".join("d" if (f, e) == ("d", "p") else e for f, e in zip(found, expected, strict=True))
        assert found == expected

    def kinds(self, address: int, pages: int) -> str:
        """What the last dump has of some pages: d dumped, p parent, z zero, - nothing."""
        found = entry_kinds(self.folder / str(self.number - 1), f"pagemap-{self.victim.pid}.img", BOOLEANS)
        return "".join(found.get(address + i * PAGE, "-")[0] for i in range(pages))


@pytest.fixture
def case(victim, tmp_path):
    return Case(victim, tmp_path)


def test_written_pages_are_dumped_again_and_no_others(case):
    victim = case.victim
    at = victim.map(BASE, 8)
    victim.write(at, 6, 1)
    case.dump()
    case.check(at, "dddddd--")
    victim.write(at + PAGE, 1, 9)
    victim.write(at + 6 * PAGE, 1, 9)
    victim.command("syscall", at + 3 * PAGE, 10)  # the kernel writes
    case.dump()
    case.check(at, "pdpdppd-")
    case.dump()
    case.check(at, "ppppppp-")
    victim.write(at, 1, 10)
    case.dump()
    case.check(at, "dpppppp-")


def test_zero_is_decided_before_parent(case):
    victim = case.victim
    at = victim.map(BASE, 4)
    victim.read(at, 4)
    case.dump()
    case.check(at, "zzzz")
    victim.write(at + PAGE, 1, 1)
    case.dump()
    case.check(at, "zdzz")
    victim.advise(at + PAGE, 1, pv.MADV_DONTNEED)
    victim.read(at + PAGE, 1)
    case.dump()
    case.check(at, "zzzz")


def test_dropped_memory(case):
    victim = case.victim
    at = victim.map(BASE, 6)
    victim.write(at, 6, 1)
    case.dump()
    victim.advise(at, 3, pv.MADV_DONTNEED)
    victim.read(at + PAGE, 1)
    victim.write(at + 2 * PAGE, 1, 1)
    case.dump()
    case.check(at, "-zdppp")


def test_memory_that_is_mapped_anew(case):
    victim = case.victim
    at = victim.map(BASE, 8)
    victim.write(at, 8, 1)
    case.dump()
    victim.command("unmap", at + 2 * PAGE, 2)
    victim.map(at + 2 * PAGE, 2)
    victim.write(at + 2 * PAGE, 1, 1)
    victim.map(at + 5 * PAGE, 1)  # in one step
    victim.write(at + 5 * PAGE, 1, 1)
    case.dump()
    case.check(at, "ppd-pdpp")
    case.dump()
    case.check(at, "ppp-pppp")


def test_memory_that_moves(case):
    victim = case.victim
    at = victim.map(BASE, 4)
    victim.write(at, 4, 1)
    case.dump()
    victim.move(at, 4, FAR)
    case.dump()
    case.check(FAR, "dddd")
    victim.move(FAR, 4, at)
    victim.move(at, 4, FAR)
    case.dump()
    case.check(FAR, "dddd")
    case.check(at, "----")


def test_memory_that_moves_over_other_memory(case):
    victim = case.victim
    at = victim.map(BASE, 4)
    victim.write(at, 4, 1)
    victim.map(FAR, 4)
    victim.write(FAR, 4, 100)
    case.dump()
    victim.move(at, 4, FAR)
    case.dump()
    case.check(FAR, "dddd")


def test_memory_that_moves_out_and_leaves_its_mapping(case):
    victim = case.victim
    at = victim.map(BASE, 4)
    victim.write(at, 4, 1)
    case.dump()
    victim.move(at, 4, FAR, pv.MREMAP_DONTUNMAP)
    victim.write(at, 1, 7)
    victim.read(at + PAGE, 1)
    case.dump()
    case.check(at, "dz--")
    case.check(FAR, "dddd")


def test_protection_bits_that_nobody_watches_are_not_believed(case):
    """mremap moves a tracked area beside another one: both merge, and nobody tracks either any more.

    The bits stay, writes do not take them away, and the next dump tracks the area anew.
    """
    if case.track is not Track.UFFD:
        pytest.skip("this kernel has soft-dirty bits: userfaultfd is not used")
    victim = case.victim
    at = victim.map(BASE, 4)
    victim.write(at, 4, 1)
    victim.map(FAR, 4)  # empty, so that it may be merged with anything
    case.dump()
    victim.move(FAR, 4, at + 4 * PAGE)
    assert len([m for m in victim.mappings() if m.start == at and m.end == at + 8 * PAGE]) == 1, "not merged"
    victim.write(at + PAGE, 1, 50)
    case.dump()
    case.check(at, "dddd----")
    victim.write(at + PAGE, 1, 51)
    case.dump()
    case.check(at, "pdpp----")


def test_areas_that_grow_and_shrink(case):
    victim = case.victim
    at = victim.map(BASE, 4)
    victim.write(at, 4, 1)
    case.dump()
    victim.command("remap", at, 4, 8, 0, 0)
    victim.write(at + 4 * PAGE, 3, 60)
    case.dump()
    case.check(at, "ppppddd-")
    victim.command("remap", at, 8, 2, 0, 0)
    victim.command("remap", at, 2, 6, 0, 0)
    victim.write(at + 3 * PAGE, 1, 61)
    case.dump()
    case.check(at, "pp-d----")


def test_protection_and_back(case):
    victim = case.victim
    at = victim.map(BASE, 4)
    victim.write(at, 4, 1)
    case.dump()
    victim.command("protect", at + PAGE, 2, pv.PROT_NONE)
    case.dump()
    case.check(at, "pppp")
    victim.command("protect", at + PAGE, 2, RW)
    victim.write(at + PAGE, 1, 3)
    case.dump()
    case.check(at, "pdpp")


def test_a_debugger_writes(case):
    """/proc/PID/mem writes where the task itself may not."""
    victim = case.victim
    at = victim.map(BASE, 4)
    victim.write(at, 4, 1)
    victim.command("protect", at + 2 * PAGE, 2, pv.PROT_READ)
    case.dump()
    with Path(f"/proc/{victim.pid}/mem").open("r+b", buffering=0) as memory:
        for page in (0, 2):
            os.pwrite(memory.fileno(), b"changed", at + page * PAGE + 100)
    case.dump()
    case.check(at, "dpdp")


def test_small_pages_are_made_huge(case):
    """MADV_COLLAPSE between two dumps: whatever the kernel makes of it, no write gets lost."""
    victim = case.victim
    at = victim.map(BASE, 1024)
    victim.write(at, 1024, 1)
    case.dump()
    victim.advise(at, 1024, pv.MADV_HUGEPAGE)
    for word in (5000, 6000):
        with contextlib.suppress(OSError):
            victim.advise(at, 1024, pv.MADV_COLLAPSE)
        victim.write(at + 3 * PAGE, 1, word)
        victim.write(at + 700 * PAGE, 1, word)
        case.dump()
        found = case.kinds(at, 1024)
        assert found[3] == found[700] == "d"
        assert set(found) <= {"d", "p"}


def test_fork_keeps_what_is_known_of_the_parent(case):
    victim = case.victim
    at = victim.map(BASE, 4)
    victim.write(at, 4, 1)
    case.dump()
    child = victim.command("fork", at, 2, 7)
    victim.write(at + 2 * PAGE, 1, 8)
    case.dump()
    case.check(at, "ppdp")
    os.kill(child, signal.SIGKILL)
    victim.command("reap", child)
    victim.write(at, 1, 9)
    case.dump()
    case.check(at, "dppp")


def test_huge_pages_are_dumped_by_small_ones(case):
    victim = case.victim
    at = victim.map(BASE, 1024)
    victim.advise(at, 1024, pv.MADV_HUGEPAGE)
    victim.write(at, 1024, 1)
    case.dump()
    victim.write(at + 5 * PAGE, 1, 9000)
    victim.advise(at + 7 * PAGE, 1, pv.MADV_DONTNEED)
    case.dump()
    case.check(at, "pppppdp-" + "p" * 1016)
    victim.advise(at + 512 * PAGE, 512, pv.MADV_DONTNEED)
    victim.write(at + 600 * PAGE, 1, 9001)
    case.dump()
    found = case.kinds(at, 1024)
    assert found[:512] == "ppppppp-" + "p" * 504
    assert found[600] == "d"
    assert "p" not in found[512:]


def test_private_file_pages_that_are_dropped_are_the_files_again(case, tmp_path):
    victim = case.victim
    (tmp_path / "file").write_bytes(bytes(range(256)) * (8 * PAGE // 256))
    victim.command("mapfile", BASE, 8, RW, pv.MAP_PRIVATE, 0, str(tmp_path / "file"))
    victim.read(BASE, 2)
    victim.write(BASE + PAGE, 4, 1)
    case.dump()
    case.check(BASE, "-dddd---")
    victim.advise(BASE + PAGE, 2, pv.MADV_DONTNEED)
    victim.read(BASE + PAGE, 1)
    victim.write(BASE + 3 * PAGE, 1, 9)
    victim.write(BASE + 6 * PAGE, 1, 9)
    case.dump()
    case.check(BASE, "---dp-d-")


def test_guard_pages(case):
    victim = case.victim
    at = victim.map(BASE, 6)
    victim.write(at, 6, 1)
    case.dump()
    try:
        victim.advise(at + PAGE, 2, pv.MADV_GUARD_INSTALL)
    except OSError:
        pytest.skip("no guard pages: Linux 6.13")
    case.dump()
    case.check(at, "p--ppp")
    case.dump()
    with pytest.raises(OSError, match="Bad address"):  # it guards still, for all the protecting around it
        victim.command("syscall", at + PAGE, 1)
    victim.advise(at + PAGE, 1, pv.MADV_GUARD_REMOVE)
    victim.write(at + PAGE, 1, 5)
    case.dump()
    case.check(at, "pd-ppp")


def test_swapped_pages_stay_clean(case, tmp_path):
    from test_scan import swap_file  # noqa: PLC0415

    victim = case.victim
    at = victim.map(BASE, 32)
    victim.write(at, 32, 1)
    case.dump()
    with swap_file(tmp_path / "swap"):
        victim.advise(at, 32, pv.MADV_PAGEOUT)
        swapped = [i for i, word in enumerate(victim.words(at, 32)) if word >> 62 & 1]
        assert swapped, "nothing was swapped"
        case.dump()
        assert case.kinds(at, 32) == "p" * 32
        victim.advise(at, 32, pv.MADV_PAGEOUT)
        victim.write(at + swapped[0] * PAGE, 1, 77)
        case.dump()
        assert case.kinds(at, 32).count("d") == 1


def test_the_heap_grows(case):
    victim = case.victim
    at = victim.command("brk", 4)
    heap = next(m for m in victim.mappings() if m.path == "[heap]")
    victim.write(at, 3, 1)
    case.areas = lambda: victim.areas(heap.start, heap.start + (1 << 30))
    case.dump()
    grown = victim.command("brk", 8)
    assert grown == at + 4 * PAGE
    victim.write(grown, 1, 70)
    victim.write(at + PAGE, 1, 71)
    case.dump()
    case.check(at, "pdp-d-")


def test_an_area_that_was_not_dumped_is_not_clean(case):
    """What one dump leaves out (MADV_DONTDUMP, say) the next one cannot have from it."""
    victim = case.victim
    victim.map(BASE, 2)
    victim.write(BASE, 2, 1)
    victim.map(FAR, 2)
    victim.write(FAR, 2, 1)
    case.dump()
    case.dump(areas=[area for area in case.areas() if area.start == FAR])
    case.check(FAR, "pp")
    case.dump()
    case.check(BASE, "dd")
    case.check(FAR, "pp")


def test_another_parent_is_not_believed(case):
    """The tracker knows about the last dump; on top of an older one nothing is clean."""
    victim = case.victim
    at = victim.map(BASE, 2)
    victim.write(at, 2, 1)
    case.dump()
    victim.write(at, 1, 5)
    case.dump()
    case.check(at, "dp")
    case.dump(parent=case.folder / "0")
    case.check(at, "dd")


def holder_pids() -> list[int]:
    """The trackers that run. What has ended and waits for an init that reaps nobody has ended."""
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            pid = int(comm.parent.name)
            if comm.read_text().strip() == "lazyd-tracker" and task_state(pid) not in ("", "Z"):
                found.append(pid)
    return found


def wait_gone(pids: set[int]) -> None:
    end = time.monotonic() + 10
    while pids & set(holder_pids()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_tracker_that_died_knows_nothing(case):
    victim = case.victim
    at = victim.map(BASE, 3)
    victim.write(at, 3, 1)
    before = set(holder_pids())
    case.dump()
    (mine,) = set(holder_pids()) - before
    victim.write(at, 1, 2)
    os.kill(mine, signal.SIGKILL)
    wait_gone({mine})
    case.dump()
    case.check(at, "ddd")
    victim.write(at, 1, 3)
    case.dump()
    case.check(at, "dpp")


def test_exec_makes_everything_new(case):
    victim = case.victim
    at = victim.map(BASE, 3)
    victim.write(at, 3, 1)
    case.dump()
    victim.command("exec")
    victim.map(at, 3)
    victim.write(at, 3, 2)
    case.dump()
    case.check(at, "ddd")


def test_a_tracker_ends_with_its_task_and_when_it_is_taken_over(pages_binary, tmp_path):
    before = set(holder_pids())
    with Victim(pages_binary) as victim:
        case = Case(victim, tmp_path)
        victim.map(BASE, 1)
        victim.write(BASE, 1, 1)
        case.dump()
        first = set(holder_pids()) - before
        case.dump()
        wait_gone(first)
        second = set(holder_pids()) - before
        assert len(first) == len(second) == 1
    wait_gone(second)


def test_a_dump_that_only_borrows_leaves_the_tracker(case, tmp_path):
    victim = case.victim
    at = victim.map(BASE, 3)
    victim.write(at, 3, 1)
    case.dump()
    victim.write(at, 1, 2)
    name = f"pagemap-{victim.pid}.img"
    for number in range(2):
        path = tmp_path / f"final{number}"
        dump(victim, path, case.areas(), parent=tmp_path / "0", form=BOOLEANS)
        assert list(entry_kinds(path, name, BOOLEANS).values()) == ["dumped", "parent", "parent"]
    case.dump()
    case.check(at, "dpp")


def test_what_somebody_else_tracks_is_not_ours(case):
    """An area that is registered with another userfaultfd looks tracked: it is never taken for clean."""
    if case.track is not Track.UFFD:
        pytest.skip("this kernel has soft-dirty bits: userfaultfd is not used")
    import fcntl  # noqa: PLC0415
    import struct  # noqa: PLC0415

    victim = case.victim
    at = victim.map(BASE, 4)
    victim.write(at, 4, 1)
    other = victim.uffd()
    try:
        fcntl.ioctl(other, 0xC018AA3F, struct.pack("<QQQ", 0xAA, 1 << 15, 0))
        fcntl.ioctl(other, 0xC020AA00, struct.pack("<QQQQ", at, 4 * PAGE, 2, 0))
        fcntl.ioctl(other, 0xC018AA06, struct.pack("<QQQ", at, 4 * PAGE, 1))
        case.dump()
        case.dump()
        case.check(at, "dddd")
    finally:
        os.close(other)
    case.dump()
    case.dump()
    case.check(at, "pppp")


def test_a_stranger_gets_nothing(case):
    victim = case.victim
    victim.map(BASE, 1)
    victim.write(BASE, 1, 1)
    case.dump()
    name = f"pagemap-{victim.pid}.img"
    code = (
        "import os, sys, json\nfrom pathlib import Path\n"
        "from lazyd.dump.tracker import take\nos.setgid(65534); os.setuid(65534)\n"
        f"assert take({victim.pid}, Path({str(case.folder / '0')!r}), {name!r}, to_track=False) is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "HOME": "/"})
    tracker = take(victim.pid, case.folder / "0", name, to_track=False)
    assert tracker is not None
    assert tracker.has_baseline
    tracker.close()


def test_soft_dirty_bits_are_used_exactly_where_the_kernel_has_them():
    try:
        config = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    except FileNotFoundError:
        pytest.skip("the kernel does not say how it was configured")
    assert (track_method() is Track.SOFT_DIRTY) == ("CONFIG_MEM_SOFT_DIRTY=y" in config.splitlines())


# ---- why nothing is tracked ----


def armed_tracker(victim):
    """A tracker that has something to leave."""
    tracker = Tracker.start(victim.pid, victim.uffd() if needs_uffd() else -1)
    with Scanner(victim.pid) as scanner:
        assert tracker.arm(scanner, AreaList(victim.areas()))
    return tracker


def test_no_runtime_directory_is_too_deep(case, monkeypatch):
    deep = case.folder / ("deep" * 30)
    deep.mkdir()
    monkeypatch.setattr(tracker_module, "_runtime_directory", lambda: deep)
    case.victim.map(BASE, 1)
    case.victim.write(BASE, 1, 1)
    case.dump()
    tracker = take(case.victim.pid, case.folder / "0", f"pagemap-{case.victim.pid}.img", to_track=True)
    assert tracker is not None
    assert tracker.has_baseline
    tracker.close()
    assert list(deep.iterdir()) == []


class FullScanner:
    """As if the kernel had no memory left for it."""

    def arm(self, *_):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_leaving_a_tracker_says_why_it_fails(victim, tmp_path, monkeypatch):
    """Nowhere to listen; a holder that ends at once, and memory that the kernel does not protect."""
    victim.map(BASE, 1)
    victim.write(BASE, 1, 1)
    (tmp_path / "pagemap.img").touch()
    # Deeper than the 108 bytes of sun_path, wherever tmp_path is: what is missing is the folder, not a shorter name.
    missing = tmp_path / "missing" / ("deep" * 30)
    monkeypatch.setattr(tracker_module, "_runtime_directory", lambda: missing)
    why = armed_tracker(victim).leave(tmp_path, "pagemap.img")
    assert "missing" in why
    assert "ENOENT" in why
    monkeypatch.setattr(tracker_module, "_runtime_directory", lambda: tmp_path)
    failing = tmp_path / "failing.py"
    failing.write_text("raise OSError('no such luck')\n")
    monkeypatch.setattr(tracker_module.holder, "__file__", str(failing))
    assert armed_tracker(victim).leave(tmp_path, "pagemap.img").endswith("OSError: no such luck")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failing.py", "pagemap.img"]
    tracker = armed_tracker(victim)
    assert tracker.arm(FullScanner(), AreaList([])) == 0
    assert os.strerror(errno.ENOMEM) in tracker.leave(tmp_path, "pagemap.img")
