# SPDX-License-Identifier: MIT
"""Tasks that `lazyd restore` builds again, from images of its own and of both CRIUs.

The programs check themselves; tests/victims/plain.c compares all it can find out about itself with what it was.
"""

from __future__ import annotations

import contextlib
import os
import pty
import random
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import harness
import pytest
from process_harness import Dying

from lazyd.image.pb import core_pb2, files_pb2
from lazyd.target.tracing import state_of, status_fields, thread_ids

LAZYD = str(Path(sys.executable).parent / "lazyd")
HOW = pytest.mark.parametrize("how", ["lazy", "eager"])
WHOSE = pytest.mark.parametrize("whose", ["lazyd", *harness.SUITES])
PYTHON_COMMAND = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else os.path.realpath(sys.executable)
STRESS = max(1, int(os.environ.get("LAZYD_STRESS", "1")))


def dump(saved, whose):
    """Write images of a program, which is gone then."""
    if whose == "lazyd":
        words = [LAZYD, "dump", "--pid", str(saved.pid), "-D", str(saved.images)]
    else:
        if not Path(harness.criu_command(whose)).exists():
            pytest.skip(f"no CRIU of {whose}: run scripts/get-criu {whose}")
        saved.images.mkdir()
        words = [harness.criu_command(whose), "dump", "-t", str(saved.pid), "-D", str(saved.images), "-j", "-v0"]
    run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    harness.reap_group(saved.pid)


def restore(saved, *words, check=True, command=(LAZYD,), **more):
    """Run lazyd restore to its end."""
    line = [*command, "restore", "-D", str(saved.images), "--no-progress", *words]
    output = saved.images.parent / "restore.out"
    with output.open("w") as out:  # not a pipe, which the task would keep open
        more = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out} | more
        run = subprocess.run(line, check=False, timeout=60, **more)
    run.stderr = output.read_text()
    if check:
        assert run.returncode == 0, run.stderr
    return run


def verdict(saved):
    """Tell a program to end; what it has found."""
    (saved.state / "go").touch()
    try:
        harness.wait_until(lambda: saved.result.endswith("\n"), "the program's verdict")
    except AssertionError as error:
        said = harness.tail(saved.images.parent / "restore.out")
        raise AssertionError(f"{error}\n{harness.task_states(saved.pid)}\n{said}") from None
    return saved.result


def how_words(how):
    return ["--eager"] if how == "eager" else []


@HOW
@WHOSE
def test_a_plain_task_comes_back(whose, how, programs, start):
    saved = start(programs("plain"), "STATE", "7")
    dump(saved, whose)
    restore(saved, *how_words(how))
    assert verdict(saved) == "ok\n"


@HOW
def test_who_gave_up_root_comes_back_without(how, programs, start):
    saved = start(programs("plain"), "STATE", "7", "user")  # which neither CRIU dumps here
    dump(saved, "lazyd")
    restore(saved, *how_words(how))
    assert verdict(saved) == "ok\n"


@pytest.mark.parametrize("whose", ["lazyd", "trixie"])
def test_fifty_threads(whose, programs, start):
    saved = start(programs("plain"), "STATE", "50")
    tids = thread_ids(saved.pid)
    dump(saved, whose)
    restore(saved)
    assert thread_ids(saved.pid) == tids
    assert verdict(saved) == "ok\n"


# What the kernel's own state alone could finish comes back with EINTR, which steady.c takes for wrong.
KINDS = ["registers", "memory", "calls", "handler", "sigsuspend", "pending"]


@WHOSE
def test_threads_in_the_middle_of_everything(whose, programs, start):
    saved = start(programs("steady"), "STATE", *KINDS * 3)
    dump(saved, whose)
    restore(saved)
    assert verdict(saved) == "ok\n"


