# SPDX-License-Identifier: MIT
"""Pages that are copied while the task still runs: whatever it does meanwhile, images hold what it had when stopped.

What is right is asked of the kernel, while the dump still holds the task. Later would be too late, stopped or not: on
its way from a tracer's stop into another one the kernel writes frames of signals to it, and numbers of processors.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pickle
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pages_victim as pv
import pytest
from dump_harness import dump, read_back
from kernel_harness import layout, wait_until
from pages_victim import BASE, PAGE, Victim
from process_harness import Dying
from test_dump_chains import FORMS
from test_dump_chains import start as start_model
from test_dump_verb import EXECS

from lazyd.dump.core import Track, track_method
from lazyd.image.verify import verify
from lazyd.target import tracing

EARLY = """
import os, pickle, sys
from pathlib import Path
from lazyd.dump import memory, run
memory.EARLY_BYTES = memory.EARLY_BYTES_A_THREAD = 0
find_owners, read_state = run.find_owners, run.read_state
areas = []
def note_areas(stopped):
    areas.extend(one.address for one in (thread.rseq() for thread in stopped) if one is not None)
    return read_state(stopped)
def keep(tables):
    for pid in tables:
        found = {}
        with Path(f"/proc/{pid}/mem").open("rb", 0) as there:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                start, end = (int(word, 16) for word in line.split()[0].split("-"))
                if " rw-p " in line:
                    found[start] = " 00:00 " in line, os.pread(there.fileno(), end - start, start)
        Path(os.environ["KEPT"]).write_bytes(pickle.dumps((found, areas)))
    return find_owners(tables)
if "KEPT" in os.environ:
    run.find_owners, run.read_state = keep, note_areas
from lazyd import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _can_track():
    if track_method() is not Track.UFFD:
        pytest.skip("nothing is copied early without asynchronous write-protection (Linux 6.7)")


def early(*words, program=EARLY, kept: Path | None = None):
    """Run lazyd, which copies early however little there is; return what became of it.

    kept: where it shall leave the memory that the task has when it has been dumped.
    """
    command = [sys.executable, "-c", program, *map(str, words)]
    environment = {**os.environ, **({"KEPT": str(kept)} if kept else {})}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)


def without_processors(at: int, page: bytes, areas: list[int]) -> bytes:
    """Return a page without what the kernel writes into areas of rseq(2) by itself: on which processor a thread is.

    cpu_id_start and cpu_id; node_id and mm_cid. It does so whenever a thread goes on, if only to make a call for us.
    """
    content = bytearray(page)
    for area in areas:
        for first, end in ((area, area + 8), (area + 20, area + 28)):
            if at <= first < at + PAGE:
                content[first - at : end - at] = bytes(end - first)
    return bytes(content)


def check(pid: int, images: Path, kept: Path) -> int:
    """Hold the pages of images against what the task had; return how many there are."""
    pages = read_back(images, f"pagemap-{pid}.img", FORMS["flags"])
    wrong, count = [], 0
    found, areas = pickle.loads(kept.read_bytes())
    for start, (is_anonymous, content) in found.items():
        for at in range(start, start + len(content), PAGE):
            count += at in pages
            # What is in no image is zeros, or the file's.
            expected = content[at - start : at - start + PAGE]
            page = pages.get(at, bytes(PAGE) if is_anonymous else expected)
            if without_processors(at, page, areas) != without_processors(at, expected, areas):
                wrong.append(hex(at))
    assert not wrong
    return count


