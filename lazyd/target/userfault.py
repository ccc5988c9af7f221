# SPDX-License-Identifier: MIT
"""A userfaultfd of a stopped task's own memory, in our hands.

A userfaultfd belongs to the memory of who opens it: so the task opens it, by a remote call, pidfd_getfd(2) brings it
here, and the task closes its own in the same batch of calls: a lazyd that is killed in between leaves no descriptor.
"""

from __future__ import annotations

import os

from lazyd.errors import SystemCallError
from lazyd.target.descriptors import take_descriptor
from lazyd.target.remote import Call, RemoteCalls, Result, find_room
from lazyd.target.tracing import StoppedTask

_SYS_CLOSE, _SYS_USERFAULTFD = 3, 323
UFFD_USER_MODE_ONLY = 1


def open_userfaultfd(task: StoppedTask, flags: int) -> int:
    """Return a userfaultfd of a task's memory; `flags` are added to O_CLOEXEC and O_NONBLOCK. SystemCallError."""
    with RemoteCalls(task.pid, task.leader, find_room(task)) as calls:
        opened = Call(_SYS_USERFAULTFD, (flags | os.O_CLOEXEC | os.O_NONBLOCK,))
        batch = calls.start(opened, Call(_SYS_CLOSE, (Result(0),)))
        fd = batch.step()
        if fd < 0:
            hint = "the task may not open one; as root set vm.unprivileged_userfaultfd to 1"
            raise SystemCallError("userfaultfd", -fd, path=f"process {task.pid}", hint=hint)
        pidfd = os.pidfd_open(task.pid)
        try:
            return take_descriptor(pidfd, fd)
        except OSError as error:
            raise SystemCallError("pidfd_getfd", error.errno or 0, path=f"process {task.pid}") from error
        finally:
            os.close(pidfd)
