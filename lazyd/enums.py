# SPDX-License-Identifier: MIT
"""Enum and IntEnum, as of enum, defined in a tenth of the time: users wait until a hundred members are.

What is here of theirs is what is used: members by name, value and in order, each one object, with methods beside them.
Type checkers see enum's own. Flags are enum's.
"""

from __future__ import annotations

from lazyd.hints import TYPE_CHECKING

__all__ = ["Enum", "IntEnum"]

if TYPE_CHECKING:
    from enum import Enum, IntEnum
else:
    from collections.abc import Iterator

    from lazyd.hints import Any, Self

    class _Definition(type):
        """Makes a class from its members: what is in it, begins with no underscore and is no method."""

        def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
            values = {
                key: value
                for key, value in namespace.items()
                if not key.startswith("_") and not hasattr(value, "__get__")
            }
            made = super().__new__(cls, name, bases, {key: namespace[key] for key in namespace if key not in values})
            made._by_name = {}
            made._by_value = {}
            base = int if issubclass(made, int) else object
            for key, value in values.items() if bases else ():
                member = made._by_value.get(value)
                if member is None:
                    member = base.__new__(made, value) if base is int else base.__new__(made)
                    member.name, member.value = key, value
                    made._by_value[value] = member
                made._by_name[key] = member
                setattr(made, key, member)
            return made

        def __call__(cls, value: object) -> Any:  # noqa: ANN401  as enum's
            """Return the member with a value."""
            try:
                return cls._by_value[value]
            except (KeyError, TypeError):
                raise ValueError(f"{value!r} is not a valid {cls.__qualname__}") from None

        def __getitem__(cls, name: str) -> Any:  # noqa: ANN401  as enum's
            return cls._by_name[name]

        def __iter__(cls) -> Iterator[Any]:
            return iter(cls._by_value.values())

        def __len__(cls) -> int:
            return len(cls._by_value)

        def __contains__(cls, member: object) -> bool:
            return isinstance(member, cls)

    class Enum(metaclass=_Definition):
        """Members that are themselves."""

        def __repr__(self) -> str:
            return f"<{type(self).__name__}.{self.name}: {self.value!r}>"

        def __str__(self) -> str:
            return f"{type(self).__name__}.{self.name}"

        def __reduce__(self) -> tuple[type, tuple[object]]:
            return type(self), (self.value,)

        def __copy__(self) -> Self:
            return self

        def __deepcopy__(self, _: object) -> Self:
            return self

    class IntEnum(int, Enum):
        """Members that are numbers, and look like them in text."""

        __repr__ = Enum.__repr__
        __str__ = int.__repr__
        __format__ = int.__format__
