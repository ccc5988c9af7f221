# SPDX-License-Identifier: MIT
"""The images writer: complete or not at all, whatever happens to the writer."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lazyd.errors import DumpError, SystemCallError
from lazyd.image.framing import PSTREE_MAGICS
from lazyd.image.writer import ImagesWriter

BODY = b"\x08\x01"
# What the frame makes of BODY: two magics, the length, the body.
FRAMED = bytes.fromhex("19435654" + "30302750" + "02000000") + BODY

EXPECTED = {"inventory.img", "pstree.img", "pages-1.img", "parent"}


def fill(writer: ImagesWriter) -> None:
    writer.write_small("pstree.img", PSTREE_MAGICS, [BODY])
    writer.write_file("inventory.img", b"inventory")
    fd = writer.create("pages-1.img")
    os.pwrite(fd, b"pages", 0)
    os.close(fd)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("made_before", [False, True])
def test_images_appear_when_published_and_not_before(tmp_path, made_before):
    path = tmp_path / "images"
    if made_before:
        path.mkdir(mode=0o750)
    with ImagesWriter(path, parent=None) as writer:
        fill(writer)
        assert not made_before or not names(path)
        assert made_before or not path.exists()
        writer.publish()
    assert names(tmp_path) == {"images"}
    assert names(path) == {"pstree.img", "inventory.img", "pages-1.img"}
    assert (path / "pstree.img").read_bytes() == FRAMED
    assert (path / "pages-1.img").read_bytes() == b"pages"
    assert (path / "pages-1.img").stat().st_mode & 0o777 == 0o600
    assert path.stat().st_mode & 0o777 == (0o750 if made_before else 0o700)


def test_leaves_nothing_when_it_is_not_published(tmp_path):
    path = tmp_path / "images"
    with pytest.raises(RuntimeError), ImagesWriter(path, parent=None) as writer:
        fill(writer)
        raise RuntimeError
    assert not names(tmp_path)


def test_writes_into_the_working_directory_in_place(tmp_path, monkeypatch):
    path = tmp_path / "images"
    path.mkdir()
    monkeypatch.chdir(path)
    before = path.stat().st_ino
    with ImagesWriter(Path(), parent=None) as writer:
        fill(writer)
        writer.publish()
    assert path.stat().st_ino == before
    assert names(path) == {"pstree.img", "inventory.img", "pages-1.img"}


def test_files_that_may_be_there_stay(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    (path / "dump.log").write_text("log")
    with ImagesWriter(path, parent=None, may_hold=["dump.log"]) as writer:
        fill(writer)
        writer.publish()
    assert names(path) == {"dump.log", "pstree.img", "inventory.img", "pages-1.img"}
    with pytest.raises(DumpError, match=r"not empty, it holds inventory\.img and 2 more"):
        ImagesWriter(path, parent=None, may_hold=["dump.log"])


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    (path / "dump.log").write_text("log")
    with ImagesWriter(path, parent=None, may_hold=["dump.log"]) as writer:
        fill(writer)
        (path / "pages-1.img").write_bytes(b"another's")
        with pytest.raises(DumpError, match=r"pages-1\.img: appeared"):
            writer.publish()
    assert names(path) == {"dump.log", "pages-1.img"}
    assert (path / "pages-1.img").read_bytes() == b"another's"


def test_a_directory_that_fills_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "images"
    with ImagesWriter(path, parent=None) as writer:
        fill(writer)
        path.mkdir()
        (path / "file").touch()
        with pytest.raises(DumpError, match="no longer empty"):
            writer.publish()
    assert names(tmp_path) == {"images"}
    assert names(path) == {"file"}


def test_names_its_parent_relative_to_itself(tmp_path):
    (tmp_path / "old").mkdir()
    with ImagesWriter(tmp_path / "new", parent=tmp_path / "old") as writer:
        fill(writer)
        writer.publish()
    assert (tmp_path / "new/parent").readlink() == Path("../old")
    with ImagesWriter(tmp_path / "old/newest", parent=tmp_path / "new") as writer:
        fill(writer)
        writer.publish()
    assert (tmp_path / "old/newest/parent").samefile(tmp_path / "new")


@pytest.mark.parametrize(
    ("make", "path", "message"),
    [
        (lambda top: (top / "file").touch(), "file", "not a directory"),
        (lambda top: None, "missing/images", "no such directory"),
        (lambda top: (top / "full").mkdir() or (top / "full/x").touch(), "full", "not empty, it holds x;"),
        (lambda top: None, "images", "cannot be its own parent"),
    ],
)
def test_refuses(tmp_path, make, path, message):
    make(tmp_path)
    with pytest.raises(DumpError, match=message):
        ImagesWriter(tmp_path / path, parent=tmp_path / path if "parent" in message else None)
    with pytest.raises(DumpError, match="no such directory; --parent"):
        ImagesWriter(tmp_path / "images", parent=tmp_path / "nowhere")
    assert "images" not in names(tmp_path)
    assert not [name for name in names(tmp_path) if "partial" in name]


def test_a_killed_writer_leaves_no_images_and_the_next_one_cleans_up(tmp_path):
    code = (
        "import sys, signal, os; from pathlib import Path; from lazyd.image.writer import ImagesWriter\n"
        "writer = ImagesWriter(Path(sys.argv[1]), parent=None); writer.write_file('inventory.img', b'x')\n"
        "print('made', flush=True); signal.pause()\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "images")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "made\n"
            assert len(names(tmp_path)) == 1
            # While it lives, its work is left alone.
            with ImagesWriter(tmp_path / "images", parent=None):
                assert len(names(tmp_path)) == 2
            assert len(names(tmp_path)) == 1
        finally:
            process.send_signal(signal.SIGKILL)
    assert len(names(tmp_path)) == 1
    with ImagesWriter(tmp_path / "images", parent=None) as writer:
        assert len(names(tmp_path)) == 1
        fill(writer)
        writer.publish()
    assert names(tmp_path) == {"images"}


def test_a_write_that_fails_says_which_image_and_why(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ImagesWriter(tmp_path / "images", parent=None) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(SystemCallError, match=r"images/pstree\.img: write: EFBIG"):
                writer.write_file("pstree.img", bytes(1000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not names(tmp_path)


def test_never_writes_over_a_file_of_its_own(tmp_path):
    with ImagesWriter(tmp_path / "images", parent=None) as writer:
        writer.write_file("pstree.img", b"once")
        with pytest.raises(SystemCallError, match="EEXIST"):
            writer.create("pstree.img")


def die_at(step, path, may_hold):
    """Write images in a child that is killed before its step-th system call that changes a directory; say if it was."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)
    try:
        numbers = itertools.count()

        def counted(function):
            def counting(*arguments, **named):
                if next(numbers) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return counting

        for name in ("rename", "unlink", "rmdir", "mkdir", "symlink", "open", "write", "fchmod"):
            setattr(os, name, counted(getattr(os, name)))
        with ImagesWriter(path, parent=path.parent / "before", may_hold=may_hold) as writer:
            fill(writer)
            writer.publish()
    finally:
        os._exit(0)


