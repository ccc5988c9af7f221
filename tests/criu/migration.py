# SPDX-License-Identifier: MIT
"""Migrate a program with the real CRIU, post-copy: its memory stays at the source until somebody asks for it.

    with migration.source(suite, command, folder) as source:       # criu dump --lazy-pages --port N, ready to serve
        images = source.copy_images(folder / "there")              # the small images, as they would be transferred
        outcome = migration.restore(source, images, folder / "work", who="stock")   # or "lazyd"

Facts this rests on (seen, 4.1.1 and 4.2.1): the dumper stays until the transfer ends and then kills the task, or lets
it go on if the link failed; --status-fd of a lazy dump says when it listens. Both ends are on one machine, so the
task has its own pid namespace: its pid there is free again for the copy. Without CAP_SYS_RESOURCE the serving side
needs pipes of 4 MiB.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import harness

PIPE_BYTES = 4 << 20
_PIPE_LIMIT = Path("/proc/sys/fs/pipe-max-size")
_PIPE_LIMIT_BEFORE = Path("/run/lazyd-tests.pipe-max-size")
"""What the limit was before the first of those that raise it, in whatever process; its lock counts them."""


@contextlib.contextmanager
def large_pipes(least: int = PIPE_BYTES) -> Iterator[None]:
    """Have the kernel allow pipes of `least` bytes; the last one that needs them puts the limit back."""
    fd = os.open(_PIPE_LIMIT_BEFORE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.pread(fd, 32, 0):  # else one that raised it was killed: what it was stands here
                    os.pwrite(fd, _PIPE_LIMIT.read_bytes(), 0)
            fcntl.flock(fd, fcntl.LOCK_SH)
            if os.pread(fd, 32, 0):  # else another has put it back between the two locks
                break
        if int(_PIPE_LIMIT.read_text()) < least:
            _PIPE_LIMIT.write_text(str(least))
        try:
            yield
        finally:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _PIPE_LIMIT.write_bytes(os.pread(fd, 32, 0))
                os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def free_port(address: str = "127.0.0.1") -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


@dataclass
class Source:
    """A program that stands still at the source, and a dumper that serves its memory."""

    suite: str
    pid: int
    """The task's, as seen from here; in its images it is 1."""
    dumper: subprocess.Popen
    images: Path
    state: Path
    address: str
    port: int

    @property
    def result(self) -> str:
        """Return what the program, or its copy, has said so far."""
        with contextlib.suppress(FileNotFoundError):
            return (self.state / "result").read_text()
        return ""

    @property
    def task_state(self) -> str:
        """Return the source task's state letter as ps shows it; "" if it is gone."""
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{self.pid}/stat").read_text()
            return text[text.rindex(")") + 2]
        return ""

    def copy_images(self, target: Path) -> Path:
        """Copy what a migration would transfer: all but logs."""
        shutil.copytree(self.images, target, ignore=shutil.ignore_patterns("*.log"))
        return target

    def report(self) -> str:
        """Return the end of what the dumper said."""
        return harness.tail(self.images / "dump.log")

    def wait(self, seconds: float = harness.TIMEOUT_S) -> int:
        """Return the dumper's exit code."""
        try:
            return self.dumper.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the dumper does not end:\n{self.report()}") from None


@contextlib.contextmanager
def _program(command: list[str], state: Path, enter: Callable[[], None] | None) -> Iterator[int]:
    """Run a program as a session leader inside a pid namespace of its own; yield its pid."""
    state.mkdir(parents=True, exist_ok=True)
    null = subprocess.DEVNULL
    # Not --kill-child: that is a death signal, which the copy would get when its restorer ends.
    words = ["unshare", "--fork", "--pid", "setsid", *command]
    process = subprocess.Popen(
        words,
        stdin=null,
        stdout=null,
        stderr=null,
        start_new_session=True,
        cwd="/",
        preexec_fn=enter,  # noqa: PLW1509  the tests have no threads where they start it
    )
    try:
        harness.wait_until((state / "ready").exists, f"{command[0]} to be ready")
        (state / "ready").unlink()
        yield harness.descendants(process.pid)[0]
    finally:
        for pid in harness.descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # the init of its namespace: all in it end
        process.kill()
        process.wait()


