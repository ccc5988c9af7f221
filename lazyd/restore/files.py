# SPDX-License-Identifier: MIT
"""The open files of a task in the making: opened here, and handed down under their old numbers.

What a new process inherits it does not have to open with a path and rights of its own, and what cannot be opened is
found before there is a process. Descriptors that share an open file get the same one. Files that nobody has a
descriptor of but that must be mapped, read from or become the program get numbers above all others, and are closed in
the task when that is done.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from contextlib import suppress
from types import TracebackType

from lazyd.errors import RestoreError, SystemCallError
from lazyd.hints import Any
from lazyd.restore.plan import PIPE, REGULAR, TERMINAL, Plan, own_terminal
from lazyd.target.puppet import Step

_SYS_FCNTL, _SYS_CLOSE = 72, 3
_F_SETFD = 2
_NOT_AGAIN = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY
_TCSETS = 0x5402  # asm-generic/ioctls.h
_TYPE_PSEUDO_TERMINAL = 1


class Files:
    """Open files by the number that they get in the task. As a context manager it closes them here."""

    def __init__(self, plan: Plan) -> None:
        """Open what the task had open. RestoreError or SystemCallError about what cannot be."""
        self._plan = plan
        self._opened: dict[int, int] = {}
        """By number in files.img."""
        self._owned: list[int] = []
        self.placed: dict[int, int] = {}
        """Number in the task to descriptor here."""
        self._extra: dict[object, int] = {}
        self._next = max((one.fd for one in plan.descriptors), default=2) + 1
        try:
            for one in plan.descriptors:
                if one.id not in self._opened:
                    self._opened[one.id] = self._open(plan.files[one.id], one.fd)
                self.placed[one.fd] = self._opened[one.id]
        except BaseException:
            self.close()
            raise

    def _open(self, file: Any, fd: int) -> int:  # noqa: ANN401  a protobuf message
        if file.type == REGULAR:
            return self._open_regular(file.reg)
        if file.type == TERMINAL:
            terminal = own_terminal()
            self._set_terminal(file.tty.tty_info_id, terminal)
            return terminal
        assert file.type == PIPE, "a plan has no other kind"
        # An inherited stream: ours of the same number takes its place.
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_GETFD)
            return fd
        raise RestoreError(
            f"descriptor {fd} of the task is a pipe that it inherited, and lazyd has none of that number"
        )

    def _open_regular(self, file: Any) -> int:  # noqa: ANN401
        try:
            fd = os.open(file.name, file.flags & ~_NOT_AGAIN | os.O_CLOEXEC | os.O_NOCTTY)
            self._owned.append(fd)
            if file.pos:
                os.lseek(fd, file.pos, os.SEEK_SET)
        except OSError as error:
            raise SystemCallError("open", error.errno or 0, path=file.name, hint="the task had it open") from error
        return fd

    def _set_terminal(self, info: int, terminal: int) -> None:
        """Give our terminal the settings that the task's had; its size is the window's own business."""
        record = next((record for record in self._plan.terminals if record.id == info), None)
        if record is None or record.type != _TYPE_PSEUDO_TERMINAL or not record.HasField("termios"):
            return
        was = record.termios
        characters = struct.pack(f"<{len(was.c_cc)}I", *was.c_cc)[:19]
        text = struct.pack("<4IB", was.c_iflag, was.c_oflag, was.c_cflag, was.c_lflag, was.c_line) + characters
        # In the background lazyd would be stopped for it, and nobody would hear why.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
        with suppress(OSError):
            fcntl.ioctl(terminal, _TCSETS, text)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def add(self, key: object, fd: int, *, is_owned: bool = True) -> int:
        """Hand another descriptor down; return its number in the task. `key` finds it again."""
        number = self._extra[key] = self._next
        self._next += 1
        self.placed[number] = fd
        if is_owned:
            self._owned.append(fd)
        return number

    def add_path(self, path: str, flags: int) -> int:
        """Hand a file down that is opened for the purpose; return its number in the task."""
        key = path, flags
        if key in self._extra:
            return self._extra[key]
        try:
            fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise SystemCallError("open", error.errno or 0, path=path, hint="the task has it mapped") from error
        return self.add(key, fd)

    def number_of(self, key: object) -> int:
        """Return the number in the task of what was added."""
        return self._extra[key]

    def pairs(self) -> list[tuple[int, int]]:
        """Return (descriptor here, number in the task), sorted by the latter."""
        return [(fd, number) for number, fd in sorted(self.placed.items())]

    def last_steps(self) -> list[Step]:
        """Return the steps that close what was added, and mark what exec is to close."""
        steps = [Step("close", _SYS_CLOSE, (number,)) for number in self._extra.values()]
        marked = [one.fd for one in self._plan.descriptors if one.flags & 1]
        return steps + [Step("fcntl", _SYS_FCNTL, (fd, _F_SETFD, fcntl.FD_CLOEXEC)) for fd in marked]

    def close(self) -> None:
        """Close everything that was opened here."""
        owned, self._owned = self._owned, []
        for fd in owned:
            os.close(fd)

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
