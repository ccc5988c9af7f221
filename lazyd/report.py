# SPDX-License-Identifier: MIT
"""What people and programs are told: log lines, progress, the closing summary, and the same as JSON.

Levels are criu's -v: 0 messages that scripts wait for, 1 errors, 2 warnings, 3 information, 4 debugging. A
line has a stamp of seconds since the start. Nothing here may stop a restore: a terminal or a pipe that has
gone away is ignored, and rich, which takes longer to import than all else together, is imported only when a
bar is to be drawn.

The statistics are one JSON object. Times are seconds since the start of lazyd, null for what did not happen:

    version, exit_code, images, dialect, chain_depth
    reason            why exit_code is not 0: one line; null
    seconds           loaded, listening, first_task, restored (the restorer said that all is finished), full
                      (the last task was filled or gone), end
    faults            count, and latency: p50_ns, p99_ns, max_ns, mean_ns (from the last moment the queue was
                      seen empty until the page was in: an upper bound)
    pages, bytes      image (all there is to install, forks included), by_fault, by_fill, zero, already_there,
                      poisoned, dropped (the task unmapped or dropped them unread), left, handed_back (to the
                      kernel)
    fill_bytes_per_second   background fill over the time from restored to full; null without
    events            fork, remap, remove, unmap, again (answers that had to wait for a changing layout)
    tasks             a list: number, image_pid, pid (0: not known), parent (number or null), status,
                      image_pages, left_pages
    problems          a list of lines, as they were logged
    page_server       what came from there: bytes, requests, round_trip_ns (the shortest, from a request to the
                      first byte of its answer); null without one
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lazyd.enums import IntEnum
from lazyd.errors import SystemCallError
from lazyd.hints import TYPE_CHECKING, Any, TextIO
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SIZE, human_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from lazyd.uffd import LinkInfo, TaskInfo, Totals

LINE_INTERVAL_S = 1.0
DRAW_INTERVAL_S = 0.1
# A restore that is over by then is not worth importing rich for, and nothing competes with its first faults.
DRAW_AFTER_S = 0.3


def version() -> str:
    """Return lazyd's version."""
    from importlib.metadata import version as read  # noqa: PLC0415  slow, and needed at the end only

    return read("lazyd")


class Level(IntEnum):
    """How much a line matters; criu's numbers."""

    MESSAGE = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    DEBUG = 4


_PREFIX = {Level.ERROR: "Error: ", Level.WARNING: "Warn: "}


