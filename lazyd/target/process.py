# SPDX-License-Identifier: MIT
"""Live tasks from outside: which pid is meant, who forked whom, and how to stop one without mistaking it.

A pid can be dealt out anew once its task is reaped, so a task that may have to be stopped later is held by a
pidfd from the handshake on: then, the task is in the middle of its own restore and cannot be another one.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
SIGACTION_SIGNALS = [number for number in range(1, 65) if number not in (9, 19)]  # those whose action can be set


def namespace_pids(pid: int) -> list[int]:
    """Return a task's pids, this pid namespace first; empty if there is no such task (proc(5), NSpid)."""
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return [int(word) for word in line.split()[1:]]
    return []


def _same_pid_namespace(one: int, other: int) -> bool:
    try:
        return (_PROC / str(one) / "ns/pid").readlink() == (_PROC / str(other) / "ns/pid").readlink()
    except OSError:
        return False


def find_run_pid(image_pid: int, sender: int) -> int:
    """Return the pid, as seen from here, of the task that its restorer calls image_pid; 0: not sure.

    `sender` is who announced it: under CRIU the task itself, in its own pid namespace. Else the announced pid
    is believed only in the sender's namespace, and only if that is ours: elsewhere the number is someone
    else's.
    """
    pids = namespace_pids(sender) if sender else []
    if not pids:
        return 0
    if pids[-1] == image_pid:
        return sender
    if len(pids) == 1 and namespace_pids(image_pid) == [image_pid] and _same_pid_namespace(sender, image_pid):
        return image_pid
    return 0


class Target:
    """A live task, held by a pidfd."""

    def __init__(self, pid: int) -> None:
        """Hold a task; OSError if it is gone or no descriptor is left."""
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def is_gone(self) -> bool:
        """Ask whether the task has ended, reaped or not."""
        try:
            signal.pidfd_send_signal(self._pidfd, 0)
        except ProcessLookupError:
            return True
        with contextlib.suppress(OSError):
            return stat_fields(self.pid)[0] in "ZX"
        return True

    def stop(self) -> bool:
        """Send SIGSTOP; False if the task is gone."""
        return self._send(signal.SIGSTOP)

    def kill(self) -> bool:
        """Send SIGKILL; False if the task is gone."""
        return self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> bool:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        """Let go of the task."""
        os.close(self._pidfd)


_READ_BYTES = 1 << 16


def read_small(path: str) -> bytes:
    """Return what is in a file of /proc that has it all at once; OSError. For what is read of each of many threads."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = part = os.read(fd, _READ_BYTES)
        while len(part) == _READ_BYTES:
            part = os.read(fd, _READ_BYTES)
            text += part
        return text
    finally:
        os.close(fd)


def stat_fields(tid: int) -> list[str]:
    """Return /proc/TID/stat from its third field on: field n of proc(5) is at n - 3; OSError if it is gone."""
    text = read_small(f"/proc/{tid}/stat").decode(errors="replace")
    return text[text.rindex(")") + 2 :].split()


def children(pid: int) -> list[int]:
    """Return the children of all threads of a task (proc(5), task/TID/children; CONFIG_PROC_CHILDREN)."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in (_PROC / str(pid) / "task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (thread / "children").read_text().split())
    return found


def descendants(pid: int) -> Iterator[int]:
    """Yield all that live below a task, parents first."""
    pending = children(pid)
    while pending:
        pid = pending.pop()
        yield pid
        pending += children(pid)


def waits_for_userfaults(pid: int) -> bool:
    """Ask whether any mapping of a task is registered with a userfaultfd for missing pages.

    proc(5), smaps: VmFlags has `um`. A child that has none of it does not depend on us, whoever its parent
    is.
    """
    with contextlib.suppress(OSError), (_PROC / str(pid) / "smaps").open("rb") as smaps:
        return any(line.startswith(b"VmFlags:") and b" um" in line for line in smaps)
    return False
