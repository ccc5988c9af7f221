# SPDX-License-Identifier: MIT
"""Attach to tasks that stand empty: they cannot tell, whatever they were doing, and have their bytes.

The victim, tests/victims/steady.c, checks itself: its registers, its memory, what its system calls return; and, in its
thread `lazy`, each word of an area that is empty when lazyd comes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from images_builder import Entry, Task, build_checkpoint
from kernel_harness import (
    BASE,
    PAGE,
    STEADY_KINDS,
    STRESS,
    Run,
    Vma,
    descendants,
    layout,
    memory,
    task_state,
    wait_until,
)
from process_harness import KILLED, Dying, family_in, is_whole_again, kill_offices

from lazyd.errors import AttachError, LazydError
from lazyd.image import load
from lazyd.target import Expected, tracing
from lazyd.target.attach import attach_all, find_tasks

LAZY_BASE, LAZY_PAGES = 0x2000_0000_0000, 1024
IMAGE_PID = 100
VICTIMS = Path(__file__).parent.parent / "victims"
RESTART_SYSCALL = 219  # arch/x86/entry/syscalls/syscall_64.tbl


def stop(pid):
    """Stop a task; return when each of its threads has."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: {tracing.state_of(tid) for tid in tracing.thread_ids(pid)} == {"T"}, "the stop")


def registered(pid):
    """Whether any mapping is registered with a userfaultfd."""
    return " um" in Path(f"/proc/{pid}/smaps").read_text()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Images of the victim's lazy area: each word of its first half is its own address."""
    pages = LAZY_PAGES // 2
    data = struct.pack(f"<{pages * 512}Q", *range(LAZY_BASE, LAZY_BASE + pages * PAGE, 8))
    vmas = [{"start": LAZY_BASE, "end": LAZY_BASE + LAZY_PAGES * PAGE}]
    task = Task(IMAGE_PID, [Entry(LAZY_BASE, pages, data=data)], vmas=vmas)
    return build_checkpoint(tmp_path_factory.mktemp("images") / "images", [task])


class Serving:
    """A lazyd that was told to attach."""

    def __init__(self, images, folder, pid, *words, image_pid=IMAGE_PID):
        command = [sys.executable, "-m", "lazyd", "-D", str(images), "--pid", str(pid), "--no-progress", "-v4"]
        if image_pid:
            command += ["--image-pid", str(image_pid)]
        self.folder = folder
        self.process = subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True, cwd=folder)
        self.output = ""

    def family(self):
        """The processes that keep and serve, by office; see process_harness."""
        return family_in(self.folder, self.process.pid if self.process.poll() is None else 0)

    def wait_attached(self):
        """Wait until the task runs and is served."""
        while "attached to" not in self.output:
            line = self.process.stderr.readline()
            assert line, self.output
            self.output += line

    def wait(self):
        """Its exit code."""
        self.output += self.process.stderr.read()
        return self.process.wait(60)

    def close(self):
        """End it and what it has made."""
        while family := self.family():
            kill_offices(family, family)
            time.sleep(0.001)
        self.process.wait()
        self.process.stderr.close()


@pytest.fixture
def serve(images, tmp_path):
    """Start daemons that are gone when the test is over."""
    running = []

    def serve(pid, *words, of=None, **more):
        folder = tmp_path / f"serving{len(running)}"
        folder.mkdir()
        running.append(Serving(of or images, folder, pid, *words, **more))
        return running[-1]

    yield serve
    for one in running:
        one.close()


def check_served(victim, daemon, before):
    """See that a victim that is attached to is as before, has all its bytes, and goes on."""
    daemon.wait_attached()
    assert daemon.wait() == 0, daemon.output
    wait_until(lambda: layout(victim.pid) == before, "the task to be as before", 5)
    (victim.state / "served").touch()
    time.sleep(0.02)
    assert victim.finish() == "ok\n"


@pytest.mark.parametrize("kind", STEADY_KINDS)
def test_a_task_cannot_tell(start, serve, kind):
    victim = start(kind, "lazy")
    check_served(victim, serve(victim.pid), layout(victim.pid))


def test_64_threads(start, serve):
    victim = start(*(STEADY_KINDS * 6)[:62], "lazy")
    assert len(tracing.thread_ids(victim.pid)) == 64
    check_served(victim, serve(victim.pid), layout(victim.pid))