PYTHON = """
import array, hashlib, os, sys, threading, time
state = sys.argv[1]
words = array.array("Q", range(6_000_000))
blocks = [os.urandom(1 << 20) for _ in range(20)]
table = {f"key {number}": str(number) * 3 for number in range(50_000)}
def digest():
    found = hashlib.sha256(words)
    for block in blocks:
        found.update(block)
    for key, value in table.items():
        found.update((key + value).encode())
    return found.hexdigest()
before, count, stop = digest(), [0] * 4, threading.Event()
def work(number):
    while not stop.is_set():
        count[number] += 1
        assert words[count[number] * 7919 % len(words)] == count[number] * 7919 % len(words)
        time.sleep(0.0002)  # or the others hardly get the interpreter
threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
os.mknod(state + "/ready")
while not os.path.exists(state + "/go"):
    time.sleep(0.01)
then = list(count)
while any(now == was for now, was in zip(count, then)):
    time.sleep(0.001)
after = digest()
stop.set()
for thread in threads:
    thread.join()
with open(state + "/result", "w") as file:
    file.write("ok\\n" if after == before else "wrong\\n")
"""
SHELL = """
number=0
touch_ready() { : > "$1/ready"; }
trap 'seen=term' TERM
cd "$1"
touch_ready "$1"
while [ ! -e go ]; do number=$((number + 1)); done
kill -TERM $$
if [ "$seen" = term ] && [ $number -gt 0 ] && [ "$PWD" = "$1" ] && [ "$(echo fork)" = fork ]; then
	echo ok > unfinished
else
	echo wrong > unfinished
fi
mv unfinished result
"""


@pytest.mark.parametrize(("whose", "how"), [("lazyd", "lazy"), ("lazyd", "eager"), ("trixie", "lazy"), ("sid", "lazy")])
def test_real_python(whose, how, start, tmp_path):
    (tmp_path / "program.py").write_text(PYTHON)
    saved = start(PYTHON_COMMAND, str(tmp_path / "program.py"), "STATE")
    dump(saved, whose)
    restore(saved, *how_words(how))
    assert verdict(saved) == "ok\n"


@WHOSE
@pytest.mark.parametrize("shell", ["/bin/dash", "/bin/bash"])
def test_real_shells(whose, shell, start, tmp_path):
    (tmp_path / "script").write_text(SHELL)
    saved = start(shell, str(tmp_path / "script"), "STATE")
    dump(saved, whose)
    restore(saved)
    assert verdict(saved) == "ok\n"


def test_from_a_chain(programs, start):
    saved = start(programs("plain"), "STATE", "3")
    parent = []
    for level in range(3):
        images = saved.images.parent / f"images{level}"
        words = ["dump" if level == 2 else "pre-dump", "--pid", str(saved.pid), "-D", str(images), *parent]
        subprocess.run([LAZYD, *words], check=True, capture_output=True)
        parent = ["--parent", str(images)]
    harness.reap_group(saved.pid)
    saved.images = images
    restore(saved)
    assert verdict(saved) == "ok\n"


