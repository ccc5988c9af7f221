# SPDX-License-Identifier: MIT
"""A redis-server to checkpoint: installed, or unpacked by scripts/setup; with a client in a few lines.

It listens on a unix socket: criu 4.1.1 cannot dump a TCP socket on Linux 6.18, whose kernel no longer knows
SO_PASSCRED for it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path

import harness


def server_command() -> tuple[list[str], dict[str, str]]:
    """Return how to start redis-server, and the environment it needs."""
    private = harness.ROOT / ".criu" / "redis"
    if not private.is_dir():
        found = shutil.which("redis-server")
        if found is None:
            raise FileNotFoundError("no redis-server: run scripts/setup redis")
        return [found], dict(os.environ)
    libraries = private / "usr" / "lib" / f"{platform.machine()}-linux-gnu"
    return [str(private / "usr" / "bin" / "redis-server")], {**os.environ, "LD_LIBRARY_PATH": str(libraries)}


class Client:
    """One connection; answers are bytes, integers, None or RedisError."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(120)
        self._socket.connect(str(path))
        self._input = self._socket.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_) -> None:
        self._input.close()
        self._socket.close()

    @staticmethod
    def encode(*words: bytes | str) -> bytes:
        """Return one command in the protocol's form."""
        parts = [word.encode() if isinstance(word, str) else word for word in words]
        return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)

    def send(self, data: bytes) -> None:
        """Send commands without waiting for their answers."""
        self._socket.sendall(data)

    def answer(self):
        """Return the next answer; raise RuntimeError if it is an error."""
        line = self._input.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("redis hung up")
        kind, rest = line[:1], line[1:-2]
        if kind == b"$":
            length = int(rest)
            return None if length < 0 else self._input.read(length + 2)[:-2]
        if kind == b"-":
            raise RuntimeError(rest.decode())
        return int(rest) if kind == b":" else rest

    def ask(self, *words: bytes | str):
        """Send one command and return its answer."""
        self.send(self.encode(*words))
        return self.answer()


def start(path: Path) -> int:
    """Start an empty server in its own session, nothing on disk; return its pid once it answers."""
    command, environment = server_command()
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"]
    options += ["--enable-debug-command", "local", "--daemonize", "no"]
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        [*command, *options],
        stdin=null,
        stdout=null,
        stderr=null,
        cwd="/",
        env=environment,
        start_new_session=True,
    )
    try:
        wait_for_answer(path)
    except BaseException:
        harness.reap_group(process.pid)
        raise
    finally:
        process.returncode = 0  # reaped by its process group: the same pid comes back as another process
    return process.pid


def wait_for_answer(path: Path, key: str | None = None):
    """Return the first answer to GET key, or to PING, trying until somebody listens."""

    def answered():
        with contextlib.suppress(ConnectionError, FileNotFoundError), Client(path) as client:
            return [client.ask("GET", key) if key else client.ask("PING")]
        return None

    return harness.wait_until(answered, f"redis at {path}", 60, 0.0005)[0]


def dump(suite: str, pid: int, images: Path) -> None:
    """Checkpoint it, and see it gone."""
    images.mkdir(parents=True, exist_ok=True)
    words = [harness.criu_command(suite), "dump", "-t", str(pid), "-D", str(images), "--shell-job"]
    words += ["-o", "dump.log", "-v1"]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    harness.reap_group(pid)
    if run.returncode:
        raise AssertionError(f"criu dump failed ({run.returncode}):\n{harness.tail(images / 'dump.log')}")
