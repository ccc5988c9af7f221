# SPDX-License-Identifier: MIT
"""Arguments and exit codes: one function a verb.

The command line is the one of `criu lazy-pages`, so that changing the first word is enough: options before or
after the verb, joined or not, as getopt_long takes them. What criu's own configuration files say is taken as
criu takes it (criu(8), CONFIGURATION FILES), as far as it is about lazy pages; the rest of such a file is
about other verbs.

Users feel the time until the socket listens: what a verb needs is imported by that verb.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lazyd.arguments import Parser, add_telling, count, log_of, options_of, rate
from lazyd.enums import Enum
from lazyd.errors import LazydError, SystemCallError, UsageError
from lazyd.hints import TYPE_CHECKING
from lazyd.tls.settings import add_options as add_tls_options
from lazyd.tls.settings import files_of

if TYPE_CHECKING:
    from lazyd.source.page_server import PageServer

_USAGE = """\
lazyd [lazy-pages] -D DIR [options]   serve the memory of a restore; beside `criu restore --lazy-pages`
       lazyd -D DIR --pid PID [options]      serve a process that is restored and stands empty
       lazyd show DIR [--json]               say what is in a directory of images
       lazyd verify DIR                      check a directory of images whole
       lazyd dump --pid PID -D DIR           write images of a process (lazyd dump --help)
       lazyd pre-dump --pid PID -D DIR       the same, while it goes on, to dump only changes later
       lazyd restore -D DIR                  build a dumped process again and serve it (lazyd restore --help)
       lazyd rewind --pid PID -D DIR         put a live process back to its own checkpoint
       lazyd page-server -D DIR --port N     take dumps, or give out pages (lazyd page-server --help)
       lazyd migrate …                       move a process to another host (lazyd migrate --help)"""
_LAST_STANDARD_STREAM = 2
_DEFAULT_VERBOSITY = 3


def _make_parser() -> Parser:
    parser = Parser("lazyd", _USAGE)
    files = parser.add_argument_group("files")
    files.add_argument("-D", "--images-dir", "--images", metavar="DIR", type=Path, help="directory of the images")
    files.add_argument("-W", "--work-dir", metavar="DIR", type=Path, help="where the socket and logs go (as -D)")
    files.add_argument("-o", "--log-file", metavar="FILE", type=Path, help="log to this file in the work directory")
    files.add_argument("--pidfile", metavar="FILE", type=Path, help="write the pid to this file in the work directory")
    files.add_argument("--stats", metavar="FILE", type=Path, help="write the closing statistics as JSON")

    serving = parser.add_argument_group("serving")
    serving.add_argument("--fill", choices=("full", "off"), help="fill in the background (full), or only on demand")
    serving.add_argument("--fill-rate", metavar="BYTES", type=rate, help="bytes a second, as 512K, 64M or 2G")
    serving.add_argument("--workers", metavar="N", type=count, help="threads (as many as cores, at most 4)")
    serving.add_argument(
        "--pagemap-format",
        choices=("auto", "booleans", "flags"),
        help="which writer's pagemap entries the images hold, where they do not say it themselves",
    )

    attaching = parser.add_argument_group("attaching to a process that is restored and stands empty")
    attaching.add_argument("-t", "--pid", metavar="PID", type=count, help="serve this process, without a restorer")
    attaching.add_argument("--image-pid", metavar="PID", type=count, help="its pid in the images, if it is another")
    attaching.add_argument("--tree", action="store_true", help="its children and theirs too")
    attaching.add_argument("--drop-pages", action="store_true", help="drop pages that it has where it should be empty")

    running = parser.add_argument_group("running")
    running.add_argument("-d", "--daemon", action="store_true", help="go into the background once listening")
    running.add_argument("--status-fd", metavar="FD", type=count, help="write one zero byte there once listening")
    add_telling(running, _DEFAULT_VERBOSITY)
    running.add_argument("--json", action="store_true", help="show: for programs")
    running.add_argument("-V", "--version", action="store_true", help="show the version and exit")

    criu = parser.add_argument_group("taken as criu takes them")
    criu.add_argument("--config", metavar="FILE", type=Path, help="read options from this file too")
    criu.add_argument("--no-default-config", action="store_true", help="do not read criu's configuration files")
    criu.add_argument("-j", "--shell-job", action="store_true", help="no meaning here")

    remote = parser.add_argument_group("pages from a page server, such as criu dump --lazy-pages")
    remote.add_argument("--page-server", action="store_true", help="fill what the images lack from there")
    remote.add_argument("--address", metavar="HOST", help="where it listens (127.0.0.1)")
    remote.add_argument("--port", metavar="N", type=count)
    remote.add_argument("--ps-socket", metavar="FD", type=count, help="a connection to it that is there already")
    remote.add_argument(
        "--page-server-header", metavar="BYTES", choices=("24", "32"), help="24: criu up to 4.1 (as the images tell)"
    )
    remote.add_argument(
        "--on-source-loss",
        choices=("hold", "kill"),
        help="if missing pages cannot be had any more: tasks that touch them wait (hold), or all are killed",
    )
    add_tls_options(remote)
    return parser


def _config_arguments(path: Path, parser: Parser) -> list[str]:
    """Return the options of a configuration file that mean something here: `name value` lines, # comments."""
    import shlex  # noqa: PLC0415  few have such a file

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    arguments: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: {error}") from error
        option = f"--{words[0]}" if words else ""
        if option in parser._option_string_actions and option not in ("--help", "--config"):
            arguments += [option] if len(words) == 1 else [f"{option}={' '.join(words[1:])}"]
    return arguments


