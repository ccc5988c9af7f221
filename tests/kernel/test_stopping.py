# SPDX-License-Identifier: MIT
"""Stop tasks, make them do system calls, let them go: they cannot tell. Also when lazyd is killed on the way.

The victim, tests/victims/steady.c, checks itself: its registers, its memory, what its system calls return.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kernel_harness import NEEDS_KTHREADD, STEADY_KINDS, STRESS, layout, wait_until
from process_harness import Dying

from lazyd.errors import DumpError
from lazyd.target import remote, tracing
from lazyd.target.crowd import ask_each
from lazyd.target.remote import Call, RemoteCalls, Result, find_room
from lazyd.target.survey import check_is_process
from lazyd.target.tracing import StoppedTask, status_fields

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


EXECUTES = """
import os, sys, threading
def execute():
    sys.stdin.buffer.raw.read(1)
    os.execv("/bin/echo", ["echo", "executed"])
threading.Thread(target=threading.Event().wait).start()
threading.Thread(target=execute).start()
print("ready", flush=True)
threading.Event().wait()
"""


def test_a_thread_executes_a_program_while_others_are_seized(monkeypatch):
    """The kernel has the exec wait for who has seized them, and who seizes the thread wait for the exec."""
    pipe = subprocess.PIPE
    victim = subprocess.Popen([sys.executable, "-c", EXECUTES], stdin=pipe, stdout=pipe, start_new_session=True)
    try:
        assert victim.stdout.readline() == b"ready\n"
        _, _, executes = tracing.thread_ids(victim.pid)
        seized = []
        seize = tracing.Thread.__init__

        def seize_late(thread, tid, *words, **named):
            if tid == executes and seized:
                victim.stdin.write(b"x")
                victim.stdin.flush()
                wait_until(lambda: tracing.state_of(executes) == "D", "the exec to wait for the others")
            seized.append(tid)
            seize(thread, tid, *words, **named)

        monkeypatch.setattr(tracing.Thread, "__init__", seize_late)
        with contextlib.suppress(DumpError):
            StoppedTask(victim.pid).release()
        assert executes in seized
        assert victim.communicate(timeout=20) == (b"executed\n", None)
        assert victim.returncode == 0
    finally:
        victim.kill()
        victim.wait()


def test_who_waits_for_the_dead_takes_no_stop(start, monkeypatch):
    """The kernel reports stops of tracees to whoever waits for ends, too."""
    monkeypatch.setattr("lazyd.target.reaper._INTERVAL_S", 0)
    victim = start("registers", "calls", "futex")
    for _ in range(30 * STRESS):
        StoppedTask(victim.pid).release()
    assert victim.finish() == "ok\n"


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

HEAD = """
from lazyd.target import remote, tracing
for module in (remote, tracing):
    module.request = counted(module.request)
os.pwrite = counted(os.pwrite)
"""
BODY = """
pid = int(words[0])
with tracing.StoppedTask(pid) as task:
    room = remote.find_room(task)
    for thread in task:
        with remote.RemoteCalls(pid, thread, room) as calls:
            calls.run(remote.Call(32, (0,)), remote.Call(3, (remote.Result(0),)), remote.Call(63, (calls.buffers,)))
"""


@pytest.mark.parametrize(
    "kinds", [("registers", "nanosleep"), ("sigsuspend",), ("handler", "futex"), ("poll", "pending")]
)
def test_lazyd_is_killed_before_each_of_its_steps(start, kinds):
    """Every request to ptrace and every write to the task's memory is once the last that lazyd does."""
    victim = start(*kinds)
    before = layout(victim.pid)
    with Dying(HEAD, BODY) as dying:
        code, steps = dying.run(10**9, victim.pid)
        assert code == 0
        assert steps > 40
        for limit in range(steps):
            assert dying.run(limit, victim.pid)[0] == -signal.SIGKILL
            # What it ran when it was let go it finishes by itself.
            wait_until(
                lambda: layout(victim.pid) == before, f"the task to be as before, lazyd killed after {limit} steps", 5
            )
        assert dying.run(10**9, victim.pid)[0] == 0
    assert victim.finish() == "ok\n"


REGISTERS = """
from lazyd.target import remote, tracing
tracing.Thread.write_registers = counted(tracing.Thread.write_registers)
"""
BATCHES = """
pid = int(words[0])
with tracing.StoppedTask(pid) as task, remote.RemoteCalls(pid, task.leader, remote.find_room(task)) as calls:
    for many in (1, 40, 2):
        calls.run(*[remote.Call(39)] * many)
"""


