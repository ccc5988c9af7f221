# SPDX-License-Identifier: MIT
"""The page server's protocol: messages in both header sizes, and a parser for each side. No input or output here.

Integers are little-endian. A message starts with a header, of which there are two; neither names itself:

    criu up to 4.1   u32 command, u32 pages,                 u64 address, u64 destination    24 bytes
    criu from 4.2    u32 command, 4 bytes of anything, u64 pages, u64 address, u64 destination    32 bytes

The low 16 bits of the command say what it is, the high 16 hold the flags of an entry. COMMANDS is the table of what
each carries and how it is answered; encoder and parsers have no other. Answers have no header, so that a client must
know what it has asked: ClientParser keeps count.

Between lazyd and lazyd there is more, which no other program is sent. A GET with the flag LAZYD says who asks: a stock
server does not look at the flags of a GET (seen, 4.1.1 and 4.2.1) and answers as ever; lazyd's answers with the flag
set. From then on the client knows that this server may be asked again after a broken link, that it may answer with
pages that are zeros (no flag but LAZYD) or that it does not have (LAZY without PRESENT), and that it knows IDENTIFY.
Its answer is a number for what the server has of a task; a client asks for it again after every reconnection: with
another number it is another checkpoint, of which no page may be taken.

A parser takes bytes in any cut and gives events. The bytes of pages need not go through it: whoever moves them by
other means calls skip_data().
"""

from __future__ import annotations

import enum
import struct
from collections import deque

from lazyd.enums import Enum, IntEnum
from lazyd.errors import ProtocolError
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SHIFT, PAGE_SIZE, USER_SPACE_END


class HeaderSize(IntEnum):
    """The two headers, by their length."""

    NARROW = 24
    WIDE = 32


class Command(IntEnum):
    """What a message is."""

    ADD = 1
    HOLE = 2
    OPEN = 3
    OPEN2 = 4
    PARENT = 5
    ADD_F = 6
    GET = 7
    CLOSE = 0x1023
    FORCE_CLOSE = 0x1024
    IDENTIFY = 0x4C5A
    """lazyd's own: what does the server have of this task?"""


class Flags(enum.IntFlag):
    """What an entry says of its pages (those of a pagemap entry); none: they are zeros. And LAZYD, see above."""

    PARENT = 1
    LAZY = 2
    PRESENT = 4
    LAZYD = 0x8000


class Answer(Enum):
    """How a message is answered."""

    NOTHING = 0
    HAS_PARENT = 1
    """One byte, 0 or 1."""
    PARENT_STATUS = 2
    """An int32, 0 or 1; negative: an error."""
    STATUS = 3
    """An int32, 0: all is well."""
    PAGES = 4
    """An ADD_F message with PRESENT and its data; to lazyd, by lazyd, also without."""
    IDENTITY = 5
    """A uint64."""


class Names(Enum):
    """What a message's destination field holds."""

    IMAGE = 0
    """An id and a type: see image_id()."""
    TASK = 1
    """A pid."""
    ANYTHING = 2


class Rule(NamedTuple):
    """What a command carries."""

    has_range: bool
    """Address and pages are a run of pages; else there is none and both are 0."""
    data: Flags | None
    """The flag with which data follows; None: never. ADD has no flags and always data."""
    answer: Answer
    names: Names


ALWAYS = Flags(0)
COMMANDS: dict[Command, Rule] = {
    Command.ADD: Rule(has_range=True, data=ALWAYS, answer=Answer.NOTHING, names=Names.IMAGE),
    Command.HOLE: Rule(has_range=True, data=None, answer=Answer.NOTHING, names=Names.IMAGE),
    Command.OPEN: Rule(has_range=False, data=None, answer=Answer.NOTHING, names=Names.IMAGE),
    Command.OPEN2: Rule(has_range=False, data=None, answer=Answer.HAS_PARENT, names=Names.IMAGE),
    Command.PARENT: Rule(has_range=False, data=None, answer=Answer.PARENT_STATUS, names=Names.IMAGE),
    Command.ADD_F: Rule(has_range=True, data=Flags.PRESENT, answer=Answer.NOTHING, names=Names.ANYTHING),
    Command.GET: Rule(has_range=True, data=None, answer=Answer.PAGES, names=Names.TASK),
    Command.CLOSE: Rule(has_range=False, data=None, answer=Answer.STATUS, names=Names.ANYTHING),
    Command.FORCE_CLOSE: Rule(has_range=False, data=None, answer=Answer.STATUS, names=Names.ANYTHING),
    Command.IDENTIFY: Rule(has_range=False, data=None, answer=Answer.IDENTITY, names=Names.TASK),
}
_KNOWN_FLAGS = {
    Command.ADD_F: Flags.PARENT | Flags.LAZY | Flags.PRESENT | Flags.LAZYD,
    Command.GET: Flags.LAZYD,
}
_STRUCTS = {HeaderSize.NARROW: struct.Struct("<IIQQ"), HeaderSize.WIDE: struct.Struct("<I4xQQQ")}
_ANSWER_STRUCTS = {
    Answer.HAS_PARENT: struct.Struct("<B"),
    Answer.PARENT_STATUS: struct.Struct("<i"),
    Answer.STATUS: struct.Struct("<i"),
    Answer.IDENTITY: struct.Struct("<Q"),
}
_TLS_ALERT = 21
_PID_MAX = 1 << 22  # the most that pid_max(5) can be
_USER_SPACE_START = 0x10000
_TASK_TYPE, _SHARED_TYPE = 1, 2


