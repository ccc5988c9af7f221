# SPDX-License-Identifier: MIT
"""Moves bytes between a TLS connection and a plain socket, in a process of its own or in a thread.

One loop serves both directions, since a TLS session must not be used by two threads at once. Each direction has a
buffer and stops reading while its other side does not take, so that neither holds up the other, and nothing grows.
TLS 1.3 sends what carries no data (session tickets, new keys): it goes no further than here.

What is sent is cut into TLS records as stock criu cuts it: a header has one of its own, and the pages behind it have
theirs, of 16 KiB each but for the last. Stock counts on that (seen, 4.1.1 and 4.2.1): it puts whole records into a pipe
that it empties every 64 KiB, and waits for ever if a record in the middle was shorter.

The plain end tells of an end of input, and of nothing else. Whether the peer has closed TLS in good order, or the link
broke in the middle, is what Tunnel.ending() says; it is known no later than the end is seen.

In a process of its own a session outlives whoever uses the plain end: for a source that takes an end of input for
success, and kills its task, that may be what saves the task. So such a process ignores the signals that end a group.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import ssl
import sys
import termios
import threading
import time
from pathlib import Path

from lazyd.enums import Enum
from lazyd.hints import NoReturn, cast
from lazyd.tuples import NamedTuple
from lazyd.wire import HeaderSize, following_bytes, guess_header

_BUFFER_BYTES = 1 << 19
_WIRE_BYTES = 1 << 18
_RECORD_BYTES = 1 << 14
_SOCKET_BYTES = 1 << 20
_LINGER_S = 5.0
_ACKNOWLEDGED_LOOK_S = 0.005
_PR_SET_NAME = 15
_REPORT_BYTES = 4096
_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Runs(Enum):
    """Where bytes are moved."""

    IN_PROCESS = 0
    """For a process that has one thread, as a fork wants it."""
    IN_THREAD = 1


class How(Enum):
    """How a connection ended."""

    CLOSED = "closed"
    """The peer said so, or this end did."""
    BROKEN = "broken"
    """It is gone without a word: the link broke, or the peer died."""
    REFUSED = "refused"
    """The peer said by TLS that it does not want this end, or said what is no TLS."""


class Ending(NamedTuple):
    """How a connection ended, and one line about it, which names nobody; "" if there is nothing to say."""

    how: How
    reason: str


_ALERTS = {
    "EXPIRED": "it has expired",
    "REVOKED": "it is revoked",
    "UNKNOWN_CA": "it is of an authority that is not trusted there",
    "BAD_CERTIFICATE": "it is not trusted there",
    "CERTIFICATE_UNKNOWN": "it is not trusted there",
    "UNSUPPORTED_CERTIFICATE": "it is not for this use (extended key usage)",
    "ACCESS_DENIED": "it may not do this there",
}


def explain_alert(error: ssl.SSLError, certificate: Path) -> str:
    """Return one line about an alert that the peer has sent; "" if the error is another."""
    name = error.reason or ""
    if "ALERT" not in name:
        return ""
    if "CERTIFICATE_REQUIRED" in name:
        return "the peer wants a certificate (--tls-cert and --tls-key name one)"
    for word, reason in _ALERTS.items():
        if word in name:
            return f"the peer refuses our certificate {certificate}: {reason}"
    said = name.split("ALERT_")[-1].lower().replace("_", " ")
    return f"the peer refuses the TLS session: {said}"


class Session(NamedTuple):
    """A TLS session whose handshake is to be made, or is made."""

    wire: socket.socket
    tls: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO
    peer: str
    certificate: Path
    """What is shown to the peer."""
    is_client: bool


class _Records:
    """Finds the borders of messages in what is sent, which may come in any cut. What is no message is not cut."""

    def __init__(self, *, is_client: bool) -> None:
        self._is_client = is_client
        self._header: HeaderSize | None = None
        self._is_known = False
        """Whether a client has sent something; without, or with something strange, there is no header."""
        self._data_left = 0

    def learn(self, start: memoryview) -> None:
        """Take what a client sends first for what it is."""
        if not self._is_known and len(start) >= HeaderSize.NARROW:
            self._header, self._is_known = guess_header(bytes(start[: HeaderSize.NARROW])), True

    @property
    def is_in_data(self) -> bool:
        """Tell whether more pages must follow."""
        return bool(self._data_left)

    def next_length(self, content: memoryview) -> int:
        """Return how much of the content is to be sent by itself; 0: more of it may be to come."""
        if self._is_client:
            self.learn(content)
            if not self._is_known:
                return 0
        if self._data_left:
            length = min(len(content), self._data_left)
            if length < self._data_left:
                length -= length % _RECORD_BYTES
            self._data_left -= length
            return length
        if self._header is None:
            return len(content)
        if len(content) < self._header:
            return 0
        follows = following_bytes(bytes(content[: self._header]), self._header)
        if follows is None:
            self._header = None
            return len(content)
        self._data_left = follows
        return self._header


class _Pump:
    """The loop. The sockets are its own; closing them is left to whoever runs it."""

    def __init__(self, session: Session, plain: socket.socket, report_fd: int) -> None:
        self.wire, self.plain = session.wire.dup(), plain
        self._session, self._tls = session, session.tls
        self._report_fd = report_fd
        self._has_reported = False
        for one in (self.wire, self.plain):
            one.settimeout(0)
        self._received = memoryview(bytearray(_WIRE_BYTES))
        self._decrypted = memoryview(bytearray(_BUFFER_BYTES))
        self._taken = memoryview(bytearray(_WIRE_BYTES))
        self._to_plain = self._decrypted[:0]
        self._to_wire = memoryview(b"")
        self._has_more = True
        """There may be records that have arrived and are not decrypted."""
        self._has_heard = False
        self._reads_wire = self._reads_plain = True
        self._records = _Records(is_client=session.is_client)
        self._begun = 0
        """How much of a header is at the start of what was taken."""
        self._has_said_close = False
        self._is_plain_gone = False
        """Nobody has the plain end any more."""

    def run(self) -> None:
        """Move bytes until both sides have ended, or the connection is of no use any more."""
        ending = Ending(How.CLOSED, "")
        try:
            while self._step():
                pass
        except ssl.SSLError as error:
            ending = self._explain(error)
        except OSError as error:
            if self._reads_wire:  # else the peer has closed it before
                ending = Ending(How.BROKEN, (error.strerror or str(error)).lower())
        self._deliver()
        self._report(ending)

    def _step(self) -> bool:
        """Do what can be done now, then wait for what can be done next; return False once it is over."""
        self._decrypt()
        self._send_plain()
        if self._begun and not self._to_wire:
            self._take()
        if not self._reads_plain and not self._has_said_close and (self._is_plain_gone or not self._has_more):
            self._say_close()
        self._send_wire()
        if self._has_more and not self._to_plain and not self._is_plain_gone:
            return True
        is_sent = self._has_said_close and not self._to_wire
        if is_sent and (self._is_plain_gone or not (self._reads_wire or self._to_plain)):
            return False
        self._wait()
        return True

    def _wait(self) -> None:
        wire_events = plain_events = 0
        if self._reads_wire and not self._to_plain and not self._is_plain_gone:
            wire_events |= select.POLLIN
        if self._to_wire:
            wire_events |= select.POLLOUT
        if self._reads_plain and not self._to_wire:
            plain_events |= select.POLLIN
        if self._to_plain:
            plain_events |= select.POLLOUT
        poll = select.poll()
        if wire_events:  # else an error there would wake it for ever; it is heard of when it is used again
            poll.register(self.wire, wire_events)
        if not self._is_plain_gone or plain_events:
            poll.register(self.plain, plain_events)
        found = dict(poll.poll(_LINGER_S * 1000 if self._is_plain_gone else None))
        if not found:
            raise TimeoutError(errno.ETIMEDOUT, "the peer does not take what was to be sent last")
        at_wire, at_plain = found.get(self.wire.fileno(), 0), found.get(self.plain.fileno(), 0)
        if at_wire & ~select.POLLOUT and wire_events & select.POLLIN:
            self._receive()
        if at_plain & (select.POLLHUP | select.POLLERR):
            self._is_plain_gone = True
            self._to_plain = self._to_plain[:0]
        if at_plain & ~select.POLLOUT and plain_events & select.POLLIN:
            self._take()

    def _receive(self) -> None:
        """Take what has arrived from the peer."""
        try:
            length = self.wire.recv_into(self._received)
        except BlockingIOError:
            return
        if length:
            self._session.incoming.write(self._received[:length])
        else:
            self._session.incoming.write_eof()
        self._has_more = True

    def _decrypt(self) -> None:
        """Turn records into bytes for the plain end, as many as there is room for."""
        if not self._has_more or self._to_plain:
            return
        at = 0
        try:
            while len(self._decrypted) - at >= _RECORD_BYTES:
                # With a buffer it returns how much it has put there, which its types do not say.
                length = cast(int, self._tls.read(_RECORD_BYTES, self._decrypted[at:]))
                if not length:
                    self._reads_wire = self._has_more = False
                    break
                at += length
        except ssl.SSLWantReadError:
            self._has_more = False
        except ssl.SSLZeroReturnError:
            self._reads_wire = self._has_more = False
        finally:
            self._to_plain = self._decrypted[:at]
            self._has_heard = self._has_heard or bool(at)
            if not self._session.is_client:
                self._records.learn(self._to_plain)
            self._collect()
        if not self._reads_wire and not self._to_plain:
            self._end_plain()

    def _send_plain(self) -> None:
        while self._to_plain:
            try:
                length = self.plain.send(self._to_plain)
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                self._is_plain_gone = True
                length = len(self._to_plain)
            self._to_plain = self._to_plain[length:]
            if not self._to_plain and not self._reads_wire:
                self._end_plain()

    def _take(self) -> None:
        """Take what is to be sent to the peer."""
        is_done = False
        try:
            length = self.plain.recv_into(self._taken[self._begun :])
            is_done = not length
        except BlockingIOError:
            length = 0
        except ConnectionResetError:  # closed, with something unread
            length, is_done = 0, True
        left = self._taken[: self._begun + length]
        while left:
            some = self._records.next_length(left)
            if not some and (is_done or (not length and not self._records.is_in_data)):
                # Whoever sends a header sends it at once: what is less than one, with nothing behind it, is a number.
                some = len(left)
            if not some:
                break
            self._tls.write(left[:some])
            left = left[some:]
        self._taken[: len(left)] = left
        self._begun = len(left)
        self._reads_plain = not is_done
        self._collect()

    def _say_close(self) -> None:
        """Say to the peer that nothing more comes. OpenSSL then looks for the same from the peer: there is no record
        left for it to find, or nobody who wants it."""
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        self._has_said_close = True
        self._collect()

    def _collect(self) -> None:
        """Take over what TLS wants sent."""
        if self._session.outgoing.pending:
            more = self._session.outgoing.read()
            self._to_wire = memoryview(bytes(self._to_wire) + more if self._to_wire else more)

    def _send_wire(self) -> None:
        while self._to_wire:
            try:
                length = self.wire.send(self._to_wire)
            except BlockingIOError:
                return
            self._to_wire = self._to_wire[length:]

    def _end_plain(self) -> None:
        """Show the peer's end of input at the plain end."""
        reason = ""
        if self._session.is_client and not self._has_heard:  # as stock does, without a word
            certificate = self._session.certificate
            reason = f"it has said nothing: it may not trust our certificate {certificate}, and its log may say so"
        self._report(Ending(How.CLOSED, reason))
        with contextlib.suppress(OSError):
            self.plain.shutdown(socket.SHUT_WR)

    def _report(self, ending: Ending) -> None:
        if not self._has_reported:
            self._has_reported = True
            os.write(self._report_fd, f"{ending.how.value} {ending.reason}".encode())

    def _deliver(self) -> None:
        """Hand over what has arrived whole, and see that the peer gets what was sent before the connection goes."""
        with contextlib.suppress(OSError):
            self.plain.settimeout(_LINGER_S)
            self.plain.sendall(self._to_plain)
        with contextlib.suppress(OSError):
            self.wire.settimeout(_LINGER_S)
            self.wire.sendall(self._to_wire)  # an alert, after an error
            self.wire.shutdown(socket.SHUT_WR)
            # A connection that is closed with something unread is reset, and what is under way to the peer is lost.
            end = time.monotonic() + _LINGER_S
            self.wire.settimeout(_ACKNOWLEDGED_LOOK_S)
            while self._unacknowledged() and time.monotonic() < end:
                with contextlib.suppress(TimeoutError):
                    if not self.wire.recv_into(self._received):
                        break

    def _unacknowledged(self) -> int:
        """Return how many bytes the peer's kernel does not have yet (tcp(7), SIOCOUTQ)."""
        answer = fcntl.ioctl(self.wire, termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(answer, sys.byteorder)

    def _explain(self, error: ssl.SSLError) -> Ending:
        if isinstance(error, ssl.SSLEOFError) or error.reason == "UNEXPECTED_EOF_WHILE_READING":
            return Ending(How.BROKEN, "it ended without closing TLS: the peer died, refused us, or the link broke")
        if alert := explain_alert(error, self._session.certificate):
            return Ending(How.REFUSED, alert)
        return Ending(How.REFUSED, f"it sent what is no TLS: {(error.reason or str(error)).lower().replace('_', ' ')}")


class Tunnel:
    """A TLS connection with a plain end. As a context manager it is closed."""

    def __init__(self, session: Session, runs: Runs) -> None:
        """Move bytes from now on. The session's socket is duplicated."""
        self.peer = session.peer
        self.version = session.tls.version() or ""
        self.pid = 0
        """The process that moves bytes; 0: a thread does."""
        self._maker = os.getpid()
        self.plain, other = socket.socketpair()
        for one in (self.plain, other):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        self.report_fd, writing = os.pipe()
        """What ending() reads: who holds this descriptor (see read_ending) can do without this object."""
        self._thread: threading.Thread | None = None
        self._known: Ending | None = None
        pump = _Pump(session, other, writing)
        if runs is Runs.IN_PROCESS:
            # Held back until it ignores them, which drops what has come by then.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
            self.pid = os.fork()
            if not self.pid:
                _serve_alone(pump, writing)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _close(pump, writing)
        else:
            self._thread = threading.Thread(target=_serve, args=(pump, writing), name=f"tls {self.peer}", daemon=True)
            self._thread.start()

    def fileno(self) -> int:
        """Return the plain end's descriptor."""
        return self.plain.fileno()

    def ending(self, timeout_s: float = 0.0) -> Ending | None:
        """Return how it ended, once the plain end has seen its end of input, or timeout_s later; None: it has not."""
        if self._known is None and self.report_fd >= 0:
            poll = select.poll()
            poll.register(self.report_fd, select.POLLIN)
            if poll.poll(timeout_s * 1000):
                self._known = read_ending(self.report_fd)
        return self._known

    def close(self) -> None:
        """Close the plain end, and with it TLS, in good order; wait until the peer has what was sent."""
        self.plain.close()
        if self._thread is not None:
            self._thread.join()
        if self.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.pid = 0
        self.ending()
        if self.report_fd >= 0:
            os.close(self.report_fd)
            self.report_fd = -1

    def discard(self) -> None:
        """Release what is left of a connection that is over, and wait for nobody; the plain end has been closed.

        A copy of this in another process does nothing: the numbers may have become somebody else's there.
        """
        if os.getpid() != self._maker:
            return
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)  # not reaped, so it is still the same
        self.close()

    def __enter__(self) -> Tunnel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_ending(report_fd: int) -> Ending:
    """Read what a tunnel's pump has said last; it blocks until it has."""
    text = os.read(report_fd, _REPORT_BYTES).decode()
    if not text:
        return Ending(How.BROKEN, "what moved its bytes was killed")
    how, _, reason = text.partition(" ")
    return Ending(How(how), reason)


def _close(pump: _Pump, report_fd: int) -> None:
    pump.plain.close()
    pump.wire.close()
    os.close(report_fd)


def _serve(pump: _Pump, report_fd: int) -> None:
    """Run a pump; its last word comes before the plain end shows that it has ended."""
    try:
        pump.run()
    finally:
        _close(pump, report_fd)


def _serve_alone(pump: _Pump, report_fd: int) -> NoReturn:
    """Run a pump as all that this process does."""
    status = 1
    try:
        for number in _GROUP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)
        ctypes.CDLL(None).prctl(_PR_SET_NAME, b"lazyd-tls", 0, 0, 0)
        kept = sorted({2, report_fd, pump.plain.fileno(), pump.wire.fileno()})
        for low, high in zip([-1, *kept], [*kept, os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(low + 1, high)
        _serve(pump, report_fd)
        status = 0
    finally:
        os._exit(status)
