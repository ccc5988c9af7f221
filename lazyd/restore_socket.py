# SPDX-License-Identifier: MIT
"""The lazy-pages.socket handshake: the restorer announces tasks and hands over their userfaultfds.

What is said (CRIU criu/uffd.c, send_uffd and lazy_pages_finish_restore), native byte order, one connection:

- a task: `int32 pid`, then in a message of its own one byte that means nothing with the userfaultfd in
  SCM_RIGHTS;
- a zombie: `int32 -pid`, no descriptor;
- after all tasks `uint32 0x52535446`, then the end of the stream. An end before that is a failed restore.

A stream keeps no message boundaries, but the kernel ends a recvmsg() behind the message whose descriptors it
hands out, and never gives bytes of two senders at once when credentials are asked for (unix(7);
net/unix/af_unix.c, unix_stream_read_generic). So descriptors belong to the last byte that came with them,
whatever came before it, and a byte that stands where a descriptor is due and is not the last has none.

Under CRIU every task speaks for itself, so the sender's credentials tell its pid as seen from here.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from lazyd.errors import LazydError, ProtocolError, SystemCallError

SOCKET_NAME = "lazy-pages.socket"
RESTORE_FINISHED = 0x52535446

# The kernel's SCM_MAX_FD (include/net/scm.h): no message carries more descriptors.
_MAX_DESCRIPTORS = 253
_CREDENTIALS = struct.Struct("=iii")  # struct ucred: pid, uid, gid
_SAVED = struct.Struct("=iB3s")
"""A pid whose userfaultfd is due, or 0; how many bytes of the next message are there, and which."""
_PID = struct.Struct("=i")
_CHUNK = 4096


class TaskUffd(NamedTuple):
    """A task and its userfaultfd, which is the receiver's to close. `sender`: who sent it, 0 if not known."""

    pid: int
    uffd: int
    sender: int


class Zombie(NamedTuple):
    """A task without memory."""

    pid: int


class Finished(NamedTuple):
    """The restorer has announced every task, and every range of theirs is registered."""


class HungUp(NamedTuple):
    """The restorer has closed the connection."""


Event = TaskUffd | Zombie | Finished | HungUp


class _Due(Enum):
    """What the next bytes must be."""

    PID = "a pid"
    UFFD = "a userfaultfd"
    NOTHING = "nothing"


class Handshake:
    """What a restorer says, without I/O: feed() it what recvmsg() returned, in any cut."""

    def __init__(self, peer: str = SOCKET_NAME) -> None:
        self._peer = peer
        self._due = _Due.PID
        self._bytes = b""
        self._pid = 0

    def save(self) -> bytes:
        """Return what restore() needs to go on from here."""
        pid = self._pid if self._due is _Due.UFFD else 0
        return _SAVED.pack(pid, len(self._bytes), self._bytes)

    def restore(self, saved: bytes) -> None:
        """Go on where another one was when it was saved; it had not heard Finished."""
        self._pid, length, partial = _SAVED.unpack(saved)
        self._bytes = partial[:length]
        self._due = _Due.UFFD if self._pid else _Due.PID

    def feed(self, data: bytes, descriptors: Sequence[int] = (), *, sender: int = 0) -> list[Event]:
        """Take the bytes of one recvmsg() and the descriptors that came with the last of them; b"": the end.

        Returns the events that are complete now. Every descriptor that is not in one of them is closed, also
        when ProtocolError is raised. What comes after Finished does not matter any more and is dropped.
        """
        unclaimed = list(descriptors)
        events: list[Event] = []
        try:
            if not data:
                return [self._end()]
            for index, byte in enumerate(data):
                if self._due is _Due.UFFD:
                    uffd = self._claim(unclaimed if index + 1 == len(data) else [])
                    events.append(TaskUffd(self._pid, uffd, sender))
                elif self._due is _Due.PID and (event := self._take(byte)) is not None:
                    events.append(event)
            if unclaimed and self._due is not _Due.NOTHING:
                raise self._error(f"{len(unclaimed)} descriptors came where {self._due.value} was due")
            return events
        finally:
            for descriptor in unclaimed:
                os.close(descriptor)

    def _claim(self, unclaimed: list[int]) -> int:
        """Take the descriptor of the announced task out of the list."""
        if not unclaimed:
            raise self._error(f"task {self._pid} came without a userfaultfd")
        if len(unclaimed) > 1:
            raise self._error(f"task {self._pid} came with {len(unclaimed)} descriptors instead of one")
        target = str(Path(f"/proc/self/fd/{unclaimed[0]}").readlink())
        if target != "anon_inode:[userfaultfd]":
            raise self._error(f"task {self._pid} came with {target} instead of a userfaultfd")
        self._due = _Due.PID
        return unclaimed.pop()

    def _take(self, byte: int) -> Event | None:
        self._bytes += bytes([byte])
        if len(self._bytes) < _PID.size:
            return None
        (pid,) = _PID.unpack(self._bytes)
        self._bytes = b""
        if pid == RESTORE_FINISHED:
            self._due = _Due.NOTHING
            return Finished()
        if pid < 0:
            return Zombie(-pid)
        if pid == 0:
            raise self._error("0 came where a pid was due")
        self._pid = pid
        self._due = _Due.UFFD
        return None

    def _end(self) -> HungUp:
        if self._bytes:
            raise self._error(f"the restorer hung up inside a pid, after {len(self._bytes)} bytes of it")
        if self._due is _Due.UFFD:
            raise self._error(f"the restorer hung up before the userfaultfd of task {self._pid}")
        return HungUp()

    def _error(self, reason: str) -> ProtocolError:
        return ProtocolError(self._peer, reason)


