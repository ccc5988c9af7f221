# SPDX-License-Identifier: MIT
"""What stands between two ends of a connection in tests: a delay, a cut at any byte, a stall, other chunk sizes."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def compile_relay(folder: Path) -> Path:
    """Compile the delaying relay, once for a folder."""
    program = folder / "relay"
    if not program.exists():
        words = ["gcc", "-std=gnu11", "-O2", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-pthread", "-o", str(program)]
        subprocess.run([*words, str(ROOT / "tests" / "victims" / "relay.c")], check=True)
    return program


@contextlib.contextmanager
def delaying_relay(
    program: Path,
    target: tuple[str, int],
    delay_s: float,
    *,
    address: str = "127.0.0.1",
    port: int = 0,
    enter: Callable[[], None] | None = None,
) -> Iterator[int]:
    """Run a relay that holds every byte back for delay_s in either direction; yield the port that it listens at.

    `enter` puts it into a host, as Host.enter does.
    """
    words = [str(program), address, str(port), target[0], str(target[1]), str(round(delay_s * 1e6))]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, preexec_fn=enter)  # noqa: PLW1509
    try:
        line = process.stdout.readline()
        assert line, f"the relay ended with {process.wait()}"
        yield int(line)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Way(Enum):
    """How a cut connection ends, for both sides."""

    RESET = 0
    """As by a peer that has died: what the other side has not read yet may be lost."""
    END = 1
    """As by a peer that has hung up in good order."""
    STALL = 2
    """Not at all: nothing passes any more."""


@dataclass
class Plan:
    """What happens to one connection: after so many bytes in a direction (None: never) it is cut.

    After none it is cut when the first one comes: not before the client sees that it is connected.
    """

    after_up: int | None = None
    after_down: int | None = None
    way: Way = Way.RESET
    chunk: Callable[[], int] = lambda: 1 << 16
    """How many bytes are passed on at most at a time; each time it is asked anew."""


@dataclass
class Passed:
    """How much of a connection has come through. Up is from the client to the server."""

    up: int = 0
    down: int = 0
    is_cut: bool = False


class CuttingProxy:
    """Passes connections on to a target, each by its plan; without a plan, whole. As a context manager it ends."""

    def __init__(self, target: tuple[str, int], plans: Iterable[Plan] = (), address: str = "127.0.0.1") -> None:
        self.connections: list[Passed] = []
        self._target = target
        self._plans = iter(plans)
        self._listening = socket.create_server((address, 0))
        self._address = address
        self._end, self._wake = socket.socketpair()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def port(self) -> int:
        """The port that it listens at."""
        return self._listening.getsockname()[1]

    def _accept(self) -> None:
        while True:
            readable, _, _ = select.select([self._listening, self._end], [], [])
            if self._end in readable:
                return
            client, _ = self._listening.accept()
            passed = Passed()
            self.connections.append(passed)
            try:  # here: to the target they come in the order in which they came
                server = socket.create_connection(self._target)
            except OSError:
                _reset(client)
                client.close()
                continue
            arguments = (client, server, next(self._plans, Plan()), passed)
            self._threads.append(threading.Thread(target=self._serve, args=arguments))
            self._threads[-1].start()

    def _serve(self, client: socket.socket, server: socket.socket, plan: Plan, passed: Passed) -> None:
        with client, server:
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            way = self._pass_on(client, server, plan, passed)
            if way is Way.STALL:
                select.select([self._end], [], [])
            elif way is Way.RESET:
                _reset(client)
                _reset(server)

    def _pass_on(self, client: socket.socket, server: socket.socket, plan: Plan, passed: Passed) -> Way:
        """Pass bytes on until both have ended, or the plan says so; return how to end."""
        limits = {client: plan.after_up, server: plan.after_down}
        counts = {client: 0, server: 0}
        others = {client: server, server: client}
        reading = [client, server]
        while reading:
            if any(limit and counts[one] >= limit for one, limit in limits.items()):
                passed.is_cut = True
                return plan.way
            readable, _, _ = select.select([*reading, self._end], [], [])
            if self._end in readable:
                return Way.RESET
            if 0 in limits.values():
                passed.is_cut = True
                return plan.way
            one = readable[0]
            limit = limits[one]
            wanted = plan.chunk() if limit is None else min(plan.chunk(), limit - counts[one])
            try:
                content = one.recv(wanted)
                if content:
                    others[one].sendall(content)
                else:
                    reading.remove(one)
                    others[one].shutdown(socket.SHUT_WR)
            except OSError:
                return Way.RESET
            counts[one] += len(content)
            passed.up, passed.down = counts[client], counts[server]
        return Way.END

    def close(self) -> None:
        """End all connections."""
        self._wake.close()
        for thread in self._threads:
            thread.join()
        self._listening.close()
        self._end.close()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _reset(connection: socket.socket) -> None:
    """Have closing send a reset (socket(7), SO_LINGER of no time)."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
