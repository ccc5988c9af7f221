# SPDX-License-Identifier: MIT
"""Rewind a task that changes its memory, mappings, threads and all else in between; it checks itself each time."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kernel_harness import STRESS, wait_until
from process_harness import Dying

import lazyd.daemon
import lazyd.restore.rewind  # noqa: F401  what is forked has it already
from lazyd.target.tracing import state_of, status_fields, thread_ids

SOURCE = Path(__file__).parent.parent / "victims/rewound.c"
PYTHON = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else os.path.realpath(sys.executable)
LAZYD = [sys.executable, "-m", "lazyd"]


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The compiled victim."""
    target = tmp_path_factory.mktemp("rewound") / "rewound"
    words = ["gcc", "-std=gnu11", "-O2", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([*words, "-o", str(target), str(SOURCE)], check=True)
    return target


class Victim:
    """A running rewound, with its checkpoint."""

    def __init__(self, program, folder, argument, before=()):
        self.state, self.images = folder / "state", folder / "images"
        self.state.mkdir()
        null = subprocess.DEVNULL
        command = [str(program), *(before or [str(self.state)]), str(argument)]
        self.process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
        self.pid = self.process.pid
        try:
            wait_until((self.state / "ready").exists, "the victim")
            self.dump()
        except BaseException:
            self.close()
            raise

    def dump(self):
        """Write its checkpoint, over an older one; it goes on."""
        shutil.rmtree(self.images, ignore_errors=True)
        words = ["dump", "--pid", str(self.pid), "-D", str(self.images), "-R"]
        run = subprocess.run([*LAZYD, *words], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr

    def rewind(self, *words):
        """Run lazyd rewind as a fork of this process; (exit code, what it said)."""
        output = self.images.parent / "rewind.out"
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._be_lazyd(output, ["rewind", "-D", str(self.images), "--pid", str(self.pid), "--no-progress", *words])
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status), output.read_text()

    @staticmethod
    def _be_lazyd(output, arguments):
        code = 99
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)  # pytest-timeout's
            out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout = os.fdopen(1, "w")
            sys.stderr = os.fdopen(2, "w")
            for number in (signal.SIGINT, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            from lazyd.cli import main  # noqa: PLC0415  imported already; named here for the fork's sake

            code = main(arguments)
            sys.stderr.flush()
        finally:
            os._exit(code)

    def check(self, said=""):
        """Let it check itself, and then change everything."""
        (self.state / "go").touch()
        wait_until(lambda: (self.state / "result").exists() or self.process.poll() is not None, "its verdict")
        assert (self.state / "result").read_text() == "ok\n", said
        wait_until(lambda: (self.state / "changed").exists() or self.process.poll() is not None, "its changes")
        assert self.process.poll() is None

    def forget(self):
        """Remove what it has written."""
        for name in ("go", "result", "changed", "late"):
            (self.state / name).unlink(missing_ok=True)

    def close(self):
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(program, tmp_path):
    """Start a victim that is gone when the test is over."""
    victims = []

    def start(mib=4):
        victims.append(Victim(program, tmp_path, mib))
        return victims[-1]

    yield start
    for victim in victims:
        victim.close()


def test_again_and_again(start):
    """Ten times in a row; LAZYD_STRESS=100 makes it a thousand."""
    victim = start()
    victim.check()
    tids = None
    for _ in range(10 * STRESS):
        victim.forget()
        code, said = victim.rewind()
        assert code == 0, said
        assert tids in (None, thread_ids(victim.pid))
        tids = thread_ids(victim.pid)
        victim.check(said)


def vdso_of(pid):
    """Where a task's vdso is, and its bytes."""
    (line,) = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if line.endswith("[vdso]")]
    start, end = (int(word, 16) for word in line.split()[0].split("-"))
    with Path(f"/proc/{pid}/mem").open("rb") as memory:
        memory.seek(start)
        return start, memory.read(end - start)


def write_into(pid, address, content):
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(content)