def _age() -> float:
    """Return for how many seconds this process has lived: its imports are part of what users wait for.

    proc(5), stat: field 22 is when it started, in clock ticks since boot.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    return 0.0


class Log:
    """Lines with a stamp, to a log file or to stderr; errors go to both until detach()."""

    def __init__(self, verbosity: int = Level.INFO, *, stderr: TextIO | None = None) -> None:
        self._start = time.monotonic() - _age()
        self._verbosity = verbosity
        self._stderr: TextIO | None = stderr if stderr is not None else sys.stderr
        self._file: TextIO | None = None
        self.draw: Callable[[str], None] | None = None
        """Takes the lines for stderr while something is drawn there."""

    def open(self, path: Path) -> None:
        """Write to a file from here on, as criu does: an old one is emptied."""
        try:
            self._file = path.open("w", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise SystemCallError("opening the log file", error.errno or 0, path=path) from error

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._start

    def detach(self) -> None:
        """Forget stderr: nobody reads it any more."""
        self._stderr = None

    def say(self, level: Level, text: str) -> None:
        """Write one line, if it matters enough."""
        if level > self._verbosity:
            return
        stamp = self.elapsed()
        line = f"({int(stamp):02d}.{int(stamp * 1e6) % 1_000_000:06d}) {_PREFIX.get(level, '')}{text}"
        if self._file is not None:
            _write(self._file, line)
        if self._stderr is not None and (self._file is None or level is Level.ERROR):
            if self.draw is not None:
                self.draw(line)
            else:
                _write(self._stderr, line)

    def message(self, text: str) -> None:
        """Write what scripts wait for."""
        self.say(Level.MESSAGE, text)

    def error(self, text: str) -> None:
        """Write what went wrong."""
        self.say(Level.ERROR, text)

    def warning(self, text: str) -> None:
        """Write what may go wrong."""
        self.say(Level.WARNING, text)

    def info(self, text: str) -> None:
        """Write what is going on."""
        self.say(Level.INFO, text)

    def debug(self, text: str) -> None:
        """Write what only a search for a fault needs."""
        self.say(Level.DEBUG, text)


def _write(stream: TextIO, line: str) -> None:
    # A full disk, a closed pipe, a terminal that hung up: no reason to leave tasks without their memory.
    with contextlib.suppress(OSError, ValueError):
        stream.write(line + "\n")
        stream.flush()


class Show(IntEnum):
    """How progress is shown."""

    NOTHING = 0
    LINES = 1
    BAR = 2


class Progress:
    """Progress of a fill: a bar on a terminal, else a line a second at most, if something changed."""

    def __init__(self, log: Log, show: Show) -> None:
        self._log = log
        self._show = show
        self._begin: float | None = None
        self._next = 0.0
        self._last_said: tuple[int, int] | None = None
        self._last_rate = (0.0, 0)
        self._bar: RichProgress | None = None

    def begin(self) -> None:
        """Start: the restore is finished and background fill runs."""
        self._begin = self._log.elapsed()
        self._last_rate = (self._begin, 0)
        self._next = self._begin + (DRAW_AFTER_S if self._show is Show.BAR else LINE_INTERVAL_S)

    def due_in(self) -> float | None:
        """Return after how many seconds update() has something to do; None: never."""
        if self._begin is None or self._show is Show.NOTHING:
            return None
        return max(0.0, self._next - self._log.elapsed())

    def update(self, read_totals: Callable[[], Totals]) -> None:
        """Show what is to be shown by now."""
        due = self.due_in()
        if due is None or due > 0:
            return
        totals = read_totals()
        now = self._log.elapsed()
        done = totals.image_pages - totals.left_pages
        if self._show is Show.BAR:
            self._draw(totals, done)
            self._next = now + DRAW_INTERVAL_S
            return
        self._next = now + LINE_INTERVAL_S
        if self._last_said == (done, totals.faults):
            return
        self._last_said = (done, totals.faults)
        then, before = self._last_rate
        self._last_rate = (now, done)
        rate = (done - before) * PAGE_SIZE / max(now - then, 1e-3)
        self._log.info(
            f"filled {human_bytes(done * PAGE_SIZE)} of {human_bytes(totals.image_pages * PAGE_SIZE)}"
            f" ({_percent(done, totals.image_pages)}), {human_bytes(rate)}/s; {_faults(totals)}"
        )

    def _draw(self, totals: Totals, done: int) -> None:
        if self._bar is None:
            self._bar = _start_bar(self._log, "filling", totals.image_pages * PAGE_SIZE, ["{task.fields[said]}"])
        bar = self._bar
        bar.update(
            bar.tasks[0].id,
            total=totals.image_pages * PAGE_SIZE,
            completed=done * PAGE_SIZE,
            said=_faults(totals),
        )
        with contextlib.suppress(OSError):
            bar.refresh()

    def end(self, totals: Totals) -> None:
        """Leave the bar as it is at the end."""
        self._begin = None
        if self._bar is not None:
            self._draw(totals, totals.image_pages - totals.left_pages)
            with contextlib.suppress(OSError):
                self._bar.stop()
            self._bar = None
            self._log.draw = None


class CopyProgress:
    """Progress of a copy of known length: a bar on a terminal, else a line a second, and nothing if it is short."""

    def __init__(self, log: Log, show: Show) -> None:
        self._log = log
        self._show = show
        self._begin: float | None = None
        self._next = 0.0
        self._bar: RichProgress | None = None

    def update(self, done: int, total: int) -> None:
        """Show what is to be shown by now; bytes."""
        now = self._log.elapsed()
        if self._show is Show.NOTHING or not total:
            return
        if self._begin is None:
            self._begin = now
            self._next = now + (DRAW_AFTER_S if self._show is Show.BAR else LINE_INTERVAL_S)
        if now < self._next:
            return
        if self._show is Show.BAR:
            self._next = now + DRAW_INTERVAL_S
            self._draw(done, total)
            return
        self._next = now + LINE_INTERVAL_S
        rate = human_bytes(done / max(now - self._begin, 1e-3))
        self._log.info(f"copied {human_bytes(done)} of {human_bytes(total)} ({_percent(done, total)}), {rate}/s")

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = _start_bar(self._log, "copying", total, [])
        self._bar.update(self._bar.tasks[0].id, total=total, completed=done)
        with contextlib.suppress(OSError):
            self._bar.refresh()

    def end(self) -> None:
        """Leave the bar as it is at the end."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
            self._bar = None
            self._log.draw = None


