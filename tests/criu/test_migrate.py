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
from process_harness import command_name

from lazyd.errors import DumpError
from lazyd.migrate import source
from lazyd.net import Network, firewall_tables
from lazyd.report import Log
from lazyd.target.tracing import state_of

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
        self.temporary = folder / "temporary"
        self.temporary.mkdir()

    def _start(self, host, name, words, criu, **more):
        log = self.folder / name
        words = [*harness.lazyd_command(), "migrate", *words, "--criu", criu or harness.criu_command(self.suite), "-j"]
        with log.open("wb") as out:
            null = subprocess.DEVNULL
            streams = {"stdin": null, "stdout": out, "stderr": out} | more
            # One that is killed leaves its folder: in ours.
            variables = os.environ | {"TMPDIR": str(self.temporary)}
            process = subprocess.Popen(words, **streams, env=variables, preexec_fn=host.enter)  # noqa: PLW1509
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

    def source(self, *extra, criu=None, **streams):
        words = ["--pid", str(self.pid), "--to", f"{self.link.second}:{PORT}", *extra]
        return self._start(self.there, "source.log", words, criu, **streams)

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
def false_destination(hosts, **streams):
    """Take a source's connections and images as a destination would; yield (source, its log, control, link)."""
    with hosts.here.inside(), socket.create_server((hosts.link.second, PORT)) as listener:
        source, log = hosts.source(**streams)
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


def family_of(source):
    """What a source has made: (the dumper, who holds the dumper's connection too)."""
    made = harness.descendants(source.pid)
    words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in made}
    (dumper,) = [pid for pid, said in words.items() if b"dump" in said and b"--tree" in said]
    (holder,) = holders_of(source)
    return dumper, holder


def holders_of(source):
    return [pid for pid in harness.descendants(source.pid) if command_name(pid) == "migrate-holder"]


def kill_dumper(source):
    """Kill the criu dump of a source, which the kernel then has let go of the task."""
    os.kill(family_of(source)[0], signal.SIGKILL)


def test_a_dumper_that_dies_before_leaves_the_program(old_hosts):
    hosts = old_hosts
    with false_destination(hosts) as (source, log, _, _):
        kill_dumper(source)
        assert wait(source, hosts) == 1
        assert re.search(r"criu dump was killed by SIGKILL; it goes on as it was\n$", log.read_text())
        hosts.assert_goes_on()


@pytest.mark.parametrize("answer", ["running", "failed"])
def test_a_dumper_that_dies_after_go_does_not_let_two_run(old_hosts, answer):
    hosts = old_hosts
    with false_destination(hosts) as (source, log, control, _):
        control.sendall(message(b'{"word": "restoring"}'))
        while b"go" not in control.recv(1 << 10):
            pass
        kill_dumper(source)
        harness.wait_until(lambda: hosts.task_state == "T", "it to be stopped again")
        control.sendall(message(b'{"word": "%s", "pid": 1, "reason": "no restore today"}' % answer.encode()))
        assert wait(source, hosts) == 1
    if answer == "failed":
        assert log.read_text().endswith(": no restore today; the task goes on here\n")
    else:
        assert re.search("killed by SIGKILL; .* are stopped, as their copy runs and lacks memory", log.read_text())
        assert hosts.task_state == "T"
        os.kill(hosts.pid, signal.SIGCONT)
    hosts.assert_goes_on()


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_dumper_that_dies_while_the_copy_runs(old_hosts, is_whole):
    """What the copy lacks is lost: both ends say so at once. Never do both run."""
    hosts = old_hosts
    with false_destination(hosts) as (source, log, control, _):
        control.sendall(message(b'{"word": "restoring"}') + message(b'{"word": "running", "pid": 1}'))
        harness.wait_until(lambda: "running at" in log.read_text(), "it to hear that")
        source.send_signal(signal.SIGSTOP)
        kill_dumper(source)
        harness.wait_until(lambda: hosts.task_state == "T", "it to be stopped")
        if is_whole:
            control.sendall(message(b'{"word": "full"}'))
        source.send_signal(signal.SIGCONT)
        assert wait(source, hosts) == 1
    copy = "is whole" if is_whole else "runs and lacks memory"
    said = f"process {hosts.pid} and its children are stopped, as their copy {copy}:"
    # It may have heard that before it saw that the dumper is dead.
    how = "SIGKILL(, though all pages were sent)?" if is_whole else "SIGKILL"
    assert re.search(f"criu dump was killed by {how}; {said}", log.read_text())
    assert "says nothing" not in log.read_text()
    assert hosts.task_state == "T"
    os.kill(hosts.pid, signal.SIGCONT)
    hosts.assert_goes_on()


