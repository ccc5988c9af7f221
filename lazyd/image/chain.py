# SPDX-License-Identifier: MIT
"""The chain of an images directory: itself, its parent, the parent's parent, to the oldest.

A directory names its parent by a symbolic link `parent`, relative to itself. Each is opened through the
descriptor of the one before, so that a long chain meets neither the limit on symbolic links in one path nor
PATH_MAX, and only one is open at a time, so that a chain of a thousand fits the usual limit on descriptors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lazyd.errors import ImageError
from lazyd.image.directory import ImagesDirectory
from lazyd.image.framing import read_error

PARENT_LINK = "parent"

# A row of the table of extents names its image in 16 bits.
MAX_LEVELS = 1 << 16


def has_parent(directory: ImagesDirectory) -> bool:
    """Say whether a directory names a parent, be it a good one or not."""
    try:
        os.lstat(PARENT_LINK, dir_fd=directory.fd)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise read_error(directory.path / PARENT_LINK, error) from error
    return True


def open_parent(directory: ImagesDirectory) -> ImagesDirectory:
    """Open the directory that `parent` names; the caller has checked has_parent."""
    link = directory.path / PARENT_LINK
    try:
        target = os.readlink(PARENT_LINK, dir_fd=directory.fd)
    except OSError:
        target = PARENT_LINK
    try:
        fd = os.open(PARENT_LINK, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory.fd)
    except OSError as error:
        why = (error.strerror or "").lower()
        raise ImageError(link, f"broken parent link: {target}: {why}") from error
    # The name is for messages, and to open pages images by; what is behind it is checked again then.
    return ImagesDirectory(Path(os.path.realpath(link)), fd)


def walk_chain(path: Path) -> Iterator[ImagesDirectory]:
    """Yield the directories of a chain, youngest first; each is closed when the next is asked for.

    Raises ImageError on the way, at the link that is broken or that leads back to where the walk has been.
    """
    directory = ImagesDirectory.open(path)
    try:
        been: dict[tuple[int, int], Path] = {}
        while True:
            status = os.fstat(directory.fd)
            been[status.st_dev, status.st_ino] = directory.path
            yield directory
            if not has_parent(directory):
                return
            parent = open_parent(directory)
            child, directory = directory, parent
            child.close()
            status = os.fstat(directory.fd)
            if (status.st_dev, status.st_ino) in been:
                reason = f"circular parent link: it leads back to {been[status.st_dev, status.st_ino]}"
                raise ImageError(child.path / PARENT_LINK, reason)
            if len(been) == MAX_LEVELS:
                raise ImageError(child.path / PARENT_LINK, f"a chain of more than {MAX_LEVELS} directories")
    finally:
        directory.close()