def test_while_it_touches_its_memory(start, serve):
    """Faults wait from the first moment on; with background fill off each page comes by one."""
    victim = start("registers", "lazy")
    stop(victim.pid)
    (victim.state / "served").touch()
    daemon = serve(victim.pid, "--fill", "off")
    daemon.wait_attached()
    wait_until(lambda: task_state(victim.pid) == "T", "it to stop again: it passes a moment of running")
    os.kill(victim.pid, signal.SIGCONT)
    assert victim.finish() == "ok\n"
    assert daemon.wait() == 0, daemon.output


def expected_of(images):
    """What the images expect of the victim."""
    with load(images) as checkpoint:
        (task,) = checkpoint.tasks
        return Expected(task.pid, task.vmas, task.extents.filled_by_restorer(), None, task.extents, ())


@pytest.mark.parametrize("kinds", [["registers", "calls", "handler"], ["nanosleep", "futex", "sigsuspend", "poll"]])
def test_attach_and_give_up_500_times(start, images, kinds):
    victim = start(*kinds, "lazy")
    before = layout(victim.pid)
    expected = expected_of(images)
    for _ in range(250 * STRESS):
        with attach_all([(victim.pid, expected)], drop_pages=False) as attachment:
            assert attachment.tasks[0].pid == victim.pid
        time.sleep(random.uniform(0, 0.002))
    wait_until(lambda: layout(victim.pid) == before, "the task to be as before", 5)
    assert not registered(victim.pid)
    assert victim.finish() == "ok\n"


VFORK = r"""
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	void *at = (void *)0x200000000000UL;
	uint64_t *words = mmap(at, 4 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (vfork() == 0) {
		while (access(argv[1], F_OK))
			usleep(1000);
		_exit(0);
	}
	for (uint64_t i = 0; i < 1 << 18; i++)
		if (words[i] != (uint64_t)(words + i))
			return 1;
	puts("ok");
	return 0;
}
"""


def test_the_parent_of_a_vfork(tmp_path, serve):
    (tmp_path / "vforks.c").write_text(VFORK)
    subprocess.run(["gcc", "-o", str(tmp_path / "vforks"), str(tmp_path / "vforks.c")], check=True)
    go = tmp_path / "go"
    process = subprocess.Popen([str(tmp_path / "vforks"), str(go)], stdout=subprocess.PIPE, start_new_session=True)
    try:
        wait_until(lambda: tracing.state_of(process.pid) == "D", "the vfork")
        daemon = serve(process.pid)
        daemon.wait_attached()
        go.touch()
        assert process.communicate(timeout=30)[0] == b"ok\n"
        assert daemon.wait() == 0, daemon.output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


FILTERED = """
import ctypes, mmap, os, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
assert libc.mmap(0x200000000000, 4 << 20, 3, 0x100022, -1, 0) == 0x200000000000
# Kill whoever opens a userfaultfd: ld nr; jeq 323 -> kill; allow
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 323), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)]
text = b"".join(struct.pack("HBBI", *one) for one in code)
buffer = ctypes.create_string_buffer(text, len(text))
program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(buffer))
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.create_string_buffer(program, len(program)), 0, 0) == 0
print("ready", flush=True)
sys.stdin.readline()
words = (ctypes.c_uint64 * (1 << 18)).from_address(0x200000000000)
print("ok" if list(words) == list(range(0x200000000000, 0x200000000000 + (2 << 20), 8)) else "wrong", flush=True)
"""


def test_a_task_with_a_filter_that_kills(serve):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", FILTERED], text=True, **pipes) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            daemon = serve(process.pid)
            daemon.wait_attached()
            assert tracing.status_fields(process.pid)["Seccomp"] == "2"
            assert process.communicate("\n", timeout=30)[0] == "ok\n"
            assert daemon.wait() == 0, daemon.output
        finally:
            process.kill()


def test_in_another_pid_namespace(stage, serve):
    vmas = [Vma(BASE, 600, [Run(BASE, 400)])]
    steps = [*memory(vmas), "say", "ready", "await", "sweep", "random", "2"]
    command = ["unshare", "--pid", "--fork", "--kill-child", str(stage.skeleton), *steps]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        (inner,) = descendants(process.pid)
        # Its first process is number 1 there, and the images know it as that.
        daemon = serve(inner, of=stage.build({1: vmas}), image_pid=0)
        daemon.wait_attached()
        assert process.communicate("\n", timeout=30)[0] == "ok\n"
        assert daemon.wait() == 0, daemon.output
    finally:
        process.kill()
        process.wait()


