# SPDX-License-Identifier: MIT

"""The typed face of a page server's client in C (cbits/serve.c), and the only importer of its compiled module.

Pages never pass through here, nor do the questions for them: C hands up only messages that are about more.
"""

from __future__ import annotations

import errno
import os
from bisect import insort

from lazyd.dump.core import PagePipe
from lazyd.enums import Enum
from lazyd.errors import ProtocolError
from lazyd.hints import Any
from lazyd.image import ExtentTable, PagesImage
from lazyd.serve._server import ffi, lib
from lazyd.units import PAGE_SHIFT
from lazyd.wire import HeaderSize, Message, ServerParser, guess_header


class Event(Enum):
    """Why Peer.run() has returned (enum lz_peer_event)."""

    ENDED = lib.LZ_PEER_ENDED
    MESSAGE = lib.LZ_PEER_MESSAGE
    MISSING = lib.LZ_PEER_MISSING
    UNREADABLE = lib.LZ_PEER_UNREADABLE
    UNWRITTEN = lib.LZ_PEER_UNWRITTEN
    STALLED = lib.LZ_PEER_STALLED
    UNSORTED = lib.LZ_PEER_UNSORTED
    CROWDED = lib.LZ_PEER_CROWDED


class Shelf:
    """What can be sent of one task. Any number of peers may use it at once; the sources stay the caller's."""

    def __init__(self, pid: int, extents: ExtentTable, sources: list[PagesImage]) -> None:
        self.pid = pid
        self._rows = ffi.from_buffer("struct lz_extent[]", extents.buffer)
        self._fds = ffi.new("int[]", [source.fd for source in sources])
        self._raw = ffi.new(
            "struct lz_shelf *", {"pid": pid, "rows": self._rows, "count": len(extents), "fds": self._fds}
        )


class Peer:
    """One connected client. Its descriptor is the caller's, who closes it after close()."""

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._raw = ffi.gc(ffi.new("struct lz_peer *"), lib.lz_peer_free)
        self._raw.fd = fd
        self._raw.out = -1
        self._parser = ServerParser(name)
        self._shelves: list[Shelf] = []
        self._pointers: Any = None
        self._pipe: PagePipe | None = None

    @property
    def header(self) -> HeaderSize | None:
        """The size of headers; None: no message has told yet."""
        return self._parser.header

    def run(self) -> Event:
        """Serve until there is something for the caller; OSError if the connection fails.

        ProtocolError: the client hung up in the middle of a message. MESSAGE while `header` is None: it ends the
        session before it has begun, in whichever header.
        """
        if self._parser.header is None:
            return self._run_first()
        return self._event(lib.lz_peer_run(self._raw))

    def _run_first(self) -> Event:
        event = self._event(lib.lz_peer_peek(self._raw, HeaderSize.NARROW))
        if event is not Event.MESSAGE:
            return event
        header = guess_header(bytes(ffi.buffer(self._raw.head, HeaderSize.NARROW)))
        if header is None:
            return event
        self._parser.header = header
        self._raw.header_bytes = header
        return self._event(lib.lz_peer_run(self._raw))

    def _event(self, result: int) -> Event:
        if result == -errno.ENOMEM:
            raise MemoryError
        if result == -errno.ENODATA:
            raise ProtocolError(self.name, "hung up in the middle of a message")
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return Event(result)

    def message(self) -> Message:
        """Return the message that is worked on; ProtocolError if it is none."""
        header = self._parser.header or HeaderSize.NARROW
        content = bytes(ffi.buffer(self._raw.head, header))
        if self._parser.header is None:
            content = content[:4].ljust(header, b"\0")  # where the rest is, nobody knows; a wide header has a gap
        parser = ServerParser(self.name, header)
        parser.feed(content)
        message = parser.next_event()
        assert isinstance(message, Message), "a header is a message or an error"
        return message

    def retry(self) -> None:
        """Look at the message again: something has changed for it."""
        self._raw.retry = 1

    def add_shelf(self, shelf: Shelf) -> None:
        """Have the GETs for a task answered from here on."""
        insort(self._shelves, shelf, key=lambda shelf: shelf.pid)
        self._pointers = ffi.new("struct lz_shelf *[]", [shelf._raw for shelf in self._shelves])
        self._raw.shelves = self._pointers
        self._raw.shelf_count = len(self._shelves)

    def begin_image(self, destination: int, pipe: PagePipe, fd: int) -> None:
        """Have entries for an image put into a pipe, and their pages behind fd, from its start."""
        self._pipe = pipe
        self._raw.pipe = ffi.cast("struct lz_page_pipe *", pipe.pointer)
        self._raw.image = destination
        self._raw.out = fd
        self._raw.written_bytes = 0

    def end_image(self) -> None:
        """Let go of pipe and descriptor; without an image this does nothing."""
        self._raw.pipe = ffi.NULL
        self._raw.out = -1
        self._pipe = None

    @property
    def broken(self) -> int:
        """The errno for which nothing of what arrives is kept; 0: it is."""
        return int(self._raw.broken)

    @broken.setter
    def broken(self, number: int) -> None:
        self._raw.broken = number

    @property
    def where(self) -> tuple[int, int]:
        """The task and the address that the last event is about."""
        return int(self._raw.task), int(self._raw.address)

    @property
    def error_number(self) -> int:
        """The errno of the last event; 0: there is none."""
        return int(self._raw.code)

    @property
    def answers(self) -> int:
        """How many GETs were answered."""
        return int(self._raw.answers)

    @property
    def missing_answers(self) -> int:
        """How many of them were for pages that are not here."""
        return int(self._raw.missing_answers)

    @property
    def sent_bytes(self) -> int:
        """How many bytes of pages were sent."""
        return int(self._raw.sent_bytes)

    @property
    def moved_bytes(self) -> int:
        """How many bytes of pages have gone either way."""
        return int(self._raw.sent_bytes + self._raw.received_bytes)

    @property
    def zero_pages(self) -> int:
        """How many of the pages were zeros, sent as such or not."""
        return int(self._raw.zero_bytes) >> PAGE_SHIFT

    def close(self) -> None:
        """Free the buffers; the descriptor stays."""
        ffi.release(self._raw)
