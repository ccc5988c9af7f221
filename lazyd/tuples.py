# SPDX-License-Identifier: MIT
"""NamedTuple, as of typing, defined in a tenth of the time: users wait until some sixty of them are.

typing's compiles the annotations one by one, then writes, compiles and runs a constructor, for each class, also for
those of which no tuple is ever made. Here annotations stay the text that they are (so a module that uses this imports
them from __future__), and the constructor comes with the first tuple. Type checkers see typing's own.
"""

from __future__ import annotations

from lazyd.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple  # noqa: PLC0414  handed on
else:
    from collections import _tuplegetter
    from collections.abc import Iterable

    from lazyd.hints import Any, Self

    class _Definition(type):
        """Makes a class of tuples from its annotations, in their order, and from the values beside them."""

        def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
            namespace["__slots__"] = ()
            fields = tuple(namespace.get("__annotations__", ()))
            if fields:
                defaults = {field: namespace[field] for field in fields if field in namespace}
                if tuple(defaults) != fields[len(fields) - len(defaults) :]:
                    raise TypeError(f"{name}: a field without a default behind one that has one")
                namespace |= {field: _tuplegetter(index, field) for index, field in enumerate(fields)}
                namespace |= {"_fields": fields, "_field_defaults": defaults, "__match_args__": fields}
            return super().__new__(cls, name, bases, namespace)

    class NamedTuple(tuple, metaclass=_Definition):
        """A tuple whose fields have names."""

        def __new__(cls, /, *values: object, **named: object) -> Self:
            """Make the first tuple of a class; from then on its own constructor does."""
            names = "".join(f"{field}, " for field in cls._fields)
            constructor = eval(f"lambda _cls, {names}: _new(_cls, ({names}))", {"_new": tuple.__new__})
            constructor.__qualname__ = f"{cls.__qualname__}.__new__"
            constructor.__defaults__ = tuple(cls._field_defaults.values())
            cls.__new__ = constructor
            return constructor(cls, *values, **named)

        @classmethod
        def _make(cls, values: Iterable[object]) -> Self:
            return cls(*values)

        def _replace(self, /, **values: object) -> Self:
            made = self._make(map(values.pop, self._fields, self))
            if values:
                raise ValueError(f"{type(self).__name__} has no {', '.join(values)}")
            return made

        def _asdict(self) -> dict[str, object]:
            return dict(zip(self._fields, self, strict=True))

        def __repr__(self) -> str:
            named = (f"{field}={value!r}" for field, value in self._asdict().items())
            return f"{type(self).__name__}({', '.join(named)})"

        def __getnewargs__(self) -> tuple[object, ...]:
            return tuple(self)

    NamedTuple._fields = NamedTuple.__match_args__ = ()
    NamedTuple._field_defaults = {}