def _default_configs() -> list[Path]:
    """Return the configuration files that criu reads unasked, in its order."""
    paths = [Path("/etc/criu/default.conf")]
    if home := os.environ.get("HOME"):
        paths.append(Path(home) / ".criu/default.conf")
    # Not Path.exists(), which raises where a directory on the way may not be searched (su keeps HOME).
    return [path for path in paths if os.path.exists(path)]  # noqa: PTH110


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, which wins over configuration files; UsageError if it makes no sense."""
    parser = _make_parser()
    given = parser.parse_words(arguments)
    configs = [] if given.no_default_config else _default_configs()
    if variable := os.environ.get("CRIU_CONFIG_FILE"):
        configs.append(Path(variable))
    if given.config is not None:
        configs.append(given.config)
    extra = [argument for path in configs for argument in _config_arguments(path, parser)]
    if extra:
        defaults = parser.parse_words(extra)
        for name, value in vars(defaults).items():
            if getattr(given, name) in (None, False):
                setattr(given, name, value)
    return given


def _directory(given: argparse.Namespace) -> Path:
    """Return the one directory that show and verify are about."""
    named = [Path(word) for word in given.words[1:]]
    if given.images_dir is not None:
        named.append(given.images_dir)
    if len(named) != 1:
        raise UsageError(f"lazyd {given.words[0]}: one directory of images is needed, {len(named)} are given")
    return named[0]


def _put(text: str) -> None:
    """Write a line to standard output. A name that its encoding does not have is spelled with backslashes."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise SystemCallError("writing to standard output", error.errno or 0) from error