def _start_bar(log: Log, word: str, total: int, columns: Sequence[str]) -> RichProgress:
    """Draw a bar of bytes, with columns of text behind it; what is logged goes above it."""
    # Imported here for the reason at the head of this module.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TransferSpeedColumn,
    )

    bar = Progress(
        TextColumn(word),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        *map(TextColumn, columns),
        console=Console(stderr=True),
        auto_refresh=False,
    )
    bar.add_task(word, total=total, said="")
    bar.start()

    def draw(line: str) -> None:
        with contextlib.suppress(OSError):
            bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    log.draw = draw
    return bar


class Moments(NamedTuple):
    """When what happened: seconds since the start, None for what did not."""

    loaded: float | None = None
    listening: float | None = None
    first_task: float | None = None
    restored: float | None = None
    full: float | None = None
    end: float | None = None


class Outcome(NamedTuple):
    """What one restore ended with; all that the summary and the statistics say."""

    exit_code: int
    reason: str | None
    images: str
    dialect: str | None
    chain_depth: int | None
    moments: Moments
    totals: Totals | None
    tasks: Sequence[TaskInfo]
    problems: Sequence[str]
    link: LinkInfo | None = None
    """How the link to a page server was, if there was one."""


def statistics(outcome: Outcome) -> dict[str, Any]:
    """Return the statistics as the head of this module documents them."""
    totals = outcome.totals
    pages = _pages(totals)
    return {
        "version": version(),
        "exit_code": outcome.exit_code,
        "reason": outcome.reason,
        "images": outcome.images,
        "dialect": outcome.dialect,
        "chain_depth": outcome.chain_depth,
        "seconds": outcome.moments._asdict(),
        "faults": {
            "count": totals.faults if totals else 0,
            "p50_ns": totals.quantile(0.5) if totals else 0,
            "p99_ns": totals.quantile(0.99) if totals else 0,
            "max_ns": totals.fault_ns_max if totals else 0,
            "mean_ns": totals.fault_ns_sum // max(totals.faults, 1) if totals else 0,
        },
        "pages": pages,
        "bytes": {name: count * PAGE_SIZE for name, count in pages.items()},
        "fill_bytes_per_second": fill_rate(outcome),
        "events": {
            "fork": totals.forks if totals else 0,
            "remap": totals.remaps if totals else 0,
            "remove": totals.removes if totals else 0,
            "unmap": totals.unmaps if totals else 0,
            "again": totals.again if totals else 0,
        },
        "tasks": [
            {
                "number": number,
                "image_pid": task.image_pid,
                "pid": task.run_pid,
                "parent": None if task.parent < 0 else task.parent,
                "status": task.status.name.lower(),
                "image_pages": task.image_pages,
                "left_pages": task.left_pages,
            }
            for number, task in enumerate(outcome.tasks)
        ],
        "problems": list(outcome.problems),
        "page_server": None
        if outcome.link is None
        else {
            "bytes": outcome.link.bytes,
            "requests": outcome.link.requests,
            "round_trip_ns": outcome.link.round_trip_ns,
        },
    }


def fill_rate(outcome: Outcome) -> float | None:
    """Return bytes a second of background fill, from restored to full."""
    begin, end = outcome.moments.restored, outcome.moments.full
    if outcome.totals is None or begin is None or end is None or not outcome.totals.fill_copied_pages:
        return None
    return outcome.totals.fill_copied_pages * PAGE_SIZE / max(end - begin, 1e-6)


