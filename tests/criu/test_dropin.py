# SPDX-License-Identifier: MIT
"""What scripts that run `criu lazy-pages` rely on: arguments, socket, pidfile, status byte, exit codes.

All of it holds with LAZYD_TEST_DAEMON=stock too, except for the tests that say they are of lazyd alone.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

import harness
import pytest

only_lazyd = pytest.mark.skipif(harness.uses_stock(), reason="of lazyd alone")


def finish(saved, work, daemon_exit):
    """Restore against a listening daemon, wait for the verdict, and hold the daemon's exit to success."""
    (saved.state / "result").unlink(missing_ok=True)
    (saved.state / "go").touch()
    try:
        harness.criu_restore(saved.suite, saved.images, work)
        harness.wait_until(lambda: saved.result.endswith("\n"), "the program's verdict")
        code = daemon_exit()
    finally:
        harness.reap_group(saved.pid)
    assert saved.result == "ok\n"
    assert code == 0


def run_words(words, saved, work, cwd=None):
    """Start a daemon by its whole command line and finish a restore with it."""
    work.mkdir(parents=True, exist_ok=True)
    output = work / "daemon.out"
    with output.open("wb") as out:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=cwd)
    daemon = harness.Daemon(process, work, output)
    try:
        daemon.wait_listening()
        finish(saved, work, daemon.wait)
    finally:
        daemon.stop()
    return daemon


def reap_daemon(pid):
    """Wait for a daemon that was put into the background and became our child; return its exit code."""

    def ended():
        got, status = os.waitpid(pid, os.WNOHANG)
        return got == pid and [os.waitstatus_to_exitcode(status)]

    return harness.wait_until(ended, f"daemon {pid} to exit")[0]


@pytest.mark.parametrize("order", ["after", "before", "mixed", "long", "joined"])
def test_options_stand_before_or_after_the_verb(suite, order, dumped, tmp_path):
    saved, work = dumped(suite, "plain"), tmp_path / "work"
    images = str(saved.images)
    words = {
        "after": ["lazy-pages", "-D", images, "-W", str(work), "-v4", "-o", "d.log", "--no-default-config"],
        "before": ["-D", images, "-W", str(work), "-v", "-o", "d.log", "lazy-pages"],
        "mixed": ["-vvv", "-D", images, "lazy-pages", "-W", str(work), "-j"],
        "long": ["lazy-pages", "--images-dir", images, "--work-dir", str(work), "--log-file", "d.log"],
        "joined": ["lazy-pages", f"--images-dir={images}", f"-W{work}", "-v0"],
    }[order]
    run_words([*harness.daemon_command(suite), *words], saved, work)
    if order in {"after", "long"}:
        assert (work / "d.log").exists()


@only_lazyd
def test_the_short_command_serves_a_directory(suite, dumped, tmp_path):
    saved = dumped(suite, "plain")
    words = [*harness.daemon_command(suite), "--images", str(saved.images), "-W", str(tmp_path / "work")]
    run_words(words, saved, tmp_path / "work")


def test_the_work_dir_is_the_images_dir_unless_named(suite, dumped, tmp_path):
    saved = dumped(suite, "plain")
    run_words([*harness.daemon_command(suite), "lazy-pages", "-D", str(saved.images)], saved, saved.images)


def test_relative_folders_are_taken_from_the_current_one(suite, dumped, tmp_path):
    saved = dumped(suite, "plain")
    work = tmp_path / "here" / "work"
    work.mkdir(parents=True)
    images = os.path.relpath(saved.images, tmp_path / "here")
    words = [*harness.daemon_command(suite), "lazy-pages", "-D", images, "-W", "work"]
    run_words(words, saved, work, cwd=tmp_path / "here")


def test_a_stale_socket_is_replaced(suite, dumped, tmp_path):
    saved, work = dumped(suite, "plain"), tmp_path / "work"
    work.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(work / "lazy-pages.socket"))
    reading, writing = os.pipe()
    words = [*harness.daemon_command(suite), "lazy-pages", "-D", str(saved.images), "-W", str(work)]
    words += ["--status-fd", str(writing)]
    with (work / "daemon.out").open("wb") as out:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=[writing])
    os.close(writing)
    daemon = harness.Daemon(process, work, work / "daemon.out")
    try:
        assert os.read(reading, 1) == b"\0", daemon.report()
        finish(saved, work, daemon.wait)
    finally:
        os.close(reading)
        daemon.stop()


def test_daemon_mode_returns_when_listening_and_writes_a_bare_pidfile(suite, dumped, tmp_path):
    saved, work = dumped(suite, "plain"), tmp_path / "work"
    work.mkdir()
    pidfile = work / "lazy.pid"
    words = [*harness.daemon_command(suite), "lazy-pages", "-D", str(saved.images), "-W", str(work)]
    words += ["-o", "d.log", "--daemon", "--pidfile", str(pidfile)]
    with (work / "daemon.out").open("wb") as out:
        null = subprocess.DEVNULL
        run = subprocess.run(words, stdin=null, stdout=out, stderr=out, check=False, timeout=30)
    assert run.returncode == 0, harness.tail(work / "daemon.out") + harness.tail(work / "d.log")
    assert (work / "lazy-pages.socket").exists()
    text = pidfile.read_text()
    assert text.isdigit()
    pid = int(text)
    try:
        assert os.getsid(pid) != os.getsid(0)
        finish(saved, work, lambda: reap_daemon(pid))
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise


