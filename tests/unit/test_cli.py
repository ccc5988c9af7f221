# SPDX-License-Identifier: MIT
"""The command line: criu's spelling, one line and exit 1 for what makes no sense, what each verb is given."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from images_builder import PAGE, Entry, Task, build_checkpoint

from lazyd import cli, daemon
from lazyd.report import Show
from lazyd.uffd import Fill

BASE = 0x7F0000000000


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch, tmp_path):
    """Keep this machine's criu configuration out of the tests."""
    monkeypatch.setattr(cli, "_default_configs", list)
    monkeypatch.delenv("CRIU_CONFIG_FILE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def served(monkeypatch):
    """What serve() was called with, in place of serving."""
    calls = []

    def serve(options, log):
        calls.append((options, log))
        return 0

    monkeypatch.setattr(daemon, "serve", serve)
    return calls


@pytest.mark.parametrize(
    "line",
    [
        "-D d",
        "lazy-pages -D d",
        "-D d lazy-pages",
        "-Dd lazy-pages",
        "lazy-pages --images-dir d",
        "--images-dir=d lazy-pages",
        "lazy-pages --images d",
        "-j -v4 -D d lazy-pages --no-default-config",
        "-vvv -D d -j lazy-pages",
        "--shell-job lazy-pages -v -D d",
        "-jv4 lazy-pages -D d",
    ],
)
def test_options_stand_anywhere_in_any_spelling(served, line):
    assert cli.main(line.split()) == 0
    ((options, _),) = served
    assert options.settings.images == Path("d")
    assert options.work == Path("d")
    assert not options.is_daemon


@pytest.mark.parametrize(
    ("line", "verbosity"),
    [
        ("", None),
        ("-v", 1),
        ("-vv", 2),
        ("-v -v -v", 3),
        ("-v0", 0),
        ("-v4", 4),
        ("-dv4", 4),
        ("--verbosity=2", 2),
        ("--verbosity", 1),
        ("-v lazy-pages", 1),
    ],
)
def test_verbosity_counts_as_criu_counts(line, verbosity):
    assert cli.parse(["-D", "d", *line.split()]).verbosity == verbosity


def test_everything_reaches_the_daemon(served):
    line = (
        "lazy-pages -D d -W w -o l -d --pidfile p --status-fd 7 --stats s --fill-rate 64M --workers 3"
        " --pagemap-format booleans --no-progress"
    )
    assert cli.main(line.split()) == 0
    ((options, _),) = served
    assert options.work == Path("w")
    assert options.log_file == Path("l")
    assert options.is_daemon
    assert options.pidfile == Path("p")
    assert options.status_fd == 7
    assert options.statistics == Path("s")
    assert options.show is Show.NOTHING
    assert options.settings.fill is Fill.FULL
    assert options.settings.fill_rate == 64 << 20
    assert options.settings.workers == 3
    assert options.settings.dialect == "booleans"


def test_the_fill_can_be_off(served):
    assert cli.main(["-D", "d", "--fill", "off"]) == 0
    assert served[0][0].settings.fill is Fill.OFF


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1", 1),
        ("512K", 512 << 10),
        ("64M", 64 << 20),
        ("64M/s", 64 << 20),
        ("64MiB/s", 64 << 20),
        ("1.5G", 3 << 29),
        ("2g", 2 << 30),
    ],
)
def test_rates(text, rate):
    assert cli.parse(["-D", "d", "--fill-rate", text]).fill_rate == rate


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "no images are named"),
        ("lazy-pages", "no images are named"),
        ("freeze -D d", "freeze: no such command"),
        ("lazy-pages again -D d", "again: one word too many"),
        ("-D d --nonsense", "--nonsense"),
        ("-D d -W", "-W"),
        ("-D d --fill maybe", "--fill"),
        ("-D d --fill-rate fast", "fast: not a rate"),
        ("-D d --fill-rate 0", "0: not a rate"),
        ("-D d --fill off --fill-rate 1M", "--fill off"),
        ("-D d --workers -1", "--workers"),
        ("-D d --status-fd x", "x: not a number"),
        ("-D d --verbosity=x", "--verbosity=x"),
        ("-D d --json", "--json is for show"),
        ("show", "one directory of images is needed, 0 are given"),
        ("verify a b", "one directory of images is needed, 2 are given"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_exit_1(served, capsys, line, says):
    assert cli.main(line.split()) == 1
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert not served


@pytest.mark.parametrize(
    "option",
    [
        "--page-server",
        "--page-server --port 0",
        "--page-server --port 65536",
        "--page-server --address host",
        "--address host",
        "--port 27",
        "--ps-socket 3",
        "--page-server-header 32",
        "--on-source-loss kill",
    ],
)
def test_half_of_a_page_server_is_refused_in_one_line(served, capsys, option):
    assert cli.main(["lazy-pages", "-D", "d", *option.split()]) == 1
    error = capsys.readouterr().err
    assert "--page-server" in error
    assert len(error.splitlines()) == 1
    assert not served


@pytest.mark.parametrize(
    ("name", "says"),
    [("nowhere/stats.json", "ENOENT"), ("file/stats.json", "ENOTDIR"), ("folder", "EISDIR")],
)
def test_statistics_that_cannot_be_written_are_refused_at_once(capsys, tmp_path, name, says):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert cli.main(["-D", str(tmp_path), "--stats", name]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path}/{name}: --stats: {says}, " in error


@pytest.mark.parametrize("ahead", [0, 3, 10])
def test_a_status_fd_that_nobody_passed_is_refused_whatever_is_opened_later(capsys, tmp_path, ahead):
    free = os.open(tmp_path, os.O_RDONLY)
    os.close(free)
    number = free + ahead
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    assert cli.main(["-D", str(tmp_path), "--status-fd", str(number)]) == 1
    assert f"--status-fd {number}: EBADF, bad file descriptor" in capsys.readouterr().err


def test_a_home_that_may_not_be_searched_has_no_configuration(monkeypatch):
    def refuse(*arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.undo()  # the fixture's, which replaces what is tested
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        assert cli._default_configs() == []


def test_the_version(capsys):
    for option in ("-V", "--version"):
        assert cli.main([option]) == 0
        assert re.fullmatch(r"lazyd \d+\.\d+\S*\n", capsys.readouterr().out)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(["--help"])
    assert exited.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--images-dir",
        "--fill-rate",
        "--stats",
        "--pagemap-format",
        "--daemon",
        "show",
        "verify",
    ):
        assert option in text


# Configuration files


def test_a_configuration_file_says_what_the_command_line_does_not(served, tmp_path):
    config = tmp_path / "criu.conf"
    config.write_text("# ours\nimages-dir conf\nwork-dir 'a b'  # comment\nverbosity 4\ntcp-established\n\ndaemon\n")
    assert cli.main(["lazy-pages", "--config", str(config), "-W", "w"]) == 0
    ((options, _),) = served
    assert options.settings.images == Path("conf")
    assert options.work == Path("w")
    assert options.is_daemon


def test_default_configuration_files_can_be_left_out(served, tmp_path, monkeypatch, capsys):
    config = tmp_path / "default.conf"
    config.write_text("images-dir conf\n")
    monkeypatch.setattr(cli, "_default_configs", lambda: [config])
    assert cli.main(["lazy-pages", "--no-default-config"]) == 1
    assert cli.main(["lazy-pages"]) == 0
    assert served[0][0].settings.images == Path("conf")
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("text", [None, "images-dir 'd\n", b"\xff\xfe"])
def test_a_bad_configuration_file_is_one_line(capsys, tmp_path, text):
    config = tmp_path / "criu.conf"
    if text is not None:
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cli.main(["-D", "d", "--config", str(config)]) == 1
    error = capsys.readouterr().err
    assert str(config) in error
    assert len(error.splitlines()) == 1


# show and verify


@pytest.fixture
def images(tmp_path):
    """A good directory."""
    return build_checkpoint(tmp_path / "images", [Task(5, [Entry(BASE, 3)])])


def test_show_for_people_and_for_programs(images, capsys):
    assert cli.main(["show", str(images)]) == 0
    assert "5" in capsys.readouterr().out
    assert cli.main(["show", "--json", str(images)]) == 0
    assert json.loads(capsys.readouterr().out)


def test_verify_says_what_is_wrong_where(images, capsys):
    assert cli.main(["verify", "-D", str(images)]) == 0
    capsys.readouterr()
    (images / "pages-1.img").write_bytes(b"")
    assert cli.main(["verify", str(images)]) == 1
    assert "pages-1.img" in capsys.readouterr().out


def test_verify_counts_the_pages_that_are_holes_of_the_file(tmp_path, capsys):
    """In the middle of an entry, from one into the next, at the end, a piece of a page, and where nothing is read."""
    parent = build_checkpoint(tmp_path / "parent", [Task(5, [Entry(BASE, 8), Entry(BASE + 16 * PAGE, 8)])])
    youngest = build_checkpoint(
        tmp_path / "youngest",
        [Task(5, [Entry(BASE, 5), Entry(BASE + 5 * PAGE, 3, "parent"), Entry(BASE + 16 * PAGE, 8, "parent")])],
        parent=parent,
    )
    image = parent / "pages-1.img"
    content = image.read_bytes()
    image.unlink()
    holes = {2, 7, 8, 14, 15}
    with image.open("wb") as pages:
        for page in sorted(set(range(16)) - holes):
            pages.seek(page * PAGE + (page == 11) * 2048)
            pages.write(content[pages.tell() : (page + 1) * PAGE])
        pages.truncate(len(content))
    for name in ("pagemap-shmem-5.bak.img", "pagemap-shmem-05.img", "pagemap-shmem-1\u00b2.img"):
        shutil.copy(parent / "pagemap-5.img", parent / name)  # of no object that there can be
    for directory, said in (
        (parent, "5 dumped pages in holes of the file, from offset 8192 on,"),
        (youngest, "4 dumped pages in holes of the file, from offset 28672 on,"),
    ):
        assert cli.main(["verify", str(directory)]) == 0
        doubt, last = capsys.readouterr().out.splitlines()
        assert f"pages-1.img: {said}" in doubt
        assert last == f"{directory}: good, apart from that"


def test_show_of_nothing_is_one_line(capsys, tmp_path):
    assert cli.main(["show", str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "none") in error
    assert len(error.splitlines()) == 1


def run_command(words, **more):
    """Run the command that users type; what it has said on stderr, and its exit code."""
    run = subprocess.run([sys.executable, "-m", "lazyd", *words], stderr=subprocess.PIPE, check=False, **more)
    return run.stderr.decode(), run.returncode


@pytest.mark.parametrize("words", [["show"], ["show", "--json"], ["verify"]])
def test_output_that_finds_no_room_is_one_line_and_exit_1(words, tmp_path):
    build_checkpoint(tmp_path / "images", [Task(100, [Entry(0x10000, 1)])])
    with open("/dev/full", "wb") as full:  # noqa: PTH123  a device
        said = run_command([*words, str(tmp_path / "images")], stdout=full)
    assert said == ("writing to standard output: ENOSPC, no space left on device\n", 1)


def test_a_name_that_is_no_text_can_be_written_about(tmp_path):
    images = tmp_path / os.fsdecode(b"bad\xffname")
    build_checkpoint(images, [Task(100, [Entry(0x10000, 1)])])
    assert run_command(["verify", str(images)], stdout=subprocess.DEVNULL) == ("", 0)
