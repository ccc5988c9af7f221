# SPDX-License-Identifier: MIT
"""The verbs that build a task again: restore, and in place, rewind. Arguments and exit codes, as in cli."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lazyd.arguments import Parser, add_telling, count, log_of, options_of, rate
from lazyd.errors import UsageError

_USAGE = """\
lazyd restore -D DIR [options]             build the process again; it runs at once, its memory comes as it is asked for
       lazyd restore -D DIR --eager [options]     fill its memory first; lazyd ends when the process runs
       lazyd restore -D DIR --stopped [options]   leave it empty and stopped, for `lazyd -D DIR --pid PID`
       lazyd rewind -D DIR --pid PID [options]    put a live process back to its own checkpoint, in place"""
_DEFAULT_VERBOSITY = 2


def _make_parser() -> Parser:
    parser = Parser("lazyd restore", _USAGE)
    images = parser.add_argument_group("images")
    images.add_argument("-D", "--images-dir", "--images", metavar="DIR", type=Path, help="directory of the images")
    images.add_argument(
        "--pagemap-format",
        choices=("auto", "booleans", "flags"),
        default="auto",
        help="which writer's pagemap entries the images hold, where they do not say it themselves",
    )
    images.add_argument("-t", "--pid", metavar="PID", type=int, help="rewind: the process")
    how = parser.add_argument_group("how")
    how.add_argument("--eager", action="store_true", help="fill all memory before the process runs")
    how.add_argument("-s", "--stopped", "--leave-stopped", action="store_true", help="leave it stopped, as by SIGSTOP")
    serving = parser.add_argument_group("serving, until all memory is there")
    serving.add_argument("--fill", choices=("full", "off"), help="fill in the background (full), or only on demand")
    serving.add_argument("--fill-rate", metavar="BYTES", type=rate, help="bytes a second, as 512K, 64M or 2G")
    serving.add_argument("--workers", metavar="N", type=count, help="threads (as many as cores, at most 4)")
    serving.add_argument("-d", "--daemon", action="store_true", help="go into the background once the process runs")
    serving.add_argument("--pidfile", metavar="FILE", type=Path, help="write lazyd's pid to this file")
    serving.add_argument(
        "--status-fd", metavar="FD", type=count, help="write one zero byte there once the process runs"
    )
    telling = parser.add_argument_group("telling")
    telling.add_argument("-W", "--work-dir", metavar="DIR", type=Path, help="where pidfile and log go (as -D)")
    telling.add_argument("-o", "--log-file", metavar="FILE", type=Path, help="log to this file in the work directory")
    telling.add_argument("--stats", metavar="FILE", type=Path, help="write the closing statistics as JSON")
    add_telling(telling, _DEFAULT_VERBOSITY)
    criu = parser.add_argument_group("taken as criu takes them")
    criu.add_argument("-j", "--shell-job", action="store_true", help="no meaning here: a terminal is always handed on")
    criu.add_argument("--lazy-pages", action="store_true", help="no meaning here: lazy is what it is without --eager")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line whose verb is restore or rewind; UsageError if it makes no sense."""
    given = _make_parser().parse_words(arguments)
    if len(given.words) != 1:
        raise UsageError(f"lazyd: {given.words[1]}: one word too many")
    if given.images_dir is None:
        raise UsageError(f"lazyd {given.words[0]}: from where? -D DIR is needed")
    if given.words[0] == "rewind":
        if given.pid is None or given.pid <= 0:
            raise UsageError("lazyd rewind: which process? --pid PID is needed")
        if given.eager or given.stopped:
            raise UsageError("lazyd rewind: --eager and --stopped are for lazyd restore")
    elif given.pid is not None:
        raise UsageError("lazyd restore: the process gets the pid that it had; --pid is for lazyd rewind")
    if given.eager or given.stopped:
        which = "--eager" if given.eager else "--stopped"
        for name in ("fill", "fill_rate", "daemon", "pidfile", "stats", "workers", "lazy_pages"):
            if getattr(given, name):
                raise UsageError(f"lazyd restore: --{name.replace('_', '-')} is about serving, {which} serves nothing")
    if given.fill == "off" and given.fill_rate:
        raise UsageError("lazyd restore: --fill-rate is for a fill that --fill off turns off")
    return given


def run(arguments: Sequence[str]) -> int:
    """Run restore or rewind."""
    given = parse(arguments)

    from lazyd.daemon import Announcement, Restore, serve  # noqa: PLC0415  users of other verbs do not wait for it

    options = options_of(given)._replace(restore=Restore(given.pid or 0))
    log = log_of(given, _DEFAULT_VERBOSITY)
    if not (given.eager or given.stopped):
        return serve(options, log)
    if given.log_file is not None:
        log.open(options.work / given.log_file)

    from lazyd.restore.build import restore_alone  # noqa: PLC0415  only these two ways need it at once

    announcement = Announcement(options.pidfile, options.status_fd)
    pid, warning = restore_alone(given.images_dir, given.pagemap_format, is_eager=given.eager, stopped=given.stopped)
    if warning:
        log.warning(warning)
    announcement.write()
    log.message(f"restored {pid}{', which is stopped' if given.stopped else ''}")
    return 0
