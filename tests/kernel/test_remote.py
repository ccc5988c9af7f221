# SPDX-License-Identifier: MIT
"""Tasks whose pages only a page server has: right ones, wrong ones, and how the two part."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import socket
import struct
import time

import pytest
from images_builder import build_checkpoint
from kernel_harness import BASE, PAGE, PID, STRESS, Run, Vma, full, hand_over, sparse, wait_until
from page_source import ADD_F, LAZY, LAZYD, PRESENT, Answers, Pages, PageSource, header
from test_serving import MIXED

from lazyd.session.remote import RemotePages

FILLS = {"full": (), "off": ("--fill", "off"), "slow": ("--fill-rate", "8M")}
SMALL = [full(BASE, 64), sparse(BASE + (1 << 24), 64, 2)]
LARGE = [full(BASE, 4096), sparse(BASE + (1 << 26), 1024, 2)]


class Short(Answers):
    """Sends fewer pages than were asked for, as many as a die says, and all of it in small pieces."""

    def __init__(self, pages, size=24):
        super().__init__(pages, size)
        self.dice = random.Random(7)

    def get(self, get):
        return super().get(get._replace(pages=self.dice.randint(1, get.pages)))

    def send(self, connection, content):
        while content:
            length = self.dice.choice([1, 23, 25, 4096, 5000, 100_000])
            connection.sendall(content[:length])
            content = content[length:]


@pytest.mark.parametrize(("size", "order"), [(24, "random"), (32, "forward")])
@pytest.mark.parametrize("fill", FILLS)
def test_every_page_reads_right(stage, order, fill, size):
    make = functools.partial(Answers, size=size)
    stage.restore(MIXED, ["sweep", order, "3"], *FILLS[fill], make=make, size=size)
    wait_until(lambda: (stage.folder / "source.log").read_text().endswith("eof\n"), "the end of the connection")
    lines = (stage.folder / "source.log").read_text().splitlines()
    assert lines[0] == "connect"
    assert lines[-2] == "close 0x1024"


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("before", [(), ("sweep", "random", "2")])
def test_short_answers_are_asked_for_again(stage, fill, before):
    stage.restore(MIXED, ["sweep", "random", "2"], *FILLS[fill], make=Short, before=before)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(("make", "threads"), [(Answers, 3), (Short, 1)])
def test_random_layout_changes(stage, threads, make, fill):
    for number in range(STRESS):
        stage.restore(MIXED, ["storm", str(threads), "150"], *FILLS[fill], make=make, before=["seed", str(number)])
        stage.close()
        for path in stage.images.iterdir():
            path.unlink()
        stage.images.rmdir()


@pytest.mark.parametrize("kind", ["dontneed", "write", "unmap", "remap", "fork"])
def test_a_page_is_touched_while_its_layout_changes(stage, kind):
    stage.restore([sparse(BASE, 32 * 100, 32)], ["race", kind], "--fill", "off", make=Answers)


def test_a_page_crosses_the_network_once_whoever_wants_it(stage):
    """Sixteen tasks touch every page at once, while it is on its way."""
    stage.restore(LARGE, ["tree", "3", "3"], make=Answers)
    asked = []
    for get in stage_source_gets(stage):
        asked += range(get[1], get[1] + get[2] * PAGE, PAGE)
    assert len(asked) == len(set(asked))
    assert len(asked) == 4096 + 512


def stage_source_gets(stage):
    lines = (stage.folder / "source.log").read_text().splitlines()
    return [tuple(map(int, line.split()[1:])) for line in lines if line.startswith("get ")]


def test_pages_that_are_here_do_not_cross_the_network(stage):
    vmas = [Vma(BASE, 200, [Run(BASE, 50)], [Run(BASE + 50 * PAGE, 100)])]
    stage.restore(vmas, ["sweep", "random", "2"], make=Answers)
    assert sum(pages for _, _, pages, _ in stage_source_gets(stage)) == 50


@pytest.mark.parametrize("make", [Answers, Short])
@pytest.mark.parametrize("steps", [("sweep", "random", "2"), ("storm", "3", "200"), ("forks", "20")])
def test_the_server_is_killed_at_any_moment(stage, steps, make):
    """What it had received, and what it had asked for, the next one knows."""
    source = stage.build_remote({PID: LARGE}, make)
    for number in range(STRESS):
        daemon = stage.start_daemon(*source.words)
        words = [*hand_over(LARGE, PID), "seed", str(number), "finish", "hangup", "say", "runs", *steps]
        skeleton = stage.start_skeleton(*words)
        skeleton.heard("runs")
        daemon.kill_servers(number, within_s=0.03)
        result = skeleton.wait()
        assert result == (0, "ok\n"), f"{result}\n{daemon.output}"
        skeleton.close()
        assert daemon.wait() == 0, daemon.output
        # All has come, then. One that is killed while it says so leaves it at the end of the connection, which a stock
        # source takes for the same; with an answer unread, TCP calls that a reset.
        source.wait_for_end()
        assert source.lines()[-1] in ("eof", "broken")


class Wrong(Answers):
    """Answers the tenth GET wrongly; what is wrong is the subclass's to say."""

    def get(self, get):
        right = super().get(get)
        return right if get.number != 10 else self.wrong(get, right)

    def wrong(self, get, right):
        raise NotImplementedError


