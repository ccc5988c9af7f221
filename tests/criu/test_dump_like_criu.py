# SPDX-License-Identifier: MIT
"""The memory that lazyd dumps beside what the real CRIU dumps of the same stopped task, and to CRIU's page server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import dump_harness
import harness
import pages_victim as pv
import pytest
from dump_harness import entry_kinds, read_back
from images_builder import read_entries
from page_server_harness import running_server
from pages_victim import BASE, PAGE, RW, Victim

from lazyd.dump.core import PagemapFormat
from lazyd.dump.memory import MemoryCounts, dump_memory
from lazyd.dump.page_server import PageServer
from lazyd.dump.transfer import LocalImages
from lazyd.errors import LazydError
from lazyd.image import Dialect
from lazyd.image.stats import DumpStats, encode_stats, write_stats
from lazyd.image.writer import ImagesWriter
from lazyd.wire import HeaderSize

FLAGS = PagemapFormat(Dialect.FLAGS)
HEADERS = {"trixie": HeaderSize.NARROW, "sid": HeaderSize.WIDE}
LAZY, PRESENT = 2, 4
FILE = BASE + (1 << 30)
SHARED = BASE + (1 << 31)


@pytest.fixture(scope="module")
def pages_binary(tmp_path_factory):
    """The compiled task of pages.c."""
    return pv.compile_victim(tmp_path_factory.mktemp("pages") / "pages")


@pytest.fixture
def victim(pages_binary, tmp_path):
    """A task with memory of every kind."""
    (tmp_path / "file").write_bytes(os.urandom(40 * PAGE))
    with Victim(pages_binary, start_new_session=True, stderr=subprocess.DEVNULL) as victim:
        victim.map(BASE, 4000)
        victim.write(BASE, 100, 1)
        victim.read(BASE + 200 * PAGE, 50)
        victim.write(BASE + 300 * PAGE, 500, 1, 3)
        victim.advise(BASE + 1024 * PAGE, 2048, pv.MADV_HUGEPAGE)
        victim.write(BASE + 1030 * PAGE, 1, 5)
        victim.read(BASE + 1600 * PAGE, 1)
        victim.write(BASE + 4 * PAGE, 1, 0)
        victim.command("protect", BASE + 20 * PAGE, 10, pv.PROT_NONE)
        victim.command("mapfile", FILE, 20, RW, pv.MAP_PRIVATE, 3, str(tmp_path / "file"))
        victim.read(FILE, 10)
        victim.write(FILE + 4 * PAGE, 3, 7)
        victim.map(SHARED, 100, RW, pv.MAP_SHARED)
        victim.write(SHARED + 5 * PAGE, 3, 7)
        victim.read(SHARED, 1)
        yield victim


def stock_dump(suite: str, victim: Victim, folder: Path) -> Path:
    """Let the real CRIU dump a task, and leave it stopped."""
    folder.mkdir()
    words = [harness.criu_command(suite), "dump", "-t", str(victim.pid), "-D", str(folder), "--shell-job"]
    words += ["--leave-stopped", "-o", "dump.log", "-v1"]
    run = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr + harness.tail(folder / "dump.log")
    return folder


def local_dump(victim: Victim, path: Path, form: PagemapFormat = FLAGS) -> MemoryCounts:
    with ImagesWriter(path, parent=None) as writer:
        counts = dump_memory(victim.pid, victim.areas(), LocalImages(writer, form))
        writer.publish()
    return counts


def place(victim: Victim, address: int) -> str:
    return next(f"{m.permissions} {m.path}" for m in victim.mappings() if m.start <= address < m.end)


def test_the_same_memory_as_criu_dump(suite, victim, tmp_path):
    name = f"pagemap-{victim.pid}.img"
    victim.stop()
    counts = local_dump(victim, tmp_path / "ours")
    stock_dump(suite, victim, tmp_path / "theirs")
    ours, theirs = (read_back(tmp_path / side, name, FLAGS) for side in ("ours", "theirs"))
    assert ours.keys() <= theirs.keys()
    # CRIU runs code of its own in the task. The kernel then says in the task's rseq area (32 bytes) on which processor.
    differing = [at for at in ours if ours[at] != theirs[at]]
    assert len(differing) <= 1
    for at in differing:
        bytes_ = [i for i in range(PAGE) if ours[at][i] != theirs[at][i]]
        assert bytes_[-1] // 32 == bytes_[0] // 32
    # And the page that it has put its code into is the task's own copy now.
    for address in theirs.keys() - ours.keys():
        assert place(victim, address).startswith("r-xp /")
        assert theirs[address] == victim.memory(address)
    assert len(theirs) - len(ours) <= 1
    assert counts.dumped == len(ours)
    kinds = [{}, {}]
    for side, found in zip(("ours", "theirs"), kinds, strict=True):
        for entry in read_entries(tmp_path / side / name)[1]:
            found.update(dict.fromkeys(range(entry.start, entry.end, PAGE), (entry.kind, entry.lazy)))
    # The pages that stack pointers are in are for whoever knows them to name.
    assert {at for at in ours if kinds[0][at] != kinds[1][at]} <= {at for at in ours if "[stack]" in place(victim, at)}
    (shared,) = (tmp_path / "ours").glob("pagemap-shmem-*.img")
    assert read_back(tmp_path / "ours", shared.name, FLAGS) == read_back(tmp_path / "theirs", shared.name, FLAGS)
    assert counts.shared_dumped == 4


def test_crit_decodes_what_is_written(suite, victim, tmp_path):
    victim.stop()
    for wide in [False] if suite == "trixie" else [False, True]:  # 4.1 knows no page counts in field 5
        local_dump(victim, tmp_path / f"{wide}", PagemapFormat(wide=wide))
        check_by_crit(suite, tmp_path / f"{wide}")


def check_by_crit(suite: str, images: Path) -> None:
    for image in images.glob("pagemap-*.img"):
        head, *entries = harness.crit(suite, image)
        mine = read_entries(image)
        assert head["pages_id"] == mine[0]
        assert [entry["vaddr"] for entry in entries] == [entry.start for entry in mine[1]]
        counts = [entry.get("nr_pages") or entry.get("compat_nr_pages") for entry in entries]
        assert counts == [entry.pages for entry in mine[1]]
        assert {entry["flags"] for entry in entries} <= {PRESENT, LAZY | PRESENT}


@pytest.mark.parametrize("dialect", Dialect)
def test_crit_decodes_stats(suite, tmp_path, dialect):
    with ImagesWriter(tmp_path / "images", parent=None) as writer:
        write_stats(writer, DumpStats(1e-6, 2e-6, 3e-6, 4e-6, 50, 60, 70, 80, 90), dialect)
        writer.publish()
    assert encode_stats(DumpStats(1, 1e9, 1, 1, 1, 1, 1, 1, 1), dialect), "hours do not overflow"
    (found,) = harness.crit(suite, tmp_path / "images/stats-dump")
    dump = found["dump"]
    assert (dump["freezing_time"], dump["frozen_time"], dump["memdump_time"], dump["memwrite_time"]) == (1, 2, 3, 4)
    assert (dump["pages_scanned"], dump["pages_skipped_parent"], dump["pages_written"]) == (50, 60, 70)
    assert dump["pages_lazy"] == (80 if dialect is Dialect.BOOLEANS else 90)


WHOSE = pytest.mark.parametrize("whose", ["stock", "lazyd"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_listening(port: int) -> bool:
    """Without connecting: the stock server takes one connection in its life."""
    with Path("/proc/net/tcp").open() as table:
        return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in table)


@contextmanager
def page_server(
    suite: str,
    folder: Path,
    parent: Path | None = None,
    *,
    whose: str = "stock",
    extra: Sequence[str] = (),
    exit_code: int = 0,
):
    """Run the stock page server, or lazyd's, on a directory; yield its port, and see how it ends."""
    folder.mkdir()
    if whose == "lazyd":
        on_top = () if parent is None else ("--prev-images-dir", os.path.relpath(parent, folder))
        with running_server(folder, folder.with_suffix(".log"), *on_top) as server:
            yield server.port
        return
    port = free_port()
    words = [harness.criu_command(suite), "page-server", "-D", str(folder), "--address", "127.0.0.1"]
    words += ["--port", str(port), "-o", "page-server.log", "-v4", *extra]
    if parent is not None:
        words += ["--prev-images-dir", os.path.relpath(parent, folder)]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        harness.wait_until(lambda: is_listening(port) or process.poll() is not None, "the page server")
        yield port
        assert process.wait(20) == exit_code, harness.tail(folder / "page-server.log")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def send(victim: Victim, suite: str, port: int, **options) -> MemoryCounts:
    with PageServer.connect("127.0.0.1", port, FLAGS, header=HEADERS[suite], timeout_s=20) as server:
        return dump_memory(victim.pid, victim.areas(), server, **options)


