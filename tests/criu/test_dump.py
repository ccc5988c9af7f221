# SPDX-License-Identifier: MIT
"""Programs that lazyd dumped, restored by a real CRIU: eagerly, and lazily with lazyd as the daemon.

The programs check themselves; tests/victims/plain.c compares all it can find out about itself with what it was. The
small images are compared, field by field, with what criu itself writes of the same task.
"""

# ruff: noqa: PLR0917  pytest passes fixtures by name

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import harness
import pytest
from test_dump_like_criu import HEADERS, free_port, page_server

from lazyd.target.tracing import state_of

LAZYD = str(Path(sys.executable).parent / "lazyd")


@pytest.fixture
def running():
    """Process groups that are ended when the test is over."""
    pids = []
    yield pids
    for pid in pids:
        harness.reap_group(pid)


def lazyd(*words, check=True):
    """Run lazyd; raise with what it said if it fails."""
    run = subprocess.run([LAZYD, *map(str, words)], capture_output=True, text=True, check=False, timeout=60)
    if check and run.returncode:
        raise AssertionError(f"lazyd {words[0]} failed ({run.returncode}): {run.stderr}")
    return run


def start_plain(programs, start, *words):
    """Start the plain task."""
    saved = start(programs("plain"), "STATE", *map(str, words))
    return saved.pid, saved.state


def wait_gone(pid):
    """Reap a child that was killed, so that its pid is free."""
    os.waitpid(pid, 0)


def restore(saved, how, work):
    """Restore eagerly or lazily; return the program's verdict."""
    if how == "eager":
        return harness.eager_restore(saved, work)
    outcome = harness.lazy_restore(saved, work)
    assert outcome.daemon_exit == 0, outcome.details
    return outcome.verdict


HOW = pytest.mark.parametrize("how", ["eager", "lazy"])


@HOW
@pytest.mark.parametrize("words", [(0,), (1,), (7,), (50,), (7, "user")], ids=str)
def test_a_plain_task_comes_back(suite, how, words, programs, start, tmp_path):
    pid, state = start_plain(programs, start, *words)
    images = tmp_path / "images"
    lazyd("dump", "--pid", pid, "-D", images)
    wait_gone(pid)
    assert lazyd("verify", images).stdout.endswith("good\n")
    assert restore(harness.Checkpoint(suite, pid, images, state), how, tmp_path / "work") == "ok\n"


