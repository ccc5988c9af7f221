# SPDX-License-Identifier: MIT
"""The lazy-pages.socket handshake: any cut of the stream, and everything that a restorer may do wrong."""

from __future__ import annotations

import array
import itertools
import os
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyd.errors import LazydError, ProtocolError, SystemCallError
from lazyd.restore_socket import (
    RESTORE_FINISHED,
    SOCKET_NAME,
    Connection,
    Finished,
    Handshake,
    HungUp,
    Listener,
    TaskUffd,
    Zombie,
)
from lazyd.uffd import check_permission

FINISHED = struct.pack("=I", RESTORE_FINISHED)


def pid_bytes(pid):
    return struct.pack("=i", pid)


@pytest.fixture
def uffd_like(monkeypatch):
    """Make descriptors that count as userfaultfds where the real ones need a privilege."""
    opened = []
    real = Path.readlink

    def readlink(path):
        if str(path).startswith("/proc/self/fd/") and int(path.name) in opened:
            return Path("anon_inode:[userfaultfd]")
        return real(path)

    def make():
        opened.append(os.eventfd(0))
        return opened[-1]

    monkeypatch.setattr(Path, "readlink", readlink)
    yield make
    for descriptor in opened:
        if is_open(descriptor):
            os.close(descriptor)


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_a_whole_restore(uffd_like):
    handshake, uffd = Handshake(), uffd_like()
    assert handshake.feed(pid_bytes(7), sender=1234) == []
    assert handshake.feed(b"\0", [uffd], sender=1234) == [TaskUffd(7, uffd, 1234)]
    assert handshake.feed(pid_bytes(-8)) == [Zombie(8)]
    assert handshake.feed(FINISHED) == [Finished()]
    assert handshake.feed(b"") == [HungUp()]
    assert is_open(uffd)


# What a restorer sends: pids of tasks (positive) and zombies (negative).
@given(st.lists(st.integers(-(2**22), 2**22).filter(bool), max_size=12), st.data())
def test_every_cut_of_the_stream_says_the_same(pids, data):
    """The kernel ends a recvmsg() behind the byte that carries descriptors, and nowhere else it has to."""
    real, made = Path.readlink, set()
    pieces = []  # (bytes, descriptors of the last byte)
    wanted = []
    for pid in pids:
        pieces.append((pid_bytes(pid), []))
        if pid > 0:
            descriptor = os.eventfd(0)
            made.add(descriptor)
            pieces.append((b"\0", [descriptor]))
            wanted.append(TaskUffd(pid, descriptor, 0))
        else:
            wanted.append(Zombie(-pid))
    pieces.append((FINISHED, []))
    wanted.append(Finished())
    # Glue what may be glued, then cut anywhere.
    runs, run = [], b""
    for piece, descriptors in pieces:
        run += piece
        if descriptors:
            runs.append((run, descriptors))
            run = b""
    runs.append((run, []))
    handshake, events = Handshake(), []
    Path.readlink = lambda path: (
        Path("anon_inode:[userfaultfd]") if path.name.isdigit() and int(path.name) in made else real(path)
    )
    try:
        for run, descriptors in runs:
            cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(run) - 1)), max_size=4)))
            bounds = [0, *(cut for cut in cuts if cut < len(run)), len(run)]
            for begin, end in itertools.pairwise(bounds):
                events += handshake.feed(run[begin:end], descriptors if end == len(run) else [])
    finally:
        Path.readlink = real
        for descriptor in made:
            os.close(descriptor)
    assert events == wanted


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_garbage_gives_events_or_a_protocol_error(chunks):
    handshake = Handshake()
    try:
        for chunk in chunks:
            for event in handshake.feed(chunk):
                assert isinstance(event, Zombie | Finished | HungUp)
    except ProtocolError as error:
        assert str(error).startswith(SOCKET_NAME)
        assert "\n" not in str(error)


def refused(chunks, match, *opened):
    """Feed chunks to a handshake; the last is refused, and every descriptor closed."""
    handshake = Handshake()
    *before, last = chunks
    for data, descriptors in before:
        assert handshake.feed(data, descriptors) == []
    with pytest.raises(ProtocolError, match=match):
        handshake.feed(*last)
    assert not any(is_open(descriptor) for descriptor in opened)


def test_a_task_without_a_descriptor_is_refused():
    refused([(pid_bytes(7), []), (b"\0", [])], "task 7 came without a userfaultfd")


def test_more_bytes_than_the_dummy_are_refused():
    refused([(pid_bytes(7) + b"\0" + pid_bytes(8), [])], "task 7 came without a userfaultfd")


