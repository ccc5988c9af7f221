# SPDX-License-Identifier: MIT
"""lazyd.enums against enum itself: the same classes, the same answers."""

from __future__ import annotations

import copy
import enum
import pickle

import pytest

from lazyd import enums


def define(enum_type, int_enum_type):
    class Kind(enum_type):
        """A docstring."""

        FIRST = "one"
        SECOND = (2, "two")
        SAME = "one"
        """Of a member."""

        @property
        def length(self):
            return len(self.value)

        def says(self, word):
            return f"{self.name} {word}"

    class Number(int_enum_type):
        ZERO = 0
        TEN = 10
        TEN_TOO = 10

    return Kind, Number


ANSWERS = {
    "members": lambda c: [(member.name, member.value) for member in c],
    "length": len,
    "names": lambda c: [c[name].name for name in ("FIRST", "SECOND", "SAME") if hasattr(c, name)],
    "by value": lambda c: [c(member.value) is member for member in c],
    "repr": lambda c: [repr(member) for member in c],
    "str": lambda c: [str(member) for member in c],
    "format": lambda c: [f"{member} {member!s} {member!r}" for member in c],
    "hashes": lambda c: len(dict.fromkeys(c, 1)),
    "equal": lambda c: [[one == other for one in c] for other in c],
    "instances": lambda c: [isinstance(member, c) and member in c for member in c],
    "doc": lambda c: c.__doc__,
    "true": lambda c: [bool(member) for member in c],
    "copies": lambda c: [copy.copy(member) is member is copy.deepcopy(member) for member in c],
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("which", [0, 1])
def test_as_of_enum(which, answer):
    theirs, ours = define(enum.Enum, enum.IntEnum)[which], define(enums.Enum, enums.IntEnum)[which]
    if (which, answer) == (1, "doc"):
        assert not ours.__doc__  # what an undocumented class says of itself differs between releases of enum
        return
    assert ANSWERS[answer](ours) == ANSWERS[answer](theirs)


def test_methods_and_properties():
    kind, _ = define(enums.Enum, enums.IntEnum)
    assert kind.FIRST.length == 3
    assert kind.SECOND.says("well") == "SECOND well"
    assert kind.SAME is kind.FIRST


@pytest.mark.parametrize("value", ["two", 3, [], None])
def test_a_value_of_no_member(value):
    raised = []
    for kind, _ in (define(enum.Enum, enum.IntEnum), define(enums.Enum, enums.IntEnum)):
        with pytest.raises(ValueError, match="is not a valid") as caught:
            kind(value)
        raised.append(str(caught.value))
    assert raised[0] == raised[1]


def test_numbers():
    theirs, ours = define(enum.Enum, enum.IntEnum)[1], define(enums.Enum, enums.IntEnum)[1]
    for number in (theirs, ours):
        assert number.TEN == 10
        assert number.TEN + 1 == 11
        assert number(10) is number.TEN is number.TEN_TOO
        assert f"{number.TEN:04d}" == "0010"
        assert isinstance(number.TEN, int)
        assert sorted([number.TEN, number.ZERO]) == [number.ZERO, number.TEN]


class Pickled(enums.Enum):
    ONE = 1


def test_a_member_that_is_pickled_is_the_same():
    assert pickle.loads(pickle.dumps(Pickled.ONE)) is Pickled.ONE


def test_matched():
    kind, _ = define(enums.Enum, enums.IntEnum)
    match kind("one"):
        case kind.SECOND:
            found = 2
        case kind.FIRST:
            found = 1
    assert found == 1
