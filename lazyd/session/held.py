# SPDX-License-Identifier: MIT
"""The tasks of a session, held by pidfds so that they can be stopped in an emergency.

A task that cannot be held, for it is gone or no descriptor is left, is served like any other. Forked tasks are known
to the kernel only: they are looked for below those that are held, by what they wait for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lazyd.target import Target, descendants, waits_for_userfaults
from lazyd.uffd import Engine, TaskInfo, TaskStatus


def task_infos(engine: Engine) -> list[TaskInfo]:
    """Return what the engine knows of all its tasks, by their numbers."""
    infos: list[TaskInfo] = []
    with contextlib.suppress(KeyError):
        while True:
            infos.append(engine.task(len(infos)))
    return infos


class HeldTasks:
    """Tasks by the engine's numbers, each held by a pidfd of its own."""

    def __init__(self, engine: Engine) -> None:
        """Hold nothing yet. The engine is the caller's, and must outlive this."""
        self._engine = engine
        self._targets: dict[int, Target] = {}

    def close(self) -> None:
        """Let go of all."""
        for target in self._targets.values():
            target.close()
        self._targets.clear()

    def forget(self) -> None:
        """Forget all without letting go: their descriptors were closed, and the numbers may be others' now."""
        self._targets.clear()

    def hold(self, number: int, run_pid: int) -> None:
        """Hold a task, if that is possible."""
        with contextlib.suppress(OSError):
            self._targets[number] = Target(run_pid)

    def find(self) -> None:
        """Hold the tasks that are served."""
        for number, info in enumerate(task_infos(self._engine)):
            if info.run_pid and info.status in (TaskStatus.SERVING, TaskStatus.FAILED):
                self.hold(number, info.run_pid)

    def let_go(self, number: int) -> None:
        """Let go of a task that does not need us any more, unless children that do may be found by it."""
        target = self._targets.get(number)
        if target is not None and (target.is_gone() or not self._engine.totals().forks):
            target.close()
            del self._targets[number]

    def spare_one(self) -> bool:
        """Let go of any task, for the sake of its descriptor; False when none is held."""
        if not self._targets:
            return False
        self._targets.popitem()[1].close()
        return True

    def stop(self, number: int) -> int:
        """Send SIGSTOP to a task. Return its pid, 0 if it could not be stopped."""
        target = self._targets.get(number)
        return target.pid if target is not None and target.stop() else 0

    def kill_all(self) -> list[int]:
        """Kill the tasks that are being served and the children that wait; the pids of those."""
        stopped = list(self.stop_all())
        for pid in stopped:  # stopped, they cannot fork; their pids are theirs as long as they are not reaped
            with contextlib.suppress(OSError):
                target = Target(pid)
                target.kill()
                target.close()
        return stopped

    def stop_all(self) -> Iterator[int]:
        """Stop the tasks that are being served and, below any that ever was, the children that still wait.

        Yields the pid of each that is stopped.
        """
        known = {target.pid: number for number, target in self._targets.items()}
        for pid, number in known.items():
            if self._engine.task(number).status is TaskStatus.SERVING and self._targets[number].stop():
                yield pid
        stopped: set[int] = set()
        while True:
            # Until a round finds none: what was not stopped yet may have forked meanwhile.
            found = {
                pid
                for root in known
                for pid in descendants(root)
                if pid not in known and pid not in stopped and waits_for_userfaults(pid)
            }
            if not found:
                return
            for pid in found:
                stopped.add(pid)
                if stop_unheld(pid, only_waiting=True):
                    yield pid


def stop_unheld(pid: int, *, only_waiting: bool = False) -> bool:
    """Send SIGSTOP to a task that is not held. Held first, then asked: the pid may have been dealt out anew."""
    with contextlib.suppress(OSError):
        target = Target(pid)
        try:
            return (not only_waiting or waits_for_userfaults(pid)) and target.stop()
        finally:
            target.close()
    return False