def test_several_descriptors_are_refused_and_closed(uffd_like):
    one, other = uffd_like(), uffd_like()
    refused([(pid_bytes(7) + b"\0", [one, other])], "task 7 came with 2 descriptors", one, other)


def test_a_descriptor_that_is_no_userfaultfd_is_refused_and_closed():
    wrong = os.eventfd(0)
    refused([(pid_bytes(7) + b"\0", [wrong])], r"task 7 came with anon_inode:\[eventfd\]", wrong)


def test_a_descriptor_with_a_pid_is_refused_and_closed(uffd_like):
    uffd = uffd_like()
    refused([(pid_bytes(7), [uffd])], "1 descriptors came where a userfaultfd was due", uffd)


def test_a_descriptor_with_the_finish_is_dropped(uffd_like):
    uffd = uffd_like()
    assert Handshake().feed(FINISHED, [uffd]) == [Finished()]
    assert not is_open(uffd)


def test_what_comes_after_the_finish_is_dropped():
    handshake = Handshake()
    assert handshake.feed(FINISHED + b"more") == [Finished()]
    assert handshake.feed(b"and more") == []
    assert handshake.feed(b"") == [HungUp()]


def test_pid_0_is_refused():
    refused([(pid_bytes(0), [])], "0 came where a pid was due")


def test_the_end_inside_a_pid_is_refused():
    refused([(b"\1\2", []), (b"", [])], "inside a pid, after 2 bytes")


def test_the_end_before_a_descriptor_is_refused():
    refused([(pid_bytes(7), []), (b"", [])], "before the userfaultfd of task 7")


# Real sockets


def test_a_connection_learns_who_sends(uffd_like):
    ours, theirs = socket.socketpair()
    connection, events = Connection(ours, [0], 0), []
    with theirs:
        assert not connection.receive(events.append)
        theirs.sendall(pid_bytes(-5) + FINISHED)
        assert connection.receive(events.append)
        assert connection.receive(events.append)
        theirs.close()
        assert connection.receive(events.append)
        assert events == [Zombie(5), Finished(), HungUp()]
    connection.close()


def test_a_real_userfaultfd_over_a_real_socket():
    try:
        check_permission()
    except LazydError as error:
        pytest.skip(str(error))
    from lazyd.uffd import ffi, lib  # noqa: PLC0415  only here, where it may be used

    uffd = lib.lz_uffd_open(ffi.new("int *"))
    ours, theirs = socket.socketpair()
    connection, events = Connection(ours, [0], 0), []
    with theirs:
        theirs.sendall(pid_bytes(5))
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd]))
        theirs.sendmsg([b"\0"], [rights])
        theirs.sendall(FINISHED)
        while connection.receive(events.append):
            pass
        task, finished = events
        assert (task.pid, task.sender) == (5, os.getpid())
        assert not os.get_inheritable(task.uffd)
        os.close(task.uffd)
        assert finished == Finished()
    connection.close()
    os.close(uffd)


class Death(BaseException):
    """The process dies here."""


class Mortal:
    """A process that dies at the n-th step of those that are visible to others."""

    def __init__(self, dies_at):
        self.steps = 0
        self.dies_at = dies_at

    def step(self):
        self.steps += 1
        if self.steps == self.dies_at:
            raise Death


class MortalSocket:
    """A socket on which each call is preceded and followed by a step."""

    def __init__(self, real, mortal):
        self._real, self._mortal = real, mortal

    def __getattr__(self, name):
        def call(*arguments):
            if name in ("recv", "recvmsg"):
                self._mortal.step()
            result = getattr(self._real, name)(*arguments)
            if name in ("recv", "recvmsg"):
                self._mortal.step()
            return result

        return call


class MortalJournal(list):
    """A journal, each write of which is preceded and followed by a step; the list itself outlives all."""

    mortal = Mortal(0)

    def __setitem__(self, index, value):
        self.mortal.step()
        super().__setitem__(index, value)
        self.mortal.step()


# Tasks (positive) and zombies whose numbers look like each other's parts, in the worst order.
SAID = [0x0100, 1, 0x01000000, -1, 0x0101, -0x0101, 0x01010101]