@pytest.mark.parametrize("form", [FORMS["flags"], FORMS["booleans"]], ids=["flags", "booleans"])
def test_all_that_a_task_may_do_meanwhile(pages_binary, tmp_path, form):
    """The model of the chains: it writes, maps, unmaps, moves, drops and forks between the early copy and the stop."""
    taken = whole = 0
    for seed in range(6):
        with Victim(pages_binary) as victim:
            folder = tmp_path / str(seed)
            folder.mkdir()
            model = start_model(victim, seed, folder)
            name = f"pagemap-{victim.pid}.img"
            known: dict[Path, dict[int, bytes]] = {}
            parent = None

            def go_on(model=model, victim=victim):
                for _ in range(model.chance.randint(0, 12)):
                    model.step()
                return victim.areas(BASE, pv.TOP)

            for level, is_last in enumerate((False, True)):
                path = folder / str(level)
                # The first copies early and then tracks, so that the second has parent holes.
                counts = dump(
                    victim,
                    path,
                    victim.areas(BASE, pv.TOP),
                    parent=parent,
                    form=form,
                    track=not is_last,
                    while_stopped=model.check_kernel,
                    after_early=None if is_last else go_on,
                )
                assert model.restored(read_back(path, name, form, known)) == model.expected(), f"{seed}, {level}"
                assert not verify(path, form.dialect.value), f"{seed}, {level}"
                if not is_last:
                    taken, whole = taken + counts.early, whole + counts.dumped
                    go_on()
                parent = path
            assert counts.parent, "the tracking went on from the dump"
    assert whole // 2 < taken < whole, "neither all nor nothing is left as it was"


def test_a_task_that_writes_all_the_time(start, tmp_path):
    victim = start("registers", "memory", "memory", "handler")
    for number in range(3):
        images = tmp_path / str(number)
        run = early("dump", "--pid", victim.pid, "-D", images, "--leave-running", kept=tmp_path / "kept")
        assert run.returncode == 0, run.stderr
        assert "of them while it ran" in run.stderr
        assert check(victim.pid, images, tmp_path / "kept") > 100
    assert victim.finish() == "ok\n"


SIZE = 128 << 10
HOLD_S = 0.25
READER = f"""
import mmap, os, sys, threading
fd = os.open(sys.argv[1] + "/mounted/file", os.O_RDONLY)
room = mmap.mmap(-1, {SIZE}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
room.write(bytes({SIZE}))
def read():
    while True:
        os.preadv(fd, [room], 0)
threading.Thread(target=read, daemon=True).start()
threading.Event().wait()
"""


# The task was stopped just now: by then it is in its next read.
IN_A_READ = f"""
import time
arm = memory.Tracker.arm
memory.Tracker.arm = lambda *arguments: (time.sleep({HOLD_S / 3}), arm(*arguments))[1]
from lazyd import cli
"""


class SlowFiles:
    """A filesystem of one file that is read past the page cache, each time with other bytes, and slowly (fuse(4))."""

    _LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _INIT, _INTERRUPT, _BATCH_FORGET = 1, 2, 3, 14, 15, 26, 36, 42
    _REQUEST, _ANSWER, _INODE, _FILE = struct.Struct("<IIQQ"), struct.Struct("<IiQ"), 1, 2
    _HEAD_BYTES = 40

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self._place = place
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"slow", os.fsencode(place), b"fuse", 0, options):
            os.close(self._fd)
            pytest.skip("may not mount a FUSE filesystem here")
        self.reads = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # ENODEV: unmounted
            while True:
                request = os.read(self._fd, 1 << 20)
                _, code, unique, node = self._REQUEST.unpack_from(request)
                if code not in (self._FORGET, self._INTERRUPT, self._BATCH_FORGET):
                    body = self._answer(code, node, request)
                    error = 0 if body is not None else -errno.ENOSYS
                    body = body or b""
                    os.write(self._fd, self._ANSWER.pack(self._ANSWER.size + len(body), error, unique) + body)

    def _answer(self, code: int, node: int, request: bytes) -> bytes | None:
        if code == self._INIT:
            return struct.pack("<IIIIHHIIHH8I", 7, 31, 0, 0, 0, 0, SIZE, 1, 0, 0, *[0] * 8)
        if code == self._LOOKUP:
            return struct.pack("<QQQQII", self._FILE, 0, 1000, 1000, 0, 0) + self._attributes(self._FILE)
        if code == self._GETATTR:
            return struct.pack("<QII", 1000, 0, 0) + self._attributes(node)
        if code == self._OPEN:
            return struct.pack("<QII", 0, 1, 0)  # FOPEN_DIRECT_IO
        if code == self._READ:
            time.sleep(HOLD_S)
            self.reads += 1
            (size,) = struct.unpack_from("<I", request, self._HEAD_BYTES + 16)
            return self.reads.to_bytes(8, "little") * (size // 8)
        return None

    def _attributes(self, node: int) -> bytes:
        mode = stat.S_IFREG | 0o444 if node == self._FILE else stat.S_IFDIR | 0o555
        return struct.pack("<6Q10I", node, SIZE, SIZE // 512, *[0] * 6, mode, 1, 0, 0, 0, PAGE, 0)

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "-l", str(self._place)], check=True)
        self._thread.join(10)
        os.close(self._fd)


@pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no /dev/fuse")
def test_reads_past_the_page_cache_that_are_on_their_way(tmp_path):
    """Their pages were found before they were protected, and are written after: no fault tells of it."""
    files = SlowFiles(tmp_path / "mounted")
    process = None
    try:
        null = subprocess.DEVNULL
        command = [sys.executable, "-c", READER, str(tmp_path)]
        process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
        wait_until(lambda: files.reads > 1, "reads")
        images = tmp_path / "images"
        program = EARLY.replace("from lazyd import cli", IN_A_READ)
        words = ["dump", "--pid", process.pid, "-D", images, "--leave-running"]
        run = early(*words, program=program, kept=tmp_path / "kept")
        assert run.returncode == 0, run.stderr
        assert "of them while it ran" in run.stderr
        assert check(process.pid, images, tmp_path / "kept") > SIZE // PAGE
        assert process.poll() is None
    finally:
        if process is not None:
            os.killpg(process.pid, signal.SIGKILL)
        files.close()
        if process is not None:
            process.wait()


def test_a_task_that_executes_itself_all_the_time(tmp_path):
    """The memory that was copied, and whose writes are tracked, is gone again and again."""
    source, program = tmp_path / "execs.c", str(tmp_path / "execs")
    source.write_text(EXECS)
    subprocess.run(["gcc", "-O2", "-o", program, str(source)], check=True)
    null = subprocess.DEVNULL
    process = subprocess.Popen([program, program], stdin=null, stdout=null, stderr=null, start_new_session=True)
    try:
        for number in range(4):
            images = tmp_path / f"images{number}"
            run = early("dump", "--pid", process.pid, "-D", images, "--leave-running", kept=tmp_path / "kept")
            if run.returncode:
                assert "changes faster than it can be looked at" in run.stderr
            else:
                assert check(process.pid, images, tmp_path / "kept") > 1
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_who_tracks_already_is_left_alone(start, tmp_path):
    """A dump with no parent in between changes nothing of what the next one on top of the first knows."""
    victim = start("registers", "memory")
    first, between, last = tmp_path / "first", tmp_path / "between", tmp_path / "last"
    assert early("pre-dump", "--pid", victim.pid, "-D", first).returncode == 0
    run = early("dump", "--pid", victim.pid, "-D", between, "--leave-running")
    assert run.returncode == 0, run.stderr
    assert "while it ran" not in run.stderr
    words = ["dump", "--pid", victim.pid, "-D", last, "--parent", first, "--leave-running"]
    run = early(*words, kept=tmp_path / "kept")
    assert "in the parent" in run.stderr
    assert check(victim.pid, last, tmp_path / "kept") > 100
    assert victim.finish() == "ok\n"


NOTHING_EARLY = """
from lazyd.dump import transfer
transfer.LocalTransfer.write_early = lambda *_: False
from lazyd import cli
"""


NEVER_ARMED = """
def arm(*_):
    raise SystemExit("armed")
memory.Tracker.arm = arm
from lazyd import cli
"""


def test_what_is_early_is_of_no_parent(start, tmp_path):
    """Where the early copy comes to nothing, its tracking says nothing about the parent's images."""
    victim = start("registers", "memory")
    first, second = tmp_path / "first", tmp_path / "second"
    assert early("dump", "--pid", victim.pid, "-D", first, "--leave-running").returncode == 0
    program = EARLY.replace("from lazyd import cli", NOTHING_EARLY)
    words = ["dump", "--pid", victim.pid, "-D", second, "--parent", first, "--leave-running"]
    run = early(*words, program=program, kept=tmp_path / "kept")
    assert run.returncode == 0, run.stderr
    assert "in the parent" not in run.stderr
    assert check(victim.pid, second, tmp_path / "kept") > 100
    assert victim.finish() == "ok\n"


