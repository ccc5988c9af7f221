# SPDX-License-Identifier: MIT
"""`lazyd dump` as users meet it: what it refuses and how, and that the task goes on whatever becomes of the dump."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kernel_harness import NEEDS_KTHREADD, layout, wait_until
from process_harness import Dying

from lazyd.target import tracing

LAZYD = str(Path(sys.executable).parent / "lazyd")
HAS_SYSTEM_V = Path("/proc/sysvipc").exists()


def lazyd(*words, **options):
    """Run lazyd; return what became of it."""
    words = [LAZYD, *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, **options)


def refused(*words, **options):
    """Run lazyd, which must refuse: exit 1, nothing on stdout; return its one message."""
    run = lazyd(*words, **options)
    assert run.returncode == 1, run
    assert not run.stdout
    assert "Traceback" not in run.stderr
    return run.stderr


def one_line(*words, **options):
    """The same, and the message is one line."""
    message = refused(*words, **options)
    assert message.count("\n") == 1, message
    return message


def is_nothing_left(folder):
    """See that no images and no hidden folder are there."""
    return [path for path in folder.rglob("*") if "img" in path.name or path.name.startswith(".")] == []


# ---- what a task has beyond a plain one ----

ODD = {
    "seccomp": r"""
import ctypes, threading, time
def confine():
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
    filters = (ctypes.c_uint64 * 1)(0x7fff000000000006)
    libc.prctl(38, 1, 0, 0, 0)
    assert libc.prctl(22, 2, ctypes.byref(Program(1, ctypes.addressof(filters)))) == 0
    done.set(); time.sleep(1000)
done = threading.Event()
threading.Thread(target=confine, daemon=True).start(); done.wait()
""",
    "its name is not UTF-8": r"""libc.prctl(15, b"\xff\xfe", 0, 0, 0)""",
    r"\xff": r"""keep = os.open(folder.encode() + b"/\xff", os.O_CREAT | os.O_RDWR)""",
}


@contextlib.contextmanager
def running(folder, program):
    """Run a Python program that makes itself odd; it is ready when this begins."""
    head = "import ctypes, os, signal, sys\nlibc = ctypes.CDLL(None)\nfolder = sys.argv[1]\n"
    tail = "\nos.close(os.open(folder + '/ready', os.O_CREAT))\nsignal.pause()\n"
    null = subprocess.DEVNULL
    command = [sys.executable, "-c", head + program + tail, str(folder)]
    process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
    try:
        wait_until((folder / "ready").exists, "the program")
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("said", ODD)
def test_what_images_cannot_say_is_refused(said, tmp_path):
    """A filter of one thread alone, and names that are no text, which protobuf's strings cannot hold."""
    with running(tmp_path, ODD[said]) as process:
        assert said in refused("dump", "--pid", process.pid, "-D", tmp_path / "images")
        assert process.poll() is None
    assert is_nothing_left(tmp_path)


def test_too_few_descriptors_of_our_own(tmp_path):
    """What fails in an unforeseen way is one line too."""
    with running(tmp_path, "") as process:
        words = [LAZYD, "dump", "--pid", str(process.pid), "-D", str(tmp_path / "images")]
        shell = ["sh", "-c", 'ulimit -n 6; exec "$@"', "sh", *words]
        run = subprocess.run(shell, capture_output=True, text=True, check=False, timeout=60)
        assert run.returncode == 1
        assert "Too many open files" in run.stderr
        assert "Traceback" not in run.stderr
        assert process.poll() is None


def test_an_inherited_file_is_one_open_file(tmp_path):
    """Parent and child have one position in a file that was open at fork, and another where both opened it."""
    program = """
kept = os.open(folder + "/inherited", os.O_CREAT | os.O_WRONLY)
child = os.fork()
own = os.open(folder + "/opened", os.O_CREAT | os.O_WRONLY)
if not child:
    signal.pause()
while len(os.listdir(f"/proc/{child}/fd")) < len(os.listdir("/proc/self/fd")) - 1:
    pass
"""
    with running(tmp_path, program) as process:
        run = lazyd("dump", "--pid", process.pid, "-D", tmp_path / "images", "--tree", "--leave-running")
        assert run.returncode == 0, run.stderr
    content = (tmp_path / "images" / "files.img").read_bytes()
    assert content.count(b"/inherited") == 1
    assert content.count(b"/opened") == 2


