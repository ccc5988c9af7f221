# SPDX-License-Identifier: MIT
"""The page server's protocol: layouts byte by byte, every split of the input, and what is refused."""

from __future__ import annotations

import random

import pytest

from lazyd.errors import ProtocolError
from lazyd.wire import (
    COMMANDS,
    Answer,
    ClientParser,
    Command,
    Data,
    Flags,
    HeaderSize,
    Message,
    Reply,
    ServerParser,
    encode,
    encode_reply,
    guess_header,
    image_id,
    split_image_id,
)

NARROW, WIDE = HeaderSize.NARROW, HeaderSize.WIDE
PAGE = 4096
TASK = image_id(1, 1234)

# Written by hand from the layouts, not by the encoder.
LAYOUTS = [
    (Message(Command.OPEN2, destination=TASK), NARROW, "04000000 00000000 0000000000000000 01d2040000000000"),
    (
        Message(Command.OPEN2, destination=TASK),
        WIDE,
        "04000000 00000000 0000000000000000 0000000000000000 01d2040000000000",
    ),
    (
        Message(Command.ADD_F, 0x7F0000001000, 3, TASK, Flags.LAZY | Flags.PRESENT),
        NARROW,
        "06000600 03000000 00100000007f0000 01d2040000000000",
    ),
    (
        Message(Command.ADD_F, 0x7F0000001000, 3, TASK, Flags.PARENT),
        WIDE,
        "06000100 00000000 0300000000000000 00100000007f0000 01d2040000000000",
    ),
    (Message(Command.GET, 0x400000, 16, 1234), NARROW, "07000000 10000000 0000400000000000 d204000000000000"),
    (
        Message(Command.GET, 0x400000, 16, 1234, Flags.LAZYD),
        NARROW,
        "07000080 10000000 0000400000000000 d204000000000000",
    ),
    (
        Message(Command.ADD_F, 0x400000, 16, 1234, Flags.LAZYD | Flags.LAZY),
        WIDE,
        "06000280 00000000 1000000000000000 0000400000000000 d204000000000000",
    ),
    (Message(Command.IDENTIFY, destination=1234), NARROW, "5a4c0000 00000000 0000000000000000 d204000000000000"),
    (Message(Command.CLOSE), NARROW, "23100000 00000000 0000000000000000 0000000000000000"),
    (Message(Command.FORCE_CLOSE), NARROW, "24100000 00000000 0000000000000000 0000000000000000"),
    (
        Message(Command.PARENT, destination=image_id(2, 5)),
        NARROW,
        "05000000 00000000 0000000000000000 0205000000000000",
    ),
]


@pytest.mark.parametrize(("message", "header", "hexadecimal"), LAYOUTS)
def test_layout(message, header, hexadecimal):
    content = bytes.fromhex(hexadecimal)
    assert encode(message, header) == content
    parser = ServerParser("client", header)
    parser.feed(content)
    assert parser.next_event() == message


def any_message(chance: random.Random, header: HeaderSize) -> Message:
    command = chance.choice(list(Command))
    rule = COMMANDS[command]
    flags = Flags(0)
    if command is Command.ADD_F:
        flags = chance.choice([Flags(0), Flags.PARENT, Flags.LAZY, Flags.PRESENT, Flags.LAZY | Flags.PRESENT])
    address = pages = 0
    if rule.has_range:
        address = chance.randrange(16, 1 << 30) * PAGE
        probe = Message(command, address, 1, 0, flags)
        pages = chance.randint(1, 3) if probe.data_bytes else chance.randint(1, 1 << 20)
    destination = {
        "IMAGE": image_id(chance.choice([1, 2]), chance.randint(1, 1 << 30)),
        "TASK": chance.randint(1, 1 << 22),
    }
    return Message(command, address, pages, destination.get(rule.names.name, TASK), flags)


def collect(parser, content: bytes, cuts: list[int]) -> list:
    """Feed content in pieces; return the events, with data that was cut joined."""
    events: list = []
    at = 0
    for cut in [*cuts, len(content)]:
        parser.feed(content[at:cut])
        at = cut
        while (event := parser.next_event()) is not None:
            if isinstance(event, Data) and events and isinstance(events[-1], Data):
                event = Data(events.pop().content + event.content)
            events.append(event)
    return events


@pytest.mark.parametrize("header", HeaderSize)
@pytest.mark.parametrize("seed", range(20))
def test_any_split_of_the_input_gives_the_same(header, seed):
    chance = random.Random(seed)
    content, expected = b"", []
    for _ in range(10):
        message = any_message(chance, header)
        content += encode(message, header)
        expected.append(message)
        if message.data_bytes:
            data = chance.randbytes(message.data_bytes)
            content += data
            expected.append(Data(data))
    assert collect(ServerParser("client", header), content, []) == expected
    assert collect(ServerParser("client", header), content, list(range(1, 200))) == expected
    for _ in range(10):
        cuts = sorted(chance.sample(range(len(content)), 8))
        assert collect(ServerParser("client", header), content, cuts) == expected


