# SPDX-License-Identifier: MIT
"""Whatever a client of the page server sends, in whatever pieces: the answers and the images of a naive server.

The naive one has the same parser of messages, and nothing else of it: no C, no runs, a dictionary of pages.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images_builder import PAGE, Entry, Task, build_checkpoint, page_pattern, read_entries
from page_server_harness import BASE, Lines, connected

from lazyd.errors import ProtocolError
from lazyd.serve.connection import Desk
from lazyd.serve.shelves import Shelves
from lazyd.wire import Command, Data, Flags, HeaderSize, Message, ServerParser, encode, guess_header, image_id

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
PID = 77
# What is given: pages 0 and 1, zeros at 2, nothing at 3, pages from 4 on.
GIVEN = [
    page_pattern(BASE),
    page_pattern(BASE + PAGE),
    bytes(PAGE),
    None,
    *(page_pattern(BASE + i * PAGE) for i in (4, 5)),
]

addresses = st.integers(0, 7).map(lambda page: BASE + page * PAGE)
images = st.sampled_from([image_id(1, 5), image_id(2, 6)])
valid = st.one_of(
    images.map(lambda image: Message(Command.OPEN2, destination=image)),
    images.map(lambda image: Message(Command.PARENT, destination=image)),
    st.tuples(addresses, st.integers(1, 4), st.sampled_from([PID, 3]), st.sampled_from([Flags(0), Flags.LAZYD])).map(
        lambda ask: Message(Command.GET, *ask)
    ),
    st.tuples(
        addresses,
        st.integers(1, 2),
        images,
        st.sampled_from([Flags(0), Flags.PARENT, Flags.PRESENT, Flags.PRESENT | Flags.LAZY, Flags.LAZY]),
    ).map(lambda entry: Message(Command.ADD_F, *entry)),
    st.sampled_from([Message(Command.CLOSE), Message(Command.FORCE_CLOSE)]),
)


@st.composite
def streams(draw):
    """Valid messages with their data, some of them damaged, or followed by noise."""
    header = draw(st.sampled_from(list(HeaderSize)))
    content = bytearray()
    for number, message in enumerate(draw(st.lists(valid, max_size=7))):
        content += encode(message, header) + bytes([number + 1]) * message.data_bytes
    for at, value in draw(st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), max_size=2)):
        if content:
            content[at % len(content)] = value
    return bytes(content) + draw(st.sampled_from([b"", b"", b"\x07", b"\x01" * 40]))


class Naive:
    """A page server of which one sees that it is right."""

    def __init__(self) -> None:
        self.replies = bytearray()
        self.published: dict[int, list[tuple[int, int, int, bytes]]] = {}
        self.images: dict[int, list[list]] = {}
        self.current = 0
        self.header = HeaderSize.NARROW

    def run(self, content: bytes) -> None:
        """Work on all that a client sends."""
        parser = ServerParser("client")
        if len(content) >= HeaderSize.NARROW and guess_header(content) is None:
            content = content[:4] + bytes(20)  # an end before the beginning: it may have either header
        parser.feed(content)
        with contextlib.suppress(ProtocolError):
            while (event := parser.next_event()) is not None:
                if isinstance(event, Data):
                    self.images[self.current][-1][3] += event.content
                elif not self.take(event, parser.header):
                    return

    def take(self, message: Message, header: HeaderSize | None) -> bool:
        """Work on one message; False: it is the last."""
        self.header = header or HeaderSize.NARROW
        match message.command:
            case Command.GET:
                self.give(message)
            case Command.OPEN | Command.OPEN2:
                self.open(message.destination)
                self.replies += b"\0" if message.command is Command.OPEN2 else b""
            case Command.PARENT:
                self.replies += bytes(4)
            case Command.ADD | Command.HOLE | Command.ADD_F:
                self.add(message)
            case Command.CLOSE | Command.FORCE_CLOSE:
                holes = any(flags & Flags.PARENT for entries in self.images.values() for _, _, flags, _ in entries)
                self.replies += (-22 if holes else 0).to_bytes(4, "little", signed=True)
                if not holes:
                    self.published |= {image: [tuple(entry) for entry in of] for image, of in self.images.items()}
                self.images, self.current = {}, 0
                return message.command is Command.CLOSE and header is not None
            case _:
                raise ProtocolError("client", "not in these streams")
        return True

    def open(self, image: int) -> None:
        """Start an image, anew if it was there."""
        if image & 0xFF not in (1, 2):
            raise ProtocolError("client", "no image")
        self.images.pop(image, None)
        self.images[image] = []
        self.current = image

    def add(self, message: Message) -> None:
        """Take an entry."""
        if message.destination != self.current:
            self.open(message.destination)
        flags = message.flags
        if message.command is Command.HOLE:
            flags = Flags.PARENT
        if message.command is Command.ADD:
            flags = Flags.PRESENT
        entries = self.images[self.current]
        if flags == Flags.LAZY or flags & Flags.LAZYD:
            raise ProtocolError("client", "pages that nobody has")
        if entries and message.address < entries[-1][0] + entries[-1][1] * PAGE:
            raise ProtocolError("client", "unsorted")
        entries.append([message.address, message.pages, int(flags), b""])

    def give(self, message: Message) -> None:
        """Answer a GET."""
        truth = [self.page(message, index) for index in range(min(message.pages, 100))]
        is_lazyd = bool(message.flags)

        def kind(page: bytes | None) -> Flags:
            zeros = is_lazyd and page == bytes(PAGE)
            return Flags.LAZY if page is None else Flags(0) if zeros else Flags.PRESENT

        first = kind(truth[0])
        run = next((i for i, page in enumerate(truth) if kind(page) != first), message.pages)
        if first == Flags.LAZY and not is_lazyd:
            answer = Message(Command.ADD_F, 0, 0, message.destination, Flags.PRESENT)
        else:
            lazyd = Flags.LAZYD if is_lazyd else Flags(0)
            answer = Message(Command.ADD_F, message.address, run, message.destination, first | lazyd)
        self.replies += encode(answer, self.header)
        if answer.flags & Flags.PRESENT:
            self.replies += b"".join(page or b"" for page in truth[: answer.pages])

    def page(self, message: Message, index: int) -> bytes | None:
        """What a page of a question is."""
        number = (message.address - BASE) // PAGE + index
        return GIVEN[number] if message.destination == PID and 0 <= number < len(GIVEN) else None


@pytest.fixture(scope="module")
def given_images(tmp_path_factory):
    entries = [Entry(BASE, 2), Entry(BASE + 2 * PAGE, 1, "zero"), Entry(BASE + 4 * PAGE, 2)]
    return build_checkpoint(tmp_path_factory.mktemp("fuzz") / "given", [Task(PID, entries)])


@SETTINGS
@given(content=streams(), cuts=st.lists(st.integers(0, 1 << 12), max_size=3))
def test_page_server(given_images, content, cuts):
    naive = Naive()
    naive.run(content)
    folder = Path(tempfile.mkdtemp(prefix="lazyd-fuzz-"))
    desk = Desk(Lines(), folder, Shelves(given_images))
    try:
        with connected(desk, 24) as client:
            at = 0
            with contextlib.suppress(BrokenPipeError):
                for cut in [*sorted(cut % (len(content) + 1) for cut in cuts), len(content)]:
                    client.socket.sendall(content[at:cut])
                    at = cut
                client.socket.shutdown(socket.SHUT_WR)
            replies = bytearray()
            with contextlib.suppress(ConnectionError):
                while piece := client.socket.recv(1 << 16):
                    replies += piece
        assert replies == naive.replies
        assert_published(folder, naive.published)
    finally:
        shutil.rmtree(folder)


def assert_published(folder: Path, published) -> None:
    """Hold what is in a directory against what should be: entry by entry, page by page."""
    names = {image: f"pagemap-{'shmem-' if image & 0xFF == 2 else ''}{image >> 8}.img" for image in published}
    found = [path.name for path in folder.iterdir() if path.name.startswith("pagemap-")]
    assert sorted(name for name in found if "replaced" not in name) == sorted(names.values())
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    for image, entries in published.items():
        pages_id, there = read_entries(folder / names[image])
        expected = {
            address + index * PAGE: flags & Flags.LAZY
            for address, pages, flags, _ in entries
            if flags & Flags.PRESENT
            for index in range(pages)
        }
        assert {entry.start + i * PAGE: 2 * entry.lazy for entry in there for i in range(entry.pages)} == expected
        assert (folder / f"pages-{pages_id}.img").read_bytes() == b"".join(data for _, _, _, data in entries)
