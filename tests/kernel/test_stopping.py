# SPDX-License-Identifier: MIT
"""Stop tasks, make them do system calls, let them go: they cannot tell. Also when lazyd is killed on the way.

The victim, tests/victims/steady.c, checks itself: its registers, its memory, what its system calls return.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kernel_harness import NEEDS_KTHREADD, STEADY_KINDS, STRESS, layout, wait_until

from lazyd.errors import DumpError
from lazyd.target import tracing
from lazyd.target.remote import Call, RemoteCalls, Result, find_room
from lazyd.target.survey import check_is_process
from lazyd.target.tracing import StoppedTask

ROOT = Path(__file__).resolve().parent.parent.parent
SYS_GETTID, SYS_GETPID, SYS_DUP, SYS_CLOSE, SYS_UNAME, SYS_GETPPID = 186, 39, 32, 3, 63, 110


def look_around(pid):
    """Stop a task and have each of its threads do some calls; check what they return."""
    with StoppedTask(pid) as task:
        room = find_room(task)
        for thread in task:
            registers, mask = thread.read_registers(), thread.signal_mask()
            with RemoteCalls(pid, thread, room) as calls:
                asked = [Call(SYS_GETTID), Call(SYS_GETPID), Call(SYS_DUP, (0,)), Call(SYS_CLOSE, (Result(2),))]
                tid, own, _, closed, uname = calls.run(*asked, Call(SYS_UNAME, (calls.buffers,)))
                assert (tid, own, closed, uname) == (thread.tid, pid, 0, 0)
                assert calls.read(calls.buffers, 6) == b"Linux\0"
            assert thread.read_registers() == registers
            assert thread.signal_mask() == mask


@pytest.mark.parametrize("kind", STEADY_KINDS)
def test_a_task_cannot_tell_that_it_did_system_calls(start, kind):
    victim = start(kind)
    before = layout(victim.pid)
    for _ in range(40 * STRESS):
        look_around(victim.pid)
        time.sleep(random.uniform(0, 0.02))
    # Not at once: the mask that the kernel shows of a thread inside sigsuspend is not the one it comes back to.
    wait_until(lambda: layout(victim.pid) == before, "the task to be as before", 5)
    assert victim.finish() == "ok\n"


def test_many_threads_of_all_kinds(start):
    victim = start(*STEADY_KINDS, *STEADY_KINDS, *STEADY_KINDS, *STEADY_KINDS, *STEADY_KINDS)
    before = layout(victim.pid)
    for _ in range(5 * STRESS):
        look_around(victim.pid)
    wait_until(lambda: layout(victim.pid) == before, "the task to be as before", 5)
    assert victim.finish() == "ok\n"


def test_more_calls_than_fit_at_once(start):
    victim = start("registers")
    with StoppedTask(victim.pid) as task, RemoteCalls(victim.pid, task.leader, find_room(task)) as calls:
        assert calls.run(*[Call(SYS_GETPID)] * 200) == [victim.pid] * 200
    assert victim.finish() == "ok\n"


def test_a_call_that_fails_returns_its_error(start):
    victim = start("registers")
    with StoppedTask(victim.pid) as task, RemoteCalls(victim.pid, task.leader, find_room(task)) as calls:
        assert calls.run(Call(SYS_CLOSE, (999,)), Call(SYS_GETPID)) == [-9, victim.pid]
    assert victim.finish() == "ok\n"


def test_calls_can_be_stepped_through(start):
    """What a later call undoes is undone, even if the caller gives up in between."""
    victim = start("nanosleep")
    before = layout(victim.pid)
    with (
        StoppedTask(victim.pid) as task,
        RemoteCalls(victim.pid, task.leader, find_room(task)) as calls,
        contextlib.suppress(KeyError),
    ):
        batch = calls.start(Call(SYS_DUP, (0,)), Call(SYS_CLOSE, (Result(0),)))
        fd = batch.step()
        assert Path(f"/proc/{victim.pid}/fd/{fd}").exists()
        raise KeyError
    assert layout(victim.pid) == before
    assert victim.finish() == "ok\n"


def test_a_stopped_task_stays_stopped(start):
    victim = start("registers", "nanosleep")
    os.kill(victim.pid, signal.SIGSTOP)
    wait_until(lambda: tracing.state_of(victim.pid) == "T", "the stop")
    with StoppedTask(victim.pid) as task:
        assert task.leader.stop_signal == signal.SIGSTOP
    look_around(victim.pid)
    wait_until(lambda: tracing.state_of(victim.pid) == "T", "the stop")
    time.sleep(0.05)
    assert {tracing.state_of(tid) for tid in tracing.thread_ids(victim.pid)} == {"T"}
    os.kill(victim.pid, signal.SIGCONT)
    assert victim.finish() == "ok\n"


def test_stops_by_signal_while_calls_are_made(start):
    """SIGSTOP cannot be blocked: it takes hold when the task is let go, and is not lost."""
    victim = start("registers", "calls")
    for _ in range(10 * STRESS):
        with StoppedTask(victim.pid) as task, RemoteCalls(victim.pid, task.leader, find_room(task)) as calls:
            calls.run(Call(SYS_GETPID))
            os.kill(victim.pid, signal.SIGSTOP)
            calls.run(Call(SYS_GETPID))
        wait_until(lambda: tracing.state_of(victim.pid) == "T", "the stop")
        os.kill(victim.pid, signal.SIGCONT)
        wait_until(lambda: tracing.state_of(victim.pid) != "T", "the task to go on")
    assert victim.finish() == "ok\n"


def test_a_task_that_is_killed_meanwhile(start):
    victim = start("registers", "calls")
    with (
        pytest.raises(ProcessLookupError),
        StoppedTask(victim.pid) as task,
        RemoteCalls(victim.pid, task.leader, find_room(task)) as calls,
    ):
        os.kill(victim.pid, signal.SIGKILL)
        calls.run(Call(SYS_GETPID))
    assert victim.process.wait(10) == -signal.SIGKILL


def test_a_task_without_room(start, monkeypatch):
    victim = start("registers")
    monkeypatch.setattr("lazyd.target.remote.CODE_BYTES", 5000)
    with StoppedTask(victim.pid) as task, pytest.raises(DumpError, match="has no room"):
        find_room(task)
    assert victim.finish() == "ok\n"


# ---- what cannot be stopped ----


def test_the_parent_of_a_vfork_is_refused(tmp_path):
    source = tmp_path / "vfork.c"
    source.write_text("#include <unistd.h>\nint main(void) { if (!vfork()) { pause(); _exit(0); } pause(); }\n")
    subprocess.run(["gcc", "-o", str(tmp_path / "vforks"), str(source)], check=True)
    process = subprocess.Popen([str(tmp_path / "vforks")], start_new_session=True)
    try:
        wait_until(lambda: tracing.state_of(process.pid) == "D", "the vfork")
        before = time.monotonic()
        with pytest.raises(DumpError, match="waits for its child after vfork"):
            StoppedTask(process.pid, timeout=0.3)
        assert time.monotonic() - before < 3
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: 2**22 - 1, "there is no process"),
        pytest.param(lambda _: 2, "kernel thread", marks=NEEDS_KTHREADD),
        (lambda _: os.getpid(), "lazyd itself"),
        (lambda victim: max(tracing.thread_ids(victim.pid)), "is a thread of process"),
    ],
)
def test_what_is_no_process(start, make, words):
    victim = start("registers")
    with pytest.raises(DumpError, match=words) as caught:
        check_is_process(make(victim))
    assert "\n" not in str(caught.value)


def test_a_zombie(start):
    victim = start("registers")
    os.kill(victim.pid, signal.SIGKILL)
    wait_until(lambda: tracing.state_of(victim.pid) == "Z", "the end")
    with pytest.raises(DumpError, match="zombie"):
        check_is_process(victim.pid)


def test_a_task_that_somebody_traces(start):
    victim = start("registers", "calls")
    code = f"import time\nfrom lazyd.target.tracing import *\nt = StoppedTask({victim.pid})\n"
    code += "print(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as tracer:
        try:
            tracer.stdout.read(1)
            with pytest.raises(DumpError, match=f"is traced by process {tracer.pid}"):
                StoppedTask(victim.pid)
            with pytest.raises(DumpError, match=f"is traced by process {tracer.pid}"):
                check_is_process(victim.pid)
        finally:
            tracer.kill()
    assert victim.finish() == "ok\n"


# ---- lazyd is killed ----

DYING = """
import itertools, os, signal, sys
from lazyd.target import remote, tracing
pid, limit = int(sys.argv[1]), int(sys.argv[2])
numbers = itertools.count(1)
def counted(function):
    def counting(*arguments):
        if next(numbers) > limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return counting
