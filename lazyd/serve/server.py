# SPDX-License-Identifier: MIT
"""The listening side of the page server: a thread for each client, until a signal ends it.

A client that fails, stalls or asks nonsense is its own thread's trouble. What all share is bounded: at CLIENTS_MAX
clients at once the next one is hung up on, and said so.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from lazyd.errors import LazydError
from lazyd.hints import TYPE_CHECKING
from lazyd.limits import raise_descriptor_limit
from lazyd.serve.connection import Desk, serve_connection
from lazyd.tcp import Peer, prepare

if TYPE_CHECKING:
    from lazyd.tls.handshake import Endpoint

CLIENTS_MAX = 512
# What a thread needs is a few frames of Python and of C.
_STACK_BYTES = 512 << 10
_RETRY_S = 0.5


def prepare_process() -> None:
    """Have as many descriptors as may be had, for clients and pages images, and threads that take little."""
    raise_descriptor_limit()
    threading.stack_size(_STACK_BYTES)


def serve_client(
    connection: socket.socket,
    name: str,
    desk: Desk,
    endpoint: Endpoint | None = None,
    note: Callable[[socket.socket], None] = lambda _: None,
) -> bool:
    """Serve one connected client, by TLS if there is an endpoint, and close the connection.

    Return whether it ended well; nothing is raised. `note` is told the socket which, shut down by another thread, ends
    the session.
    """
    with connection:
        note(connection)
        if endpoint is None:
            return serve_connection(connection, name, desk)
        prepare(connection, Peer.MAY_PAUSE)
        from lazyd.tls.pump import How, Runs  # noqa: PLC0415  ssl takes its time

        try:
            with endpoint.open(connection, name, runs=Runs.IN_THREAD) as tunnel:
                note(tunnel.plain)
                is_well = serve_connection(tunnel.plain, name, desk)
            ending = tunnel.ending()
            if ending is not None and ending.how is not How.CLOSED:
                desk.log.error(f"{name}: {ending.reason}")
                return False
            return is_well
        except LazydError as error:
            desk.log.error(str(error))
            return False


class Server:
    """Serves clients, each in a thread, until a byte comes from the descriptor `stop`."""

    def __init__(self, desk: Desk, endpoint: Endpoint | None = None) -> None:
        self._desk = desk
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._clients: dict[threading.Thread, socket.socket] = {}
        self._is_crowded = False
        self._is_ending = False

    def run(self, listener: socket.socket, stop: int) -> None:
        """Serve whoever connects to a listening socket, which is the caller's; then hang up, and wait for all."""
        listener.setblocking(False)  # noqa: FBT003  its only way
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(stop, select.POLLIN)
        while stop not in dict(poll.poll()):
            self._accept(listener)
        self._end()

    def run_one(self, connection: socket.socket, name: str, stop: int) -> bool:
        """Serve one client; return whether it ended well."""
        results: list[bool] = []
        reading, writing = socket.socketpair()
        with reading:

            def serve() -> None:
                with writing:
                    results.append(self._serve(connection, name))

            self._start(threading.Thread(target=serve, name=name), connection)
            poll = select.poll()
            poll.register(reading, select.POLLIN)
            poll.register(stop, select.POLLIN)
            poll.poll()
            self._end()
        return results == [True]

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, address = listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # gone again
        except OSError as error:
            # No descriptors or no memory: clients that end give some back.
            self._desk.log.error(f"accept: {(error.strerror or str(error)).lower()}")
            time.sleep(_RETRY_S)
            return
        name = _name(address)
        with self._lock:
            is_crowded = len(self._clients) >= CLIENTS_MAX
            is_first, self._is_crowded = is_crowded and not self._is_crowded, is_crowded
        if is_first:
            self._desk.log.error(f"{name}: hung up on, as others that follow: {CLIENTS_MAX} clients are here already")
        if is_crowded:
            connection.close()
            return
        self._start(threading.Thread(target=self._serve, args=(connection, name), name=name), connection)

    def _start(self, thread: threading.Thread, connection: socket.socket) -> None:
        with self._lock:
            self._clients[thread] = connection
        try:
            thread.start()
        except RuntimeError as error:  # the limit on processes
            self._desk.log.error(f"{thread.name}: hung up on: {error}")
            self._forget(thread)
            connection.close()

    def _serve(self, connection: socket.socket, name: str) -> bool:
        thread = threading.current_thread()

        def note(now: socket.socket) -> None:
            with self._lock:
                self._clients[thread] = now
                if self._is_ending:
                    _hang_up(now)

        try:
            self._desk.log.debug(f"{name}: connected")
            return serve_client(connection, name, self._desk, self._endpoint, note)
        finally:
            self._forget(thread)

    def _forget(self, thread: threading.Thread) -> None:
        with self._lock:
            del self._clients[thread]

    def _end(self) -> None:
        with self._lock:
            self._is_ending = True
            clients = dict(self._clients)
            for connection in clients.values():
                _hang_up(connection)
        for thread in clients:
            thread.join()


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):  # it has just ended by itself
        connection.shutdown(socket.SHUT_RDWR)


def _name(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