def test_a_tree(stage, serve):
    vmas = [Vma(BASE, 600, [Run(BASE, 400)])]
    check = ["await", "sweep", "random", "2"]
    skeleton = stage.start_skeleton(
        *memory(vmas), "child", "ready", "pause", "sweep", "forward", "1", "end", "say", "two", *check
    )
    skeleton.heard("two")
    (child,) = descendants(skeleton.pid)
    assert find_tasks(skeleton.pid, 0, with_children=True) == {skeleton.pid: skeleton.pid, child: child}
    daemon = serve(skeleton.pid, "--tree", of=stage.build({skeleton.pid: vmas, child: vmas}), image_pid=0)
    daemon.wait_attached()
    os.kill(child, signal.SIGUSR1)
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n")
    skeleton.close()
    assert daemon.wait() == 0, daemon.output
    assert "tasks: 2:" in daemon.output


def test_the_serving_process_is_killed(start, serve):
    """It dies before the task goes on, or while it touches its memory: another one goes on."""
    resumed = 0
    for number in range(6 * STRESS):
        victim = start("registers", "lazy")
        stop(victim.pid)
        (victim.state / "served").touch()
        daemon = serve(victim.pid, "--fill", "off")
        daemon.wait_attached()
        wait_until(lambda of=daemon: "server" in of.family(), "a process that serves")
        child = daemon.family()["server"]
        if number % 2:
            os.kill(victim.pid, signal.SIGCONT)
            time.sleep(random.uniform(0, 0.005))
        with contextlib.suppress(ProcessLookupError):  # it may be through
            os.kill(child, signal.SIGKILL)
        os.kill(victim.pid, signal.SIGCONT)
        assert victim.finish() == "ok\n"
        assert daemon.wait() == 0, daemon.output
        resumed += "another goes on" in daemon.output
    assert resumed >= 3 * STRESS


@pytest.mark.parametrize("offices", KILLED, ids="-".join)
def test_any_two_that_attached_are_killed_at_once(start, serve, offices, tmp_path):
    for number in range(STRESS):
        victim = start("registers", "lazy")
        stop(victim.pid)
        (victim.state / "served").touch()
        statistics = tmp_path / f"stats{number}.json"
        pidfile = tmp_path / f"lazy{number}.pid"
        daemon = serve(victim.pid, "--fill", "off", "--stats", str(statistics), "--pidfile", str(pidfile))
        daemon.wait_attached()
        wait_until(lambda of=daemon: len(of.family()) == 3, "all three")
        before = daemon.family()
        os.kill(victim.pid, signal.SIGCONT)
        time.sleep(random.uniform(0, 0.005))
        kill_offices(before, offices)
        wait_until(lambda of=daemon, was=before: is_whole_again(of.family(), was, offices), "others")
        assert victim.finish() == "ok\n", daemon.output
        assert daemon.wait() == (-signal.SIGKILL if "keeper" in offices else 0), daemon.output
        assert json.loads(statistics.read_text())["exit_code"] == 0, daemon.output
        pid = int(pidfile.read_text())
        # It may have been done before another keeper was needed.
        assert (pid == before["keeper"]) is (f"the keeper {before['keeper']} died" not in daemon.output)


# ---- what is refused ----


def refused(serve, pid, *words, **more):
    """Attach in vain; the one line that says why."""
    daemon = serve(pid, *words, **more)
    assert daemon.wait() == 1, daemon.output
    lines = [line for line in daemon.output.splitlines() if "Error: " in line]
    assert len(lines) == 1, daemon.output
    return lines[0]


def test_a_process_that_is_gone(serve):
    assert "there is no process 4194303" in refused(serve, 2**22 - 1)


def test_images_of_another_task(start, serve):
    victim = start("registers", "lazy")
    assert f"no task {victim.pid} with memory in it; --image-pid names another" in refused(
        serve, victim.pid, image_pid=0
    )
    assert victim.finish() == "ok\n"


def test_memory_that_is_not_mapped(start, serve):
    victim = start("registers")
    line = refused(serve, victim.pid)
    assert f"process {victim.pid} is not mapped as the images say: 0x200000000000-0x200000400000" in line
    assert "is not mapped" in line
    assert victim.finish() == "ok\n"


def test_pages_where_it_should_be_empty(start, serve):
    victim = start("registers", "lazy")
    (victim.state / "served").touch()
    wait_until((victim.state / "result").exists, "a page")  # it has read zeros, and says so
    (victim.state / "result").unlink()
    line = refused(serve, victim.pid)
    assert f"process {victim.pid}: " in line
    assert "pages are there where the images say that it is empty, the first in 0x200000000000-" in line
    assert "--drop-pages" in line
    assert not registered(victim.pid)


