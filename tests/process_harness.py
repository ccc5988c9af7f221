# SPDX-License-Identifier: MIT
"""The processes of a daemon: who holds which office, how they die, and how to end all that a test has started.

A keeper that dies leaves processes that are nobody's children, so they are found by the folder they live in.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

OFFICES = ("server", "keeper", "standby")
KILLED = [*itertools.combinations(OFFICES, 1), *itertools.combinations(OFFICES, 2)]
"""Who is killed at once: each alone, and every pair."""


def command_name(pid: int) -> str:
    """The name that ps shows; "" if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def processes_in(folder: Path) -> list[int]:
    """All processes that live in a folder, by their current directory or an open file; zombies have neither."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        links = [entry / "cwd"]
        with contextlib.suppress(OSError):
            links += (entry / "fd").iterdir()
        for link in links:
            with contextlib.suppress(OSError):
                if link.readlink().is_relative_to(folder):
                    found.append(int(entry.name))
                    break
    return found


def kill_processes_in(folder: Path) -> None:
    """End what a test has left: processes that were made in its folder, whoever their parent is now."""
    while left := processes_in(folder):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def family_in(work: Path, keeper: int) -> dict[str, int]:
    """The processes that keep and serve, by office; those that are there at the moment.

    `keeper` is the one that was started, while it lives: its name is the command's.
    """
    names = {pid: command_name(pid) for pid in processes_in(work)}
    found = {name.removeprefix("lazyd-"): pid for pid, name in names.items() if name.startswith("lazyd-")}
    if keeper:
        found["keeper"] = keeper
    return found


def kill_offices(family: dict[str, int], offices: Sequence[str]) -> None:
    """Kill processes with no time between; what is not there any more is done."""
    for office in offices:
        with contextlib.suppress(ProcessLookupError, KeyError):
            os.kill(family[office], signal.SIGKILL)


def is_whole_again(family: dict[str, int], before: dict[str, int], offices: Sequence[str]) -> bool:
    """Tell whether others hold the offices that were killed, or the work was done just then."""
    if not family:
        return True
    return family.keys() == {*OFFICES} and not any(before.get(office) in family.values() for office in offices)


class Dying:
    """A program that is run again and again and dies at another step each time. It is imported once, and then forked.

    Its `head` is run once, and `body` in each fork: there `limit` is how many calls of what went through `counted` are
    made before it is killed, and `words` are what run() was given.
    """

    _PROGRAM = """
import itertools, json, os, signal, sys
limit, words, numbers = 0, [], itertools.count(1)
def counted(function):
    def counting(*arguments, **named):
        if next(numbers) > limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return counting
{head}
def body():
{body}
for line in iter(sys.stdin.readline, ""):
    limit, words = json.loads(line)
    pid = os.fork()
    if not pid:
        code = 99
        try:
            code = body() or 0
        finally:
            print(next(numbers) - 1, flush=True)
            sys.stderr.flush()
            os._exit(code)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

    def __init__(self, head: str, body: str) -> None:
        indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
        program = self._PROGRAM.replace("{head}", head).replace("{body}", indented)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True)

    def run(self, limit: int, *words: object) -> tuple[int, int]:
        """Run it once; return its exit code (negative: a signal) and how many steps it made, if it lived to tell."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([limit, [str(word) for word in words]]) + "\n")
        self._process.stdin.flush()
        steps = -1
        for line in self._process.stdout:
            if line.startswith("ended"):
                return int(line.split()[1]), steps
            steps = int(line)
        raise AssertionError("the program that dies has ended itself")

    def close(self) -> None:
        """End it, and wait for what it has left."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Dying:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
