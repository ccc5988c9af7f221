# SPDX-License-Identifier: MIT
"""Checkpoint a program with a real CRIU, restore it lazily, and clean up whatever happens.

Facts this rests on: a restored task gets its old pid, so the old one must be gone and reaped, and orphans
of `criu restore -d` must become ours to reap: the harness is a child subreaper. Victims are session
leaders with stdio on /dev/null, so that they can be dumped, and their process group names all that they
fork, so that it can be killed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SUITES = ("trixie", "sid")
PR_SET_CHILD_SUBREAPER = 36
TIMEOUT_S = float(os.environ.get("LAZYD_TEST_TIMEOUT", "60"))


def become_subreaper() -> None:
    """Make orphaned descendants our children, so that their pids can be reaped and used again."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def criu_command(suite: str) -> str:
    """Return the path of a suite's criu; it need not exist."""
    return str(ROOT / ".criu" / suite / "criu")


_CRIT_LOOP = """
import json, sys
import pycriu
for line in sys.stdin:
    how, path = line.rstrip("\\n").split(" ", 1)
    try:
        with open(path, "rb") as image:
            answer = {"entries": pycriu.images.load(image, how == "show", False)["entries"]}
    except Exception as error:
        answer = {"error": repr(error)}
    print(json.dumps(answer), flush=True)
"""