class WrongPid(Wrong):
    def wrong(self, get, right):
        return header(24, ADD_F | PRESENT, get.pages, get.address, get.pid + 1) + right[24:]


class WrongAddress(Wrong):
    def wrong(self, get, right):
        return header(24, ADD_F | PRESENT, get.pages, get.address + PAGE, get.pid) + right[24:]


class MorePages(Wrong):
    def wrong(self, get, right):
        return header(24, ADD_F | PRESENT, get.pages + 1, get.address, get.pid) + right[24:] + bytes(PAGE)


class VeryManyPages(Wrong):
    def wrong(self, get, right):
        return header(24, ADD_F | PRESENT, (1 << 32) - 1, get.address, get.pid) + right[24:]


class NoPages(Wrong):
    def wrong(self, get, right):
        return header(24, ADD_F | PRESENT, 0, get.address, get.pid)


class NothingPresent(Wrong):
    def wrong(self, get, right):
        return header(24, ADD_F, get.pages, get.address, get.pid)


class Garbage(Wrong):
    def wrong(self, get, right):
        return random.Random(3).randbytes(20_000)


class OtherHeader(Wrong):
    def wrong(self, get, right):
        return header(32, ADD_F | PRESENT, get.pages, get.address, get.pid) + right[24:]


class HangsUp(Wrong):
    """With requests that it has not read: TCP calls that a reset."""

    def wrong(self, get, right):
        time.sleep(0.05)
        raise OSError


WRONG = {
    WrongPid: "about task 101",
    WrongAddress: "was asked for",
    MorePages: "were asked for",
    VeryManyPages: "an answer of 4294967295 pages",
    NoPages: "an answer of 0 pages",
    NothingPresent: "not a page server, or one of the other header size",
    Garbage: "not a page server, or one of the other header size",
    OtherHeader: "page",
    HangsUp: "the link broke: ECONNRESET",
}


@pytest.mark.parametrize("make", WRONG)
def test_a_source_that_is_wrong_is_reported_and_held(stage, make):
    """What has come is right, nobody reads zeros, and it is not this side that ends the connection."""
    source = stage.build_remote({PID: [sparse(BASE, 4000, 4)]}, make)
    daemon = stage.start_daemon(*source.words)
    skeleton = stage.start_skeleton(
        *hand_over([sparse(BASE, 4000, 4)], PID), "finish", "hangup", "sweep", "forward", "1"
    )
    daemon.wait_for_line("cannot be had any more")
    assert WRONG[make] in daemon.output
    time.sleep(0.1)
    assert daemon.poll() is None
    if make is not HangsUp:
        assert source.lines()[-1].startswith("get ")
    os.kill(skeleton.pid, signal.SIGKILL)
    skeleton.close()
    assert daemon.wait() == 1
    assert sum("Error" in line for line in daemon.output.splitlines()) <= 2, daemon.output