EXECS = """
#include <unistd.h>
int main(int argc, char **argv) { usleep(1000); return execv(argv[argc - 1], argv); }
"""


def test_a_task_that_executes_itself_all_the_time(tmp_path):
    """Mappings are gone before they can be looked at; that it has ended is not true for that."""
    source, program = tmp_path / "execs.c", str(tmp_path / "execs")
    source.write_text(EXECS)
    subprocess.run(["gcc", "-O2", "-o", program, str(source)], check=True)
    null = subprocess.DEVNULL
    process = subprocess.Popen([program, program], stdin=null, stdout=null, stderr=null, start_new_session=True)
    try:
        for number in range(4):
            run = lazyd("dump", "--pid", process.pid, "-D", tmp_path / f"images{number}", "--leave-running")
            assert run.returncode == 0 or "changes faster than it can be looked at" in run.stderr, run.stderr
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()


THREADS_EXECUTE = """
#include <pthread.h>
#include <unistd.h>
static char **words;
static void *again(void *nothing) { usleep(2000); execv(words[0], words); return nothing; }
int main(int argc, char **argv)
{
	pthread_t thread;
	words = argv;
	for (int i = 0; i < 4 * argc; i++)
		pthread_create(&thread, 0, again, 0);
	pause();
}
"""


def test_a_task_whose_threads_execute_all_the_time(tmp_path):
    """Its leading thread ends each time, and has no more memory then than threads of the kernel have."""
    source, program = tmp_path / "execs.c", str(tmp_path / "execs")
    source.write_text(THREADS_EXECUTE)
    subprocess.run(["gcc", "-O2", "-pthread", "-o", program, str(source)], check=True)
    null = subprocess.DEVNULL
    process = subprocess.Popen([program], stdin=null, stdout=null, stderr=null, start_new_session=True)
    # What is true of it at one moment or another; it is never beyond a plain task, nor has it ended.
    may_be_said = "changes faster", "does not stop", "main thread"
    try:
        for number in range(4):
            run = lazyd("dump", "--pid", process.pid, "-D", tmp_path / f"images{number}", "--leave-running")
            assert run.returncode == 0 or any(words in run.stderr for words in may_be_said), run.stderr
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()


EVERYTHING = r"""
import ctypes, fcntl, mmap, os, select, signal, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
folder = sys.argv[1]
os.chdir(folder)
keep = [socket.socket(socket.AF_UNIX), select.epoll(), os.eventfd(0), os.pipe(), os.memfd_create("x")]
inotify = libc.inotify_init()
signal_fd = libc.signalfd(-1, struct.pack("Q", 0), 0)
timer_fd = libc.timerfd_create(0, 0)
deleted = open("deleted", "w"); os.unlink("deleted")
os.mkfifo("fifo"); fifo = os.open("fifo", os.O_RDWR)
locked = open("locked", "w"); fcntl.flock(locked, fcntl.LOCK_EX)
owned = open("owned", "w"); fcntl.fcntl(owned, fcntl.F_SETOWN, os.getpid())
path = os.open("/", os.O_PATH)
own = open("/proc/self/status")
strange = open(b"strange \xff", "w")
os.mkdir("covered")
covered = open("covered/file", "w")
assert libc.mount(b"none", os.fsencode(folder + "/covered"), b"tmpfs", 0, None) == 0
terminal = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
shm = libc.shmget(0, 4096, 0o1600)
libc.shmat(shm, None, 0)
libc.shmctl(shm, 0, None)
mapped = open("mapped", "w+b"); mapped.truncate(4096); private = mmap.mmap(mapped.fileno(), 4096, mmap.MAP_PRIVATE)
os.unlink("mapped")
context = ctypes.c_ulong(); libc.syscall(206, 8, ctypes.byref(context))
uffd = libc.syscall(323, 0o2000001)
os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone")
child = os.fork()
if not child:
    libc.ptrace(0, 0, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)
os.waitpid(child, os.WUNTRACED)
filters = (ctypes.c_uint64 * 1)(0x7fff000000000006)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.byref(Program(1, ctypes.addressof(filters)))) == 0
os.close(os.open(folder + "/ready", os.O_CREAT))
signal.pause()
"""
WORDS = [
    "a socket",
    "eventpoll",
    "eventfd",
    "a pipe",
    "a memfd",
    "inotify",
    "signalfd",
    "timerfd",
    "its file is deleted",
    "a named pipe",
    "a file lock",
    "F_SETOWN",
    "O_PATH",
    "a file about a process",
    "a device",
    "System V shared memory",
    "asynchronous I/O",
    "userfaultfd",
    "/gone: it is deleted",
    "its path is not UTF-8",
    "its path leads elsewhere",
    "it traces process",
    "children:",
    "seccomp",
]


