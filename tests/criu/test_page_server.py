# SPDX-License-Identifier: MIT
"""lazyd page-server beside the real CRIU: it takes what criu dump sends, and criu lazy-pages fills from it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import chains
import harness
import pki
import pytest
from page_server_harness import LAZYD_COMMAND, running_server, start_server

# It moves its memory about while it is filled, and is small.
SCENARIO = "dontunmap"
TO = ("--page-server", "--address", "127.0.0.1", "--port")


@pytest.fixture(scope="module")
def sent(suite, victim, tmp_path_factory):
    """A program whose memory a stock dump has sent to lazyd's page server; the images are put together."""
    folder = tmp_path_factory.mktemp(f"sent-{suite}")
    remote = folder / "remote"
    remote.mkdir()
    with running_server(remote, folder / "server.log") as server:
        command = [str(victim), SCENARIO, str(folder / "state")]
        saved = harness.checkpoint(suite, command, folder, (*TO, str(server.port)))
    assert not list(saved.images.glob("pagemap-*"))
    for path in remote.glob("*.img"):
        shutil.copy(path, saved.images)
    yield saved, remote
    saved.forget()


def test_what_a_stock_dump_sends(suite, sent, victim, tmp_path):
    """As much of each kind as the stock dump writes of the same program; and crit reads it."""
    saved, remote = sent
    local = harness.checkpoint(suite, [str(victim), SCENARIO, str(tmp_path / "state")], tmp_path)
    try:
        shapes, fields = [], []
        for path, pid in ((remote, saved.pid), (local.images, local.pid)):
            fields.append({frozenset(entry) for entry in harness.crit(suite, path / f"pagemap-{pid}.img")})
            pages_id, entries, _ = chains.read_pagemap(path / f"pagemap-{pid}.img")
            assert (path / f"pages-{pages_id}.img").stat().st_size == sum(e.pages for e in entries) * chains.PAGE
            shapes.append({flags: sum(e.pages for e in entries if e.flags == flags) for flags in (4, 6)})
        assert fields[0] == fields[1]
        # Where libraries and the stack lie differs from run to run, by a page here and there.
        assert shapes[0] == {flags: pytest.approx(pages, abs=8) for flags, pages in shapes[1].items()}
    finally:
        local.forget()


def test_it_comes_back_eagerly(sent, tmp_path):
    assert harness.eager_restore(sent[0], tmp_path / "work") == "ok\n"


def test_it_comes_back_lazily(sent, tmp_path):
    harness.assert_good(harness.lazy_restore(sent[0], tmp_path / "work"))


def spoiled(saved: harness.Checkpoint, folder: Path) -> Path:
    """Copy images; the lazy pages are not the program's there, so that nothing is right that comes from there."""
    folder.mkdir()
    for path in saved.images.glob("*.img"):
        shutil.copy(path, folder)
    for path in saved.images.glob("pagemap-[0-9]*.img"):
        pages_id, entries, _ = chains.read_pagemap(path)
        with (folder / f"pages-{pages_id}.img").open("r+b") as pages:
            for entry in entries:
                if entry.flags & chains.LAZY:
                    pages.write(b"\x5a" * (entry.pages * chains.PAGE))
                else:
                    pages.seek(entry.pages * chains.PAGE, os.SEEK_CUR)
    return folder


def without_lazy_pages(saved: harness.Checkpoint, folder: Path) -> Path:
    """Copy images; of the lazy pages they only say that somebody else has them."""
    folder.mkdir()
    for path in saved.images.glob("*.img"):
        shutil.copy(path, folder)
    for path in saved.images.glob("pagemap-[0-9]*.img"):
        pages_id, entries, wide = chains.read_pagemap(path)
        with (saved.images / f"pages-{pages_id}.img").open("rb") as pages:
            kept = [pages.read(entry.pages * chains.PAGE) for entry in entries]
        (folder / f"pages-{pages_id}.img").write_bytes(
            b"".join(data for data, entry in zip(kept, entries, strict=True) if not entry.flags & chains.LAZY)
        )
        for entry in entries:
            entry.flags = chains.LAZY if entry.flags & chains.LAZY else entry.flags
        chains.write_pagemap(folder / path.name, pages_id, entries, "wide" if wide else "narrow")
    return folder


@contextlib.contextmanager
def client(command: str, images: Path, work: Path, port: int, options: tuple[str, ...] = ()):
    """Run a lazy-pages daemon, stock or lazyd, on a page server; yield it once it listens."""
    work.mkdir()
    words = [command, "lazy-pages", "-D", str(images), "-W", str(work), *TO, str(port), *options]
    with (work / "daemon.out").open("wb") as out:
        process = subprocess.Popen([*words, "-o", "lazy-pages.log", "-v2"], stdin=subprocess.DEVNULL, stderr=out)
    daemon = harness.Daemon(process, work, work / "daemon.out")
    try:
        daemon.wait_listening()
        yield daemon
    finally:
        daemon.stop()


