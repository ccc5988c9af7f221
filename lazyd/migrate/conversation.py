# SPDX-License-Identifier: MIT
"""What the two ends of a migration tell each other: a length, a word with values as JSON, and perhaps a file."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from pathlib import Path

from lazyd.errors import ProtocolError, SystemCallError
from lazyd.hints import Any
from lazyd.tuples import NamedTuple

VERSION = 1
_LENGTH = struct.Struct("<I")
_MOST_BYTES = 1 << 20
_PIECE_BYTES = 1 << 18
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")


class Said(NamedTuple):
    """One message."""

    word: str
    values: dict[str, Any]


class Conversation:
    """A connected stream socket, whose owner is somebody else. `peer` names the other end in errors."""

    def __init__(self, stream: socket.socket, peer: str) -> None:
        self.stream = stream
        self.peer = peer

    def say(self, word: str, **values: object) -> None:
        """Send a message; ProtocolError if the connection is gone."""
        content = json.dumps({"word": word, **values}).encode()
        self._send(_LENGTH.pack(len(content)) + content)

    def say_file(self, path: Path) -> int:
        """Send a file of images; return its length."""
        with path.open("rb") as file:
            left = length = os.fstat(file.fileno()).st_size
            self.say("file", name=path.name, bytes=length)
            while left:
                content = file.read(min(left, _PIECE_BYTES))
                if not content:
                    raise ProtocolError(str(path), "became shorter while it was sent")
                self._send(content)
                left -= len(content)
        return length

    def hear(self, *words: str, timeout_s: float | None = None) -> Said:
        """Return the next message, which must be one of these; ProtocolError if it is not, or does not come."""
        self.stream.settimeout(timeout_s)
        (length,) = _LENGTH.unpack(self._receive(_LENGTH.size))
        if length > _MOST_BYTES:
            raise ProtocolError(self.peer, "says what is no message of lazyd migrate")
        try:
            values = json.loads(self._receive(length))
            word = str(values.pop("word"))
        except (ValueError, KeyError, AttributeError) as error:
            raise ProtocolError(self.peer, "says what is no message of lazyd migrate") from error
        if word == "failed" and word not in words:
            raise ProtocolError(self.peer, str(values.get("reason", "failed")))
        if word not in words:
            raise ProtocolError(self.peer, f"says {word!r} where {' or '.join(words)} was to come")
        return Said(word, values)

    def hear_file(self, said: Said, folder: Path) -> int:
        """Receive what a "file" announces into a folder; return its length. Only plain names, only new files."""
        name, length = said.values.get("name"), said.values.get("bytes")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(length, int) or length < 0:
            raise ProtocolError(self.peer, f"sends a file {name!r}, which is no image")
        left = length
        try:
            with (folder / name).open("xb") as file:
                while left:
                    content = self._receive_some(min(left, _PIECE_BYTES))
                    file.write(content)
                    left -= len(content)
        except FileExistsError:
            raise ProtocolError(self.peer, f"sends {name} twice") from None
        except OSError as error:
            raise SystemCallError("writing", error.errno or 0, path=folder / name) from error
        return length

    def _send(self, content: bytes) -> None:
        try:
            self.stream.sendall(content)
        except OSError as error:
            raise ProtocolError(self.peer, f"the connection is gone: {_reason(error)}") from error

    def _receive(self, length: int) -> bytes:
        content = bytearray()
        while len(content) < length:
            content += self._receive_some(length - len(content))
        return bytes(content)

    def _receive_some(self, length: int) -> bytes:
        try:
            content = self.stream.recv(length)
        except TimeoutError as error:
            raise ProtocolError(self.peer, f"says nothing for {self.stream.gettimeout():g} s") from error
        except OSError as error:
            raise ProtocolError(self.peer, f"the connection is gone: {_reason(error)}") from error
        if not content:
            raise ProtocolError(self.peer, "hung up")
        return content


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