@pytest.fixture
def everything(tmp_path):
    """A process with all that a plain task has not."""
    state = tmp_path / "everything"
    state.mkdir()
    null = subprocess.DEVNULL
    command = [sys.executable, "-c", EVERYTHING, str(state)]
    process = subprocess.Popen(command, stdin=null, stdout=null, start_new_session=True)
    try:
        wait_until((state / "ready").exists, "everything")
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        subprocess.run(["umount", "-l", str(state / "covered")], check=False, capture_output=True)


def test_all_that_is_beyond_a_plain_task_is_listed_at_once(everything, tmp_path):
    message = refused("dump", "--pid", everything.pid, "-D", tmp_path / "images")
    for words in WORDS if HAS_SYSTEM_V else [words for words in WORDS if "System V" not in words]:
        assert words in message, f"{words} in:\n{message}"
    assert "`criu dump`" in message
    assert is_nothing_left(tmp_path)
    assert everything.poll() is None


FIRST_SHARED_MEMORY = """
assert libc.unshare(0x08000000) == 0  # CLONE_NEWIPC: numbers begin anew
shm = libc.shmget(0, 4096, 0o1600)
assert shm == 0
libc.shmat(shm, None, 0)
libc.shmctl(shm, 0, None)
"""


@pytest.mark.skipif(not HAS_SYSTEM_V, reason="this kernel has no System V shared memory")
def test_the_first_shared_memory_of_a_machine(tmp_path):
    """Its identifier is 0, and so is what maps has for an inode: it is no private memory for that."""
    with running(tmp_path, FIRST_SHARED_MEMORY) as process:
        assert "System V shared memory" in refused("dump", "--pid", process.pid, "-D", tmp_path / "images")
        assert process.poll() is None
    assert is_nothing_left(tmp_path)


