# SPDX-License-Identifier: MIT
"""Look at a task without touching it, and say all that keeps it from being a plain one.

A plain task is one that its images can bring back without help: threads, private and shared memory, mapped files,
open regular files and directories, memory devices such as /dev/null, the terminal it was started from. What it has
beyond that is listed whole, before anything is stopped: a dump that would lose something is not made.

What is true here may be false a moment later, while the task runs. So the same is done again once it is stopped, and
then it is quick: `Survey` keeps what does not change.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from lazyd.errors import DumpError
from lazyd.target.descriptors import (
    KCMP_FILES,
    KCMP_FS,
    Descriptor,
    DescriptorKind,
    find_pipe_problems,
    kcmp,
    read_descriptors,
)
from lazyd.target.mappings import DELETED, Known, Mapping, path_problem, read_mappings
from lazyd.target.process import children, read_small, stat_fields
from lazyd.target.tracing import changes_too_fast, has_ended, status_fields, thread_ids
from lazyd.tuples import NamedTuple

_PF_KTHREAD, _PF_IO_WORKER, _PF_EXITING = 0x00200000, 0x00000010, 0x00000004  # include/linux/sched.h; field 9 of stat
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
_NAMESPACES_OF_THREADS = ("cgroup", "ipc", "mnt", "net", "uts")  # the others are a process's
_OF_CHILDREN = ("pid_for_children", "time_for_children")
_NAMESPACE_LOOKS = 4
_LOOKS = 50  # at a task that changes all the time, before it is given up
_DENIALS = 5  # before they are believed
_ZOMBIE_LOOKS, _ZOMBIE_PAUSE_S = 5, 0.002


class Problem(NamedTuple):
    """One thing that a task has and images of a plain task cannot hold."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Look(NamedTuple):
    """What a task consists of, at one moment."""

    mappings: list[Mapping]
    descriptors: list[Descriptor]
    problems: list[Problem]


def check_is_process(pid: int) -> None:
    """Raise DumpError, in one line, if there is nothing behind a pid that could be dumped at all."""
    try:
        fields = status_fields(pid)
        for _ in range(_ZOMBIE_LOOKS):
            # The leading thread is one for a moment, too, when another one executes a program and takes its place.
            if fields["State"][0] in "ZX":
                time.sleep(_ZOMBIE_PAUSE_S)
                fields = status_fields(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise DumpError(f"there is no process {pid}") from None
    except PermissionError:
        raise DumpError(f"process {pid}: no permission to look at it; run as root") from None
    name = fields.get("Name", "")
    if int(fields["Tgid"]) != pid:
        raise DumpError(f"{pid} is a thread of process {fields['Tgid']}; name the process")
    if _task_flags(pid) & _PF_KTHREAD:
        raise DumpError(f"process {pid} ({name}) is a kernel thread: there is nothing to dump")
    if fields["State"][0] == "Z" and int(fields.get("Threads", "1")) > 1:
        raise DumpError(
            f"the main thread of process {pid} ({name}) has ended, its other threads run on: that cannot be dumped"
        )
    if fields["State"][0] in "ZX":
        raise DumpError(f"process {pid} ({name}) is a zombie: it has ended, and its parent has not waited for it")
    if pid == os.getpid():
        raise DumpError(f"process {pid} is lazyd itself; name another")
    if int(fields["TracerPid"]):
        raise DumpError(f"process {pid} ({name}) is traced by process {fields['TracerPid']}; end that first")


def _task_flags(tid: int) -> int:
    with suppress(OSError):
        return int(stat_fields(tid)[9 - 3])
    return 0


def _is_ending(tid: int) -> bool:
    try:
        return bool(int(stat_fields(tid)[9 - 3]) & _PF_EXITING)
    except OSError:
        return True


def started_at(pid: int) -> int:
    """Return when a process was started, in microseconds since the machine was; DumpError if it has ended.

    proc(5), stat: field 22, in clock ticks.
    """
    try:
        fields = stat_fields(pid)
    except OSError:
        raise DumpError(f"process {pid} has ended") from None
    return int(fields[22 - 3]) * 1_000_000 // os.sysconf("SC_CLK_TCK")


def _namespaces(whose: int | str, names: Sequence[str]) -> dict[str, tuple[int, int] | None]:
    """Return what tells a task's namespaces, and those of its children to be, from others. OSError if it ends."""
    for _ in range(_NAMESPACE_LOOKS):
        found = {name: _namespace(whose, name) for name in (*_OF_CHILDREN, *names)}
        # Those of children there are none of as long as nobody is in one; all others are lost by what ends only.
        if any(found[name] is None and os.path.exists(f"/proc/self/ns/{name}") for name in names):  # noqa: PTH110
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), f"/proc/{whose}")
        if None not in found.values():
            break
        # What had just ended may have become another, by an exec, before the rest was looked at.
    return found


