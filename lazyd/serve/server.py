# SPDX-License-Identifier: MIT
"""The listening side of the page server: a thread for each client, until a signal ends it.

A client that fails, stalls or asks nonsense is its own thread's trouble. What all share is bounded: at CLIENTS_MAX
clients at once the next one is hung up on, and said so.
"""

from __future__ import annotations

import resource
import select
import socket
import threading
import time
from contextlib import suppress

from lazyd.serve.connection import Desk, serve_connection

CLIENTS_MAX = 512
# What a thread needs is a few frames of Python and of C.
_STACK_BYTES = 512 << 10
_RETRY_S = 0.5


class Server:
    """Serves whoever connects to a listening socket, which is the caller's."""

    def __init__(self, listener: socket.socket, desk: Desk) -> None:
        self._listener = listener
        self._desk = desk
        self._lock = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._is_crowded = False

    def run(self, stop: int) -> None:
        """Serve until the descriptor `stop` can be read; then hang up on all clients, and wait for their threads."""
        _raise_descriptor_limit()
        threading.stack_size(_STACK_BYTES)
        self._listener.setblocking(False)  # noqa: FBT003  its only way
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(stop, select.POLLIN)
        while stop not in dict(poll.poll()):
            self._accept()
        self._end()

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # gone again
        except OSError as error:
            # No descriptors or no memory: clients that end give some back.
            self._desk.log.error(f"accept: {(error.strerror or str(error)).lower()}")
            time.sleep(_RETRY_S)
            return
        name = _name(address)
        with self._lock:
            if len(self._clients) < CLIENTS_MAX:
                thread = threading.Thread(target=self._serve, args=(connection, name), name=name)
                self._clients[connection] = thread
                self._is_crowded = False
                try:
                    thread.start()
                except RuntimeError as error:  # the limit on processes
                    del self._clients[connection]
                    self._desk.log.error(f"{name}: hung up on: {error}")
                    connection.close()
                return
            first, self._is_crowded = not self._is_crowded, True
        if first:
            self._desk.log.error(f"{name}: hung up on, as others that follow: {CLIENTS_MAX} clients are here already")
        connection.close()

    def _serve(self, connection: socket.socket, name: str) -> None:
        try:
            self._desk.log.debug(f"{name}: connected")
            serve_connection(connection, name, self._desk)
        finally:
            with self._lock:
                del self._clients[connection]
                connection.close()

    def _end(self) -> None:
        with self._lock:
            threads = list(self._clients.values())
            for connection in self._clients:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def _name(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _raise_descriptor_limit() -> None:
    """Have as many descriptors as may be had: every client needs some, and every pages image that is served."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