@functools.cache
def _crit_process(suite: str) -> subprocess.Popen[str]:
    """Start a suite's crit once for all images: it takes most of a second to start. The code is that of the command."""
    root = ROOT / ".criu" / suite / "root" / "usr"
    libraries = root / "lib" / "x86_64-linux-gnu"
    (python,) = (root / "bin").glob("python3.[0-9]*")
    process = subprocess.Popen(
        [libraries / "ld-linux-x86-64.so.2", "--library-path", libraries, python, "-c", _CRIT_LOOP],
        env={
            "PYTHONHOME": str(root),
            "PYTHONPATH": str(root / "lib/python3/dist-packages"),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)
    return process


def crit(suite: str, image: Path, how: str = "decode") -> list[dict]:
    """Return the entries of an image, as the real crit decodes ("decode") or shows ("show") them."""
    process = _crit_process(suite)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{how} {image}\n")
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    assert "entries" in answer, f"crit cannot decode {image}: {answer}"
    return answer["entries"]


def uses_stock() -> bool:
    """Tell whether LAZYD_TEST_DAEMON=stock puts criu lazy-pages in lazyd's place."""
    return os.environ.get("LAZYD_TEST_DAEMON") == "stock"


def lazyd_command() -> list[str]:
    """Return the words before lazyd's arguments."""
    return [os.environ.get("LAZYD_COMMAND") or str(Path(sys.executable).parent / "lazyd")]


def daemon_command(suite: str) -> list[str]:
    """Return the words before `lazy-pages`."""
    return [criu_command(suite)] if uses_stock() else lazyd_command()


def compile_c(source: Path, target: Path) -> Path:
    """Compile one C program with gcc."""
    words = ["gcc", "-std=gnu11", "-O2", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-pthread", "-o"]
    subprocess.run([*words, str(target), str(source)], check=True)
    return target


def wait_until(condition, what: str, seconds: float = TIMEOUT_S, pause: float = 0.002):
    """Return the condition's first true value; raise AssertionError that says what was waited for."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds:g} s for {what}")
        time.sleep(pause)


def tail(path: Path, lines: int = 25) -> str:
    """Return the end of a log, or that there is none."""
    if not path.exists():
        return f"({path.name}: none)"
    text = path.read_text(errors="replace").splitlines()
    return f"--- {path.name}\n" + "\n".join(text[-lines:])


def reap_group(group: int, seconds: float = 10) -> None:
    """Kill a process group that we started and reap what of it is, or becomes, our child."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            # Reaps one child of the group; a member whose own parent still lives becomes ours when that dies.
            if os.waitid(os.P_PGID, group, os.WEXITED | os.WNOHANG) is not None:
                continue
        except ChildProcessError:
            pass
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.002)
    raise AssertionError(f"process group {group} does not go away")


@dataclass
class Checkpoint:
    """Images of a program that a real CRIU dumped, with the folder that the program talks through."""

    suite: str
    pid: int
    images: Path
    state: Path

    @property
    def result(self) -> str:
        """Return what the program has said so far."""
        with contextlib.suppress(FileNotFoundError):
            return (self.state / "result").read_text()
        return ""

    def forget(self) -> None:
        """Remove the images and the state."""
        reap_group(self.pid)
        shutil.rmtree(self.images, ignore_errors=True)
        shutil.rmtree(self.state, ignore_errors=True)


def start_program(command: list[str], state: Path) -> int:
    """Start a program in its own session and wait until it has created STATE/ready; return its pid."""
    state.mkdir(parents=True, exist_ok=True)
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/")
    try:
        wait_until((state / "ready").exists, f"{command[0]} to be ready")
        (state / "ready").unlink()
    except BaseException:
        reap_group(process.pid)
        raise
    finally:
        process.returncode = 0  # its reaping is ours: the same pid comes back as another process
    return process.pid


def checkpoint(suite: str, command: list[str], folder: Path, extra: tuple[str, ...] = ()) -> Checkpoint:
    """Start a program, dump it once it is ready, and see it gone."""
    images, state = folder / "images", folder / "state"
    images.mkdir(parents=True)
    pid = start_program(command, state)
    try:
        log = images / "dump.log"
        words = [
            criu_command(suite),
            "dump",
            "-t",
            str(pid),
            "-D",
            str(images),
            "--shell-job",
            "-o",
            "dump.log",
        ]
        run = subprocess.run([*words, "-v1", *extra], capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        if run.returncode:
            raise AssertionError(f"criu dump failed ({run.returncode}): {run.stderr}\n{tail(log)}")
    finally:
        reap_group(pid)
    return Checkpoint(suite, pid, images, state)


@dataclass
class Daemon:
    """A running lazy-pages daemon, lazyd or stock."""

    process: subprocess.Popen
    work: Path
    output: Path

    @property
    def socket(self) -> Path:
        """Return where the restorer finds it."""
        return self.work / "lazy-pages.socket"

    def wait_listening(self) -> None:
        """Wait for the socket; raise with its output if the daemon ends before."""

        def state() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the daemon ended with {self.process.returncode}:\n{self.report()}")
            return self.socket.exists()

        wait_until(state, "the daemon's socket")

    def wait(self, seconds: float = TIMEOUT_S) -> int:
        """Return the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the daemon does not end:\n{self.report()}") from None

    def report(self) -> str:
        """Return the end of what it said."""
        return tail(self.output) + "\n" + tail(self.work / "lazy-pages.log")

    def stop(self) -> None:
        """End it, whatever it does, with every process of its own: one may outlive another on purpose."""
        family = descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
        family += [pid for pid in descendants(self.process.pid) if pid not in family]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in family:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def descendants(pid: int) -> list[int]:
    """Return the pids of a process's children and theirs."""
    found, at = [pid], 0
    while at < len(found):
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{found[at]}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        at += 1
    return found[1:]


def start_daemon(suite: str, images: Path, work: Path, extra: tuple[str, ...] = ()) -> Daemon:
    """Start the daemon on a directory and wait until it listens."""
    work.mkdir(parents=True, exist_ok=True)
    output = work / "daemon.out"
    words = [*daemon_command(suite), "lazy-pages", "-D", str(images), "-W", str(work), *extra]
    if uses_stock():
        words += ["-o", "lazy-pages.log", "-v2"]
    with output.open("wb") as out:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    daemon = Daemon(process, work, output)
    try:
        daemon.wait_listening()
    except BaseException:
        daemon.stop()
        raise
    return daemon


def criu_restore(
    suite: str, images: Path, work: Path, extra: tuple[str, ...] = ("--lazy-pages",), enter: Callable | None = None
) -> None:
    """Run criu restore, detached; raise with its log if it fails. `enter` puts it into a test host."""
    words = [criu_command(suite), "restore", "-D", str(images), "-W", str(work), "--shell-job", "-d"]
    words += ["-o", "restore.log", "-v1", *extra]
    # Output goes to a file: the restored tasks may hold a pipe open for ever.
    with (work / "restore.out").open("wb") as out:
        null = subprocess.DEVNULL
        run = subprocess.run(
            words, stdin=null, stdout=out, stderr=out, check=False, timeout=TIMEOUT_S, preexec_fn=enter
        )
    if run.returncode:
        texts = tail(work / "restore.out"), tail(work / "restore.log")
        raise AssertionError(f"criu restore failed ({run.returncode}):\n" + "\n".join(texts))


@dataclass
class Outcome:
    """What one lazy restore ended with."""

    verdict: str
    daemon_exit: int
    daemon_output: str
    work: Path
    details: str = field(repr=False, default="")


def lazy_restore(
    saved: Checkpoint,
    work: Path,
    extra: tuple[str, ...] = (),
    restorer_images: Path | None = None,
    daemon_images: Path | None = None,
) -> Outcome:
    """Restore a checkpoint through the daemon; wait for the program's verdict and the daemon's exit."""
    (saved.state / "result").unlink(missing_ok=True)
    (saved.state / "go").touch()
    daemon = start_daemon(saved.suite, daemon_images or saved.images, work, extra)
    try:
        criu_restore(saved.suite, restorer_images or saved.images, work)
        try:
            wait_until(lambda: saved.result.endswith("\n"), "the program's verdict")
            daemon_exit = daemon.wait()
        except AssertionError as error:
            texts = daemon.report(), tail(work / "restore.log"), task_states(saved.pid)
            raise AssertionError(f"{error}; so far it said {saved.result!r}\n" + "\n".join(texts)) from None
    finally:
        daemon.stop()
        reap_group(saved.pid)
    return Outcome(saved.result, daemon_exit, daemon.output.read_text(errors="replace"), work, daemon.report())


def eager_restore(saved: Checkpoint, work: Path, images: Path | None = None) -> str:
    """Restore with no daemon, as a check of images that were rewritten; return the program's verdict."""
    work.mkdir(parents=True, exist_ok=True)
    (saved.state / "result").unlink(missing_ok=True)
    (saved.state / "go").touch()
    try:
        criu_restore(saved.suite, images or saved.images, work, ())
        wait_until(lambda: saved.result.endswith("\n"), "the program's verdict")
    finally:
        reap_group(saved.pid)
    return saved.result


def task_states(pid: int) -> str:
    """Say what a task's threads are doing, for a report of a hang."""
    lines = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            state = next(line for line in (task / "status").read_text().splitlines() if line.startswith("State"))
            lines.append(f"thread {task.name}: {state} {(task / 'wchan').read_text()}")
    return "\n".join(lines) or f"task {pid} is gone"


def assert_good(outcome: Outcome) -> None:
    """Hold a restore to what every restore must reach."""
    assert outcome.verdict == "ok\n", f"{outcome.verdict}\n{outcome.details}"
    assert outcome.daemon_exit == 0, f"the daemon ended with {outcome.daemon_exit}\n{outcome.details}"