def _drop_output() -> None:
    """Have what is still buffered flushed into nothing at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(given: argparse.Namespace) -> int:
    from lazyd.image.show import describe, render  # noqa: PLC0415  see the head of this module

    description = describe(_directory(given))
    if given.json:
        import json  # noqa: PLC0415

        _put(json.dumps(description, indent=1))
    else:
        _put(render(description))
    return 0


def _verify(given: argparse.Namespace) -> int:
    from lazyd.image.freed import find_freed  # noqa: PLC0415  see the head of this module
    from lazyd.image.verify import verify  # noqa: PLC0415

    directory = _directory(given)
    findings = verify(directory)
    for finding in findings:
        _put(str(finding))
    if not findings:
        doubts = find_freed(directory)
        for doubt in doubts:
            _put(str(doubt))
        _put(f"{directory}: good{', apart from that' if doubts else ''}")
    return 1 if findings else 0


def _lazy_pages(given: argparse.Namespace) -> int:
    if given.json:
        raise UsageError("lazyd: --json is for show; the statistics of a restore go to --stats FILE")
    if len(given.words) > 1:
        raise UsageError(f"lazyd: {given.words[1]}: one word too many")
    if given.images_dir is None:
        raise UsageError("lazyd: no images are named: -D DIR is needed")
    if given.fill == "off" and given.fill_rate:
        raise UsageError("lazyd: --fill-rate is for a fill that --fill off turns off")

    if given.pid is None:
        for name in ("image_pid", "tree", "drop_pages"):
            if getattr(given, name):
                raise UsageError(f"lazyd: --{name.replace('_', '-')} is about the process that --pid names")
    elif given.tree and given.image_pid:
        raise UsageError("lazyd: --image-pid names one task; --tree finds all by the pids that they had")

    from lazyd.daemon import Attach, serve  # noqa: PLC0415  see the head of this module

    options = options_of(given)
    settings = options.settings._replace(server=_page_server(given), kill_on_loss=given.on_source_loss == "kill")
    options = options._replace(settings=settings)
    if given.pid is not None:
        attach = Attach(given.pid, given.image_pid or 0, given.tree, given.drop_pages)
        options = options._replace(attach=attach)
    return serve(options, log_of(given, _DEFAULT_VERBOSITY))


_PORT_MAX = 65535


def _page_server(given: argparse.Namespace) -> PageServer | None:
    """Return where pages come from that the images lack; None: nowhere."""
    tls = files_of(given)
    if not given.page_server:
        for name in ("address", "port", "ps_socket", "page_server_header", "on_source_loss", "tls"):
            if getattr(given, name) not in (None, False):
                raise UsageError(f"lazyd: --{name.replace('_', '-')} is about --page-server")
        return None
    if given.ps_socket is None and not 0 < (given.port or 0) <= _PORT_MAX:
        raise UsageError(f"lazyd: --page-server: --port N is needed, 1 to {_PORT_MAX}, or --ps-socket FD")

    from lazyd.source.page_server import PageServer  # noqa: PLC0415  see the head of this module
    from lazyd.wire import HeaderSize  # noqa: PLC0415

    return PageServer(
        tls=tls,
        host=given.address or "127.0.0.1",
        port=given.port or 0,
        inherited=-1 if given.ps_socket is None else given.ps_socket,
        header=None if given.page_server_header is None else HeaderSize(int(given.page_server_header)),
    )


_DUMPING = ("dump", "pre-dump")
_RESTORING = ("restore", "rewind")
_SERVING = "page-server"
_MIGRATING = "migrate"
_WITH_OWN_OPTIONS = (*_DUMPING, *_RESTORING, _SERVING, _MIGRATING)


class _Verb(Enum):
    """The first word, and what it starts. Those with options of their own are in cli_dump, cli_restore and so on."""

    LAZY_PAGES = "lazy-pages"
    SHOW = "show"
    VERIFY = "verify"


_VERBS: dict[_Verb, Callable[[argparse.Namespace], int]] = {
    _Verb.LAZY_PAGES: _lazy_pages,
    _Verb.SHOW: _show,
    _Verb.VERIFY: _verify,
}


def _run(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in _DUMPING:
        from lazyd import cli_dump  # noqa: PLC0415  see the head of this module

        return cli_dump.run(arguments)
    if arguments and arguments[0] in _RESTORING:
        from lazyd import cli_restore  # noqa: PLC0415  see the head of this module

        return cli_restore.run(arguments)
    if arguments and arguments[0] == _SERVING:
        from lazyd import cli_serve  # noqa: PLC0415  see the head of this module

        return cli_serve.run(arguments)
    if arguments and arguments[0] == _MIGRATING:
        from lazyd import cli_migrate  # noqa: PLC0415  see the head of this module

        return cli_migrate.run(arguments)
    given = parse(arguments)
    if given.version:
        from lazyd.report import version  # noqa: PLC0415

        _put(f"lazyd {version()}")
        return 0
    word = given.words[0] if given.words else _Verb.LAZY_PAGES.value
    if word in _WITH_OWN_OPTIONS:
        raise UsageError(f"lazyd: {word}: it has options of its own, so it comes first: lazyd {word} …")
    try:
        verb = _Verb(word)
    except ValueError:
        known = ", ".join([*(verb.value for verb in _Verb), *_WITH_OWN_OPTIONS])
        raise UsageError(f"lazyd: {word}: no such command (there are {known})") from None
    return _VERBS[verb](given)


def _fill_standard_streams() -> None:
    """Open what of the standard streams is closed: else a userfaultfd or an image becomes one, and is written to."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _LAST_STANDARD_STREAM:
        pass
    os.close(descriptor)
    # Python has none for those that were closed when it started.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _fill_standard_streams()
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except LazydError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        _drop_output()  # whoever read it has seen enough
        return 1
    except KeyboardInterrupt:
        return 1
