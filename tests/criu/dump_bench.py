# SPDX-License-Identifier: MIT
"""Measure dumps, lazyd's and stock criu's, side by side. scripts/bench makes rows of what these functions return.

The time stopped is the dumped task's own: a thread of it looks at the clock all the time. Both dumpers leave the task
running, take turns, and write to the same filesystem. Times in seconds, lengths in bytes.

    python tests/criu/dump_bench.py [full|sparse|zeros|second] [ROUNDS]
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import harness

SUITE = "trixie"
LAZYD = [str(Path(sys.executable).parent / "lazyd")]
Measured = dict[str, list[float]]


class Victim:
    """A running dumpbench."""

    def __init__(self, work: Path, *words: str) -> None:
        self.state = work / "state"
        program = work / "dumpbench"
        if not program.exists():
            harness.compile_c(harness.ROOT / "tests/victims/dumpbench.c", program)
        self.pid = harness.start_program([str(program), str(self.state), *words], self.state)
        self.longest_gap()

    def _ask(self, question: str, answer: str) -> Path:
        (self.state / question).touch()
        path = self.state / answer
        harness.wait_until(path.exists, f"an answer to {question}")
        return path

    def longest_gap(self) -> float:
        """Return for how long it has been stopped at most since it was last asked."""
        path = self._ask("gap", "answer")
        microseconds = int(path.read_text())
        path.unlink()
        return microseconds / 1e6

    def rewrite(self) -> None:
        """Have it write to a hundredth of its pages."""
        self._ask("rewrite", "done").unlink()


@contextlib.contextmanager
def victim(work: Path, *words: str) -> Iterator[Victim]:
    """A victim that is gone afterwards, with its state."""
    one = Victim(work, *words)
    try:
        yield one
    finally:
        harness.reap_group(one.pid)
        shutil.rmtree(one.state, ignore_errors=True)


def dump(who: str, one: Victim, images: Path, *extra: str) -> tuple[float, float, float]:
    """Dump it and leave it running; return the time stopped, the bytes of pages, and the time of the command."""
    shutil.rmtree(images, ignore_errors=True)
    if who == "criu":
        images.mkdir()
        words = [harness.criu_command(SUITE), "dump", "-t", str(one.pid), "--shell-job", "-o", "dump.log", "-v1"]
    else:
        words = [*LAZYD, "dump", "--pid", str(one.pid)]
    words += ["-D", str(images), "--leave-running", *extra]
    one.longest_gap()
    begun = time.monotonic()
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    took = time.monotonic() - begun
    if run.returncode:
        raise AssertionError(f"{who}: {run.stderr}")
    stopped = one.longest_gap()
    return stopped, float(sum(path.stat().st_size for path in images.glob("pages-*.img"))), took


def _turns(work: Path, rounds: int, *words: str) -> dict[str, Measured]:
    """Dump one victim by both in turn: {dumper: {stopped, bytes, took}}."""
    found: dict[str, Measured] = {who: {"stopped": [], "bytes": [], "took": []} for who in ("criu", "lazyd")}
    with victim(work, *words) as one:
        for number in range(rounds):
            for who in sorted(found, reverse=bool(number % 2)):
                os.sync()  # nothing left to write back while the clock runs
                for name, value in zip(("stopped", "bytes", "took"), dump(who, one, work / who), strict=True):
                    found[who][name].append(value)
                shutil.rmtree(work / who)
    return found


def full(work: Path, rounds: int = 3, mib: int = 1024) -> dict[str, Measured]:
    """A task of 1 GiB: `stopped` of lazyd is to be at most 0.8 of criu's."""
    return _turns(work, rounds, "full", str(mib))


def sparse(work: Path, rounds: int = 3, gib: int = 64) -> dict[str, Measured]:
    """A task with 64 GiB mapped and 1 % of it used: `stopped` at most a third of criu's."""
    return _turns(work, rounds, "sparse", str(gib), "10")


def zeros(work: Path, rounds: int = 3, mib: int = 1024) -> dict[str, Measured]:
    """A task that has only read 1 GiB: no `bytes` for it. What is left are its program's own pages."""
    return _turns(work, rounds, "zeros", str(mib))


def second(work: Path, rounds: int = 3, mib: int = 1024) -> dict[str, Measured]:
    """Two dumps, 1 % of 1 GiB rewritten in between: bytes at most 5 % of the first's, `stopped` a fifth of a full's.

    That full dump is criu's: lazyd's own copies nearly all while the task runs, and stops it hardly longer. It is made
    before anything of lazyd's tracks the task. In between is one on top of which nothing was rewritten: what any dump
    takes to look at the task.
    """
    names = "criu", "first", "nothing", "second"
    found: dict[str, Measured] = {who: {"stopped": [], "bytes": [], "took": []} for who in names}
    with victim(work, "full", str(mib)) as one:
        for _ in range(rounds):
            os.sync()
            for name, value in zip(("stopped", "bytes", "took"), dump("criu", one, work / "criu"), strict=True):
                found["criu"][name].append(value)
            shutil.rmtree(work / "criu")
        for _ in range(rounds):
            os.sync()
            first, nothing, then = work / "first", work / "nothing", work / "second"
            for who, values in (
                ("first", dump("lazyd", one, first, "--track-mem")),
                ("nothing", dump("lazyd", one, nothing, "--track-mem", "--parent", str(first))),
                ("second", (one.rewrite(), dump("lazyd", one, then, "--parent", str(nothing)))[1]),
            ):
                for name, value in zip(("stopped", "bytes", "took"), values, strict=True):
                    found[who][name].append(value)
            for images in (then, nothing, first):
                shutil.rmtree(images)
    return found


def main() -> None:
    """Measure what is named, or all."""
    workloads = {"full": full, "sparse": sparse, "zeros": zeros, "second": second}
    names = [word for word in sys.argv[1:] if word in workloads] or list(workloads)
    rounds = next((int(word) for word in sys.argv[1:] if word.isdecimal()), 3)
    harness.become_subreaper()
    for name in names:
        with tempfile.TemporaryDirectory(dir=harness.ROOT / "build") as folder:
            print(name, json.dumps(workloads[name](Path(folder), rounds)), flush=True)


if __name__ == "__main__":
    main()