def _namespace(whose: int | str, name: str) -> tuple[int, int] | None:
    try:
        status = os.stat(f"/proc/{whose}/ns/{name}")  # noqa: PTH116  quick
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


class Survey:
    """Look at one task, as often as wanted."""

    def __init__(self, pid: int, *, tasks: Iterable[int] = (), has_tracker: bool = False) -> None:
        """`tasks`: all that are dumped together. has_tracker: a tracker of ours has write-protected its memory."""
        self.pid = pid
        self._tasks = frozenset(tasks) | {pid}
        self.has_tracker = has_tracker
        self._mappings: Known = {}
        self._denials = 0
        self._threads: set[int] = set()
        """Those that are no workers of an io_uring, which threads are from the first or never."""

    def look(self) -> Look:
        """Return what the task consists of; DumpError if it is gone or may not be looked at."""
        for _ in range(_LOOKS):
            if (look := self._look()) is not None:
                return look
            if has_ended(self.pid):
                raise DumpError(f"process {self.pid} has ended")
        raise changes_too_fast(self.pid)

    def _look(self) -> Look | None:
        """Return the same, or None if something was gone before it could be looked at: the task runs."""
        try:
            mappings = read_mappings(self.pid, self._mappings)
            descriptors = read_descriptors(self.pid)
            problems = [*self._of_task(), *self._of_mappings(mappings), *self._of_descriptors(descriptors)]
            problems += self._of_names(mappings, descriptors)
        except (FileNotFoundError, ProcessLookupError):
            return None
        except PermissionError as error:
            # What ends, because another thread of its task executes a program, may not be looked at either.
            self._denials += 1
            if not _has_memory(self.pid) or self._denials < _DENIALS:
                return None
            what = f": {error.filename}" if error.filename else ""
            raise DumpError(f"process {self.pid}: no permission to look at it{what}; run as root") from None
        except OSError as error:
            if error.errno != errno.EBADF:  # its descriptors are gone already
                raise
            return None
        return Look(mappings, descriptors, problems)

    def _of_task(self) -> list[Problem]:
        problems: list[Problem] = []
        fields = status_fields(self.pid)
        if len(fields.get("NSpid", "").split()) > 1:
            problems.append(Problem("namespaces", "it is in another pid namespace"))
        problems += self._of_namespaces()
        problems += self._of_root()
        for name, where in (("cwd", "working directory"), ("exe", "program")):
            link = f"/proc/{self.pid}/{name}"
            path = os.readlink(link)  # noqa: PTH115  the text as it is
            if path.endswith(DELETED):
                problems.append(Problem(f"{where} {path.removesuffix(DELETED)}", "it is deleted"))
            elif what := path_problem(path, os.stat(link)):  # noqa: PTH116  text as it is
                problems.append(Problem(f"{where} {path}", what))
        if (confined := _confinement(self.pid)) and confined != _confinement(os.getpid()):
            problems.append(Problem("security module", f"confined as {confined}"))
        problems += self._of_threads()
        strangers = [child for child in children(self.pid) if child not in self._tasks]
        if strangers:
            named = ", ".join(f"{child} ({_name(child)})" for child in strangers)
            problems.append(Problem("children", f"{named}; --tree dumps them too"))
        return problems

    def lasting(self) -> list[Problem]:
        """Return what a task has done to itself and nobody can take back. OSError if it is gone.

        Not its time namespace: criu restore puts everything into one of its own.
        """
        own = [problem for tid in thread_ids(self.pid) if tid != self.pid for problem in self._own(tid)]
        return [*self._of_namespaces(apart_from=("time", "time_for_children")), *self._of_root(), *own]

    def _of_root(self) -> list[Problem]:
        root = os.readlink(f"/proc/{self.pid}/root")  # noqa: PTH115  the text as it is
        return [Problem("root directory", f"{root}, by chroot")] if root != "/" else []

    def _of_namespaces(self, apart_from: Sequence[str] = ()) -> list[Problem]:
        ours, theirs = _namespaces("self", _NAMESPACES), _namespaces(self.pid, _NAMESPACES)
        other = [name for name in theirs if theirs[name] != ours[name] and name not in apart_from]
        return [Problem("namespaces", f"it has others than lazyd: {', '.join(other)}")] if other else []

    def _of_threads(self) -> list[Problem]:
        problems: list[Problem] = []
        for tid in thread_ids(self.pid):
            if tid not in self._threads and _task_flags(tid) & _PF_IO_WORKER:
                problems.append(Problem(f"thread {tid}", "a worker of an io_uring"))
                continue
            self._threads.add(tid)
            with suppress(FileNotFoundError, ProcessLookupError):
                fields = status_fields(tid)
                if fields.get("Seccomp", "0") != "0":  # each thread has its own filters
                    where = "seccomp" if tid == self.pid else f"thread {tid}"
                    problems.append(Problem(where, "has given up system calls (seccomp)"))
                comm = f"/proc/{self.pid}/task/{tid}/comm"
                if "\ufffd" in fields.get("Name", "") and not _is_text(read_small(comm)):
                    problems.append(Problem(f"thread {tid}", "its name is not UTF-8"))
            if tid != self.pid:
                problems += self._of_thread_alone(tid)
        return problems

    def _of_thread_alone(self, tid: int) -> list[Problem]:
        if not self._own(tid) or _is_ending(tid):
            return []
        if _is_ending(self.pid):  # and has nothing any more
            raise ProcessLookupError
        # Once more: the leading thread may just have been another one, which an exec has ended.
        return self._own(tid)

    def _own(self, tid: int) -> list[Problem]:
        """Return what a thread does not share with the leading one."""
        own = []
        with suppress(ProcessLookupError):
            if kcmp(self.pid, tid, KCMP_FILES):
                own.append("descriptors")
            if kcmp(self.pid, tid, KCMP_FS):
                own.append("a working directory")
        with suppress(FileNotFoundError, ProcessLookupError):  # it ends
            ours = _namespaces(self.pid, _NAMESPACES_OF_THREADS)
            theirs = _namespaces(f"{self.pid}/task/{tid}", _NAMESPACES_OF_THREADS)
            own += [f"a namespace ({name})" for name in theirs if theirs[name] != ours[name]]
        return [Problem(f"thread {tid}", f"has {what} of its own (unshare)") for what in own]

    def _of_mappings(self, mappings: list[Mapping]) -> list[Problem]:
        problems = [Problem(f"mapping {mapping}", mapping.problem) for mapping in mappings if mapping.problem]
        if not self.has_tracker and any(mapping.is_write_protected for mapping in mappings):
            problems.append(Problem("memory", "write-protected by somebody's userfaultfd"))
        return problems

    def _of_names(self, mappings: list[Mapping], descriptors: list[Descriptor]) -> list[Problem]:
        """Images hold names as text (protobuf's string), which is UTF-8."""
        links = [os.fsencode(os.readlink(f"/proc/{self.pid}/{name}")) for name in ("exe", "cwd")]  # noqa: PTH115  bytes
        mapped = {mapping.file.path for mapping in mappings if mapping.file is not None}
        opened = {one.path for one in descriptors}
        names = [*links, *map(os.fsencode, sorted(mapped | opened))]
        return [Problem(f"file {name!r}", "its name is not UTF-8") for name in names if not _is_text(name)]

    @staticmethod
    def _of_descriptors(descriptors: list[Descriptor]) -> list[Problem]:
        return [Problem(str(one), one.problem) for one in descriptors if one.problem]