def test_tasks_that_miss_pages_are_killed_where_that_is_wanted(stage):
    vmas = [sparse(BASE, 4000, 4)]
    skeleton = stage.start_skeleton("await", *hand_over(vmas, 0), "finish", "hangup", "sweep", "forward", "1")
    source = stage.build_remote({skeleton.pid: vmas}, HangsUp)
    daemon = stage.start_daemon(*source.words, "--on-source-loss", "kill")
    skeleton.go_on()
    assert daemon.wait() == 1
    assert f"killed {skeleton.pid}" in daemon.output
    assert skeleton.wait()[0] == -signal.SIGKILL


@pytest.mark.parametrize("steps", [["byte"], [], ["announce", str(PID)]])
def test_the_source_takes_its_task_back_when_the_restore_fails(stage, steps):
    """It must see garbage: the end of the connection alone would be success to a stock source."""
    vmas = [full(BASE, 64)]
    source = stage.build_remote({PID: vmas}, Answers)
    daemon = stage.start_daemon(*source.words)
    skeleton = stage.start_skeleton(*hand_over(vmas, PID)[:-2], *steps, "hangup")
    skeleton.wait()
    assert daemon.wait() == 1
    source.wait_for("garbage")
    assert not any(line.startswith(("close", "eof")) for line in source.lines())


def test_a_signal_before_the_first_task_gives_the_task_back(stage):
    source = stage.build_remote({PID: [full(BASE, 64)]}, Answers)
    daemon = stage.start_daemon(*source.words)
    daemon.kill(signal.SIGTERM)
    assert daemon.wait() == 1
    source.wait_for("garbage")


@pytest.mark.parametrize("words", [["--pidfile", "none/pid"], ["--pid", "1", "--image-pid", str(PID)]])
def test_a_start_that_fails_after_connecting_gives_the_task_back(stage, words):
    source = stage.build_remote({PID: [full(BASE, 64)]}, Answers)
    daemon = stage.start_daemon(*source.words, *words, listening=False)
    assert daemon.wait() == 1
    source.wait_for("garbage")
    assert not any(line.startswith(("close", "eof", "broken")) for line in source.lines())


def test_a_signal_while_it_starts_gives_the_task_back(stage):
    """At the moment when it has connected, and does not wait for signals yet."""

    def be_signalled():
        identify = RemotePages._identify

        def identify_and_be_signalled(remote):
            os.kill(os.getpid(), signal.SIGTERM)
            return identify(remote)

        RemotePages._identify = identify_and_be_signalled

    source = stage.build_remote({PID: [full(BASE, 64)]}, Answers)
    daemon = stage.start_daemon(*source.words, prepare=be_signalled)
    assert daemon.wait() == 1
    source.wait_for("garbage")


def test_servers_that_die_again_and_again_do_not_give_back_a_task_whose_copy_has_run(stage):
    vmas = [full(BASE, 256)]
    source = stage.build_remote({PID: vmas}, Answers)
    daemon = stage.start_daemon(*source.words, "--fill", "off")
    touch = ["await", "bus", hex(BASE), "256", "sweep", "random", "1"]
    skeleton = stage.start_skeleton(*hand_over(vmas, PID), "finish", "hangup", "say", "runs", *touch)
    skeleton.heard("runs")
    daemon.wait_for_line("restore finished")
    for _ in range(3):
        old = daemon.family()["server"]
        os.kill(old, signal.SIGKILL)
        wait_until(lambda old=old: daemon.poll() is not None or daemon.family().get("server", old) != old, "the next")
    assert daemon.wait() == 1
    assert "died again and again" in daemon.output
    source.wait_for_end()
    assert "garbage" not in source.lines()


def test_a_source_that_does_not_agree_to_the_end_is_reported(stage):
    class Disagrees(Answers):
        def __init__(self, pages):
            super().__init__(pages)
            self.status = -1

    daemon = stage.restore(SMALL, ["sweep", "random", "2"], make=Disagrees, code=1)
    assert "ended the transfer with" in daemon.output


