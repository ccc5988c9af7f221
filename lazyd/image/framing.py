# SPDX-License-Identifier: MIT
"""The frame that every image has: magic numbers, then records of a length and a message.

All integers are little-endian. `inventory.img` has one magic; every other image has two, of which the first
says image (or service file, such as `stats-dump`) and the second says which. Each record is a u32 length and
that many bytes of protobuf. Pages images have no frame at all.

Files are opened relative to the descriptor of their directory, so that a directory that is moved or replaced
half-way is not read half and half, and without blocking, so that a FIFO in the place of an image is an error.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from lazyd.errors import ImageError
from lazyd.tuples import NamedTuple

COMMON_MAGIC = 0x54564319
SERVICE_MAGIC = 0x55105940

INVENTORY_MAGICS = (0x58313116,)
PSTREE_MAGICS = (COMMON_MAGIC, 0x50273030)
MM_MAGICS = (COMMON_MAGIC, 0x57492820)
PAGEMAP_MAGICS = (COMMON_MAGIC, 0x56084025)
CORE_MAGICS = (COMMON_MAGIC, 0x55053847)
STATS_MAGICS = (SERVICE_MAGIC, 0x57093306)

# The images that Python reads whole are small: the largest, mm, has some 60 bytes for each VMA.
SMALL_IMAGE_MAX = 256 << 20


class Record(NamedTuple):
    """One record: `offset` is where its length stands in the file."""

    offset: int
    body: bytes


def read_error(path: Path, error: OSError) -> ImageError:
    """Return what a failed open or read of an image means to the user."""
    if error.errno == errno.EMFILE:
        return ImageError(path, "too many open files: raise the limit (ulimit -n)")
    return ImageError(path, (error.strerror or str(error)).lower())


def open_image(directory: int, path: Path) -> int:
    """Open the regular file `path.name` for reading, relative to the descriptor of its directory.

    The caller closes it. FileNotFoundError is passed through: what that means depends on the image.
    """
    try:
        fd = os.open(path.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=directory)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise read_error(path, error) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(path, "not a regular file")
    return fd


def read_small_image(directory: int, path: Path) -> bytes:
    """Return the whole of a small image; FileNotFoundError as for open_image."""
    fd = open_image(directory, path)
    try:
        size = os.fstat(fd).st_size
        if size > SMALL_IMAGE_MAX:
            raise ImageError(path, f"{size} bytes long: no image of its kind has more than {SMALL_IMAGE_MAX}")
        pieces = []
        while piece := os.read(fd, 1 << 20):
            pieces.append(piece)
        return b"".join(pieces)
    except OSError as error:
        raise read_error(path, error) from error
    finally:
        os.close(fd)


def _too_short(path: Path, there: int, offset: int) -> ImageError:
    return ImageError(path, f"truncated: 4 bytes wanted here, {there} are there", offset=offset)


def split_records(path: Path, content: bytes, magics: tuple[int, ...]) -> list[Record]:
    """Check the magics of an image and return its records; `path` is only for the error."""
    at = 0
    for magic in magics:
        found = content[at : at + 4]
        if len(found) < 4:
            raise _too_short(path, len(found), at)
        if (number := int.from_bytes(found, "little")) != magic:
            reason = f"not an image of this kind: magic {number:#x} instead of {magic:#x}"
            raise ImageError(path, reason, offset=at)
        at += 4
    records = []
    while at < len(content):
        if len(content) - at < 4:
            raise _too_short(path, len(content) - at, at)
        length = int.from_bytes(content[at : at + 4], "little")
        if length > len(content) - at - 4:
            there = len(content) - at - 4
            reason = f"truncated or garbled: a record of {length} bytes, but only {there} are there"
            raise ImageError(path, reason, offset=at)
        records.append(Record(at, content[at + 4 : at + 4 + length]))
        at += 4 + length
    return records


def join_records(magics: tuple[int, ...], bodies: list[bytes]) -> bytes:
    """Return the image that has these records."""
    pieces = [magic.to_bytes(4, "little") for magic in magics]
    for body in bodies:
        pieces.append(len(body).to_bytes(4, "little"))
        pieces.append(body)
    return b"".join(pieces)
