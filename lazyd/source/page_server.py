# SPDX-License-Identifier: MIT
"""The connection to a page server, before and after the engine has it: connecting, who is there, and parting.

While the engine has it, pages move in C (cbits/remote.c). Here is what is said around that.

How to part from a stock source, which keeps a frozen task (seen, 4.1.1 and 4.2.1): the end of the connection, announced
or not, is success there, and the task is killed; what it cannot understand is a failure, and the task goes on. So a
copy that has run parts by finish(), when it has every page; one that never ran parts by refuse(), so that the task
goes on at the source.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Sequence

from lazyd import tcp
from lazyd.errors import ProtocolError, SystemCallError
from lazyd.hints import TYPE_CHECKING
from lazyd.tuples import NamedTuple
from lazyd.wire import Answer, ClientParser, Command, HeaderSize, Message, Reply

if TYPE_CHECKING:
    from lazyd.tls.pump import Tunnel
    from lazyd.tls.settings import Files

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 10.0
_LAST_WORDS_S = 0.5


class PageServer(NamedTuple):
    """Where pages come from. `inherited`: the descriptor of a connection that is there already; -1: none.

    `header`: None: as the images tell.
    """

    host: str
    port: int
    inherited: int = -1
    header: HeaderSize | None = None
    tls: Files | None = None
    """Certificates; None: without TLS."""

    @property
    def name(self) -> str:
        """What messages call it."""
        if self.inherited >= 0:
            return f"page server at descriptor {self.inherited}"
        return f"page server {self.host}:{self.port}"

    @property
    def may_come_back(self) -> bool:
        """Say whether one can connect to it again."""
        return self.inherited < 0


class Link:
    """A connection to a page server; with TLS, the plain end of it."""

    def __init__(self, connection: socket.socket, tunnel: Tunnel | None = None) -> None:
        """Own both."""
        self.connection = connection
        self._tunnel = tunnel

    def why_ended(self) -> str:
        """Say what TLS knows about how the connection ended; "" if nothing."""
        ending = None if self._tunnel is None else self._tunnel.ending(_LAST_WORDS_S)
        return "" if ending is None else ending.reason

    def discard(self) -> None:
        """Release what is left of a link whose connection is the engine's, and is over."""
        if self._tunnel is not None:
            self._tunnel.discard()

    def close(self) -> None:
        """Close it, and wait until the peer has what was sent."""
        self.connection.close()
        if self._tunnel is not None:
            self._tunnel.close()


def connect(server: PageServer, timeout_s: float = CONNECT_TIMEOUT_S) -> Link:
    """Connect, or take over what is connected; SystemCallError or TlsError says why it cannot be."""
    if server.tls is None:
        return Link(_connect(server, timeout_s))
    from lazyd.tls.handshake import Endpoint, Side  # noqa: PLC0415  ssl takes its time to import

    endpoint = Endpoint(server.tls, Side.CLIENT)
    tunnel = endpoint.open(_connect(server, timeout_s), server.host, peer=server.name, timeout_s=timeout_s)
    return Link(tunnel.plain, tunnel)


def _connect(server: PageServer, timeout_s: float) -> socket.socket:
    if server.inherited < 0:
        return tcp.connect(server.host, server.port, tcp.Peer.ALWAYS_READS, timeout_s=timeout_s)
    try:
        connection = socket.socket(fileno=os.dup(server.inherited))
        connection.getpeername()
    except OSError as error:
        hint = "it must be a connected stream socket"
        raise SystemCallError(f"--ps-socket {server.inherited}", error.errno or 0, hint=hint) from error
    tcp.prepare(connection, tcp.Peer.ALWAYS_READS)
    return connection


def ask_identity(
    connection: socket.socket, peer: str, header: HeaderSize, pids: Sequence[int], timeout_s: float
) -> int:
    """Ask lazyd's page server what it has of some tasks; a number that is the same as long as that is.

    0: it has nothing of one of them. Nothing may be on its way on the connection. ProtocolError if the answer is none.
    """
    parser = ClientParser(peer, header)
    connection.settimeout(timeout_s)
    total = 0
    try:
        for pid in pids:
            connection.sendall(parser.send(Message(Command.IDENTIFY, destination=pid)))
            while (event := parser.next_event()) is None:
                content = connection.recv(4096)
                if not content:
                    raise ProtocolError(peer, "hung up when asked for its identity")
                parser.feed(content)
            assert isinstance(event, Reply)
            if not event.value:
                return 0
            # Which task has which matters too.
            total = (total * 0x100000001B3 + event.value) % (1 << 64)
    except OSError as error:
        raise ProtocolError(peer, f"no answer when asked for its identity: {error}") from error
    return total or 1


def finish(connection: socket.socket, peer: str, header: HeaderSize, *, is_inherited: bool) -> None:
    """Say that every page has come; ProtocolError if the server does not agree. Nothing may be on its way.

    criu closes for good what it has connected itself, and only this session of what it was given.
    """
    command = Command.CLOSE if is_inherited else Command.FORCE_CLOSE
    parser = ClientParser(peer, header)
    connection.settimeout(ANSWER_TIMEOUT_S)
    try:
        connection.sendall(parser.send(Message(command)))
        while (event := parser.next_event()) is None:
            content = connection.recv(64)
            if not content:
                raise ProtocolError(peer, "hung up instead of agreeing to the end of the transfer")
            parser.feed(content)
    except OSError as error:
        raise ProtocolError(peer, f"no answer to the end of the transfer: {error}") from error
    if event != Reply(Answer.STATUS, 0):
        raise ProtocolError(peer, f"ended the transfer with {event}")


def refuse(connection: socket.socket) -> None:
    """Have a stock source take back its task: the copy has not run, and never will. Nothing can be said after it.

    What is sent is a message of an unknown command, of the longer header's length in either.
    """
    with contextlib.suppress(OSError):
        connection.settimeout(ANSWER_TIMEOUT_S)
        connection.sendall(struct.pack("<I28x", 0xFFFF))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass  # unread bytes would make the end a reset, which overtakes what was sent
