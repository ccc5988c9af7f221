# SPDX-License-Identifier: MIT
"""What of typing is named here, without typing: its import is a twentieth of the start that users wait for.

All of it is for type checkers, who see typing's own. At run time a name stands for nothing, a base class for an empty
one, and a new type for the type that it is made of.
"""

from __future__ import annotations

TYPE_CHECKING = False

__all__ = [
    "TYPE_CHECKING",
    "Any",
    "BinaryIO",
    "ClassVar",
    "Generic",
    "NewType",
    "NoReturn",
    "Protocol",
    "Self",
    "TextIO",
    "TypeAlias",
    "TypeVar",
    "cast",
]

if TYPE_CHECKING:
    from typing import (
        Any,
        BinaryIO,
        ClassVar,
        Generic,
        NewType,
        NoReturn,
        Protocol,
        Self,
        TextIO,
        TypeAlias,
        TypeVar,
        cast,
    )
else:

    class Protocol:
        """A base class of nothing."""

    class Generic:
        """A base class of nothing, whatever of."""

        __slots__ = ()

        def __class_getitem__(cls, _: object) -> type:
            return cls

    def NewType(_: str, base: type) -> type:
        return base

    def TypeVar(name: str) -> str:
        return name

    def cast(_: object, value: object) -> object:
        return value

    Any = BinaryIO = ClassVar = NoReturn = Self = TextIO = TypeAlias = object