class Message(NamedTuple):
    """A header. `destination` is an image id, or the bare pid in a GET."""

    command: Command
    address: int = 0
    pages: int = 0
    destination: int = 0
    flags: Flags = Flags(0)

    @property
    def data_bytes(self) -> int:
        """How many bytes of pages follow the header."""
        rule = COMMANDS[self.command]
        follows = rule.data is not None and (rule.data == ALWAYS or bool(self.flags & rule.data))
        return self.pages << PAGE_SHIFT if follows else 0


class Data(NamedTuple):
    """Some bytes of the pages that the last message announced."""

    content: bytes


class Reply(NamedTuple):
    """An answer that is a number."""

    answer: Answer
    value: int


Event = Message | Data | Reply


def image_id(image_type: int, number: int) -> int:
    """Return the id of an image as OPEN names it: type 1 a task by its pid, 2 shared memory by its id."""
    return number << 8 | image_type


def split_image_id(destination: int) -> tuple[int, int]:
    """Return (type, number)."""
    return destination & 0xFF, destination >> 8


def encode(message: Message, header: HeaderSize) -> bytes:
    """Return a message's header; ValueError for pages that the narrow header cannot say."""
    if header is HeaderSize.NARROW and message.pages >= 1 << 32:
        raise ValueError(f"{message.pages} pages do not fit this header: cut the run")
    word = message.command | message.flags << 16
    return _STRUCTS[header].pack(word, message.pages, message.address, message.destination)


def following_bytes(content: bytes, header: HeaderSize) -> int | None:
    """Tell how many bytes of pages follow an encoded header; None: it is no header."""
    word, pages, address, destination = _STRUCTS[header].unpack(content)
    try:
        return Message(Command(word & 0xFFFF), address, pages, destination, Flags(word >> 16)).data_bytes
    except ValueError:
        return None


def encode_reply(reply: Reply) -> bytes:
    """Return an answer that is a number."""
    return _ANSWER_STRUCTS[reply.answer].pack(reply.value)


def guess_header(start: bytes) -> HeaderSize | None:
    """Tell the header's size by the first 24 bytes of a client's first message; None: it cannot matter.

    An image id and a pid are never 0, an address is a multiple of the page size and no smaller than 64 KiB, and
    messages that open an image have no address.
    """
    word, narrow_pages, second, third = _STRUCTS[HeaderSize.NARROW].unpack(start[: HeaderSize.NARROW])
    try:
        rule = COMMANDS[Command(word & 0xFFFF)]
    except ValueError:
        return HeaderSize.NARROW  # refused for its command in either
    if rule.names is Names.ANYTHING and not rule.has_range:
        return None
    if not rule.has_range:
        return HeaderSize.WIDE if third == 0 else HeaderSize.NARROW
    could_be_narrow = second % PAGE_SIZE == 0 and second >= _USER_SPACE_START and third != 0
    could_be_wide = third % PAGE_SIZE == 0 and third >= _USER_SPACE_START and second != 0
    if rule.names is Names.TASK and third >= _PID_MAX:
        could_be_narrow = False
    if could_be_narrow and could_be_wide:
        return HeaderSize.NARROW if narrow_pages else HeaderSize.WIDE
    return HeaderSize.WIDE if could_be_wide else HeaderSize.NARROW