EARLY = """
import sys
from lazyd.dump import memory
memory.EARLY_BYTES = memory.EARLY_BYTES_A_THREAD = 0
from lazyd import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@HOW
def test_what_was_copied_while_the_task_ran_comes_back(suite, how, programs, start, tmp_path):
    pid, state = start_plain(programs, start, 7)
    images = tmp_path / "images"
    words = [sys.executable, "-c", EARLY, "dump", "--pid", str(pid), "-D", str(images)]
    run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "of them while it ran" in run.stderr
    wait_gone(pid)
    assert lazyd("verify", images).stdout.endswith("good\n")
    assert restore(harness.Checkpoint(suite, pid, images, state), how, tmp_path / "work") == "ok\n"


@HOW
def test_a_chain_of_pre_dumps_comes_back(suite, how, programs, start, tmp_path):
    pid, state = start_plain(programs, start, 3)
    parent = []
    for level in range(4):
        images = tmp_path / f"images{level}"
        lazyd("dump" if level == 3 else "pre-dump", "--pid", pid, "-D", images, *parent)
        parent = ["--parent", images]
    wait_gone(pid)
    assert lazyd("verify", images).stdout.endswith("good\n")
    assert restore(harness.Checkpoint(suite, pid, images, state), how, tmp_path / "work") == "ok\n"


# ---- what is written, beside what criu writes of the same task ----


def crit(suite, path):
    """Decode an image with the real crit, for people."""
    return harness.crit(suite, path, "show")


def test_crit_decodes_every_image(suite, programs, start, tmp_path):
    pid, _ = start_plain(programs, start, 2)
    lazyd("pre-dump", "--pid", pid, "-D", tmp_path / "a", "-R")
    lazyd("dump", "--pid", pid, "-D", tmp_path / "b", "--parent", tmp_path / "a", "-R")
    for images in (tmp_path / "a", tmp_path / "b"):
        names = [path.name for path in images.iterdir() if path.name not in ("parent",)]
        assert {"inventory.img", "pstree.img", "files.img", "stats-dump", f"mm-{pid}.img"} <= set(names)
        for name in names:
            if not name.startswith("pages-"):
                assert crit(suite, images / name), name


# What differs from criu's, and why. Paths of keys; a list is any of its items.
DIFFERENCES = {
    "core": {
        # criu takes these hexadecimal digits for a decimal number, and restores neither
        ("tc", "personality"),
        # parts of processors that criu names even where there is nothing in them
        ("thread_info", "fpregs", "xsave", "cet"),
        # time passes between the two dumps
        *((("tc", "timers", name, key)) for name in ("real", "virt", "prof") for key in ("vsec", "vusec")),
        ("tc", "timers", "posix", "vsec"),
        ("tc", "timers", "posix", "vnsec"),
    },
    "inventory": {
        # of that run of criu, and of its options about the network, which a plain task has not
        ("dump_criu_run_id",),
        ("network_lock_method",),
        ("plugins_entry",),
        ("allow_uprobes",),
        # ours: so that the next dump can tell another process of the same pid
        ("dump_uptime",),
    },
}


def flatten(value, ignored, path=()):
    """Yield (path, value) of all leaves that are not ignored; list items keep their order."""
    if path and tuple(key for key in path if isinstance(key, str)) in ignored:
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, ignored, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from flatten(inner, ignored, (*path, index))
    else:
        yield path, value


def named_files(suite, images):
    """The open files by their number, without the number."""
    found = {}
    for entry in crit(suite, images / "files.img"):
        kind = entry["type"].lower()
        record = {key: value for key, value in entry[kind].items() if key not in ("id", "regf_id")}
        found[entry["id"]] = (kind, json.dumps(record, sort_keys=True))
    return found


def view(suite, images, pid):
    """All of the small images, with files in place of their numbers."""
    files = named_files(suite, images)
    seen = {}
    for path in sorted(images.glob("core-*.img")):
        seen[path.name] = list(flatten(crit(suite, path), DIFFERENCES["core"]))
    seen["inventory"] = list(flatten(crit(suite, images / "inventory.img"), DIFFERENCES["inventory"]))
    for name in (f"ids-{pid}.img", "pstree.img"):
        seen[name] = list(flatten(crit(suite, images / name), ()))
    (place,) = crit(suite, images / f"fs-{pid}.img")
    seen["fs"] = files[place["cwd_id"]], files[place["root_id"]], place["umask"]
    descriptors = crit(suite, images / "fdinfo-2.img")
    seen["fdinfo"] = [{**entry, "id": files[entry["id"]]} for entry in descriptors]
    # Two descriptors share one open file in both or in none.
    seen["sharing"] = [[other["fd"] for other in descriptors if other["id"] == one["id"]] for one in descriptors]
    (mm,) = crit(suite, images / f"mm-{pid}.img")
    mm["exe_file_id"] = files[mm["exe_file_id"]]
    for vma in mm["vmas"]:
        if "VMA_FILE" in vma["status"]:
            vma["shmid"] = files[vma["shmid"]]
        if "MEMFD" in vma["status"] or "VMA_ANON_SHARED" in vma["status"]:
            # criu takes the kernel's object behind shared memory for a memfd here; we call it what it is
            vma.pop("fdflags", None)
            vma.update(status="shared memory", flags="", shmid=0)
    seen["mm"] = list(flatten(mm, ()))
    return seen


def test_small_images_are_those_that_criu_writes(suite, programs, start, tmp_path):
    """The task is stopped by SIGSTOP, so that both see the same registers."""
    pid, _ = start_plain(programs, start, 3)
    os.kill(pid, signal.SIGSTOP)
    harness.wait_until(lambda: state_of(pid) == "T", "the stop")
    theirs, ours = tmp_path / "criu", tmp_path / "lazyd"
    theirs.mkdir()
    words = [harness.criu_command(suite), "dump", "-t", str(pid), "-D", str(theirs), "--shell-job", "-R", "-o", "log"]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    lazyd("dump", "--pid", pid, "-D", ours, "--leave-running")
    assert state_of(pid) == "T"
    expected, found = view(suite, theirs, pid), view(suite, ours, pid)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == values, name
    pagemap = f"pagemap-{pid}.img"
    assert {entry["vaddr"] for entry in crit(suite, ours / pagemap)[1:]}


# ---- real programs ----

PYTHON = """
import hashlib, os, random, sys, threading, time
state = sys.argv[1]
log = open(state + "/log", "a+b", buffering=0)
blobs = [random.Random(number).randbytes(1 << 20) for number in range(24)]
counts, wrong = [0] * 8, []
def work(number):
    expected = hashlib.sha256(blobs[number]).digest()
    while not os.path.exists(state + "/go"):
        counts[number] += 1
        time.sleep(0.001 * number)
    for _ in range(3):
        if hashlib.sha256(blobs[number]).digest() != expected:
            wrong.append(number)
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
log.write(b"before\\n")
while not all(counts):
    time.sleep(0.01)
