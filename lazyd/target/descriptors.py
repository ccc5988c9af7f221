# SPDX-License-Identifier: MIT
"""The open files of a task, as images describe them.

Facts: /proc/PID/fd/N leads to the file itself and /proc/PID/fdinfo/N has its position and flags (proc(5)). Two
descriptors may share one open file, with one position: kcmp(2) tells them apart. What /proc does not say (the owner
that signals go to, the settings of a terminal) is asked of the open file itself, which pidfd_getfd(2) brings here.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from lazyd.enums import Enum
from lazyd.target.mappings import DELETED, path_problem
from lazyd.tuples import NamedTuple

_SYS_KCMP, _SYS_PIDFD_GETFD = 312, 438
KCMP_FILE, KCMP_VM, KCMP_FILES, KCMP_FS, KCMP_SIGHAND = range(5)
_KCMP_SAME, _KCMP_BEFORE = 0, 1
_F_GETSIG, _F_GETOWN_EX = 11, 16
_TIOCGSID = 0x5429  # asm-generic/ioctls.h
_O_PATH = 0o10000000
# linux/Documentation/admin-guide/devices.txt
_MEMORY_DEVICES = {os.makedev(1, minor) for minor in (3, 5, 7, 8, 9)}  # null, zero, full, random, urandom
_TTY_MAJOR_PTS = range(136, 144)
_LAST_STANDARD_STREAM = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = [ctypes.c_long] + [ctypes.c_ulong] * 5


def _system_call(number: int, *arguments: int) -> int:
    result = _libc.syscall(number, *(*arguments, 0, 0, 0, 0, 0)[:5])
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    assert isinstance(result, int)
    return result


def kcmp(one: int, other: int, kind: int, one_fd: int = 0, other_fd: int = 0) -> int:
    """Compare kernel objects of two threads: 0 the same, else an order; OSError."""
    return _system_call(_SYS_KCMP, one, other, kind, one_fd, other_fd)


def shares_with_any(one: int, others: Iterable[int], kind: int) -> bool:
    """Say whether a thread has the same kernel object as any of others, those left out that may not be asked about.

    For what is asked of all threads of a machine while a task is stopped.
    """
    call = _libc.syscall
    return any(not call(_SYS_KCMP, one, other, kind, 0, 0) for other in others)


def take_descriptor(pidfd: int, fd: int) -> int:
    """Return a descriptor of ours for an open file of a task; the caller closes it. OSError."""
    return _system_call(_SYS_PIDFD_GETFD, pidfd, fd)


class DescriptorKind(Enum):
    """What is open."""

    FILE = 1  # a regular file, a directory, or a device that is the same whoever opens it
    TERMINAL = 2
    PIPE = 3  # one end of it, as a standard stream; the other end is somebody else's
    OTHER = 4


class Terminal(NamedTuple):
    """A pseudo terminal's other end is not ours; this is what is needed to open it again. Words of tty_ioctl(4)."""

    number: int
    session: int
    foreground: int
    iflag: int
    oflag: int
    cflag: int
    lflag: int
    line: int
    characters: bytes
    window: tuple[int, int, int, int]  # rows, columns, width, height in pixels


class Descriptor(NamedTuple):
    """One descriptor. `same_as`: the lowest descriptor with the same open file; its own number where it is alone."""

    fd: int
    kind: DescriptorKind
    path: str
    flags: int
    close_on_exec: bool
    position: int
    status: os.stat_result
    same_as: int
    terminal: Terminal | None
    problem: str

    def __str__(self) -> str:
        return f"descriptor {self.fd} ({self.path})"


FILE_LOCK = "a file lock"
SIGNALS_OWNER = "signals about it go to an owner (F_SETOWN)"
Owner = tuple[int, int]
"""A pid and one of its descriptors."""


