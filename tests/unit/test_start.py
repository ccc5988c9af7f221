# SPDX-License-Identifier: MIT
"""What makes lazyd start faster does the same as what it stands in for."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import lazyd
from lazyd import tuples


class Ours(tuples.NamedTuple):
    """Fields with and without defaults, and what is no field."""

    start: int
    end: int | None
    """What a field means."""
    name: str = "none"
    others: tuple[int, ...] = ()

    @property
    def length(self):
        return self.end - self.start

    def moved(self, by):
        return self._replace(start=self.start + by, end=self.end + by)


class Theirs(typing.NamedTuple):
    """The same, of typing."""

    start: int
    end: int | None
    """What a field means."""
    name: str = "none"
    others: tuple[int, ...] = ()

    @property
    def length(self):
        return self.end - self.start

    def moved(self, by):
        return self._replace(start=self.start + by, end=self.end + by)


class OursEmpty(tuples.NamedTuple):
    """No fields."""


class TheirsEmpty(typing.NamedTuple):
    """No fields."""


def matched(one):
    match one:
        case Ours(start, end) | Theirs(start, end):
            return start, end
        case OursEmpty() | TheirsEmpty():
            return ()


@pytest.mark.parametrize(
    "what",
    [
        lambda kind, _: kind(1, 2),
        lambda kind, _: kind(1, end=2, others=(3,)),
        lambda kind, _: kind._make([1, 2, "a", (3,)]),
        lambda kind, _: kind(1, 2).moved(3),
        lambda kind, _: kind(1, 4).length,
        lambda kind, _: repr(kind(1, None)).partition("(")[2],
        lambda kind, _: kind(1, 2)._asdict(),
        lambda kind, _: (*kind(1, 2), hash(kind(1, 2)), kind(1, 2) == (1, 2, "none", ()), kind(1, 2) < kind(1, 3)),
        lambda kind, _: (kind._fields, kind._field_defaults, kind.__match_args__),
        lambda kind, _: matched(kind(1, 2)),
        lambda kind, _: pickle.loads(pickle.dumps(kind(1, 2))),
        lambda kind, _: copy.deepcopy(kind(1, 2, others=(5,))),
        lambda kind, _: hasattr(kind(1, 2), "__dict__"),
        lambda kind, _: type(kind(1, 2)) is kind and isinstance(kind(1, 2), tuple),
        lambda _, empty: (empty(), empty._fields, matched(empty()), len(empty()), repr(empty()).partition("(")[2]),
    ],
)
def test_named_tuples_do_what_those_of_typing_do(what):
    # The first constructor that is called makes another one: each is asked twice.
    assert [what(Ours, OursEmpty) for _ in range(2)] == [what(Theirs, TheirsEmpty) for _ in range(2)]


@pytest.mark.parametrize(
    "what",
    [
        lambda kind: kind(1),
        lambda kind: kind(1, 2, "a", (), 5),
        lambda kind: kind(1, 2, nothing=3),
        lambda kind: kind(1, 2, end=3),
        lambda kind: kind._make([1]),
        lambda kind: kind(1, 2)._replace(nothing=3),
        lambda kind: setattr(kind(1, 2), "start", 3),
        lambda kind: setattr(kind(1, 2), "nothing", 3),
    ],
)
def test_named_tuples_refuse_what_those_of_typing_refuse(what):
    for _ in range(2):
        with pytest.raises(Exception) as theirs:
            what(Theirs)
        with pytest.raises(theirs.type):
            what(Ours)


def test_a_field_without_a_default_comes_first():
    for base in (tuples.NamedTuple, typing.NamedTuple):
        with pytest.raises(TypeError):
            type(base)("Bad", (base,), {"__annotations__": {"a": "int", "b": "int"}, "a": 1, "__module__": __name__})


def test_annotations_are_text_wherever_named_tuples_are_made():
    for path in Path(lazyd.__file__).parent.rglob("*.py"):
        text = path.read_text()
        if "(NamedTuple" in text:
            assert "from lazyd.tuples import NamedTuple" in text or path.name == "tuples.py", path
            assert "from __future__ import annotations" in text, path


def run(code):
    """What a fresh interpreter says to a script."""
    return subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout


def test_what_is_deferred_is_there_when_it_is_used():
    said = run("""
import sys
sys.argv = ["lazyd"]
from lazyd.__main__ import run
run()
import lazyd.target.binding, lazyd.image
never = "urllib.parse", "traceback", "calendar", "ptrace.logging_tools", "typing", "datetime", "gettext"
early = [name for name in never if name in sys.modules]
import gettext, pathlib, ptrace.error
print(early, pathlib.Path("/a b").as_uri(), gettext.ngettext("page", "pages", 2))
import logging, io
stream = io.StringIO()
logging.basicConfig(stream=stream, level=logging.DEBUG, format="%(levelname)s %(message)s")
try:
    1 / 0
except ZeroDivisionError as error:
    ptrace.error.writeError(None, error, "wrong", logging.ERROR)
print(stream.getvalue().splitlines()[0], "ZeroDivisionError" in stream.getvalue().splitlines()[-1])
""")
    assert said.splitlines() == [
        "[] file:///a%20b pages",
        "ERROR wrong: [ZeroDivisionError] division by zero True",
    ]
