# SPDX-License-Identifier: MIT
"""The demo without CRIU: lazyd dumps a database in the memory of a process, builds the process again, and serves it.

The program is a Python that keeps an SQLite database in memory and answers queries from its standard input. It is
restored three times from the same images: eagerly, lazily with the fill held back so that it can be watched while
clients ask, and lazily at full speed; every row is checked each time. What was its standard input and output are pipes
to nowhere after the dump; the restored one has those that `lazyd restore` was started with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import harness
from demo_kit import WATCH_RATE_MIB, Restored, paint, say, size, step, summary

LAZYD = Path(sys.executable).parent / "lazyd"
VALUE_BYTES = 800
PROGRAM = """
import hashlib, sqlite3, sys
count, length = int(sys.argv[1]), int(sys.argv[2])
table = sqlite3.connect(":memory:")
table.execute("PRAGMA cache_size = -4000000")
table.execute("CREATE TABLE store (number INTEGER PRIMARY KEY, value BLOB)")
values = ((number, hashlib.shake_128(b"%d" % number).digest(length)) for number in range(count))
table.executemany("INSERT INTO store VALUES (?, ?)", values)
table.commit()
print("ready", flush=True)
for line in sys.stdin:
    if line == "all\\n":
        digest = hashlib.sha256()
        for number, value in table.execute("SELECT number, value FROM store ORDER BY number"):
            digest.update(b"%d" % number + value)
        print(digest.hexdigest(), flush=True)
    else:
        (row,) = table.execute("SELECT value FROM store WHERE number = ?", (int(line),))
        print(row[0].hex(), flush=True)
"""


def value_of(number: int) -> str:
    """Return the value that a row must have: a stream of a hash of its number."""
    return hashlib.shake_128(b"%d" % number).digest(VALUE_BYTES).hex()


class Talk:
    """The two ends of a program's standard streams that are ours."""

    def __init__(self) -> None:
        self.stdin, self._questions = os.pipe()
        self._answers, self.stdout = os.pipe()
        self._reader = os.fdopen(self._answers)

    def started(self) -> None:
        """Close the program's own ends here."""
        os.close(self.stdin)
        os.close(self.stdout)

    def ask(self, question: object) -> str:
        """Return the answer to a question."""
        os.write(self._questions, f"{question}\n".encode())
        return self.hear()

    def hear(self) -> str:
        """Return the next line; AssertionError if there is none any more."""
        if not (line := self._reader.readline()):
            raise AssertionError("the program has ended")
        return line.strip()

    def close(self) -> None:
        """Hang up."""
        os.close(self._questions)
        self._reader.close()


class Demo:
    """The saved program and where its files are."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.images = folder / "images"
        self.pid, self.digest = 0, ""

    def prepare(self) -> None:
        """Start the program, checkpoint it, and see it gone."""
        began = time.monotonic()
        talk = Talk()
        command = ["/usr/bin/python3", "-c", PROGRAM, str(self.count), str(VALUE_BYTES)]
        null = subprocess.DEVNULL
        # In a folder that stays: its working directory comes back too.
        process = subprocess.Popen(
            command, stdin=talk.stdin, stdout=talk.stdout, stderr=null, start_new_session=True, cwd="/"
        )
        process.returncode = 0  # its reaping is ours: the same pid comes back as another process
        talk.started()
        self.pid = process.pid
        if talk.hear() != "ready":
            raise AssertionError("the program does not start")
        say(f"{self.count:,} rows of {VALUE_BYTES} bytes in {time.monotonic() - began:.1f} s, pid {self.pid}")
        self.digest = talk.ask("all")
        say(f"hash of all its data: {self.digest}")
        step("Checkpoint it with lazyd dump, which kills it")
        began = time.monotonic()
        command = [str(LAZYD), "dump", "--pid", str(self.pid), "-D", str(self.images), "--no-progress"]
        if subprocess.run(command, check=False).returncode:
            raise AssertionError("lazyd dump failed")
        harness.reap_group(self.pid)
        talk.close()
        total = sum(path.stat().st_size for path in self.images.iterdir())
        say(f"{size(total)} of images in {time.monotonic() - began:.1f} s; process {self.pid} is gone")
        os.sync()  # or writing back disturbs what follows

    def restore(self, name: str, *extra: str, show: bool) -> Restored:
        """Run lazyd restore, ask until all memory is there, and check all of it in the end."""
        talk = Talk()
        stats = self.folder / f"{name}.json"
        is_eager = "--eager" in extra
        command = [str(LAZYD), "restore", "-D", str(self.images), *extra]
        if not is_eager:
            command += ["--stats", str(stats), "-v3"]
        row = self.count // 3
        began = time.monotonic()
        quiet = None if show else subprocess.DEVNULL
        process = subprocess.Popen(command, stdin=talk.stdin, stdout=talk.stdout, stderr=quiet)
        try:
            talk.started()
            if talk.ask(row) != value_of(row):
                raise AssertionError(f"the first answer, about row {row}, is wrong")
            result = Restored(time.monotonic() - began)
            while not is_eager and process.poll() is None:
                row = random.randrange(self.count)
                asked = time.monotonic()
                answer = talk.ask(row)
                result.latencies.append(time.monotonic() - asked)
                if answer != value_of(row):
                    raise AssertionError(f"a wrong answer about row {row}")
                time.sleep(0.002)
            if process.wait(120):
                raise AssertionError(f"lazyd ended with {process.returncode}")
            if not is_eager:
                result.stats = json.loads(stats.read_text())
            say(f"first answer after {paint(f'{result.first_answer_s * 1000:.0f} ms', '1')}")
            result.right = talk.ask("all") == self.digest
        finally:
            harness.Daemon(process, self.folder, self.folder).stop()
            harness.reap_group(self.pid)
            talk.close()
        return result


def run(mib: int, folder: Path) -> bool:
    """Run the demo; tell whether all data was right."""
    demo = Demo(folder, mib * 2**20 // VALUE_BYTES)
    try:
        step(f"Start a Python that keeps a database of {mib} MiB in memory")
        demo.prepare()
        step("Restore it eagerly: all memory first, then it runs")
        eager = demo.restore("eager", "--eager", "--no-progress", show=False)
        step(f"Restore it lazily, the fill held to {WATCH_RATE_MIB} MiB/s, with questions asked meanwhile")
        watched = demo.restore("watched", "--fill-rate", f"{WATCH_RATE_MIB}M", show=True)
        step("Restore it lazily once more, at full speed")
        full = demo.restore("full", show=False)
        return summary(eager, watched, full, "questions answered")
    finally:
        if demo.pid:
            with contextlib.suppress(AssertionError):
                harness.reap_group(demo.pid)
