# SPDX-License-Identifier: MIT
"""One client of the page server, from its first byte to its last: what is asked, what is answered, what is said of it.

The pages, and the questions for them, are C's (core). What reaches this module is how a session begins, what it is
about, and how it ends.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from contextlib import suppress
from pathlib import Path

from lazyd.errors import ImageError, LazydError, ProtocolError
from lazyd.report import Log
from lazyd.serve.core import Event, Peer
from lazyd.serve.inbox import Inbox
from lazyd.serve.shelves import Borrowed, Shelves, Stock, empty_shelf
from lazyd.tcp import DEAD_AFTER_S, is_silent, prepare
from lazyd.tcp import Peer as TcpPeer
from lazyd.tuples import NamedTuple
from lazyd.units import human_bytes
from lazyd.wire import Answer, Command, Flags, Message, Reply, encode_reply

# After so long without a byte in the middle of something a client is said to stall. It is not hung up on while its host
# answers: a lazy client that is stopped for a while must find its server when it goes on.
STALL_S = 30.0
# Somebody who asks for more tasks that are not here is not looking for his own.
UNKNOWN_MAX = 64
_DROPPED_BYTES = 1 << 16


class Desk(NamedTuple):
    """What all clients of a server are served from. Any thread may use it."""

    log: Log
    images: Path
    """Where dumps go."""
    shelves: Shelves | None = None
    """None: pages are not given out."""
    auto_dedup: bool = False
    """Free in the parent of `images` what a dump replaces."""


def serve_connection(connection: socket.socket, name: str, desk: Desk, *, stall_s: float = STALL_S) -> bool:
    """Serve one connected client until it has ended, and say how it went. `name` is for the log.

    Return whether it ended well; nothing is raised. The socket stays the caller's, who may shut it down from another
    thread to end this.
    """
    peer = Peer(connection.fileno(), name)
    session = _Session(connection, peer, desk, stall_s)
    try:
        _set_timeouts(connection, min(stall_s / 4, DEAD_AFTER_S))
        return session.run()
    except LazydError as error:
        desk.log.error(str(error))
    except OSError as error:
        desk.log.error(f"{name}: {(error.strerror or str(error)).lower()}")
    finally:
        session.close()
        if peer.answers:
            desk.log.info(f"{name}: {_summary(peer)}")
        peer.close()
        # What it still sends is of no use: it shall hear so now.
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
    return False


def _summary(peer: Peer) -> str:
    text = f"{peer.answers} answers, {human_bytes(peer.sent_bytes)}"
    if peer.zero_pages:
        text += f", {peer.zero_pages} pages of zeros"
    if peer.missing_answers:
        text += f"; {peer.missing_answers} answers to what is not here"
    return text


class _Session:
    """What is known of one client."""

    def __init__(self, connection: socket.socket, peer: Peer, desk: Desk, stall_s: float) -> None:
        self._socket = connection
        self._peer = peer
        self._desk = desk
        self._stall_s = stall_s
        self._is_well = True
        self._has_stalled = False
        self._moved = -1
        self._moved_at = 0.0
        self._unknown: set[int] = set()
        self._borrowed = Borrowed(desk.shelves) if desk.shelves is not None else None
        self._inbox = Inbox(desk.images, peer, desk.log, auto_dedup=desk.auto_dedup)

    def close(self) -> None:
        """Give back what it used, and give up what it has not completed."""
        self._inbox.close()
        if self._borrowed is not None:
            self._borrowed.give_back()

    def run(self) -> bool:
        """Serve until the client ends; ProtocolError and OSError end it, too. Return whether all has gone well."""
        while True:
            match self._peer.run():
                case Event.ENDED:
                    if not self._inbox.is_empty:
                        reason = "hung up before the end of its dump: nothing of it is kept"
                        raise ProtocolError(self._peer.name, reason)
                    return self._is_well
                case Event.MESSAGE:
                    if not self._take_message():
                        return self._is_well
                case Event.MISSING:
                    self._miss()
                case Event.UNREADABLE:
                    self._end_unreadable()
                    return False
                case Event.STALLED:
                    self._note_stall()
                case Event.UNWRITTEN:
                    self._inbox.note_unwritten(self._peer.error_number)
                case Event.UNSORTED:
                    reason = (
                        f"{self._peer.message().command.name} at {self._peer.where[1]:#x}, which is not behind the last"
                    )
                    raise ProtocolError(self._peer.name, reason)
                case Event.CROWDED:
                    raise ProtocolError(self._peer.name, "more entries for one image than any has")

    def _take_message(self) -> bool:
        """Answer a message; False: the session is over."""
        message = self._peer.message()
        match message.command:
            case Command.GET:
                self._get(message)
            case Command.IDENTIFY:
                self._identify(message)
            case Command.OPEN:
                self._inbox.open(message.destination)
            case Command.OPEN2:
                self._reply(Answer.HAS_PARENT, self._inbox.open(message.destination))
            case Command.PARENT:
                self._reply(Answer.PARENT_STATUS, self._inbox.has_parent(message.destination))
            case Command.ADD | Command.HOLE | Command.ADD_F:
                self._add(message)
            case Command.CLOSE | Command.FORCE_CLOSE:
                status = self._inbox.finish()
                self._is_well = self._is_well and not status
                self._reply(Answer.STATUS, status)
                return message.command is Command.CLOSE and self._peer.header is not None
        return True

    def _add(self, message: Message) -> None:
        """Open the image of an entry, as stock servers do; or refuse the entry, which C does not take."""
        if self._inbox.holds(message.destination):
            raise ProtocolError(self._peer.name, f"{message.command.name} ({message.flags!r}) of pages that nobody has")
        self._inbox.open(message.destination)
        self._peer.retry()

    def _find(self, pid: int) -> Stock | None:
        """Return what there is of a task; None, said in the log: nothing, or nothing that can be trusted."""
        name = self._peer.name
        if self._borrowed is None:
            raise ProtocolError(name, f"asks for pages of task {pid}: start the server with --lazy-pages")
        try:
            return self._borrowed.take(pid)
        except ImageError as error:
            self._unknown.add(pid)
            if len(self._unknown) > UNKNOWN_MAX:
                raise ProtocolError(name, f"asks for more than {UNKNOWN_MAX} tasks of which nothing is here") from error
            self._desk.log.error(f"{name}: asks for task {pid}: {error}")
            return None

    def _get(self, message: Message) -> None:
        """Load a task whose pages are asked for for the first time, and have the question looked at again."""
        stock = self._find(message.destination)
        self._peer.add_shelf(empty_shelf(message.destination) if stock is None else stock.shelf)
        self._peer.retry()

    def _identify(self, message: Message) -> None:
        """Say what the server has of a task; 0: nothing."""
        stock = None if message.destination in self._unknown else self._find(message.destination)
        self._reply(Answer.IDENTITY, 0 if stock is None else stock.identity)

    def _miss(self) -> None:
        """Say that what is asked for is not here; the first time, for there may be many."""
        task, address = self._peer.where
        text = f"{self._peer.name}: asks for the page at {address:#x} of task {task}, which is not here"
        if not self._peer.message().flags & Flags.LAZYD:
            text += ": the task waits for it, the rest is served"
        self._desk.log.error(text)

    def _end_unreadable(self) -> None:
        """End in the middle of an answer. lazyd comes again, and is told that the page is not here.

        A stock daemon does not: it would give up, and its tasks would read zeros. It is held until it leaves.
        """
        task, address = self._peer.where
        number = self._peer.error_number
        why = os.strerror(number).lower() if number else "its pages image was cut"
        reason = f"the page at {address:#x} of task {task} cannot be read: {why}"
        if self._peer.message().flags & Flags.LAZYD:
            raise ProtocolError(self._peer.name, f"{reason}; hanging up in mid-answer")
        self._desk.log.error(
            f"{self._peer.name}: {reason}; its tasks wait until it is ended, for it would give them zeros"
        )
        while True:
            with suppress(BlockingIOError):
                if not self._socket.recv(_DROPPED_BYTES):
                    return

    def _note_stall(self) -> None:
        """Say, once, that a client stalls; OSError if it is gone."""
        if self._socket.family != socket.AF_UNIX and is_silent(self._socket):
            raise OSError(errno.ETIMEDOUT, "its host does not answer any more")
        moved = self._peer.moved_bytes
        if moved != self._moved:
            self._moved, self._moved_at = moved, time.monotonic()
        elif not self._has_stalled and time.monotonic() - self._moved_at >= self._stall_s:
            self._has_stalled = True
            self._desk.log.warning(f"{self._peer.name}: stalls: nothing moves for {self._stall_s:g} s")

    def _reply(self, answer: Answer, value: int) -> None:
        content = encode_reply(Reply(answer, value))
        while content:
            try:
                content = content[os.write(self._socket.fileno(), content) :]
            except BlockingIOError:
                self._note_stall()


def _set_timeouts(connection: socket.socket, seconds: float) -> None:
    """Bound how long one system call waits (socket(7): a struct timeval), and have a dead client noticed."""
    connection.setblocking(True)  # noqa: FBT003  its only way
    timeout = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, timeout)
    prepare(connection, TcpPeer.MAY_PAUSE)