@contextlib.contextmanager
def source(
    suite: str,
    command: list[str],
    folder: Path,
    *,
    address: str = "127.0.0.1",
    extra: tuple[str, ...] = (),
    enter: Callable[[], None] | None = None,
    verbosity: str = "-v3",
) -> Iterator[Source]:
    """Start a program and dump it lazily; yield once its memory is served. All of it is gone afterwards.

    `enter` puts both into the source host (a test host's own network namespace).
    """
    images, state = folder / "images", folder / "state"
    images.mkdir(parents=True)
    with large_pipes(), _program(command, state, enter) as pid:
        reading, writing = os.pipe()
        port = free_port() if enter is None else 27000
        words = [harness.criu_command(suite), "dump", "-t", str(pid), "-D", str(images), "--shell-job"]
        words += ["--lazy-pages", "--address", address, "--port", str(port), "--status-fd", str(writing)]
        words += ["-o", "dump.log", verbosity, *extra]
        with (folder / "dump.out").open("wb") as out:
            dumper = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=[writing],
                preexec_fn=enter,  # noqa: PLW1509  the tests have no threads where they start it
            )
        os.close(writing)
        found = Source(suite, pid, dumper, images, state, address, port)
        try:
            if not os.read(reading, 1):
                dumper.wait()
                raise AssertionError(f"criu dump failed ({dumper.returncode}):\n{found.report()}")
            yield found
        finally:
            os.close(reading)
            if dumper.poll() is None:
                dumper.kill()
                dumper.wait()


def page_server_words(at: Source) -> list[str]:
    """Return the options of a lazy-pages daemon that name the source."""
    return ["--page-server", "--address", at.address, "--port", str(at.port)]


def daemon_words(who: str, suite: str) -> list[str]:
    """Return the words before `lazy-pages`, of "stock" or "lazyd"."""
    return [harness.criu_command(suite)] if who == "stock" else harness.lazyd_command()


def start_daemon(
    at: Source,
    images: Path,
    work: Path,
    *,
    who: str,
    extra: tuple[str, ...] = (),
    enter: Callable[[], None] | None = None,
    verbosity: str = "-v3",
) -> harness.Daemon:
    """Start a lazy-pages daemon that fills from the source; return once it listens."""
    work.mkdir(parents=True, exist_ok=True)
    words = [*daemon_words(who, at.suite), "lazy-pages", "-D", str(images), "-W", str(work)]
    words += [*page_server_words(at), *extra]
    if who == "stock":
        words += ["-o", "lazy-pages.log", verbosity]
    with (work / "daemon.out").open("wb") as out:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=enter)  # noqa: PLW1509
    daemon = harness.Daemon(process, work, work / "daemon.out")
    try:
        daemon.wait_listening()
    except BaseException:
        daemon.stop()
        raise
    return daemon


@contextlib.contextmanager
def copy(
    at: Source,
    images: Path,
    work: Path,
    *,
    extra: tuple[str, ...] = ("--lazy-pages",),
    enter: Callable[[], None] | None = None,
    goes: bool = True,
) -> Iterator[int]:
    """Restore the program where its images were copied to; yield the copy's pid. It is gone afterwards.

    goes: it does what it is made for at once; else it waits for STATE/go.
    """
    (at.state / "result").unlink(missing_ok=True)
    if goes:
        (at.state / "go").touch()
    pidfile = work / "restored.pid"
    pidfile.unlink(missing_ok=True)
    known = {*harness.descendants(os.getpid())}
    try:
        harness.criu_restore(at.suite, images, work, ("--pidfile", str(pidfile), *extra), enter)
        yield int(pidfile.read_text())
    finally:
        if pidfile.exists():
            end_copy(int(pidfile.read_text()))
        else:  # what a restore that failed, or was stopped, has made is ours: we are its reaper
            for pid in {*harness.descendants(os.getpid())} - known:
                end_copy(pid)


def end_copy(pid: int) -> None:
    """Kill the first task of a restored pid namespace, which ends all others, and reap it: it is our orphan."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


@dataclass
class Outcome:
    """What one migration ended with."""

    verdict: str
    daemon_exit: int
    dumper_exit: int
    daemon_output: str
    work: Path
    details: str = field(repr=False, default="")


def restore(
    at: Source, images: Path, work: Path, *, who: str, extra: tuple[str, ...] = (), enter: Callable | None = None
) -> Outcome:
    """Restore through the daemon; wait for the program's verdict, and for the exits of daemon and dumper."""
    daemon = start_daemon(at, images, work, who=who, extra=extra, enter=enter)
    try:
        with copy(at, images, work, enter=enter) as pid:
            try:
                harness.wait_until(lambda: at.result.endswith("\n"), "the program's verdict")
                daemon_exit, dumper_exit = daemon.wait(), at.wait()
            except AssertionError as error:
                texts = daemon.report(), harness.tail(work / "restore.log"), harness.task_states(pid), at.report()
                raise AssertionError(f"{error}; so far it said {at.result!r}\n" + "\n".join(texts)) from None
    finally:
        daemon.stop()
    details = daemon.report() + "\n" + at.report()
    output = daemon.output.read_text(errors="replace")
    return Outcome(at.result, daemon_exit, dumper_exit, output, work, details)


def assert_good(outcome: Outcome) -> None:
    """Hold a migration to what every migration must reach."""
    assert outcome.verdict == "ok\n", f"{outcome.verdict}\n{outcome.details}"
    assert outcome.daemon_exit == 0, f"the daemon ended with {outcome.daemon_exit}\n{outcome.details}"
    assert outcome.dumper_exit == 0, f"the dumper ended with {outcome.dumper_exit}\n{outcome.details}"
