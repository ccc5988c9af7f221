# SPDX-License-Identifier: MIT
"""The destination of a migration: takes the images, has lazyd serve, and criu restore the tasks."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lazyd.errors import LazydError, ProtocolError, RestoreError, SystemCallError, UsageError
from lazyd.hints import TYPE_CHECKING, Any
from lazyd.migrate.conversation import VERSION, Conversation, GivenUpError, give_up_at_signals, refuse_signals
from lazyd.report import Log, human_seconds
from lazyd.restore_socket import SOCKET_NAME
from lazyd.target.process import descendants
from lazyd.tcp import Peer, listen, prepare
from lazyd.tls.settings import Files
from lazyd.tuples import NamedTuple
from lazyd.units import human_bytes

if TYPE_CHECKING:
    from lazyd.tls.handshake import Endpoint

_HELLO_S = 20.0
_IMAGES_S = 600.0
_LEFT_BEHIND = {".log", ".out"}
"""What is left in the directory of a migration that has failed: why it has."""
_PRELOADED = """
import sys
import lazyd.daemon, lazyd.session, lazyd.source.page_server
from lazyd.__main__ import run
sys.exit(run() if sys.stdin.readline() else 1)
"""
_ENDS_S, _LAST_WORDS_S = 0.5, 10.0


class Settings(NamedTuple):
    """Where to listen, where images go, and how to restore."""

    host: str
    port: int
    images: Path
    criu: str = "criu"
    criu_options: Sequence[str] = ()
    lazyd_options: Sequence[str] = ()
    tls: Files | None = None
    pidfile: Path | None = None


def receive(settings: Settings, log: Log) -> int:
    """Take one migration; return 0 once all memory is there."""
    images = settings.images.absolute()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, nobody would hear how criu restore ended
    give_up_at_signals()
    try:
        images.mkdir(exist_ok=True)
        holds = [path.name for path in images.iterdir() if path.suffix not in _LEFT_BEHIND]
    except OSError as error:
        raise SystemCallError("opening the directory", error.errno or 0, path=settings.images) from error
    if holds:
        raise UsageError(f"{settings.images}: not empty: a migration's images go into a directory of their own")
    endpoint = None
    if settings.tls is not None:
        from lazyd.tls.handshake import Endpoint, Side  # noqa: PLC0415  ssl takes its time

        endpoint = Endpoint(settings.tls, Side.SERVER)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(settings.host, settings.port))
        host, port = listener.getsockname()[:2]
        log.message(f"waiting for a migration on {host}:{port}")
        while True:
            try:
                control, link = _take_callers(listener, endpoint, stack, log)
                break
            except GivenUpError:
                raise
            except LazydError as error:
                log.error(f"{error}; waiting for another")
        listener.close()
        return _Migration(settings._replace(images=images), log, control, link).run()


def _take_callers(
    listener: socket.socket, endpoint: Endpoint | None, stack: contextlib.ExitStack, log: Log
) -> tuple[Conversation, socket.socket]:
    """Return the two connections of one source: what it says on, and that for pages."""

    def accept() -> Conversation:
        connection, (host, *_) = listener.accept()
        stack.callback(connection.close)
        prepare(connection, Peer.MAY_PAUSE)
        if endpoint is not None:
            connection = stack.enter_context(endpoint.open(connection, host)).plain
        return Conversation(connection, host)

    listener.settimeout(None)
    control = accept()
    hello = control.hear("hello", timeout_s=_HELLO_S)
    if hello.values.get("version") != VERSION:
        control.say("failed", reason=f"its lazyd speaks version {VERSION}, not {hello.values.get('version')}")
        raise ProtocolError(control.peer, f"speaks version {hello.values.get('version')}, not {VERSION}")
    control.say("welcome")
    listener.settimeout(_HELLO_S)
    try:
        link = accept()
    except TimeoutError as error:
        raise ProtocolError(control.peer, f"makes no second connection for {_HELLO_S:g} s") from error
    pages = link.hear("pages", timeout_s=_HELLO_S)
    if pages.values.get("token") != hello.values.get("token"):
        raise ProtocolError(link.peer, "is not the source that is being talked to")
    control.say("linked")
    log.info(f"{control.peer} has something to migrate")
    return control, link.stream


class _Migration:
    def __init__(self, settings: Settings, log: Log, control: Conversation, link: socket.socket) -> None:
        self._settings, self._log, self._control, self._link = settings, log, control, link
        self._images = settings.images
        self._statistics = self._images / "lazyd-stats.json"
        self._daemon: subprocess.Popen[bytes] | None = None
        self._ready = self._family = -1
        """The ends of pipes: what serves is ready, and none of its processes is there any more."""
        self._written: list[Path] = []

    def run(self) -> int:
        """Do all steps; return 0 once all memory is there."""
        self._start_daemon()
        try:
            count, total = self._take_images()
            self._log.info(f"{count} images, {human_bytes(total)}")
            self._have_it_listen()
            self._control.say("restoring")
            self._control.hear("go", timeout_s=_HELLO_S)
            begun = time.monotonic()
            refuse_signals(self._log, "the tasks are being restored")
            pid = self._restore()
        except LazydError as error:
            # What serves sees that the restore has failed, and parts from the source so that the task goes on there.
            self._end_daemon()
            for path in self._written:
                path.unlink(missing_ok=True)
            with contextlib.suppress(LazydError):
                self._control.say("failed", reason=str(error))
            raise
        self._log.message(f"running: process {pid}, restored in {human_seconds(time.monotonic() - begun)}")
        with contextlib.suppress(LazydError):  # whoever is not there any more has its connection for pages
            self._control.say("running", pid=pid)
        return self._wait()

    def _take_images(self) -> tuple[int, int]:
        count = total = 0
        while True:
            said = self._control.hear("file", "images", timeout_s=_IMAGES_S)
            if said.word == "images":
                return count, total
            total += self._control.hear_file(said, self._images)
            self._written.append(self._images / said.values["name"])
            count += 1

    def _start_daemon(self) -> None:
        """Start what will serve the memory: it imports what it needs while the task still runs, and then waits."""
        self._ready, writing = os.pipe()
        self._family, theirs = os.pipe()
        numbers = (self._link.fileno(), writing, theirs)
        self._link.settimeout(None)
        words = [sys.executable, "-P", "-c", _PRELOADED, "lazy-pages", "-D", str(self._images), "--no-progress"]
        words += ["--page-server", "--ps-socket", str(numbers[0]), "--status-fd", str(writing)]
        words += ["-o", "lazy-pages.log", "--stats", str(self._statistics), *self._settings.lazyd_options]
        # Its errors, and only those, go where ours go.
        self._daemon = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=numbers,
            start_new_session=True,  # what interrupts us is passed on
        )
        os.close(writing)
        os.close(theirs)

    def _have_it_listen(self) -> None:
        """Have it load the images; return once it listens."""
        assert self._daemon is not None
        assert self._daemon.stdin is not None
        self._written += [self._statistics, self._images / "restored.pid", self._images / SOCKET_NAME]
        with contextlib.suppress(BrokenPipeError):
            self._daemon.stdin.write(b"\n")
            self._daemon.stdin.close()
        if not os.read(self._ready, 1):
            self._daemon.wait()
            raise RestoreError(f"lazyd lazy-pages: {self._last_line('lazy-pages.log')}")

    def _restore(self) -> int:
        """Have criu restore the tasks; return the first one's pid. RestoreError: none of them has run."""
        pidfile = self._settings.pidfile or self._images / "restored.pid"
        words = [self._settings.criu, "restore", "--images-dir", str(self._images), "--lazy-pages"]
        words += ["--restore-detached", "--pidfile", str(pidfile.absolute()), "--log-file", "restore.log", "-v2"]
        # Its tasks may keep what it was given for output open for ever: a file, no pipe.
        with (self._images / "restore.out").open("wb") as out:
            try:
                restorer = subprocess.Popen(
                    [*words, *self._settings.criu_options], stdin=subprocess.DEVNULL, stdout=out, stderr=out
                )
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise RestoreError(f"{self._settings.criu}: cannot be started: {reason} (--criu names it)") from error
        self._watch_over(restorer)
        if restorer.wait():
            raise RestoreError(f"criu restore: {self._last_error()}")
        return int(pidfile.read_text())

    def _watch_over(self, restorer: subprocess.Popen[bytes]) -> None:
        """Return when criu restore has ended. If the source goes first, so does what it was making: RestoreError.

        The source says nothing until it is told that the tasks run. What they need to become whole may be at the
        source only, and criu would wait for it for ever.
        """
        pidfd = os.pidfd_open(restorer.pid)
        try:
            ready = select.select([pidfd, self._control.stream.fileno()], [], [])[0]
        finally:
            os.close(pidfd)
        if pidfd in ready:
            return
        for pid in (*descendants(restorer.pid), restorer.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        restorer.wait()
        raise RestoreError(f"{self._control.peer} has gone before its tasks were whole; they were ended here")

    def _wait(self) -> int:
        """Wait until all memory is there; tell both sides."""
        assert self._daemon is not None
        daemon = self._daemon
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: daemon.send_signal(number))
        code = daemon.wait()
        if code < 0:  # it was killed, and others have taken its place
            os.read(self._family, 1)
            code = self._code_of_family()
        if code:
            reason = f"not all memory has come: {self._last_line('lazy-pages.log')}"
            with contextlib.suppress(LazydError):
                self._control.say("lost", reason=reason)
            self._log.error(reason)
            return 1
        statistics = json.loads(self._statistics.read_text())
        summary = summary_lines(statistics)
        for line in summary:
            self._log.message(line)
        with contextlib.suppress(LazydError):
            self._control.say("full", summary=summary)
        return 0

    def _code_of_family(self) -> int:
        """Return how what serves has ended, where it was not the process that was started that did."""
        try:
            return int(json.loads(self._statistics.read_text())["exit_code"])
        except (OSError, ValueError, KeyError):
            return 1

    def _end_daemon(self) -> None:
        """See what serves end: by itself where it has heard of a restore that failed, else it is told to."""
        if self._daemon is None:
            return
        if self._daemon.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._daemon.stdin.close()
        for patience_s, end in ((_ENDS_S, self._daemon.terminate), (_LAST_WORDS_S, self._daemon.kill)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._daemon.wait(patience_s)
                return
            end()
        self._daemon.wait()

    def _last_error(self) -> str:
        """Return the last error in criu's log."""
        with contextlib.suppress(OSError):
            lines = (self._images / "restore.log").read_text(errors="replace").splitlines()
            errors = [line.split("Error ", 1)[1] for line in lines if "Error " in line and "FAILED" not in line]
            if errors:
                return errors[-1]
        return self._last_line("restore.out") or "it failed"

    def _last_line(self, name: str) -> str:
        with contextlib.suppress(OSError):
            lines = (self._images / name).read_text(errors="replace").split("\n")
            return next((line for line in reversed(lines) if line.strip()), "")
        return ""


def summary_lines(statistics: dict[str, Any]) -> list[str]:
    """Say what a migration took, as both sides tell it."""
    seconds, faults, server = statistics["seconds"], statistics["faults"], statistics["page_server"]
    # Whoever serves in the place of one that was killed does not know when the restore was over.
    full = None if seconds["restored"] is None else seconds["full"] - seconds["restored"]
    latency = ""
    if faults["count"]:
        latency = f", p50 {human_seconds(faults['p50_ns'] / 1e9)}, p99 {human_seconds(faults['p99_ns'] / 1e9)}"
    return [
        "full" if full is None else f"full {human_seconds(full)} after that",
        f"faults: {faults['count']}{latency}",
        f"pages: {human_bytes(server['bytes'])} in {server['requests']} requests, "
        f"round trip {human_seconds(server['round_trip_ns'] / 1e9)}",
    ]
