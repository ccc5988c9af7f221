# SPDX-License-Identifier: MIT
"""What is known of a task's writes between two dumps, and who keeps it meanwhile.

A tracker says which pages are clean since one dump, the one whose images it is bound to; on top of other images it
knows nothing. cbits/track.c has the facts of the tracking itself. What is added here is the proof that the two belong
together: the task is the same process (its start time), runs the same program (exec makes new memory), and the images
are the same file (inode, size, time of last change) that the tracker's dump has published.

Whatever cannot be proven is not known: then the next dump takes every page.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lazyd.dump import holder
from lazyd.dump.core import AreaList, Scanner, Track, open_tracking, track_method
from lazyd.errors import DumpError, LazydError, SystemCallError
from lazyd.hints import Any
from lazyd.target.process import stat_fields

_ANSWER_MAX = 64 << 10
_SAID_MAX = 64 << 10
_TIMEOUT_S = 10.0


def needs_uffd() -> bool:
    """Say whether a tracker needs a userfaultfd from inside the task; DumpError if this kernel tracks no writes."""
    track = track_method()
    if track is Track.NONE:
        reason = "needs userfaultfd's asynchronous write-protection (Linux 6.7) or soft-dirty bits"
        raise DumpError(f"this kernel cannot say which pages a task writes: a pre-dump {reason}")
    return track is Track.UFFD


class Tracker:
    """What tracks the writes of one task. It owns its userfaultfd until close() or leave()."""

    def __init__(self, pid: int, track: Track, uffd: int, *, has_baseline: bool, is_borrowed: bool = False) -> None:
        self.pid = pid
        self.track = track
        self.has_baseline = has_baseline
        """Say whether it has tracked since the dump that the next one is made on top of."""
        self._uffd = uffd
        self._is_borrowed = is_borrowed
        self._lost = "nothing has been tracked yet"

    @property
    def is_free(self) -> bool:
        """Say whether it may begin anew: no images go by what it knows, and nobody else has it."""
        return self.track is Track.UFFD and not self._is_borrowed and not self.has_baseline

    @classmethod
    def start(cls, pid: int, uffd: int = -1) -> Tracker:
        """Start anew. `uffd` was opened in the task if needs_uffd(), and is owned from here on, also on errors.

        Open it with UFFD_USER_MODE_ONLY, which any task may: tracking never stops the kernel's own writes.
        """
        if not needs_uffd():
            if uffd >= 0:
                os.close(uffd)
            return cls(pid, Track.SOFT_DIRTY, -1, has_baseline=False)
        try:
            open_tracking(uffd)
        except OSError as error:
            os.close(uffd)
            raise SystemCallError("UFFDIO_API", error.errno or 0) from error
        return cls(pid, Track.UFFD, uffd, has_baseline=False)

    def check(self, scanner: Scanner, areas: AreaList) -> bool:
        """Find out which areas can be trusted; False if none, because nothing has been tracked."""
        return self.has_baseline and scanner.check_trust(areas, self.track, self._uffd)

    def arm(self, scanner: Scanner, areas: AreaList) -> int:
        """Track from here on; return in how many areas. 0 if the tracking is lost: the next dump is a full one."""
        assert not self._is_borrowed, "whoever holds it would go on to believe what it knows"
        self.has_baseline = False
        try:
            armed = scanner.arm(areas, self.track, self._uffd)
        except OSError as error:
            self._lost = f"the kernel does not protect its memory: {error.strerror}"
            self.close()
            return 0
        self.has_baseline = True
        return armed

    def leave(self, images: Path, pagemap_name: str) -> str:
        """Leave the tracking to a process of its own, bound to published images; return why that cannot be, else "".

        The images are whole in any case, and without it the next dump is a full one: nothing to fail for. The process
        ends with its task, or when a dump takes over.
        """
        try:
            if not self.has_baseline:
                return self._lost
            self._leave(images, pagemap_name)
        except OSError as error:
            return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        except LazydError as error:
            return str(error)
        finally:
            self.close()
        return ""

    def _leave(self, images: Path, pagemap_name: str) -> None:
        binding = {
            "process": _identity(self.pid),
            "image": _identity_of_file(images, pagemap_name),
            "track": self.track,
        }
        path = _socket_path(self.pid)
        pidfd = os.pidfd_open(self.pid)
        try:
            listener = _listen(path)
        except BaseException:
            os.close(pidfd)
            raise
        try:
            fds = [listener.fileno(), pidfd, self._uffd]
            # Not by -m: that would import all of lazyd.
            words = [sys.executable, "-I", "-S", holder.__file__, json.dumps(binding), str(path), *map(str, fds)]
            null = subprocess.DEVNULL
            # What it says goes to a file, not a pipe: who waits for a pipe's end would wait for the holder's.
            with os.fdopen(os.memfd_create("lazyd-said"), "w+b", buffering=0) as said:
                run = subprocess.run(
                    words,
                    check=False,
                    stdin=null,
                    stdout=null,
                    stderr=said,
                    cwd="/",
                    start_new_session=True,
                    pass_fds=[fd for fd in fds if fd >= 0],
                )
                if run.returncode:
                    said.seek(0)
                    lines = said.read(_SAID_MAX).decode(errors="replace").strip().splitlines()
                    why = lines[-1] if lines else f"it ended with {run.returncode}"
                    raise DumpError(f"the process that is to hold the tracking: {why}")
        except BaseException:
            # An interrupt, say: whoever was started may be there by now, and is not to stay.
            listener.close()
            with contextlib.suppress(OSError, ValueError):
                if (fd := _ask(path, b"T")[1]) >= 0:
                    os.close(fd)
            path.unlink(missing_ok=True)
            raise
        finally:
            listener.close()
            os.close(pidfd)

    def close(self) -> None:
        """Give the tracking up, unless it was left to somebody; a second call does nothing."""
        self.has_baseline = False
        if self._uffd >= 0:
            os.close(self._uffd)
            self._uffd = -1


def take(pid: int, parent: Path | None, pagemap_name: str, *, to_track: bool) -> Tracker | None:
    """Get what tracks a task from the process that holds it; None if there is none, or it is of another process.

    parent: the images that the next dump is made on top of; unless the tracker is bound to them it has no baseline.
    to_track: the dump will begin to track anew, so that the holder ends here and now; else it stays as it is.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, LazydError):
        answer, uffd = _ask(_socket_path(pid), b"T" if to_track else b"B")
        try:
            track = Track(answer["track"])
            if answer["process"] != _identity(pid) or (track is Track.UFFD) != (uffd >= 0):
                raise ValueError("another process, or another program in it")
            image = None if parent is None else _identity_of_file(parent, pagemap_name)
            is_bound = image is not None and answer["image"] == image
            return Tracker(pid, track, uffd, has_baseline=is_bound, is_borrowed=not to_track)
        except BaseException:
            if uffd >= 0:
                os.close(uffd)
            raise
    return None


