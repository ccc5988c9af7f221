# SPDX-License-Identifier: MIT
"""`python -m lazyd`, and the command `lazyd`."""

import _signal  # type: ignore[import-not-found]  # not signal: its import takes time, and a Ctrl-C in it is a trace
import gc
import sys

# Until what a verb needs is imported, an interrupt ends this process as it ends others: cli.main takes it from there.
if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def run() -> int:
    """Run the command line of this process."""
    # All that is imported stays: to look for garbage in it takes a tenth of the start. Who stays puts it on again.
    gc.disable()

    from lazyd.deferred import deferred, untranslated  # noqa: PLC0415  behind the above

    with untranslated():
        import argparse  # noqa: F401, PLC0415
    with deferred("urllib.parse"):  # which makes addresses of paths
        import pathlib  # noqa: F401, PLC0415
    from lazyd.cli import main  # noqa: PLC0415

    return main()


if __name__ == "__main__":
    sys.exit(run())
