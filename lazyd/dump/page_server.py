# SPDX-License-Identifier: MIT
"""Dump memory to a page server: criu's (`criu page-server`) or lazyd's own.

One connection takes all images of a dump, one after the other. The server says whether it has a parent for an image
when the image is opened, and checks parent holes itself. Headers are of one size for a connection; nothing tells a
client which the server wants, and a server that gets the other one does not answer, or hangs up: then that is said.
So it is asked something while no task is stopped yet: who will never answer is found out before anybody waits.
"""

from __future__ import annotations

import socket
import struct
from types import TracebackType

from lazyd.dump.core import PageKind, PagemapFormat, PagePipe, Progress, Source, stream_pages
from lazyd.dump.transfer import Destination, MemoryImage, Transfer
from lazyd.errors import DumpError, ProtocolError, SystemCallError
from lazyd.hints import TYPE_CHECKING
from lazyd.image import ExtentTable
from lazyd.tcp import Peer, connect
from lazyd.wire import ClientParser, Command, Data, HeaderSize, Message, Reply, image_id

if TYPE_CHECKING:
    from lazyd.tls.handshake import Endpoint
    from lazyd.tls.pump import Tunnel

_RECEIVE_BYTES = 4096
_ENDING_S = 1.0
DEFAULT_TIMEOUT_S = 30.0


