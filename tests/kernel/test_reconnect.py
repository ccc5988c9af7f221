# SPDX-License-Identifier: MIT
"""lazyd fills from lazyd's page server, over a connection that breaks: at any byte, again and again, for a while."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pki
import pytest
from images_builder import build_checkpoint
from kernel_harness import BASE, PAGE, PID, STRESS, Run, Vma, full, hand_over, sparse, wait_until
from links import CuttingProxy, Plan, Way
from page_source import Answers
from process_harness import command_name, processes_in
from test_serving import MIXED

SHORT = [Vma(BASE, 3, [Run(BASE, 2)])]
ASKED, SAID = 2 * 24, 2 * 24 + 2 * PAGE
"""Bytes of a short session: two GETs, if each page is asked for by itself, and their answers."""


class Server:
    """`lazyd page-server --lazy-pages` over what a checkpoint would hold whole."""

    def __init__(self, stage, vmas, folder="source", words=()):
        self._words = words
        self.images = stage.folder / folder
        if not self.images.exists():
            build_checkpoint(self.images, [stage._task(PID, vmas, "dumped", None)])
        self.port = 0
        self.start()

    def start(self):
        """Listen, at the port of before if there was one."""
        command = [sys.executable, "-m", "lazyd", "page-server", "-D", str(self.images), "--lazy-pages"]
        reading, writing = os.pipe()
        self.log = self.images.parent / f"{self.images.name}.log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [
                    *command,
                    *self._words,
                    "--address",
                    "127.0.0.1",
                    "--port",
                    str(self.port),
                    "--status-fd",
                    str(writing),
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=[writing],
            )
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            assert pipe.read(1) == b"\0", self.log.read_text()
        text = self.log.read_text()
        self.port = int(text.split("listening on 127.0.0.1:")[1].split()[0])

    def stop(self):
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def serving(stage, vmas, folder="source", words=()):
    """Run a server and write the checkpoint whose pages only it has."""
    server = Server(stage, vmas, folder, words)
    try:
        if not stage.images.exists():
            build_checkpoint(stage.images, [stage._task(PID, vmas, "remote", None)])
        yield server
    finally:
        server.stop()


def words_of(port):
    return ["--page-server", "--address", "127.0.0.1", "--port", str(port)]


def restored(stage, vmas, port, steps, *words, code=0):
    """Restore a task that fills from a port, and hold it to what every restore must reach."""
    daemon = stage.start_command(*words_of(port), *words)
    skeleton = stage.start_skeleton(*hand_over(vmas, PID), "finish", "hangup", *steps)
    result = skeleton.wait()
    assert result == (0, "ok\n"), f"{result}\n{daemon.output}"
    skeleton.close()
    assert daemon.wait() == code, daemon.output
    return daemon


@pytest.mark.parametrize("steps", [("sweep", "random", "3"), ("storm", "3", "200"), ("tree", "2", "3")])
@pytest.mark.parametrize("fill", ["full", "off"])
def test_every_page_comes_from_lazyd_s_server(stage, steps, fill):
    with serving(stage, MIXED) as server:
        restored(stage, MIXED, server.port, steps, "--fill", fill)


def cuts():
    """Where a short session is cut: all bytes of headers and the edges of pages; every byte in a stress run."""
    up = [("up", at) for at in range(ASKED + 24)]
    down = [("down", at) for at in range(SAID + 4)]
    if STRESS > 1:
        return up + down
    dice = random.Random(11)
    edges = [0, 1, 23, 24, 25, 24 + PAGE, 25 + PAGE, SAID - 1, SAID, SAID + 3]
    return [*dice.sample(up, 5), *(("down", at) for at in edges)]


@pytest.mark.parametrize("way", [Way.RESET, Way.END])
def test_a_session_is_cut_at_any_byte(stage, way):
    """Asking goes on over another connection; no byte is wrong, and it is all told in the exit code."""
    with serving(stage, SHORT) as server:
        for direction, at in cuts():
            # The first connection, which is cut, the one that asks who is there, and those after it.
            plan = Plan(after_up=at, way=way) if direction == "up" else Plan(after_down=at, way=way)
            with CuttingProxy(("127.0.0.1", server.port), [plan]) as proxy:
                restored(stage, SHORT, proxy.port, ["sweep", "forward", "1"])


def test_a_connection_that_breaks_again_and_again(stage):
    """Every connection lives for some random number of bytes."""
    vmas = [full(BASE, 3000), sparse(BASE + (1 << 26), 600, 2)]
    dice = random.Random(5)

    def plans():
        yield Plan(after_down=500_000)
        yield Plan()  # who is there?
        while True:
            yield Plan(after_down=dice.randint(1, 2_000_000), way=dice.choice([Way.RESET, Way.END]))

    with serving(stage, vmas) as server, CuttingProxy(("127.0.0.1", server.port), plans()) as proxy:
        daemon = restored(stage, vmas, proxy.port, ["sweep", "random", "2"])
    assert daemon.output.count("connected again") >= 3, daemon.output


def left_of_tls(server):
    """How many descriptors a process has open, and how many processes that move bytes for it, ended ones too.

    The fewest of a moment: a connection that is being made has some of its own.
    """
    found = []
    for _ in range(20):
        descriptors = sum(1 for _ in Path(f"/proc/{server}/fd").iterdir())
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        found.append((descriptors, sum(command_name(int(child)) == "lazyd-tls" for child in children)))
        time.sleep(0.005)
    return tuple(map(min, zip(*found, strict=True)))


@pytest.fixture
def certificates(stage):
    """The options of both ends of a connection: the server's, and the client's."""
    authority = pki.Authority(stage.folder / "pki")
    return [authority.sign(name).options(authority) for name in ("server", "client")]


def test_a_connection_by_tls_that_breaks_again_and_again_leaves_nothing_behind(stage, certificates):
    """Each broken one has had a process and a descriptor of its own."""
    vmas = [full(BASE, 6000)]
    ours, theirs = certificates

    def plans():
        yield Plan(after_down=500_000)
        yield Plan()  # who is there?
        while True:
            yield Plan(after_down=1_500_000)

    with serving(stage, vmas, words=ours) as server, CuttingProxy(("127.0.0.1", server.port), plans()) as proxy:
        daemon = stage.start_command(*words_of(proxy.port), *theirs, "--fill-rate", "5M")
        skeleton = stage.start_skeleton(*hand_over(vmas, PID), "finish", "hangup", "await", "sweep", "forward", "1")
        found = []
        for count in (2, 12):  # the first was made by the keeper
            wait_until(lambda count=count: daemon.output.count("connected again") >= count, daemon.output)
            found.append(left_of_tls(daemon.server()))
        assert all(later <= sooner + 2 for sooner, later in zip(*found, strict=True)), f"{found}\n{daemon.output}"
        skeleton.go_on()
        assert skeleton.wait() == (0, "ok\n"), daemon.output
        assert daemon.wait() == 0, daemon.output


def test_servers_and_what_moves_their_bytes_by_tls_are_killed(stage, certificates):
    """Another serves on over the same connection, and over another in the place of one whose bytes nobody moves."""
    vmas = [full(BASE, 3000), sparse(BASE + (1 << 26), 600, 2)]
    ours, theirs = certificates
    with serving(stage, vmas, words=ours) as server:
        for number in range(2 * STRESS):
            steps = ["await", "sweep", "random", "2"]
            dice = random.Random(number)
            daemon = stage.start_command(*words_of(server.port), *theirs, "--fill-rate", "5M")
            skeleton = stage.start_skeleton(*hand_over(vmas, PID), "finish", "hangup", *steps)
            daemon.wait_for_line("restore finished")
            for _ in range(2):
                time.sleep(dice.random() * 0.1)
                movers = [pid for pid in processes_in(stage.work) if command_name(pid) == "lazyd-tls"]
                old = daemon.server()
                os.kill(old, signal.SIGKILL)
                if dice.random() < 0.7:
                    for pid in movers:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                wait_until(lambda daemon=daemon, old=old: daemon.family().get("server", old) != old, "another server")
            skeleton.go_on()
            assert skeleton.wait() == (0, "ok\n"), daemon.output
            skeleton.close()
            assert daemon.wait() == 0, daemon.output


def test_a_server_that_comes_back_is_asked_again(stage):
    """It is away for a while, and the task waits."""
    vmas = [full(BASE, 20_000)]
    with serving(stage, vmas) as server:
        daemon = stage.start_command(*words_of(server.port), "--fill-rate", "8M")
        skeleton = stage.start_skeleton(*hand_over(vmas, PID), "finish", "hangup", "sweep", "random", "2")
        daemon.wait_for_line("restore finished")
        server.stop()
        daemon.wait_for_line("connecting again")
        time.sleep(0.3)
        assert skeleton.is_running()
        server.start()
        daemon.wait_for_line("connected again")
        daemon.kill(signal.SIGTERM)  # which finishes the fill first, without a limit
        assert skeleton.wait() == (0, "ok\n"), daemon.output
        assert daemon.wait() == 0, daemon.output


def test_nothing_is_taken_of_another_checkpoint(stage):
    """The same addresses, other bytes: a task that gets them would be neither."""
    vmas = [full(BASE, 20_000)]
    with serving(stage, vmas) as server:
        daemon = stage.start_command(*words_of(server.port), "--fill-rate", "8M")
        skeleton = stage.start_skeleton(*hand_over(vmas, PID), "finish", "hangup", "sweep", "random", "2")
        daemon.wait_for_line("restore finished")
        server.stop()
        (pages,) = server.images.glob("pages-*.img")
        content = pages.read_bytes()
        pages.unlink()
        pages.write_bytes(bytes(len(content)))
        server.start()
        daemon.wait_for_line("another checkpoint")
        assert daemon.poll() is None
        os.kill(skeleton.pid, signal.SIGKILL)
        assert daemon.wait() == 1


def test_a_server_that_has_no_such_task_is_told_before_anything_is_restored(stage):
    with serving(stage, SHORT) as server:
        for path in stage.images.iterdir():
            path.unlink()
        stage.images.rmdir()
        build_checkpoint(stage.images, [stage._task(PID + 1, SHORT, "remote", None)])
        daemon = stage.start_command(*words_of(server.port), listening=False)
        assert daemon.wait() == 1
        assert f"has no pages of the tasks in these images ({PID + 1})" in daemon.output
        assert len(daemon.output.splitlines()) == 1


@pytest.mark.parametrize("way", Way)
def test_a_stock_source_that_is_lost_is_told_and_nobody_reads_zeros(stage, way):
    """Cut anywhere, or stalled: what has come is right; the rest waits, and it is reported in seconds."""
    source = stage.build_remote({PID: [full(BASE, 200)]}, Answers)
    at = 100_000
    with CuttingProxy(("127.0.0.1", source.port), [Plan(after_down=at, way=way)]) as proxy:
        daemon = stage.start_command(*words_of(proxy.port))
        skeleton = stage.start_skeleton(*hand_over([full(BASE, 200)], PID), "finish", "hangup", "sweep", "forward", "1")
        if way is Way.STALL:
            daemon.wait_for_line("no answer for")
            assert skeleton.is_running()
        else:
            daemon.wait_for_line("cannot be had any more")
        os.kill(skeleton.pid, signal.SIGKILL)
        skeleton.close()
        wait_until(lambda: daemon.poll() is not None, "the end")
        assert daemon.wait() == (0 if way is Way.STALL else 1)
