# SPDX-License-Identifier: MIT
"""What a page server has to give: the memory of the tasks in one directory, loaded when somebody asks for it.

All clients of a task share what was loaded, and keep it while they are served, also when a new dump takes its place:
a client that comes then gets the new one. What nobody uses is closed.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from lazyd.image import ExtentTable, MemoryImages, load_memory
from lazyd.serve.core import Shelf

# The files that were read, by how they were then.
_State = list[tuple[Path, int, int, int]]


class Stock:
    """The memory of one task. `identity` is a number of what it holds: never 0, and another one for other pages."""

    def __init__(self, pid: int, memory: MemoryImages, state: _State) -> None:
        self.shelf = Shelf(pid, memory.extents, memory.sources)
        self.identity = _identify(memory)
        self.users = 0
        self._memory = memory
        self._state = state

    def is_current(self) -> bool:
        """Say whether the files are still those that were loaded."""
        return all(_look(path) == (path, *rest) for path, *rest in self._state)

    def close(self) -> None:
        """Close the pages images."""
        self._memory.close()


class Shelves:
    """The tasks of a directory of images. Any thread may use it."""

    def __init__(self, images: Path, dialect: str = "auto") -> None:
        """`dialect`: how pagemap entries are read, see lazyd.image.load()."""
        self._images = images
        self._dialect = dialect
        self._lock = threading.Lock()
        self._stocks: dict[int, Stock] = {}

    def take(self, pid: int) -> Stock:
        """Return what there is of a task, to be given back; ImageError if there is nothing, or it cannot be trusted."""
        with self._lock:
            stock = self._stocks.get(pid)
            if stock is None or not stock.is_current():
                stock = self._stocks[pid] = self._load(pid)
            stock.users += 1
            return stock

    def _load(self, pid: int) -> Stock:
        top = _look(self._images / f"pagemap-{pid}.img")
        memory = load_memory(self._images, pid, self._dialect)
        return Stock(pid, memory, [top, *(_look(source.path) for source in memory.sources)])

    def give_back(self, stock: Stock) -> None:
        """Say that one user less needs it."""
        with self._lock:
            stock.users -= 1
            if not stock.users:
                stock.close()
                if self._stocks.get(stock.shelf.pid) is stock:
                    del self._stocks[stock.shelf.pid]


class Borrowed:
    """What one client uses, by task."""

    def __init__(self, shelves: Shelves) -> None:
        self._shelves = shelves
        self._stocks: dict[int, Stock] = {}

    def take(self, pid: int) -> Stock:
        """Return what there is of a task: the same as before, if it was asked for before. Errors as Shelves.take()."""
        if pid not in self._stocks:
            self._stocks[pid] = self._shelves.take(pid)
        return self._stocks[pid]

    def give_back(self) -> None:
        """Give back all."""
        while self._stocks:
            self._shelves.give_back(self._stocks.popitem()[1])


def empty_shelf(pid: int) -> Shelf:
    """Return the shelf of a task of which nothing is here."""
    return Shelf(pid, ExtentTable.empty(), [])


def _look(path: Path) -> tuple[Path, int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return path, 0, 0, 0
    return path, status.st_ino, status.st_size, status.st_mtime_ns


def _identify(memory: MemoryImages) -> int:
    """Return a number for the extents and the files behind them: the same whenever they are loaded."""
    digest = hashlib.blake2b(memory.extents.buffer, digest_size=8)
    for source in memory.sources:
        status = os.fstat(source.fd)
        digest.update(b"%d %d %d;" % (status.st_ino, status.st_size, status.st_mtime_ns))
    return int.from_bytes(digest.digest(), "little") or 1