@WHOSE
def test_to_a_page_server(suite, victim, whose, tmp_path):
    victim.stop()
    counts = local_dump(victim, tmp_path / "local")
    with page_server(suite, tmp_path / "remote", whose=whose) as port:
        sent = send(victim, suite, port)
    assert sent._replace(scan_time=0, copy_time=0) == counts._replace(scan_time=0, copy_time=0)
    names = sorted(path.name for path in (tmp_path / "local").glob("pagemap-*.img"))
    assert names == sorted(path.name for path in (tmp_path / "remote").glob("pagemap-*.img"))
    assert len(names) == 2
    for name in names:
        assert read_back(tmp_path / "local", name, FLAGS) == read_back(tmp_path / "remote", name, FLAGS)
        assert read_entries(tmp_path / "local" / name)[1] == read_entries(tmp_path / "remote" / name)[1]


@WHOSE
def test_parent_holes_at_a_page_server(suite, victim, whose, tmp_path):
    """A pre-dump and a dump on top of it, both to page servers; the tracker is bound to a local file beside them."""
    name = f"pagemap-{victim.pid}.img"
    tracker = dump_harness.tracker_for(victim, None, to_track=True)
    try:
        with page_server(suite, tmp_path / "0", whose=whose) as port, victim.stopped():
            first = send(victim, suite, port, tracker=tracker, keep_tracking=True)
        victim.write(BASE + 7 * PAGE, 2, 1000)
        with page_server(suite, tmp_path / "1", tmp_path / "0", whose=whose) as port, victim.stopped():
            second = send(victim, suite, port, tracker=tracker)
            truth = {BASE + i * PAGE: victim.memory(BASE + i * PAGE) for i in range(100)}
    finally:
        tracker.close()
    assert first.parent == 0
    assert second.parent > 0.8 * first.dumped
    assert second.dumped < 0.2 * first.dumped
    assert list(entry_kinds(tmp_path / "1", name, FLAGS).values()).count("parent") == second.parent
    found = read_back(tmp_path / "1", name, FLAGS)
    assert {at: found[at] for at in truth} == truth