def test_what_goes_to_a_page_server_is_not_copied_early(start, tmp_path):
    """It goes through one stream in order: nothing is tracked for what could not be sent."""
    victim = start("registers", "memory")
    program = EARLY.replace("from lazyd import cli", NEVER_ARMED)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        to = ["--page-server", "--address", "127.0.0.1", "--port", server.getsockname()[1]]
        words = [sys.executable, "-c", program, "dump", "--pid", victim.pid, "-D", tmp_path / "images", *to]
        with subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True) as process:
            connection, _ = server.accept()
            assert len(connection.recv(24)) == 24  # OPEN2
            connection.sendall(b"\0")
            connection.recv(1)
            connection.close()
            _, said = process.communicate(timeout=30)
    assert said.startswith("127.0.0.1:"), "the connection it was, that ended it"
    assert "armed" not in said
    assert victim.finish() == "ok\n"


HEAD = """
from lazyd.dump import memory, run, transfer
memory.EARLY_BYTES = memory.EARLY_BYTES_A_THREAD = 0
from lazyd.target import remote, state, tracing, userfault
for module in (remote, state, tracing):
    module.request = counted(module.request)
for place, name in ((transfer, "copy_early"), (memory.MemoryDump, "copy_early"), (memory.Tracker, "arm"),
                    (memory.Scanner, "scan"), (transfer.LocalTransfer, "write_early"), (userfault, "take_userfaultfd"),
                    (transfer.LocalTransfer, "write_pagemap"), (transfer, "copy_pages")):
    setattr(place, name, counted(getattr(place, name)))
from lazyd import cli, cli_dump
"""


def test_a_killed_lazyd_leaves_the_task_running(start, tmp_path):
    victim = start("registers", "nanosleep", "memory")
    words = ["dump", "--leave-running", "-v1", "--pid", victim.pid, "-D"]
    with Dying(HEAD, "return cli.main(words)") as dying:
        code, steps = dying.run(10**9, *words, tmp_path / "whole")
        assert code == 0
        maps = layout(victim.pid)[0]
        for limit in range(0, steps, 41):
            images = tmp_path / f"images{limit}"
            assert dying.run(limit, *words, images)[0] == -signal.SIGKILL
            wait_until(lambda: tracing.tracer_of(victim.pid) == 0, "the kernel to let go")
            assert tracing.state_of(victim.pid) in "RSD"
            assert not images.exists() or (images / "inventory.img").exists()
            wait_until(lambda: layout(victim.pid)[0] == maps, f"the mappings, killed after {limit} steps")
            assert " uw" not in Path(f"/proc/{victim.pid}/smaps").read_text(), "nothing tracks it any more"
    assert victim.finish() == "ok\n"


SLOWLY = EARLY.replace(
    "from lazyd import cli",
    """
from lazyd.dump import transfer
copy = transfer.copy_early
def slow(*arguments, **named):
    print("copying", flush=True)
    sys.stdin.read(1)
    return copy(*arguments, **named)
transfer.copy_early = slow
from lazyd import cli""",
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_early_copy_in_order(start, number, tmp_path):
    victim = start("registers", "nanosleep", "memory")
    words = [sys.executable, "-c", SLOWLY, "dump", "--pid", str(victim.pid), "-D", str(tmp_path / "images")]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "copying\n"
        assert tracing.tracer_of(victim.pid) == 0, "it runs meanwhile"
        process.send_signal(number)
        watches = Path(f"/proc/{process.pid}/status")
        wait_until(lambda: "SigPnd:\t0000000000000000" in watches.read_text(), "the signal to be taken")
        _, said = process.communicate("x", timeout=30)
        assert process.returncode == 1
    assert said.count("\n") == 1
    assert number.name in said or "cancelled" in said
    assert not [path for path in tmp_path.rglob("*") if "img" in path.name or path.name.startswith(".")]
    assert victim.finish() == "ok\n"