def test_the_short_form_of_daemon_mode(suite, dumped, tmp_path):
    saved, work = dumped(suite, "plain"), tmp_path / "work"
    work.mkdir()
    words = [*harness.daemon_command(suite), "-D", str(saved.images), "-W", str(work), "lazy-pages", "-d"]
    words += ["--pidfile", str(work / "p"), "-o", "d.log"]
    null = subprocess.DEVNULL
    assert subprocess.run(words, stdin=null, stdout=null, stderr=null, check=False, timeout=30).returncode == 0
    finish(saved, work, lambda: reap_daemon(int((work / "p").read_text())))


def test_the_status_fd_gets_one_zero_byte_when_listening(suite, dumped, tmp_path):
    saved, work = dumped(suite, "plain"), tmp_path / "work"
    work.mkdir()
    reading, writing = os.pipe()
    words = [*harness.daemon_command(suite), "lazy-pages", "-D", str(saved.images), "-W", str(work)]
    words += ["--status-fd", str(writing)]
    with (work / "daemon.out").open("wb") as out:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=[writing])
    os.close(writing)
    daemon = harness.Daemon(process, work, work / "daemon.out")
    try:
        assert os.read(reading, 100) == b"\0"
        assert daemon.socket.exists()
        finish(saved, work, daemon.wait)
        assert os.read(reading, 100) == b""
    finally:
        os.close(reading)
        daemon.stop()


def test_a_restorer_that_hangs_up_early_fails_the_restore(suite, dumped, tmp_path):
    daemon = harness.start_daemon(suite, dumped(suite, "plain").images, tmp_path)
    try:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(daemon.socket))
        assert daemon.wait(10) == 1
    finally:
        daemon.stop()


@pytest.mark.parametrize("message", [b"\1", b"\xff" * 4, struct.pack("<i", 1) + b"x", b"GET / HTTP/1.0\r\n\r\n"])
def test_a_restorer_that_sends_garbage_fails_the_restore(suite, message, dumped, tmp_path):
    daemon = harness.start_daemon(suite, dumped(suite, "plain").images, tmp_path)
    try:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(daemon.socket))
            peer.sendall(message)
        assert daemon.wait(10) == 1
    finally:
        daemon.stop()


@only_lazyd
def test_a_restorer_that_sends_a_file_for_a_userfaultfd_fails_the_restore(suite, dumped, tmp_path):
    saved = dumped(suite, "plain")
    daemon = harness.start_daemon(suite, saved.images, tmp_path)
    try:
        with socket.socket(socket.AF_UNIX) as peer, Path("/dev/null").open() as wrong:
            peer.connect(str(daemon.socket))
            peer.sendall(struct.pack("<i", saved.pid))
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [wrong.fileno()]))
            peer.sendmsg([b"\0"], [rights])
        assert daemon.wait(10) == 1
        assert daemon.output.read_text().count("Error: ") == 1
    finally:
        daemon.stop()


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_a_directory_without_images_is_refused(suite, what, tmp_path):
    images = tmp_path / "images"
    if what == "empty":
        images.mkdir()
    words = [*harness.daemon_command(suite), "lazy-pages", "-D", str(images), "-W", str(tmp_path)]
    run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert run.returncode == 1
    if not harness.uses_stock():
        assert len(run.stderr.strip().splitlines()) == 1
        assert str(images) in run.stderr


@only_lazyd
def test_stats_are_written_as_json(suite, dumped, tmp_path):
    stats = tmp_path / "stats.json"
    outcome = harness.lazy_restore(dumped(suite, "plain"), tmp_path / "work", ("--stats", str(stats)))
    harness.assert_good(outcome)
    assert isinstance(json.loads(stats.read_text()), dict)


@only_lazyd
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_does_not_abandon_the_tasks(suite, number, dumped, tmp_path):
    """The first signal lets the fill finish: the program reads right bytes long after."""
    saved, work = dumped(suite, "plain"), tmp_path / "work"
    (saved.state / "result").unlink(missing_ok=True)
    (saved.state / "go").unlink(missing_ok=True)
    daemon = harness.start_daemon(suite, saved.images, work, ("--fill-rate", "64M"))
    try:
        harness.criu_restore(suite, saved.images, work)
        time.sleep(0.1)
        daemon.process.send_signal(number)
        code = daemon.wait()
        (saved.state / "go").touch()
        harness.wait_until(lambda: saved.result.endswith("\n"), "the program's verdict")
    finally:
        daemon.stop()
        harness.reap_group(saved.pid)
    assert saved.result == "ok\n", daemon.report()
    assert code == 0, daemon.report()
