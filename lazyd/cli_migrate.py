# SPDX-License-Identifier: MIT
"""The verb migrate, at both ends. Arguments and exit codes, as in cli."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lazyd.arguments import Parser, add_telling, count, log_of
from lazyd.errors import UsageError
from lazyd.tls.settings import add_options, files_of

_USAGE = """\
lazyd migrate --listen [HOST:]PORT -D DIR [options]   at the destination: take one migration
       lazyd migrate --pid PID --to HOST:PORT [options]     at the source: send a process and its children there"""
_DEFAULT_VERBOSITY = 3
_PORT_MAX = 65535


def _make_parser() -> Parser:
    parser = Parser("lazyd migrate", _USAGE)
    source = parser.add_argument_group("at the source")
    source.add_argument("-t", "--pid", metavar="PID", type=count, help="the process; its children go with it")
    source.add_argument("--to", metavar="HOST:PORT", help="where the destination listens")
    source.add_argument(
        "--unlock-source", action="store_true", help="remove criu's nftables lock at the end: the address has moved"
    )
    destination = parser.add_argument_group("at the destination")
    destination.add_argument(
        "--listen", metavar="[HOST:]PORT", help="listen there (127.0.0.1); port 0: any, see the log"
    )
    destination.add_argument("-D", "--images-dir", "--images", metavar="DIR", type=Path, help="images go there: empty")
    destination.add_argument("--pidfile", metavar="FILE", type=Path, help="write the restored process's pid there")
    destination.add_argument("--fill-rate", metavar="BYTES", help="bytes a second, as lazyd lazy-pages takes it")
    destination.add_argument("--on-source-loss", choices=("hold", "kill"), help="as lazyd lazy-pages takes it")
    criu = parser.add_argument_group("the real criu, at either end")
    criu.add_argument("--criu", metavar="FILE", default="criu", help="the program (criu)")
    criu.add_argument("-j", "--shell-job", action="store_true", help="as criu takes it")
    criu.add_argument("--tcp-established", action="store_true", help="take TCP connections along; criu locks them")
    criu.add_argument("--network-lock", metavar="METHOD", help="how it locks them: nftables, iptables or skip")
    criu.add_argument("--criu-option", metavar="WORD", action="append", default=[], help="one more word for criu")
    add_options(parser.add_argument_group("TLS, at both ends"))
    add_telling(parser.add_argument_group("telling"), _DEFAULT_VERBOSITY)
    return parser


def _address(text: str, option: str, default_host: str = "") -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or default_host
    if not host or not port.isdecimal() or int(port) > _PORT_MAX:
        raise UsageError(f"lazyd migrate: {option} {text}: not an address and a port")
    return host, int(port)


def run(arguments: Sequence[str]) -> int:
    """Run migrate."""
    given = _make_parser().parse_words(arguments)
    if given.words != ["migrate"]:
        raise UsageError(f"lazyd: {given.words[-1]}: one word too many")
    if (given.listen is None) == (given.to is None):
        raise UsageError("lazyd migrate: --listen PORT at the destination, --to HOST:PORT at the source: one of them")
    options = ["--shell-job"] * given.shell_job + ["--tcp-established"] * given.tcp_established
    if given.network_lock:
        options += ["--network-lock", given.network_lock]
    options += given.criu_option
    log = log_of(given, _DEFAULT_VERBOSITY)
    if given.listen is None:
        if given.pid is None:
            raise UsageError("lazyd migrate: which process? --pid PID is needed")
        for name in ("images_dir", "pidfile", "fill_rate", "on_source_loss"):
            if getattr(given, name):
                raise UsageError(f"lazyd migrate: --{name.replace('_', '-')} is for the destination")
        from lazyd.migrate import source  # noqa: PLC0415  users of other verbs do not wait for it

        host, port = _address(given.to, "--to")
        return source.migrate(
            source.Settings(
                given.pid,
                host,
                port,
                given.criu,
                options,
                files_of(given),
                locks_by_nftables=given.network_lock == "nftables",
                unlocks=given.unlock_source,
            ),
            log,
        )
    if given.pid is not None or given.unlock_source:
        raise UsageError("lazyd migrate: --pid and --unlock-source are for the source")
    if given.images_dir is None:
        raise UsageError("lazyd migrate: where do images go? -D DIR is needed")
    from lazyd.migrate import destination  # noqa: PLC0415  users of other verbs do not wait for it

    host, port = _address(given.listen, "--listen", "127.0.0.1")
    lazyd_options = []
    for name in ("fill_rate", "on_source_loss"):
        if value := getattr(given, name):
            lazyd_options += [f"--{name.replace('_', '-')}", value]
    return destination.receive(
        destination.Settings(
            host, port, given.images_dir, given.criu, options, lazyd_options, files_of(given), given.pidfile
        ),
        log,
    )