@pytest.mark.parametrize("kind", ["--net", "--uts", "--mount", "--ipc", "--pid --fork", "--user", "--cgroup"])
def test_other_namespaces_are_refused(kind, tmp_path):
    words = ["unshare", *kind.split(), "--kill-child", "sleep", "1000"]
    words = [word for word in words if word != "--kill-child" or "--fork" in kind]
    null = subprocess.DEVNULL
    process = subprocess.Popen(words, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/")
    try:
        pid = process.pid

        def sleeper():
            pids = [pid]
            with contextlib.suppress(OSError):
                pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            return [one for one in pids if Path(f"/proc/{one}/comm").read_text() == "sleep\n"]

        wait_until(sleeper, "the program")
        message = refused("dump", "--pid", sleeper()[0], "-D", tmp_path / "images")
        assert "namespace" in message
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- bad input ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dump", "-D", "x"], "--pid PID is needed"),
        (["dump", "--pid", "1"], "-D DIR is needed"),
        (["dump", "--pid", "x", "-D", "x"], "invalid int value"),
        (["dump", "--pid", "-3", "-D", "x"], "not a pid"),
        (["dump", "--pid", "4194303", "-D", "x"], "there is no process"),
        pytest.param(["dump", "--pid", "2", "-D", "x"], "kernel thread", marks=NEEDS_KTHREADD),
        (["dump", "--pid", "2", "-D", "x", "-R", "-s"], "one of them"),
        (["pre-dump", "--pid", "2", "-D", "x", "-s"], "leaves the process running"),
        (["dump", "--pid", "2", "-D", "x", "--track-mem"], "--leave-running"),
        (["dump", "--pid", "2", "-D", "x", "--auto-dedup"], "--parent DIR is needed"),
        (["dump", "--pid", "2", "-D", "x", "now"], "one word too many"),
        (["dump", "--pid", "2", "-D", "x", "--page-server"], "--address HOST and --port N are needed"),
        (["dump", "--pid", "2", "-D", "x", "--port", "1"], "are for --page-server"),
        (["dump", "--pid", "2", "-D", "x", "--page-server", "--address", "h", "--port", "65536"], "not a port"),
        (["dump", "--pid", "2", "-D", "x", "--stats", "no/stats"], "no/stats: --stats: ENOENT"),
        (["dump", "--pid", "2", "-D", "x", "-o", "no/log"], "opening the log file"),
        (
            ["pre-dump", "--pid", "2", "-D", "x", "--page-server", "--address", "x", "--port", "1"],
            "bound to images here",
        ),
        (
            ["dump", "--pid", "2", "-D", "x", "--page-server", "--address", "h", "--port", "1", "--parent", "y"],
            "--parent is",
        ),
        (["dump", "--pid", "2", "-D", "x", "--nonsense"], "unrecognized"),
    ],
)
def test_arguments_that_make_no_sense(words, said, tmp_path):
    assert said in one_line(*words, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_empty(start, tmp_path):
    victim, images = start("registers"), tmp_path / "images"
    images.mkdir()
    (images / "mine").write_text("kept")
    assert "not empty" in one_line("dump", "--pid", victim.pid, "-D", images)
    assert (images / "mine").read_text() == "kept"
    assert victim.finish() == "ok\n"


def test_a_directory_whose_parent_is_not_there(start, tmp_path):
    victim = start("registers")
    assert "no such directory" in one_line("dump", "--pid", victim.pid, "-D", tmp_path / "no" / "images")
    assert victim.finish() == "ok\n"


def test_a_name_as_long_as_names_may_be(start, tmp_path):
    """What is made beside it has a longer name; it must fit all the same."""
    victim, images = start("registers"), tmp_path / ("n" * 255)
    assert lazyd("dump", "--pid", victim.pid, "-D", images, "-R").returncode == 0
    assert lazyd("verify", images).stdout.endswith("good\n")
    assert "ENAMETOOLONG" in one_line("dump", "--pid", victim.pid, "-D", tmp_path / ("n" * 256))
    assert list(tmp_path.glob(".*")) == []
    assert victim.finish() == "ok\n"


def test_a_working_directory_that_is_gone(start, tmp_path):
    victim = start("registers")
    (tmp_path / "gone").mkdir()
    words = ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", LAZYD, "dump", "--pid", str(victim.pid), "-D", "images"]
    run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path / "gone")
    assert run.returncode == 1
    assert run.stderr == "images: the working directory is gone; name a directory by its whole path\n"
    assert victim.finish() == "ok\n"


def test_a_page_server_on_no_host(start, tmp_path):
    victim = start("registers")
    words = ["--page-server", "--address", "no-such-host.invalid", "--port", "1"]
    assert "no such host" in one_line("dump", "--pid", victim.pid, "-D", tmp_path / "images", *words)
    assert is_nothing_left(tmp_path)
    assert victim.finish() == "ok\n"


def test_nobody_is_stopped_while_a_page_server_says_nothing(start, tmp_path):
    victim = start("registers", "nanosleep", "calls")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(20)
        words = [LAZYD, "dump", "--pid", str(victim.pid), "-D", str(tmp_path / "images"), "--page-server"]
        words += ["--address", "127.0.0.1", "--port", str(listening.getsockname()[1])]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = listening.accept()
            with connection:
                assert connection.recv(64)
                time.sleep(0.3)
                assert tracing.tracer_of(victim.pid) == 0
            _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "hung up instead of answering" in said
    assert said.count("\n") == 1
    assert is_nothing_left(tmp_path)
    assert victim.finish() == "ok\n"