def test_what_a_killed_tracer_has_left_behind_the_vdso(start):
    """It is no part of the vdso; what is one has to be this kernel's."""
    victim = start()
    at, content = vdso_of(victim.pid)
    end = at + len(content.rstrip(b"\0"))
    write_into(victim.pid, end, b"\x0f\x05\xcc")
    victim.dump()
    victim.check()
    victim.forget()
    code, said = victim.rewind()
    assert code == 0, said
    victim.check(said)
    write_into(victim.pid, end - 1, bytes([content[end - 1 - at] ^ 1]))
    victim.dump()
    code, said = victim.rewind()
    assert code == 1
    assert "its vdso is not this one's" in said


def test_while_its_old_memory_is_freed(start):
    """It goes on at once, and its memory is whole while lazyd fills and frees."""
    victim = start(64)
    victim.check()
    for _ in range(3 * min(STRESS, 30)):
        victim.forget()
        (victim.state / "late").touch()
        (victim.state / "go").touch()
        code, said = victim.rewind()
        assert code == 0, said
        victim.check()
    victim.forget()
    assert victim.rewind()[0] == 0
    victim.check()  # nothing of what was moved aside is left
    assert int(status_fields(victim.pid)["VmSize"].split()[0]) < 64 * 1024 * 3


@pytest.mark.parametrize("then", ["ran", "stopped"])
@pytest.mark.parametrize("now", ["runs", "stopped"])
def test_it_runs_or_is_stopped_as_it_was(start, then, now):
    victim = start()
    if then == "stopped":
        os.kill(victim.pid, signal.SIGSTOP)
        wait_until(lambda: state_of(victim.pid) == "T", "the stop")
        victim.dump()
        os.kill(victim.pid, signal.SIGCONT)
    victim.check()
    victim.forget()
    if now == "stopped":
        os.kill(victim.pid, signal.SIGSTOP)
        wait_until(lambda: all(state_of(tid) == "T" for tid in thread_ids(victim.pid)), "the stop")
    code, said = victim.rewind()
    assert code == 0, said
    assert (state_of(victim.pid) == "T") is (then == "stopped")
    os.kill(victim.pid, signal.SIGCONT)
    victim.check()


