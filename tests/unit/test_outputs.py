# SPDX-License-Identifier: MIT
"""What is written at the end is there whole, and takes the place of plain files only."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from lazyd.outputs import check_writable, write_whole


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "out"
    path.write_text("old and longer")
    with path.open() as old:
        check_writable(path)
        write_whole(path, "new")
        assert old.read() == "old and longer"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_device_stays_one(tmp_path):
    """Another /dev/full (mem(4)): it is written into, which fails."""
    path = tmp_path / "full"
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))
    check_writable(path)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "text")
    assert stat.S_ISCHR(path.lstat().st_mode)
    assert [entry.name for entry in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_one(tmp_path, is_there):
    target, link = tmp_path / "target", tmp_path / "link"
    if is_there:
        target.write_text("old and longer")
    link.symlink_to(target)
    check_writable(link)
    write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_an_open_pipe():
    """As --stats /dev/stdout has it."""
    reading, writing = os.pipe()
    check_writable(Path(f"/dev/fd/{writing}"))
    write_whole(Path(f"/dev/fd/{writing}"), "text")
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "text"


@pytest.mark.parametrize("mode", ["w", "a"])
def test_an_open_file_keeps_what_is_in_it(tmp_path, mode):
    """As with --stats /dev/stdout > log, or >> log: other lines go there, before and after."""
    path, link = tmp_path / "log", tmp_path / "link"
    path.write_text("old\n")
    with path.open(mode) as file:
        file.write("first\n")
        file.flush()
        link.symlink_to(f"/proc/self/fd/{file.fileno()}")
        check_writable(link)
        write_whole(link, "text\n")
        file.write("last\n")
    assert path.read_text() == ("" if mode == "w" else "old\n") + "first\ntext\nlast\n"


def test_an_open_socket():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        check_writable(Path(f"/dev/fd/{ours.fileno()}"))
        write_whole(Path(f"/dev/fd/{ours.fileno()}"), "text")
        assert theirs.recv(100) == b"text"


def test_a_pipe_with_a_name(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    check_writable(path)
    with pytest.raises(OSError, match="No such device or address") as failed:
        write_whole(path, "nobody reads")
    assert failed.value.errno == errno.ENXIO
    text = "more than a pipe holds " * 10_000
    found = []
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as pipe:
        os.set_blocking(pipe.fileno(), True)
        thread = threading.Thread(target=lambda: write_whole(path, text))
        thread.start()
        while len("".join(found)) < len(text):
            found.append(pipe.read(1 << 16))
        thread.join()
    assert "".join(found) == text
    assert stat.S_ISFIFO(path.lstat().st_mode)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("none/out", errno.ENOENT),
        ("file/out", errno.ENOTDIR),
        (".", errno.EISDIR),
        ("dangling/out", errno.ENOENT),
        ("into-nowhere", errno.ENOENT),
        ("socket", errno.ENXIO),
        ("reading", errno.EBADF),
    ],
)
def test_what_cannot_be_written_is_said_early(tmp_path, name, number):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "into-nowhere").symlink_to("nowhere/out")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    file = (tmp_path / "file").open()
    (tmp_path / "reading").symlink_to(f"/dev/fd/{file.fileno()}")
    with pytest.raises(OSError, match="Errno") as failed:
        check_writable(tmp_path / name)
    file.close()
    assert failed.value.errno == number
