# SPDX-License-Identifier: MIT
"""Little room: few descriptors, closed standard streams, folders that cannot be written to or that vanish."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_harness import BASE, PAGE, PID, full, hand_over, memory, wait_until

VMAS = [full(BASE, 256)]
SERVED = [*hand_over(VMAS, PID), "finish", "hangup", "sweep", "random", "2"]


def limit_descriptors(count):
    """Allow so many, and not to raise it."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def tree(stage, count):
    """Build images of a tree of tasks; the steps that restore them all, each checking its memory."""
    tasks = [[full(BASE + number * 1000 * PAGE, 32)] for number in range(count)]
    stage.build({PID + number: vmas for number, vmas in enumerate(tasks)})
    steps = ["connect"]
    for number, vmas in enumerate(tasks[1:], 1):
        steps += ["child", *memory(vmas), "open", "announce", str(PID + number), "ready", "sweep", "random", "2", "end"]
    return [*steps, *memory(tasks[0]), "open", "announce", str(PID), "finish", "hangup", "sweep", "random", "2"]


def needed_descriptors(stage):
    """What a daemon says that it needs, when it is allowed one less than that."""
    said = "ulimit -n 1"
    for _ in range(2):
        count = int(said.rpartition("ulimit -n ")[2].rstrip(")\n"))
        daemon = stage.start_daemon(listening=False, prepare=limit_descriptors(max(80, count - 1)))
        assert daemon.wait() == 1
        said = daemon.output
        assert len(said.splitlines()) == 1, said
    assert int(said.rpartition("ulimit -n ")[2].rstrip(")\n")) == count
    return count


def test_as_many_tasks_as_there_are_descriptors(stage):
    """The last ones get what is held for other things; none is left over for a pidfd of every task."""
    steps = tree(stage, 20)
    daemon = stage.start_daemon(prepare=limit_descriptors(needed_descriptors(stage)))
    skeleton = stage.start_skeleton(*steps)
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    skeleton.close()
    assert daemon.wait() == 0, daemon.output
    assert "Traceback" not in daemon.output


def test_the_server_is_killed_with_few_descriptors(stage):
    steps = tree(stage, 20)
    daemon = stage.start_daemon("--fill", "off", prepare=limit_descriptors(needed_descriptors(stage)))
    at = steps.index("finish")
    skeleton = stage.start_skeleton(*steps[:at], "say", "there", "await", *steps[at:])
    skeleton.heard("there")
    for _ in range(2):
        family = daemon.whole_family()
        os.kill(family["server"], signal.SIGKILL)
        wait_until(lambda old=family["server"]: daemon.family().get("server", old) != old, "another")
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    skeleton.close()
    assert daemon.wait() == 0, daemon.output


def test_more_tasks_than_descriptors_are_refused_before_anyone_may_connect(stage):
    tree(stage, 100)
    daemon = stage.start_daemon(listening=False, prepare=limit_descriptors(64))
    assert daemon.wait() == 1
    (line,) = daemon.output.splitlines()
    assert "open files" in line
    assert "ulimit -n" in line
    assert not (stage.work / "lazy-pages.socket").exists()


def test_forks_with_few_descriptors(stage):
    stage.build({PID: VMAS})
    ours = len(list(Path("/proc/self/fd").iterdir()))  # which it inherits
    daemon = stage.start_daemon(prepare=limit_descriptors(ours + 50))
    skeleton = stage.start_skeleton(*hand_over(VMAS, PID), "finish", "hangup", "forks", "60", "sweep", "random", "1")
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    skeleton.close()
    assert daemon.wait() == 0, daemon.output


def run_command(stage, *words, shell=None, closed=()):
    """Run the command that users type, in the background of a shell if asked; wait for its end."""
    command = [sys.executable, "-m", "lazyd", "lazy-pages", "-D", str(stage.images), "-W", str(stage.work), *words]
    if shell is not None:
        command = ["unshare", "--mount", "sh", "-c", f'{shell} && exec "$@"', "sh", *command]

    def close_streams():
        for number in closed:
            os.close(number)

    with (stage.work / "daemon.out").open("wb") as out:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=close_streams)  # noqa: PLW1509


