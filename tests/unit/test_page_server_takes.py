# SPDX-License-Identifier: MIT
"""Dumps that arrive: what the images say, and that they are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from images_builder import PAGE, Entry, Task, build_checkpoint, page_pattern, read_entries
from page_server_harness import (
    BASE,
    CLOSE,
    FORCE_CLOSE,
    LAZY,
    LAZYD,
    LAZYD_COMMAND,
    OPEN2,
    PARENT,
    PARENT_QUERY,
    PRESENT,
    Client,
    Lines,
    connected,
    running_server,
)

from lazyd.cli import main
from lazyd.serve import server as server_module
from lazyd.serve.connection import Desk
from lazyd.serve.folder import Folder, Move, clear_up, locked
from lazyd.serve.shelves import Shelves

ADD, HOLE, OPEN, ADD_F = 1, 2, 3, 6
PID = 77
TASK = PID << 8 | 1
SHARED = 5 << 8 | 2
HEADERS = pytest.mark.parametrize("header", [24, 32])


def add(client, page: int, pages: int, flags: int, image: int = TASK, *, salt: int = 0) -> None:
    """Send an entry, with its pages if it has any."""
    address = BASE + page * PAGE if image & 0xFF == 1 else page * PAGE
    data = b"".join(page_pattern(address + i * PAGE, salt) for i in range(pages)) if flags & PRESENT else b""
    client.send(ADD_F | flags << 16, address, pages, image, data)


def begin(client, image: int = TASK) -> int:
    """Open an image; return whether it has a parent."""
    client.send(OPEN2, destination=image)
    return client.number("<B")


def close(client, how: int = CLOSE) -> int:
    """End the session; return the status."""
    client.send(how)
    return client.number()


def listing(images: Path) -> dict[str, bytes]:
    """Every file of a directory, hidden ones too, with what is in it."""
    return {str(path.relative_to(images)): path.read_bytes() if path.is_file() else b"" for path in images.rglob("*")}


def content(images: Path, name: str = f"pagemap-{PID}.img", dialect: str = "flags"):
    """The entries of an image, and the bytes of its pages image."""
    pages_id, entries = read_entries(images / name, dialect)
    return entries, (images / f"pages-{pages_id}.img").read_bytes()


def send_all_kinds(client) -> None:
    assert begin(client) == 0
    add(client, 0, 3, PRESENT | LAZY)
    add(client, 3, 2, PRESENT)
    add(client, 5, 4, 0)
    add(client, 12, 1, PRESENT | LAZY)
    assert begin(client, SHARED) == 0
    add(client, 7, 2, PRESENT, SHARED)


def patterns(*pages: int, base: int = BASE, salt: int = 0) -> bytes:
    return b"".join(page_pattern(base + page * PAGE, salt) for page in pages)


@HEADERS
@pytest.mark.parametrize("how", [CLOSE, FORCE_CLOSE])
@pytest.mark.parametrize("over_tcp", [False, True])
def test_a_dump_appears_when_it_is_closed(header, how, over_tcp, tmp_path):
    desk = Desk(Lines(), tmp_path)
    with connected(desk, header, over_tcp=over_tcp) as client:
        client.send(PARENT_QUERY, destination=TASK)
        assert client.number() == 0
        send_all_kinds(client)
        assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
        assert close(client, how) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "pagemap-77.img",
            "pagemap-shmem-5.img",
            "pages-1.img",
            "pages-2.img",
        ]
    entries, pages = content(tmp_path)
    # Zero holes are left out, as stock does: what no entry covers is zeros.
    assert entries == [
        Entry(BASE, 3, "dumped"),
        Entry(BASE + 3 * PAGE, 2, "dumped", lazy=False),
        Entry(BASE + 12 * PAGE, 1, "dumped"),
    ]
    assert pages == patterns(0, 1, 2, 3, 4, 12)
    entries, pages = content(tmp_path, "pagemap-shmem-5.img")
    assert entries == [Entry(7 * PAGE, 2, "dumped", lazy=False)]
    assert pages == patterns(7, 8, base=0)
    wide = b"\x28" in (tmp_path / "pagemap-shmem-5.img").read_bytes()[-6:]  # field 5, a varint
    assert wide == (header == 32)
    assert [line for line in desk.log.lines if "has dumped" not in line] == []


def test_old_dumpers(tmp_path):
    """Without flags, without an answer to OPEN, or without OPEN at all."""
    with connected(Desk(Lines(), tmp_path), 24) as client:
        client.send(OPEN, destination=TASK)
        client.send(ADD, BASE, 2, TASK, patterns(0, 1))
        client.send(ADD, BASE + 5 * PAGE, 1, SHARED, b"\x11" * PAGE)
        assert close(client) == 0
    assert content(tmp_path) == ([Entry(BASE, 2, "dumped", lazy=False)], patterns(0, 1))
    assert content(tmp_path, "pagemap-shmem-5.img")[1] == b"\x11" * PAGE


@HEADERS
def test_what_breaks_leaves_nothing(header, tmp_path):
    """The client hangs up after every so many bytes of a session."""
    build_checkpoint(tmp_path / "images", [Task(PID, [Entry(BASE, 2)])])
    before = listing(tmp_path / "images")
    sent = bytearray()

    class Recorder(socket.socket):
        """Takes what a client sends, and answers with zeros."""

        def sendall(self, content):
            sent.extend(content)

        def recv(self, length):
            return bytes(length)

    with Recorder() as recorder:
        send_all_kinds(Client(recorder, header))
    cuts = [*range(0, 3 * header + 2), *random.Random(1).sample(range(len(sent)), 30), len(sent)]
    for cut in cuts:
        desk = Desk(Lines(), tmp_path / "images")
        with connected(desk, header) as client:
            client.socket.sendall(sent[:cut])
            client.socket.shutdown(socket.SHUT_WR)
            client.is_hung_up_on()
        assert listing(tmp_path / "images") == before
        assert len(desk.log.lines) == (1 if cut else 0)
        assert cut == 0 or "hung up " in desk.log.lines[0]


def test_dumps_one_after_the_other_and_at_once(tmp_path):
    desk = Desk(Lines(), tmp_path)
    with connected(desk, 24) as first, connected(desk, 32) as second:
        for client, image, salt in ((first, TASK, 1), (second, 78 << 8 | 1, 2)):
            begin(client, image)
            add(client, 0, 2, PRESENT, image, salt=salt)
        add(second, 2, 1, PRESENT, 78 << 8 | 1, salt=2)
        add(first, 2, 1, PRESENT, TASK, salt=1)
        assert close(second) == 0
        assert close(first) == 0
        # The connection is still there, and so is what was dumped.
        begin(first, 79 << 8 | 1)
        add(first, 9, 1, PRESENT, 79 << 8 | 1, salt=3)
        assert close(first, FORCE_CLOSE) == 0
    assert content(tmp_path)[1] == patterns(0, 1, 2, salt=1)
    assert content(tmp_path, "pagemap-78.img")[1] == patterns(0, 1, 2, salt=2)
    assert content(tmp_path, "pagemap-79.img")[1] == patterns(9, salt=3)
    assert len(list(tmp_path.iterdir())) == 6


def test_nothing_is_deleted_by_a_newer_dump(tmp_path):
    desk = Desk(Lines(), tmp_path)
    for salt in (1, 2, 3):
        with connected(desk, 24) as client:
            begin(client)
            add(client, 0, 1, PRESENT, TASK, salt=salt)
            assert close(client) == 0
    assert content(tmp_path)[1] == patterns(0, salt=3)
    assert content(tmp_path, "pagemap-77.img.replaced-1")[1] == patterns(0, salt=1)
    assert content(tmp_path, "pagemap-77.img.replaced-2")[1] == patterns(0, salt=2)
    assert sum("is kept: pagemap-77.img.replaced-" in line for line in desk.log.lines) == 2


def test_an_image_that_is_opened_again_starts_anew(tmp_path):
    with connected(Desk(Lines(), tmp_path), 24) as client:
        begin(client)
        add(client, 0, 5, PRESENT)
        begin(client)
        add(client, 1, 1, PRESENT)
        assert close(client) == 0
    assert content(tmp_path) == ([Entry(BASE + PAGE, 1, "dumped", lazy=False)], patterns(1))
    assert len(list(tmp_path.iterdir())) == 2


def with_parent(tmp_path: Path, dialect: str = "flags") -> Path:
    """A directory whose parent has pages 0 to 5; return it."""
    build_checkpoint(tmp_path / "parent", [Task(PID, [Entry(BASE, 3), Entry(BASE + 3 * PAGE, 3)])], dialect=dialect)
    images = tmp_path / "images"
    images.mkdir()
    (images / "parent").symlink_to("../parent")
    return images


@HEADERS
@pytest.mark.parametrize("dialect", ["flags", "booleans"])
def test_parents(header, dialect, tmp_path):
    images = with_parent(tmp_path, dialect)
    with connected(Desk(Lines(), images), header) as client:
        for image, has in ((TASK, 1), (78 << 8 | 1, 0)):
            client.send(PARENT_QUERY, destination=image)
            assert client.number() == has
            assert begin(client, image) == has
        assert begin(client) == 1
        add(client, 1, 3, PARENT | LAZY)
        add(client, 4, 1, PRESENT, salt=9)
        add(client, 5, 1, 0)
        assert close(client) == 0
    entries, pages = content(images, dialect=dialect)
    assert entries[:2] == [
        Entry(BASE + PAGE, 3, "parent"),
        Entry(BASE + 4 * PAGE, 1, "dumped", lazy=dialect == "booleans"),
    ]
    assert pages == patterns(4, salt=9)
    # A chain is read in one dialect.
    with connected(Desk(Lines(), images, Shelves(images)), header) as client:
        client.ask(BASE + PAGE, 4, PID, LAZYD)
        assert client.answer().data == patterns(1, 2, 3) + patterns(4, salt=9)
        client.ask(BASE + 5 * PAGE, 1, PID, LAZYD)
        assert client.answer().flags == (LAZYD if dialect == "booleans" else LAZYD | LAZY)


def test_a_hole_that_the_parent_does_not_have(tmp_path):
    images = with_parent(tmp_path)
    before = listing(images)
    desk = Desk(Lines(), images)
    with connected(desk, 24) as client:
        begin(client)
        add(client, 4, 3, PARENT)
        add(client, 9, 40, PRESENT)
        begin(client, SHARED)
        add(client, 1, 1, PRESENT, SHARED)
        assert close(client) == -22
        assert listing(images) == before
        # The next one is not to blame for it.
        begin(client)
        add(client, 4, 2, PARENT)
        assert close(client) == 0
    assert [line for line in desk.log.lines if "has dumped" not in line] == [
        f"client: {images}/parent, pagemap-77.img, address {BASE + 6 * PAGE:#x}: what came has a parent hole where the "
        "parent has no bytes; nothing is kept"
    ]


def test_holes_without_a_parent(tmp_path):
    desk = Desk(Lines(), tmp_path)
    with connected(desk, 24) as client:
        begin(client)
        add(client, 4, 3, PARENT)
        assert close(client) == -22
    assert listing(tmp_path) == {}
    assert "no pagemap-77.img in a parent" in desk.log.lines[0]


def test_a_parent_that_is_broken(tmp_path):
    images = with_parent(tmp_path)
    (tmp_path / "parent" / "pages-1.img").unlink()
    desk = Desk(Lines(), images)
    with connected(desk, 24) as client:
        client.send(OPEN2, destination=TASK)
        assert client.is_hung_up_on()
    assert "pages-1.img" in desk.log.lines[0]
    assert "missing" in desk.log.lines[0]
    assert len(desk.log.lines) == 1


@pytest.mark.parametrize("replaces", [False, True])
def test_auto_dedup(replaces, tmp_path):
    images = with_parent(tmp_path)
    desk = Desk(Lines(), images, auto_dedup=True)
    if replaces:
        with connected(Desk(Lines(), images), 24) as client:
            begin(client)
            add(client, 0, 2, PARENT)
            assert close(client) == 0
    with connected(desk, 24) as client:
        begin(client)
        add(client, 0, 2, PRESENT, salt=4)
        add(client, 3, 1, PARENT)
        assert close(client) == 0
    # What it replaced is kept, and needs its parent.
    left = patterns(0, 1) if replaces else bytes(2 * PAGE)
    assert (tmp_path / "parent" / "pages-1.img").read_bytes() == left + patterns(2, 3, 4, 5)
    assert content(images)[1] == patterns(0, 1, salt=4)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([(1, PRESENT), (0, PRESENT)], f"ADD_F at {BASE:#x}, which is not behind the last"),
        ([(1, PRESENT), (1, PARENT)], f"ADD_F at {BASE + PAGE:#x}, which is not behind the last"),
        ([(1, LAZY)], "ADD_F (<Flags.LAZY: 2>) of pages that nobody has"),
        ([(1, LAZYD)], "ADD_F (<Flags.LAZYD: 32768>) of pages that nobody has"),
        ([(1, PARENT | PRESENT)], "ADD_F of pages that are sent and in the parent at once"),
        ([(1, 64)], "ADD_F with flags 0x40, of which nothing is known"),
    ],
)
def test_entries_that_make_no_sense(messages, reason, tmp_path):
    desk = Desk(Lines(), tmp_path)
    with connected(desk, 24) as client:
        begin(client)
        for page, flags in messages:
            with contextlib.suppress(OSError):
                add(client, page, 1, flags)
        assert client.is_hung_up_on()
    assert desk.log.lines == [f"client: {reason}"]
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("destination", [0, 77 << 8, 77 << 8 | 3])
def test_no_image_ids(destination, tmp_path):
    desk = Desk(Lines(), tmp_path)
    with connected(desk, 32) as client:
        begin(client)
        client.send(ADD_F | PARENT << 16, BASE, 1, destination)
        assert client.is_hung_up_on()
    assert desk.log.lines == [f"client: pages of {destination:#x}, which is no image id"]


def test_pages_are_given_as_soon_as_they_are_there(tmp_path):
    desk = Desk(Lines(), tmp_path, Shelves(tmp_path))
    with connected(desk, 24) as dumper, connected(desk, 24) as asker:
        begin(dumper)
        add(dumper, 0, 2, PRESENT)
        assert close(dumper) == 0
        asker.ask(BASE + PAGE, 1, PID, LAZYD)
        assert asker.answer().data == patterns(1)


def fill(folder: Folder, *names: str) -> None:
    """Make files in a hidden folder."""
    for name in names:
        with os.fdopen(folder.create(name), "w") as file:
            file.write(f"new {name}")


@pytest.mark.parametrize("renames", range(6))
def test_a_server_that_is_killed_while_it_gives_names(renames, tmp_path, monkeypatch):
    """What it had begun is finished by whoever comes next; what it had not, is gone."""
    (tmp_path / "b.img").write_text("old")
    moves = [Move("a", "a.img"), Move("b", "b.img"), Move("c", "c.img")]
    child = os.fork()
    if child == 0:
        done = 0
        real = Path.rename

        def rename(self, target):
            nonlocal done
            if done == renames:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        folder = Folder(tmp_path)
        fill(folder, *"abc")
        with locked(tmp_path):
            folder.publish(moves)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (renames < 4)  # the list itself is renamed, too
    finished = clear_up(tmp_path)
    names = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert not [path for path in tmp_path.iterdir() if path.is_dir()] or renames >= 4
    if renames == 0:
        assert names == {"b.img": "old"}
        assert finished == []
    else:
        new = {f"{name}.img": f"new {name}" for name in "abc"}
        assert names == {**new, "b.img.replaced-1": "old"}
        assert finished == [f"{name}.img" for name in "abc"][renames - 1 :]


@pytest.mark.parametrize("failing", range(1, 4))
def test_names_that_cannot_be_given_are_taken_back(failing, tmp_path, monkeypatch):
    (tmp_path / "b.img").write_text("old")
    folder = Folder(tmp_path)
    fill(folder, *"abc")
    real, done = Path.rename, 0

    def rename(self, target):
        nonlocal done
        done += 1
        if done == failing + 1:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with locked(tmp_path), pytest.raises(OSError, match="No space"):
        folder.publish([Move("a", "a.img"), Move("b", "b.img"), Move("c", "c.img")])
    folder.close()
    assert listing(tmp_path) == {"b.img": b"old"}
    assert clear_up(tmp_path) == []


def test_one_that_lives_is_left_alone(tmp_path):
    folder = Folder(tmp_path)
    fill(folder, "a")
    assert clear_up(tmp_path) == []
    with locked(tmp_path):
        folder.publish([Move("a", "a.img")])
    folder.close()
    assert listing(tmp_path) == {"a.img": b"new a"}


def test_ended_in_the_middle(tmp_path):
    """SIGTERM while dumps arrive: none of them appears."""
    images = tmp_path / "images"
    images.mkdir()
    with running_server(images, tmp_path / "log") as server:
        clients = [server.connect() for _ in range(3)]
        for client in clients:
            begin(client)
            add(client, 0, 100, PRESENT)
        client.socket.sendall(client.encode(ADD_F | PRESENT << 16, BASE + 200 * PAGE, 5, TASK) + b"half")
    assert listing(images) == {}
    assert server.process.returncode == 0


def test_what_cannot_be_served_is_said_in_one_line(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        at = ["--address", "127.0.0.1", "--port", port]
        (tmp_path / "file").touch()
        linked, empty = tmp_path / "linked", tmp_path / "empty"
        linked.mkdir()
        (linked / "parent").symlink_to("other")
        empty.mkdir()
        cases = {
            f"127.0.0.1:{port}: listen: EADDRINUSE": ["-D", tmp_path, *at],
            f"192.0.2.1:{port}: listen: EADDRNOTAVAIL": ["-D", tmp_path, "--address", "192.0.2.1", "--port", port],
            f"{tmp_path}/none: opendir: ENOENT": ["-D", tmp_path / "none", *at],
            f"{tmp_path}/file: opendir: ENOTDIR": ["-D", tmp_path / "file", *at],
            "which directory": at,
            "where to listen": ["-D", tmp_path],
            "ports go up to 65535": ["-D", tmp_path, "--port", "65536"],
            "--ps-socket 77: EBADF": ["-D", tmp_path, "--ps-socket", "77"],
            "--status-fd 77: EBADF": ["-D", tmp_path, "--status-fd", "77", "--port", "0"],
            f"{linked}/parent: names other, not none": ["-D", linked, "--prev-images-dir", "none", *at],
            f"{empty}/parent: opendir: ENOENT": ["-D", empty, "--prev-images-dir", "none", *at],
        }
        for reason, words in cases.items():
            assert main(["page-server", *map(str, words)]) == 1
            said = capsys.readouterr().err
            assert reason in said
            assert said.count("\n") == 1


@pytest.mark.parametrize("how", ["closed", "broken", "signal"])
def test_a_socket_that_is_passed(how, tmp_path):
    """One session, and it ends; the exit code says how."""
    ours, theirs = socket.socketpair()
    words = [LAZYD_COMMAND, "page-server", "-D", str(tmp_path), "--ps-socket", str(theirs.fileno())]
    process = subprocess.Popen(words, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
    theirs.close()
    with ours:
        client = Client(ours, 24)
        begin(client)
        add(client, 0, 1, PRESENT)
        if how == "closed":
            assert close(client, FORCE_CLOSE) == 0
        elif how == "signal":
            process.terminate()
            assert client.is_hung_up_on()
    assert process.wait(20) == (0 if how == "closed" else 1)
    if how == "closed":
        assert content(tmp_path)[1] == patterns(0)
    else:
        assert listing(tmp_path) == {}


def test_into_the_background(tmp_path):
    """As `criu page-server --daemon`: the parent leaves once it listens, which is told in every way asked for."""
    images, work = tmp_path / "images", tmp_path / "work"
    images.mkdir()
    work.mkdir()
    reading, writing = os.pipe()
    words = [LAZYD_COMMAND, "page-server", "-D", str(images), "-W", str(work), "--port", "0", "-d", "-o", "log"]
    words += ["--address", "127.0.0.1", "--pidfile", "pid", "--status-fd", str(writing)]
    subprocess.run(words, pass_fds=[writing], check=True, timeout=20)
    os.close(writing)
    pid = int((work / "pid").read_text())
    try:
        assert os.read(reading, 2) == b"\0"
        assert os.read(reading, 1) == b""  # it has let go of it
        (port,) = re.findall(r"listening on 127\.0\.0\.1:(\d+)", (work / "log").read_text())
        with socket.create_connection(("127.0.0.1", int(port))) as connection:
            client = Client(connection, 24)
            begin(client)
            add(client, 0, 1, PRESENT)
            assert close(client) == 0
        assert content(images)[1] == patterns(0)
        assert {Path(f"/proc/{pid}/fd/{number}").readlink() for number in range(3)} == {Path("/dev/null")}
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 20
    while "ended by a signal" not in (work / "log").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)


def memory_kib(pid: int) -> int:
    """How much memory a process has to itself."""
    return int(re.findall(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])


def test_floods_grow_nothing(tmp_path):
    """Questions that nobody reads the answers of, connections without a word, images opened again and again."""
    images = tmp_path / "images"
    build_checkpoint(images, [Task(PID, [Entry(BASE, 64)])])
    with running_server(images, tmp_path / "log", "--lazy-pages") as server, contextlib.ExitStack() as stack:
        other = server.connect()
        other.ask(BASE, 1, PID)
        assert other.answer().data == patterns(0)
        before = memory_kib(server.process.pid)
        for number in range(24):
            client = server.connect(24)
            stack.enter_context(client.socket)
            client.socket.settimeout(0)
            flood = {
                0: client.encode(7, BASE, 64, PID),
                1: b"",
                2: client.encode(OPEN2, destination=TASK),
                3: client.encode(ADD_F | PARENT << 16, BASE, 1, TASK) + client.encode(OPEN, destination=TASK),
            }[number % 4]
            with contextlib.suppress(BlockingIOError):
                for _ in range(40):
                    client.socket.sendall(flood * 500)
        for page in range(64):
            other.ask(BASE + page * PAGE, 1, PID)
            assert other.answer().data == patterns(page)
        # A thread and a buffer each, and no more.
        assert memory_kib(server.process.pid) - before < 24 * 600
    assert sorted(path.name for path in images.iterdir() if path.name.startswith((".", "pages-"))) == ["pages-1.img"]


def test_more_clients_than_there_is_room_for(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "CLIENTS_MAX", 3)
    log = Lines()
    reading, writing = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        server = server_module.Server(Desk(log, tmp_path))
        thread = threading.Thread(target=server.run, args=(listener, reading))
        thread.start()
        stack.callback(thread.join)
        stack.callback(os.write, writing, b"x")

        def connect() -> Client:
            return Client(stack.enter_context(socket.create_connection(listener.getsockname())), 24)

        clients = [connect() for _ in range(6)]
        for client in clients[3:]:
            assert client.is_hung_up_on()
        assert close(clients[0]) == 0
        clients[0].is_hung_up_on()

        def is_let_in() -> bool:
            with contextlib.suppress(OSError, EOFError):
                return begin(connect()) == 0
            return False  # the one that has left is still being seen off

        end = time.monotonic() + 20
        while not is_let_in():
            assert time.monotonic() < end
    os.close(reading)
    os.close(writing)
    assert len([line for line in log.lines if "3 clients are here already" in line]) in (1, 2)
    assert listing(tmp_path) == {}
