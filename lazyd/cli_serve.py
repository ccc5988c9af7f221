# SPDX-License-Identifier: MIT
"""The verb page-server. Arguments and exit codes, as in cli; options are those of `criu page-server`."""

from __future__ import annotations

import argparse
import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from lazyd.arguments import Parser, add_telling, count, log_of
from lazyd.errors import SystemCallError, UsageError
from lazyd.hints import TYPE_CHECKING
from lazyd.image.chain import PARENT_LINK
from lazyd.tls.settings import add_options, files_of

if TYPE_CHECKING:
    from lazyd.serve.connection import Desk
    from lazyd.tls.handshake import Endpoint

_USAGE = "lazyd page-server -D DIR --port N [options]   take dumps into a directory, or give out the pages in it"
_DEFAULT_VERBOSITY = 3
_PORT_MAX = 65535


def _make_parser() -> Parser:
    parser = Parser("lazyd page-server", _USAGE)
    files = parser.add_argument_group("files")
    files.add_argument("-D", "--images-dir", "--images", metavar="DIR", type=Path, help="directory of the images")
    files.add_argument("-W", "--work-dir", metavar="DIR", type=Path, help="where log and pidfile go (as -D)")
    files.add_argument("-o", "--log-file", metavar="FILE", type=Path, help="log to this file in the work directory")
    files.add_argument("--pidfile", metavar="FILE", type=Path, help="write the pid to this file in the work directory")
    serving = parser.add_argument_group("serving")
    serving.add_argument("--address", metavar="HOST", default="0.0.0.0", help="listen there (everywhere)")
    serving.add_argument("--port", metavar="N", type=count, help="listen on this port; 0: on any, which the log tells")
    serving.add_argument("--ps-socket", metavar="FD", type=count, help="serve this connected socket, and end")
    serving.add_argument(
        "--lazy-pages", action="store_true", help="give out pages, too, as often as they are asked for"
    )
    serving.add_argument("--prev-images-dir", metavar="DIR", help="what dumps are on top of, as seen from -D")
    serving.add_argument("--auto-dedup", action="store_true", help="free in it what new dumps replace")
    serving.add_argument(
        "--pagemap-format",
        choices=("auto", "booleans", "flags"),
        default="auto",
        help="which writer's pagemap entries the images hold, where they do not say it themselves",
    )
    running = parser.add_argument_group("running")
    running.add_argument("-d", "--daemon", action="store_true", help="go into the background once listening")
    running.add_argument("--status-fd", metavar="FD", type=count, help="write one zero byte there once listening")
    add_telling(parser.add_argument_group("telling"), _DEFAULT_VERBOSITY)
    add_options(parser.add_argument_group("TLS"))
    criu = parser.add_argument_group("taken as criu takes them")
    criu.add_argument("--no-default-config", action="store_true", help="no meaning here: no configuration is read")
    criu.add_argument("-j", "--shell-job", action="store_true", help="no meaning here")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line with the verb page-server; UsageError if it makes no sense."""
    given = _make_parser().parse_words(arguments)
    if given.words != ["page-server"]:
        extra = next((word for word in given.words if word != "page-server"), "page-server")
        raise UsageError(f"lazyd: {extra}: one word too many")
    if given.images_dir is None:
        raise UsageError("lazyd page-server: which directory? -D DIR is needed")
    if given.port is None and given.ps_socket is None:
        raise UsageError("lazyd page-server: where to listen? --port N is needed")
    if given.port is not None and given.port > _PORT_MAX:
        raise UsageError(f"lazyd page-server: --port {given.port}: ports go up to {_PORT_MAX}")
    return given


def run(arguments: Sequence[str]) -> int:
    """Run page-server."""
    given = parse(arguments)

    from lazyd.daemon import check_outputs  # noqa: PLC0415  users of other verbs do not wait for it
    from lazyd.serve.connection import Desk  # noqa: PLC0415
    from lazyd.serve.shelves import Shelves  # noqa: PLC0415

    check_outputs(given.status_fd, None)
    images = given.images_dir.absolute()
    if not images.is_dir():
        number = errno.ENOTDIR if images.exists() else errno.ENOENT
        raise SystemCallError("opendir", number, path=given.images_dir, hint="-D names the directory of the images")
    work = images if given.work_dir is None else given.work_dir.absolute()
    connection = None if given.ps_socket is None else _inherited(given.ps_socket)
    log = log_of(given, _DEFAULT_VERBOSITY)
    if given.log_file is not None:
        log.open(work / given.log_file)
    if given.prev_images_dir is not None:
        _link_parent(images, given.prev_images_dir)
    shelves = Shelves(images, given.pagemap_format) if given.lazy_pages else None
    desk = Desk(log, images, shelves, auto_dedup=given.auto_dedup)
    pidfile = None if given.pidfile is None else work / given.pidfile
    return _serve(given, desk, connection, pidfile)


def _endpoint(given: argparse.Namespace) -> Endpoint | None:
    files = files_of(given)
    if files is None:
        return None
    from lazyd.tls.handshake import Endpoint, Side  # noqa: PLC0415  ssl takes its time

    return Endpoint(files, Side.SERVER)


def _serve(given: argparse.Namespace, desk: Desk, connection: socket.socket | None, pidfile: Path | None) -> int:
    from lazyd.daemon import Announcement, into_background, leave_terminal  # noqa: PLC0415  see run()
    from lazyd.serve.server import Server, prepare_process  # noqa: PLC0415
    from lazyd.session.signals import hold_signals, signals_as_bytes  # noqa: PLC0415
    from lazyd.tcp import listen  # noqa: PLC0415

    server = Server(desk, _endpoint(given))
    name = f"descriptor {given.ps_socket}"
    is_well = True
    with listen(given.address, given.port) if connection is None else connection as ours:
        announcement = Announcement(pidfile, given.status_fd)
        ready = None
        if given.daemon:
            ready = into_background(lambda: None)
            if ready is None:
                return 0
        hold_signals()
        # Before anyone hears that we listen: who asked for any port reads here which it is.
        if connection is None:
            host, port = ours.getsockname()[:2]
            name = f"{host}:{port}"
        desk.log.message(f"listening on {name}")
        announcement.write()
        if ready is not None:
            leave_terminal(desk.log)
            os.write(ready, b"\0")
            os.close(ready)
        prepare_process()
        with signals_as_bytes() as stop:
            if connection is None:
                server.run(ours, stop)
                desk.log.info("ended by a signal")
            else:
                is_well = server.run_one(connection, name, stop)
    return 0 if is_well else 1


def _link_parent(images: Path, parent: str) -> None:
    """Make the link `parent`, unless it is there."""
    link = images / PARENT_LINK
    try:
        if not link.is_symlink():
            link.symlink_to(parent)
    except OSError as error:
        raise SystemCallError("symlink", error.errno or 0, path=link) from error
    if str(link.readlink()) != parent:
        raise UsageError(f"{link}: names {link.readlink()}, not {parent}: dumps go on top of one directory")
    if not link.is_dir():
        raise SystemCallError("opendir", errno.ENOENT, path=link, hint=f"--prev-images-dir {parent}: seen from -D")


def _inherited(fd: int) -> socket.socket:
    try:
        connection = socket.socket(fileno=fd)
        connection.getpeername()
    except OSError as error:
        raise SystemCallError(f"--ps-socket {fd}", error.errno or errno.EBADF) from error
    return connection