os.mknod(state + "/ready")
for thread in threads:
    thread.join()
log.write(b"after\\n")
log.seek(0)
words = [random.Random(number).randbytes(1 << 20) for number in range(24)] == blobs and not wrong
said = "ok" if words and log.read() == b"before\\nafter\\n" else "wrong"
open(state + "/said", "w").write(said + "\\n")
os.rename(state + "/said", state + "/result")
"""
SHELL = """
exec 3>>"$1/log"; echo before >&3
i=0; text=; while [ $i -lt 2000 ]; do text="$text$i,"; i=$((i + 1)); done
trap 'caught=yes' USR1
: >"$1/ready"
while [ ! -e "$1/go" ]; do n=$((n + 1)); done
kill -USR1 $$
echo after >&3
i=0; again=; while [ $i -lt 2000 ]; do again="$again$i,"; i=$((i + 1)); done
said=wrong
[ "$text" = "$again" ] && [ "$caught" = yes ] && [ "$(cat "$1/log")" = "$(printf 'before\\nafter')" ] && said=ok
echo $said >"$1/said"; mv "$1/said" "$1/result"
"""
PERL = """
use strict; my $state = shift; my %h = map { $_ => "x" x $_ } 1..2000; my $caught = 0; $SIG{ALRM} = sub { $caught++ };
open(my $log, "+>>", "$state/log"); syswrite($log, "before\\n");
open(my $ready, ">", "$state/ready"); close $ready;
until (-e "$state/go") { select(undef, undef, undef, 0.002) }
kill ALRM => $$; syswrite($log, "after\\n"); seek($log, 0, 0); my $text = join "", <$log>;
my $good = !grep { length $h{$_} != $_ } keys %h;
open(my $said, ">", "$state/said");
$good &&= $caught && $text eq "before\\nafter\\n"; print $said ($good ? "ok\\n" : "wrong\\n");
close $said; rename("$state/said", "$state/result");
"""
PROGRAMS = {
    "python": [sys.executable, "-c", PYTHON],
    "dash": ["dash", "-c", SHELL, "dash"],
    "bash": ["bash", "-c", SHELL, "bash"],
    "perl": ["perl", "-e", PERL],
}


@HOW
@pytest.mark.parametrize("program", PROGRAMS)
def test_real_programs_come_back(suite, how, program, running, tmp_path):
    words = PROGRAMS[program]
    if shutil.which(words[0]) is None:
        pytest.skip(f"no {program} here")
    state = tmp_path / "state"
    pid = harness.start_program([*words, str(state)], state)
    running.append(pid)
    images = tmp_path / "images"
    lazyd("dump", "--pid", pid, "-D", images)
    wait_gone(pid)
    assert restore(harness.Checkpoint(suite, pid, images, state), how, tmp_path / "work") == "ok\n"


FAMILY = """
for n in 1 2; do mkdir -m 777 "$1/$n"; "$2" "$1/$n" 2 & done
while [ ! -e "$1/1/ready" ] || [ ! -e "$1/2/ready" ]; do sleep 0.01; done
: >"$1/ready"
while [ ! -e "$1/go" ]; do n=$((n + 1)); done
: >"$1/1/go"; : >"$1/2/go"
wait
cat "$1/1/result" "$1/2/result" | tr '\\n' ' ' >"$1/said"; echo >>"$1/said"; mv "$1/said" "$1/result"
"""


@HOW
def test_a_family_comes_back(suite, how, programs, running, tmp_path):
    state, images = tmp_path / "state", tmp_path / "images"
    pid = harness.start_program(["dash", "-c", FAMILY, "dash", str(state), programs("plain")], state)
    running.append(pid)
    family = harness.descendants(pid)
    assert len(family) == 2
    refused = lazyd("dump", "--pid", pid, "-D", images, check=False)
    assert refused.returncode == 1
    assert "--tree dumps them too" in refused.stderr
    lazyd("dump", "--tree", "--pid", pid, "-D", images)
    harness.reap_group(pid)
    assert lazyd("verify", images).stdout.endswith("good\n")
    assert restore(harness.Checkpoint(suite, pid, images, state), how, tmp_path / "work") == "ok ok \n"


def test_a_stopped_task_comes_back_stopped(suite, running, tmp_path):
    state = tmp_path / "state"
    pid = harness.start_program([*PROGRAMS["python"], str(state)], state)
    running.append(pid)
    os.kill(pid, signal.SIGSTOP)
    harness.wait_until(lambda: state_of(pid) == "T", "the stop")
    images, work = tmp_path / "images", tmp_path / "work"
    lazyd("dump", "--pid", pid, "-D", images)
    wait_gone(pid)
    work.mkdir()
    harness.criu_restore(suite, images, work, ())
    harness.wait_until(lambda: state_of(pid) == "T", "the stop")
    (state / "go").touch()
    os.kill(pid, signal.SIGCONT)
    harness.wait_until((state / "result").exists, "the verdict")
    assert (state / "result").read_text() == "ok\n"


TERMINAL = """
import os, sys, termios, time
state = sys.argv[1]
settings = termios.tcgetattr(0)
settings[3] &= ~termios.ECHO
termios.tcsetattr(0, termios.TCSANOW, settings)
print("before", flush=True)
open(state + "/ready", "w").close()
while not os.path.exists(state + "/go"):
    time.sleep(0.002)