def test_pages_that_are_dropped(stage, serve):
    vmas = [Vma(BASE, 600, [Run(BASE, 400)])]
    steps = ["vma", hex(BASE), "600", "dumped", hex(BASE), "400", "prefill", hex(BASE + 100 * PAGE), "50"]
    skeleton = stage.start_skeleton(*steps, "say", "ready", "await", "sweep", "random", "2")
    skeleton.heard("ready")
    images = stage.build({IMAGE_PID: vmas})
    assert "50 pages are there" in refused(serve, skeleton.pid, of=images)
    daemon = serve(skeleton.pid, "--drop-pages", of=images)
    daemon.wait_attached()
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n")
    skeleton.close()
    assert daemon.wait() == 0, daemon.output
    assert "by fill 400" in daemon.output or "pages: 400 in the images" in daemon.output


def test_a_range_of_another_userfaultfd(stage, serve):
    vmas = [Vma(BASE, 600, [Run(BASE, 400)])]
    skeleton = stage.start_skeleton(*memory(vmas), "open", "say", "ready", "await")
    skeleton.heard("ready")
    line = refused(serve, skeleton.pid, of=stage.build({IMAGE_PID: vmas}))
    assert f"process {skeleton.pid}: {BASE:#x}-{BASE + 600 * PAGE:#x} is served by a userfaultfd already" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prot": 1}, "its protection is rw-, not r--"),
        ({"end": LAZY_BASE + (LAZY_PAGES - 1) * PAGE}, "it ends at 0x200000400000"),
        ({"end": LAZY_BASE + (LAZY_PAGES + 1) * PAGE}, "0x200000400000-0x200000401000 is not mapped"),
        ({"start": LAZY_BASE + PAGE}, "it starts at 0x200000000000"),
        ({"start": LAZY_BASE - PAGE}, "0x1ffffffff000-0x200000000000 is not mapped"),
    ],
)
def test_memory_that_differs(start, serve, tmp_path, change, words):
    victim = start("registers", "lazy")
    vma = {"start": LAZY_BASE, "end": LAZY_BASE + LAZY_PAGES * PAGE, **change}
    images = build_checkpoint(tmp_path / "images", [Task(IMAGE_PID, [Entry(LAZY_BASE + PAGE, 1)], vmas=[vma])])
    assert words in refused(serve, victim.pid, of=images)
    assert not registered(victim.pid)
    assert victim.finish() == "ok\n"


def test_memory_of_a_file(start, serve, tmp_path):
    victim = start("registers", "lazy")
    line = next(line for line in Path(f"/proc/{victim.pid}/maps").read_text().splitlines() if "libc" in line)
    start_, end = (int(part, 16) for part in line.split()[0].split("-"))
    vma = {"start": start_, "end": end, "prot": 1}
    images = build_checkpoint(tmp_path / "images", [Task(IMAGE_PID, [Entry(start_, 1)], vmas=[vma])])
    assert "it is private mapping of a file" in refused(serve, victim.pid, of=images)


def test_a_task_that_somebody_traces(start, serve):
    victim = start("registers", "lazy")
    code = f"import time\nfrom lazyd.target.tracing import *\nt = StoppedTask({victim.pid})\n"
    code += "print(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as tracer:
        try:
            tracer.stdout.read(1)
            assert f"is traced by process {tracer.pid}" in refused(serve, victim.pid)
        finally:
            tracer.kill()
    assert victim.finish() == "ok\n"


def test_a_task_of_another_user(start, images, tmp_path):
    """Nobody attaches to what is root's."""
    victim = start("registers", "lazy")
    expected = expected_of(images)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            attach_all([(victim.pid, expected)], drop_pages=False)
        except LazydError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: PTH123  a descriptor, not a path
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    assert f"process {victim.pid}" in said
    assert "run as root" in said
    assert victim.finish() == "ok\n"


def test_another_program(start, images):
    victim = start("registers", "lazy")
    expected = expected_of(images)
    fields = Path(f"/proc/{victim.pid}/stat").read_text().rsplit(")", 1)[1].split()
    from lazyd.image.directory import Program  # noqa: PLC0415

    own = Program(*(int(fields[number - 3]) for number in (26, 28, 47)))
    attach_all([(victim.pid, expected._replace(program=own))], drop_pages=False).close()
    with pytest.raises(AttachError, match=f"process {victim.pid} runs another program than task {IMAGE_PID}"):
        attach_all([(victim.pid, expected._replace(program=own._replace(start_code=4096)))], drop_pages=False)
    assert victim.finish() == "ok\n"


