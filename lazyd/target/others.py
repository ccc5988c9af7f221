# SPDX-License-Identifier: MIT
"""What the tasks of a dump have to do with all other processes: whom they trace, and who shares something with them.

Facts: clone(2) lets any two processes share their memory, descriptors, directories or handlers of signals, whoever is
the parent of whom by now; kcmp(2) tells, thread by thread. Only clone makes new sharers, and it numbers them upwards:
a process that was there when nothing was shared shares nothing later. Of two that have no memory at all, one that ends
and one of the kernel's, say, kcmp tells that it is the same.

What follows: a sharer that runs while the task is stopped goes on to write to its memory, or to move its files. So all
threads of the machine are asked before anything is stopped. Once the tasks are stopped, those that are new are asked
the same, and all others only for the memory, in case a number was dealt out again. Who is in a pid namespace above
lazyd's cannot be seen, nor who hides from it in /proc (hidepid).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lazyd.target.descriptors import KCMP_FILES, KCMP_FS, KCMP_SIGHAND, KCMP_VM, shares_with_any
from lazyd.target.process import stat_fields
from lazyd.target.survey import Problem
from lazyd.target.tracing import status_fields, thread_ids

_SHARED = {
    KCMP_VM: "memory",
    KCMP_FILES: "descriptors",
    KCMP_FS: "directories",
    KCMP_SIGHAND: "handlers of signals",
}


class Others:
    """All processes but the tasks of a dump, as far as these are concerned."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._threads: dict[int, list[int]] = {}
        """Of each process, the threads that were asked; of one that has ended but for some threads, those."""
        self._programs = {pid: _program(pid) for pid in pids}

    def find(self) -> list[Problem]:
        """Say, while the tasks run, whom they trace and who shares what with them."""
        tracers = {tid for pid in self._pids for tid in thread_ids(pid)}
        problems: list[Problem] = []
        for pid in _processes():
            with suppress(OSError, KeyError, ValueError):
                fields = status_fields(pid)
                if int(fields["TracerPid"]) in tracers:
                    problems.append(Problem("ptrace", f"it traces process {pid} ({fields['Name']})"))
                is_alone = int(fields.get("Threads", "1")) == 1
                threads = [pid] if is_alone else thread_ids(pid)
                problems += self._find_shared(pid, threads, tuple(_SHARED))
                # A leader that has ended has no memory to compare, though its threads do.
                self._threads[pid] = threads[1:] if fields["State"][0] == "Z" and not is_alone else [pid]
        return problems

    def find_again(self) -> list[Problem]:
        """Say who shares anything with the tasks now; they are stopped, and find() has found nothing."""
        problems: list[Problem] = []
        # A leading thread that another one's exec has replaced had nothing any more to be compared.
        are_same = all(_program(pid) == program for pid, program in self._programs.items())
        for pid in _processes():
            if (threads := self._threads.get(pid)) and are_same:
                problems += self._find_shared(pid, threads, (KCMP_VM,))
            else:
                problems += self._find_shared(pid, thread_ids(pid), tuple(_SHARED))
        return problems

    def _find_shared(self, other: int, threads: Sequence[int], kinds: Sequence[int]) -> Iterator[Problem]:
        for pid in self._pids:
            if pid == other or (other in self._pids and other < pid):
                continue  # two of the tasks are compared once
            for kind in kinds:
                # Two that end have nothing, which is the same. So once more, when both are seen to have memory.
                if (
                    shares_with_any(pid, threads, kind)
                    and _has_memory(pid)
                    and any(map(_has_memory, threads))
                    and shares_with_any(pid, threads, kind)
                ):
                    yield Problem(_SHARED[kind], f"shared with process {other} ({_name(other)}) (vfork or clone)")


def _has_memory(tid: int) -> bool:
    """Say whether a thread has memory of a user's: what ends, or is the kernel's own, has no memory in common."""
    with suppress(OSError):
        return "VmSize" in status_fields(tid)
    return False


def _program(pid: int) -> list[str]:
    """Return what exec makes anew, at random places: where code, stack and heap start (proc(5), stat)."""
    with suppress(OSError):
        fields = stat_fields(pid)
        return [fields[number - 3] for number in (26, 28, 47)]
    return []


def _processes() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())  # noqa: PTH208  names are wanted


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return "?"