def serve_and_die(monkeypatch, *dies_at):
    """Take the handshake of SAID in processes that die in turn at those steps; what was served, and the last's steps.

    The descriptors are eventfds that hold their task's pid.
    """
    monkeypatch.setattr(Path, "readlink", lambda _: Path("anon_inode:[userfaultfd]"))
    ours, theirs = socket.socketpair()
    served, seen, journal, opened = {}, [], MortalJournal([0]), []
    try:
        for pid in SAID:
            theirs.sendall(pid_bytes(pid))
            if pid > 0:
                event = os.eventfd(pid)
                opened.append(event)
                theirs.sendmsg([b"\1"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [event]))])
        theirs.sendall(FINISHED)
        theirs.close()
        for life, at in enumerate([*dies_at, 0]):
            mortal = Mortal(at)
            journal.mortal = mortal
            try:

                def take(event, mortal=mortal):
                    mortal.step()
                    if isinstance(event, TaskUffd):
                        assert event.pid not in served, "handed over twice"
                        served[event.pid] = event.uffd
                        opened.append(event.uffd)
                    elif event not in seen:
                        seen.append(event)
                    mortal.step()

                connection = Connection(ours, journal, 0)
                connection._socket = MortalSocket(ours, mortal)  # a seam for deaths
                if life:
                    connection.resume(take, served.__contains__)
                while Finished() not in seen and connection.receive(take):
                    pass
                break
            except Death:
                continue
        values = {pid: os.eventfd_read(uffd) for pid, uffd in served.items()}
    finally:
        ours.close()
        theirs.close()
        for descriptor in {*opened}:
            if is_open(descriptor):
                os.close(descriptor)
    return values, seen, mortal.steps


def test_a_death_at_any_step_neither_loses_a_userfaultfd_nor_takes_it_for_anothers(monkeypatch):
    tasks = {pid: pid for pid in SAID if pid > 0}
    others = [*(Zombie(-pid) for pid in SAID if pid < 0), Finished()]
    values, seen, steps = serve_and_die(monkeypatch, -1)
    assert (values, seen) == (tasks, others)
    assert steps > 4 * len(SAID)
    for first in range(1, steps):
        for second in (0, 1, 3, 6):
            values, seen, _ = serve_and_die(monkeypatch, first, second)
            assert (values, seen) == (tasks, others), f"deaths at steps {first} and {second}"


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A folder to listen in; the current one comes back afterwards."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_name_is_there_as_long_as_it_listens(in_folder):
    with Listener(in_folder) as listener:
        assert [path.name for path in in_folder.iterdir()] == [SOCKET_NAME]
        assert listener.accept() is None
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(in_folder / SOCKET_NAME))
            connection = listener.accept()
            assert connection is not None
            with connection, socket.socket() as unrelated:
                assert listener.is_accepted(connection.fileno())
                assert not listener.is_accepted(listener.fileno())
                assert not listener.is_accepted(peer.fileno())
                assert not listener.is_accepted(unrelated.fileno())
    assert list(in_folder.iterdir()) == []


def test_a_stale_socket_is_replaced(in_folder):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(SOCKET_NAME)
    with Listener(in_folder), socket.socket(socket.AF_UNIX) as peer:
        peer.connect(SOCKET_NAME)


def test_another_daemons_socket_is_not_removed_at_the_end(in_folder):
    first, second = Listener(in_folder), Listener(in_folder)
    first.close()
    first.unlink()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(SOCKET_NAME)
    second.close()
    second.unlink()
    assert list(in_folder.iterdir()) == []


def test_what_is_no_socket_is_not_replaced(in_folder):
    (in_folder / SOCKET_NAME).write_text("precious")
    with pytest.raises(LazydError, match="is not a socket"):
        Listener(in_folder)
    assert (in_folder / SOCKET_NAME).read_text() == "precious"


def test_a_work_directory_may_be_deeper_than_a_socket_name(in_folder):
    deep = in_folder.joinpath(*["d" * 200] * 3)
    deep.mkdir(parents=True)
    with Listener(deep):
        assert (deep / SOCKET_NAME).is_socket()


@pytest.mark.parametrize("what", ["missing", "a file"])
def test_a_work_directory_that_is_none_is_refused(in_folder, what):
    work = in_folder / "work"
    if what == "a file":
        work.touch()
    with pytest.raises(SystemCallError, match="chdir to the work directory: ENO"):
        Listener(work)


@pytest.mark.parametrize("cut", range(9))
def test_another_one_goes_on_from_any_byte(cut):
    said = struct.pack("<ii", -7, -8) + struct.pack("<I", 0x52535446)
    first, second = Handshake(), Handshake()
    events = first.feed(said[:cut]) if cut else []
    second.restore(first.save())
    assert events + second.feed(said[cut:]) == [Zombie(7), Zombie(8), Finished()]


def test_another_one_still_waits_for_the_userfaultfd_that_was_due():
    first, second = Handshake(), Handshake()
    first.feed(struct.pack("<i", 12))
    second.restore(first.save())
    with pytest.raises(ProtocolError, match="task 12 came without a userfaultfd"):
        second.feed(b"x")