print("after", os.ttyname(1) == os.ttyname(2), flush=True)
open(state + "/said", "w").write("ok\\n")
os.rename(state + "/said", state + "/result")
"""


def test_a_program_on_a_terminal_comes_back_on_another(suite, running, tmp_path):
    """As a shell's job: `criu restore --shell-job` gives it the terminal that it has itself."""
    state, images, work = tmp_path / "state", tmp_path / "images", tmp_path / "work"
    state.mkdir()
    work.mkdir()

    def on_terminal(words):
        pid, terminal = os.forkpty()
        if not pid:
            os.closerange(3, 256)
            os.chdir("/")
            os.execv(words[0], words)
        return pid, terminal

    def read_until(terminal, word):
        said = b""
        while word not in said:
            said += os.read(terminal, 1000)
        return said

    pid, terminal = on_terminal([sys.executable, "-c", TERMINAL, str(state)])
    running.append(pid)
    harness.wait_until((state / "ready").exists, "the program")
    read_until(terminal, b"before")
    lazyd("dump", "--pid", pid, "-D", images)
    wait_gone(pid)
    os.close(terminal)
    words = [harness.criu_command(suite), "restore", "-D", str(images), "-W", str(work), "--shell-job"]
    restorer, terminal = on_terminal([*words, "-o", "restore.log", "-v1"])
    running.append(restorer)
    (state / "go").touch()
    try:
        harness.wait_until((state / "result").exists, "the verdict", 20)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{harness.tail(work / 'restore.log')}") from None
    assert b"after True" in read_until(terminal, b"after True")
    os.waitpid(restorer, 0)
    os.close(terminal)


