# SPDX-License-Identifier: MIT
"""The verbs that build a task again: restore, and in place, rewind. Arguments and exit codes, as in cli."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lazyd.errors import UsageError

_USAGE = """\
lazyd restore -D DIR [options]             build the process again; it runs at once, its memory comes as it is asked for
       lazyd restore -D DIR --eager [options]     fill its memory first; lazyd ends when the process runs
       lazyd restore -D DIR --stopped [options]   leave it empty and stopped, for `lazyd -D DIR --pid PID`
       lazyd rewind -D DIR --pid PID [options]    put a live process back to its own checkpoint, in place"""
_DEFAULT_VERBOSITY = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Leave it to main() to say it in one line."""
        raise UsageError(f"lazyd restore: {message} (lazyd restore --help shows the options)")


def _make_parser(verbosity: type[argparse.Action], rate: Callable[[str], int]) -> _Parser:
    parser = _Parser(prog="lazyd restore", usage=_USAGE, add_help=False)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
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
    serving.add_argument("-d", "--daemon", action="store_true", help="go into the background once the process runs")
    serving.add_argument("--pidfile", metavar="FILE", type=Path, help="write lazyd's pid to this file")
    serving.add_argument("--status-fd", metavar="FD", type=int, help="write one zero byte there once the process runs")
    telling = parser.add_argument_group("telling")
    telling.add_argument("-W", "--work-dir", metavar="DIR", type=Path, help="where pidfile and log go (as -D)")
    telling.add_argument("-o", "--log-file", metavar="FILE", type=Path, help="log to this file in the work directory")
    telling.add_argument("--stats", metavar="FILE", type=Path, help="write the closing statistics as JSON")
    telling.add_argument("-v", action=verbosity, nargs=0, dest="verbosity", help="-v1 errors … -v4 debugging (-v2)")
    telling.add_argument("--verbosity", action=verbosity, metavar="N", help=argparse.SUPPRESS)
    telling.add_argument("--no-progress", action="store_true", help="no bar and no progress lines")
    telling.add_argument("-h", "--help", action="help", help="show this and exit")
    criu = parser.add_argument_group("taken as criu takes them")
    criu.add_argument("-j", "--shell-job", action="store_true", help="no meaning here: a terminal is always handed on")
    criu.add_argument("--lazy-pages", action="store_true", help="no meaning here: lazy is what it is without --eager")
    return parser


def parse(
    arguments: Sequence[str],
    spell_out: Callable[[Sequence[str]], list[str]],
    verbosity: type[argparse.Action],
    rate: Callable[[str], int],
) -> argparse.Namespace:
    """Parse a command line whose verb is restore or rewind; UsageError if it makes no sense."""
    given = _make_parser(verbosity, rate).parse_intermixed_args(spell_out(arguments))
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
        for name in ("fill", "fill_rate", "daemon", "pidfile", "stats", "lazy_pages"):
            if getattr(given, name):
                raise UsageError(f"lazyd restore: --{name.replace('_', '-')} is about serving, {which} serves nothing")
    if given.fill == "off" and given.fill_rate:
        raise UsageError("lazyd restore: --fill-rate is for a fill that --fill off turns off")
    return given


def run(
    arguments: Sequence[str],
    spell_out: Callable[[Sequence[str]], list[str]],
    verbosity: type[argparse.Action],
    rate: Callable[[str], int],
) -> int:
    """Run restore or rewind."""
    given = parse(arguments, spell_out, verbosity, rate)
    gc.disable()  # all that is imported stays: to look for garbage in it takes a tenth of the start

    from lazyd.daemon import Announcement, Options, Restore, serve  # noqa: PLC0415  users of other verbs do not wait for it
    from lazyd.report import Log, Show  # noqa: PLC0415
    from lazyd.session import Settings  # noqa: PLC0415
    from lazyd.uffd import Fill  # noqa: PLC0415

    show = Show.LINES
    if given.no_progress:
        show = Show.NOTHING
    elif sys.stderr.isatty() and given.log_file is None and not given.daemon:
        show = Show.BAR
    fill = Fill.OFF if given.fill == "off" else Fill.FULL
    options = Options(
        settings=Settings(given.images_dir, given.pagemap_format, fill, given.fill_rate or 0, workers=0),
        work=given.work_dir if given.work_dir is not None else given.images_dir,
        log_file=given.log_file,
        pidfile=given.pidfile,
        status_fd=given.status_fd,
        statistics=given.stats,
        is_daemon=given.daemon,
        show=show,
        restore=Restore(given.pid or 0),
    )
    log = Log(_DEFAULT_VERBOSITY if given.verbosity is None else given.verbosity)
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
