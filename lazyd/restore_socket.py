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
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from lazyd.deferred import defer
from lazyd.enums import Enum
from lazyd.errors import LazydError, ProtocolError, SystemCallError
from lazyd.hints import Protocol
from lazyd.tuples import NamedTuple

defer("socket")  # where tasks are attached to or made, nobody comes to it
import socket  # noqa: E402

SOCKET_NAME = "lazy-pages.socket"
RESTORE_FINISHED = 0x52535446

# The kernel's SCM_MAX_FD (include/net/scm.h): no message carries more descriptors.
_MAX_DESCRIPTORS = 253
_CREDENTIALS = struct.Struct("=iii")  # struct ucred: pid, uid, gid
_PID = struct.Struct("=i")
_SAVED_DUE = struct.Struct("<BBxxi")
_SAVED_PID = struct.Struct("<B3s4s")
_IS_DUE = 0x80
_GLANCE = 64
"""More than a byte. The kernel goes on to the next message when it peeks, however little was asked for, until one that
carries descriptors: so they are the first message's only if one byte came with them."""


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


class DescriptorsLost(ProtocolError):
    """There was no room for a descriptor that the restorer has sent; it can be looked at again."""

    def __init__(self) -> None:
        super().__init__(SOCKET_NAME, "no descriptor is left for what the restorer sends: raise the limit: ulimit -n")


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

    @property
    def due_pid(self) -> int:
        """The task whose userfaultfd is due next; 0: a pid is."""
        return self._pid if self._due is _Due.UFFD else 0

    @property
    def due_bytes(self) -> int:
        """How many bytes are due until something is complete."""
        return 1 if self._due is _Due.UFFD else _PID.size - len(self._bytes)

    def save(self, taken: bytes = b"") -> int:
        """Return, as one word of 64 bits, what restore() needs to go on from here, and the bytes that are being taken.

        One word, so that it can be written in one step: a process may die between any two.
        """
        if self._due is _Due.UFFD:
            raw = _SAVED_DUE.pack(_IS_DUE, len(taken), self._pid)
        else:
            raw = _SAVED_PID.pack(len(self._bytes) | len(taken) << 4, self._bytes, taken)
        return int.from_bytes(raw, "little")

    def restore(self, saved: int) -> tuple[int, bytes]:
        """Go on where another one was when it was saved, which had not heard Finished.

        Returns how many bytes were being taken, and which, if what was due was a pid.
        """
        raw = saved.to_bytes(8, "little")
        if raw[0] & _IS_DUE:
            _, length, self._pid = _SAVED_DUE.unpack(raw)
            self._due = _Due.UFFD
            return length, b""
        lengths, partial, taken = _SAVED_PID.unpack(raw)
        self._bytes = partial[: lengths & 0xF]
        self._due = _Due.PID
        return lengths >> 4, taken[: lengths >> 4]

    def skip_userfaultfd(self) -> None:
        """Go on behind a userfaultfd that somebody else has taken."""
        self._due = _Due.PID

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


class Journal(Protocol):
    """A word that outlives this process, as an item."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


class Connection:
    """A restorer's connection; it owns its socket.

    Whoever takes from it may be killed at any moment, and another goes on with the same socket and the journal. So
    nothing is received before it is safe: what comes next is looked at (MSG_PEEK; a descriptor that comes along is a
    copy, the message keeps its own), the journal says what is about to be taken, and then

    - a userfaultfd is handed over first and received afterwards. If it was handed over, and a message with a descriptor
      still comes first, that one is received; no other has a descriptor where a pid is due;
    - the bytes of a pid are received first. If they do not come first any more they were received, and the journal has
      them. Restorers send a pid in one piece and no pid twice, so the next bytes are others.
    """

    def __init__(self, connected: socket.socket, journal: Journal, index: int) -> None:
        """Take a connection over; how far it has come is in the journal, where 0 is its beginning."""
        self._socket = connected
        self._socket.setblocking(False)  # noqa: FBT003  its only way
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._handshake = Handshake()
        self._journal, self._index = journal, index

    def resume(self, take: Callable[[Event], None], is_served: Callable[[int], bool]) -> None:
        """Go on in the place of a process that died; is_served: whether a task was handed over."""
        length, taken = self._handshake.restore(self._journal[self._index])
        if pid := self._handshake.due_pid:
            if is_served(pid):
                if self._is_descriptor_next():
                    self._socket.recv(1)
                self._handshake.skip_userfaultfd()
        elif length:
            if self._peek(length) == taken:
                self._socket.recv(length)
            for event in self._handshake.feed(taken):
                take(event)
        self._journal[self._index] = self._handshake.save()

    def fileno(self) -> int:
        """Readable when there is something to receive."""
        return self._socket.fileno()

    def receive(self, take: Callable[[Event], None]) -> bool:
        """Take what comes next, and say whether there was something.

        `take` may close this connection.
        """
        if self._handshake.due_pid:
            looked = self._receive(_GLANCE, socket.MSG_PEEK)
        else:
            data = self._peek(self._handshake.due_bytes)
            if data:
                self._journal[self._index] = self._handshake.save(data)
                looked = self._receive(len(data))
            else:
                looked = None if data is None else (data, [], 0)
        if looked is None:
            return False
        data, descriptors, sender = looked
        is_userfaultfd = bool(data) and bool(self._handshake.due_pid)
        for event in self._handshake.feed(data, descriptors, sender=sender):
            take(event)
        if is_userfaultfd:
            self._socket.recv(1)
        self._journal[self._index] = self._handshake.save()
        return True

    def _peek(self, length: int) -> bytes | None:
        """Return the bytes that come next and leave them there; None: nothing comes yet."""
        try:
            return self._socket.recv(length, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return None
        except ConnectionResetError:
            return b""

    def _is_descriptor_next(self) -> bool:
        """Say whether what comes next is one byte with a descriptor."""
        try:
            looked = self._receive(_GLANCE, socket.MSG_PEEK)
        except DescriptorsLost:
            return len(self._peek(_GLANCE) or b"") == 1
        if looked is None:
            return False
        for descriptor in looked[1]:
            os.close(descriptor)
        return len(looked[0]) == 1 and bool(looked[1])

    def _receive(self, length: int, flags: int = 0) -> tuple[bytes, Sequence[int], int] | None:
        """Return bytes, descriptors and the sender of one recvmsg(); None: nothing comes yet."""
        space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4) + socket.CMSG_SPACE(_CREDENTIALS.size)
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(length, space, flags | socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return None
        except ConnectionResetError:
            return b"", [], 0
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
            raise DescriptorsLost
        return data, descriptors, sender

    def forget(self) -> None:
        """Leave the socket open: it is another's."""
        self._socket.detach()

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
            self._name = str(hidden)
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

    def accept(self) -> socket.socket | None:
        """Accept the restorer; None if it is gone already."""
        try:
            connected, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return None
        return connected

    def is_accepted(self, descriptor: int) -> bool:
        """Say whether a descriptor of this process is a restorer's connection that was accepted here."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as other:
            return (
                other.family is socket.AF_UNIX
                and other.getsockname() == self._name
                and not other.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            )
        return False

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
