# SPDX-License-Identifier: MIT
"""The process that stays between two dumps: it holds what tracks a task's writes, and gives it to the next dump.

Run as a program of its own, so that it keeps nothing of the dumper's memory; it imports as little as it can, and
nothing of lazyd. Arguments: the binding as JSON, the path of the listening socket, then the numbers of three
descriptors it inherits: that socket, a pidfd of the task, and the userfaultfd (-1: there is none).

A peer of the same user or root sends one letter and gets the binding and the userfaultfd. B borrows: for a dump that
begins no tracking of its own. T takes: this process ends, for whoever tracks anew changes what is known of writes.
It ends, too, when its task does, and when its socket's name is gone or another's: nobody would find it any more, and
the task's memory would stay protected for nobody. When it dies otherwise, the kernel drops the protection with the
last descriptor, and the next dump finds nobody: then every page counts as written.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
import struct
import sys

LOOK_INTERVAL_MS = 2000


def serve(binding: bytes, path: str, listener: socket.socket, pidfd: int, uffd: int) -> None:
    """Answer peers until the task ends or somebody takes over."""
    number = os.stat(path).st_ino  # noqa: PTH116  pathlib is not worth its import here
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    taken = False
    while not taken:
        ready = [fd for fd, _ in poll.poll(LOOK_INTERVAL_MS)]
        if pidfd in ready or (not ready and not is_ours(path, number)):
            break
        if not ready:
            continue
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(5)
                credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                if struct.unpack("3i", credentials)[1] not in (0, os.geteuid()):
                    continue
                letter = connection.recv(1)
                taken = letter == b"T"
                if taken:
                    remove(path, number)
                if letter in (b"T", b"B"):
                    fds = array.array("i", [uffd] if uffd >= 0 else [])
                    connection.sendmsg([binding], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else [])
    remove(path, number)


def is_ours(path: str, number: int) -> bool:
    """Say whether the name still leads to the socket."""
    with contextlib.suppress(OSError):
        return os.stat(path).st_ino == number  # noqa: PTH116
    return False


def remove(path: str, number: int) -> None:
    """Remove the socket, unless the name is somebody else's by now."""
    with contextlib.suppress(OSError):
        if is_ours(path, number):
            os.unlink(path)  # noqa: PTH108


def main() -> None:
    """Go into the background and serve."""
    if os.fork():
        os._exit(0)
    os.dup2(0, 2)  # so far, who started it read what it had to say
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:  # noqa: PTH123
        comm.write("lazyd-tracker")
    binding, path, listener, pidfd, uffd = sys.argv[1:6]
    serve(binding.encode(), path, socket.socket(fileno=int(listener)), int(pidfd), int(uffd))


if __name__ == "__main__":
    main()
