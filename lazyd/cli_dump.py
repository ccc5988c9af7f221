# SPDX-License-Identifier: MIT
"""The verbs that make images: dump and pre-dump. Arguments and exit codes, as in cli."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from lazyd.arguments import Parser, add_telling, log_of, show_of
from lazyd.errors import LazydError, UsageError
from lazyd.hints import TYPE_CHECKING
from lazyd.tls.settings import add_options, files_of

if TYPE_CHECKING:
    from lazyd.report import Log

_USAGE = """\
lazyd dump --pid PID -D DIR [options]      stop a process, write images of it, and kill it
       lazyd pre-dump --pid PID -D DIR [options]  write images, let it go on, and track what it writes"""
_DEFAULT_VERBOSITY = 2
_PORT_MAX = 65535


def _make_parser() -> Parser:
    parser = Parser("lazyd dump", _USAGE)
    what = parser.add_argument_group("what")
    what.add_argument("-t", "--pid", metavar="PID", type=int, help="the process")
    what.add_argument("--tree", action="store_true", help="its children and theirs too")
    images = parser.add_argument_group("images")
    images.add_argument("-D", "--images-dir", "--images", metavar="DIR", type=Path, help="where they go: new or empty")
    images.add_argument("--parent", metavar="DIR", type=Path, help="the dump before: what has not changed stays there")
    images.add_argument(
        "--pagemap-format",
        choices=("flags", "booleans"),
        default="flags",
        help="flags: what criu restore reads (the default); booleans: with zero holes, for lazyd",
    )
    images.add_argument("--auto-dedup", action="store_true", help="free in the parents what these images replace")
    after = parser.add_argument_group("afterwards (dump kills the process, pre-dump leaves it running)")
    after.add_argument("-R", "--leave-running", action="store_true", help="leave it running")
    after.add_argument("-s", "--leave-stopped", action="store_true", help="leave it stopped, as by SIGSTOP")
    after.add_argument("--track-mem", action="store_true", help="track what it writes from here on, as pre-dump does")
    remote = parser.add_argument_group("memory to a page server")
    remote.add_argument("--page-server", action="store_true", help="send the memory there instead of writing it")
    remote.add_argument("--address", metavar="HOST")
    remote.add_argument("--port", metavar="N", type=int)
    remote.add_argument(
        "--page-server-header",
        choices=("24", "32"),
        help="bytes of its messages' headers: 24 for criu up to 4.1 (the default), 32 from 4.2 on",
    )
    add_options(remote)
    telling = parser.add_argument_group("telling")
    telling.add_argument("-o", "--log-file", metavar="FILE", type=Path, help="log to this file in the images' folder")
    telling.add_argument("--stats", metavar="FILE", type=Path, help="write what was dumped as JSON")
    add_telling(telling, _DEFAULT_VERBOSITY)
    criu = parser.add_argument_group("taken as criu takes them")
    criu.add_argument("-j", "--shell-job", action="store_true", help="no meaning here: a terminal is always dumped")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line whose verb is dump or pre-dump; UsageError if it makes no sense."""
    given = _make_parser().parse_words(arguments)
    if len(given.words) != 1:
        raise UsageError(f"lazyd: {given.words[1]}: one word too many")
    verb = given.words[0]
    if given.pid is None:
        raise UsageError(f"lazyd {verb}: which process? --pid PID is needed")
    if given.pid <= 0:
        raise UsageError(f"lazyd {verb}: --pid {given.pid}: not a pid")
    if given.images_dir is None:
        raise UsageError(f"lazyd {verb}: where to? -D DIR is needed")
    if given.leave_running and given.leave_stopped:
        raise UsageError(f"lazyd {verb}: --leave-running and --leave-stopped: one of them")
    if verb == "pre-dump" and given.leave_stopped:
        raise UsageError("lazyd pre-dump: --leave-stopped: a pre-dump leaves the process running")
    if given.track_mem and verb == "dump" and not given.leave_running:
        raise UsageError("lazyd dump: --track-mem is for a process that is left running (--leave-running)")
    if given.auto_dedup and given.parent is None:
        raise UsageError(f"lazyd {verb}: --auto-dedup frees space in the parent: --parent DIR is needed")
    if given.page_server:
        if given.address is None or given.port is None:
            raise UsageError(f"lazyd {verb}: --page-server: --address HOST and --port N are needed")
        if not 0 < given.port <= _PORT_MAX:
            raise UsageError(f"lazyd {verb}: --port {given.port}: not a port")
        for name in ("parent", "auto_dedup", "track_mem"):
            if getattr(given, name):
                option = name.replace("_", "-")
                raise UsageError(f"lazyd {verb}: --{option} is about images here, --page-server puts them elsewhere")
        if verb == "pre-dump":
            raise UsageError("lazyd pre-dump: --page-server: what is tracked is bound to images here")
    elif given.address or given.port or given.page_server_header or given.tls:
        raise UsageError(f"lazyd {verb}: --address, --port, --page-server-header and --tls are for --page-server")
    return given


def _open_log(log: Log, directory: Path, name: Path) -> None:
    """Log to a file in the images' folder, which is made if need be, and not left if the file cannot be made."""
    is_new = False
    with contextlib.suppress(OSError):
        directory.mkdir()
        is_new = True
    try:
        log.open(directory / name)
    except LazydError:
        if is_new:
            directory.rmdir()
        raise


def run(arguments: Sequence[str]) -> int:
    """Run dump or pre-dump."""
    given = parse(arguments)

    from lazyd.dump.core import PagemapFormat  # noqa: PLC0415  users of other verbs do not wait for it
    from lazyd.dump.run import DIALECTS, After, Settings, dump, statistics, summary_lines  # noqa: PLC0415
    from lazyd.report import check_statistics, write_statistics  # noqa: PLC0415

    is_pre_dump = given.words[0] == "pre-dump"
    after = After.KILL
    if is_pre_dump or given.leave_running:
        after = After.RUN
    elif given.leave_stopped:
        after = After.STOP
    log = log_of(given, _DEFAULT_VERBOSITY)
    if given.stats is not None:
        check_statistics(given.stats)
    may_hold = []
    if given.log_file is not None:
        _open_log(log, given.images_dir, given.log_file)
        may_hold = [given.log_file.name]
    settings = Settings(
        pid=given.pid,
        images=given.images_dir,
        parent=given.parent,
        with_children=given.tree,
        after=after,
        is_tracking=is_pre_dump or given.track_mem,
        form=PagemapFormat(DIALECTS[given.pagemap_format]),
        auto_dedup=given.auto_dedup,
        page_server=(given.address, given.port, int(given.page_server_header or 24)) if given.page_server else None,
        tls=files_of(given),
        may_hold=may_hold,
        show=show_of(given, is_daemon=False),
    )
    dumped = dump(settings, log)
    for line in summary_lines(dumped):
        log.message(line)
    if given.stats is not None:
        write_statistics(given.stats, statistics(dumped))
    return 0