def test_a_dumper_that_dies_while_the_copy_is_filled(old_hosts):
    """Both ends say at once that the copy lacks memory."""
    hosts = old_hosts
    (destination, log), (source, source_log) = hosts.destination("--fill-rate", "1M"), hosts.source()
    harness.wait_until(lambda: "running at" in source_log.read_text(), f"the copy\n{hosts.logs()}")
    kill_dumper(source)
    assert wait(source, hosts) == 1
    assert "are stopped, as their copy runs and lacks memory" in source_log.read_text()
    harness.wait_until(lambda: "are missing and cannot be had any more" in log.read_text(), "the other to say so")
    assert destination.poll() is None
    assert hosts.task_state == "T"
    os.kill(hosts.pid, signal.SIGCONT)
    hosts.end_copy()
    assert wait(destination, hosts) == 1
    hosts.assert_goes_on()


@contextlib.contextmanager
def running_copy(hosts, **streams):
    """A source that is told that a copy runs; yield (source, its log, the dumper, the holder)."""
    with false_destination(hosts, **streams) as (source, log, control, _):
        control.sendall(message(b'{"word": "restoring"}') + message(b'{"word": "running", "pid": 1}'))
        if not streams:  # else it says so elsewhere
            harness.wait_until(lambda: "running at" in log.read_text(), "it to hear that")
        harness.wait_until(lambda: holders_of(source) and b"go" in control.recv(1 << 10, socket.MSG_PEEK), "it to hold")
        yield source, log, *family_of(source)


def assert_stopped(hosts, log):
    """The program stands, nobody holds it, and that is said; who has it go on finds it as it was."""
    harness.wait_until(lambda: "are stopped, as their copy may run" in log.read_text(), "it to be said")
    assert hosts.task_state == "T"
    os.kill(hosts.pid, signal.SIGCONT)
    hosts.assert_goes_on()


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_source_and_its_dumper_are_killed(old_hosts, is_asked):
    """One after the other, or both at once: the program does not run, and who is left says so."""
    with running_copy(old_hosts) as (source, log, dumper, holder):
        if is_asked:
            source.kill()
            harness.wait_until(lambda: "is held" in log.read_text(), "what is left to ask")
        else:
            source.send_signal(signal.SIGSTOP)  # it hears of nothing
        os.kill(dumper, signal.SIGKILL)
        source.kill()
        source.wait()
        assert_stopped(old_hosts, log)
        harness.wait_until(lambda: state_of(holder) in "ZX", "what is left to end")


def test_what_is_left_holds_also_where_nobody_hears_it(old_hosts):
    """Its standard error is a pipe that nobody reads any more, as of a terminal that is closed."""
    reading, writing = os.pipe()
    with running_copy(old_hosts, stderr=writing) as (source, _, dumper, holder):
        os.close(writing)
        os.close(reading)
        source.kill()
        source.wait()
        time.sleep(0.5)
        assert old_hosts.task_state == "t"
        os.kill(dumper, signal.SIGKILL)
        harness.wait_until(lambda: state_of(holder) in "ZX", "what is left to end")
    assert old_hosts.task_state == "T"
    os.kill(old_hosts.pid, signal.SIGCONT)
    old_hosts.assert_goes_on()


def test_who_was_stopped_before_and_goes_on_while_held_stops_too(old_hosts):
    os.kill(old_hosts.pid, signal.SIGSTOP)
    harness.wait_until(lambda: old_hosts.task_state == "T", "it to be stopped")
    with running_copy(old_hosts) as (source, log, dumper, _):
        os.kill(old_hosts.pid, signal.SIGCONT)
        os.kill(dumper, signal.SIGKILL)
        assert wait(source, old_hosts) == 1
        assert "are stopped, as their copy runs and lacks memory" in log.read_text()
        assert old_hosts.task_state == "T"
    os.kill(old_hosts.pid, signal.SIGCONT)
    old_hosts.assert_goes_on()


def test_a_dumper_that_dies_before_its_tasks_are_held(old_hosts):
    """The destination is ready at the same time: nothing is said to it that would have it run a copy."""
    with false_destination(old_hosts) as (source, log, control, _):
        source.send_signal(signal.SIGSTOP)
        control.sendall(message(b'{"word": "restoring"}'))
        dumper, _ = family_of(source)
        os.kill(dumper, signal.SIGKILL)
        harness.wait_until(lambda: state_of(dumper) in "ZX", "its end")
        source.send_signal(signal.SIGCONT)
        assert wait(source, old_hosts) == 1
        with contextlib.suppress(ConnectionResetError):  # it may not have heard what it was told
            assert control.recv(100) == b""
    assert "criu dump was killed by SIGKILL; it goes on as it was" in log.read_text()
    old_hosts.assert_goes_on()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_source_that_is_told_to_end_when_the_copy_may_run(old_hosts, number):
    """It says that this is not the time, whenever it comes."""
    with running_copy(old_hosts) as (source, log, _, _):
        source.send_signal(number)
        harness.wait_until(lambda: f"{number.name}: not now" in log.read_text(), "it to say so")
        assert source.poll() is None
        assert old_hosts.task_state == "t"


