# SPDX-License-Identifier: MIT
"""The source of a migration: has criu dump the task, sends the small images, and guards it until its copy is whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lazyd.errors import DumpError, ProtocolError
from lazyd.limits import raise_descriptor_limit
from lazyd.migrate.brake import Brake
from lazyd.migrate.conversation import VERSION, Conversation, Said, give_up_at_signals, refuse_signals
from lazyd.migrate.guard import Guard, how_to_decide
from lazyd.net import delete_firewall_table, firewall_tables
from lazyd.report import Log, human_seconds
from lazyd.target.process import descendants
from lazyd.target.tracing import status_fields
from lazyd.tcp import Peer, connect
from lazyd.tls.settings import Files
from lazyd.tuples import NamedTuple
from lazyd.units import human_bytes

_ANSWER_S = 20.0
_RESTORE_S = 600.0
_DUMPER_S = 30.0
_LOOK_S = 0.5
_SILENT_S = 5.0
_LAST_WORDS_S = 5.0
_ON_ITS_WAY_S = 1.0
_PIPE_LIMIT = Path("/proc/sys/fs/pipe-max-size")
_PIPE_BYTES = 4 << 20  # as large as it makes them (seen, 4.1.1 and 4.2.1)


class Settings(NamedTuple):
    """What is migrated, where to, and how."""

    pid: int
    host: str
    port: int
    criu: str = "criu"
    criu_options: Sequence[str] = ()
    tls: Files | None = None
    locks_by_nftables: bool = False
    """criu locks TCP connections by a table of nftables."""
    unlocks: bool = False
    """Remove that once the copy is whole: the connections' address is another host's then."""


_LOCK_PREFIX = "CRIU-"


class _DumperDiedError(DumpError):
    """criu dump has ended with a failure, and what it held goes on."""


def migrate(settings: Settings, log: Log) -> int:
    """Migrate a task tree; return 0 once its copy has all of its memory. LazydError: it goes on here, as it was."""
    if not Path(f"/proc/{settings.pid}").exists():
        raise DumpError(f"process {settings.pid}: no such process")
    _check_pipes(settings.pid)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, nobody would hear how the dumper ended
    raise_descriptor_limit()  # one for each task
    give_up_at_signals()
    with contextlib.ExitStack() as stack:
        connect_once = _connector(settings, stack)
        peer = f"{settings.host}:{settings.port}"
        control = Conversation(connect_once(), peer)
        token = secrets.token_hex(16)
        control.say("hello", version=VERSION, token=token)
        control.hear("welcome", timeout_s=_ANSWER_S)
        link = connect_once()
        Conversation(link, peer).say("pages", token=token)
        control.hear("linked", timeout_s=_ANSWER_S)
        folder = Path(tempfile.mkdtemp(prefix="lazyd-migrate-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        guard = Guard(link, Brake(settings.pid))
        stack.callback(guard.end)
        migration = _Migration(settings, log, control, guard, folder)
        try:
            return migration.run()
        finally:
            migration.end_dumper()


def _check_pipes(pid: int) -> None:
    """See that criu may have the pipes that it gives pages out from: else it fails when the copy runs already."""
    resident = 0
    for one in (pid, *descendants(pid)):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            resident += int(status_fields(one).get("VmRSS", "0 kB").split()[0]) << 10
    reading, writing = os.pipe()
    try:
        if resident > int(_PIPE_LIMIT.read_text()):
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError as error:
        what = f"criu needs pipes of {human_bytes(_PIPE_BYTES)} to give out its memory, and may not have them"
        raise DumpError(f"process {pid}: {what}: raise {_PIPE_LIMIT} to {_PIPE_BYTES}") from error
    finally:
        os.close(reading)
        os.close(writing)


def _connector(settings: Settings, stack: contextlib.ExitStack) -> Callable[[], socket.socket]:
    """Return what connects to the destination: by TLS, if that is wanted."""
    if settings.tls is None:
        return lambda: stack.enter_context(connect(settings.host, settings.port, Peer.MAY_PAUSE))
    from lazyd.tls.handshake import Endpoint, Side  # noqa: PLC0415  ssl takes its time

    endpoint = Endpoint(settings.tls, Side.CLIENT)

    def open_tunnel() -> socket.socket:
        connection = connect(settings.host, settings.port, Peer.MAY_PAUSE)
        tunnel = stack.enter_context(endpoint.open(connection, settings.host, peer=f"{settings.host}:{settings.port}"))
        return tunnel.plain

    return open_tunnel


def _wait_for_byte(reading: int, dumper: subprocess.Popen[bytes]) -> bool:
    """Wait for a byte of the dumper, and say whether it came; false too if the dumper has died.

    One that is killed may leave children that hold the other end for ever: they are ended.
    """
    pidfd = os.pidfd_open(dumper.pid)
    try:
        if reading in select.select([reading, pidfd], [], [])[0]:
            return bool(os.read(reading, 1))
    finally:
        os.close(pidfd)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(dumper.pid, signal.SIGKILL)  # a group of its own, which keeps its number until we wait for it
    return False


class _Migration:
    def __init__(self, settings: Settings, log: Log, control: Conversation, guard: Guard, folder: Path) -> None:
        self._settings, self._log, self._control = settings, log, control
        self._guard, self._folder = guard, folder
        self._dumper: subprocess.Popen[bytes] | None = None
        self._begun = 0.0
        self._locks: set[str] = set()
        """Locks of others that were there before."""

    def run(self) -> int:
        """Do all steps; LazydError if it failed and the task goes on."""
        self._dump()
        self._send_images()
        try:
            self._hear("restoring")
        except _DumperDiedError as error:
            raise self._not_dumped(str(error)) from error
        # Before anything holds: given up then, the task would be neither let go nor ended as it should.
        refuse_signals(self._log, f"the copy at {self._control.peer} needs this process until it is full")
        try:
            self._guard.hold_at_end()
            self._see_dumper()  # it may have let the task go on before that was held
        except Exception as error:
            self._guard.let_go_at_end()
            raise self._not_dumped(str(error)) from error
        is_running = False
        try:
            self._control.say("go")
            said = self._hear("running", "failed")
            if is_running := said.word == "running":
                stopped = human_seconds(time.monotonic() - self._begun)
                self._log.message(f"running at {self._control.peer}; it was stopped for {stopped} at most")
                said = self._hear_ending()
        except _DumperDiedError as error:
            return self._part(str(error), is_running=is_running)
        except Exception as error:
            return self._hold(str(error))
        if said.word == "full":
            return self._finish(said)
        if said.word == "lost":
            return self._hold(f"{self._control.peer}: {said.values.get('reason')}")
        self._guard.let_go_at_end()
        raise self._failed(said)

    def _hear(self, *words: str) -> Said:
        """Return what the destination says next, while the task is stopped. _DumperDiedError if it goes on instead."""
        begun, is_told = time.monotonic(), False
        while not self._is_speaking():
            waited = time.monotonic() - begun
            if waited > _SILENT_S and not is_told:
                is_told = True
                waits = f"{self._control.peer} to say {' or '.join(words)}; process {self._settings.pid} is stopped"
                self._log.warning(f"waiting for {waits}")
            if waited > _RESTORE_S:
                raise ProtocolError(self._control.peer, f"says nothing for {_RESTORE_S:g} s")
        return self._control.hear(*words, timeout_s=_ANSWER_S)

    def _is_speaking(self) -> bool:
        """Wait a moment for the destination to say something. _DumperDiedError if the dumper has ended with a failure.

        It holds the task stopped: who has killed it has let the task go on.
        """
        assert self._dumper is not None
        with contextlib.ExitStack() as stack:
            watched: list[socket.socket | int] = [self._control.stream]
            if self._guard.holder_fd >= 0:
                watched.append(self._guard.holder_fd)
            if self._dumper.returncode is None:
                watched.append(pidfd := os.pidfd_open(self._dumper.pid))
                stack.callback(os.close, pidfd)
            ready = select.select(watched, [], [], _LOOK_S)[0]
        if self._control.stream in ready:
            return True
        self._guard.look()
        self._see_dumper()
        return False

    def _see_dumper(self) -> None:
        """See that the dumper has not failed: _DumperDiedError."""
        assert self._dumper is not None
        if self._dumper.poll():
            raise _DumperDiedError(self._how_it_ended(self._dumper.returncode))

    def _how_it_ended(self, code: int) -> str:
        """Say how criu dump has failed. It has no last word when it is killed: what its log ends with is no reason."""
        if code < 0:
            with contextlib.suppress(ValueError):  # not all have names
                return f"criu dump was killed by {signal.Signals(-code).name}"
            return f"criu dump was killed by signal {-code}"
        return f"criu dump has ended with {code}: {self._last_error()}"

    def _hear_ending(self) -> Said:
        """Return what the destination says last; ProtocolError too if pages cannot get there any more."""
        silent_since = 0.0
        while not self._is_speaking():
            if not self._guard.link_ended.is_set():
                continue
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > _LAST_WORDS_S:
                raise ProtocolError(self._control.peer, "the connection for pages is gone, and not all have been sent")
        return self._control.hear("full", "lost")

    def _dump(self) -> None:
        """Start the dumper; return once it has the task stopped and serves its memory."""
        if self._settings.locks_by_nftables:
            self._locks = firewall_tables(_LOCK_PREFIX)
        reading, writing = os.pipe()
        numbers = (self._guard.for_dumper.fileno(), writing)
        words = [self._settings.criu, "dump", "--tree", str(self._settings.pid), "--images-dir", str(self._folder)]
        # Address and port are for nothing beside a connection, but wanted.
        words += ["--lazy-pages", "--ps-socket", str(numbers[0]), "--address", "127.0.0.1", "--port", "1"]
        words += ["--status-fd", str(writing), "--log-file", "dump.log", "-v2", *self._settings.criu_options]
        self._begun = time.monotonic()
        try:
            self._dumper = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=numbers,
                start_new_session=True,  # what interrupts us is not for it
            )
        except OSError as error:
            os.close(reading)
            reason = (error.strerror or str(error)).lower()
            raise DumpError(f"{self._settings.criu}: cannot be started: {reason} (--criu names it)") from error
        finally:
            os.close(writing)
        self._guard.start(self._dumper.pid)
        try:
            is_ready = _wait_for_byte(reading, self._dumper)
        finally:
            os.close(reading)
        if not is_ready:
            code = self._dumper.wait()
            why = self._how_it_ended(code)
            if code < 0 and not self._guard.brake.has_ended():  # what it had put into the task may be there
                raise DumpError(f"process {self._settings.pid}: {why} at work on it: see whether it goes on as it was")
            raise self._not_dumped(why)
        self._log.info(
            f"process {self._settings.pid} is stopped, after {human_seconds(time.monotonic() - self._begun)}"
        )

    def _not_dumped(self, why: str) -> DumpError:
        """Return the error of a dump of which no copy runs."""
        if self._guard.brake.has_ended():
            return DumpError(f"process {self._settings.pid}: it is gone, ended or migrated by somebody else; {why}")
        return DumpError(f"process {self._settings.pid}: {why}; it goes on as it was")

    def _last_error(self) -> str:
        """Return the last error in criu's log."""
        with contextlib.suppress(OSError):
            lines = (self._folder / "dump.log").read_text(errors="replace").splitlines()
            errors = [line.split("Error ", 1)[1] for line in lines if "Error " in line and "FAILED" not in line]
            if errors:
                return errors[-1]
        return "it failed"

    def _send_images(self) -> None:
        begun, total, count = time.monotonic(), 0, 0
        for path in sorted(self._folder.iterdir()):
            if path.suffix != ".log" and path.is_file():
                total += self._control.say_file(path)
                count += 1
        self._control.say("images", suite=self._settings.criu)
        took = time.monotonic() - begun
        self._log.info(f"{count} images sent, {human_bytes(total)} in {human_seconds(took)}")

    def _part(self, why: str, *, is_running: bool) -> int:
        """Leave the task stopped, which its dumper has let go, unless the destination says that no copy runs.

        A destination whose restore has failed has the dumper let go, and says so a moment later. One whose copy runs
        says nothing more, if that lacks anything: the copy waits.
        """
        self._guard.hang_up()
        copy = "runs and lacks memory"
        try:
            if not is_running:
                said = self._control.hear("running", "failed", "lost", timeout_s=_ANSWER_S)
                is_running = said.word == "running"
            if is_running:
                said = self._control.hear("full", "lost", timeout_s=_ON_ITS_WAY_S)
        except ProtocolError as error:
            if not is_running:
                why = f"{why}; {error}"
        else:
            if said.word == "failed":
                self._guard.brake.take_off()
                raise self._failed(said)
            if said.word == "full":
                copy = "is whole"
        return self._stop(why, copy)

    def _stop(self, why: str, copy: str) -> int:
        """Leave it to people which of the task and its copy goes on: its dumper has failed, and it is stopped."""
        self._guard.brake.put_on()  # somebody may have had it go on meanwhile
        self._log.error(f"{why}; {self._guard.brake.how_it_stands(copy)}")
        return 1

    def _failed(self, said: Said) -> ProtocolError:
        """Return the error of a migration of which no copy runs."""
        return ProtocolError(self._control.peer, f"{said.values.get('reason')}; the task goes on here")

    def _hold(self, why: str) -> int:
        """Keep the task stopped, since its copy has run, until somebody decides."""
        decided = threading.Event()
        wanted = []

        def decide(number: int, _: object) -> None:
            wanted.append(number)
            decided.set()

        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, decide)
        self._log.error(f"{why}; {how_to_decide(f'process {self._settings.pid}')}")
        assert self._dumper is not None
        while not decided.wait(_LOOK_S):
            self._guard.look()
            if self._dumper.poll() is not None:
                return self._conclude("criu dump has ended with 0: its copy has all pages", 0)
            if self._guard.link_ended.is_set() and self._guard.brake.has_ended():
                break  # nobody need say it, and no pages can go to its copy any more
        if wanted and wanted[0] == signal.SIGUSR1:
            self._guard.let_go_at_end()
            self.end_dumper()
            if self._dumper.poll() is None:
                self._log.error(f"criu dump does not let process {self._settings.pid} go: end it, kill -KILL")
            else:
                self._log.message(f"process {self._settings.pid} goes on here")
            return 1
        self.end_dumper()
        return self._conclude(f"process {self._settings.pid} is ended", 1)

    def _conclude(self, success: str, exit_code: int) -> int:
        """Say what the end of the dumper, which held the task, has made of it, and return the exit code."""
        assert self._dumper is not None
        code = self._dumper.poll()
        if code is None:
            self._log.error("criu dump does not end")
            return 1
        if code:
            return self._stop(self._how_it_ended(code), "may run")
        self._log.message(success)
        return exit_code

    def _finish(self, said: Said) -> int:
        assert self._dumper is not None
        try:
            code = self._dumper.wait(_DUMPER_S)
        except subprocess.TimeoutExpired:
            return self._hold("criu dump does not end, though all pages have been sent")
        if code:
            return self._stop(f"{self._how_it_ended(code)}, though all pages were sent", "is whole")
        for line in said.values.get("summary", []):
            self._log.message(str(line))
        if self._settings.locks_by_nftables:
            self._unlock()
        return 0

    def _unlock(self) -> None:
        """Remove the lock that criu leaves behind, or say how: without it, packets to the source would be refused."""
        for name in sorted(firewall_tables(_LOCK_PREFIX) - self._locks):
            if self._settings.unlocks:
                delete_firewall_table(name)
                self._log.message(f"the network is unlocked: the table {name} is gone")
            else:
                self._log.message(
                    f"its TCP connections stay locked here: nft delete table inet {name}, once their address has moved"
                )

    def end_dumper(self) -> None:
        """See the dumper end, in the way that the guard says: the task goes on, or ends."""
        if self._dumper is None:
            return
        self._guard.end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._dumper.wait(_DUMPER_S)
