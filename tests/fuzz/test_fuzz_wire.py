# SPDX-License-Identifier: MIT
"""Whatever a peer sends, in whatever pieces, only ProtocolError comes out of the parsers; and pieces do not matter."""

from __future__ import annotations

import contextlib
import struct

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lazyd.uffd._engine import ffi, lib

from lazyd.errors import ProtocolError
from lazyd.wire import ClientParser, Command, Data, Flags, HeaderSize, Message, ServerParser, encode, image_id

SETTINGS = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
PAGE = 4096

pages = st.integers(1, 2)
addresses = st.integers(16, 1 << 20).map(lambda page: page * PAGE)
valid = st.one_of(
    st.integers(1, 99).map(lambda pid: Message(Command.OPEN2, destination=image_id(1, pid))),
    st.tuples(addresses, pages, st.integers(1, 99)).map(lambda ask: Message(Command.GET, *ask)),
    st.tuples(
        addresses,
        pages,
        st.just(image_id(1, 5)),
        st.sampled_from([Flags(0), Flags.PARENT, Flags.PRESENT, Flags.PRESENT | Flags.LAZY]),
    ).map(lambda entry: Message(Command.ADD_F, *entry)),
    st.sampled_from([Message(Command.CLOSE), Message(Command.FORCE_CLOSE)]),
)


@st.composite
def streams(draw):
    """Valid messages with their data, damaged here and there, or nothing but noise."""
    header = draw(st.sampled_from(list(HeaderSize)))
    content = bytearray()
    for message in draw(st.lists(valid, max_size=5)):
        content += encode(message, header) + b"\x5a" * message.data_bytes
    for at, value in draw(st.lists(st.tuples(st.integers(0, 1 << 14), st.integers(0, 255)), max_size=4)):
        if content:
            content[at % len(content)] = value
    return bytes(content) + draw(st.binary(max_size=60))


def run(parser, content: bytes, cuts: list[int]) -> tuple[list, str]:
    """Feed all; return the events, data joined, and the error if there was one."""
    events: list = []
    at = 0
    try:
        for cut in [*sorted(cut % (len(content) + 1) for cut in cuts), len(content)]:
            parser.feed(content[at:cut])
            at = cut
            while (event := parser.next_event()) is not None:
                if isinstance(event, Data) and events and isinstance(events[-1], Data):
                    event = Data(events.pop().content + event.content)
                events.append(event)
    except ProtocolError as error:
        return events, str(error)
    return events, ""


@SETTINGS
@given(streams(), st.lists(st.integers(0, 1 << 14), max_size=6), st.sampled_from([None, *HeaderSize]))
def test_server(content, cuts, header):
    assert run(ServerParser("peer", header), content, cuts) == run(ServerParser("peer", header), content, [])


@SETTINGS
@given(
    streams(),
    st.lists(st.integers(0, 1 << 14), max_size=6),
    st.lists(valid, max_size=5),
    st.sampled_from(list(HeaderSize)),
)
def test_client(content, cuts, asked, header):
    def parser():
        client = ClientParser("peer", header)
        for message in asked:
            client.send(message)
        return client

    whole, in_pieces = run(parser(), content, []), run(parser(), content, cuts)
    assert whole[0] == in_pieces[0]
    # How many bytes nobody asked for depends on how many have come.
    assert bool(whole[1]) == bool(in_pieces[1])


@SETTINGS
@given(st.binary(min_size=24, max_size=200))
def test_noise_is_consumed_or_refused(content):
    parser = ServerParser("peer")
    parser.feed(content)
    with contextlib.suppress(ProtocolError):
        for _ in range(len(content)):
            if parser.next_event() is None:
                assert parser.buffered < HeaderSize.WIDE
                break


ASKED = Message(Command.GET, 0x400000, 8, 1234)


@st.composite
def answer_headers(draw):
    """Headers of answers to ASKED: each field right most of the time, or what a wrong server might put there."""
    header = draw(st.sampled_from(list(HeaderSize)))
    word = draw(st.sampled_from([6, 6, 6, 7, 0x1024, 0xFFFF]))
    flags = draw(st.one_of(st.sampled_from([4, 4, 6, 0x8004, 0x8000, 0x8002]), st.integers(0, 0xFFFF)))
    count = draw(st.one_of(st.integers(1, 8), st.sampled_from([0, 9, (1 << 32) - 1]), st.integers(0, (1 << 32) - 1)))
    address = draw(st.sampled_from([0x400000, 0x400000, 0x400000, 0x401000, 0x400001, 0, (1 << 64) - 4096]))
    pid = draw(st.sampled_from([1234, 1234, 1234, 1235, 0, (1 << 32) + 1234, (1 << 64) - 1]))
    layout = struct.Struct("<IIQQ") if header is HeaderSize.NARROW else struct.Struct("<I4xQQQ")
    return header, layout.pack(word | flags << 16, count, address, pid)


@SETTINGS
@given(answer_headers())
def test_c_takes_an_answer_as_the_parser_does(answer):
    """The one that moves pages, in C, and the one that says what the protocol is, in Python, agree on every header."""
    header, content = answer
    question = ffi.new("struct lz_question *", (ASKED.address, ASKED.pages, ASKED.destination))
    found = ffi.new("struct lz_answer *")
    reason = lib.lz_answer_read(ffi.from_buffer("uint8_t[]", content), header, question, found)
    parser = ClientParser("server", header)
    parser.send(ASKED)
    parser.feed(content)
    try:
        message = parser.next_event()
    except ProtocolError:
        assert reason
        return
    assert isinstance(message, Message)
    is_right = message[1:4] == (ASKED.address, min(message.pages, ASKED.pages), ASKED.destination)
    assert (reason == 0) is is_right
    if is_right:
        kinds = {0: lib.LZ_ANSWER_ZEROS, Flags.LAZY: lib.LZ_ANSWER_NOTHING}
        kind = lib.LZ_ANSWER_BYTES if message.flags & Flags.PRESENT else kinds[message.flags & Flags.LAZY]
        assert (found.kind, found.pages) == (kind, message.pages)
        assert bool(found.speaks_lazyd) is bool(message.flags & Flags.LAZYD)