def read_descriptors(pid: int) -> list[Descriptor]:
    """Return the open files of a task by number; OSError if it is gone or may not be looked at."""
    pidfd = os.pidfd_open(pid)
    try:
        found: list[Descriptor] = []
        groups: dict[tuple[object, ...], list[Owner]] = {}
        for fd in sorted(map(int, os.listdir(f"/proc/{pid}/fd"))):  # noqa: PTH208  names are wanted
            with suppress(FileNotFoundError):  # closed meanwhile, while the task still runs
                one = _read_one(pid, pidfd, fd)
                status = one.status
                alike = groups.setdefault((status.st_dev, status.st_ino, one.flags, one.position), [])
                found.append(one._replace(same_as=_find_or_add(alike, (pid, fd))[1]))
        return found
    finally:
        os.close(pidfd)


def _find_or_add(files: list[Owner], one: Owner) -> Owner:
    """Return whose descriptor of some different open files stands for the same as this one; if none, add it.

    They are in the order that kcmp(2) has for them: some tasks have thousands of descriptors of one file. OSError.
    """
    low, high = 0, len(files)
    while low < high:
        middle = (low + high) // 2
        pid, fd = files[middle]
        order = kcmp(one[0], pid, KCMP_FILE, one[1], fd)
        if order == _KCMP_SAME:
            return files[middle]
        if order == _KCMP_BEFORE:
            high = middle
        else:
            low = middle + 1
    files.insert(low, one)
    return one


def find_pipe_problems(tables: Mapping[int, Sequence[Descriptor]]) -> dict[Owner, str]:
    """Say of which pipes the tasks hold more than an inherited stream: both ends, or bytes nobody has read yet."""
    ends: dict[int, set[int]] = {}
    for descriptors in tables.values():
        for one in descriptors:
            if one.kind is DescriptorKind.PIPE:
                ends.setdefault(one.status.st_ino, set()).add(one.flags & os.O_ACCMODE)
    problems = {}
    for pid, descriptors in tables.items():
        standard = {one.same_as for one in descriptors if one.fd <= _LAST_STANDARD_STREAM}
        for one in descriptors:
            if one.kind is not DescriptorKind.PIPE:
                continue
            if one.same_as not in standard:
                problems[pid, one.fd] = "a pipe"
            elif len(ends[one.status.st_ino]) > 1:
                problems[pid, one.fd] = "a pipe with both ends in what is dumped"
    return problems


def find_owners(tables: Mapping[int, Sequence[Descriptor]]) -> dict[Owner, Owner]:
    """Say of every descriptor of some stopped tasks which one stands for its open file: the first that has it."""
    owners: dict[Owner, Owner] = {}
    groups: dict[tuple[object, ...], list[Owner]] = {}
    for pid, descriptors in tables.items():
        for one in descriptors:
            here = (pid, one.fd)
            if one.same_as != one.fd:
                owners[here] = owners[pid, one.same_as]
                continue
            status = one.status
            alike = groups.setdefault((status.st_dev, status.st_ino, one.flags, one.position), [])
            owners[here] = _find_or_add(alike, here)
    return owners


def _read_one(pid: int, pidfd: int, fd: int) -> Descriptor:
    link = f"/proc/{pid}/fd/{fd}"
    path = os.readlink(link)  # noqa: PTH115  the text as it is
    status = os.stat(link)  # noqa: PTH116  the file itself, whatever its path is now
    info = Path(f"/proc/{pid}/fdinfo/{fd}").read_text(errors="replace").splitlines()
    fields = dict(line.split(":", 1) for line in info if ":" in line)
    raw_flags = int(fields["flags"], 8)
    terminal = None
    kind, problem = _classify(path, status, raw_flags)
    if not problem and "lock" in fields:
        problem = FILE_LOCK
    if not problem:
        try:
            taken = take_descriptor(pidfd, fd)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise FileNotFoundError(errno.ENOENT, "closed meanwhile") from None
            raise
        try:
            problem = _owner_problem(taken)
            if kind is DescriptorKind.TERMINAL:
                terminal = _read_terminal(taken, status)
            elif kind is DescriptorKind.PIPE and raw_flags & os.O_ACCMODE != os.O_WRONLY:
                problem = problem or _unread_problem(taken)
        finally:
            os.close(taken)
    return Descriptor(
        fd=fd,
        kind=kind,
        path=path,
        flags=raw_flags & ~os.O_CLOEXEC,
        close_on_exec=bool(raw_flags & os.O_CLOEXEC),
        position=int(fields["pos"]),
        status=status,
        same_as=fd,
        terminal=terminal,
        problem=problem,
    )