def descriptors_of(pid):
    """What a process's standard streams are."""
    return {number: str(Path(f"/proc/{pid}/fd/{number}").readlink()) for number in range(3)}


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_standard_streams_that_are_closed_stay_out_of_the_way(stage, closed):
    stage.build({PID: VMAS})
    daemon = run_command(stage, "-o", "lazy.log", closed=closed)
    try:
        wait_until((stage.work / "lazy-pages.socket").exists, "the socket")
        for number, what in descriptors_of(daemon.pid).items():
            assert what == ("/dev/null" if number in closed or not number else str(stage.work / "daemon.out"))
        skeleton = stage.start_skeleton(*SERVED)
        assert skeleton.wait() == (0, "ok\n")
        skeleton.close()
        assert daemon.wait(20) == 0
    finally:
        daemon.kill()
        daemon.wait()
    assert "tasks: 1" in (stage.work / "lazy.log").read_text()


def test_a_log_and_statistics_that_find_no_room_do_not_stop_the_serving(stage):
    """The disk is full: what could not be written is said, at the end, and every byte is right."""
    stage.build({PID: VMAS})
    full_disk = stage.folder / "full"
    full_disk.mkdir()
    mount = f"mount -t tmpfs -o size=4k none {full_disk} && {{ head -c 64k /dev/zero > {full_disk}/x; true; }}"
    log, statistics = full_disk / "lazy.log", full_disk / "stats.json"
    daemon = run_command(stage, "-o", str(log), "--stats", str(statistics), shell=f"{mount} 2>/dev/null")
    try:
        wait_until((stage.work / "lazy-pages.socket").exists, "the socket")
        skeleton = stage.start_skeleton(*SERVED)
        assert skeleton.wait() == (0, "ok\n")
        skeleton.close()
        assert daemon.wait(20) == 1
    finally:
        daemon.kill()
        daemon.wait()
    (line,) = (stage.work / "daemon.out").read_text().splitlines()
    assert "writing the statistics: ENOSPC" in line


@pytest.mark.parametrize("words", [("-o", "lazy.log"), ("--stats", "{work}/stats.json"), ("--pidfile", "lazy.pid"), ()])
def test_a_work_directory_that_is_read_only_is_refused(stage, words):
    stage.build({PID: VMAS})
    mount = f"mount --bind {stage.work} {stage.work} && mount -o remount,bind,ro {stage.work}"
    daemon = run_command(stage, *(word.format(work=stage.work) for word in words), shell=mount)
    assert daemon.wait(20) == 1
    (line,) = (stage.work / "daemon.out").read_text().splitlines()
    assert "EROFS" in line or "EACCES" in line
    assert str(stage.work) in line


@pytest.mark.parametrize("pidfile", ["none/lazy.pid", "/dev/full"])
def test_a_pidfile_that_cannot_be_written_leaves_no_socket(stage, pidfile):
    stage.build({PID: VMAS})
    daemon = stage.start_command("--pidfile", pidfile, listening=False)
    assert daemon.wait() == 1
    assert re.search("opening the pidfile: ENOENT|writing the pidfile: ENOSPC", daemon.output)
    assert not (stage.work / "lazy-pages.socket").exists()


def test_images_that_vanish_are_served_to_the_end(stage):
    stage.build({PID: VMAS})
    daemon = stage.start_daemon("--fill", "off")
    shutil.rmtree(stage.images)
    skeleton = stage.start_skeleton(*SERVED)
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    skeleton.close()
    assert daemon.wait() == 0, daemon.output


def test_a_work_directory_that_vanishes_does_not_stop_the_serving(stage):
    stage.build({PID: VMAS})
    work = stage.folder / "elsewhere"
    work.mkdir()
    daemon = stage.start_daemon("-W", str(work), "--fill", "off")
    at = SERVED.index("finish")
    (stage.work / "lazy-pages.socket").symlink_to(work / "lazy-pages.socket")
    skeleton = stage.start_skeleton(*SERVED[:at], "say", "there", "await", *SERVED[at:])
    skeleton.heard("there")
    shutil.rmtree(work)
    os.kill(daemon.server(), signal.SIGKILL)
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    skeleton.close()
    assert daemon.wait() == 0, daemon.output


@pytest.mark.parametrize("option", ["-D", "-W"])
def test_a_path_that_is_too_long_is_refused(stage, option):
    stage.build({PID: VMAS})
    daemon = run_command(stage, option, "/" + "d" * 5000)
    assert daemon.wait(20) == 1
    (line,) = (stage.work / "daemon.out").read_text().splitlines()
    assert "too long" in line
