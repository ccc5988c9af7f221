# SPDX-License-Identifier: MIT
"""The processes of a daemon: who holds which office, and how to end all that a test has started.

A keeper that dies leaves processes that are nobody's children, so they are found by the folder they live in.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
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
