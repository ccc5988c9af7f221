# SPDX-License-Identifier: MIT
"""The page server of a session: what happens when its link breaks, and how the two part.

A link that breaks is reported at once. What has arrived goes on being served, and faults on the rest wait: none of them
reads zeros. lazyd's own page server is connected to again, for as long as it takes, and asked again for what was on its
way, once it has proven that it has the same checkpoint. A stock source is a dumper that serves one connection and then
ends its task or lets it go on: there is nobody to connect to, and an operator decides (--on-source-loss).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Sequence

from lazyd.errors import LazydError, ProtocolError
from lazyd.report import Log
from lazyd.session.signals import hold_signals
from lazyd.source.page_server import PageServer, ask_identity, connect, finish, refuse
from lazyd.uffd import Engine, LinkInfo, LinkReason, SharedWords
from lazyd.units import PAGE_SIZE, human_bytes
from lazyd.wire import HeaderSize

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 5.0
_PARTING, _LINKS = range(2)
"""Words shared with the processes after this one. 1: all pages have come, and the connection is being ended, so that
nothing it does is a loss any more; how often there was another connection in the place of one that broke."""
PROBE_S = 2.0
DRAIN_S = 10.0
SILENT_S = 5.0
"""For how long a server may leave requests unanswered before that is told."""


class RemotePages:
    """The link of a session. Its state is the engine's and shared words, so that the next process goes on with it."""

    def __init__(
        self,
        engine: Engine,
        server: PageServer,
        header: HeaderSize,
        pids: Sequence[int],
        log: Log,
    ) -> None:
        """Connect; `pids` are the tasks that have pages there."""
        self._engine = engine
        self._server = server
        self._header = server.header or header
        self._pids = pids
        self._log = log
        self._shared = SharedWords(2)
        self._retry_at: float | None = None
        self._retry_s = FIRST_RETRY_S
        self._is_lost = False
        self._heard = (0, 0.0)
        """How many bytes have come, and since when no more have, though some are waited for."""
        self._is_silent = False
        self._link = connect(server)
        self._number = 0
        """Which of the links this is. In the place of a process that died there may have been another since."""
        hold_signals()  # one that ended this process here would end the connection, and a stock source's task with it
        self._identity = self._identify()
        """What lazyd's server has of the tasks; 0: this is another server."""

    def begin(self) -> None:
        """Give the engine the connection; before it prepares any task."""
        connection = self._link.connection
        self._engine.add_remote(connection.fileno(), self._header)
        connection.detach()

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._server.name

    @property
    def info(self) -> LinkInfo:
        """How the link is."""
        return self._engine.link()

    def _identify(self) -> int:
        """Ask over a second connection, which lazyd's server answers and a stock source does not let in."""
        if not self._server.may_come_back:
            return 0
        try:
            with contextlib.closing(connect(self._server, PROBE_S)) as link:
                found = ask_identity(link.connection, self.name, self._header, self._pids, PROBE_S)
        except LazydError:
            return 0
        if not found:
            self._link.close()
            raise ProtocolError(self.name, f"has no pages of the tasks in these images ({self._some_pids()})")
        return found

    def _some_pids(self) -> str:
        return ", ".join(map(str, self._pids[:4])) + (" …" if len(self._pids) > 4 else "")

    def on_notice(self) -> str | None:
        """Deal with a link that broke. Returns what to report if it cannot be mended."""
        info = self.info
        if not info.error or self._shared[_PARTING]:
            return None  # it is up again, or not needed any more
        left = human_bytes(self._engine.totals().left_pages * PAGE_SIZE)
        known = self._link.why_ended() if self._number == self._shared[_LINKS] else ""
        why = f"{self.name}: {known or describe(info)}"
        if self._can_come_back(info):
            self._log.warning(f"{why}; {left} are missing and wait, connecting again")
            self._retry_at = self._log.elapsed()
            return None
        self._is_lost = True
        return f"{why}; {left} are missing and cannot be had any more"

    def _can_come_back(self, info: LinkInfo) -> bool:
        return bool(self._identity) and info.reason in (
            LinkReason.FAILED,
            LinkReason.ENDED,
            LinkReason.UNCOUNTED,
        )

    @property
    def is_lost(self) -> bool:
        """Whether pages that have not arrived never will."""
        return self._is_lost

    def drain(self) -> None:
        """Wait until the server has answered all that it was asked, unless it is silent; nobody wants it any more."""
        if self._is_silent:
            return
        end = self._log.elapsed() + DRAIN_S
        while (info := self.info).waiting and not info.error and self._log.elapsed() < end:
            time.sleep(0.002)

    def due_in(self) -> float | None:
        """How long until look() is worth calling; None: it is not."""
        if self._retry_at is not None:
            return max(0.0, self._retry_at - self._log.elapsed())
        return SILENT_S / 2 if self.info.waiting and not self.info.error else None

    def look(self) -> str | None:
        """See to it that a link that broke is mended, and one that is silent told. Returns what is to be reported."""
        info, now = self.info, self._log.elapsed()
        if info.error or not info.waiting or info.bytes != self._heard[0]:
            if self._is_silent and not info.error:
                self._log.warning(f"{self.name}: answers again")
            self._is_silent = False
            self._heard = (info.bytes, now)
        elif not self._is_silent and now - self._heard[1] > SILENT_S:
            self._is_silent = True
            self._log.warning(
                f"{self.name}: no answer for {SILENT_S:.0f} s to {info.waiting} requests; who needs their pages waits"
            )
        return self._retry()

    def _retry(self) -> str | None:
        """Connect again if it is time to. Returns what to report if that is hopeless."""
        if self._retry_at is None or self._log.elapsed() < self._retry_at:
            return None
        try:
            link = connect(self._server, PROBE_S)
            try:
                found = ask_identity(link.connection, self.name, self._header, self._pids, PROBE_S)
                if found == self._identity:
                    self._engine.relink(link.connection.fileno(), self._header)
                    link.connection.detach()
                    before, self._link = self._link, link
                    self._number = self._shared[_LINKS] = self._shared[_LINKS] + 1
                    before.discard()
            finally:
                if self._link is not link:
                    link.close()
        except LazydError as error:
            self._log.debug(str(error))
            self._retry_at = self._log.elapsed() + self._retry_s
            self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)
            return None
        self._retry_at = None
        self._retry_s = FIRST_RETRY_S
        if self._link is not link:
            self._is_lost = True
            return f"{self.name}: it is up again, but has another checkpoint: nothing is taken of it"
        self._log.message(f"{self.name}: connected again")
        return None

    def part(self, *, has_run: bool, has_all: bool) -> str | None:
        """End the link, when the engine's threads have ended. Returns what to report if the end is not a good one.

        has_run: a restored task may have run; has_all: every page is accounted for.
        """
        info = self.info
        connection = self._link.connection
        if info.fd >= 0:
            connection = socket.socket(fileno=os.dup(info.fd))
        try:
            if not has_run:
                refuse(connection)
            elif has_all and not info.error and not info.waiting and not self._shared[_PARTING]:
                self._shared[_PARTING] = 1  # a process that dies from here on leaves it at the end of the connection
                finish(connection, self.name, HeaderSize(info.header_bytes), is_inherited=self._server.inherited >= 0)
        except ProtocolError as error:
            if not self._identity:
                return f"{error}; all pages have come, but see what became of the task there"
            self._log.warning(str(error))  # it has nothing to lose
        finally:
            connection.close()
        return None


_REASONS: dict[LinkReason, Callable[[int, int], str]] = {
    LinkReason.ENDED: lambda _, __: "it hung up",
    LinkReason.COMMAND: lambda found, _: (
        f"an answer that begins with {found:#x}: not a page server, or one of the other header size"
    ),
    LinkReason.PID: lambda found, wanted: f"an answer about task {found}, task {wanted} was asked for",
    LinkReason.ADDRESS: lambda found, wanted: f"an answer about {found:#x}, {wanted:#x} was asked for",
    LinkReason.PAGES: lambda found, wanted: f"an answer of {found} pages, {wanted} were asked for",
    LinkReason.UNASKED: lambda _, __: "bytes that nobody asked for",
    LinkReason.UNCOUNTED: lambda _, __: "the serving process died in the middle of receiving",
}


def describe(info: LinkInfo) -> str:
    """Say why a link is of no use any more."""
    if info.reason is LinkReason.FAILED:
        number = -info.error
        return f"the link broke: {errno.errorcode.get(number, number)}, {os.strerror(number).lower()}"
    return _REASONS[info.reason](*info.detail)
