# SPDX-License-Identifier: MIT
"""lazyd's processes are killed at random moments of a real restore, alone and in pairs: every byte stays right.

A handful of rounds in the suite; LAZYD_STRESS=50 runs each kind that often.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time

import harness
import pytest
from process_harness import KILLED, family_in, is_whole_again, kill_offices, kill_processes_in

STRESS = max(1, int(os.environ.get("LAZYD_STRESS", "1")))
SCENARIOS = ["threads", "forks", "storm", "syscalls", "remap", "plain"]
"""One a kind of death: what is in flight differs."""


class Killer(threading.Thread):
    """Kills offices twice, with the time between that others need to take them."""

    def __init__(self, daemon, offices, dice):
        super().__init__()
        self.daemon, self.offices = daemon, offices
        self.moments = [dice.random() * 0.25, dice.random() * 0.1]
        self.orders = [dice.sample(offices, len(offices)) for _ in self.moments]
        self.problem = None

    def family(self):
        """The processes of now."""
        return family_in(self.daemon.work, self.daemon.process.pid if self.daemon.process.poll() is None else 0)

    def run(self):
        try:
            for moment, order in zip(self.moments, self.orders, strict=True):
                time.sleep(moment)
                before = self.family()
                kill_offices(before, order)
                harness.wait_until(
                    lambda before=before: is_whole_again(self.family(), before, self.offices),
                    f"others in the place of {self.offices}",
                )
        except AssertionError as error:
            self.problem = error


@pytest.mark.skipif(harness.uses_stock(), reason="stock has one process")
@pytest.mark.parametrize(
    ("offices", "scenario"), [*zip(KILLED, SCENARIOS, strict=True)], ids=["-".join(one) for one in KILLED]
)
@pytest.mark.timeout(120 * STRESS)
def test_a_real_restore_outlives_any_two(suite, offices, scenario, dumped, tmp_path):
    saved = dumped(suite, scenario)
    for number in range(STRESS):
        dice = random.Random(number)
        work = tmp_path / str(number)
        statistics = work / "stats.json"
        (saved.state / "result").unlink(missing_ok=True)
        (saved.state / "go").touch()
        words = dice.choice([(), ("--fill-rate", "64M")])
        daemon = harness.start_daemon(suite, saved.images, work, ("--stats", str(statistics), *words))
        try:
            killer = Killer(daemon, offices, dice)
            harness.wait_until(lambda killer=killer: len(killer.family()) == 3, "a complete family")
            killer.start()
            try:
                harness.criu_restore(suite, saved.images, work)
                harness.wait_until(lambda: saved.result.endswith("\n"), "the program's verdict")
            except AssertionError as error:
                raise AssertionError(f"{error}\n{daemon.report()}\n{harness.task_states(saved.pid)}") from None
            finally:
                killer.join()
            assert killer.problem is None, f"{killer.problem}\n{daemon.report()}"
            assert saved.result == "ok\n", f"{saved.result}\n{daemon.report()}"
            harness.wait_until(lambda killer=killer: not killer.family(), f"the end\n{daemon.report()}")
            assert json.loads(statistics.read_text())["exit_code"] == 0, daemon.report()
            assert daemon.wait() in ((0, -signal.SIGKILL) if "keeper" in offices else (0,)), daemon.report()
        finally:
            harness.reap_group(saved.pid)
            kill_processes_in(work)
            daemon.stop()
