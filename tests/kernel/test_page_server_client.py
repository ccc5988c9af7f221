# SPDX-License-Identifier: MIT
"""What goes to a page server, message by message, and servers that do not do what they should."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager

import pages_victim as pv
import pytest
from pages_victim import BASE, PAGE, RW, Victim, word_page

from lazyd.dump.core import PageKind, PagemapFormat, PagePipe, Progress, Source
from lazyd.dump.memory import dump_memory
from lazyd.dump.page_server import PageServer
from lazyd.dump.transfer import ImageType, MemoryImage
from lazyd.errors import DumpError, LazydError, ProtocolError, SystemCallError
from lazyd.image import Dialect
from lazyd.wire import Answer, Command, Data, Flags, HeaderSize, Message, Reply, ServerParser, encode_reply, image_id


class Server:
    """A page server that keeps what it is told; a subclass does something wrong."""

    has_parent = 1
    status = 0

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.parser = ServerParser("client")
        self.events: list = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while self.step():
                pass
        except BaseException as error:
            self.failure = error
        finally:
            self.connection.close()

    def step(self) -> bool:
        content = self.connection.recv(1 << 20)
        self.parser.feed(content)
        while (event := self.parser.next_event()) is not None:
            if isinstance(event, Data) and self.events and isinstance(self.events[-1], Data):
                event = Data(self.events.pop().content + event.content)
            self.events.append(event)
            if isinstance(event, Message):
                self.answer(event)
        return bool(content)

    def answer(self, message: Message) -> None:
        if message.command is Command.PARENT:
            self.connection.sendall(encode_reply(Reply(Answer.PARENT_STATUS, self.has_parent)))
        elif message.command is Command.OPEN2:
            self.connection.sendall(encode_reply(Reply(Answer.HAS_PARENT, self.has_parent)))
        elif message.command is Command.FORCE_CLOSE:
            self.connection.sendall(encode_reply(Reply(Answer.STATUS, self.status)))

    def let_open(self) -> None:
        """Answer the first question, and take an image's opening."""
        for answer in (Reply(Answer.PARENT_STATUS, 0), Reply(Answer.HAS_PARENT, 0)):
            self.connection.recv(HeaderSize.NARROW)
            self.connection.sendall(encode_reply(answer))


@contextmanager
def served(kind: type[Server] = Server):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    server = kind(theirs)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield ours, server
    finally:
        ours.close()
        thread.join(20)
        assert not thread.is_alive()


def task_pipe(victim: Victim) -> PagePipe:
    """Runs of every kind; the pages are the victim's."""
    victim.map(BASE, 2000)
    victim.write(BASE, 2000, 1)
    pipe = PagePipe()
    pipe.add(BASE, 3, PageKind.DUMPED, lazy=True)
    pipe.add(BASE + 3 * PAGE, 2, PageKind.DUMPED)
    pipe.add(BASE + 5 * PAGE, 4, PageKind.ZERO, lazy=True)
    pipe.add(BASE + 9 * PAGE, 1, PageKind.PARENT, lazy=True)
    pipe.add(BASE + 10 * PAGE, 1, PageKind.PARENT)
    pipe.add(BASE + 12 * PAGE, 1900, PageKind.DUMPED, lazy=True)
    return pipe


@pytest.mark.parametrize("lazy_holes", [False, True])
@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("header", HeaderSize)
def test_messages(victim, header, dialect, lazy_holes):
    pipe = task_pipe(victim)
    form = PagemapFormat(dialect, lazy_holes=lazy_holes)
    destination = image_id(1, 77)
    with served() as (ours, server), PageServer(ours, "test", form, header=header) as client:
        transfer = client.open(MemoryImage(ImageType.TASK, 77))
        transfer.write_hole(pipe)
        transfer.write_pages(pipe, Source(victim.pid), Progress())
        transfer.write_pagemap(pipe)
        client.close()
    assert server.failure is None
    assert server.parser.header is header

    def entry(page: int, pages: int, flags: Flags) -> Message:
        return Message(Command.ADD_F, BASE + page * PAGE, pages, destination, flags)

    lazy = Flags.LAZY if lazy_holes else Flags(0)
    expected: list = [
        Message(Command.PARENT, destination=destination),
        Message(Command.OPEN2, destination=destination),
        entry(0, 3, Flags.PRESENT | Flags.LAZY),
        Data(b"".join(word_page(1 + i) for i in range(3))),
        entry(3, 2, Flags.PRESENT),
        Data(b"".join(word_page(4 + i) for i in range(2))),
        entry(5, 4, Flags(0)),
        entry(9, 1, Flags.PARENT | lazy),
        entry(10, 1, Flags.PARENT),
        entry(12, 1900, Flags.PRESENT | Flags.LAZY),
        Data(b"".join(word_page(13 + i) for i in range(1900))),
        Message(Command.FORCE_CLOSE),
    ]
    if dialect is Dialect.FLAGS:
        expected.remove(entry(5, 4, Flags(0)))
    assert server.events == expected