def restore_from(command: str, saved: harness.Checkpoint, images: Path, work: Path, port: int, *options: str) -> None:
    """Restore through a daemon that fills from a page server; hold it to what every restore must reach."""
    (saved.state / "result").unlink(missing_ok=True)
    (saved.state / "go").touch()
    try:
        with client(command, images, work, port, options) as daemon:
            harness.criu_restore(saved.suite, images, work)
            harness.wait_until(lambda: saved.result.endswith("\n"), f"the verdict\n{daemon.report()}")
            assert daemon.wait() == 0, daemon.report()
    finally:
        harness.reap_group(saved.pid)
    assert saved.result == "ok\n"


def test_the_stock_daemon_fills_from_it(suite, sent, tmp_path):
    """Over a chain of parents, and again."""
    saved, _ = sent
    given = chains.split_into_chain(saved.images, tmp_path / "chain", 3)
    with running_server(given, tmp_path / "log", "--lazy-pages") as server:
        for turn in range(2):
            images = spoiled(saved, tmp_path / f"images{turn}")
            restore_from(harness.criu_command(suite), saved, images, tmp_path / f"work{turn}", server.port)
    said = server.log.read_text()
    assert "Error" not in said
    assert said.count(" answers, ") == 2


def test_lazyd_fills_from_it(sent, tmp_path):
    """Over a chain of parents."""
    saved, _ = sent
    given = chains.split_into_chain(saved.images, tmp_path / "chain", 3)
    with running_server(given, tmp_path / "log", "--lazy-pages") as server:
        images = without_lazy_pages(saved, tmp_path / "images")
        restore_from(LAZYD_COMMAND, saved, images, tmp_path / "work", server.port)
    said = server.log.read_text()
    assert "Error" not in said
    assert said.count(" answers, ") == 1


@pytest.mark.parametrize("suite", ["trixie"], indirect=True)  # of the server it asks the same with either
def test_a_tree_and_its_shared_memory(suite, victim, tmp_path):
    """Many images in one session, and questions for many tasks over one connection."""
    (tmp_path / "remote").mkdir()
    with running_server(tmp_path / "remote", tmp_path / "log", "--lazy-pages") as server:
        command = [str(victim), "tree", str(tmp_path / "state")]
        saved = harness.checkpoint(suite, command, tmp_path, (*TO, str(server.port)))
        for path in (tmp_path / "remote").glob("*.img"):
            shutil.copy(path, saved.images)
        images = without_lazy_pages(saved, tmp_path / "there")
        restore_from(LAZYD_COMMAND, saved, images, tmp_path / "work", server.port)
    assert "Error" not in server.log.read_text()
    assert len(list(saved.images.glob("pagemap-*.img"))) > 50


@pytest.mark.parametrize("suite", ["sid"], indirect=True)  # of the server it asks the same with either
def test_lazyd_goes_on_when_its_server_was_killed(suite, sent, tmp_path):
    """The server stands still when the program wants its memory, and is killed; another one takes its place."""
    saved, _ = sent
    images = without_lazy_pages(saved, tmp_path / "images")
    first = start_server(saved.images, tmp_path / "first", "--lazy-pages")
    for name in ("result", "go"):
        (saved.state / name).unlink(missing_ok=True)
    try:
        with client(LAZYD_COMMAND, images, tmp_path / "work", first.port, ("--fill", "off")) as daemon:
            harness.criu_restore(suite, images, tmp_path / "work")
            first.process.send_signal(signal.SIGSTOP)
            (saved.state / "go").touch()
            time.sleep(0.3)
            first.process.kill()
            first.process.wait()
            assert saved.result == ""
            with running_server(saved.images, tmp_path / "second", "--lazy-pages", port=first.port) as second:
                harness.wait_until(lambda: saved.result.endswith("\n"), f"the verdict\n{daemon.report()}")
                assert daemon.wait() == 0, daemon.report()
        assert saved.result == "ok\n"
        assert " answers, " in second.log.read_text()
    finally:
        first.process.kill()
        first.process.wait()
        harness.reap_group(saved.pid)


def test_by_tls(suite, victim, tmp_path):
    """A stock dump to it, and a stock daemon that fills from it; one without a certificate is turned away."""
    authority = pki.Authority(tmp_path / "pki")
    (tmp_path / "remote").mkdir()
    ours, theirs = (authority.sign(name).options(authority) for name in ("server", "client"))
    with running_server(tmp_path / "remote", tmp_path / "log", "--lazy-pages", *ours) as server:
        plain = server.connect()
        plain.ask(4096 * 16, 1, 1)
        assert plain.is_hung_up_on()
        command = [str(victim), SCENARIO, str(tmp_path / "state")]
        saved = harness.checkpoint(suite, command, tmp_path, (*TO, str(server.port), *theirs))
        for path in (tmp_path / "remote").glob("*.img"):
            shutil.copy(path, saved.images)
        there = spoiled(saved, tmp_path / "there")
        restore_from(harness.criu_command(suite), saved, there, tmp_path / "work", server.port, *theirs)
    errors = [line for line in server.log.read_text().splitlines() if "Error" in line]
    assert len(errors) == 1
    assert "TLS" in errors[0]