class PageServer(Destination):
    """A connection to a page server. As a context manager it hangs up, whatever happened."""

    def __init__(
        self,
        connection: socket.socket,
        peer: str,
        form: PagemapFormat | None = None,
        *,
        header: HeaderSize | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tunnel: Tunnel | None = None,
    ) -> None:
        """Take over a connected stream socket; `peer` names it in errors. header None: as the format goes.

        timeout_s: how long an answer, or room for more bytes, may take to come. tunnel: whose plain end it is.
        """
        self.form = form or PagemapFormat()
        self.peer = peer
        self._socket = connection
        self._tunnel = tunnel
        self._socket.settimeout(timeout_s)
        self._timeout_s = timeout_s
        self._parser = ClientParser(peer, header or (HeaderSize.WIDE if self.form.wide else HeaderSize.NARROW))
        self._has_answered = False
        self._is_failed = False
        self._is_closed = False

    @classmethod
    def connect(
        cls,
        address: str,
        port: int,
        form: PagemapFormat | None = None,
        *,
        header: HeaderSize | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: Endpoint | None = None,
    ) -> PageServer:
        """Connect by TCP, and shake hands if there is TLS; the rest as for the constructor."""
        peer = f"{address}:{port}"
        connection = connect(address, port, Peer.MAY_PAUSE, timeout_s=timeout_s)
        tunnel = None
        if tls is not None:
            tunnel = tls.open(connection, address, peer=peer)
            connection = tunnel.plain
        return cls(connection, peer, form, header=header, timeout_s=timeout_s, tunnel=tunnel)

    def open(self, image: MemoryImage, expected_bytes: int = 0) -> Transfer:
        """Start an image; the server hears of it when its turn comes."""
        del expected_bytes  # the other side's to make room for
        if not self._has_answered:
            self.send(Message(Command.PARENT, destination=image_id(image.type, image.number)))
            self._reply("the first question")
            self._has_answered = True
        return _Stream(image, self)

    def open_image(self, destination: int) -> bool:
        """Open an image at the server: what is sent next belongs to it. Return whether there is a parent for it."""
        self.send(Message(Command.OPEN2, destination=destination))
        return bool(self._reply("opening an image"))

    def send(self, message: Message) -> None:
        """Send a header."""
        try:
            self._socket.sendall(self._parser.send(message))
        except OSError as error:
            raise self._link_error("send", error) from error

    def stream(self, pipe: PagePipe, source: Source, destination: int, progress: Progress) -> None:
        """Send the runs of a pipe, and the bytes of the dumped ones."""
        # The bytes are sent from C, by a blocking descriptor.
        self._socket.settimeout(None)
        try:
            _set_send_timeout(self._socket, self._timeout_s)
            stream_pages(
                source,
                pipe,
                self._socket.fileno(),
                dst_id=destination,
                header_bytes=self._parser.header,
                form=self.form,
                progress=progress,
            )
        except OSError as error:
            raise self._link_error("send", error) from error
        except DumpError:
            self._is_failed = True
            raise
        finally:
            self._socket.settimeout(self._timeout_s)

    def _link_error(self, call: str, error: OSError) -> SystemCallError:
        self._is_failed = True
        hint = self._ending() or "the page server hung up; its log may say why (is it of the other header size?)"
        if isinstance(error, TimeoutError) or error.errno in (11, 110):
            hint = f"the page server does not take anything for {self._timeout_s:g} s"
        return SystemCallError(call, error.errno or 110, path=self.peer, hint=hint)

    def _ending(self) -> str:
        """Return what TLS says of a connection that has ended; "" if that is nothing."""
        ending = self._tunnel.ending(_ENDING_S) if self._tunnel is not None else None
        return ending.reason if ending is not None else ""

    def _reply(self, doing: str) -> int:
        while True:
            event = self._parser.next_event()
            if isinstance(event, Reply):
                return event.value
            if isinstance(event, Message | Data):
                self._is_failed = True
                raise ProtocolError(self.peer, f"pages in answer to {doing}")
            try:
                content = self._socket.recv(_RECEIVE_BYTES)
            except OSError as error:
                self._is_failed = True
                reason = f"no answer to {doing}: {(error.strerror or str(error)).lower()}"
                raise ProtocolError(self.peer, f"{reason}; is it of the other header size?") from error
            if not content:
                self._is_failed = True
                reason = self._ending() or "its log may say why"
                raise ProtocolError(self.peer, f"hung up instead of answering to {doing}; {reason}")
            self._parser.feed(content)

    def close(self) -> None:
        """End the session and see that the server has all of it; a second call does nothing."""
        if self._is_closed:
            return
        try:
            if not self._is_failed:
                self.send(Message(Command.FORCE_CLOSE))
                status = self._reply("the end of the session")
                if status:
                    raise DumpError(f"{self.peer}: the page server could not keep all pages: it ended with {status}")
        finally:
            self.abort()

    def abort(self) -> None:
        """Hang up without a word, so that the server does not take what it has for whole."""
        self._is_closed = True
        self._socket.close()
        if self._tunnel is not None:
            self._tunnel.close()

    def __enter__(self) -> PageServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class _Stream(Transfer):
    """One image on its way through the connection.

    It is opened at the server no sooner than something is asked of it: the server knows one image at a time, and
    starts it anew when it is opened twice.
    """

    def __init__(self, image: MemoryImage, server: PageServer) -> None:
        super().__init__(image)
        self._server = server
        self._destination = image_id(image.type, image.number)
        self._has_parent: bool | None = None

    @property
    def parent(self) -> ExtentTable | None:
        """What the server has is not known here."""
        return None

    @property
    def may_have_parent_holes(self) -> bool:
        """Say whether the server has a parent for this image."""
        if self._has_parent is None:
            self._has_parent = self._server.open_image(self._destination)
        return self._has_parent

    def write_hole(self, pipe: PagePipe) -> None:
        """See that there is a parent at all; the server checks the rest."""
        if pipe.pages(PageKind.PARENT) and not self.may_have_parent_holes:
            raise DumpError(f"{self._server.peer}: has no parent of {self.image.pagemap_name} for its parent holes")

    def write_pages(self, pipe: PagePipe, source: Source, progress: Progress) -> None:
        """Send all: holes and pages in order of address."""
        assert self.may_have_parent_holes is not None, "opened"
        self._server.stream(pipe, source, self._destination, progress)

    def write_pagemap(self, pipe: PagePipe) -> None:
        """Nothing is left to do: the entries went with the pages."""

    def close(self) -> None:
        """Nothing to close: the connection is the destination's."""


def _set_send_timeout(connection: socket.socket, seconds: float) -> None:
    """Bound how long the kernel waits for room to send in (socket(7), SO_SNDTIMEO: a struct timeval)."""
    timeout = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