def test_a_server_without_the_parent_gets_everything(suite, victim, tmp_path):
    tracker = dump_harness.tracker_for(victim, None, to_track=True)
    try:
        with page_server(suite, tmp_path / "0") as port, victim.stopped():
            first = send(victim, suite, port, tracker=tracker, keep_tracking=True)
        with page_server(suite, tmp_path / "1") as port, victim.stopped():
            second = send(victim, suite, port, tracker=tracker)
    finally:
        tracker.close()
    assert second.parent == 0
    assert second.dumped >= first.dumped - 5


def test_a_server_of_the_other_header_size_is_told_apart(suite, victim, tmp_path):
    other = next(header for header in HeaderSize if header is not HEADERS[suite])
    (tmp_path / "remote").mkdir()
    port = free_port()
    words = [harness.criu_command(suite), "page-server", "-D", str(tmp_path / "remote"), "--port", str(port)]
    process = subprocess.Popen([*words, "--address", "127.0.0.1"], stderr=subprocess.DEVNULL)
    try:
        harness.wait_until(lambda: is_listening(port) or process.poll() is not None, "the page server")
        begun = time.monotonic()
        with (
            victim.stopped(),
            pytest.raises(LazydError, match="header size"),
            PageServer.connect("127.0.0.1", port, FLAGS, header=other, timeout_s=2) as server,
        ):
            dump_memory(victim.pid, victim.areas(), server)
        assert time.monotonic() - begun < 10
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("scenario", ["plain", "zeros", "kinds"])
def test_stock_restores_memory_that_lazyd_has_dumped(suite, victim_program, tmp_path, scenario, lazily):
    """The small images are CRIU's, the memory is ours, dumped of the same stopped task; the program checks itself."""
    state, images = tmp_path / "state", tmp_path / "images"
    pid = harness.start_program([str(victim_program), scenario, str(state)], state)
    try:
        victim = _Watched(pid)
        theirs = stock_dump(suite, victim, tmp_path / "theirs")  # and stops it, as a task that ran
        with ImagesWriter(images, parent=None) as writer:
            dump_memory(pid, victim.areas(), LocalImages(writer, FLAGS))
            writer.publish()
    finally:
        harness.reap_group(pid)
    for path in theirs.iterdir():
        if not path.name.startswith(("pagemap-", "pages-")):
            shutil.copy2(path, images)
    saved = harness.Checkpoint(suite, pid, images, state)
    try:
        if lazily:
            harness.assert_good(harness.lazy_restore(saved, tmp_path / "work"))
        else:
            assert harness.eager_restore(saved, tmp_path / "work") == "ok\n"
    finally:
        saved.forget()


class _Watched(Victim):
    """Another program than pages.c, looked at and stopped in the same way."""

    def __init__(self, pid: int) -> None:
        self.pid = pid


@pytest.fixture(scope="module")
def victim_program(tmp_path_factory):
    """The compiled victim of the scenarios."""
    folder = tmp_path_factory.mktemp("victim")
    return harness.compile_c(harness.ROOT / "tests" / "victims" / "victim.c", folder / "victim")