def test_stopped_then_attached_to(programs, start):
    saved = start(programs("steady"), "STATE", *KINDS)
    dump(saved, "lazyd")
    restore(saved, "--stopped")
    assert {state_of(tid) for tid in thread_ids(saved.pid)} == {"T"}
    run = subprocess.run(
        [LAZYD, "-D", str(saved.images), "--pid", str(saved.pid), "--no-progress"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert {state_of(tid) for tid in thread_ids(saved.pid)} == {"T"}
    os.kill(saved.pid, signal.SIGCONT)
    assert verdict(saved) == "ok\n"


def test_what_was_stopped_stays_stopped(programs, start):
    saved = start(programs("steady"), "STATE", *KINDS)
    os.kill(saved.pid, signal.SIGSTOP)
    dump(saved, "lazyd")
    restore(saved)
    assert {state_of(tid) for tid in thread_ids(saved.pid)} == {"T"}
    os.kill(saved.pid, signal.SIGCONT)
    assert verdict(saved) == "ok\n"


def test_dumped_and_restored_again_and_again(programs, start):
    saved = start(programs("plain"), "STATE", "3")
    first = saved.images
    for number in range(2):
        saved.images = first.with_name(f"images{number}")
        dump(saved, "lazyd")
        restore(saved, *how_words("eager" if number % 2 else "lazy"))
    assert verdict(saved) == "ok\n"


# ---- what is refused ----


def refused(saved, *words, **more):
    """Restore in vain; the one line that says why. There is no process then."""
    run = restore(saved, *words, check=False, **more)
    assert run.returncode == 1, run.stderr
    assert state_of(saved.pid) == "X"
    return run.stderr.strip().removeprefix("Error: ")


@pytest.fixture
def sleeper(start):
    """Images of a plain program."""
    saved = start(PYTHON_COMMAND, "-c", "import time, os; os.mknod('STATE/ready'); time.sleep(1000)")
    dump(saved, "lazyd")
    return saved


def test_a_pid_that_is_taken(sleeper):
    restore(sleeper)
    try:
        run = restore(sleeper, check=False)
        assert run.returncode == 1
        assert f"pid {sleeper.pid} is taken by another process or thread" in run.stderr
        assert len(run.stderr.splitlines()) == 1
        assert state_of(sleeper.pid) in "SR"
    finally:
        harness.reap_group(sleeper.pid)


def test_a_file_that_changed(programs, start):
    saved = start(programs("plain"), "STATE", "0")
    dump(saved, "lazyd")
    data = saved.state / "data"
    with data.open("ab") as file:
        file.write(b"more")
    assert f"{data}: it has changed: 32772 bytes, 32768 when the task was dumped" in refused(saved)
    data.unlink()
    assert f"{data}: no such file or directory" in refused(saved)
    data.mkdir()
    assert f"{data}: it was a file when the task was dumped, and is not now" in refused(saved)


def test_a_program_that_was_built_again(programs, start, tmp_path):
    source = (harness.ROOT / "tests/victims/plain.c").read_text()
    for folder, word in (("one", "ok"), ("two", "OK")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "plain.c").write_text(source.replace('"too much to write down"', f'"too much {word}"'))
        (tmp_path / folder / "registers.h").write_bytes((harness.ROOT / "tests/victims/registers.h").read_bytes())
        harness.compile_c(tmp_path / folder / "plain.c", tmp_path / folder / "plain")
    program = tmp_path / "one/plain"
    saved = start(str(program), "STATE", "0")
    dump(saved, "lazyd")
    other = tmp_path / "two/plain"
    assert other.stat().st_size == program.stat().st_size
    other.replace(program)
    assert f"{program}: it has changed: its build id is another" in refused(saved)


BEYOND = """
import ctypes, os, time
one = os.pipe()
two = ctypes.CDLL(None).eventfd(3, 0)
os.mknod("STATE/ready")
time.sleep(1000)
"""


def test_what_is_beyond_a_plain_task_is_listed_whole(suite, start):
    saved = start(PYTHON_COMMAND, "-c", BEYOND)
    dump(saved, suite)
    said = refused(saved)
    assert f"task {saved.pid} has what lazyd cannot bring back:" in said
    assert "descriptor 3: a pipe" in said
    assert "descriptor 5: an eventfd" in said
    assert f"`criu restore --lazy-pages` may, beside `lazyd --images {saved.images}`" in said


def test_a_tree(suite, start):
    saved = start("/bin/sh", "-c", "sleep 1000 & echo $! > STATE/child; : > STATE/ready; wait")
    dump(saved, suite)
    child = (saved.state / "child").read_text().strip()
    assert f"2 tasks: {saved.pid}, {child}: a tree of processes" in refused(saved)


def test_a_pages_image_that_is_cut(sleeper):
    for path in sleeper.images.glob("pages-*.img"):
        os.truncate(path, 4096)
    assert "pages-" in refused(sleeper)


def edit(path, message, change):
    """Change the first record of an image."""
    text = path.read_bytes()
    (length,) = struct.unpack_from("<I", text, 8)
    record = message.FromString(text[12 : 12 + length])
    change(record)
    body = record.SerializeToString()
    path.write_bytes(text[:8] + struct.pack("<I", len(body)) + body + text[12 + length :])


def rename(path):
    def change(record):
        record.reg.name = path

    return change


def fill_control_word(record):
    record.thread_info.fpregs.cwd = 1 << 16


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("files.img", rename("usr/bin/python3"), "files.img: garbled: file "),
        ("files.img", rename("/usr/bin\0/python3"), "files.img: garbled: file "),
        ("core-PID.img", fill_control_word, "core-PID.img: garbled, it or another of task PID"),
    ],
)
def test_values_that_cannot_be(sleeper, name, change, words):
    pid = str(sleeper.pid)
    message = files_pb2.File if name == "files.img" else core_pb2.Core
    edit(sleeper.images / name.replace("PID", pid), message, change)
    said = refused(sleeper)
    assert words.replace("PID", pid) in said
    assert len(said.splitlines()) == 1


