# SPDX-License-Identifier: MIT
"""One tree of exceptions; each class owns its exit code and carries data, not only text.

`str(error)` is the one line that a user gets: what, where, why, and what to do where something can be done.
"""

from __future__ import annotations

import errno as _errno
import os as _os
from pathlib import Path

from lazyd.hints import ClassVar


class LazydError(Exception):
    """Anything that lazyd reports to its user in one line."""

    exit_code: ClassVar[int] = 1


class UsageError(LazydError):
    """Arguments that make no sense; `criu` exits 1 for these too."""


class ImageError(LazydError):
    """An image that cannot be trusted.

    `path` names the file or directory, `offset` the byte in it where the trouble starts (None: the file as a whole),
    `address` the image address it is about (None: none).
    """

    def __init__(
        self,
        path: Path | str,
        reason: str,
        *,
        offset: int | None = None,
        address: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.reason = reason
        self.offset = offset
        self.address = address
        where = str(path)
        if offset is not None:
            where += f", offset {offset}"
        if address is not None:
            where += f", address {address:#x}"
        super().__init__(f"{where}: {reason}")


class ProtocolError(LazydError):
    """A peer that said what the protocol does not allow. `peer` names the socket or host."""

    def __init__(self, peer: str, reason: str) -> None:
        self.peer = peer
        self.reason = reason
        super().__init__(f"{peer}: {reason}")


class TlsError(LazydError):
    """A certificate, a key or a peer that TLS does not get along with. `where` names the file or the peer."""

    def __init__(self, where: Path | str, reason: str) -> None:
        self.where = where
        self.reason = reason
        super().__init__(f"{where}: {reason}")


class SystemCallError(LazydError):
    """A system call that failed for a reason the user can act on. `number` is the errno."""

    def __init__(self, call: str, number: int, *, path: Path | str | None = None, hint: str = "") -> None:
        self.call = call
        self.number = number
        self.path = path
        self.hint = hint
        text = f"{path}: " if path is not None else ""
        text += f"{call}: {_errno.errorcode.get(number, str(number))}, {_os.strerror(number).lower()}"
        if number == _errno.EMFILE and not hint:
            hint = "raise the limit: ulimit -n"
        super().__init__(f"{text} ({hint})" if hint else text)


class RestoreError(LazydError):
    """The restore ended before every task could run: the other side hung up, or a task could not be served."""


class AttachError(LazydError):
    """A task that cannot be attached to: it goes on as it was."""


class DumpError(LazydError):
    """A dump that cannot be made, or was given up: the task goes on, and no images appear."""
