# SPDX-License-Identifier: MIT
"""Files that are written once, at the end, for others to read: whole or not at all.

They are put in the place of what was there before. That is done to plain files only: a device, a pipe or a link (as
/dev/stdout is one) stays what it is and is written into.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path


def check_writable(path: Path) -> None:
    """Say early that a file could not be written later: OSError."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if _is_replaced(path):
        if not stat.S_ISDIR(path.parent.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        path = path.parent
    if os.path.exists(path) and not os.access(path, os.W_OK):  # noqa: PTH110  it does not raise
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, or into what is there and no plain file. OSError.

    A pipe that nobody reads is an error (ENXIO), as waiting for a reader has no end.
    """
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
