# SPDX-License-Identifier: MIT
"""A userfaultfd of a stopped task's own memory, in our hands.

A userfaultfd belongs to the memory of who opens it: so the task opens it, by a remote call, pidfd_getfd(2) brings it
here, and the task closes its own in the same batch of calls: a lazyd that is killed in between leaves no descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import struct
import threading
from collections.abc import Iterator

from lazyd.errors import SystemCallError
from lazyd.target.descriptors import take_descriptor
from lazyd.target.remote import Call, RemoteCalls, Result, find_room
from lazyd.target.tracing import StoppedTask

_SYS_CLOSE, _SYS_USERFAULTFD = 3, 323
UFFD_USER_MODE_ONLY = 1
# include/uapi/linux/userfaultfd.h: struct uffdio_api and uffdio_register; features EVENT_FORK, REMAP, REMOVE, UNMAP
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
_MESSAGE_BYTES = 32  # struct uffd_msg
_API, _REGISTER = struct.Struct("3Q"), struct.Struct("4Q")
_UFFD_API, _EVENTS, _MODE_MISSING = 0xAA, 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6, 1


def open_userfaultfd(task: StoppedTask, flags: int) -> int:
    """Return a userfaultfd of a task's memory; `flags` are added to O_CLOEXEC and O_NONBLOCK. SystemCallError."""
    with RemoteCalls(task.pid, task.leader, find_room(task)) as calls:
        opened = Call(_SYS_USERFAULTFD, (flags | os.O_CLOEXEC | os.O_NONBLOCK,))
        batch = calls.start(opened, Call(_SYS_CLOSE, (Result(0),)))
        fd = batch.step()
        if fd < 0:
            hint = "the task may not open one; as root set vm.unprivileged_userfaultfd to 1"
            raise SystemCallError("userfaultfd", -fd, path=f"process {task.pid}", hint=hint)
        return take_userfaultfd(task.pid, fd)


def take_userfaultfd(pid: int, fd: int) -> int:
    """Return a descriptor of ours for one that a task has open. SystemCallError."""
    pidfd = os.pidfd_open(pid)
    try:
        return take_descriptor(pidfd, fd)
    except OSError as error:
        raise SystemCallError("pidfd_getfd", error.errno or 0, path=f"process {pid}") from error
    finally:
        os.close(pidfd)


def enable_missing(uffd: int, pid: int) -> None:
    """Negotiate what serving missing pages needs: the layout events. SystemCallError."""
    try:
        fcntl.ioctl(uffd, _UFFDIO_API, bytearray(_API.pack(_UFFD_API, _EVENTS, 0)))
    except OSError as error:
        hint = "run as root or with CAP_SYS_PTRACE" if error.errno == errno.EPERM else ""
        raise SystemCallError("UFFDIO_API", error.errno or 0, path=f"process {pid}", hint=hint) from error


def register_missing(uffd: int, start: int, length: int, pid: int) -> None:
    """Register a range for missing pages. SystemCallError that names it."""
    try:
        fcntl.ioctl(uffd, _UFFDIO_REGISTER, bytearray(_REGISTER.pack(start, length, _MODE_MISSING, 0)))
    except OSError as error:
        where = f"process {pid}, {start:#x}-{start + length:#x}"
        hint = "it belongs to another userfaultfd" if error.errno == errno.EBUSY else ""
        raise SystemCallError("UFFDIO_REGISTER", error.errno or 0, path=where, hint=hint) from error


@contextlib.contextmanager
def reading_events(uffd: int) -> Iterator[None]:
    """Let a task that does not run otherwise change its layout: each change waits until its event is read."""
    reading, writing = os.pipe()
    poll = select.poll()
    poll.register(uffd, select.POLLIN)
    poll.register(reading, select.POLLIN)

    def read() -> None:
        while all(fd != reading for fd, _ in poll.poll()):
            with contextlib.suppress(BlockingIOError):
                os.read(uffd, _MESSAGE_BYTES)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        os.close(writing)
        thread.join()
        os.close(reading)
