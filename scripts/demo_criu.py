# SPDX-License-Identifier: MIT
"""The demo of the pairing with the real CRIU: checkpoint redis, kill it, have it back before its memory is.

Restores the same images three times: eagerly, lazily through lazyd with the fill held back so that it can be watched
while clients ask, and lazily at full speed; checks every key each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import harness
import rediskit
from demo_kit import WATCH_RATE_MIB, Restored, paint, say, size, step, summary

LAZYD = Path(sys.executable).parent / "lazyd"
VALUE_BYTES = 800


def value_of(key: str) -> bytes:
    """Return the value that a key must have: a stream of a hash of the key."""
    return hashlib.shake_128(key.encode()).digest(VALUE_BYTES)


def fill(path: Path, count: int) -> None:
    """Store the keys, a thousand in flight."""
    with rediskit.Client(path) as client:
        for start in range(0, count, 1000):
            keys = [f"key:{number}" for number in range(start, min(start + 1000, count))]
            client.send(b"".join(rediskit.Client.encode("SET", key, value_of(key)) for key in keys))
            for _ in keys:
                client.answer()


def all_right(path: Path, count: int, digest: bytes) -> bool:
    """Tell whether redis's own digest of all its data is as before, and every value what its key says."""
    with rediskit.Client(path) as client:
        if client.ask("DBSIZE") != count or client.ask("DEBUG", "DIGEST") != digest:
            return False
        for start in range(0, count, 1000):
            keys = [f"key:{number}" for number in range(start, min(start + 1000, count))]
            client.send(b"".join(rediskit.Client.encode("GET", key) for key in keys))
            if any([client.answer() != value_of(key) for key in keys]):  # noqa: C419  every answer must be read
                return False
    return True


class Demo:
    """The saved redis and where its files are."""

    def __init__(self, suite: str, folder: Path, count: int) -> None:
        self.suite, self.folder, self.count = suite, folder, count
        self.images, self.socket = folder / "images", folder / "redis.sock"
        self.pid, self.digest = 0, b""

    def prepare(self) -> None:
        """Start redis, fill it, checkpoint it."""
        began = time.monotonic()
        self.pid = rediskit.start(self.socket)
        fill(self.socket, self.count)
        with rediskit.Client(self.socket) as client:
            self.digest = client.ask("DEBUG", "DIGEST")
        say(f"{self.count:,} keys of {VALUE_BYTES} bytes in {time.monotonic() - began:.1f} s, pid {self.pid}")
        say(f"redis's digest of all its data: {self.digest.decode()}")
        step("Checkpoint it with criu dump, which kills it")
        began = time.monotonic()
        rediskit.dump(self.suite, self.pid, self.images)
        total = sum(path.stat().st_size for path in self.images.iterdir())
        say(f"{size(total)} of images in {time.monotonic() - began:.1f} s; process {self.pid} is gone")
        os.sync()  # or writing back disturbs what follows

    def restore(self, work: Path, *extra: str) -> float:
        """Run criu restore; return the seconds until redis has answered a GET."""
        work.mkdir(parents=True, exist_ok=True)
        key = f"key:{self.count // 3}"
        began = time.monotonic()
        harness.criu_restore(self.suite, self.images, work, extra)
        if rediskit.wait_for_answer(self.socket, key) != value_of(key):
            raise AssertionError(f"the first answer, to GET {key}, is wrong")
        return time.monotonic() - began

    def eager(self) -> Restored:
        """Restore all memory first, as criu does by itself."""
        try:
            result = Restored(self.restore(self.folder / "eager"))
            say(f"first answer after {paint(f'{result.first_answer_s * 1000:.0f} ms', '1')}")
            result.right = all_right(self.socket, self.count, self.digest)
        finally:
            harness.reap_group(self.pid)
        return result

    def lazy(self, name: str, *extra: str, show: bool) -> Restored:
        """Restore through lazyd, ask for random keys while memory fills, check all of them in the end."""
        work = self.folder / name
        work.mkdir()
        stats = work / "stats.json"
        command = [
            str(LAZYD),
            "--images",
            str(self.images),
            "-W",
            str(work),
            "--stats",
            str(stats),
        ]
        reading, writing = os.pipe()
        quiet = None if show else subprocess.DEVNULL
        began = time.monotonic()
        process = subprocess.Popen(
            [*command, "--status-fd", str(writing), *extra], pass_fds=[writing], stdout=quiet, stderr=quiet
        )
        try:
            os.close(writing)
            if not os.read(reading, 1):
                raise AssertionError(f"lazyd ended with {process.wait()}")
            started = time.monotonic() - began
            result = Restored(self.restore(work, "--lazy-pages"), started)
            asking = threading.Thread(target=self.ask_until_full, args=(process, result.latencies))
            asking.start()
            code = process.wait(120)
            asking.join()
            if code:
                raise AssertionError(f"lazyd ended with {code}")
            result.stats = json.loads(stats.read_text())
            result.right = all_right(self.socket, self.count, self.digest)
        finally:
            os.close(reading)
            harness.Daemon(process, work, work).stop()
            harness.reap_group(self.pid)
        return result

    def ask_until_full(self, process: subprocess.Popen, latencies: list[float]) -> None:
        """Ask for random keys, a few hundred a second, until lazyd is done; check each answer."""
        with rediskit.Client(self.socket) as client:
            while process.poll() is None:
                key = f"key:{random.randrange(self.count)}"
                began = time.monotonic()
                answer = client.ask("GET", key)
                latencies.append(time.monotonic() - began)
                if answer != value_of(key):
                    raise AssertionError(f"a wrong answer to GET {key}")
                time.sleep(0.002)


def run(suite: str, mib: int, folder: Path) -> bool:
    """Run the demo; tell whether all data was right."""
    demo = Demo(suite, folder, mib * 2**20 // VALUE_BYTES)
    try:
        step(f"Start redis-server and fill it with {mib} MiB")
        demo.prepare()
        step("Restore it eagerly: all memory first, then it runs")
        eager = demo.eager()
        step(f"Restore it through lazyd, the fill held to {WATCH_RATE_MIB} MiB/s, clients asking meanwhile")
        watched = demo.lazy("watched", "--fill-rate", f"{WATCH_RATE_MIB}M", show=True)
        say(f"first answer after {paint(f'{watched.first_answer_s * 1000:.0f} ms', '1')}")
        step("Restore it through lazyd once more, at full speed")
        full = demo.lazy("full", show=False)
        say(f"first answer after {paint(f'{full.first_answer_s * 1000:.0f} ms', '1')}")
        return summary(eager, watched, full, "GETs by clients")
    finally:
        if demo.pid:
            with contextlib.suppress(AssertionError):
                harness.reap_group(demo.pid)