def test_a_connection_that_is_there_already_is_used(stage):
    source = stage.build_remote({PID: SMALL}, Answers)
    with socket.create_connection(("127.0.0.1", source.port)) as connection:
        daemon = stage.start_daemon("--page-server", "--ps-socket", str(connection.fileno()))
    skeleton = stage.start_skeleton(*hand_over(SMALL, PID), "finish", "hangup", "sweep", "random", "2")
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    assert daemon.wait() == 0
    source.wait_for_end()
    # CLOSE, not FORCE_CLOSE: whoever has given the connection may go on with it.
    assert source.lines()[-2:] == ["close 0x1023", "eof"]


@pytest.mark.parametrize("words", [["--ps-socket", "63"], ["--port", "1"], ["--port", "9", "--address", "no.invalid"]])
def test_a_source_that_cannot_be_had_is_one_line(stage, words):
    stage.build_remote({PID: SMALL}, Answers)
    daemon = stage.start_daemon("--page-server", *words, listening=False)
    assert daemon.wait() == 1
    assert len(daemon.output.splitlines()) == 1, daemon.output


class Lazyd(Answers):
    """Speaks as lazyd's server does to lazyd: a page of the first VMA is zeros, one it does not have."""

    ZERO, LOST = BASE + 7 * PAGE, BASE + 30 * PAGE

    def get(self, get):
        for address in range(get.address, get.address + get.pages * PAGE, PAGE):
            if address in (self.ZERO, self.LOST):
                before = (address - get.address) // PAGE
                if before:
                    return self.flagged(super().get(get._replace(pages=before)))
                flag = LAZYD if address == self.ZERO else LAZYD | LAZY
                return header(24, ADD_F | flag, 1, address, get.pid)
        return self.flagged(super().get(get))

    def flagged(self, answer):
        return struct.pack("<I", struct.unpack_from("<I", answer)[0] | LAZYD) + answer[4:]


@pytest.mark.parametrize("fill", FILLS)
def test_what_lazyd_s_server_says_of_pages_without_bytes(stage, fill):
    """Zeros are zeros; a page that it does not have raises SIGBUS, and is told."""
    vmas = [Vma(BASE, 64, [Run(BASE, 7), Run(BASE + 8 * PAGE, 56)])]
    source = stage.build_remote({PID: [full(BASE, 64)]}, Lazyd)
    daemon = stage.start_daemon(*source.words, *FILLS[fill])
    words = [*hand_over(vmas, PID), "finish", "hangup", "bus", hex(Lazyd.LOST), "1", "sweep", "random", "1"]
    skeleton = stage.start_skeleton(*words)
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    assert daemon.wait() == 1
    assert f"1 page at {Lazyd.LOST:#x} cannot be read from page server 127.0.0.1:{source.port}" in daemon.output


def test_the_fill_asks_for_a_bounded_amount_ahead_of_local_pages(stage):
    """Else all that is remote would lie in memory beside the task, for as long as a slow disk takes."""
    local, remote = full(BASE, 8192), full(BASE + (1 << 30), 40_000)
    pages = Pages()
    here, there = stage._task(PID, [local], "dumped", None), stage._task(PID, [remote], "remote", pages)
    build_checkpoint(stage.images, [there._replace(entries=here.entries + there.entries, vmas=here.vmas + there.vmas)])
    with contextlib.closing(PageSource(Answers(pages), stage.folder / "source.log")) as source:
        daemon = stage.start_command(*source.words, "--fill-rate", "8M")
        skeleton = stage.start_skeleton(
            *hand_over([local, remote], PID), "finish", "hangup", "await", "sweep", "random", "1"
        )
        asked = []
        while len(asked) < 3 or len(set(asked[-3:])) > 1:
            time.sleep(0.3)
            asked.append(sum(get.pages for get in source.gets()))
            assert len(asked) < 30, asked
        assert 1000 < asked[-1] <= 12_000, asked
        skeleton.go_on()
        assert skeleton.wait() == (0, "ok\n"), daemon.output
        assert daemon.wait() == 0, daemon.output
