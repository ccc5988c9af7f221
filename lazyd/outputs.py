# SPDX-License-Identifier: MIT
"""Files that are written once, at the end, for others to read: whole or not at all.

They are put in the place of what was there before. That is done to plain files only: a device, a pipe or a link stays
what it is and is written into. What names one of our own descriptors, as /dev/stdout does (proc(5), /proc/PID/fd), is
written behind what has gone there already: to open it anew would begin at its start.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

_LINKS_MAX = 40


def check_writable(path: Path) -> None:
    """Say early that a file could not be written later: OSError."""
    own = _own_descriptor(path)
    if own is not None:
        if fcntl.fcntl(own, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if path.is_socket():
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
    if _is_replaced(path) or not path.exists():
        path = path.resolve().parent
        if not stat.S_ISDIR(path.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, or into what is there and no plain file. OSError.

    A pipe that nobody reads is an error (ENXIO), as waiting for a reader has no end.
    """
    own = _own_descriptor(path)
    if own is not None:
        with open(os.dup(own), "w", encoding="utf-8") as file:  # noqa: PTH123  it is open
            file.write(text)
        return
    if not _is_replaced(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o644)
        os.set_blocking(fd, True)
        with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123  it is open
            file.write(text)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _is_replaced(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return True


def _own_descriptor(path: Path) -> int | None:
    """Return the descriptor of ours that a path names by way of links; None if it names none."""
    for _ in range(_LINKS_MAX):
        if path.name.isdecimal() and os.path.realpath(path.parent) == f"/proc/{os.getpid()}/fd":
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None