class Connection:
    """A restorer's connection; it owns its socket."""

    def __init__(self, connected: socket.socket, saved: bytes | None = None) -> None:
        """Take a connection over; `saved`: in the middle, as save() of the one before said."""
        self._socket = connected
        self._socket.setblocking(False)  # noqa: FBT003  its only way
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._handshake = Handshake()
        if saved is not None:
            self._handshake.restore(saved)

    def save(self) -> bytes:
        """Return how far it has come."""
        return self._handshake.save()

    def fileno(self) -> int:
        """Readable when there is something to receive."""
        return self._socket.fileno()

    def receive(self) -> list[Event]:
        """Return the events of one recvmsg(); none if there is nothing to read yet."""
        space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4) + socket.CMSG_SPACE(_CREDENTIALS.size)
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(_CHUNK, space, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return []
        except ConnectionResetError:
            data, ancillary, flags = b"", [], 0
        descriptors = array.array("i")
        sender = 0
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                sender = _CREDENTIALS.unpack(payload[: _CREDENTIALS.size])[0]
        if flags & socket.MSG_CTRUNC:
            for descriptor in descriptors:
                os.close(descriptor)
            # unix(7): also what happens when the receiver has no descriptor left.
            raise ProtocolError(SOCKET_NAME, "descriptors were lost on the way: is the limit of open files reached?")
        return self._handshake.feed(data, descriptors, sender=sender)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


class Listener:
    """The listening socket in the work directory. One connection is served, as stock does."""

    def __init__(self, work: Path) -> None:
        """Change to the work directory and listen there.

        The name is bound relative, so that no directory is too deep for the 108 bytes of sun_path. It appears
        when the socket listens already: who waits for it may connect at once.
        """
        path = work / SOCKET_NAME
        hidden = Path(f".{SOCKET_NAME}.{os.getpid()}")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.chdir(work)
            if Path(SOCKET_NAME).exists() and not Path(SOCKET_NAME).is_socket():
                raise LazydError(f"{path}: it is there already and is not a socket")
            self._socket.setblocking(False)  # noqa: FBT003  its only way
            # Before anyone connects: then credentials are attached from the first byte on.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            hidden.unlink(missing_ok=True)
            self._socket.bind(str(hidden))
            self._identity = _identity(hidden)
            self._socket.listen(1)
            hidden.rename(SOCKET_NAME)
        except OSError as error:
            self._socket.close()
            with contextlib.suppress(OSError):
                hidden.unlink()
            if error.filename == str(work):
                raise SystemCallError("chdir to the work directory", error.errno or 0, path=work) from error
            raise SystemCallError("listening", error.errno or 0, path=path) from error
        except LazydError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Readable when a restorer connects."""
        return self._socket.fileno()

    def accept(self) -> Connection | None:
        """Accept the restorer; None if it is gone already."""
        try:
            connected, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return None
        return Connection(connected)

    def close(self) -> None:
        """Stop listening; the name stays until unlink()."""
        self._socket.close()

    def unlink(self) -> None:
        """Remove the name, unless another daemon has put its own there."""
        name = Path(SOCKET_NAME)
        with contextlib.suppress(OSError):
            if _identity(name) == self._identity:
                name.unlink()

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self.unlink()


def _identity(name: Path) -> tuple[int, int]:
    status = name.lstat()
    return status.st_dev, status.st_ino
