# SPDX-License-Identifier: MIT
"""Has the tasks at the source stop by themselves should the dumper that holds them die.

Kernel facts (signal(7), ptrace(2); seen with criu 4.1.1 and 4.2.1): a task that the dumper holds is in a stop of its
ptrace. A SIGSTOP sent to it waits until nobody traces it any more; when the kernel takes a dead dumper's tasks off it,
they go from the one stop into the other without running. A SIGCONT takes a SIGSTOP back that waits. To end a task goes
on working. (To stop it when it is seen to run again is too late for one that forks: its children are elsewhere.)
"""

from __future__ import annotations

import contextlib
import os
import signal

from lazyd.target.process import descendants
from lazyd.target.tracing import has_ended, state_of


class Brake:
    """For a task and its children. Make it before the dumper holds them, put it on while it does."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._stopped_before = frozenset(one for one in self._tasks() if state_of(one) == "T")

    def _tasks(self) -> list[int]:
        return [self.pid, *descendants(self.pid)]

    def put_on(self) -> None:
        """Have them stop, at once or when the dumper lets them go."""
        self._signal(signal.SIGSTOP)

    def take_off(self) -> None:
        """Have them go on, those that were stopped before excepted."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._tasks():
            if pid not in self._stopped_before:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def has_ended(self) -> bool:
        """Say whether the first of them is gone."""
        return has_ended(self.pid)

    def how_it_stands(self, copy: str) -> str:
        """Say what an operator is told when the dumper has failed and the copy may run; `copy` is what that does."""
        if self.has_ended():
            return f"process {self.pid} has ended, and its copy {copy}"
        return (
            f"process {self.pid} and its children are stopped, as their copy {copy}:"
            " kill -CONT them if it never will again, else kill -KILL"
        )
