# SPDX-License-Identifier: MIT
"""The process that serves is killed: another goes on, no byte is wrong, and the exit code does not know of it."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from kernel_harness import BASE, PID, STRESS, full, hand_over, memory, sparse, task_state, wait_until
from process_harness import KILLED, command_name, is_whole_again, kill_offices

from lazyd import keeper
from lazyd.errors import SystemCallError
from lazyd.restore_socket import Connection, Listener
from lazyd.session import Session
from lazyd.uffd import Engine, SharedWords

STEPS = {
    "sweep": ["sweep", "random", "2"],
    "storm": ["storm", "3", "200"],
    "forks": ["forks", "40"],
}
VMAS = [full(BASE, 1024), sparse(BASE + (1 << 24), 2048, 2), full(BASE + (1 << 26), 256)]


def kill_server(daemon):
    """Kill the process that serves, not the keeper that the test has started."""
    server = daemon.server()
    os.kill(server, signal.SIGKILL)
    return server


@pytest.mark.parametrize("fill", ["full", "off"])
@pytest.mark.parametrize("steps", STEPS)
def test_the_server_is_killed_at_any_moment(stage, steps, fill):
    stage.build({PID: VMAS})
    for number in range(2 * STRESS):
        daemon = stage.start_daemon("--fill", fill)
        skeleton = stage.start_skeleton(
            *hand_over(VMAS, PID), "seed", str(number), "finish", "hangup", "say", "runs", *STEPS[steps]
        )
        skeleton.heard("runs")
        daemon.wait_for_line("restore finished")
        daemon.kill_servers(number, within_s=0.02)
        result = skeleton.wait()
        assert result == (0, "ok\n"), f"{result}\n{daemon.output}"
        skeleton.close()
        assert daemon.wait() == 0, daemon.output


@pytest.mark.parametrize("offices", KILLED, ids="-".join)
def test_any_two_are_killed_at_once_at_any_moment(stage, offices):
    stage.build({PID: VMAS})
    statistics = stage.folder / "stats.json"
    for number in range(STRESS):
        statistics.unlink(missing_ok=True)
        dice = random.Random(number)
        daemon = stage.start_daemon("--fill", ("full", "off")[number % 2], "--stats", str(statistics))
        daemon.whole_family()
        steps = dice.choice(list(STEPS.values()))
        skeleton = stage.start_skeleton(
            *hand_over(VMAS, PID), "seed", str(number), "finish", "hangup", "say", "runs", *steps
        )
        is_restored = dice.random() < 0.5
        if is_restored:
            skeleton.heard("runs")
        for _ in range(2):
            time.sleep(dice.random() * 0.02)
            before = daemon.family()
            kill_offices(before, dice.sample(offices, len(offices)))
            wait_until(
                lambda daemon=daemon, before=before: is_whole_again(daemon.family(), before, offices),
                f"others in the place of {offices}; the daemon said:\n{daemon.output}",
            )
        result = skeleton.wait()
        assert result == (0, "ok\n" if is_restored else "runs\nok\n"), f"{result}\n{daemon.output}"
        skeleton.close()
        wait_until(lambda daemon=daemon: not daemon.family(), f"the end; the daemon said:\n{daemon.output}")
        assert stage.statistics()["exit_code"] == 0, daemon.output
        assert daemon.wait() in ((0, -signal.SIGKILL) if "keeper" in offices else (0,)), daemon.output


def test_a_server_that_dies_again_and_again_gives_up_in_order(stage):
    vmas = [full(BASE, 256)]
    stage.build({PID: vmas})
    daemon = stage.start_daemon("--fill", "off")
    touch = ["await", "bus", hex(BASE), "256", "sweep", "random", "1"]
    skeleton = stage.start_skeleton(*hand_over(vmas, PID), "finish", "hangup", "say", "runs", *touch)
    skeleton.heard("runs")
    daemon.wait_for_line("restore finished")
    for _ in range(3):
        old = kill_server(daemon)
        wait_until(lambda old=old: daemon.poll() is not None or daemon.family().get("server", old) != old, "the next")
    assert daemon.wait() == 1
    assert "died again and again" in daemon.output
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output


def test_a_death_is_counted_once_by_two_keepers(stage):
    """One that is killed while it replaces the server leaves a dead holder, which the next one finds again."""
    stage.build({PID: VMAS})
    for number in range(4 * STRESS):
        dice = random.Random(number)
        daemon = stage.start_daemon("--fill", "off")
        steps = ["finish", "hangup", "say", "runs", "await", *STEPS["sweep"]]
        skeleton = stage.start_skeleton(*hand_over(VMAS, PID), *steps)
        skeleton.heard("runs")
        daemon.wait_for_line("restore finished")
        for _ in range(2):
            before = daemon.whole_family()
            os.kill(before["server"], signal.SIGKILL)
            time.sleep(dice.uniform(0.0005, 0.005))
            os.kill(before["keeper"], signal.SIGKILL)
            wait_until(
                lambda daemon=daemon, before=before: is_whole_again(daemon.family(), before, ["server", "keeper"]),
                f"others; the daemon said:\n{daemon.output}",
            )
        skeleton.go_on()
        assert skeleton.wait() == (0, "ok\n"), daemon.output
        skeleton.close()
        wait_until(lambda daemon=daemon: not daemon.family(), f"the end; the daemon said:\n{daemon.output}")
        daemon.wait()
        assert "giving up" not in daemon.output


GIVEN_AWAY = """
import os, signal, time
from pathlib import Path
from lazyd.keeper import Work, _Family, _Holder, _Word