def test_who_stands_by_a_source_is_killed(old_hosts):
    """Another stands by: nobody takes the end of the source for a copy that is whole."""
    with running_copy(old_hosts) as (source, log, _, holder):
        os.kill(holder, signal.SIGKILL)
        harness.wait_until(lambda: holders_of(source) not in ([], [holder]), "another")
        (other,) = holders_of(source)
        source.kill()
        source.wait()
        harness.wait_until(lambda: f"kill -USR1 {other}" in log.read_text(), "it to ask")
        time.sleep(0.2)
        assert old_hosts.task_state == "t"
        os.kill(other, signal.SIGUSR1)
        old_hosts.assert_goes_on()


def test_a_program_that_is_killed_while_it_is_held_needs_nobody_to_decide(old_hosts):
    with running_copy(old_hosts) as (source, log, dumper, holder):
        source.kill()
        source.wait()
        harness.wait_until(lambda: "is held" in log.read_text(), "what is left to ask")
        os.kill(old_hosts.pid, signal.SIGKILL)
        harness.wait_until(lambda: all(state_of(pid) in "ZX" for pid in (dumper, holder)), "the end of both")


def test_a_program_that_is_killed_when_its_link_is_gone_needs_nobody_to_decide(old_hosts):
    hosts = old_hosts
    with false_destination(hosts) as (source, log, control, link):
        control.sendall(message(b'{"word": "restoring"}') + message(b'{"word": "running", "pid": 1}'))
        link.close()
        harness.wait_until(lambda: "is held" in log.read_text(), "it to ask")
        os.kill(hosts.pid, signal.SIGKILL)
        assert wait(source, hosts) == 1
    assert log.read_text().endswith(f"process {hosts.pid} is ended\n")


def test_a_program_that_was_stopped_before_stays_so_when_it_is_let_go(old_hosts):
    os.kill(old_hosts.pid, signal.SIGSTOP)
    harness.wait_until(lambda: old_hosts.task_state == "T", "it to be stopped")
    with false_destination(old_hosts) as (source, _, control, _):
        control.sendall(message(b'{"word": "restoring"}') + message(b'{"word": "failed", "reason": "no"}'))
        assert wait(source, old_hosts) == 1
    time.sleep(0.2)
    assert old_hosts.task_state == "T"
    os.kill(old_hosts.pid, signal.SIGCONT)
    old_hosts.assert_goes_on()


def test_children_that_fork_on_do_not_run_beside_their_copy(tmp_path):
    """They are elsewhere by the time that anybody has seen that they run: they must not."""
    program = harness.compile_c(harness.ROOT / "tests/victims/comet.c", tmp_path / "comet")
    with contextlib.ExitStack() as stack:
        hosts = Hosts(stack, "trixie", [str(program), str(tmp_path / "state")], tmp_path)

        def trail():
            return sum(path.stat().st_size for path in hosts.state.glob("trail-*"))

        harness.wait_until(lambda: trail() > 20, "it to run")
        with running_copy(hosts) as (source, log, dumper, _):
            before = trail()
            os.kill(dumper, signal.SIGKILL)
            assert wait(source, hosts) == 1
            time.sleep(0.2)
            assert trail() == before
            assert "are stopped, as their copy runs and lacks memory" in log.read_text()
        for pid in (hosts.pid, *harness.descendants(hosts.pid)):
            with contextlib.suppress(ProcessLookupError):  # the init among them reaps what has ended
                os.kill(pid, signal.SIGCONT)
        harness.wait_until(lambda: trail() > before + 20, "it to go on")


def test_a_dumper_that_dies_and_leaves_a_child(old_hosts, tmp_path):
    """The child holds the pipe by which the dumper was to say that it serves."""
    broken = tmp_path / "criu"
    broken.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/child\nkill -KILL $$\n")
    broken.chmod(0o755)
    (destination, _), (source, log) = old_hosts.destination(), old_hosts.source(criu=str(broken))
    assert wait(source, old_hosts) == 1
    assert wait(destination, old_hosts) == 1
    assert "criu dump was killed by SIGKILL at work on it: see whether it goes on as it was" in log.read_text()
    harness.wait_until(lambda: state_of(int((tmp_path / "child").read_text())) in "ZX", "the child to be ended")
    old_hosts.assert_goes_on()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_source_that_is_told_to_end_before_leaves_its_program(old_hosts, number):
    with false_destination(old_hosts) as (source, log, _, _):
        source.send_signal(number)
        assert wait(source, old_hosts) == 1
        assert log.read_text().endswith(f"given up because of {number.name}; the task goes on at the source\n")
    assert not list(old_hosts.temporary.iterdir())
    old_hosts.assert_goes_on()


