# SPDX-License-Identifier: MIT
"""Run lazyd against skeleton.c: a made up checkpoint, a real userfaultfd, no CRIU.

A daemon is started in one of two ways: as the command that users type, or, for races that are run hundreds of
times, as a fork of this process that has everything imported already.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from images_builder import Entry, Task, build_checkpoint
from page_source import Make, Pages, PageSource
from process_harness import OFFICES, family_in, kill_processes_in

from lazyd.target.tracing import status_fields

PAGE = 4096
BASE = 0x10_0000_0000
PID = 100
TIMEOUT_S = 60.0
STRESS = max(1, int(os.environ.get("LAZYD_STRESS", "1")))
SOURCE = Path(__file__).with_name("skeleton.c")
NEEDS_KTHREADD = pytest.mark.skipif(
    not Path("/proc/2/comm").exists() or Path("/proc/2/comm").read_text() != "kthreadd\n",
    reason="pid 2 is no kernel thread here: another pid namespace than the machine's",
)
STEADY_KINDS = [
    "registers",
    "memory",
    "calls",
    "nanosleep",
    "poll",
    "ppoll",
    "futex",
    "read",
    "handler",
    "sigsuspend",
    "pending",
]
"""What threads of tests/victims/steady.c do, those apart that wait for something."""


class Run(NamedTuple):
    """Dumped pages: with a stride only every stride-th page, each an entry of its own."""

    start: int
    pages: int
    stride: int = 1


class Vma(NamedTuple):
    """A lazy VMA and what of it is dumped; the rest is in no entry."""

    start: int
    pages: int
    dumped: Sequence[Run] = ()
    prefilled: Sequence[Run] = ()
    """Dumped, but filled by the restorer."""


def full(start: int, pages: int) -> Vma:
    """A VMA that is dumped whole."""
    return Vma(start, pages, [Run(start, pages)])


def sparse(start: int, pages: int, stride: int) -> Vma:
    """A VMA with every stride-th page dumped."""
    return Vma(start, pages, [Run(start, pages, stride)])


def compile_skeleton(target: Path) -> Path:
    """Compile skeleton.c."""
    words = ["gcc", "-std=gnu11", "-O2", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wconversion"]
    subprocess.run([*words, "-pthread", "-o", str(target), str(SOURCE)], check=True)
    return target


def wait_until(condition: Callable[[], object], what: str, seconds: float = TIMEOUT_S) -> None:
    """Wait for a condition; raise AssertionError that says what was waited for."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds:g} s for {what}")
        time.sleep(0.001)


def layout(pid: int) -> tuple:
    """What of a steady must be as before: mappings by address and protection, descriptors, signals, tracer."""
    maps = [line.split()[:2] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    status = status_fields(pid)
    kept = {name: status[name] for name in ("TracerPid", "SigIgn", "SigCgt", "Threads")}
    # The victim blocks these two and lets them through from moment to moment, and watches over them itself.
    kept["SigBlk"] = int(status["SigBlk"], 16) | 1 << signal.SIGUSR1 - 1 | 1 << signal.SIGUSR2 - 1
    return maps, sorted(Path(f"/proc/{pid}/fd").iterdir()), kept


def task_state(pid: int) -> str:
    """The state letter of /proc/PID/stat; "" if there is none."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/stat").read_text()
        return text[text.rindex(")") + 2]
    return ""


def descendants(pid: int) -> list[int]:
    """All processes below one, parents first."""
    found = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(word) for word in (thread / "children").read_text().split()]
    return found + [below for child in found for below in descendants(child)]


class Daemon:
    """A daemon on its way to an exit code."""

    def __init__(self, pid: int, work: Path) -> None:
        self.pid = pid
        self.work = work
        self._code: int | None = None

    @property
    def output(self) -> str:
        """What it has said on stderr."""
        return (self.work / "daemon.out").read_text(errors="replace")

    def poll(self) -> int | None:
        """The exit code, or None as long as it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, seconds: float = TIMEOUT_S) -> int:
        """The exit code."""
        wait_until(lambda: self.poll() is not None, f"the daemon to end; it said:\n{self.output}", seconds)
        assert self._code is not None
        return self._code

    def wait_for_line(self, text: str) -> None:
        """Wait until it has said something."""
        wait_until(lambda: text in self.output, f"{text!r} from the daemon; it said:\n{self.output}")

    def kill(self, number: signal.Signals) -> None:
        """Send it a signal; it has not been reaped."""
        assert self._code is None
        os.kill(self.pid, number)

    def family(self) -> dict[str, int]:
        """The processes that keep and serve, by office; those that are there at the moment.

        The keeper is the one that was started until it dies, and then the one that took its office.
        """
        return family_in(self.work, self.pid if self.poll() is None else 0)

    def whole_family(self) -> dict[str, int]:
        """The same, once it is complete."""
        wait_until(lambda: self.family().keys() == {*OFFICES}, "a keeper, a server and a standby")
        return self.family()

    def server(self) -> int:
        """The process that serves, once there is one."""
        wait_until(lambda: "server" in self.family(), f"a process that serves; the daemon said:\n{self.output}")
        return self.family()["server"]

    def kill_servers(self, seed: int, *, within_s: float) -> None:
        """Kill the process that serves, and the one in its place, each at a random moment."""
        dice = random.Random(seed)
        for _ in range(2):
            time.sleep(dice.random() * within_s)
            old = self.family().get("server", 0)
            if old:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(old, signal.SIGKILL)
            # It may have been done just then; else another one is there soon.
            wait_until(lambda old=old: self.poll() is not None or self.family().get("server", old) != old, "another")

    def close(self) -> None:
        """End it and the processes it has made, whatever they are doing."""
        if self.poll() is None:
            family = [self.pid, *descendants(self.pid)]
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.wait()