def wait(condition):
    while not condition():
        pass

def sleeper():
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
    return pid

def is_dead(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

def nothing(*_):
    pass

here, elsewhere = sorted(os.sched_getaffinity(0))[:2]
family = _Family(Work(nothing, nothing, nothing, nothing, nothing, succeed=lambda _: os._exit(7)))
first = sleeper()
os.sched_setaffinity(first, {elsewhere})
number = os.pidfd_open(first)
family._words[_Word.KEEPER] = _Holder(first, number).word()
os.sched_setaffinity(0, {here})
family.fork_standby()
standby = family._standby
wait(lambda: Path(f"/proc/{standby}/comm").read_text() == "lazyd-standby\\n")
time.sleep(0.1)  # it sleeps in poll
# From here on it cannot run, as on a busy machine: this takes its core.
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
os.kill(first, signal.SIGKILL)
wait(lambda: is_dead(first))
second = os.fork()
if second == 0:
    os.sched_setaffinity(0, {elsewhere})
    time.sleep(600)
os.sched_setaffinity(second, {elsewhere})
os.dup2(os.pidfd_open(second), number)
family._words[_Word.KEEPER] = _Holder(second, number).word()
os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
time.sleep(0.1)
os.kill(second, signal.SIGKILL)
end = time.monotonic() + 20
wait(lambda: is_dead(standby) or time.monotonic() > end)
os.kill(standby, signal.SIGKILL)  # else it would stay
print(os.waitstatus_to_exitcode(os.waitpid(standby, 0)[1]), flush=True)
"""


def test_a_standby_hears_of_a_keeper_whose_number_another_had(stage):
    """It is woken by the first one's death, and finds the second one's pidfd when it gets to look."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores: one is taken away from the standby")
    words = [sys.executable, "-c", GIVEN_AWAY]
    run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, start_new_session=True)
    assert (run.returncode, run.stdout) == (0, "7\n"), run.stderr


@pytest.mark.parametrize("cut", ["connect", "announce"])
def test_a_server_killed_during_the_handshake_is_replaced(stage, cut):
    stage.build({PID: VMAS})
    daemon = stage.start_daemon()
    steps = {
        "connect": ["connect", "say", "here", "await", "announce", str(PID)],
        "announce": ["connect", "announce", str(PID), "say", "here", "await"],
    }[cut]
    skeleton = stage.start_skeleton(*memory(VMAS), "open", *steps, "finish", "hangup", "sweep", "random", "2")
    skeleton.heard("here")
    time.sleep(0.05)
    kill_server(daemon)
    daemon.wait_for_line("in the middle of a restore")
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    skeleton.close()
    assert daemon.wait() == 0, daemon.output


def test_tasks_are_stopped_when_no_process_can_be_made_to_serve_them(stage):
    """And as soon as one can be, it gives up in order: SIGBUS where a byte is missing, never zeros."""
    forbidden = stage.folder / "no-forks"
    real = keeper.fork_keeping_fds

    def fork():
        if forbidden.exists():
            raise SystemCallError("clone", errno.EAGAIN)
        return real()

    def prepare():
        keeper.fork_keeping_fds = fork
        keeper._HALT_AFTER_S = 0.2

    vmas = [full(BASE, 256)]
    touch = ["await", "bus", hex(BASE), "256", "sweep", "random", "1"]
    memory_steps = [*memory(vmas), "open", "connect", "announce", "0", "finish", "hangup"]
    skeleton = stage.start_skeleton("await", *memory_steps, "say", "runs", *touch)
    stage.build({skeleton.pid: vmas})
    daemon = stage.start_daemon("--fill", "off", prepare=prepare)
    skeleton.go_on()
    skeleton.heard("runs")
    daemon.wait_for_line("restore finished")
    daemon.whole_family()
    forbidden.touch()
    kill_server(daemon)
    wait_until(lambda: task_state(skeleton.pid) == "T", f"the task to stop; the daemon said:\n{daemon.output}")
    assert daemon.poll() is None
    assert "no process can be made to serve" in daemon.output
    forbidden.unlink()
    assert daemon.wait() == 1, daemon.output
    os.kill(skeleton.pid, signal.SIGCONT)
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output