def _classify(path: str, status: os.stat_result, flags: int) -> tuple[DescriptorKind, str]:
    """Say what is open, and why it cannot be opened again by its path; an empty reason if it can."""
    mode = status.st_mode
    if path.startswith("pipe:"):
        return DescriptorKind.PIPE, ""
    if not path.startswith("/"):
        return DescriptorKind.OTHER, _NAMES.get(path.partition(":")[0], "") or path.removeprefix("anon_inode:").strip(
            "[]"
        )
    if path.startswith("/memfd:"):
        return DescriptorKind.OTHER, "a memfd"
    if stat.S_ISCHR(mode) and os.major(status.st_rdev) in _TTY_MAJOR_PTS:
        return DescriptorKind.TERMINAL, ""
    if stat.S_ISFIFO(mode):
        return DescriptorKind.OTHER, "a named pipe"
    if stat.S_ISCHR(mode) and status.st_rdev not in _MEMORY_DEVICES:
        return DescriptorKind.OTHER, "a device"
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode) or stat.S_ISLNK(mode):
        return DescriptorKind.OTHER, "a device, socket or symbolic link"
    if path.endswith(DELETED):
        return DescriptorKind.FILE, "its file is deleted"
    if flags & _O_PATH:
        return DescriptorKind.FILE, "opened with O_PATH"
    if path.startswith("/proc/") and path.split("/")[2].isdecimal():  # its own (/proc/self), as a rule
        return DescriptorKind.FILE, "a file about a process, which is not there before the process is"
    return DescriptorKind.FILE, path_problem(path, status)


_NAMES = {"socket": "a socket", "mnt": "a namespace", "net": "a namespace", "pid": "a namespace"}


def _owner_problem(fd: int) -> str:
    """Say that signals are to be sent about this file (fcntl(2), F_SETOWN_EX); empty if not."""
    owner = fcntl.fcntl(fd, _F_GETOWN_EX, bytes(8))
    assert isinstance(owner, bytes)
    _, pid = struct.unpack("ii", owner)
    return SIGNALS_OWNER if pid or fcntl.fcntl(fd, _F_GETSIG) else ""


def _unread_problem(fd: int) -> str:
    import termios  # noqa: PLC0415  few tasks have such a pipe

    (unread,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return f"a pipe with {unread} bytes in it that nobody has read" if unread else ""


def _read_terminal(fd: int, status: os.stat_result) -> Terminal:
    import termios  # noqa: PLC0415  few tasks have one

    text = fcntl.ioctl(fd, termios.TCGETS, bytes(36))
    iflag, oflag, cflag, lflag, line = struct.unpack_from("IIIIB", text)
    session = foreground = 0
    with suppress(OSError):  # ENOTTY: nobody's controlling terminal
        session = struct.unpack("i", fcntl.ioctl(fd, _TIOCGSID, bytes(4)))[0]
        foreground = struct.unpack("i", fcntl.ioctl(fd, termios.TIOCGPGRP, bytes(4)))[0]
    rows, columns, width, height = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    number = (os.major(status.st_rdev) - _TTY_MAJOR_PTS.start) * 256 + os.minor(status.st_rdev)
    window = (rows, columns, width, height)
    return Terminal(number, session, foreground, iflag, oflag, cflag, lflag, line, text[17:36], window)