def test_a_destination_that_is_told_to_end_while_it_waits(old_hosts):
    destination, log = old_hosts.destination()
    destination.terminate()
    assert wait(destination, old_hosts) == 1
    assert log.read_text().endswith("given up because of SIGTERM; the task goes on at the source\n")
    assert not list(old_hosts.images.iterdir())


def test_a_source_that_dies_during_the_restore_ends_that(old_hosts, tmp_path):
    """What is being restored may wait for pages that cannot come any more."""
    hosts = old_hosts
    hangs = tmp_path / "criu"
    hangs.write_text(f"#!/bin/sh\ntouch {tmp_path}/restoring\nsleep 600\n")
    hangs.chmod(0o755)
    (destination, log), (source, source_log) = hosts.destination(criu=str(hangs)), hosts.source()
    harness.wait_until((tmp_path / "restoring").exists, f"the restore\n{hosts.logs()}")
    made = [pid for pid in harness.descendants(destination.pid) if command_name(pid) in {"criu", "sleep"}]
    source.kill()
    source.wait()
    assert wait(destination, hosts) == 1
    assert "has gone before its tasks were whole; they were ended here" in log.read_text()
    harness.wait_until(lambda: all(state_of(pid) in "ZX" for pid in made), "the end of all")
    assert not [path for path in hosts.images.iterdir() if path.suffix not in {".log", ".out"}]
    # What is left at the source cannot know that no copy runs, and asks.
    harness.wait_until(lambda: "is held" in source_log.read_text(), "what is left to ask")
    os.kill(int(re.search(r"kill -USR1 (\d+)", source_log.read_text())[1]), signal.SIGUSR1)
    hosts.assert_goes_on()


@pytest.mark.parametrize("office", ["server", "keeper"])
def test_what_serves_at_the_destination_is_killed(old_hosts, office):
    """Others take its place, and both sides hear of the end."""
    hosts = old_hosts
    (destination, log), (source, source_log) = hosts.destination("--fill-rate", "1M"), hosts.source()
    harness.wait_until(lambda: "running: process" in log.read_text(), f"the copy\n{hosts.logs()}")
    family = [pid for pid in harness.descendants(destination.pid) if command_name(pid).startswith(("lazyd", "python"))]
    server = [pid for pid in family if command_name(pid) == "lazyd-server"]
    assert len(server) == 1, [command_name(pid) for pid in family]
    os.kill(server[0] if office == "server" else family[0], signal.SIGKILL)
    (hosts.state / "go").touch()
    harness.wait_until(lambda: hosts.result.endswith("\n"), f"the verdict\n{hosts.logs()}")
    assert hosts.result == "ok\n"
    assert wait(destination, hosts) == 0, hosts.logs()
    assert wait(source, hosts) == 0, hosts.logs()
    assert re.search("^.*full", source_log.read_text(), re.MULTILINE)


STRANGE = {
    "a list": b"[1,2]",
    "deep": b"[" * 100_000,
    "no word": b'{"word": 7}',
    "text": b'"hello"',
}


@pytest.mark.parametrize("content", STRANGE.values(), ids=STRANGE)
def test_strange_messages_to_a_destination(old_hosts, content):
    """Whoever sends them is told of, and the next one is welcome."""
    hosts = old_hosts
    destination, log = hosts.destination()
    with hosts.there.inside(), socket.create_connection((hosts.link.second, PORT)) as stranger:
        stranger.sendall(message(content))
        harness.wait_until(lambda: "waiting for another" in log.read_text(), "it to say so")
    assert re.search(r"says what is no message of lazyd migrate; waiting for another\n$", log.read_text())
    source, _ = hosts.source()
    assert wait(source, hosts) == 0, hosts.logs()
    assert wait(destination, hosts) == 0, hosts.logs()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "says what is no message of lazyd migrate"),
        (b"", "(hung up|the connection is gone: connection reset by peer)"),
        (b"\x20\0\0\0" + b"x" * 32, "says what is no message of lazyd migrate"),
        (b"\x05\0\0\0[1,2]", "says what is no message of lazyd migrate"),
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


def test_pipes_that_criu_may_not_have_are_told_before_anything_is_done(monkeypatch):
    """Told by the kernel, of pipes as large as nobody may have."""
    monkeypatch.setattr(source, "_PIPE_BYTES", 1 << 31)
    with pytest.raises(DumpError, match=r"criu needs pipes of .*: raise /proc/sys/fs/pipe-max-size to"):
        source.migrate(source.Settings(os.getpid(), "127.0.0.1", 1), Log())