def test_lazyd_is_killed_between_batches_of_calls(start):
    """The thread waits at the end of one while the next one, a longer or a shorter, is laid out over it."""
    victim = start("registers", "nanosleep")
    before = layout(victim.pid)
    with Dying(REGISTERS, BATCHES) as dying:
        code, steps = dying.run(10**9, victim.pid)
        assert code == 0
        assert steps >= 6
        for limit in range(steps):
            assert dying.run(limit, victim.pid)[0] == -signal.SIGKILL
            wait_until(
                lambda: layout(victim.pid) == before, f"the task to be as before, lazyd killed after {limit} steps", 5
            )
    assert victim.finish() == "ok\n"


LEFT = bytes.fromhex("6c7a2d72656d6f74 9f1c56e0a7b34d28")
"""What the code of the system calls begins with, so that it is known again."""
CROWD = """
from lazyd.errors import DumpError
from lazyd.target.crowd import ask_each
def ask(calls):
    _, _, uname = yield from calls.run_steps(
        remote.Call(32, (0,)), remote.Call(3, (remote.Result(0),)), remote.Call(63, (calls.buffers,))
    )
    return uname, calls.read(calls.buffers, 6)
with tracing.StoppedTask(int(words[0])) as task:
    try:
        told = ask_each(task, task.threads, ask)
    except DumpError as error:
        assert "is not done with what a lazyd that was killed left it" in str(error)
        return 98
    assert told == [(0, b"Linux\\0")] * len(task.threads)
"""


def test_lazyd_is_killed_while_several_threads_do_calls(start):
    """As many as there is room for are in the middle of it at once; each finishes by itself."""
    victim = start("registers", "nanosleep", "sigsuspend", "futex", "poll", "handler")
    before = layout(victim.pid)
    with Dying(HEAD, CROWD) as dying:

        def run(limit):
            """Run it, once the threads have left the code that the one before has left: it ends behind its munmap."""
            while (ran := dying.run(limit, victim.pid))[0] == 98:
                pass
            return ran

        code, steps = run(10**9)
        assert code == 0
        assert steps > 100
        for limit in range(0, steps, 1 if STRESS > 1 else 4):
            assert run(limit)[0] == -signal.SIGKILL
            wait_until(
                lambda: layout(victim.pid) == before, f"the task to be as before, lazyd killed after {limit} steps", 5
            )
        assert run(10**9)[0] == 0
    assert victim.finish() == "ok\n"


def test_what_dead_lazyds_have_left_is_not_used_twice_at_once(start):
    """Places that overlap, all over the room behind the vdso: as if many had been killed there."""
    victim = start(*STEADY_KINDS)
    with StoppedTask(victim.pid) as task:
        first = find_room(task).code
        end = -(-first // 4096) * 4096
        with Path(f"/proc/{victim.pid}/mem").open("r+b", 0) as memory:
            for at in range(first, end - remote.CODE_BYTES, remote.CODE_BYTES - 24):
                memory.seek(at)
                memory.write(LEFT)
            memory.seek(end - 8)
            memory.write(b"\1" * 8)
        places = sorted(room.code for room in remote.find_rooms(task, 16))
        assert len(places) > 1
        assert all(one + remote.CODE_BYTES <= other for one, other in itertools.pairwise(places))
    for _ in range(5):
        look_around(victim.pid)
    assert victim.finish() == "ok\n"


def test_several_threads_where_there_is_room_for_one(start):
    """Limits may let one thread map the few pages that it needs, and not all of them at once."""
    victim = start(*STEADY_KINDS)
    size = int(status_fields(victim.pid)["VmSize"].split()[0]) << 10
    tight = size + remote.SCRATCH_BYTES
    resource.prlimit(victim.pid, resource.RLIMIT_AS, (tight, resource.prlimit(victim.pid, resource.RLIMIT_AS)[1]))
    asked = Call(SYS_GETTID)

    def ask(calls):
        return (yield from calls.run_steps(asked))[0]

    with StoppedTask(victim.pid) as task:
        assert ask_each(task, task.threads, ask) == [thread.tid for thread in task]
    limit = resource.prlimit(victim.pid, resource.RLIMIT_AS)[1]
    resource.prlimit(victim.pid, resource.RLIMIT_AS, (limit, limit))
    assert victim.finish() == "ok\n"