def test_the_limits_of_lazyd_are_not_its(start):
    """What is made has no more than lazyd has; what is there keeps its own."""
    victim = start()
    victim.check()
    victim.forget()
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    assert hard
    words = ["rewind", "-D", victim.images, "--pid", str(victim.pid), "--no-progress"]
    limited = ["prlimit", "--core=0:0", *LAZYD, *words]
    run = subprocess.run(limited, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert resource.prlimit(victim.pid, resource.RLIMIT_CORE) == (soft, hard)
    victim.check()


PROGRAM = """
import array, hashlib, os, threading, time
words = array.array("Q", range(400_000))
table = {f"key {number}": str(number) * 3 for number in range(20_000)}
def digest():
    found = hashlib.sha256(words)
    for key, value in table.items():
        found.update((key + value).encode())
    return found.hexdigest()
def work():
    while True:
        count[0] += 1
        time.sleep(0.001)
count = [0]
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
before = digest()
def say(name, text):
    with open("STATE/unfinished", "w") as file:
        file.write(text)
    os.rename("STATE/unfinished", "STATE/" + name)
say("ready", "")
while not os.path.exists("STATE/go"):
    time.sleep(0.001)
then = count[0]
while count[0] < then + 10:
    time.sleep(0.001)
right = digest() == before and threading.active_count() == 4 and len(os.listdir("/proc/self/task")) == 4
say("result", "ok\\n" if right else "wrong\\n")
for number in range(0, len(words), 7):
    words[number] = 0
words.extend(range(100_000))
table.clear()
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
say("changed", "")
while True:
    table[str(time.time())] = [None] * 1000
    time.sleep(0.001)
"""


def test_a_real_program(start_script):
    victim = start_script(PROGRAM)
    victim.check()
    for _ in range(4 * STRESS):
        victim.forget()
        code, said = victim.rewind()
        assert code == 0, said
        victim.check()


# ---- lazyd is killed ----

HEAD = """
from lazyd import cli
import lazyd.restore.rewind
from lazyd.target import puppet, remote, tracing
puppet.request = remote.request = tracing.request = counted(tracing.request)
os.pwrite = counted(os.pwrite)
"""


def test_lazyd_is_killed_in_the_middle(program, tmp_path):
    """The task goes on as it was, or it is dead: what lives can be rewound, and is right then."""
    lived = died = number = 0
    step = max(1, 60 // STRESS)
    victim = None
    dying = Dying(HEAD, "return cli.main(words)")
    try:
        while True:
            if victim is None:
                folder = tmp_path / str(number)
                folder.mkdir()
                victim = Victim(program, folder, 3)
                victim.check()
            victim.forget()
            words = ["rewind", "-D", str(victim.images), "--pid", str(victim.pid), "--no-progress"]
            code, _ = dying.run(number * step, *words)
            number += 1
            if code == 0:
                break
            assert code == -signal.SIGKILL
            # Whoever is killed by PTRACE_O_EXITKILL is killed a moment after its tracer.
            wait_until(
                lambda victim=victim: (
                    victim.process.poll() is not None or status_fields(victim.pid).get("TracerPid", "0") == "0"
                ),
                "the end of being traced",
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                victim.process.wait(0.1)
            if victim.process.poll() is None:
                lived += 1
                # Killed late, it had been let go already, and others serve it to the end.
                smaps = Path(f"/proc/{victim.pid}/smaps")
                wait_until(lambda smaps=smaps: " um" not in smaps.read_text(), "the end of being served")
                while True:
                    code, said = victim.rewind()
                    if code == 0:
                        break
                    # A system call that the one that was killed had begun ends by itself, within a second or so.
                    assert "is not done with what a lazyd that was killed left it; try again" in said
                victim.check()
            else:
                died += 1
                victim = None
        victim.check()
    finally:
        dying.close()
        if victim is not None:
            victim.close()
    assert lived
    assert died


# ---- what is refused: it goes on ----


def refused(victim):
    """Rewind in vain; the one line that says why."""
    code, said = victim.rewind()
    assert code == 1, said
    assert len(said.splitlines()) == 1, said
    assert victim.process.poll() is None
    assert status_fields(victim.pid)["TracerPid"] == "0"
    return said


def test_another_process(start):
    victim = start()
    pid, victim.pid = victim.pid, os.getpid()
    assert f"images of task {pid}, not of {victim.pid}" in refused(victim)
    victim.pid = pid
    victim.check()


SCRIPT = """
import os, sys, time
os.mknod("STATE/ready")
while not os.path.exists("STATE/open"):
    time.sleep(0.005)
file = open("/dev/null")
child = os.fork()
if not child:
    time.sleep(1000)
os.mknod("STATE/child")
while not os.path.exists("STATE/end"):
    time.sleep(0.005)
os.kill(child, 9)
os.waitpid(child, 0)
os.mknod("STATE/ended")
while True:
    time.sleep(0.005)
"""


def test_images_of_shared_memory_that_are_garbled(start):
    """What it would take to notice that too late is the task."""
    victim = start()
    victim.check()
    for path in victim.images.glob("pagemap-shmem-*.img"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert f"{path}, offset " in refused(victim)
        path.write_bytes(whole)
    victim.forget()
    assert victim.rewind()[0] == 0
    victim.check()


def test_children_descriptors_and_another_program(start_script):
    victim = start_script(SCRIPT)
    (victim.state / "open").touch()
    wait_until((victim.state / "child").exists, "its child")
    assert "has children, which would stay" in refused(victim)
    (victim.state / "end").touch()
    wait_until((victim.state / "ended").exists, "its child's end")
    said = refused(victim)
    assert f"process {victim.pid} has other descriptors than when it was dumped: 3 is new (/dev/null)" in said


@pytest.fixture
def start_script(tmp_path):
    """Start a script that is gone when the test is over."""
    victims = []

    def start(text):
        text = text.replace("STATE", str(tmp_path / "state"))
        victims.append(Victim(PYTHON, tmp_path, text, before=["-c"]))
        return victims[-1]

    yield start
    for victim in victims:
        victim.close()


def test_while_somebody_reads_its_command_line(start):
    """As ps does: the page that is read comes into being, full of zeros, wherever it is looked for too early."""
    victim = start()
    victim.check()
    with reading(victim.pid):
        for _ in range(3 * STRESS):
            victim.forget()
            code, said = victim.rewind()
            assert code == 0, said
            victim.check(said)


@contextlib.contextmanager
def reading(pid):
    """Read a process's command line and environment without end."""
    code = f"while True:\n for name in ('cmdline', 'environ'): open('/proc/{pid}/' + name, 'rb').read()"
    with subprocess.Popen([sys.executable, "-c", code]) as reader:
        try:
            yield
        finally:
            reader.kill()


RESERVING = """
import mmap, pathlib, time
reserved = mmap.mmap(-1, 1 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
for at in range(0, len(reserved), 1 << 35):
    reserved[at] = 1
pathlib.Path("STATE/ready").touch()
while True:
    time.sleep(0.01)
"""


def test_reserved_memory_is_freed_at_once(start_script):
    """A slice for each 16 MiB of a TiB would be 65,536 stops, minutes of them."""
    victim = start_script(RESERVING)
    for _ in range(2):
        began = time.monotonic()
        code, said = victim.rewind()
        assert code == 0, said
        assert time.monotonic() - began < 60
    assert victim.process.poll() is None


CHANGING = """
import ctypes, fcntl, os, resource, signal, threading
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
def do(result):
    assert result not in (-1, None), os.strerror(ctypes.get_errno())
def vdso():
    line = next(line for line in open("/proc/self/maps") if "[vdso]" in line)
    start, end = (int(word, 16) for word in line.split()[0].split("-"))
    return start, end - start
vdso = vdso()
file = open("STATE/file", "w")
other = open("STATE/other", "w+")
memory = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
os.ftruncate(memory, 8192)
do(libc.mmap(ctypes.c_void_p(0x200000000000), 8192, 1, 0x100001, memory, 0))
if SEALED:
    fcntl.fcntl(memory, 1033, 16)
os.close(memory)
goes = threading.Event()
def dispatch():
    # The selector says that every call is handed to the program: there is none to be, so it makes none any more.
    selector = ctypes.create_string_buffer(b"\\0")
    do(libc.prctl(59, 1, 0, 0, selector))
    selector.raw = b"\\1"
    while True:
        pass
def work():
    OF_THREAD
    begun.set()
    while not goes.wait(0.005):
        if os.path.exists("STATE/thread"):
            os.rename("STATE/thread", "STATE/changed")
            IN_THREAD
def end_threads():
    goes.set()
    for thread in threads:
        thread.join()
begun = threading.Event()
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
begun.wait()
os.mknod("STATE/ready")
signal.sigwait([signal.SIGUSR1])
CHANGE
os.mknod("STATE/changed")
while True:
    signal.pause()
"""
LASTING = {
    "uts": ("do(libc.unshare(0x04000000))", "it has others than lazyd: uts"),
    "pid": ("do(libc.unshare(0x20000000))", "it has others than lazyd: pid_for_children"),
    "root": ("os.mkdir('STATE/a'); os.mknod('STATE/changed'); os.chroot('STATE/a'); signal.pause()", "by chroot"),
    "lock": ("fcntl.flock(file, fcntl.LOCK_EX)", "/file): a file lock"),
    "owner": ("fcntl.fcntl(file, fcntl.F_SETOWN, os.getpid())", "signals about it go to an owner"),
    "securebits": ("do(libc.prctl(28, 0x2f))", "are 0x2f (prctl)"),
    "keepcaps": ("do(libc.prctl(8, 1))", "are 0x10 (prctl)"),
    "dispatch": ("end_threads(); os.mknod('STATE/changed'); dispatch()", "handles its own system calls"),
    "counter": ("os.mknod('STATE/changed'); do(libc.prctl(26, 2)); signal.pause()", "may not read the time stamp"),
    "denies": ("do(libc.prctl(65, 1, 0, 0, 0))", "may not have memory that it writes and runs"),
    "vdso": (
        "end_threads(); os.mknod('STATE/changed'); do(libc.munmap(*vdso)); signal.pause()",
        "has unmapped or moved some of its vdso",
    ),
    "program": ("os.mknod('STATE/changed'); os.execv('/bin/sleep', ['sleep', '99'])", "runs another program than"),
}


def changed(start_script, change, of_thread="pass", *, in_thread="pass", sealed=False):
    """Run the script, and have it change; it goes on."""
    text = CHANGING.replace("OF_THREAD", of_thread).replace("IN_THREAD", in_thread)
    text = text.replace("CHANGE", change).replace("SEALED", str(sealed))
    victim = start_script(text)
    os.kill(victim.pid, signal.SIGUSR1)
    wait_until((victim.state / "changed").exists, "its change")
    time.sleep(0.05)
    return victim


@pytest.mark.parametrize("what", LASTING)
def test_what_nobody_can_take_back_is_refused(start_script, what):
    change, said = LASTING[what]
    assert said in refused(changed(start_script, change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("do(libc.unshare(0x40000000))", "has a namespace (net) of its own"),
        ("do(libc.prctl(28, 0x2f))", "are 0x2f (prctl)"),
    ],
)
def test_what_another_thread_has_done_to_itself_is_refused(start_script, change, said):
    victim = changed(start_script, "pass", in_thread=change)
    (victim.state / "changed").unlink()
    (victim.state / "thread").touch()
    wait_until((victim.state / "changed").exists, "its change")
    time.sleep(0.05)
    assert said in refused(victim)


def test_a_soft_limit_of_memory_leaves_no_room_for_twice_as_much(start_script):
    """It can map again what it could map before, at once."""
    text = CHANGING.replace("OF_THREAD", "pass").replace("IN_THREAD", "pass").replace("SEALED", "False")
    room = "do(libc.munmap(libc.mmap(None, 48 << 20, 3, 0x22, -1, 0), 48 << 20))"
    big = "big = bytearray(300 << 20); big[::4096] = bytes(len(big[::4096]))"
    limit = "used = int(open('/proc/self/statm').read().split()[0]) * 4096; " + (
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))"
    )
    text = text.replace('os.mknod("STATE/ready")', f'{big}\n{limit}\nos.mknod("STATE/ready")')
    text = text.replace("CHANGE", f"big[5] = 7; {room}")
    victim = start_script(text)
    for _ in range(2):
        os.kill(victim.pid, signal.SIGUSR1)
        wait_until((victim.state / "changed").exists, "its change")
        (victim.state / "changed").unlink()
        code, said = victim.rewind()
        assert code == 0, said
        assert "keeps up to" not in said
    os.kill(victim.pid, signal.SIGUSR1)
    wait_until((victim.state / "changed").exists, "its change")


def test_memory_that_is_sealed(start_script):
    assert "is sealed (F_ADD_SEALS)" in refused(changed(start_script, "pass", sealed=True))


def test_a_thread_that_had_less_rights_is_not_made_by_who_has_more(start_script):
    gives_up = "do(libc.syscall(117, 65534, 65534, 65534))"
    victim = changed(start_script, "end_threads()", gives_up)
    assert "is gone, and had other credentials than the main thread has" in refused(victim)


PUT_BACK = {
    "files": "other.write('more'); other.flush()",
    "personality": "do(libc.personality(0x0400000)); do(libc.mmap(None, 8192, 1, 0x22, -1, 0))",
    "limits": "[resource.setrlimit(n, (0, resource.getrlimit(n)[1])) for n in (resource.RLIMIT_DATA, 11)]",
}


@pytest.mark.parametrize("what", PUT_BACK)
def test_what_would_be_in_the_way_is_put_back(start_script, what):
    victim = changed(start_script, "end_threads(); " + PUT_BACK[what])
    (victim.state / "changed").unlink()
    code, said = victim.rewind()
    assert code == 0, said
    assert "rwxp" not in Path(f"/proc/{victim.pid}/maps").read_text()
    tids = thread_ids(victim.pid)
    assert len(tids) == 3
    assert {Path(f"/proc/{victim.pid}/task/{tid}/personality").read_text() for tid in tids} == {"00000000\n"}
    assert resource.prlimit(victim.pid, resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
    os.kill(victim.pid, signal.SIGUSR1)
    wait_until((victim.state / "changed").exists, "the same change")
