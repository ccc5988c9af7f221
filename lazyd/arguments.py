# SPDX-License-Identifier: MIT
"""What the command lines of all verbs have in common: how they are read, and what of them is about serving."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from lazyd.errors import UsageError
from lazyd.hints import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from lazyd.daemon import Options
    from lazyd.report import Log, Show

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_RATE = r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?(?:/s)?"


class _Help(argparse.HelpFormatter):
    """As wide as the terminal. argparse asks shutil how wide that is, whose import every start would wait for."""

    def __init__(self, prog: str) -> None:
        try:
            columns = os.get_terminal_size().columns
        except OSError:
            columns = 0
        super().__init__(prog, width=(columns or 120) - 2)


# argparse's own words stay as they are: to look for a translation, which it does not come with, takes a millisecond.
vars(argparse)["_"] = str


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, which main() says."""

    def __init__(self, prog: str, usage: str) -> None:
        super().__init__(prog=prog, usage=usage, add_help=False, formatter_class=_Help)
        self.add_argument("words", nargs="*", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Leave it to main() to say it."""
        raise UsageError(f"{self.prog}: {message} ({self.prog} --help shows the options)")

    def parse_words(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse a command line as getopt_long takes it: options before, between and after the words."""
        return self.parse_intermixed_args(spell_out(arguments))


class Verbosity(argparse.Action):
    """Count -v as criu does: each one more; -vN, taken apart by spell_out, says it outright."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[str] | None,
        option_string: str | None = None,
    ) -> None:
        if isinstance(values, str):
            if not values.isdigit():
                parser.error(f"--verbosity={values}: not a number")
            namespace.verbosity = int(values)
        else:
            namespace.verbosity = (namespace.verbosity or 0) + 1


def spell_out(arguments: Sequence[str]) -> list[str]:
    """Replace what argparse cannot: an option whose value is optional and joined (-v4, --verbosity)."""
    spelled = []
    for argument in arguments:
        if match := re.fullmatch(r"-([dj]*)v(\d+)", argument):
            spelled += [f"-{match[1]}"] if match[1] else []
            spelled.append(f"--verbosity={match[2]}")
        else:
            spelled.append("-v" if argument == "--verbosity" else argument)
    return spelled


def rate(text: str) -> int:
    """Return bytes a second, of an argument."""
    match = re.fullmatch(_RATE, text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text}: not a rate such as 64M")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


def count(text: str) -> int:
    """Return a number that is not negative, of an argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: not a number")
    return int(text)


def add_telling(telling: argparse._ArgumentGroup, verbosity: int) -> None:
    """Add how much a verb tells; `verbosity` is by default."""
    help_ = f"-v1 errors … -v4 debugging (-v{verbosity})"
    telling.add_argument("-v", action=Verbosity, nargs=0, dest="verbosity", help=help_)
    telling.add_argument("--verbosity", action=Verbosity, metavar="N", help=argparse.SUPPRESS)
    telling.add_argument("--no-progress", action="store_true", help="no bar and no progress lines")
    telling.add_argument("-h", "--help", action="help", help="show this and exit")


def log_of(given: argparse.Namespace, verbosity: int) -> Log:
    """Return a log that says as much as was asked for, or by default."""
    from lazyd.report import Log  # noqa: PLC0415  see the head of cli

    return Log(verbosity if given.verbosity is None else given.verbosity)


def show_of(given: argparse.Namespace, *, is_daemon: bool) -> Show:
    """Return how progress is shown."""
    from lazyd.report import Show  # noqa: PLC0415

    if given.no_progress:
        return Show.NOTHING
    return Show.BAR if sys.stderr.isatty() and given.log_file is None and not is_daemon else Show.LINES


def options_of(given: argparse.Namespace) -> Options:
    """Return what is said about serving."""
    from lazyd.daemon import Options  # noqa: PLC0415
    from lazyd.session import Settings  # noqa: PLC0415
    from lazyd.uffd import Fill  # noqa: PLC0415

    return Options(
        settings=Settings(
            images=given.images_dir,
            dialect=given.pagemap_format or "auto",
            fill=Fill.OFF if given.fill == "off" else Fill.FULL,
            fill_rate=given.fill_rate or 0,
            workers=given.workers or 0,
        ),
        work=given.work_dir if given.work_dir is not None else given.images_dir,
        log_file=given.log_file,
        pidfile=given.pidfile,
        status_fd=given.status_fd,
        statistics=given.stats,
        is_daemon=given.daemon,
        show=show_of(given, is_daemon=given.daemon),
    )