def test_tasks_and_shared_memory_one_after_the_other(victim):
    victim.map(BASE, 10)
    victim.write(BASE, 10, 1)
    victim.map(BASE + 100 * PAGE, 10, RW, pv.MAP_SHARED)
    victim.write(BASE + 103 * PAGE, 2, 50)
    areas = victim.areas(BASE, pv.TOP)
    with served() as (ours, server), PageServer(ours, "test") as client, victim.stopped():
        dump_memory(victim.pid, areas, client, image_pid=5)
    assert server.failure is None
    shared = image_id(2, areas[1].shmid)
    assert server.events == [
        Message(Command.PARENT, destination=image_id(1, 5)),
        Message(Command.OPEN2, destination=image_id(1, 5)),
        Message(Command.ADD_F, BASE, 10, image_id(1, 5), Flags.PRESENT | Flags.LAZY),
        Data(b"".join(word_page(1 + i) for i in range(10))),
        Message(Command.OPEN2, destination=shared),
        Message(Command.ADD_F, 3 * PAGE, 2, shared, Flags.PRESENT),
        Data(word_page(50) + word_page(51)),
        Message(Command.FORCE_CLOSE),
    ]


class Orphan(Server):
    """It has no parent."""

    has_parent = 0


class Full(Server):
    """It cannot keep what it got."""

    status = -28


class Deaf(Server):
    """It opens an image and then takes nothing."""

    def step(self) -> bool:
        self.let_open()
        threading.Event().wait(3)
        return False


class Mute(Server):
    """It takes all and never answers."""

    def answer(self, message: Message) -> None:
        pass


class Stuck(Server):
    """It answers the first question only."""

    def answer(self, message: Message) -> None:
        if message.command is Command.PARENT:
            super().answer(message)


class Mumbling(Server):
    """Its answers mean nothing."""

    has_parent = 7


class Leaving(Server):
    """It hangs up in the middle of the pages."""

    def step(self) -> bool:
        self.let_open()
        self.connection.recv(100_000)
        return False


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        (Full, DumpError, "test: the page server could not keep all pages: it ended with -28"),
        (Deaf, SystemCallError, r"test: send: E\w+, [a-z ]+ \(the page server does not take anything for 1 s\)"),
        (Mute, ProtocolError, "test: no answer to the first question: timed out; is it of the other header size"),
        (Stuck, ProtocolError, "test: no answer to opening an image: timed out; is it of the other header size"),
        (Mumbling, ProtocolError, "test: 7 as an answer"),
        (Leaving, SystemCallError, r"test: send: E\w+, [a-z ]+ \(the page server hung up"),
    ],
)
def test_servers_that_fail(victim, kind, error, reason):
    victim.map(BASE, 4000)
    victim.write(BASE, 4000, 1)
    areas = victim.areas(BASE, pv.TOP)
    with (
        served(kind) as (ours, _),
        pytest.raises(error, match=reason),
        PageServer(ours, "test", timeout_s=1) as client,
        victim.stopped(),
    ):
        dump_memory(victim.pid, areas, client)
    victim.read(BASE, 1)  # it goes on


def test_parent_holes_need_a_parent(victim):
    pipe = PagePipe()
    pipe.add(BASE, 1, PageKind.PARENT)
    with served(Orphan) as (ours, server), PageServer(ours, "test") as client:
        transfer = client.open(MemoryImage(ImageType.TASK, 77))
        with pytest.raises(DumpError, match=r"test: has no parent of pagemap-77\.img"):
            transfer.write_hole(pipe)
    # It hung up without a word: the server does not take what it has for whole.
    image = image_id(1, 77)
    assert server.events == [Message(Command.PARENT, destination=image), Message(Command.OPEN2, destination=image)]


def test_nobody_listens():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        words = rf"127\.0\.0\.1:{port}: connect: ECONNREFUSED, [a-z ]+ \(nobody listens there: is the other end up"
        with pytest.raises(LazydError, match=words):
            PageServer.connect("127.0.0.1", port)