@pytest.mark.parametrize("header", HeaderSize)
def test_answers_come_in_the_order_of_the_questions(header):
    client = ClientParser("server", header)
    server = ServerParser("client")
    for message in (
        Message(Command.OPEN2, destination=TASK),
        Message(Command.PARENT, destination=TASK),
        Message(Command.IDENTIFY, destination=1234),
        Message(Command.GET, 0x400000, 2, 1234),
        Message(Command.CLOSE),
    ):
        server.feed(client.send(message))
        assert server.next_event() == message
    assert server.header is header
    pages = Message(Command.ADD_F, 0x400000, 1, 1234, Flags.PRESENT)
    content = encode_reply(Reply(Answer.HAS_PARENT, 1)) + encode_reply(Reply(Answer.PARENT_STATUS, 0))
    content += encode_reply(Reply(Answer.IDENTITY, 1 << 63))
    content += encode(pages, header) + bytes(PAGE) + encode_reply(Reply(Answer.STATUS, -5))
    for cuts in ([], list(range(len(content)))):
        parser = ClientParser("server", header)
        for message in (Command.OPEN2, Command.PARENT, Command.IDENTIFY, Command.GET, Command.CLOSE):
            parser.send(Message(message, 0x400000, 2, TASK))
        assert parser.awaited == 5
        assert collect(parser, content, cuts) == [
            Reply(Answer.HAS_PARENT, 1),
            Reply(Answer.PARENT_STATUS, 0),
            Reply(Answer.IDENTITY, 1 << 63),
            pages,
            Data(bytes(PAGE)),
            Reply(Answer.STATUS, -5),
        ]
        assert parser.awaited == 0


@pytest.mark.parametrize("header", HeaderSize)
@pytest.mark.parametrize("seed", range(200))
def test_the_header_is_told_by_the_first_message(header, seed):
    chance = random.Random(seed)
    command = chance.choice([Command.OPEN, Command.OPEN2, Command.PARENT, Command.GET, Command.IDENTIFY])
    pid = chance.choice([1, 4096, 65536, 1 << 20, chance.randrange(1, 1 << 22)])
    message = Message(command, destination=image_id(chance.choice([1, 2]), pid))
    if command is Command.GET:
        address = chance.choice([0x400000, 0x7F0000000000, chance.randrange(1 << 10, 1 << 34) * PAGE])
        message = Message(command, address, chance.choice([1, 2, 16, 1024, 1 << 16, 1 << 18]), pid)
    content = encode(message, header)
    if header is WIDE and command is not Command.GET:
        content = content[:4] + chance.randbytes(4) + content[8:]  # what is between is anything
    assert guess_header(content) is header
    parser = ServerParser("client")
    for byte in content:
        assert parser.next_event() is None
        parser.feed(bytes([byte]))
    assert parser.next_event() == message


@pytest.mark.parametrize("header", HeaderSize)
def test_a_close_comes_first_in_either_header(header):
    parser = ServerParser("client")
    parser.feed(encode(Message(Command.FORCE_CLOSE), header))
    assert parser.next_event() == Message(Command.FORCE_CLOSE)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("08000000 01000000 0010000000000000 01d2040000000000", "unknown command 0x8"),
        ("06000800 01000000 0010000000000000 01d2040000000000", "flags 0x8"),
        ("07000400 01000000 0010000000000000 d204000000000000", "GET with flags 0x4"),
        ("06000500 01000000 0010000000000000 01d2040000000000", "at once"),
        ("06000400 01000000 0110000000000000 01d2040000000000", "not page-aligned"),
        ("06000400 00000000 0010000000000000 01d2040000000000", "no pages"),
        ("06000400 02000000 00e0ffffff7f0000 01d2040000000000", "leaves user space"),
        ("06000400 01000000 0000000000000080 01d2040000000000", "leaves user space"),
        ("04000000 00000000 0000000000000000 03d2040000000000", "no image id"),
        ("04000000 01000000 0000000000000000 01d2040000000000", "with an address or pages"),
        ("07000000 01000000 0010000000000000 0000000000000000", "no pid"),
        ("07000000 01000000 0010000000000000 0000008000000000", "no pid"),
    ],
)
def test_refuses(message, reason):
    parser = ServerParser("10.0.0.1", NARROW)
    parser.feed(bytes.fromhex(message))
    with pytest.raises(ProtocolError, match=f"10.0.0.1: .*{reason}"):
        parser.next_event()


def test_refuses_answers_that_nobody_asked_for():
    parser = ClientParser("server", NARROW)
    assert parser.next_event() is None
    parser.feed(b"x")
    with pytest.raises(ProtocolError, match="nobody asked"):
        parser.next_event()


def test_refuses_answers_of_another_kind():
    parser = ClientParser("server", NARROW)
    parser.send(Message(Command.GET, 0x400000, 1, 1))
    parser.feed(encode(Message(Command.ADD_F, 0x400000, 1, 1, Flags.PARENT), NARROW))
    with pytest.raises(ProtocolError, match="where pages were asked for"):
        parser.next_event()
    parser = ClientParser("server", NARROW)
    parser.send(Message(Command.OPEN2, destination=TASK))
    parser.feed(b"\x02")
    with pytest.raises(ProtocolError, match="2 as an answer"):
        parser.next_event()


def test_data_may_be_taken_elsewhere():
    parser = ServerParser("client", NARROW)
    parser.feed(encode(Message(Command.ADD, 0x400000, 2, TASK), NARROW))
    assert isinstance(parser.next_event(), Message)
    assert parser.data_left == 2 * PAGE
    parser.skip_data(PAGE)
    parser.feed(bytes(PAGE))
    with pytest.raises(ValueError, match="fed"):
        parser.skip_data(1)
    assert parser.next_event() == Data(bytes(PAGE))
    assert parser.data_left == 0


def test_ids():
    assert split_image_id(image_id(2, 77)) == (2, 77)
    assert image_id(1, 1234) == 1234 * 256 + 1


def test_the_narrow_header_refuses_what_it_cannot_say():
    message = Message(Command.ADD_F, 0x10000, 1 << 32, TASK)
    with pytest.raises(ValueError, match="cut the run"):
        encode(message, NARROW)
    assert len(encode(message, WIDE)) == 32