@pytest.mark.parametrize("there", ["nothing", "an empty directory", "our log"])
def test_killed_at_every_step_the_images_are_whole_or_not_there(there, tmp_path):
    """And the next writer for the same name is not kept from it, and finds nothing of the one before in its way."""
    before = tmp_path / "before"
    before.mkdir()
    (before / "inventory.img").write_bytes(b"kept")
    may_hold = ["dump.log"] if there == "our log" else []
    outcomes = set()
    for step in itertools.count():
        path = tmp_path / f"images{step}"
        if there != "nothing":
            path.mkdir()
        for name in may_hold:
            (path / name).write_text("kept")
        was_killed = die_at(step, path, may_hold)
        is_whole = path.is_dir() and "inventory.img" in names(path)
        outcomes.add(is_whole)
        if is_whole:
            assert names(path) >= EXPECTED
            with pytest.raises(DumpError, match="not empty"):
                ImagesWriter(path, parent=before, may_hold=may_hold)
        else:
            with ImagesWriter(path, parent=before, may_hold=may_hold) as writer:
                fill(writer)
                writer.publish()
        assert names(path) == EXPECTED | {*may_hold}
        assert all((path / name).read_text() == "kept" for name in may_hold)
        assert not [name for name in names(tmp_path) if name.startswith(".")]
        assert (before / "inventory.img").read_bytes() == b"kept"
        if not was_killed:
            break
    assert step >= 8
    assert outcomes == {True, False}


def test_what_somebody_else_put_there_is_not_taken_for_ours(tmp_path):
    """A file of the same name as one of a killed writer's, but another file: it stays, and the writer says so."""
    path = tmp_path / "images"
    path.mkdir()
    hidden = path / ".images.partial-old"
    hidden.mkdir()
    (path / "pstree.img").write_text("somebody's")
    (hidden / ".moving").write_text(json.dumps({"pstree.img": (path / "pstree.img").stat().st_ino + 1}))
    with pytest.raises(DumpError, match=r"not empty, it holds pstree\.img"):
        ImagesWriter(path, parent=None)
    assert (path / "pstree.img").read_text() == "somebody's"
