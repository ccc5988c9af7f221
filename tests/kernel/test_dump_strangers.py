# SPDX-License-Identifier: MIT
"""What lazyd dump must not be caught out by: sharers of the task, and our own descriptors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_harness import STRESS, wait_until

from lazyd.target.others import Others
from lazyd.target.process import children
from lazyd.target.tracing import state_of, tracer_of

LAZYD = str(Path(sys.executable).parent / "lazyd")

SHARER = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
static char stack[3][65536] __attribute__((aligned(16)));
static int flags, ends;
static int idle(void *unused)
{
	(void)unused;
	for (;;)
		pause();
}
static int stranger(void *unused)
{
	(void)unused;
	if (ends) {
		/* A thread goes on after the leading one. Neither uses the C library, which knows nothing of them. */
		int all = CLONE_VM | CLONE_FILES | CLONE_FS | CLONE_SIGHAND | CLONE_THREAD;
		clone(idle, stack[2] + sizeof(stack[2]), all, NULL);
		syscall(SYS_exit, 0);
	}
	for (;;)
		pause();
}
/* Its parent ends: it is nobody's child that the dumped one knows of. */
static int between(void *unused)
{
	(void)unused;
	int pid = clone(stranger, stack[0] + sizeof(stack[0]), flags | SIGCHLD, NULL);
	char line[64];
	int length = snprintf(line, sizeof(line), "%d\n", pid);
	syscall(SYS_write, 1, line, length);
	syscall(SYS_exit, pid < 0);
	return 0;
}
int main(int count, char **words)
{
	flags = atoi(words[1]);
	ends = count > 2;
	if (clone(between, stack[1] + sizeof(stack[1]), flags | SIGCHLD, NULL) < 0)
		return 1;
	wait(NULL);
	dup2(open("/dev/null", O_RDWR), 1);
	for (;;)
		pause();
}
"""
CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND = 0x100, 0x200, 0x400, 0x800


@pytest.fixture(scope="session")
def sharer(tmp_path_factory):
    """A program that shares with a stranger what it is told to."""
    folder = tmp_path_factory.mktemp("sharer")
    (folder / "sharer.c").write_text(SHARER)
    subprocess.run(["gcc", "-O1", "-o", str(folder / "sharer"), str(folder / "sharer.c")], check=True)
    return folder / "sharer"


def start_sharer(sharer, flags, *words):
    """Start it; return it and the stranger's pid, once the one between, which shares the same, is gone."""
    null = subprocess.DEVNULL
    command = [str(sharer), str(flags), *words]
    process = subprocess.Popen(
        command, stdin=null, stdout=subprocess.PIPE, stderr=null, start_new_session=True, cwd="/"
    )
    stranger = int(process.stdout.readline())
    try:
        wait_until(lambda: children(process.pid) == [], "the one between to be reaped")
    except BaseException:
        end(process)
        raise
    return process, stranger


def end(process):
    """End it and the stranger, which is in its group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (CLONE_VM, ["memory"]),
        (CLONE_FILES, ["descriptors"]),
        (CLONE_FS, ["directories"]),
        (CLONE_VM | CLONE_SIGHAND, ["memory", "handlers of signals"]),
    ],
)
def test_a_stranger_that_shares_is_named(sharer, flags, said, tmp_path):
    process, stranger = start_sharer(sharer, flags)
    try:
        words = [LAZYD, "dump", "--pid", str(process.pid), "-D", str(tmp_path / "images")]
        run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert run.returncode == 1, run
        for word in said:
            assert f"\n  {word}: shared with process {stranger} (sharer)" in run.stderr, run.stderr
        assert run.stderr.count("shared with") == len(said)
        assert "`criu dump`" in run.stderr
        assert not (tmp_path / "images").exists()
        assert state_of(process.pid) == "S"
    finally:
        end(process)


def test_threads_of_a_stranger_whose_leader_has_ended(sharer):
    """The leader is a zombie without memory; what shares it is another thread."""
    process, stranger = start_sharer(sharer, CLONE_VM | CLONE_SIGHAND, "ends")
    try:
        wait_until(lambda: state_of(stranger) == "Z", "the leader to end")
        others = Others([process.pid])
        assert [f"{one}" for one in others.find() if one.where == "memory"] == [
            f"memory: shared with process {stranger} (sharer) (vfork or clone)"
        ]
        assert [one.where for one in others.find_again()] == ["memory"]
    finally:
        end(process)


def test_a_stranger_that_is_new_once_the_task_is_stopped(sharer):
    """As if it had been made between the look and the stop."""
    process, _ = start_sharer(sharer, CLONE_FILES)
    try:
        others = Others([process.pid])
        assert [one.where for one in others.find_again()] == ["descriptors"]
    finally:
        end(process)


def test_a_plain_task_shares_nothing(start):
    victim = start("registers", "calls")
    others = Others([victim.pid])
    assert others.find() == []
    assert others.find_again() == []
    assert victim.finish() == "ok\n"


CLOSED = """
import os, subprocess, sys
closed, words = eval(sys.argv[1]), sys.argv[2:]
for fd in closed:
    os.close(fd)