def look_at_all(surveys: Sequence[Survey]) -> tuple[list[Look], list[Problem]]:
    """Look at tasks that are dumped together: what each is, and all that is beyond plain tasks."""
    looks = [survey.look() for survey in surveys]
    problems = [problem for look in looks for problem in look.problems]
    tables = {survey.pid: look.descriptors for survey, look in zip(surveys, looks, strict=True)}
    for (pid, fd), what in find_pipe_problems(tables).items():
        path = next(one.path for one in tables[pid] if one.fd == fd)
        problems.append(Problem(f"descriptor {fd} ({path})", what))
    return looks, problems


def refuse(pid: int, problems: list[Problem]) -> None:
    """Raise one DumpError that names all problems, if there are any."""
    if not problems:
        return
    unique = list(dict.fromkeys(map(str, problems)))
    listed = "".join(f"\n  {text}" for text in unique)
    raise DumpError(
        f"process {pid} ({_name(pid)}) has what `lazyd dump` cannot keep; `criu dump` may:{listed}\nit goes on unharmed"
    )


def _has_memory(pid: int) -> bool:
    """Say whether the leading thread of a process still has the memory that it shares with the others."""
    with suppress(OSError):
        return "VmSize" in status_fields(pid)
    return False


def has_terminal(descriptors: list[Descriptor]) -> bool:
    """Say whether any descriptor is a terminal."""
    return any(one.kind is DescriptorKind.TERMINAL for one in descriptors)


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return "?"


def _is_text(name: bytes) -> bool:
    with suppress(UnicodeDecodeError):
        name.decode()
        return True
    return False


def _confinement(pid: int) -> str:
    """Return the label of a security module, as SELinux and AppArmor give it; empty without one."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/attr/current").read_text(errors="replace").strip("\0\n ")
    return ""