def _pages(totals: Totals | None) -> dict[str, int]:
    return {
        "image": totals.image_pages if totals else 0,
        "by_fault": totals.fault_copied_pages if totals else 0,
        "by_fill": totals.fill_copied_pages if totals else 0,
        "zero": totals.zero_pages if totals else 0,
        "already_there": totals.present_pages if totals else 0,
        "poisoned": totals.poisoned_pages if totals else 0,
        "dropped": totals.dropped_pages if totals else 0,
        "left": totals.left_pages if totals else 0,
        "handed_back": totals.unregistered_pages if totals else 0,
    }


def summary_lines(outcome: Outcome) -> list[str]:
    """Return the summary for people."""
    totals = outcome.totals
    if totals is None or outcome.moments.first_task is None:
        return []
    moments = outcome.moments
    lines = []
    if moments.listening is not None:
        times = [f"listening after {human_seconds(moments.listening)}"]
        if moments.restored is not None:
            times.append(f"restore finished {human_seconds(moments.restored - moments.listening)} later")
            if moments.full is not None:
                times.append(f"full {human_seconds(moments.full - moments.restored)} after that")
        lines.append("times: " + ", ".join(times))
    lines.append(_faults(totals, is_full=True))
    kinds = {
        "by faults": totals.fault_copied_pages,
        "by fill": totals.fill_copied_pages,
        "zero": totals.zero_pages,
        "already there": totals.present_pages,
        "poisoned": totals.poisoned_pages,
        "dropped unread": totals.dropped_pages,
        "missing": totals.left_pages,
    }
    parts = [f"{name} {count} ({human_bytes(count * PAGE_SIZE)})" for name, count in kinds.items() if count]
    image = f"pages: {totals.image_pages} in the images ({human_bytes(totals.image_pages * PAGE_SIZE)})"
    lines.append(f"{image}; " + ", ".join(parts) if parts else image)
    rate = fill_rate(outcome)
    if rate is not None:
        lines.append(f"fill: {human_bytes(rate)}/s in the background")
    if outcome.link is not None:
        lines.append(
            f"page server: {human_bytes(outcome.link.bytes)} in {outcome.link.requests} requests,"
            f" round trip {outcome.link.round_trip_ns / 1e6:.3g} ms"
        )
    lines.append(
        f"events: {totals.forks} forks, {totals.remaps} remaps, {totals.removes} removes,"
        f" {totals.unmaps} unmaps; {totals.again} answers waited for a changing layout"
    )
    ends: dict[str, int] = {}
    for task in outcome.tasks:
        ends[task.status.name.lower()] = ends.get(task.status.name.lower(), 0) + 1
    lines.append(f"tasks: {len(outcome.tasks)}: " + ", ".join(f"{count} {name}" for name, count in ends.items()))
    if outcome.problems:
        lines.append(f"problems: {len(outcome.problems)}, the first: {outcome.problems[0]}")
    return lines


def check_statistics(path: Path) -> None:
    """Say early that statistics could not be written there when all is over."""
    from lazyd.outputs import check_writable  # noqa: PLC0415  few ask for statistics

    try:
        check_writable(path)
    except OSError as error:
        raise SystemCallError("--stats", error.errno or 0, path=path) from error


def write_statistics(path: Path, values: dict[str, Any]) -> None:
    """Write the statistics, whole or not at all."""
    import json  # noqa: PLC0415  needed at the end only

    from lazyd.outputs import write_whole  # noqa: PLC0415

    try:
        write_whole(path, json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise SystemCallError("writing the statistics", error.errno or 0, path=path) from error


def human_seconds(seconds: float) -> str:
    """Return a duration as a person reads it."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if abs(seconds) * factor >= 1:
            return f"{seconds * factor:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds * 1e9:.0f} ns"


def _faults(totals: Totals, *, is_full: bool = False) -> str:
    if not totals.faults:
        return "faults: 0"
    latency = [("p50", totals.quantile(0.5))]
    if is_full:
        latency += [("p99", totals.quantile(0.99)), ("max", totals.fault_ns_max)]
    return f"faults: {totals.faults}, " + ", ".join(f"{name} {human_seconds(ns / 1e9)}" for name, ns in latency)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part // whole}%" if whole else "100%"
