# SPDX-License-Identifier: MIT
"""Imports point downwards only: the design's graph of rooms, and who alone may import what."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lazyd

ROOT = Path(lazyd.__file__).parent

# Higher imports lower, never the other way, nor across within a level unless named below.
LEVELS = [
    {"__main__"},
    {"cli"},
    {"cli_dump", "cli_migrate", "cli_restore", "cli_serve"},
    {"arguments"},
    {"daemon", "migrate"},
    {"session"},
    {"keeper", "uffd", "source", "target", "dump", "restore", "report", "restore_socket", "serve", "net"},
    {"image", "tcp", "tls", "wire"},
    {"units", "errors", "outputs", "limits"},
    {"deferred", "tuples"},
    {"enums"},
    {"hints"},
]
ACROSS = {
    ("dump", "report"),
    ("dump", "target"),
    ("keeper", "uffd"),
    ("report", "uffd"),
    ("restore", "target"),
    ("serve", "dump"),
    ("serve", "report"),
    ("tls", "wire"),
    ("units", "errors"),
}
ONLY_IMPORTERS = {
    "lazyd.uffd._engine": {"uffd"},
    "lazyd.image._pagemap": {"image"},
    "lazyd.target._target": {"target"},
    "lazyd.dump._memory": {"dump"},
    "lazyd.serve._server": {"serve"},
    "google.protobuf": {"image"},
    "ptrace": {"target"},
    "pyroute2": {"net"},
    "rich": {"report"},
}
# Before the socket listens, users wait: what is slow to import is imported when it is needed.
NEVER_AT_THE_TOP = {
    "rich",
    "json",
    "typing",
    "datetime",
    "importlib.metadata",
    "traceback",
    "dataclasses",
    "logging",
    "asyncio",
}
ON_THE_WAY_TO_LISTENING = {
    "cli",
    "arguments",
    "daemon",
    "session",
    "keeper",
    "restore_socket",
    "report",
    "target",
    "uffd",
}


def room(path):
    """The room that a file is in: the first part of its path below lazyd/."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path):
    """Yield (module, is at the top of its file) for everything a file imports at run time."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module, id(node) in top
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in top


def sources():
    """The files that are written by hand."""
    return [path for path in ROOT.rglob("*.py") if "pb" not in path.relative_to(ROOT).parts]


def level(name):
    """How high a room is; 0 is the highest."""
    return next(number for number, rooms in enumerate(LEVELS) if name in rooms)


def test_every_room_has_a_level():
    named = set.union(*LEVELS)
    assert {room(path) for path in sources()} - {"__init__"} <= named


def test_imports_point_downwards_only():
    wrong = set()
    for path in sources():
        here = room(path)
        if here == "__init__":
            continue
        for module, _ in imports(path):
            parts = module.split(".")
            if parts[0] != "lazyd" or len(parts) == 1 or not any(parts[1] in rooms for rooms in LEVELS):
                continue
            there = parts[1]
            if there != here and (here, there) not in ACROSS and level(here) >= level(there):
                wrong.add(f"{here} -> {there}")
    assert not wrong


def test_some_modules_have_one_importer():
    wrong = set()
    for path in sources():
        for module, _ in imports(path):
            for name, importers in ONLY_IMPORTERS.items():
                if (module == name or module.startswith(name + ".")) and room(path) not in importers:
                    wrong.add(f"{room(path)} imports {module}")
    assert not wrong


def test_slow_modules_are_not_imported_before_the_socket_listens():
    wrong = set()
    for path in sources():
        if room(path) not in ON_THE_WAY_TO_LISTENING:
            continue
        for module, is_top in imports(path):
            if is_top and module in NEVER_AT_THE_TOP:
                wrong.add(f"{room(path)} imports {module}")
    assert not wrong


REAL_IMAGES = Path(__file__).parent / "real_images" / "criu-4.1.1"


@pytest.mark.parametrize("implementation", ["upb", "python"])
def test_of_protobuf_only_what_is_used_is_imported(implementation):
    """The daemon's imports, then an image is read: right whichever implementation reads it."""
    code = """
import sys
import lazyd.daemon
early = "google.protobuf.text_format" in sys.modules
from google.protobuf.internal import api_implementation
from pathlib import Path
from lazyd.image.directory import ImagesDirectory
tasks = ImagesDirectory.open(Path(sys.argv[1])).read_pstree()
print(api_implementation.Type(), early, [task.pid for task in tasks])
"""
    environment = os.environ | {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": implementation}
    command = [sys.executable, "-c", code, str(REAL_IMAGES)]
    said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    pids = [task[0] for task in json.loads((REAL_IMAGES / "crit.json").read_text())["tasks"]]
    assert said == f"{implementation} {implementation == 'python'} {pids}\n"
