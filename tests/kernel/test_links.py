# SPDX-License-Identifier: MIT
"""The tests' own links: a relay that delays and no more, and a proxy that cuts at exactly the byte it is told."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import threading
import time

import links
import pytest
from links import CuttingProxy, Plan, Way


@pytest.fixture(scope="module")
def relay(tmp_path_factory):
    return links.compile_relay(tmp_path_factory.mktemp("relay"))


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def ends(port, server):
    """Return both ends of a connection through what listens at a port."""
    client = socket.create_connection(("127.0.0.1", port))
    there, _ = server.accept()
    for one in (client, there):
        one.settimeout(20)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, there


def receive(connection, length):
    content = bytearray()
    while len(content) < length and (some := connection.recv(1 << 20)):
        content += some
    return bytes(content)


def test_relay_delays_both_ways_and_what_is_in_flight_is_not_limited(relay, server):
    delay, length = 0.1, 48 << 20
    content = os.urandom(1 << 20) * (length >> 20)
    with links.delaying_relay(relay, server.getsockname(), delay) as port:
        client, there = ends(port, server)
        with client, there:
            times = []
            for one, other in ((client, there), (there, client)) * 2:
                begun = time.monotonic()
                one.sendall(b"ask")
                assert other.recv(3) == b"ask"
                times.append(time.monotonic() - begun)
            assert min(times) >= delay
            assert min(times[::2]) < delay + 0.02
            assert min(times[1::2]) < delay + 0.02
            begun = time.monotonic()
            sender = threading.Thread(target=there.sendall, args=(content,))
            sender.start()
            sender.join()
            sent = time.monotonic() - begun
            got = receive(client, length)
            took = time.monotonic() - begun
            assert hashlib.sha256(got).digest() == hashlib.sha256(content).digest()
            # Nobody has read while it was sent: the relay took all, far more than sockets hold, with no round trips.
            assert sent < took
            assert took < delay + 2.5  # 1 MiB in flight at a time would take 4.8
            for _ in range(300):  # small ones keep their borders in time, not their sizes
                there.sendall(b"x" * 24)
            assert receive(client, 7200) == b"x" * 7200


def test_relay_passes_an_end_and_a_reset_on(relay, server):
    with links.delaying_relay(relay, server.getsockname(), 0.02) as port:
        client, there = ends(port, server)
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert receive(there, 100) == b"last words"
        there.sendall(b"answer")
        assert client.recv(100) == b"answer"
        links._reset(there)
        there.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        client.close()
        server.close()
        with socket.create_connection(("127.0.0.1", port)) as refused, pytest.raises(ConnectionResetError):
            refused.settimeout(20)
            refused.recv(1)


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("way", [Way.RESET, Way.END])
def test_proxy_cuts_after_each_byte(server, way, up):
    for count in range(8):
        plan = Plan(way=way, **{"after_up" if up else "after_down": count})
        with CuttingProxy(server.getsockname(), [plan]) as proxy:
            client, there = ends(proxy.port, server)
            with client, there:
                sender, receiver = (client, there) if up else (there, client)
                try:
                    sender.send(b"12345678")
                except ConnectionResetError:  # it is cut before
                    assert (way, count) == (Way.RESET, 0)
                    continue
                assert receive(receiver, count) == b"12345678"[:count]
                if way is Way.END:
                    assert receiver.recv(1) == b""
                else:
                    with pytest.raises(ConnectionResetError):
                        receiver.recv(1)
                    # Both ends hear of it.
                    with pytest.raises(ConnectionResetError):
                        sender.recv(1)
            assert proxy.connections[0].is_cut


def test_proxy_stalls_and_then_passes_the_next_connection_whole(server):
    with CuttingProxy(server.getsockname(), [Plan(after_down=5, way=Way.STALL)]) as proxy:
        client, there = ends(proxy.port, server)
        with client, there:
            there.sendall(b"12345678")
            assert receive(client, 5) == b"12345"
            client.settimeout(0.1)
            with pytest.raises(TimeoutError):
                client.recv(1)
            assert proxy.connections[0].is_cut
            second, there_too = ends(proxy.port, server)
            with second, there_too:
                there_too.sendall(b"12345678")
                assert receive(second, 8) == b"12345678"


def test_proxy_cuts_into_other_chunks(server):
    chance = random.Random(5)
    content = chance.randbytes(100_000)
    with CuttingProxy(server.getsockname(), [Plan(chunk=lambda: chance.choice((1, 2, 23, 25, 4095, 4097)))]) as proxy:
        client, there = ends(proxy.port, server)
        with client, there:
            sender = threading.Thread(target=there.sendall, args=(content,))
            sender.start()
            assert receive(client, len(content)) == content
            sender.join()
            client.sendall(content[:1000])
            assert receive(there, 1000) == content[:1000]
    assert (proxy.connections[0].up, proxy.connections[0].down) == (1000, 100_000)