# ---- lazyd is killed ----

HEAD = """
import fcntl
from pathlib import Path
from lazyd.image import load
from lazyd.target import Expected, attach, remote, tracing, userfault
for module in (remote, tracing):
    module.request = counted(module.request)
os.pwrite = counted(os.pwrite)
fcntl.ioctl = counted(fcntl.ioctl)
"""
BODY = """
with load(Path(words[1])) as checkpoint:
    (task,) = checkpoint.tasks
    expected = Expected(task.pid, task.vmas, task.extents.filled_by_restorer(), None, task.extents, ())
    attach.attach_all([(int(words[0]), expected)], drop_pages=False).close()
"""


@pytest.mark.parametrize("kinds", [("sigsuspend", "handler", "nanosleep", "lazy")])
def test_lazyd_is_killed_before_each_of_its_steps(start, images, kinds):
    """Each time the task is as it was, and nothing of it is registered."""
    victim = start(*kinds)
    before = layout(victim.pid)

    with Dying(HEAD, BODY) as dying:
        code, steps = dying.run(10**9, victim.pid, images)
        assert code == 0
        assert steps > 20
        for limit in range(steps):
            assert dying.run(limit, victim.pid, images)[0] == -signal.SIGKILL
            wait_until(
                lambda: layout(victim.pid) == before, f"the task to be as before, lazyd killed after {limit} steps", 5
            )
            assert not registered(victim.pid)
        assert dying.run(10**9, victim.pid, images)[0] == 0
    assert victim.finish() == "ok\n"


def test_a_daemon_says_when_it_is_attached(start, serve, tmp_path):
    victim = start("registers", "lazy")
    before = layout(victim.pid)
    daemon = serve(victim.pid, "--daemon", "--pidfile", str(tmp_path / "pid"))
    assert daemon.wait() == 0, daemon.output
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: task_state(pid) in ("", "Z"), "the daemon to end")
    wait_until(lambda: layout(victim.pid) == before, "the task to be as before", 5)
    (victim.state / "served").touch()
    time.sleep(0.02)
    assert victim.finish() == "ok\n"


@pytest.fixture(scope="session")
def tracer(tmp_path_factory):
    """What strace does, compiled."""
    target = tmp_path_factory.mktemp("tracer") / "tracer"
    words = ["gcc", "-std=gnu11", "-O2", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*words, "-o", str(target), str(VICTIMS / "tracer.c")], check=True)
    return target


def trace_until(tracer, pid, log, what, condition=lambda: True):
    """Trace a process for some 1,500 lines, and until the condition holds; return them: (thread, word, number)."""
    with subprocess.Popen([tracer, str(pid), log], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "tracing\n"
            wait_until(lambda: log.stat().st_size > 20_000 and condition(), what)
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait()
    assert code == 0
    lines = [line.split() for line in log.read_text().splitlines()]
    return [(int(tid), word, int(number)) for word, tid, number in lines]


def test_strace_before_and_after(start, serve, tracer, tmp_path):
    """A log of what the program does has no call that it did not do before, and none fails that did not."""
    victim = start("nanosleep", "poll", "ppoll", "futex", "read", "sigsuspend", "pending", "lazy")
    before = layout(victim.pid)
    first = trace_until(tracer, victim.pid, tmp_path / "first", "calls before")
    daemon = serve(victim.pid)
    daemon.wait_attached()
    second = trace_until(
        tracer, victim.pid, tmp_path / "second", "calls after", lambda: daemon.process.poll() is not None
    )
    assert daemon.wait() == 0, daemon.output

    def seen(log, word):
        return {(tid, number) for tid, at, number in log if at == word}

    def failures(log):
        # But for what the kernel says to itself when a call is to be restarted: ERESTARTSYS and the like.
        return {(tid, number) for tid, number in seen(log, "<") if number < 0 and not -516 <= number <= -512}

    restarted = {(int(tid), RESTART_SYSCALL) for tid in tracing.thread_ids(victim.pid)}
    assert seen(second, ">") - seen(first, ">") <= restarted
    assert seen(second, "!") <= seen(first, "!")
    assert failures(second) <= failures(first)
    assert layout(victim.pid) == before
    (victim.state / "served").touch()
    assert victim.finish() == "ok\n"
