# SPDX-License-Identifier: MIT
"""A task whose memory does what a test tells it (tests/victims/pages.c), and what the kernel says of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from lazyd.dump.core import Area, AreaKind

PAGE = 4096
ROOT = Path(__file__).resolve().parent.parent
BASE = 0x2000_0000_0000
"""Far from where the kernel puts anything: tests map here."""
TOP = BASE + (1 << 42)

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
RW = PROT_READ | PROT_WRITE
MAP_SHARED, MAP_PRIVATE = 1, 2
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_PAGEOUT = 4, 14, 15, 21
MADV_COLLAPSE, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE = 25, 102, 103
_PIDFD_GETFD = 438


def word_page(word: int) -> bytes:
    """The bytes of a page that a write command has filled with this word."""
    return word.to_bytes(8, "little") * (PAGE // 8)


class Mapping(NamedTuple):
    """A line of /proc/PID/maps."""

    start: int
    end: int
    permissions: str
    offset: int
    inode: int
    path: str

    @property
    def kind(self) -> AreaKind | None:
        """How it is dumped; None: not at all."""
        if self.path == "[vdso]":
            return AreaKind.WHOLE
        if self.path.startswith(("[vvar", "[vsyscall")):
            return None
        if self.permissions[3] == "s":
            return AreaKind.SHARED_ANON if self.path.startswith("/dev/zero") else None
        return AreaKind.PRIVATE_FILE if self.inode else AreaKind.PRIVATE_ANON


def compile_victim(target: Path) -> Path:
    """Compile pages.c, without libraries that would change memory of their own."""
    words = ["gcc", "-std=gnu11", "-O2", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wconversion"]
    subprocess.run([*words, "-o", str(target), str(ROOT / "tests/victims/pages.c")], check=True)
    return target


def steal_fd(pid: int, number: int) -> int:
    """Return a copy of another process's descriptor."""
    pidfd = os.pidfd_open(pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return int(fd)
    finally:
        os.close(pidfd)


class Victim:
    """The running task. As a context manager it is ended, whatever happened."""

    def __init__(self, binary: Path, **options) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([binary], stdin=pipe, stdout=pipe, cwd="/", **options)
        self.pid = self.process.pid
        self.command("unmap", BASE, 1)  # it is up

    def command(self, name: str, *arguments: int | str) -> int:
        """Have it do something; return what it answers. OSError if it says one."""
        words = [name, *(word if isinstance(word, str) else f"{word:x}" for word in arguments)]
        self.process.stdin.write((" ".join(words) + "\n").encode())
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the victim is gone: {self.process.poll()}"
        value = int(line, 16)
        value -= (value >> 63) << 64
        if -4096 < value < 0:
            raise OSError(-value, f"{os.strerror(-value)}: {' '.join(words)}")
        return value

    def map(self, address: int, pages: int, prot: int = RW, flags: int = MAP_PRIVATE) -> int:
        """Map fresh anonymous memory, over what is there; of small pages, whatever the system's default is."""
        self.command("map", address, pages, prot, flags)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self.advise(address, pages, MADV_NOHUGEPAGE)
        return address

    def write(self, address: int, pages: int, word: int, step: int = 1) -> None:
        """Fill pages with a word, one more for each page."""
        self.command("write", address, pages, word, step)

    def read(self, address: int, pages: int, step: int = 1) -> None:
        """Have it read pages."""
        self.command("read", address, pages, step)

    def move(self, start: int, pages: int, to: int, flags: int = 0) -> None:
        """Move pages by mremap."""
        self.command("remap", start, pages, pages, MREMAP_MAYMOVE | MREMAP_FIXED | flags, to)

    def advise(self, address: int, pages: int, advice: int) -> None:
        """Give advice."""
        self.command("advise", address, pages, advice)

    def uffd(self) -> int:
        """Have it open a userfaultfd; return the only descriptor of it."""
        number = self.command("uffd")
        fd = steal_fd(self.pid, number)
        self.command("close", number)
        return fd

    def stop(self) -> None:
        """Stop it."""
        os.kill(self.pid, signal.SIGSTOP)
        end = time.monotonic() + 10
        while self._state() != "T":
            assert time.monotonic() < end
            time.sleep(0.0005)

    def go(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def stopped(self):
        """Keep it stopped."""
        self.stop()
        try:
            yield
        finally:
            self.go()

    def _state(self) -> str:
        text = Path(f"/proc/{self.pid}/stat").read_text()
        return text[text.rindex(")") + 2]

    def mappings(self) -> list[Mapping]:
        """What it has mapped."""
        found = []
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            words = line.split(maxsplit=5)
            start, end = (int(word, 16) for word in words[0].split("-"))
            path = words[5] if len(words) > 5 else ""
            found.append(Mapping(start, end, words[1], int(words[2], 16), int(words[4]), path))
        return found

    def _locked(self) -> set[int]:
        """Where locked mappings start."""
        found, start = set(), 0
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            word = line.split(maxsplit=1)[0]
            if not word.endswith(":"):
                start = int(word.split("-")[0], 16)
            elif word == "VmFlags:" and "lo" in line.split():
                found.add(start)
        return found

    def areas(self, start: int = 0, end: int = 1 << 47, *, lazy: bool = True) -> list[Area]:
        """What of it is dumped, in a part of its address space; locked memory is never lazy in CRIU."""
        found = []
        locked = self._locked()
        for mapping in self.mappings():
            kind = mapping.kind
            if kind is None or mapping.start < start or mapping.end > end:
                continue
            can_wait = lazy and kind is AreaKind.PRIVATE_ANON and mapping.start not in locked
            found.append(Area(mapping.start, mapping.end, kind, can_wait, mapping.inode, mapping.offset))
        return found

    def memory(self, address: int, pages: int = 1) -> bytes:
        """Its bytes, as a debugger sees them."""
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
            return os.pread(memory.fileno(), pages * PAGE, address)

    def words(self, address: int, pages: int) -> list[int]:
        """The words of /proc/PID/pagemap."""
        with Path(f"/proc/{self.pid}/pagemap").open("rb", buffering=0) as pagemap:
            data = os.pread(pagemap.fileno(), pages * 8, address // PAGE * 8)
        return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def end(pid: int) -> None:
    """Kill a process that a victim forked; the victim reaps it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
