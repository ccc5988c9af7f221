# SPDX-License-Identifier: MIT
"""A container migrates with runc as its manual says, but for one word: lazyd lazy-pages for criu lazy-pages."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import harness
import migration
import pytest

SCENARIO = "tree"


def runc_program() -> Path:
    """The runc that scripts/setup unpacks, or an installed one."""
    unpacked = harness.ROOT / ".criu" / "runc" / "usr" / "sbin" / "runc"
    installed = shutil.which("runc")
    if not unpacked.exists() and installed is None:
        pytest.skip("no runc: run scripts/setup runc")
    return unpacked if unpacked.exists() else Path(str(installed))


class Runc:
    """runc with its own folder of states, and the CRIU that it finds first."""

    def __init__(self, suite: str, folder: Path) -> None:
        self.folder = folder
        self.bundle = folder / "bundle"
        self.state = folder / "state"
        self._words = [str(runc_program()), "--root", str(folder / "runc")]
        path = folder / "bin"
        path.mkdir()
        (path / "criu").symlink_to(harness.criu_command(suite))
        libraries = runc_program().parents[1] / "lib" / "x86_64-linux-gnu"
        self._environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", "LD_LIBRARY_PATH": str(libraries)}

    def make_bundle(self) -> None:
        """A container of one static program and its state folder."""
        root = self.bundle / "rootfs"
        (root / "state").mkdir(parents=True)
        self.state.mkdir()
        source = harness.ROOT / "tests/victims/victim.c"
        words = ["gcc", "-std=gnu11", "-O2", "-D_GNU_SOURCE", "-pthread", "-static", "-o", str(root / "victim")]
        subprocess.run([*words, str(source)], check=True)
        subprocess.run([*self._words, "spec"], cwd=self.bundle, env=self._environment, check=True)
        config = json.loads((self.bundle / "config.json").read_text())
        config["process"].update(terminal=False, args=["/victim", SCENARIO, "/state"], rlimits=[])
        config["root"]["readonly"] = False
        config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] in ("/proc", "/dev")]
        bound = {"destination": "/state", "type": "bind", "source": str(self.state), "options": ["bind", "rw"]}
        config["mounts"].append(bound)
        kinds = ("pid", "mount", "ipc", "uts")
        namespaces = [{"type": kind} for kind in kinds]
        config["linux"] = {"namespaces": namespaces, "resources": {}}
        (self.bundle / "config.json").write_text(json.dumps(config))

    def start(self, *words: str, fds: tuple[int, ...] = ()) -> subprocess.Popen:
        """Start it; its own output must not become a file that the container has open."""
        null = subprocess.DEVNULL
        command = [*self._words, *words]
        return subprocess.Popen(
            command, cwd=self.bundle, env=self._environment, stdin=null, stdout=null, stderr=null, pass_fds=fds
        )

    def run(self, *words: str) -> int:
        """Run it to its end."""
        return self.start(*words).wait(harness.TIMEOUT_S)

    def pid(self, name: str) -> int:
        """The first task of a container."""
        words = [*self._words, "state", name]
        return json.loads(subprocess.run(words, env=self._environment, check=True, stdout=subprocess.PIPE).stdout)[
            "pid"
        ]


@pytest.fixture
def runc(suite, tmp_path):
    """A runc whose containers are gone when the test is over."""
    runc = Runc(suite, tmp_path)
    runc.make_bundle()
    yield runc
    for name in ("here", "there"):
        with contextlib.suppress(subprocess.CalledProcessError):
            pid = runc.pid(name)
            if pid > 0:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
        runc.run("delete", "--force", name)


def test_a_container_migrates(suite, runc, tmp_path):
    assert runc.run("run", "--detach", "here") == 0, "runc cannot run a container here"
    harness.wait_until((runc.state / "ready").exists, "the program to be ready")
    images, log = tmp_path / "images", tmp_path / "log"
    images.mkdir()
    log.mkdir()
    reading, writing = os.pipe()
    port = migration.free_port()
    with migration.large_pipes():
        words = ["checkpoint", "--lazy-pages", "--page-server", f"127.0.0.1:{port}", "--status-fd", str(writing)]
        dumper = runc.start(*words, "--image-path", str(images), "--work-path", str(log), "here", fds=(writing,))
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            assert pipe.read(1) == b"\0", harness.tail(log / "dump.log")
        source = migration.Source(suite, runc.pid("here"), dumper, images, runc.state, "127.0.0.1", port)
        copy = source.copy_images(tmp_path / "copy")
        daemon = migration.start_daemon(source, copy, tmp_path / "work", who="lazyd")
        try:
            (runc.state / "ready").unlink()
            (runc.state / "go").touch()
            words = ["restore", "--detach", "--lazy-pages", "--image-path", str(copy)]
            code = runc.run(*words, "--work-path", str(tmp_path / "work"), "there")
            assert code == 0, harness.tail(tmp_path / "work" / "restore.log")
            harness.wait_until(lambda: source.result.endswith("\n"), "the program's verdict")
            assert source.result == "ok\n"
            assert daemon.wait() == 0, daemon.report()
            assert dumper.wait(harness.TIMEOUT_S) == 0, harness.tail(log / "dump.log")
        finally:
            daemon.stop()
