# SPDX-License-Identifier: MIT
"""Pages that are asked for: every one right, whoever asks, in whatever pieces."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time

import pytest
from images_builder import PAGE, Entry, Task, build_checkpoint, page_pattern
from page_server_harness import (
    BASE,
    CLOSE,
    FORCE_CLOSE,
    GET,
    IDENTIFY,
    LAZY,
    LAZYD,
    PRESENT,
    Client,
    Lines,
    connected,
    random_chain,
    running_server,
)

from lazyd.serve.connection import Desk
from lazyd.serve.shelves import Shelves

PID = 77
HEADERS = pytest.mark.parametrize("header", [24, 32])


def desk_for(images, **options) -> Desk:
    return Desk(Lines(), images, Shelves(images, **options))


def check(answer, asked: int, truth, flags: int) -> None:
    """Hold one answer against what the pages are. `asked` is the first page, of which nothing else is known."""
    first = truth[asked] if asked < len(truth) else None
    assert answer.destination == PID
    if first is None and not flags:
        assert (answer.flags, answer.pages, answer.address) == (PRESENT, 0, 0)
        return
    assert answer.address == BASE + asked * PAGE
    assert answer.pages > 0
    pages = [truth[page] if page < len(truth) else None for page in range(asked, asked + answer.pages)]
    if flags:
        kind = 0 if first == bytes(PAGE) else PRESENT if first else LAZY
        assert answer.flags == LAZYD | kind
    else:
        assert answer.flags == PRESENT
    if answer.flags & PRESENT:
        assert answer.data == b"".join(pages)
    else:
        assert set(pages) == {first}


@HEADERS
@pytest.mark.parametrize("flags", [0, LAZYD])
@pytest.mark.parametrize("over_tcp", [False, True])
def test_random_questions_to_a_chain(header, flags, over_tcp, tmp_path):
    images, truth = random_chain(tmp_path / "chain", 4, 300, seed=header + flags + over_tcp)
    chance = random.Random(1)
    asked = [(chance.randrange(310), chance.choice((1, 2, 7, 64, 400))) for _ in range(600)]
    with connected(desk_for(images, dialect="booleans"), header, over_tcp=over_tcp) as client:
        sender = threading.Thread(
            target=lambda: [client.ask(BASE + page * PAGE, pages, PID, flags) for page, pages in asked]
        )
        sender.start()
        for page, pages in asked:
            answer = client.answer()
            check(answer, page, truth, flags)
            assert answer.pages <= pages
        sender.join()


@pytest.fixture
def simple(tmp_path):
    """Images of a task with four pages, and what they are."""
    images = build_checkpoint(tmp_path / "simple", [Task(PID, [Entry(BASE, 4)])])
    return images, [page_pattern(BASE + page * PAGE) for page in range(4)]


def kinds(truth) -> list[str]:
    return ["zero" if page == bytes(PAGE) else "bytes" if page else "none" for page in truth]


@pytest.mark.parametrize("flags", [0, LAZYD])
def test_an_answer_is_as_long_as_it_can_be(flags, tmp_path):
    images, truth = random_chain(tmp_path / "chain", 3, 200, seed=5)
    what = kinds(truth) if flags else ["none" if kind == "none" else "bytes" for kind in kinds(truth)]
    with connected(desk_for(images, dialect="booleans"), 32) as client:
        for page in range(200):
            client.ask(BASE + page * PAGE, 200 - page, PID, flags)
            run = next((i for i in range(page, 200) if what[i] != what[page]), 200) - page
            assert client.answer().pages == (run if flags or what[page] != "none" else 0)
    assert {"zero", "bytes", "none"} == set(kinds(truth))


def test_one_answer_is_bounded(tmp_path):
    images = build_checkpoint(tmp_path / "images", [Task(PID, [Entry(BASE, 5000)])])
    with connected(desk_for(images), 32) as client:
        client.ask(BASE, 5000, PID, LAZYD)
        first = client.answer()
        assert first.pages == 4096
        client.ask(BASE + 4096 * PAGE, 5000 - 4096, PID, LAZYD)
        rest = client.answer()
    data = first.data + rest.data
    assert all(data[i * PAGE : (i + 1) * PAGE] == page_pattern(BASE + i * PAGE) for i in range(5000))


def test_several_tasks_over_one_connection(tmp_path):
    entries = {pid: [Entry(BASE + pid * PAGE, pid)] for pid in (3, 1, 2)}
    images = build_checkpoint(
        tmp_path / "images", [Task(pid, entries[pid], ppid=0 if pid == 3 else 3) for pid in entries]
    )
    desk = desk_for(images)
    with connected(desk, 24) as client:
        for pid in (2, 9, 1, 3, 2, 1):
            client.ask(BASE + pid * PAGE, 1, pid, LAZYD)
        for pid in (2, 9, 1, 3, 2, 1):
            answer = client.answer()
            assert answer.destination == pid
            assert answer.flags == LAZYD | (LAZY if pid == 9 else PRESENT)
            assert answer.data == (b"" if pid == 9 else page_pattern(BASE + pid * PAGE))
    lines = [line for line in desk.log.lines if "asks for" in line]
    assert len(lines) == 2
    assert "asks for task 9: " in lines[0]
    assert "pagemap-9.img: missing: nothing is known of this task" in lines[0]
    assert lines[1] == f"client: asks for the page at {BASE + 9 * PAGE:#x} of task 9, which is not here"


def test_somebody_who_asks_for_all_tasks(simple):
    desk = desk_for(simple[0])
    with connected(desk, 24) as client:
        with contextlib.suppress(BrokenPipeError):
            for pid in range(1000, 1200):
                client.ask(BASE, 1, pid, LAZYD)
        assert client.is_hung_up_on()
    assert len(desk.log.lines) == 64 + 1 + 2  # the first page that is not here, and the summary
    assert "client: asks for more than 64 tasks of which nothing is here" in desk.log.lines


def identity(images, pid: int = PID) -> int:
    with connected(desk_for(images, dialect="booleans"), 32) as client:
        client.send(IDENTIFY, destination=pid)
        return client.number("<Q")


def test_identity(tmp_path):
    images, _ = random_chain(tmp_path / "chain", 3, 50, seed=1)
    first = identity(images)
    assert first not in (0, identity(random_chain(tmp_path / "other", 3, 50, seed=1)[0]))
    assert identity(images) == first
    assert identity(images, 78) == 0
    pages = next((tmp_path / "chain" / "1").glob("pages-*.img"))
    os.utime(pages)
    assert identity(images) != first


@HEADERS
@pytest.mark.parametrize("command", [CLOSE, FORCE_CLOSE])
@pytest.mark.parametrize("asks", [False, True])
def test_closing(header, command, asks, simple):
    images, truth = simple
    desk = desk_for(images)
    with connected(desk, header) as client:
        if asks:
            client.ask(BASE, 1, PID, LAZYD)
            check(client.answer(), 0, truth, LAZYD)
        client.send(command)
        assert client.number() == 0
        if asks and command == CLOSE:
            client.ask(BASE, 1, PID, LAZYD)  # the connection is still there
            check(client.answer(), 0, truth, LAZYD)
        else:
            assert client.is_hung_up_on()
    assert not [line for line in desk.log.lines if "answers" not in line]


def test_what_is_loaded_is_shared_renewed_and_given_back(tmp_path):
    images = build_checkpoint(tmp_path / "images", [Task(PID, [Entry(BASE, 2)])])
    desk = desk_for(images)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  only counted
    with connected(desk, 32) as old, connected(desk, 32) as same:
        for client in (old, same):
            client.ask(BASE, 1, PID)
            assert client.answer().data == page_pattern(BASE)
        # Two connections have two ends each; the pages image is open once.
        assert len(os.listdir("/proc/self/fd")) == before + 5  # noqa: PTH208
        newer = build_checkpoint(tmp_path / "newer", [Task(PID, [Entry(BASE, 2)])], salt=5)
        for name in ("pages-1.img", f"pagemap-{PID}.img"):
            (newer / name).rename(images / name)
        with connected(desk, 32) as new:
            new.ask(BASE, 1, PID)
            assert new.answer().data == page_pattern(BASE, 5)
            old.ask(BASE + PAGE, 1, PID)
            assert old.answer().data == page_pattern(BASE + PAGE)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_pages_image_that_is_cut_is_never_zeros(simple):
    images, _ = simple
    with connected(desk_for(images), 32) as client:
        client.ask(BASE, 4, PID, LAZYD)
        assert client.answer().pages == 4
        os.truncate(images / "pages-1.img", 2 * PAGE + 100)
        client.ask(BASE, 4, PID, LAZYD)
        answer = client.answer()
        assert (answer.pages, answer.data) == (2, page_pattern(BASE) + page_pattern(BASE + PAGE))
        client.ask(BASE + 2 * PAGE, 2, PID, LAZYD)
        assert client.answer()[:2] == (LAZYD | LAZY, 2)


@pytest.mark.parametrize("flags", [0, LAZYD])
def test_a_pages_image_that_is_cut_in_the_middle_of_an_answer(flags, tmp_path):
    """lazyd is hung up on, and comes again; a stock daemon would go, and leave its tasks with zeros."""
    images = build_checkpoint(tmp_path / "images", [Task(PID, [Entry(BASE, 2000)])])
    desk = desk_for(images)
    with connected(desk, 32) as client:
        client.ask(BASE, 2000, PID, flags)
        client.receive(32)
        os.truncate(images / "pages-1.img", 1000 * PAGE)
        got = client.receive(1000 * PAGE)
        assert got[-PAGE:] == page_pattern(BASE + 999 * PAGE)
        client.socket.settimeout(0.3)
        with pytest.raises(EOFError if flags else TimeoutError):
            client.receive(1)
    assert (
        f"the page at {BASE + 1000 * PAGE:#x} of task 77 cannot be read: its pages image was cut" in desk.log.lines[0]
    )


def test_images_that_cannot_be_trusted_are_not_given(simple):
    images, _ = simple
    os.truncate(images / "pages-1.img", PAGE)
    desk = desk_for(images)
    with connected(desk, 32) as client:
        client.ask(BASE, 1, PID, LAZYD)
        assert client.answer().flags == LAZYD | LAZY
    assert "pages-1.img, offset 4096" in desk.log.lines[0]
    assert "too short" in desk.log.lines[0]


def test_not_given_unless_told_to(simple):
    desk = Desk(Lines(), simple[0])
    with connected(desk, 32) as client:
        client.ask(BASE, 1, PID)
        assert client.is_hung_up_on()
    assert desk.log.lines == ["client: asks for pages of task 77: start the server with --lazy-pages"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ((GET, BASE + 1, 1, PID), "GET at 0x7f0000000001, which is not page-aligned"),
        ((GET, BASE, 0, PID), "GET of no pages"),
        ((GET, BASE, 1 << 60, PID), "GET of 1152921504606846976 pages at 0x7f0000000000, which leaves user space"),
        ((GET, BASE, 1, 1 << 40), "GET of 0x10000000000, which is no pid"),
        ((GET | 0x70000, BASE, 1, PID), "GET with flags 0x7"),
        ((99, BASE, 1, PID), "unknown command 0x63"),
        ((CLOSE, BASE, 1, PID), "CLOSE with an address or pages"),
    ],
)
def test_nonsense(message, reason, simple):
    images, truth = simple
    desk = desk_for(images)
    with connected(desk, 32) as client:
        client.ask(BASE, 1, PID, LAZYD)
        check(client.answer(), 0, truth, LAZYD)
        client.send(*message)
        assert client.is_hung_up_on()
    assert desk.log.lines[0].startswith(f"client: {reason}")
    assert [line for line in desk.log.lines[1:] if "answers" not in line] == []


@HEADERS
def test_hanging_up_after_every_byte(header, simple):
    desk = desk_for(simple[0])
    content = b"".join(Client(socket.socket(), header).encode(GET, BASE, 1, PID) for _ in range(2))
    for length in range(len(content)):
        desk.log.lines.clear()
        with connected(desk, header) as client:
            client.socket.sendall(content[:length])
            client.socket.shutdown(socket.SHUT_WR)
            client.is_hung_up_on()
        said = [line for line in desk.log.lines if "answers" not in line]
        assert said == (["client: hung up in the middle of a message"] if length % header else [])


def test_in_any_pieces(tmp_path):
    images, truth = random_chain(tmp_path / "chain", 2, 50, seed=3)
    chance = random.Random(2)
    with connected(desk_for(images, dialect="booleans"), 24, over_tcp=True) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        content = b"".join(client.encode(GET | LAZYD << 16, BASE + page * PAGE, 3, PID) for page in range(50))
        at = 0
        while at < len(content):
            length = chance.choice((1, 5, 23, 24, 25, 100))
            client.socket.sendall(content[at : at + length])
            at += length
        for page in range(50):
            check(client.answer(), page, truth, LAZYD)


def test_one_that_stalls_holds_up_nobody(tmp_path):
    """It asks for far more than fits on the way and does not read: the others do not notice, and it is said once."""
    images = build_checkpoint(tmp_path / "images", [Task(PID, [Entry(BASE, 2000)])])
    desk = desk_for(images)
    with connected(desk, 32, stall_s=0.2, over_tcp=True) as slow, connected(desk, 32, over_tcp=True) as quick:
        for _ in range(10):
            slow.ask(BASE, 2000, PID, LAZYD)
        end = time.monotonic() + 10
        while not [line for line in desk.log.lines if "stalls" in line] and time.monotonic() < end:
            quick.ask(BASE + 7 * PAGE, 1, PID)
            assert quick.answer().data == page_pattern(BASE + 7 * PAGE)
        time.sleep(0.5)
        assert desk.log.lines == ["client: stalls: nothing moves for 0.2 s"]
        # It goes on where it was.
        for _ in range(10):
            assert slow.receive(32)[:4] == struct.pack("<HH", 6, LAZYD | PRESENT)
            data = slow.receive(2000 * PAGE)
            assert data[-PAGE:] == page_pattern(BASE + 1999 * PAGE)


def test_eight_clients_at_once(tmp_path):
    images, truth = random_chain(tmp_path / "chain", 4, 400, seed=9)
    with running_server(images, tmp_path / "log", "--lazy-pages", "--pagemap-format", "booleans") as server:
        failures: list = []

        def run(number: int) -> None:
            try:
                chance = random.Random(number)
                client = server.connect(24 if number % 2 else 32)
                with client.socket:
                    for _ in range(300):
                        asked = [(chance.randrange(400), chance.choice((1, 30))) for _ in range(8)]
                        for page, pages in asked:
                            client.ask(BASE + page * PAGE, pages, PID, LAZYD)
                        for page, _ in asked:
                            check(client.answer(), page, truth, LAZYD)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        first = server.connect()
        first.send(IDENTIFY, destination=PID)
        before = first.number("<Q")
        first.ask(BASE, 1, PID)  # in the middle of a session when the server is ended
        first.answer()
    assert first.is_hung_up_on()
    with running_server(images, tmp_path / "log", "--lazy-pages", "--pagemap-format", "booleans") as server:
        again = server.connect()
        again.send(IDENTIFY, destination=PID)
        assert again.number("<Q") == before