def dying_at(step, offices):
    """Have the first server kill offices, its own the last, when it comes to a step; before and after each is one."""
    words = SharedWords(1)

    def count():
        if command_name(os.getpid()) != "lazyd-server":
            return
        words[0] = words[0] + 1 if words[0] < step else step + 1
        if words[0] == step:
            words[0] = step + 1
            if "keeper" in offices:
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def surround(owner, name):
        real = getattr(owner, name)

        def wrapper(*arguments, **more):
            count()
            result = real(*arguments, **more)
            count()
            return result

        setattr(owner, name, wrapper)

    def prepare():
        for owner, names in {
            Connection: ("receive", "_peek", "_receive", "close"),
            Listener: ("accept", "close", "unlink"),
            Engine: ("attach", "finish_restore", "start", "resume"),
            Session: ("_note_connection", "_hang_up", "_restore_finished", "_finish", "_announce"),
        }.items():
            for name in names:
                surround(owner, name)

    return prepare, words


@pytest.mark.parametrize("offices", [("server",), ("server", "keeper")], ids="-".join)
@pytest.mark.parametrize("part", range(3))
def test_the_server_dies_at_every_step_of_a_handshake(stage, offices, part):
    """All steps if LAZYD_STRESS is 5 or more; else one in five, others in every part."""
    other = [full(BASE + (1 << 28), 16)]
    stage.build({PID: VMAS, PID + 1: other}, zombies=[PID + 2])
    statistics = stage.folder / "stats.json"
    child = ["child", *memory(other), "open", "announce", str(PID + 1), "ready", "sweep", "random", "1", "end"]
    steps = ["connect", *child, *memory(VMAS), "open", "announce", str(PID), "pid", str(-PID - 2), "finish", "hangup"]
    every = 1 if STRESS >= 5 else 5
    for step in range(1 + part * every // 3 + part, 200, every * 3):
        statistics.unlink(missing_ok=True)
        prepare, words = dying_at(step, offices)
        daemon = stage.start_daemon("--stats", str(statistics), prepare=prepare)
        skeleton = stage.start_skeleton(*steps, "sweep", "random", "1")
        result = skeleton.wait()
        assert result == (0, "ok\n"), f"step {step}: {result}\n{daemon.output}"
        skeleton.close()
        wait_until(lambda daemon=daemon: not daemon.family(), f"the end, step {step}; it said:\n{daemon.output}")
        daemon.wait()
        if statistics.exists():  # else it died when all was done and said
            assert stage.statistics()["exit_code"] == 0, f"step {step}\n{daemon.output}"
        if words[0] < step:
            break
    else:
        raise AssertionError("a handshake of more steps than that")
    assert step > 30


def test_what_lies_unread_when_the_server_is_killed_is_read_by_the_next(stage):
    stage.build({PID: VMAS})
    daemon = stage.start_daemon()
    server = daemon.server()
    os.kill(server, signal.SIGSTOP)
    skeleton = stage.start_skeleton(*hand_over(VMAS, PID), "finish", "hangup", "say", "runs", "sweep", "random", "2")
    skeleton.heard("runs")
    os.kill(server, signal.SIGKILL)
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    skeleton.close()
    assert daemon.wait() == 0, daemon.output


def test_a_signal_without_a_name_is_survived(stage):
    stage.build({PID: VMAS})
    daemon = stage.start_daemon("--fill", "off")
    skeleton = stage.start_skeleton(
        *hand_over(VMAS, PID), "finish", "hangup", "say", "runs", "await", "sweep", "random", "2"
    )
    skeleton.heard("runs")
    daemon.wait_for_line("restore finished")
    server = daemon.server()
    os.kill(server, 40)
    wait_until(lambda: daemon.family().get("server", server) != server, "another to serve")
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    skeleton.close()
    assert daemon.wait() == 0, daemon.output