def test_garbled_images(programs, start, tmp_path):
    """A byte of a small image is another one, or the last ones are gone: refused, or it does not matter."""
    saved = start(programs("plain"), "STATE", "3")
    dump(saved, "lazyd")
    small = sorted(path.name for path in saved.images.glob("*.img") if not path.name.startswith("pages"))
    images = tmp_path / "garbled"
    chance = random.Random(4)
    codes = []
    with Dying("from lazyd import cli\nimport lazyd.restore.build", "return cli.main(words)") as dying:
        for _ in range(20 * STRESS):
            shutil.rmtree(images, ignore_errors=True)
            shutil.copytree(saved.images, images)
            path = images / chance.choice(small)
            text = bytearray(path.read_bytes())
            at = chance.randrange(8, len(text))
            if chance.randrange(4):
                text[at] = chance.randrange(256)
            else:
                del text[at:]
            path.write_bytes(text)
            codes.append(dying.run(10**9, "restore", "-D", images, "--eager")[0])
            if codes[-1] == 1:
                assert state_of(saved.pid) in "XZ"
            harness.reap_group(saved.pid)
    assert set(codes) == {0, 1}


def test_names_that_are_not_utf_8(suite, start):
    code = "import ctypes, os, time; ctypes.CDLL(None).prctl(15, b'\\xff\\xfe', 0, 0, 0); OPEN"
    code += "; os.mknod('STATE/ready'); time.sleep(1000)"
    saved = start(PYTHON_COMMAND, "-c", code.replace("OPEN", "0"))
    dump(saved, suite)
    restore(saved, "--eager")
    assert Path(f"/proc/{saved.pid}/comm").read_bytes() == b"\xff\xfe\n"
    shutil.rmtree(saved.images)
    saved = start(PYTHON_COMMAND, "-c", code.replace("OPEN", "file = open(b'STATE/\\xff', 'w')"))
    dump(saved, suite)
    assert "its path is not UTF-8" in refused(saved)


HEAD = """
from lazyd import cli
import lazyd.restore.build
from lazyd.target import puppet, tracing
puppet.request = tracing.request = counted(tracing.request)
os.pwrite = counted(os.pwrite)
"""


