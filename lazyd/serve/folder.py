# SPDX-License-Identifier: MIT
"""A hidden folder in a directory of images, whose files get their names there all together or not at all.

A page server's directory is not its own: the small images are put there by others, several dumps may arrive at once,
or one after the other for the same task. So each dump has a hidden folder there, which holds a lock while it lives.
At the end a list of what is to get which name is written into it; from that moment on the images are there: whoever
comes after a server that was killed in the midst of the renames finishes them. Before, they are not: the folder is
removed. The lock on the directory itself is held while names are given.

Nothing is deleted or overwritten: a pagemap that is there already stays beside the new one under another name, and no
number of a pages image is used twice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lazyd.image.writer import write_error
from lazyd.tuples import NamedTuple

_PREFIX = ".page-server."
_LIST = "names"
_FILE_MODE = 0o600


class Move(NamedTuple):
    """A file of the folder, and the name that it gets."""

    hidden: str
    name: str


class Folder:
    """A hidden folder. close() removes it with all that has not been given a name."""

    def __init__(self, images: Path) -> None:
        """Make one in the directory of images."""
        self.images = images
        self._path, self._fd = _make(images)

    def create(self, name: str) -> int:
        """Make an empty file, or empty it; return its descriptor, which the caller closes."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(name, flags, _FILE_MODE, dir_fd=self._fd)
        except OSError as error:
            raise write_error("open", self.images / name, error) from error

    def publish(self, moves: list[Move]) -> list[str]:
        """Give files their names, in this order; return what was there before under one of them, by its new name.

        The directory is locked by the caller. OSError: nothing has changed.
        """
        listed = self._path / _LIST
        draft = self._path / f"{_LIST}.draft"
        draft.write_text(json.dumps(moves))
        draft.rename(listed)
        done: list[tuple[Move, Path | None]] = []
        try:
            for move in moves:
                kept = _give_name(self._path, self.images, move)
                done.append((move, kept))
        except OSError:
            for move, kept in reversed(done):
                (self.images / move.name).rename(self._path / move.hidden)
                if kept is not None:
                    kept.rename(self.images / move.name)
            listed.unlink()
            raise
        return [kept.name for _, kept in done if kept is not None]

    def close(self) -> None:
        """Remove what is left; a second call does nothing."""
        if self._fd >= 0:
            shutil.rmtree(self._path, ignore_errors=True)
            os.close(self._fd)
            self._fd = -1


def _make(images: Path) -> tuple[Path, int]:
    while True:
        try:
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=images))
        except OSError as error:
            raise write_error("mkdir", images, error) from error
        # Between these two calls somebody who clears up may take it for a stale one.
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _try_lock(fd) and path.exists():
                return path, fd
            os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _give_name(folder: Path, images: Path, move: Move) -> Path | None:
    """Rename one file; return where what had its name is now."""
    target = images / move.name
    kept = _keep(target) if target.exists() else None
    try:
        (folder / move.hidden).rename(target)
    except OSError:
        if kept is not None and target.exists():
            kept.unlink()  # its second name
        raise
    return kept


def _keep(path: Path) -> Path:
    """Give a file a second name; return it."""
    for number in itertools.count(1):
        kept = path.with_name(f"{path.name}.replaced-{number}")
        try:
            os.link(path, kept)
        except FileExistsError:
            if not kept.samefile(path):
                continue
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            path.rename(kept)  # a filesystem with one name a file
        return kept
    raise AssertionError("unreachable")


@contextlib.contextmanager
def locked(images: Path) -> Iterator[None]:
    """Hold the lock on a directory of images."""
    fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def next_pages_id(images: Path) -> int:
    """Return a number from which on no pages image is there. The directory is locked by the caller."""
    numbers = [path.name[len("pages-") : -len(".img")] for path in images.glob("pages-*.img")]
    return max((int(number) for number in numbers if number.isdecimal()), default=0) + 1


def clear_up(images: Path) -> list[str]:
    """Finish, or remove, what servers that were killed have left; return what was finished, by name."""
    finished: list[str] = []
    with locked(images):
        for path in sorted(images.glob(f"{_PREFIX}*")):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    if _try_lock(fd):
                        finished += _finish(path, images)
                        shutil.rmtree(path)
                finally:
                    os.close(fd)
    return finished


def _finish(folder: Path, images: Path) -> list[str]:
    try:
        moves = [Move(*pair) for pair in json.loads((folder / _LIST).read_text())]
    except FileNotFoundError:
        return []
    left = [move for move in moves if (folder / move.hidden).exists()]
    for move in left:
        _give_name(folder, images, move)
    return [move.name for move in left]
