# SPDX-License-Identifier: MIT
"""What lazyd dump must not be caught out by: sharers of the task, and our own descriptors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_harness import wait_until

from lazyd.target.others import Others
from lazyd.target.tracing import state_of, status_fields

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
    """Start it; return it and the stranger's pid."""
    null = subprocess.DEVNULL
    command = [str(sharer), str(flags), *words]
    process = subprocess.Popen(
        command, stdin=null, stdout=subprocess.PIPE, stderr=null, start_new_session=True, cwd="/"
    )
    stranger = int(process.stdout.readline())
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
        wait_until(lambda: int(status_fields(stranger)["PPid"]) != process.pid, "the one between to end")
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
