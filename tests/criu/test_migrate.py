# SPDX-License-Identifier: MIT
"""`lazyd migrate` between two hosts, which are network namespaces: it works, or the program goes on where it was."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import harness
import migration
import pki
import pytest

from lazyd.net import Network, firewall_tables

PORT = 27100


class Hosts:
    """Two hosts, and a program at the first."""

    def __init__(self, stack, suite, command, folder):
        self.suite, self.folder, self.state = suite, folder, folder / "state"
        network = stack.enter_context(Network())
        self.there, self.here = network.host("source"), network.host("destination")
        self.link = network.join(self.there, self.here)
        stack.enter_context(migration.large_pipes())
        self.pid = stack.enter_context(migration._program(command, self.state, self.there.enter))
        self._stack = stack
        self.images, self.pidfile = folder / "images", folder / "restored.pid"

    def _start(self, host, name, words, criu):
        log = self.folder / name
        words = [*harness.lazyd_command(), "migrate", *words, "--criu", criu or harness.criu_command(self.suite), "-j"]
        with log.open("wb") as out:
            null = subprocess.DEVNULL
            process = subprocess.Popen(words, stdin=null, stdout=out, stderr=out, preexec_fn=host.enter)  # noqa: PLW1509
        self._stack.callback(self._end, process)
        return process, log

    @staticmethod
    def _end(process):
        family = [process.pid, *harness.descendants(process.pid)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def destination(self, *extra, criu=None):
        """Start the destination; return (process, log) once it listens."""
        words = ["--listen", f"{self.link.second}:{PORT}", "-D", str(self.images), "--pidfile", str(self.pidfile)]
        process, log = self._start(self.here, "destination.log", [*words, *extra], criu)
        self._stack.callback(self.end_copy)
        harness.wait_until(lambda: "waiting for a migration" in log.read_text() or process.poll() is not None, "it")
        return process, log

    def source(self, *extra, criu=None):
        words = ["--pid", str(self.pid), "--to", f"{self.link.second}:{PORT}", *extra]
        return self._start(self.there, "source.log", words, criu)

    def end_copy(self):
        if self.pidfile.exists():
            migration.end_copy(int(self.pidfile.read_text()))

    @property
    def result(self):
        with contextlib.suppress(FileNotFoundError):
            return (self.state / "result").read_text()
        return ""

    @property
    def task_state(self):
        """The source task's state as ps shows it; "" if it is gone."""
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{self.pid}/stat").read_text()
            return text[text.rindex(")") + 2].strip("Z")
        return ""

    def logs(self):
        names = (
            "source.log",
            "destination.log",
            "images/lazy-pages.log",
            "images/lazy-pages.out",
            "images/restore.log",
        )
        return "\n".join(harness.tail(self.folder / name) for name in names)

    def assert_goes_on(self):
        """The program at the source finds its memory as it was, and nobody else has run."""
        assert self.result == ""
        (self.state / "go").touch()
        harness.wait_until(lambda: self.result.endswith("\n"), f"the verdict\n{self.logs()}")
        assert self.result == "ok\n"


@pytest.fixture
def hosts(request, suite, victim, tmp_path):
    scenario = "tree" if "tree" in request.node.name else "plain"
    with contextlib.ExitStack() as stack:
        yield Hosts(stack, suite, [str(victim), scenario, str(tmp_path / "state")], tmp_path)


@pytest.fixture
def old_hosts(victim, tmp_path):
    """With criu 4.1.1, for what is the same in both."""
    with contextlib.ExitStack() as stack:
        yield Hosts(stack, "trixie", [str(victim), "plain", str(tmp_path / "state")], tmp_path)


