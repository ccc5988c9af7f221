# SPDX-License-Identifier: MIT
"""Read the small images that only a restorer needs, as messages in the words of images/*.proto."""

from __future__ import annotations

from contextlib import suppress

from google.protobuf.message import DecodeError

from lazyd.errors import ImageError
from lazyd.hints import Any
from lazyd.image.directory import ImagesDirectory
from lazyd.image.encode import SmallImage


def read_messages(directory: ImagesDirectory, name: str, kind: SmallImage) -> list[Any]:
    """Return the records of a small image; ImageError if it is missing or garbled."""
    path = directory.path / name
    try:
        records = directory.records(name, kind.magics)
    except FileNotFoundError as error:
        raise ImageError(path, "missing: a task cannot be built without it") from error
    found = []
    for record in records:
        try:
            found.append(kind.message.FromString(record.body))
        except DecodeError as error:
            reason = f"garbled: not a {kind.message.DESCRIPTOR.name} message"
            raise ImageError(path, reason, offset=record.offset) from error
    return found


def read_message(directory: ImagesDirectory, name: str, kind: SmallImage) -> Any:  # noqa: ANN401  a protobuf message
    """Return the only record of a small image; ImageError if it has more or none."""
    found = read_messages(directory, name, kind)
    if len(found) != 1:
        raise ImageError(directory.path / name, f"{len(found)} records where there should be one")
    return found[0]


def has_records(directory: ImagesDirectory, name: str) -> bool:
    """Say whether an image is there and has more than its magics; its kind does not matter."""
    with suppress(OSError):
        return (directory.path / name).stat().st_size > 8
    return False