class Skeleton:
    """A running skeleton; its forks are in its process group."""

    def __init__(self, command: Sequence[str], work: Path) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=work,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            bufsize=0,  # a line that is heard must not take the next along, which wait() returns
        )

    @property
    def pid(self) -> int:
        """Its pid."""
        return self._process.pid

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def go_on(self) -> None:
        """Let it past an await."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def heard(self, word: str) -> None:
        """Read one line, which must be this."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        assert line == f"{word}\n", line + self._process.stdout.read().decode()

    def wait(self, seconds: float = TIMEOUT_S) -> tuple[int, str]:
        """Its exit code and what else it has said."""
        output, _ = self._process.communicate(timeout=seconds)
        return self._process.returncode, output.decode()

    def close(self) -> None:
        """Kill it and all that it has forked."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class Stage:
    """One test's folder, with everything that must be ended when it is over."""

    def __init__(self, skeleton: Path, folder: Path) -> None:
        self.skeleton = skeleton
        self.folder = folder
        self.work = folder / "work"
        self.images = folder / "images"
        self.work.mkdir(exist_ok=True)
        self._running = contextlib.ExitStack()

    def close(self) -> None:
        """End what runs."""
        self._running.close()
        kill_processes_in(self.folder)

    def build(self, tasks: dict[int, Sequence[Vma]], *, zombies: Sequence[int] = (), dialect: str = "flags") -> Path:
        """Write the checkpoint of some tasks."""
        made = [self._task(pid, vmas, "dumped", None) for pid, vmas in tasks.items()]
        made = [task._replace(ppid=made[0].pid if number else 0) for number, task in enumerate(made)]
        made += [Task(pid, ppid=made[0].pid, zombie=True) for pid in zombies]
        return build_checkpoint(self.images, made, dialect=dialect)

    def build_remote(self, tasks: dict[int, Sequence[Vma]], make: Make, *, size: int = 24) -> PageSource:
        """Write a checkpoint whose pages, those of the restorer apart, only a source has; start that, too."""
        pages = Pages()
        made = [self._task(pid, vmas, "remote", pages) for pid, vmas in tasks.items()]
        made = [task._replace(ppid=made[0].pid if number else 0) for number, task in enumerate(made)]
        build_checkpoint(self.images, made, dialect="flags" if size == 24 else "flags64")
        source = PageSource(make(pages), self.folder / "source.log")
        self._running.callback(source.close)
        return source

    def _task(self, pid: int, vmas: Sequence[Vma], kind: str, pages: Pages | None) -> Task:
        """A task with its pages: in its images, or, those that are remote, in `pages`."""
        entries = []
        runs = [(run, kind) for vma in vmas for run in vma.dumped]
        runs += [(run, "dumped") for vma in vmas for run in vma.prefilled]
        for run, its in sorted(runs):
            data = pattern(self.skeleton, *run)
            if run.stride == 1:
                entries.append(Entry(run.start, run.pages, its, data=data))
            else:
                for number, page in enumerate(range(0, run.pages, run.stride)):
                    one = data[number * PAGE : (number + 1) * PAGE]
                    entries.append(Entry(run.start + page * PAGE, 1, its, data=one))
        for entry in entries:
            if entry.kind == "remote" and pages is not None and entry.data is not None:
                pages.add(pid, entry.start, entry.data)
        ranges = [{"start": vma.start, "end": vma.start + vma.pages * PAGE} for vma in vmas]
        return Task(pid, entries, vmas=ranges)

    def start_daemon(self, *words: str, listening: bool = True, prepare: Callable[[], object] = lambda: None) -> Daemon:
        """Start `lazyd` as a fork of this process, which is to `prepare` itself, and wait until it listens."""
        reading, writing = os.pipe()
        arguments = ["-D", str(self.images), "-W", str(self.work), "--status-fd", str(writing), *words]
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._be_daemon(arguments, prepare)
        os.close(writing)
        return self._await_daemon(pid, reading, listening=listening)

    def start_command(self, *words: str, listening: bool = True) -> Daemon:
        """Start the `lazyd` that users start and wait until it listens."""
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "lazyd", "lazy-pages", "-D", str(self.images), "-W", str(self.work)]
        with (self.work / "daemon.out").open("wb") as out:
            process = subprocess.Popen(
                [*command, "--status-fd", str(writing), *words], stderr=out, stdout=out, pass_fds=[writing]
            )
        process.returncode = 0  # reaped by Daemon
        os.close(writing)
        return self._await_daemon(process.pid, reading, listening=listening)

    def _be_daemon(self, arguments: list[str], prepare: Callable[[], object]) -> None:
        code = 99
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)  # pytest-timeout's
            out = os.open(self.work / "daemon.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout = os.fdopen(1, "w")
            sys.stderr = os.fdopen(2, "w")
            for number in (signal.SIGINT, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            prepare()
            from lazyd.cli import main  # noqa: PLC0415  imported already; named here for the fork's sake

            code = main(arguments)
            sys.stderr.flush()
        finally:
            os._exit(code)

    def _await_daemon(self, pid: int, reading: int, *, listening: bool) -> Daemon:
        daemon = Daemon(pid, self.work)
        self._running.callback(daemon.close)
        with open(reading, "rb", buffering=0) as pipe:
            status = pipe.read(1)
        assert (status == b"\0") is listening, daemon.output
        return daemon

    def start_skeleton(self, *steps: str) -> Skeleton:
        """Start a skeleton in the work directory."""
        skeleton = Skeleton([str(self.skeleton), *steps], self.work)
        self._running.callback(skeleton.close)
        return skeleton

    def restore(
        self,
        vmas: Sequence[Vma],
        steps: Sequence[str],
        *words: str,
        before: Sequence[str] = (),
        code: int = 0,
        make: Make | None = None,
        size: int = 24,
    ) -> Daemon:
        """Serve one task that does `before`, is restored, and does `steps`; hold both to their exit codes.

        make: its pages come from a source that answers like this.
        """
        if make is None:
            self.build({PID: vmas})
        else:
            words = (*self.build_remote({PID: vmas}, make, size=size).words, *words)
        daemon = self.start_daemon(*words)
        skeleton = self.start_skeleton(*hand_over(vmas, PID), *before, "finish", "hangup", *steps)
        try:
            result = skeleton.wait()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the skeleton hangs; the daemon said:\n{daemon.output}") from None
        assert result == (0, "ok\n"), f"{result}\n{daemon.output}"
        skeleton.close()
        assert daemon.wait() == code, daemon.output
        return daemon

    def statistics(self) -> dict:
        """What --stats wrote."""
        return json.loads((self.folder / "stats.json").read_text())


@functools.lru_cache(maxsize=16)
def pattern(skeleton: Path, start: int, pages: int, stride: int) -> bytes:
    """The bytes of image pages."""
    command = [str(skeleton), "pattern", str(start), str(pages), str(stride)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def memory(vmas: Sequence[Vma]) -> list[str]:
    """The steps that map what a checkpoint holds."""
    steps: list[str] = []
    for vma in vmas:
        steps += ["vma", hex(vma.start), str(vma.pages)]
        for run in vma.dumped:
            steps += ["dumped", hex(run.start), str(run.pages), str(run.stride)]
        for run in vma.prefilled:
            steps += ["prefill", hex(run.start), str(run.pages)]
    return steps


def hand_over(vmas: Sequence[Vma], pid: int) -> list[str]:
    """The steps of a restorer up to "finish"."""
    return [*memory(vmas), "open", "connect", "announce", str(pid)]