for module in (remote, tracing):
    module.request = counted(module.request)
os.pwrite = counted(os.pwrite)
with tracing.StoppedTask(pid) as task:
    room = remote.find_room(task)
    for thread in task:
        with remote.RemoteCalls(pid, thread, room) as calls:
            calls.run(remote.Call(32, (0,)), remote.Call(3, (remote.Result(0),)), remote.Call(63, (calls.buffers,)))
print(next(numbers) - 1)
"""


@pytest.mark.parametrize(
    "kinds", [("registers", "nanosleep"), ("sigsuspend",), ("handler", "futex"), ("poll", "pending")]
)
def test_lazyd_is_killed_before_each_of_its_steps(start, kinds):
    """Every request to ptrace and every write to the task's memory is once the last that lazyd does."""
    victim = start(*kinds)
    before = layout(victim.pid)

    def run(limit):
        words = [sys.executable, "-c", DYING, str(victim.pid), str(limit)]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)

    whole = run(10**9)
    assert whole.returncode == 0, whole.stderr
    steps = int(whole.stdout)
    assert steps > 40
    for limit in range(steps):
        assert run(limit).returncode == -signal.SIGKILL
        # What it ran when it was let go it finishes by itself.
        wait_until(
            lambda: layout(victim.pid) == before, f"the task to be as before, lazyd killed after {limit} steps", 5
        )
    assert run(10**9).returncode == 0
    assert victim.finish() == "ok\n"
