# SPDX-License-Identifier: MIT
"""The process that serves is killed: another goes on, no byte is wrong, and the exit code does not know of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import pytest
from kernel_harness import BASE, PID, STRESS, descendants, full, hand_over, memory, sparse, wait_until

STEPS = {
    "sweep": ["sweep", "random", "2"],
    "storm": ["storm", "3", "200"],
    "forks": ["forks", "40"],
}
VMAS = [full(BASE, 1024), sparse(BASE + (1 << 24), 2048, 2), full(BASE + (1 << 26), 256)]


def kill_server(daemon):
    """Kill the process that serves, not the keeper that the test has started."""
    (server,) = descendants(daemon.pid)
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
        dice = random.Random(number)
        for _ in range(2):
            time.sleep(dice.random() * 0.02)
            alive = descendants(daemon.pid)
            with contextlib.suppress(ProcessLookupError, ValueError):
                kill_server(daemon)
            # It may have been done just then; else another one is there soon.
            wait_until(lambda old=alive, of=daemon: of.poll() is not None or descendants(of.pid) != old, "another one")
        result = skeleton.wait()
        assert result == (0, "ok\n"), f"{result}\n{daemon.output}"
        skeleton.close()
        assert daemon.wait() == 0, daemon.output


def test_a_server_that_dies_again_and_again_gives_up_in_order(stage):
    vmas = [full(BASE, 256)]
    stage.build({PID: vmas})
    daemon = stage.start_daemon("--fill", "off")
    touch = ["await", "bus", hex(BASE), "256", "sweep", "random", "1"]
    skeleton = stage.start_skeleton(*hand_over(vmas, PID), "finish", "hangup", "say", "runs", *touch)
    skeleton.heard("runs")
    daemon.wait_for_line("restore finished")
    for _ in range(3):
        wait_until(lambda: descendants(daemon.pid), "a process that serves")
        old = kill_server(daemon)
        wait_until(lambda old=old: descendants(daemon.pid) != [old], "the next")
    assert daemon.wait() == 1
    assert "died again and again" in daemon.output
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output


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
    wait_until(lambda: descendants(daemon.pid), "a process that serves")
    time.sleep(0.05)
    kill_server(daemon)
    daemon.wait_for_line("in the middle of a restore")
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    skeleton.close()
    assert daemon.wait() == 0, daemon.output


def test_what_lies_unread_when_the_server_is_killed_is_read_by_the_next(stage):
    stage.build({PID: VMAS})
    daemon = stage.start_daemon()
    wait_until(lambda: descendants(daemon.pid), "a process that serves")
    (server,) = descendants(daemon.pid)
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
    (server,) = descendants(daemon.pid)
    os.kill(server, 40)
    wait_until(lambda: descendants(daemon.pid) not in ([], [server]), "another to serve")
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    skeleton.close()
    assert daemon.wait() == 0, daemon.output