def test_a_file_where_a_directory_should_be(start, tmp_path):
    victim = start("registers")
    (tmp_path / "images").touch()
    assert "not a directory" in one_line("dump", "--pid", victim.pid, "-D", tmp_path / "images")
    assert victim.finish() == "ok\n"


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("may not mount here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(start, small_disk):
    victim = start("memory", "registers", "memory", "memory")
    before = [line.split()[0] for line in Path(f"/proc/{victim.pid}/maps").read_text().splitlines()]
    message = one_line("dump", "--pid", victim.pid, "-D", small_disk / "images")
    assert "ENOSPC" in message
    assert "make room" in message
    assert not list(small_disk.iterdir())
    assert [line.split()[0] for line in Path(f"/proc/{victim.pid}/maps").read_text().splitlines()] == before
    assert victim.finish() == "ok\n"


def test_a_read_only_disk(start, small_disk):
    victim = start("registers")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "EROFS" in one_line("dump", "--pid", victim.pid, "-D", small_disk / "images")
    assert victim.finish() == "ok\n"


UNPRIVILEGED = """
import os, sys
import lazyd.cli_dump, lazyd.dump.run, lazyd.report
from lazyd.cli import main
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
sys.exit(main(sys.argv[1:]))
"""


def test_no_permission(start, tmp_path):
    victim = start("registers")
    words = [sys.executable, "-c", UNPRIVILEGED, "dump", "--pid", str(victim.pid), "-D", "/tmp/never-made"]
    run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 1, run
    assert "no permission" in run.stderr
    assert run.stderr.count("\n") == 1
    assert not Path("/tmp/never-made").exists()
    assert victim.finish() == "ok\n"


# ---- parents ----


def test_parents_that_are_none(start, tmp_path):
    victim, other = start("registers"), start("registers")
    images = tmp_path / "images"

    def said(parent):
        return one_line("dump", "--pid", victim.pid, "-D", images, "--parent", parent)

    assert "no such file or directory" in said(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "no inventory.img" in said(tmp_path / "empty")
    assert lazyd("pre-dump", "--pid", other.pid, "-D", tmp_path / "other").returncode == 0
    assert "images of another task" in said(tmp_path / "other")
    assert lazyd("pre-dump", "--pid", victim.pid, "-D", tmp_path / "cut").returncode == 0
    pages = tmp_path / "cut" / "pages-1.img"
    os.truncate(pages, pages.stat().st_size // 2)
    assert "pages-1.img" in said(tmp_path / "cut")
    pages.unlink()
    assert "cut" in said(tmp_path / "cut")
    assert not images.exists()
    assert victim.finish() == "ok\n"
    assert other.finish() == "ok\n"


def test_a_parent_of_an_earlier_process_with_the_same_pid(start, tmp_path):
    """Its inventory says when it was dumped, and that was before this process was started."""
    victim = start("registers")
    parent = tmp_path / "parent"
    assert lazyd("pre-dump", "--pid", victim.pid, "-D", parent).returncode == 0
    from lazyd.image.pb import inventory_pb2  # noqa: PLC0415  generated

    path = parent / "inventory.img"
    content = path.read_bytes()
    inventory = inventory_pb2.Inventory.FromString(content[8:])
    assert inventory.dump_uptime
    inventory.dump_uptime = 1
    body = inventory.SerializeToString()
    path.write_bytes(content[:4] + len(body).to_bytes(4, "little") + body)
    message = one_line("dump", "--pid", victim.pid, "-D", tmp_path / "images", "--parent", parent)
    assert "was started after that dump" in message
    assert victim.finish() == "ok\n"


# ---- what becomes of the task ----


def test_a_dump_kills(start, tmp_path):
    victim = start("registers", "nanosleep", "calls")
    assert lazyd("dump", "--pid", victim.pid, "-D", tmp_path / "images").returncode == 0
    assert victim.process.wait(10) == -signal.SIGKILL


def test_leave_running(start, tmp_path):
    victim = start("registers", "nanosleep", "sigsuspend", "handler", "pending", "futex", "poll", "read")
    # The pipe that `read` reads from, and its child, are beyond a plain task.
    assert "a pipe" in refused("dump", "--pid", victim.pid, "-D", tmp_path / "x", "-R")
    assert victim.finish() == "ok\n"
    victim = start("registers", "nanosleep", "sigsuspend", "handler", "pending", "futex", "poll")
    for number in range(5):
        assert lazyd("dump", "--pid", victim.pid, "-D", tmp_path / f"images{number}", "-R").returncode == 0
    assert victim.finish() == "ok\n"


def test_leave_stopped(start, tmp_path):
    victim = start("registers", "nanosleep", "calls")
    assert lazyd("dump", "--pid", victim.pid, "-D", tmp_path / "images", "-s").returncode == 0
    wait_until(lambda: {tracing.state_of(tid) for tid in tracing.thread_ids(victim.pid)} == {"T"}, "the stop", 5)
    os.kill(victim.pid, signal.SIGCONT)
    assert victim.finish() == "ok\n"


def test_statistics(start, tmp_path):
    victim = start("registers", "memory")
    run = lazyd("pre-dump", "--pid", victim.pid, "-D", tmp_path / "images", "--stats", tmp_path / "stats.json")
    assert run.returncode == 0, run.stderr
    stats = json.loads((tmp_path / "stats.json").read_text())
    pages = sum(path.stat().st_size for path in (tmp_path / "images").glob("pages-*.img"))
    assert stats["bytes"] == pages == (stats["pages"]["dumped"] + stats["pages"]["shared"]) * 4096
    assert 0 < stats["seconds"]["stopped"] < stats["seconds"]["total"]
    assert stats["tasks"] == [{"pid": victim.pid, "name": "steady", "threads": 3}]
    assert f"process {victim.pid} (steady): 3 threads, now running" in run.stderr
    assert victim.finish() == "ok\n"


def test_auto_dedup_frees_what_is_dumped_again(start, tmp_path):
    victim = start("memory")
    first, second = tmp_path / "first", tmp_path / "second"
    assert lazyd("pre-dump", "--pid", victim.pid, "-D", first).returncode == 0
    assert lazyd("verify", first).stdout == f"{first}: good\n"
    before = (first / "pages-1.img").read_bytes()
    run = lazyd("dump", "--pid", victim.pid, "-D", second, "--parent", first, "--auto-dedup", "-R")
    assert run.returncode == 0, run.stderr
    assert "freed" in run.stderr
    # The 512 KiB that it writes to all the time are in the second one alone.
    after = (first / "pages-1.img").read_bytes()
    freed = sum(after[at : at + 4096] != before[at : at + 4096] for at in range(0, len(before), 4096))
    zeros = sum(before[at : at + 4096] == bytes(4096) for at in range(0, len(before), 4096))
    assert freed > 64
    assert (first / "pages-1.img").stat().st_blocks * 512 < len(before) - freed * 4096 + (64 << 10)
    assert lazyd("verify", second).stdout == f"{second}: good\n"
    doubt, last = lazyd("verify", first).stdout.splitlines()
    # Of one that was zeros before, its content does not tell.
    assert freed <= int(re.search(r"pages-1.img: (\d+) dumped pages", doubt)[1]) <= freed + zeros
    assert last == f"{first}: good, apart from that"
    assert victim.finish() == "ok\n"


def test_a_log_among_the_images(start, tmp_path):
    victim, images = start("registers"), tmp_path / "images"
    run = lazyd("dump", "--pid", victim.pid, "-D", images, "-R", "-o", "dump.log")
    assert run.returncode == 0
    assert not run.stderr
    assert f"process {victim.pid} (steady)" in (images / "dump.log").read_text()
    assert lazyd("verify", images).stdout.endswith("good\n")
    assert "not empty" in one_line("dump", "--pid", victim.pid, "-D", images, "-R")
    assert victim.finish() == "ok\n"


# ---- what tracks between dumps ----


def is_tracked(pid):
    """Ask the kernel whether anybody has write-protected memory of a task."""
    return " uw" in Path(f"/proc/{pid}/smaps").read_text()


INTERRUPTED = """
import subprocess, sys, time
run = subprocess.run
def interrupted(*words, **named):
    run(*words, **named)
    time.sleep(0.5)  # it is there, and serves
    raise KeyboardInterrupt
subprocess.run = interrupted
from lazyd.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupt_leaves_no_tracker_that_nobody_finds(start, tmp_path):
    victim = start("registers")
    words = [sys.executable, "-c", INTERRUPTED, "pre-dump", "--pid", str(victim.pid), "-D", str(tmp_path / "first")]
    run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 1
    wait_until(lambda: not is_tracked(victim.pid), "the protection to end", 5)
    assert lazyd("pre-dump", "--pid", victim.pid, "-D", tmp_path / "second").returncode == 0
    assert is_tracked(victim.pid)
    assert victim.finish() == "ok\n"


def test_a_tracker_whose_socket_is_removed_ends(start, tmp_path):
    """Else its task could never be dumped again: its memory is protected by somebody who cannot be asked."""
    victim = start("registers")
    assert lazyd("pre-dump", "--pid", victim.pid, "-D", tmp_path / "first").returncode == 0
    assert is_tracked(victim.pid)
    (socket,) = Path("/run/lazyd").glob(f"tracker-*-{victim.pid}.socket")
    socket.unlink()
    wait_until(lambda: not is_tracked(victim.pid), "the tracker to end", 10)
    run = lazyd("dump", "--pid", victim.pid, "-D", tmp_path / "second", "--parent", tmp_path / "first", "-R")
    assert run.returncode == 0, run.stderr
    assert "in the parent" not in run.stderr
    wrote = f"what process {victim.pid} wrote since {tmp_path / 'first'} was not tracked"
    assert f"{wrote}: all of its memory is dumped again\n" in run.stderr
    assert victim.finish() == "ok\n"


# ---- lazyd is ended ----

SLOWLY = """
import os, signal, sys
from lazyd.dump import core, memory
copy = core.copy_pages
def slow(*arguments, **named):
    print("copying", flush=True)
    sys.stdin.read(1)
    return copy(*arguments, **named)
from lazyd.dump import transfer
transfer.copy_pages = slow
from lazyd.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_dump_in_order(start, number, tmp_path):
    victim = start("registers", "nanosleep", "memory")
    words = [sys.executable, "-c", SLOWLY, "dump", "--pid", str(victim.pid), "-D", str(tmp_path / "images")]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "copying\n"
        assert tracing.tracer_of(victim.pid) == process.pid
        process.send_signal(number)
        time.sleep(0.2)
        _, said = process.communicate("x", timeout=30)
        assert process.returncode == 1
    assert said.count("\n") == 1
    assert number.name in said or "cancelled" in said
    assert is_nothing_left(tmp_path)
    assert victim.finish() == "ok\n"


HEAD = """
from lazyd.target import remote, state, tracing
for module in (remote, state, tracing):
    module.request = counted(module.request)
from lazyd.dump import run, transfer
from lazyd.image.writer import ImagesWriter
for name in ("write_file", "create", "publish", "_make_hidden"):
    setattr(ImagesWriter, name, counted(getattr(ImagesWriter, name)))
transfer.copy_pages = counted(transfer.copy_pages)
for name in ("reserve", "write_hole", "write_pages", "write_pagemap", "close"):
    setattr(transfer.LocalTransfer, name, counted(getattr(transfer.LocalTransfer, name)))
for name in ("dump", "finish", "dump_shared", "prepare"):
    setattr(run.MemoryDump, name, counted(getattr(run.MemoryDump, name)))
from lazyd import cli, cli_dump
"""


@pytest.mark.parametrize("verb", ["dump", "pre-dump"])
def test_a_killed_lazyd_leaves_the_task_running(start, verb, tmp_path):
    """Killed before each step, one in five: each run must leave the task as it was, and no images."""
    victim = start("registers", "nanosleep", "sigsuspend", "memory")
    words = [verb, "--pid", victim.pid, "-D"]
    extra = ["--leave-running", "-v1"] if verb == "dump" else ["-v1"]
    with Dying(HEAD, "return cli.main(words)") as dying:
        code, steps = dying.run(10**9, *words, tmp_path / "whole", *extra)
        assert code == 0
        assert steps > 100
        maps = layout(victim.pid)[0]
        for limit in range(0, steps, 5):
            images = tmp_path / f"images{limit}"
            assert dying.run(limit, *words, images, *extra)[0] == -signal.SIGKILL
            wait_until(lambda: tracing.tracer_of(victim.pid) == 0, "the kernel to let go")
            assert tracing.state_of(victim.pid) in "RSD"
            assert not images.exists() or (images / "inventory.img").exists()
            # What it was in the middle of it finishes by itself.
            with contextlib.suppress(AssertionError):
                wait_until(lambda: layout(victim.pid)[0] == maps, "the mappings", 5)
            assert layout(victim.pid)[0] == maps, f"killed after {limit} steps"
    assert victim.finish() == "ok\n"
