# SPDX-License-Identifier: MIT
"""Rewind a task that changes its memory, mappings, threads and all else in between; it checks itself each time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_harness import STRESS, wait_until

from lazyd.target.tracing import status_fields, thread_ids

SOURCE = Path(__file__).parent.parent / "victims/rewound.c"
LAZYD = [sys.executable, "-m", "lazyd"]


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The compiled victim."""
    target = tmp_path_factory.mktemp("rewound") / "rewound"
    words = ["gcc", "-std=gnu11", "-O2", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([*words, "-o", str(target), str(SOURCE)], check=True)
    return target


class Victim:
    """A running rewound, with its checkpoint."""

    def __init__(self, program, folder, mib):
        self.state, self.images = folder / "state", folder / "images"
        self.state.mkdir()
        null = subprocess.DEVNULL
        command = [str(program), str(self.state), str(mib)]
        self.process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
        self.pid = self.process.pid
        try:
            wait_until((self.state / "ready").exists, "the victim")
            self.dump()
        except BaseException:
            self.close()
            raise

    def dump(self):
        """Write its checkpoint; it goes on."""
        words = ["dump", "--pid", str(self.pid), "-D", str(self.images), "-R"]
        run = subprocess.run([*LAZYD, *words], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr

    def rewind(self, *words):
        """Run lazyd rewind as a fork of this process; (exit code, what it said)."""
        output = self.images.parent / "rewind.out"
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._be_lazyd(output, ["rewind", "-D", str(self.images), "--pid", str(self.pid), "--no-progress", *words])
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status), output.read_text()

    @staticmethod
    def _be_lazyd(output, arguments):
        code = 99
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)  # pytest-timeout's
            out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout = os.fdopen(1, "w")
            sys.stderr = os.fdopen(2, "w")
            for number in (signal.SIGINT, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            from lazyd.cli import main  # noqa: PLC0415  imported already; named here for the fork's sake

            code = main(arguments)
            sys.stderr.flush()
        finally:
            os._exit(code)

    def check(self):
        """Let it check itself, and then change everything."""
        (self.state / "go").touch()
        wait_until(lambda: (self.state / "result").exists() or self.process.poll() is not None, "its verdict")
        assert (self.state / "result").read_text() == "ok\n"
        wait_until(lambda: (self.state / "changed").exists() or self.process.poll() is not None, "its changes")
        assert self.process.poll() is None

    def forget(self):
        """Remove what it has written."""
        for name in ("go", "result", "changed", "late"):
            (self.state / name).unlink(missing_ok=True)

    def close(self):
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(program, tmp_path):
    """Start a victim that is gone when the test is over."""
    victims = []

    def start(mib=4):
        victims.append(Victim(program, tmp_path, mib))
        return victims[-1]

    yield start
    for victim in victims:
        victim.close()


def test_again_and_again(start):
    """30 times in a row; LAZYD_STRESS=33 makes it a thousand."""
    victim = start()
    victim.check()
    tids = None
    for _ in range(30 * STRESS):
        victim.forget()
        code, said = victim.rewind()
        assert code == 0, said
        assert tids in (None, thread_ids(victim.pid))
        tids = thread_ids(victim.pid)
        victim.check()


def test_while_its_old_memory_is_freed(start):
    """It goes on at once, and its memory is whole while lazyd fills and frees."""
    victim = start(64)
    victim.check()
    for _ in range(4 * STRESS):
        victim.forget()
        (victim.state / "late").touch()
        (victim.state / "go").touch()
        code, said = victim.rewind()
        assert code == 0, said
        victim.check()
    victim.forget()
    assert victim.rewind()[0] == 0
    victim.check()  # nothing of what was moved aside is left
    assert int(status_fields(victim.pid)["VmSize"].split()[0]) < 64 * 1024 * 3