def _ask(path: Path, letter: bytes) -> tuple[dict[str, Any], int]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(_TIMEOUT_S)
        with _short(path) as name:
            connection.connect(name)
        connection.send(letter)
        message, fds, _, _ = socket.recv_fds(connection, _ANSWER_MAX, 1)
    try:
        answer = json.loads(message)
        if not isinstance(answer, dict):
            raise ValueError("not what a tracker says")
    except ValueError:
        for fd in fds:
            os.close(fd)
        raise
    return answer, fds[0] if fds else -1


def _identity(pid: int) -> list[int]:
    """Return what says that a task is still the same process and still runs the same program.

    proc(5), stat: 22 start time, 26 start of code, 28 start of stack, 47 start of heap; exec makes the last three
    anew, at random places.
    """
    fields = stat_fields(pid)
    return [pid, *(int(fields[number - 3]) for number in (22, 26, 28, 47))]


def _identity_of_file(images: Path, name: str) -> list[int] | None:
    """Return what says that a file is the same and unchanged; None if it is not there."""
    if not (images / name).exists():
        return None
    status = (images / name).stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def _socket_path(pid: int) -> Path:
    """Return where the holder of a task listens: by its pid, so that there is one for a task."""
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return _runtime_directory() / f"tracker-{namespace}-{pid}.socket"


def _runtime_directory() -> Path:
    """Return a folder that only we may look into, made if need be."""
    if os.geteuid() == 0:
        path = Path("/run/lazyd")
    elif "XDG_RUNTIME_DIR" in os.environ:
        path = Path(os.environ["XDG_RUNTIME_DIR"]) / "lazyd"
    else:
        path = Path(f"/tmp/lazyd-{os.geteuid()}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SystemCallError("mkdir", error.errno or 0, path=path, hint="trackers listen there") from error
    status = path.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o77 or path.is_symlink():
        raise DumpError(f"{path}: not a folder of ours alone (mode 700); remove it")
    return path


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """Name a socket's path by its open folder: no folder is too deep then for the 108 bytes of sun_path (unix(7))."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _listen(path: Path) -> socket.socket:
    """Listen under a name, in place of whoever did before."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        fresh.unlink(missing_ok=True)
        with _short(fresh) as name:
            listener.bind(name)
        listener.listen(8)
        fresh.rename(path)
    except OSError as error:
        listener.close()
        fresh.unlink(missing_ok=True)
        raise SystemCallError("bind", error.errno or 0, path=path) from error
    return listener