IN_A_WORLD_OF_ITS_OWN = """
mount --bind "$1" "$2" && shift 2 || exit 9
"$@" || exit 8
while ! [ -s "$RESULT" ]; do sleep 0.05; done
"""


@pytest.mark.parametrize("suite", ["trixie"], indirect=True)  # of the server it asks the same with either
def test_eight_restores_at_once(suite, sent, tmp_path):
    """Eight copies of one program, each in namespaces of its own, from one page server."""
    saved, _ = sent
    images = spoiled(saved, tmp_path / "images")
    with running_server(saved.images, tmp_path / "log", "--lazy-pages") as server, contextlib.ExitStack() as stack:
        states, copies, daemons = [], [], []
        (saved.state / "result").unlink(missing_ok=True)
        for number in range(8):
            state, work = tmp_path / f"state{number}", tmp_path / f"work{number}"
            shutil.copytree(saved.state, state)
            (state / "go").touch()
            states.append(state)
            daemons.append(stack.enter_context(client(harness.criu_command(suite), images, work, server.port)))
            words = ["unshare", "--fork", "--pid", "--mount", "--mount-proc", "--kill-child", "sh", "-c"]
            words += [IN_A_WORLD_OF_ITS_OWN, "sh", str(state), str(saved.state), harness.criu_command(suite)]
            words += ["restore", "-D", str(images), "-W", str(work), "--shell-job", "-d", "--lazy-pages"]
            environment = os.environ | {"RESULT": str(saved.state / "result")}
            with (work / "restore.out").open("wb") as out:
                copies.append(
                    subprocess.Popen(
                        [*words, "-o", "restore.log", "-v1"], stdin=subprocess.DEVNULL, stdout=out, env=environment
                    )
                )
            stack.callback(copies[-1].wait)
            stack.callback(copies[-1].kill)
        end = time.monotonic() + harness.TIMEOUT_S
        for state, copy, daemon in zip(states, copies, daemons, strict=True):
            assert copy.wait(max(1, end - time.monotonic())) == 0, daemon.report()
            assert (state / "result").read_text() == "ok\n", daemon.report()
    assert server.log.read_text().count("connected") == 8


@pytest.fixture
def small(tmp_path):
    """A directory with room for little."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(suite, victim, small, tmp_path):
    """The dump fails, the program goes on, and nothing is there that was not there before."""
    (small / "pagemap-1.img").write_text("of another dump")
    images, state = tmp_path / "images", tmp_path / "state"
    images.mkdir()
    pid = harness.start_program([str(victim), "plain", str(state)], state)
    try:
        with running_server(small, tmp_path / "log") as server:
            words = [harness.criu_command(suite), "dump", "-t", str(pid), "-D", str(images), "--shell-job", *TO]
            dump = subprocess.run(
                [*words, str(server.port)], stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60
            )
        assert dump.returncode != 0
        errors = [line for line in server.log.read_text().splitlines() if "Error" in line]
        assert len(errors) == 1
        assert f"{small}: write: ENOSPC, no space left on device (make room there, or dump elsewhere)" in errors[0]
        assert [path.name for path in small.iterdir()] == ["pagemap-1.img"]
        (state / "go").touch()
        running = harness.Checkpoint(suite, pid, images, state)
        harness.wait_until(lambda: running.result.endswith("\n"), "the verdict")
        assert running.result == "ok\n"
    finally:
        harness.reap_group(pid)


def test_lazyd_sends_to_it(suite, victim, tmp_path):
    """lazyd dump to lazyd's page server; the stock daemon fills from what arrived."""
    images, remote, state = tmp_path / "images", tmp_path / "remote", tmp_path / "state"
    remote.mkdir()
    pid = harness.start_program([str(victim), SCENARIO, str(state)], state)
    try:
        with running_server(remote, tmp_path / "log", "--lazy-pages") as server:
            header = {"trixie": "24", "sid": "32"}[suite]
            words = [LAZYD_COMMAND, "dump", "--pid", str(pid), "-D", str(images), *TO, str(server.port)]
            subprocess.run([*words, "--page-server-header", header], check=True, timeout=60, close_fds=True)
            harness.reap_group(pid)
            for path in remote.glob("*.img"):
                shutil.copy(path, images)
            saved = harness.Checkpoint(suite, pid, images, state)
            there = spoiled(saved, tmp_path / "there")
            restore_from(harness.criu_command(suite), saved, there, tmp_path / "work", server.port)
    finally:
        harness.reap_group(pid)