os.execv(words[0], words)
"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_our_own_standard_streams_are_closed(start, closed, tmp_path):
    """None of our images, sockets or userfaultfds becomes one, and gets what is printed."""
    victim = start("memory", "registers")
    parent = []
    for verb, name in (("pre-dump", "first"), ("dump", "second")):
        extra = ["-R"] if verb == "dump" else []
        words = [LAZYD, verb, "--pid", str(victim.pid), "-D", str(tmp_path / name), *parent, *extra]
        run = subprocess.run(
            [sys.executable, "-c", CLOSED, repr(closed), *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert run.returncode == 0, run
        assert not run.stdout
        assert "not tracked" not in run.stderr
        verified = subprocess.run([LAZYD, "verify", str(tmp_path / name)], capture_output=True, text=True, check=False)
        assert verified.stdout.endswith("good\n"), verified
        parent = ["--parent", str(tmp_path / "first")]
    full, change = (
        sum(one.stat().st_size for one in (tmp_path / name).glob("pages-*")) for name in ("first", "second")
    )
    assert change < full, "the tracking that the first one left is not there"
    assert victim.finish() == "ok\n"


# ---- what does not stop, and what ends meanwhile ----

VFORKS = r"""
#include <unistd.h>
int main(void) { if (!vfork()) { close(1); pause(); _exit(0); } pause(); }
"""


def test_what_cannot_be_stopped_is_not_waited_for(tmp_path):
    """It is nobody's child that waits for it: not when it is stopped, and not when it is let go."""
    (tmp_path / "vforks.c").write_text(VFORKS)
    subprocess.run(["gcc", "-o", str(tmp_path / "vforks"), str(tmp_path / "vforks.c")], check=True)
    process = subprocess.Popen([str(tmp_path / "vforks")], start_new_session=True, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: state_of(process.pid) == "D", "the vfork")
        code = f"from lazyd.target.tracing import StoppedTask\nStoppedTask({process.pid})"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
        assert run.stderr.splitlines()[-1].endswith("it waits for its child after vfork; try again later"), run.stderr
        # And it is as it was.
        (child,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: state_of(process.pid) == "S", "the parent to go on")
        assert tracer_of(process.pid) == 0
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


KILLING = """
import itertools, os, signal, sys
limit, pid = int(sys.argv.pop(1)), int(sys.argv[3])
numbers = itertools.count()
def counted(function):
    def counting(*arguments, **named):
        if next(numbers) == limit:
            os.kill(pid, signal.SIGKILL)
        return function(*arguments, **named)
    return counting
from lazyd.target import crowd, remote, state, tracing
for module in (remote, state, tracing):
    module.request = counted(module.request)
crowd.wait_for_stop = counted(crowd.wait_for_stop)
from lazyd.dump import run, transfer
transfer.copy_pages = counted(transfer.copy_pages)
from lazyd.cli import main
code = main(sys.argv[1:])
print(next(numbers))
sys.exit(code)
"""


def dump_and_kill(limit, victim, images):
    """Dump a task that is killed before one of lazyd's steps."""
    words = [sys.executable, "-c", KILLING, str(limit), "dump", "--pid", str(victim.pid), "-D", str(images)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


def test_a_task_that_is_killed_while_it_is_dumped_ends_the_dump(start, tmp_path):
    """At each of some steps, over all of the dump; its images are whole or there are none."""
    kinds = ["registers", "nanosleep", "calls", "futex", "poll", "memory"]
    whole = dump_and_kill(10**9, start(*kinds), tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    steps = int(whole.stdout)
    for limit in range(3, steps, max(1, steps // (12 * STRESS))):
        victim, images = start(*kinds), tmp_path / f"images{limit}"
        run = dump_and_kill(limit, victim, images)
        victim.process.wait(10)
        if run.returncode == 0:
            assert (images / "inventory.img").exists()
            continue
        assert run.stderr.count("\n") == 1, run.stderr
        assert "ended" in run.stderr or "killed" in run.stderr, run.stderr
        assert not images.exists()


def test_a_main_thread_that_has_ended(tmp_path):
    """The others run on: stock criu refuses that too."""
    source = tmp_path / "leaderless.c"
    source.write_text(
        "#include <pthread.h>\n#include <unistd.h>\nstatic void *idle(void *u) { for (;;) pause(); return u; }\n"
        "int main(void) { pthread_t t; pthread_create(&t, NULL, idle, NULL); pthread_exit(NULL); }\n"
    )
    subprocess.run(["gcc", "-pthread", "-o", str(tmp_path / "leaderless"), str(source)], check=True)
    process = subprocess.Popen([str(tmp_path / "leaderless")], start_new_session=True, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: state_of(process.pid) == "Z", "the main thread to end")
        words = [LAZYD, "dump", "--pid", str(process.pid), "-D", str(tmp_path / "images")]
        run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert run.returncode == 1
        assert f"the main thread of process {process.pid} (leaderless) has ended" in run.stderr
        assert run.stderr.count("\n") == 1
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
