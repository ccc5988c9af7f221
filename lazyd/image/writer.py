# SPDX-License-Identifier: MIT
"""Write a directory of images so that it appears under its name complete or not at all.

Facts (rename(2)): a directory renamed onto an empty one replaces it in one step, and is refused with ENOTEMPTY
otherwise; it cannot replace a mount point, nor leave its filesystem; who stood in the directory that is replaced
stands in a deleted one afterwards.

What follows: images are written into a hidden directory beside the one they are for, which is renamed at the end.
Only where that cannot be (a mount point, a folder that may not be written to) or should not be (the working
directory of whoever calls us, a directory that holds our own log already), a hidden directory inside takes its
place, and the files are renamed one by one, the inventory last: without it no reader takes the rest for images.

A writer that is killed leaves its hidden directory behind. It holds a lock on it while it lives, so that the next
writer for the same name knows which to remove. One that was killed while it renamed files has left a list of them
there, by inode: without an inventory they are no images, and the next writer removes those too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from lazyd.errors import DumpError, SystemCallError
from lazyd.image.chain import PARENT_LINK
from lazyd.image.framing import join_records

_INVENTORY = "inventory.img"
_LIST = ".moving"
_NAME_BYTES = 200  # of at most 255
# As criu: memory is nobody else's business.
_FILE_MODE = 0o600
_HINTS = {
    errno.ENOSPC: "make room there, or dump elsewhere",
    errno.EDQUOT: "make room there, or dump elsewhere",
    errno.EACCES: "dump elsewhere, or as who may write there",
    errno.EROFS: "dump elsewhere",
}


def write_error(call: str, path: Path, error: OSError) -> SystemCallError:
    """Return what a failed write of an image means to the user."""
    number = error.errno or 0
    return SystemCallError(call, number, path=path, hint=_HINTS.get(number, ""))


class ImagesWriter:
    """A directory of images in the making. As a context manager it aborts unless publish() was called.

    `directory_fd` is where files are made until publish(); after it, the same files under their final names.
    """

    def __init__(self, path: Path, *, parent: Path | None, may_hold: Iterable[str] = ()) -> None:
        """Prepare to write `path`, which must not exist or be an empty directory.

        parent: the directory that `parent` shall name, or None. may_hold: names that may be in `path` all the same,
        such as our own log; they stay.
        """
        try:
            self.path = Path(os.path.realpath(path))
            self.parent = None if parent is None else Path(os.path.realpath(parent))
        except FileNotFoundError:
            raise DumpError(f"{path}: the working directory is gone; name a directory by its whole path") from None
        # A hidden folder's name has to fit, too, whatever the directory's own is.
        self._hidden_prefix = f".{os.fsdecode(os.fsencode(self.path.name)[:_NAME_BYTES])}.partial-"
        self._may_hold = frozenset(may_hold)
        self._published = False
        self.directory_fd = -1
        self._remove_stale()
        exists, is_clear = self._look()
        if self.parent == self.path:
            raise DumpError(f"{self.path}: cannot be its own parent; name another directory for the new images")
        if exists and (not is_clear or self._is_working_directory() or self.path.is_mount()):
            self._is_inside = True
        else:
            self._is_inside = exists and not os.access(self.path.parent, os.W_OK | os.X_OK)
        self._make_hidden()
        try:
            if exists and not self._is_inside:
                self._take_after(self.path)
            if self.parent is not None:
                self._link_parent(self.parent)
        except BaseException:
            self.abort()
            raise

    def _look(self) -> tuple[bool, bool]:
        """Say whether the directory exists and whether it is empty; raise if it cannot be written to."""
        try:
            names = set(os.listdir(self.path))  # noqa: PTH208  names are wanted
        except FileNotFoundError:
            if not self.path.parent.is_dir():
                raise DumpError(f"{self.path.parent}: no such directory; make it first") from None
            return False, True
        except NotADirectoryError:
            raise DumpError(f"{self.path}: not a directory; name one for the images") from None
        except OSError as error:
            raise write_error("opendir", self.path, error) from error
        stale = self._hidden_prefix
        others = sorted(name for name in names - self._may_hold if not name.startswith(stale))
        if others:
            holds = others[0] if len(others) == 1 else f"{others[0]} and {len(others) - 1} more"
            raise DumpError(f"{self.path}: not empty, it holds {holds}; empty it or name another directory")
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise write_error("access", self.path, OSError(errno.EACCES, ""))
        return True, not names

    def _is_working_directory(self) -> bool:
        with contextlib.suppress(OSError):
            return Path(os.curdir).samefile(self.path)
        return False

    @property
    def _place(self) -> Path:
        return self.path if self._is_inside else self.path.parent

    def _remove_stale(self) -> None:
        """Remove what killed writers for this name have left."""
        for place in (self.path, self.path.parent):
            with contextlib.suppress(OSError):
                for hidden in list(place.glob(f"{_quote(self._hidden_prefix)}*")):
                    with contextlib.suppress(OSError), _open_directory(hidden) as fd:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        self._remove_half_moved(hidden)
                        shutil.rmtree(hidden)

    def _remove_half_moved(self, hidden: Path) -> None:
        """Remove what a killed writer has moved into the directory, unless it is all there."""
        try:
            numbers: dict[str, int] = json.loads((hidden / _LIST).read_bytes())
        except (OSError, ValueError):
            return  # it had not begun to move
        # An inventory that is gone from here has been moved, last of all: then these are images, whole.
        if (hidden / _INVENTORY).exists() or _INVENTORY not in numbers:
            for name, number in numbers.items():
                with contextlib.suppress(FileNotFoundError):
                    if (self.path / name).lstat().st_ino == number:
                        (self.path / name).unlink()

    def _make_hidden(self) -> None:
        while self.directory_fd < 0:
            try:
                name = tempfile.mkdtemp(prefix=self._hidden_prefix, dir=self._place)
            except OSError as error:
                raise write_error("mkdir", self._place, error) from error
            self._hidden = Path(name)
            # Between these two calls another writer for the same name may take it for a stale one.
            with contextlib.suppress(FileNotFoundError, BlockingIOError), _open_directory(self._hidden) as fd:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), self._hidden.stat()):
                    self.directory_fd = os.dup(fd)

    def _take_after(self, model: Path) -> None:
        """Give the directory the mode and owner of the empty one that it will replace."""
        status = model.stat()
        with contextlib.suppress(PermissionError):
            os.chown(self.directory_fd, status.st_uid, status.st_gid)
        os.fchmod(self.directory_fd, status.st_mode & 0o7777)

    def _link_parent(self, parent: Path) -> None:
        if not parent.is_dir():
            raise DumpError(f"{parent}: no such directory; --parent names the images of the dump before")
        try:
            os.symlink(os.path.relpath(parent, self.path), PARENT_LINK, dir_fd=self.directory_fd)
        except OSError as error:
            raise write_error("symlink", self.path / PARENT_LINK, error) from error

    def create(self, name: str) -> int:
        """Make a file; return its descriptor, open for reading and writing, which the caller closes."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(name, flags, _FILE_MODE, dir_fd=self.directory_fd)
        except OSError as error:
            raise write_error("open", self.path / name, error) from error

    def create_nameless(self, name: str) -> int:
        """Make a file on the same filesystem that has no name, and is gone once it is closed; `name` is for errors."""
        fd = self.create(name)
        os.unlink(name, dir_fd=self.directory_fd)
        return fd

    def write_small(self, name: str, magics: tuple[int, ...], bodies: list[bytes]) -> None:
        """Write an image of some records whole."""
        self.write_file(name, join_records(magics, bodies))

    def write_file(self, name: str, content: bytes) -> None:
        """Write a file whole."""
        fd = self.create(name)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(fd, rest) :]
        except OSError as error:
            raise write_error("write", self.path / name, error) from error
        finally:
            os.close(fd)

    def publish(self) -> None:
        """Give the images their names: from here on they are there, whole."""
        assert self.directory_fd >= 0, "published or aborted already"
        if self._is_inside:
            self._move_files()
        else:
            try:
                self._hidden.rename(self.path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise write_error("rename", self.path, error) from error
                raise DumpError(f"{self.path}: no longer empty: somebody else wrote there meanwhile") from error
        self._published = True
        self._close()

    def _move_files(self) -> None:
        names = sorted(os.listdir(self.directory_fd), key=lambda name: (name == _INVENTORY, name))  # noqa: PTH208  a descriptor
        moved: list[str] = []
        numbers = {name: os.stat(name, dir_fd=self.directory_fd, follow_symlinks=False).st_ino for name in names}
        self.write_file(_LIST, json.dumps(numbers).encode())
        target = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in names:
                if os.path.lexists(self.path / name):
                    raise FileExistsError(errno.EEXIST, "")
                os.rename(name, name, src_dir_fd=self.directory_fd, dst_dir_fd=target)
                moved.append(name)
        except OSError as error:
            for name in moved:
                os.unlink(name, dir_fd=target)
            if error.errno == errno.EEXIST:
                text = f"{self.path / names[len(moved)]}: appeared while the images were written; empty the directory"
                raise DumpError(text) from error
            raise write_error("rename", self.path / names[len(moved)], error) from error
        finally:
            os.close(target)
        shutil.rmtree(self._hidden, ignore_errors=True)

    def abort(self) -> None:
        """Leave everything as it was before; after publish() this does nothing."""
        if self.directory_fd >= 0 and not self._published:
            shutil.rmtree(self._hidden, ignore_errors=True)
        self._close()

    def _close(self) -> None:
        if self.directory_fd >= 0:
            os.close(self.directory_fd)
            self.directory_fd = -1

    def __enter__(self) -> ImagesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def _quote(name: str) -> str:
    """Return a pattern that matches this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


@contextlib.contextmanager
def _open_directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)
