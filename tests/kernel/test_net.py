# SPDX-License-Identifier: MIT
"""Hosts made of network namespaces, the links between them, and peers that die on them."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from lazyd.errors import SystemCallError
from lazyd.net import Network
from lazyd.tcp import Peer, connect, is_silent, listen, prepare

PORT = 7000


@pytest.fixture(scope="module", autouse=True)
def _root():
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")


@pytest.fixture
def network():
    with Network() as one:
        yield one


def devices() -> set[str]:
    """The devices that this thread sees."""
    return {name for _, name in socket.if_nameindex()}


def pair(network, **options):
    """Join two hosts; return both ends of a connection between them."""
    first, second = network.host("first"), network.host("second")
    link = network.join(first, second, **options)
    with first.inside():
        listening = listen(link.first, PORT)
    with second.inside():
        there = connect(link.first, PORT, Peer.ALWAYS_READS)
    here, _ = listening.accept()
    listening.close()
    return here, there


def test_hosts_are_apart_and_leave_nothing(network):
    before = devices()
    first, second = network.host("first"), network.host("second")
    network.join(first, second)
    network.join(first, second)
    assert devices() == before
    with first.inside():
        assert devices() == {"lo", "to-second0", "to-second1"}
    words = [sys.executable, "-c", "import socket; print(sorted(n for _, n in socket.if_nameindex()))"]
    seen = subprocess.run(words, preexec_fn=second.enter, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert seen == "['lo', 'to-first0', 'to-first1']\n"
    second.close()  # and with a host, its links end
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with first.inside():
            left = devices()
        if left == {"lo"}:
            break
        time.sleep(0.01)
    assert left == {"lo"}


@pytest.mark.parametrize("rate", [10**8, 10**9])
def test_a_link_keeps_its_rate(network, rate):
    here, there = pair(network, rate_bits=rate)
    length = rate // 8 // 4  # a quarter of a second
    sender = threading.Thread(target=here.sendall, args=(bytes(length),))
    with here, there:
        begun = time.monotonic()
        sender.start()
        left = length
        while left:
            left -= len(there.recv(min(left, 1 << 20)))
        took = time.monotonic() - begun
        sender.join()
    assert 0.2 < took < 0.5


def test_dead_peers_are_noticed_and_one_that_only_pauses_is_none(network):
    """Four connections at once over links of which one is cut: idle, asked, sending; and one that is not read."""
    soon, first, second = 2, network.host("first"), network.host("second")
    cut, whole = network.join(first, second), network.join(first, second)
    with contextlib.ExitStack() as stack:

        def connection(link):
            with first.inside():
                listening = listen(link.first, PORT)
            with second.inside():
                there = stack.enter_context(connect(link.first, PORT, Peer.MAY_PAUSE))
            here, _ = listening.accept()
            listening.close()
            stack.enter_context(here)
            return here, there

        (idle, _), (_, asked), (sending, _), (pausing, _) = map(connection, (cut, cut, cut, whole))
        prepare(idle, Peer.MAY_PAUSE, soon)
        prepare(asked, Peer.ALWAYS_READS, soon)
        prepare(sending, Peer.MAY_PAUSE, soon)
        prepare(pausing, Peer.MAY_PAUSE, soon)
        pausing.settimeout(0)
        with pytest.raises(BlockingIOError):
            while True:
                pausing.send(bytes(1 << 16))
        cut.cut()
        begun = time.monotonic()
        asked.sendall(b"give me")
        sending.sendall(b"bytes")
        assert not is_silent(sending, soon)
        for one in (idle, asked):
            one.settimeout(10)
            with pytest.raises(OSError, match="Errno") as noticed:
                one.recv(1)
            assert noticed.value.errno == errno.ETIMEDOUT
        while not is_silent(sending, soon):
            assert time.monotonic() - begun < 10
            time.sleep(0.01)
        assert soon <= time.monotonic() - begun < 4 * soon
        # The kernel asks one that does not read less and less often: the gap is longer than the time that tells death.
        time.sleep(max(0, begun + 3 * soon - time.monotonic()))
        assert not is_silent(pausing, soon)
        assert pausing.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_a_mended_link_carries_on(network):
    first, second = network.host("first"), network.host("second")
    link = network.join(first, second, rate_bits=10**9)
    with first.inside():
        listening = listen(link.first, PORT)
    link.cut()
    with second.inside(), pytest.raises(SystemCallError, match="ETIMEDOUT"):
        connect(link.first, PORT, Peer.ALWAYS_READS, timeout_s=0.1)
    link.mend()
    with second.inside():
        connect(link.first, PORT, Peer.ALWAYS_READS).close()
    listening.close()


def test_connecting_and_listening_say_in_one_line_what_is_wrong(network):
    host = network.host("alone")
    with host.inside():
        with listen("127.0.0.1", PORT):
            with pytest.raises(SystemCallError, match=r"^127.0.0.1:7000: listen: EADDRINUSE.*another program") as taken:
                listen("127.0.0.1", PORT)
            assert taken.value.number == errno.EADDRINUSE
        with pytest.raises(SystemCallError, match=r"^127.0.0.1:7000: connect: ECONNREFUSED.*the other end"):
            connect("127.0.0.1", PORT, Peer.ALWAYS_READS)
        with pytest.raises(SystemCallError, match=r"^10.9.9.9:7000: connect: ENETUNREACH.*no route"):
            connect("10.9.9.9", PORT, Peer.ALWAYS_READS)
        with pytest.raises(SystemCallError, match=r"^10.9.9.9:7000: listen: EADDRNOTAVAIL.*no interface"):
            listen("10.9.9.9", PORT)
        with listen("::1", 0) as listening:
            connect("::1", listening.getsockname()[1], Peer.MAY_PAUSE).close()


def test_a_killed_process_leaves_no_host(network):
    """Its namespaces have no names: the link's end here disappears with the other one."""
    here = network.host("here")
    code = f"""
import os, time
from lazyd import net
with net.Network() as network:
    class Here(net.Host):
        def __init__(self): self.name, self.links, self._descriptor = "here", 0, {here.fileno()}
    network.join(Here(), network.host("there"))
    print("up", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, pass_fds=[here.fileno()])
    assert process.stdout.readline() == b"up\n"
    with here.inside():
        assert devices() == {"lo", "to-there0"}
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 10
    left = {""}
    while left != {"lo"} and time.monotonic() < end:
        time.sleep(0.01)
        with here.inside():
            left = devices()
    assert left == {"lo"}
