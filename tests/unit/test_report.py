# SPDX-License-Identifier: MIT
"""Log lines, progress, the summary for people, and the statistics for programs."""

from __future__ import annotations

import io
import json
import re

import pytest

from lazyd import report
from lazyd.errors import SystemCallError
from lazyd.report import Level, Log, Moments, Outcome, Progress, Show
from lazyd.uffd import TaskInfo, TaskStatus

LINE = re.compile(r"\(\d{2,}\.\d{6}\) (.*)")


class FakeTotals:
    """What the engine would have counted."""

    def __init__(self, **counts):
        for name in report_counters():
            setattr(self, name, counts.get(name, 0))

    def quantile(self, share):
        return int(1000 * share)


def report_counters():
    return [
        *(
            "faults",
            "fault_copied_pages",
            "fill_copied_pages",
            "zero_pages",
            "present_pages",
            "poisoned_pages",
        ),
        *("dropped_pages", "image_pages", "left_pages", "forks", "remaps", "removes", "unmaps", "again"),
        *("unregistered_pages", "fault_ns_max", "fault_ns_sum", "fill_ns", "tasks", "serving"),
    ]


def texts(stream):
    """The lines of a log, without their stamps."""
    return [LINE.fullmatch(line)[1] for line in stream.getvalue().splitlines()]


def test_the_fakes_count_what_the_engine_counts():
    from lazyd.uffd import ffi  # noqa: PLC0415

    names = {name for name, _ in ffi.typeof("struct lz_totals").fields}
    assert set(report_counters()) == names - {"fault_ns"}


@pytest.mark.parametrize(
    ("verbosity", "said"),
    [
        (0, ["m"]),
        (1, ["m", "Error: e"]),
        (2, ["m", "Error: e", "Warn: w"]),
        (3, ["m", "Error: e", "Warn: w", "i"]),
        (4, ["m", "Error: e", "Warn: w", "i", "d"]),
    ],
)
def test_levels(verbosity, said):
    stream = io.StringIO()
    log = Log(verbosity, stderr=stream)
    log.message("m")
    log.error("e")
    log.warning("w")
    log.info("i")
    log.debug("d")
    assert texts(stream) == said


def test_errors_go_to_the_log_file_and_to_stderr(tmp_path):
    stream = io.StringIO()
    log = Log(Level.INFO, stderr=stream)
    path = tmp_path / "log"
    path.write_text("old\n")
    log.open(path)
    log.info("quiet")
    log.error("loud")
    log.detach()
    log.error("unheard")
    assert texts(stream) == ["Error: loud"]
    assert [LINE.fullmatch(line)[1] for line in path.read_text().splitlines()] == [
        "quiet",
        "Error: loud",
        "Error: unheard",
    ]


def test_a_log_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(SystemCallError, match="opening the log file: ENOENT"):
        Log().open(tmp_path / "none" / "log")


def test_a_stream_that_is_gone_is_no_reason_to_stop():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    Log(stderr=Gone()).error("nobody hears")
    closed = io.StringIO()
    closed.close()
    Log(stderr=closed).error("nobody hears")


def at(log, seconds):
    """Let a log believe that so much time has passed."""
    log.elapsed = lambda: seconds


def test_progress_is_a_line_a_second_and_only_on_change():
    stream = io.StringIO()
    log = Log(stderr=stream)
    progress = Progress(log, Show.LINES)
    done = 0

    def totals():
        return FakeTotals(image_pages=1000, left_pages=1000 - done, faults=done)

    at(log, 0.0)
    assert progress.due_in() is None
    progress.begin()
    for tenth in range(1, 51):
        at(log, tenth / 10)
        done = min(tenth * 10, 250)
        progress.update(totals)
    said = texts(stream)
    assert len(said) == 3
    assert said[0] == "filled 400.0 KiB of 3.9 MiB (10%), 400.0 KiB/s; faults: 100, p50 500 ns"
    assert progress.due_in() > 0


def test_no_progress_says_nothing():
    stream = io.StringIO()
    log = Log(stderr=stream)
    progress = Progress(log, Show.NOTHING)
    progress.begin()
    at(log, 100.0)
    assert progress.due_in() is None
    progress.update(lambda: pytest.fail("asked for nothing"))
    progress.end(FakeTotals())
    assert stream.getvalue() == ""