BROTHERS = """
exec 3>"$1/shared"
printf zero, >&3
(while [ ! -e "$1/go" ]; do n=$((n + 1)); done; printf one, >&3; : >"$1/one") &
: >"$1/ready"
while [ ! -e "$1/one" ]; do n=$((n + 1)); done
printf two >&3
wait
mv "$1/shared" "$1/result"; echo >>"$1/result"
"""


def test_an_open_file_that_two_tasks_share_stays_one(suite, running, tmp_path):
    """It has one position: what one writes comes behind what the other has written."""
    state, images = tmp_path / "state", tmp_path / "images"
    pid = harness.start_program(["dash", "-c", BROTHERS, "dash", str(state)], state)
    running.append(pid)
    lazyd("dump", "--tree", "--pid", pid, "-D", images)
    harness.reap_group(pid)
    assert restore(harness.Checkpoint(suite, pid, images, state), "eager", tmp_path / "work") == "zero,one,two\n"


INHERITED = """
echo before
: >"$1/ready"
while [ ! -e "$1/go" ]; do n=$((n + 1)); done
read -r line
echo "after $line"
echo ok >"$1/said"; mv "$1/said" "$1/result"
"""


def test_standard_streams_that_are_pipes_are_inherited(suite, running, tmp_path):
    """The other ends are ours; `criu restore --inherit-fd` gives the restored task new ones."""
    state, images, work = tmp_path / "state", tmp_path / "images", tmp_path / "work"
    state.mkdir()
    work.mkdir()
    pipe = subprocess.PIPE
    words = ["dash", "-c", INHERITED, "dash", str(state)]
    process = subprocess.Popen(
        words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/"
    )
    running.append(process.pid)
    harness.wait_until((state / "ready").exists, "the program")
    assert process.stdout.readline() == b"before\n"
    inodes = [os.fstat(end.fileno()).st_ino for end in (process.stdin, process.stdout)]
    lazyd("dump", "--pid", process.pid, "-D", images)
    process.wait()
    (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
    words = [harness.criu_command(suite), "restore", "-D", str(images), "-W", str(work), "--shell-job", "-d"]
    for fd, inode in ((read_in, inodes[0]), (write_out, inodes[1])):
        words += ["--inherit-fd", f"fd[{fd}]:pipe:[{inode}]"]
    null = subprocess.DEVNULL
    run = subprocess.run(
        [*words, "-o", "restore.log", "-v1"],
        stdin=null,
        stdout=null,
        stderr=null,
        pass_fds=(read_in, write_out),
        check=False,
    )
    assert run.returncode == 0, harness.tail(work / "restore.log")
    os.close(read_in)
    os.close(write_out)
    (state / "go").touch()
    os.write(write_in, b"line\n")
    assert os.read(read_out, 100) == b"after line\n"
    harness.wait_until((state / "result").exists, "the verdict")
    os.close(write_in)
    os.close(read_out)


def test_pipes_that_are_no_inherited_streams_are_refused(running, tmp_path):
    state, images = tmp_path / "state", tmp_path / "images"
    state.mkdir()
    script = ': >"$1/ready"; { while :; do n=1; done; } | { while :; do n=1; done; }'
    pid = harness.start_program(["dash", "-c", script, "dash", str(state)], state)
    running.append(pid)
    harness.wait_until(lambda: len(harness.descendants(pid)) == 2, "the pipeline")
    assert "both ends" in lazyd("dump", "--tree", "--pid", pid, "-D", images, check=False).stderr
    process = subprocess.Popen(["sleep", "1000"], stdin=subprocess.PIPE, start_new_session=True, cwd="/")
    running.append(process.pid)
    process.stdin.write(b"unread")
    process.stdin.flush()
    process.returncode = 0
    said = lazyd("dump", "--pid", process.pid, "-D", images, check=False).stderr
    assert "6 bytes in it that nobody has read" in said
    assert not images.exists()


GUARDED = r"""
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	char path[1200];
	if (argc != 2 || chdir(argv[1]))
		return 2;
	for (int fd = 3; fd < 256; fd++)
		close(fd);
	char *memory = mmap(NULL, 16 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memset(memory, 7, 16 * 4096);
	if (madvise(memory + 2 * 4096, 3 * 4096, 102 /* MADV_GUARD_INSTALL */))
		return 77;
	mknod("ready", S_IFREG | 0644, 0);
	while (access("go", F_OK))
		usleep(2000);
	int good = 1;
	for (int page = 0; page < 16; page++) {
		int status;
		if (!fork())
			_exit(*(volatile char *)(memory + page * 4096));
		wait(&status);
		good &= page < 2 || page > 4 ? WIFEXITED(status) && WEXITSTATUS(status) == 7 : WIFSIGNALED(status);
	}
	snprintf(path, sizeof(path), "echo %s >said && mv said result", good ? "ok" : "wrong");
	return system(path);
}
"""


@pytest.mark.parametrize("suite", ["sid"], indirect=True)  # criu 4.1.1 knows no guard pages
@HOW
def test_guard_pages_come_back(suite, how, running, tmp_path):
    source = tmp_path / "guarded.c"
    source.write_text(GUARDED.replace("<stdio.h>", "<stdio.h>\n#include <stdlib.h>"))
    program = harness.compile_c(source, tmp_path / "guarded")
    state, images = tmp_path / "state", tmp_path / "images"
    try:
        pid = harness.start_program([str(program), str(state)], state)
    except AssertionError:
        pytest.skip("no MADV_GUARD_INSTALL here: Linux 6.13")
    running.append(pid)
    assert "only criu 4.2 or later" in lazyd("dump", "--pid", pid, "-D", images).stderr
    wait_gone(pid)
    assert lazyd("verify", images).stdout.endswith("good\n")
    assert restore(harness.Checkpoint(suite, pid, images, state), how, tmp_path / "work") == "ok\n"


@HOW
def test_memory_goes_to_the_stock_page_server(suite, how, programs, start, tmp_path):
    """The small images are here, the memory there; together they are the checkpoint."""
    pid, state = start_plain(programs, start, 3)
    images, remote = tmp_path / "images", tmp_path / "remote"
    with page_server(suite, remote) as port:
        to = ["--page-server", "--address", "127.0.0.1", "--port", port]
        lazyd("dump", "--pid", pid, "-D", images, *to, "--page-server-header", HEADERS[suite].value)
    wait_gone(pid)
    assert not list(images.glob("pagemap-*"))
    for path in remote.glob("pagemap-*.img"):
        shutil.copy(path, images)
    for path in remote.glob("pages-*.img"):
        shutil.copy(path, images)
    assert restore(harness.Checkpoint(suite, pid, images, state), how, tmp_path / "work") == "ok\n"


def test_a_page_server_that_is_not_there_or_hangs_up(programs, start, tmp_path):
    pid, state = start_plain(programs, start, 1)
    images = tmp_path / "images"
    to = ["--page-server", "--address", "127.0.0.1", "--port", free_port()]
    said = lazyd("dump", "--pid", pid, "-D", images, *to, check=False)
    assert said.returncode == 1
    assert "is the other end up" in said.stderr
    with socket.create_server(("127.0.0.1", 0)) as server:
        to[-1] = server.getsockname()[1]
        words = [LAZYD, "dump", "--pid", str(pid), "-D", str(images), *map(str, to)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = server.accept()
            connection.recv(24)
            connection.close()
            _, said = process.communicate(timeout=30)
            assert process.returncode == 1
            assert "hung up" in said
            assert said.count("\n") == 1
    assert not images.exists()
    (state / "go").touch()
    harness.wait_until((state / "result").exists, "the verdict")
    assert (state / "result").read_text() == "ok\n"