class _Parser:
    """What both sides share: a buffer, and data that is passed through."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self._buffer = bytearray()
        self._data_left = 0

    def feed(self, content: bytes | memoryview) -> None:
        """Take bytes that have arrived."""
        self._buffer += content

    @property
    def data_left(self) -> int:
        """How many bytes of pages are still to come, those in the buffer included."""
        return self._data_left

    @property
    def buffered(self) -> int:
        """How many bytes were fed and are not in an event yet."""
        return len(self._buffer)

    def skip_data(self, length: int) -> None:
        """Say that so many bytes of pages were taken elsewhere; only while none are buffered."""
        if self._buffer or length > self._data_left:
            raise ValueError("these bytes were fed")
        self._data_left -= length

    def _take(self, length: int) -> bytes | None:
        if len(self._buffer) < length:
            return None
        content = bytes(self._buffer[:length])
        del self._buffer[:length]
        return content

    def _take_data(self) -> Data | None:
        length = min(self._data_left, len(self._buffer))
        if not length:
            return None
        self._data_left -= length
        content = self._take(length)
        assert content is not None
        return Data(content)

    def _error(self, reason: str) -> ProtocolError:
        return ProtocolError(self.peer, reason)

    def _decode(self, content: bytes, header: HeaderSize) -> Message:
        word, pages, address, destination = _STRUCTS[header].unpack(content)
        try:
            command = Command(word & 0xFFFF)
        except ValueError:
            raise self._error(f"unknown command {word & 0xFFFF:#x}") from None
        rule = COMMANDS[command]
        flags = Flags(word >> 16)
        if int(flags) & ~int(_KNOWN_FLAGS.get(command, Flags(0))):
            raise self._error(f"{command.name} with flags {word >> 16:#x}, of which nothing is known")
        if flags & Flags.PARENT and flags & Flags.PRESENT:
            raise self._error(f"{command.name} of pages that are sent and in the parent at once")
        if rule.has_range:
            self._check_range(command, address, pages)
        elif address or pages:
            raise self._error(
                f"{command.name} with an address or pages ({address:#x}, {pages}); the other header size?"
            )
        if rule.names is Names.IMAGE and (destination & 0xFF) not in (_TASK_TYPE, _SHARED_TYPE):
            raise self._error(f"{command.name} of {destination:#x}, which is no image id")
        if rule.names is Names.TASK and not 0 < destination < 1 << 31:
            raise self._error(f"{command.name} of {destination:#x}, which is no pid")
        return Message(command, address, pages, destination, flags)

    def _check_range(self, command: Command, address: int, pages: int) -> None:
        if address % PAGE_SIZE:
            raise self._error(f"{command.name} at {address:#x}, which is not page-aligned; the other header size?")
        if not pages:
            raise self._error(f"{command.name} of no pages")
        if address >= USER_SPACE_END or pages > (USER_SPACE_END - address) >> PAGE_SHIFT:
            raise self._error(f"{command.name} of {pages} pages at {address:#x}, which leaves user space")


class ServerParser(_Parser):
    """Parses what a client sends: a dumper, or a lazy daemon."""

    def __init__(self, peer: str, header: HeaderSize | None = None) -> None:
        """`header` None: told by the first message."""
        super().__init__(peer)
        self.header = header
        """The size of headers; None: no message has told yet."""

    def next_event(self) -> Event | None:
        """Return the next event, or None until more bytes are fed. ProtocolError: the connection is of no use."""
        if self._data_left:
            return self._take_data()
        header = self.header
        if header is None:
            if len(self._buffer) < HeaderSize.NARROW:
                return None
            self.header = guess_header(bytes(self._buffer[: HeaderSize.NARROW]))
            header = self.header or HeaderSize.NARROW
        content = self._take(header)
        if content is None:
            return None
        message = self._decode(content, header)
        self._data_left = message.data_bytes
        return message


class ClientParser(_Parser):
    """Encodes what a client asks, and parses the answers, which come in the order of the questions."""

    def __init__(self, peer: str, header: HeaderSize) -> None:
        super().__init__(peer)
        self.header = header
        self._awaited: deque[Answer] = deque()

    @property
    def awaited(self) -> int:
        """How many answers are still to come."""
        return len(self._awaited)

    def send(self, message: Message) -> bytes:
        """Return a message's header, to be sent, with its data behind it."""
        answer = COMMANDS[message.command].answer
        if answer is not Answer.NOTHING:
            self._awaited.append(answer)
        return encode(message, self.header)

    def next_event(self) -> Event | None:
        """Return the next event, or None until more bytes are fed. ProtocolError: the connection is of no use."""
        if self._data_left:
            return self._take_data()
        if not self._awaited:
            if self._buffer:
                raise self._error(f"{len(self._buffer)} bytes that nobody asked for")
            return None
        awaited = self._awaited[0]
        if awaited is Answer.PAGES:
            return self._next_pages()
        layout = _ANSWER_STRUCTS[awaited]
        content = self._take(layout.size)
        if content is None:
            return None
        self._awaited.popleft()
        (value,) = layout.unpack(content)
        if awaited in (Answer.HAS_PARENT, Answer.PARENT_STATUS) and value > 1:
            # The first byte of the alert that a server sends to what is no TLS (RFC 8446, section 5.1).
            hint = "; it wants TLS" if content[0] == _TLS_ALERT else ""
            raise self._error(f"{value} as an answer to whether there is a parent{hint}")
        return Reply(awaited, value)

    def _next_pages(self) -> Message | None:
        content = self._take(self.header)
        if content is None:
            return None
        message = self._decode(content, self.header)
        answers = message.command is Command.ADD_F and message.flags & (Flags.PRESENT | Flags.LAZYD)
        if not answers or message.flags & Flags.PARENT:
            raise self._error(f"{message.command.name} ({message.flags!r}) where pages were asked for")
        self._awaited.popleft()
        self._data_left = message.data_bytes
        return message