def wait(process, hosts):
    try:
        return process.wait(harness.TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it does not end\n{hosts.logs()}") from None


@pytest.mark.parametrize("what", ["tree", "by TLS"])
def test_a_program_migrates(hosts, what, tmp_path):
    extra = [(), ()]
    if what == "by TLS":
        authority = pki.Authority(tmp_path / "pki")
        extra = [authority.sign(name, ("10.77.0.2",)).options(authority) for name in ("destination", "source")]
    (destination, log), (source, source_log) = hosts.destination(*extra[0]), hosts.source(*extra[1])
    harness.wait_until(lambda: "is stopped" in source_log.read_text() or source.poll() is not None, "the dump")
    (hosts.state / "go").touch()  # its copy works while it fills
    assert wait(source, hosts) == 0, hosts.logs()
    assert wait(destination, hosts) == 0, hosts.logs()
    harness.wait_until(lambda: hosts.result.endswith("\n"), f"the verdict\n{hosts.logs()}")
    assert hosts.result == "ok\n"
    assert hosts.task_state == ""
    said = source_log.read_text()
    assert re.search(r"running at 10\.77\.0\.2:27100; it was stopped for [\d.]+ (ms|s) at most", said)
    assert re.search(r"pages: [\d.]+ MiB in \d+ requests, round trip", said)
    assert "faults: " in log.read_text()


_CONNECTED = """
import pathlib, socket, sys, time
state = pathlib.Path(sys.argv[1])
listening = socket.create_server(("127.0.0.1", 0))
one = socket.create_connection(listening.getsockname())
other, _ = listening.accept()
one.send(b"sent before")
(state / "ready").touch()
while not (state / "go").exists():
    time.sleep(0.001)
one.send(b", and after")
got = b""
while len(got) < 22:
    got += other.recv(100)
(state / "result").write_text("ok\\n" if got == b"sent before, and after" else repr(got))
"""


@pytest.mark.parametrize("unlock", [False, True])
def test_connections_go_along_and_the_network_is_locked(victim, tmp_path, unlock):
    """With criu 4.2.1: 4.1.1 cannot dump a TCP socket on Linux 6.18."""
    if not Path(harness.criu_command("sid")).exists():
        pytest.skip("no CRIU of sid: run scripts/get-criu sid")
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-c", _CONNECTED, str(tmp_path / "state")]
        hosts = Hosts(stack, "sid", command, tmp_path)
        extra = ["--tcp-established", "--network-lock", "nftables"]
        (destination, _), (source, log) = hosts.destination(*extra), hosts.source(*extra, *["--unlock-source"] * unlock)
        assert wait(source, hosts) == 0, hosts.logs()
        assert wait(destination, hosts) == 0, hosts.logs()
        (hosts.state / "go").touch()
        harness.wait_until(lambda: hosts.result, "the verdict")
        assert hosts.result == "ok\n"
        with hosts.there.inside():
            left = firewall_tables("CRIU-")
        assert len(left) == (not unlock)
        with hosts.here.inside():
            assert not firewall_tables("CRIU-")
        said = "the network is unlocked" if unlock else f"nft delete table inet {next(iter(left))}"
        assert said in log.read_text()


def test_a_restore_that_fails_leaves_the_program_at_the_source(hosts, tmp_path):
    """criu restore fails at once; nothing has run there."""
    broken = tmp_path / "criu"
    broken.write_text("#!/bin/sh\necho no restore today >&2\nexit 1\n")
    broken.chmod(0o755)
    (destination, log), (source, source_log) = hosts.destination(criu=str(broken)), hosts.source()
    assert wait(destination, hosts) == 1
    assert wait(source, hosts) == 1
    assert "no restore today" in log.read_text()
    assert source_log.read_text().splitlines()[-1].endswith("criu restore: no restore today; the task goes on here")
    hosts.assert_goes_on()


def test_a_full_disk_at_the_destination_leaves_the_program(old_hosts):
    """And nothing in the way of the next try."""
    hosts = old_hosts
    hosts.images.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", hosts.images], check=True)
    try:
        (destination, log), (source, source_log) = hosts.destination(), hosts.source()
        assert wait(destination, hosts) == 1
        assert wait(source, hosts) == 1
        assert "ENOSPC" in log.read_text().splitlines()[-1]
        assert "ENOSPC" in source_log.read_text().splitlines()[-1]
        assert not [path for path in hosts.images.iterdir() if path.suffix not in {".log", ".out"}]
    finally:
        subprocess.run(["umount", hosts.images], check=True)
    hosts.assert_goes_on()


@contextlib.contextmanager
def false_destination(hosts):
    """Take a source's connections and images as a destination would; yield (source, its log, control, link)."""
    with hosts.here.inside(), socket.create_server((hosts.link.second, PORT)) as listener:
        source, log = hosts.source()
        control, _ = listener.accept()
        control.sendall(message(b'{"word": "welcome"}'))
        link, _ = listener.accept()
        control.sendall(message(b'{"word": "linked"}'))
    with control, link:
        control.settimeout(harness.TIMEOUT_S)
        end = b'"word": "images"'
        last = b""
        while end not in last:
            last = last[-len(end) :] + control.recv(1 << 16)
        yield source, log, control, link


def test_a_source_that_is_killed_before_leaves_its_program(hosts):
    """Killed when it has the task stopped and has sent its images."""
    with false_destination(hosts) as (source, _, _, _):
        assert hosts.task_state in {"t", "T"}
        source.kill()
        source.wait()
        harness.wait_until(lambda: hosts.task_state not in {"t", "T"}, "it to go on")
        hosts.assert_goes_on()


def test_a_destination_that_dies_before_leaves_the_program(old_hosts):
    hosts = old_hosts
    with false_destination(hosts) as (source, _, control, link):
        control.close()
        link.close()
        assert wait(source, hosts) == 1
        hosts.assert_goes_on()


@pytest.mark.parametrize("decision", [signal.SIGUSR1, signal.SIGTERM])
def test_a_destination_that_dies_after_go_holds_the_program_until_somebody_decides(old_hosts, decision):
    hosts = old_hosts
    with false_destination(hosts) as (source, log, control, _):
        control.sendall(message(b'{"word": "restoring"}') + message(b'{"word": "running", "pid": 1}'))
        harness.wait_until(lambda: "running at" in log.read_text(), "it to hear that")
        source.terminate()  # not now
        harness.wait_until(lambda: "not now" in log.read_text(), "it to say so")
    harness.wait_until(lambda: "is held" in log.read_text(), "it to hold")
    time.sleep(0.3)
    assert hosts.task_state in {"t", "T"}
    source.send_signal(decision)
    assert wait(source, hosts) == 1
    if decision is signal.SIGUSR1:
        hosts.assert_goes_on()
    else:
        harness.wait_until(lambda: not hosts.task_state, "its end")


@pytest.mark.parametrize("decision", [signal.SIGUSR1, signal.SIGTERM])
def test_a_source_that_is_killed_after_go_leaves_the_program_held(old_hosts, decision):
    hosts = old_hosts
    with false_destination(hosts) as (source, log, control, _):
        control.sendall(message(b'{"word": "restoring"}') + message(b'{"word": "running", "pid": 1}'))
        harness.wait_until(lambda: "running at" in log.read_text(), "it to hear that")
        source.kill()
        source.wait()
        harness.wait_until(lambda: "is held" in log.read_text(), "what is left to say so")
        assert hosts.task_state in {"t", "T"}
        holder = int(re.search(r"kill -USR1 (\d+)", log.read_text())[1])
        os.kill(holder, decision)
    if decision is signal.SIGUSR1:
        hosts.assert_goes_on()
    else:
        harness.wait_until(lambda: not hosts.task_state, "its end")
        assert not hosts.result


def test_a_link_for_pages_that_breaks_holds_the_program(old_hosts):
    hosts = old_hosts
    with false_destination(hosts) as (source, log, control, link):
        control.sendall(message(b'{"word": "restoring"}') + message(b'{"word": "running", "pid": 1}'))
        link.close()
        harness.wait_until(lambda: "the connection for pages is gone" in log.read_text(), "it to say so")
        assert "is held" in log.read_text()
        assert hosts.task_state in {"t", "T"}
        source.send_signal(signal.SIGUSR1)
        assert wait(source, hosts) == 1
    hosts.assert_goes_on()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "says what is no message of lazyd migrate"),
        (b"", "(hung up|the connection is gone: connection reset by peer)"),
        (b"\x20\0\0\0" + b"x" * 32, "says what is no message of lazyd migrate"),
    ],
)
def test_a_destination_that_is_none_changes_nothing(old_hosts, answer, said):
    hosts = old_hosts
    with hosts.here.inside(), socket.create_server((hosts.link.second, PORT)) as listener:
        source, log = hosts.source()
        control, _ = listener.accept()
        control.sendall(answer)
        control.close()
        assert wait(source, hosts) == 1
    assert re.fullmatch(rf"{hosts.link.second}:{PORT}: {said}\n", log.read_text())
    assert hosts.task_state in {"S", "R"}


def message(content: bytes) -> bytes:
    return len(content).to_bytes(4, "little") + content