def test_the_bar_leaves_the_log_lines_whole(capsys):
    log = Log()
    progress = Progress(log, Show.BAR)
    at(log, 0.0)
    progress.begin()
    at(log, 1.0)
    progress.update(lambda: FakeTotals(image_pages=100, left_pages=50, faults=3))
    log.info("[red]beside the bar, at [0x1000]")
    progress.end(FakeTotals(image_pages=100))
    log.info("after it")
    error = capsys.readouterr().err
    assert "[red]beside the bar, at [0x1000]" in error
    assert "after it" in error
    assert log.draw is None


def outcome(**changes):
    totals = FakeTotals(
        faults=10,
        fault_copied_pages=30,
        fill_copied_pages=1000,
        zero_pages=5,
        poisoned_pages=2,
        image_pages=1032,
        fault_ns_max=2_000_000,
        fault_ns_sum=90_000,
        forks=1,
        again=4,
    )
    tasks = [
        TaskInfo(100, 4711, TaskStatus.FILLED, -1, 1030, 0),
        TaskInfo(100, 0, TaskStatus.GONE, 0, 2, 0),
    ]
    values = Outcome(
        exit_code=1,
        reason="bad",
        images="d",
        dialect="flags",
        chain_depth=2,
        moments=Moments(loaded=0.04, listening=0.05, first_task=1.0, restored=1.5, full=3.5, end=3.6),
        totals=totals,
        tasks=tasks,
        problems=["bad", "worse"],
    )
    return values._replace(**changes)


def test_the_summary_says_what_people_ask():
    text = "\n".join(report.summary_lines(outcome()))
    assert "listening after 50 ms, restore finished 1.45 s later, full 2 s after that" in text
    assert "faults: 10, p50 500 ns, p99 990 ns, max 2 ms" in text
    assert "1032 in the images (4.0 MiB)" in text
    assert "by faults 30 (120.0 KiB), by fill 1000 (3.9 MiB), zero 5 (20.0 KiB), poisoned 2" in text
    assert "fill: 2.0 MiB/s" in text
    assert "1 forks" in text
    assert "tasks: 2: 1 filled, 1 gone" in text
    assert "problems: 2, the first: bad" in text


def test_there_is_no_summary_of_nothing():
    assert report.summary_lines(outcome(moments=Moments(), totals=None)) == []
    assert report.summary_lines(outcome(moments=Moments(listening=1.0))) == []


def documented_keys():
    """The keys that the head of the module names, by the group that they are in."""
    text = report.__doc__.split("null for what did not happen:")[1]
    groups = re.findall(r"^    (\w+(?:, \w+)*) *(.*(?:\n {20,}.*)*)", text, re.M)
    return {name: words for names, words in groups for name in names.split(", ")}


def test_the_statistics_are_as_documented():
    values = report.statistics(outcome())
    assert set(values) == set(documented_keys())
    for group in ("seconds", "faults", "pages", "events"):
        for name in values[group]:
            assert re.search(rf"\b{name}\b", documented_keys()[group]), f"{group}.{name} is not documented"
    assert values["bytes"] == {name: 4096 * count for name, count in values["pages"].items()}
    assert values["tasks"][1] == {
        "number": 1,
        "image_pid": 100,
        "pid": 0,
        "parent": 0,
        "status": "gone",
        "image_pages": 2,
        "left_pages": 0,
    }
    assert values["fill_bytes_per_second"] == 1000 * 4096 / 2
    assert values["faults"]["mean_ns"] == 9000
    assert json.loads(json.dumps(values)) == values


def test_the_statistics_of_a_failure_have_the_same_keys():
    failed = outcome(totals=None, moments=Moments(end=0.1), tasks=(), problems=("bad",))
    assert set(report.statistics(failed)) == set(report.statistics(outcome()))


def test_statistics_are_written_whole(tmp_path):
    path = tmp_path / "stats.json"
    path.write_text("old")
    report.write_statistics(path, {"exit_code": 0})
    assert json.loads(path.read_text()) == {"exit_code": 0}
    assert [entry.name for entry in tmp_path.iterdir()] == ["stats.json"]
    with pytest.raises(SystemCallError, match="writing the statistics: E"):
        report.write_statistics(tmp_path / "none" / "stats.json", {})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ns"),
        (9e-8, "90 ns"),
        (1.5e-5, "15 µs"),
        (0.012345, "12.3 ms"),
        (1.0, "1 s"),
        (4711.0, "4711 s"),
    ],
)
def test_durations_for_people(seconds, text):
    assert report.human_seconds(seconds) == text