def test_lazyd_is_killed_before_each_of_its_steps(programs, start):
    """Until the task is let go there is none of it left, and in the end it is whole."""
    saved = start(programs("plain"), "STATE", "2")
    dump(saved, "lazyd")
    words = ["restore", "-D", saved.images, "--no-progress", "--eager"]
    limit = 0
    step = max(1, 24 // STRESS)
    with Dying(HEAD, "return cli.main(words)") as dying:
        while (code := dying.run(limit, *words)[0]) == -signal.SIGKILL:
            # Whoever is killed by PTRACE_O_EXITKILL is killed a moment after its tracer.
            harness.wait_until(lambda: state_of(saved.pid) in "XZ", "the end of what was begun")
            with contextlib.suppress(ChildProcessError):
                os.waitpid(saved.pid, 0)
            limit += step
    assert code == 0
    assert limit > 60
    assert verdict(saved) == "ok\n"


# ---- what a user sees ----


def test_standard_streams_are_inherited(start, tmp_path):
    """A pipe is one end of somebody's; a new one takes its place."""
    state = tmp_path / "state"
    state.mkdir()
    program = f"""
import os, time
os.mknod("{state}/ready")
while not os.path.exists("{state}/go"):
    time.sleep(0.01)
print("again", flush=True)
"""
    process = subprocess.Popen(
        [PYTHON_COMMAND, "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        harness.wait_until((state / "ready").exists, "the program")
        saved = harness.Checkpoint("", process.pid, tmp_path / "images", state)
        process.returncode = 0
        dump(saved, "lazyd")
        process.stdout.close()
        reading, writing = os.pipe()
        restore(saved, stdout=writing)
        os.close(writing)
        (state / "go").touch()
        with os.fdopen(reading, "rb") as pipe:
            assert pipe.read() == b"again\n"
    finally:
        harness.reap_group(process.pid)


OF_THREADS = """
import ctypes, os, signal, struct, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def do(result):
    assert result != -1, os.strerror(ctypes.get_errno())
heard = []
signal.signal(signal.SIGUSR2, lambda *_: heard.append(1))
libc.syscall.argtypes = [ctypes.c_long] * 5
def burn(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
def work():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    event = ctypes.create_string_buffer(struct.pack("<Qiii", 0, signal.SIGUSR2, NOTIFY, threading.get_native_id()), 64)
    number = ctypes.c_int()
    do(libc.syscall(222, 3, ctypes.addressof(event), ctypes.addressof(number), 0))
    value = ctypes.create_string_buffer(struct.pack("<4q", 0, 0, 0, 300_000_000), 32)
    do(libc.syscall(223, number.value, 0, ctypes.addressof(value), 0))
    begun.set()
    burns.wait()
    burn(0.6)
begun, burns = threading.Event(), threading.Event()
thread = threading.Thread(target=work)
thread.start()
begun.wait()
os.mknod("STATE/ready")
while not os.path.exists("STATE/go"):
    time.sleep(0.01)
burn(0.6)
early = len(heard)
burns.set()
thread.join()
with open("STATE/result", "w") as file:
    file.write("ok\\n" if (early, len(heard)) == (0, 1) else f"{early} {len(heard)}\\n")
"""


@pytest.mark.parametrize("whose", ["lazyd", "trixie"])
def test_what_each_thread_has(whose, start):
    """A timer on its own processor time, and its personality."""
    text = OF_THREADS.replace("NOTIFY", "4")  # SIGEV_THREAD_ID
    saved = start("/usr/bin/setarch", "-R", PYTHON_COMMAND, "-c", text)
    tids = thread_ids(saved.pid)
    dump(saved, whose)
    restore(saved)
    assert thread_ids(saved.pid) == tids
    assert {Path(f"/proc/{saved.pid}/task/{tid}/personality").read_text() for tid in tids} == {"00040000\n"}
    assert verdict(saved) == "ok\n"


@pytest.mark.parametrize(
    ("notify", "number"),
    [("0", "signal.SIGUSR2"), ("4", "32")],  # SIGEV_SIGNAL; and what libc makes of SIGEV_THREAD
)
def test_a_timer_of_which_no_image_says_on_whose_time_it_runs(notify, number, start):
    text = OF_THREADS.replace("signal.SIGUSR2, NOTIFY", f"{number}, {notify}")
    saved = start(PYTHON_COMMAND, "-c", text)
    words = [LAZYD, "dump", "--pid", str(saved.pid), "-D", str(saved.images)]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "has a timer on the time of one of its threads" in run.stderr
    dump(saved, "trixie")
    assert "timers: one on the time of a thread, and the images do not say of which" in refused(saved)


INHERITABLE = """
import ctypes, os, struct, time
libc = ctypes.CDLL(None, use_errno=True)
everything = int(open("/proc/self/status").read().split("CapPrm:")[1].split()[0], 16)
words = [everything & 0xFFFFFFFF] * 3 + [everything >> 32] * 3
assert libc.capset(struct.pack("<Ii", 0x20080522, 0), struct.pack("<6I", *words)) == 0
assert libc.prctl(24, 3) == 0
os.mknod("STATE/ready")
time.sleep(1000)
"""


def test_what_is_inherited_and_could_not_be_given_again(start):
    """A capability in the inheritable set that the bounding set has lost."""
    saved = start(PYTHON_COMMAND, "-c", INHERITABLE)
    names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    before = [status_fields(saved.pid)[name] for name in names]
    assert int(before[0], 16) & ~int(before[3], 16) == 1 << 3
    dump(saved, "lazyd")
    restore(saved)
    assert [status_fields(saved.pid)[name] for name in names] == before


@pytest.mark.parametrize("unread", [b"", b"something"])
def test_a_pipe_in_stock_s_images(suite, unread, start, tmp_path):
    """Stock writes of each how much is in it: nothing, as a rule."""
    state = tmp_path / "state"
    state.mkdir()
    reading, writing = os.pipe()
    os.write(writing, unread)
    program = f"import os, time; os.mknod('{state}/ready'); time.sleep(1000)"
    null = subprocess.DEVNULL
    command = [PYTHON_COMMAND, "-c", program]
    process = subprocess.Popen(command, stdin=reading, stdout=null, stderr=null, start_new_session=True)
    try:
        harness.wait_until((state / "ready").exists, "the program")
        saved = harness.Checkpoint("", process.pid, tmp_path / "images", state)
        process.returncode = 0
        dump(saved, suite)
        if unread:
            assert "pipes with bytes in them that nobody has read" in refused(saved)
        else:
            restore(saved, stdin=reading)
    finally:
        harness.reap_group(process.pid)
        os.close(reading)
        os.close(writing)


TERMINAL = """
import os, sys, termios, time, tty
tty.setcbreak(0)
os.mknod("STATE/ready")
while not os.path.exists("STATE/go"):
    time.sleep(0.005)
print("quiet" if not termios.tcgetattr(0)[3] & termios.ECHO else "echo", os.isatty(1), flush=True)
print(sys.stdin.readline().upper(), flush=True)
"""


@contextlib.contextmanager
def dumped_from_a_terminal(tmp_path):
    """Dump a program that has set up its terminal; the terminal is gone then."""
    state = tmp_path / "state"
    state.mkdir()
    first, theirs = pty.openpty()
    command = [PYTHON_COMMAND, "-c", TERMINAL.replace("STATE", str(state))]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    try:
        harness.wait_until((state / "ready").exists, "the program")
        saved = harness.Checkpoint("", process.pid, tmp_path / "images", state)
        process.returncode = 0
        dump(saved, "lazyd")
        os.close(first)
        yield saved
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        harness.reap_group(process.pid)


def test_a_terminal_is_handed_on(tmp_path):
    """Another terminal takes its place, with the settings that it had."""
    with dumped_from_a_terminal(tmp_path) as saved:
        assert "terminal: none of lazyd's own standard streams is one" in refused(saved)
        second, theirs = pty.openpty()
        restore(saved, stdin=theirs)
        os.close(theirs)
        (saved.state / "go").touch()
        os.write(second, b"some words\n")
        heard = b""
        while b"SOME WORDS" not in heard:
            heard += os.read(second, 1000)
        assert heard.split() == [b"quiet", b"True", b"SOME", b"WORDS"]
        os.close(second)


IN_THE_BACKGROUND = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
child = os.fork()
if not child:
    os.setpgid(0, 0)
    os.execv(sys.argv[1], sys.argv[1:])
_, status = os.waitpid(child, os.WUNTRACED)
if os.WIFSTOPPED(status):
    os.kill(child, 9)
    os.waitpid(child, 0)
    sys.exit(99)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_terminal_in_whose_background_lazyd_is(tmp_path):
    """To set it up there stops a process, as a rule."""
    with dumped_from_a_terminal(tmp_path) as saved:
        second, theirs = pty.openpty()
        command = [PYTHON_COMMAND, "-c", IN_THE_BACKGROUND, LAZYD]
        restore(saved, "--eager", "--stopped", stdin=theirs, command=command, start_new_session=True)
        assert state_of(saved.pid) == "T"
        os.close(theirs)
        os.close(second)


def test_in_the_background(sleeper, tmp_path):
    reading, writing = os.pipe()
    words = ["--daemon", "--fill", "off", "-W", str(tmp_path), "--pidfile", "lazyd.pid", "-o", "lazyd.log"]
    restore(sleeper, *words, "--status-fd", str(writing), pass_fds=[writing])
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read(1) == b"\0"
    assert state_of(sleeper.pid) in "SR"
    pid = int((tmp_path / "lazyd.pid").read_text())
    assert int(status_fields(sleeper.pid)["PPid"]) not in (pid, 0)
    assert f"restored {sleeper.pid}" in (tmp_path / "lazyd.log").read_text()
    family = [pid, *harness.descendants(pid)]
    # It serves until its task has ended.
    harness.reap_group(sleeper.pid)
    for one in family:
        harness.wait_until(lambda one=one: state_of(one) in "XZ", "the daemon's end")
        with contextlib.suppress(ChildProcessError):
            os.waitpid(one, 0)


def test_the_first_instruction_does_not_wait_for_memory(start, tmp_path):
    """With the fill held back to nothing a task of 200 MiB goes on, and asks for what it needs."""
    (tmp_path / "program.py").write_text(PYTHON)
    saved = start(PYTHON_COMMAND, str(tmp_path / "program.py"), "STATE")
    dump(saved, "lazyd")
    with (tmp_path / "out").open("w") as out:
        command = [LAZYD, "restore", "-D", str(saved.images), "--fill", "off", "--no-progress", "-v4"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        harness.wait_until(lambda: "restored" in (tmp_path / "out").read_text(), "the restore")
        resident = int(status_fields(saved.pid)["VmRSS"].split()[0])
        size = sum(path.stat().st_size for path in saved.images.glob("pages-*.img")) // 1024
        assert resident < size
        assert verdict(saved) == "ok\n"
        assert process.wait(60) == 0, (tmp_path / "out").read_text()
    finally:
        harness.Daemon(process, tmp_path, tmp_path).stop()
