# SPDX-License-Identifier: MIT
"""Encode the small images. Records are dictionaries in the words of images/*.proto, as crit shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lazyd.enums import Enum
from lazyd.hints import Any
from lazyd.image.framing import COMMON_MAGIC, CORE_MAGICS, INVENTORY_MAGICS, MM_MAGICS, PSTREE_MAGICS
from lazyd.image.pb import core_pb2, files_pb2, inventory_pb2, mm_pb2, pstree_pb2

# protobuf makes the classes of a generated module at run time: type checkers cannot see them.
_core: Any = core_pb2
_files: Any = files_pb2
_inventory: Any = inventory_pb2
_mm: Any = mm_pb2
_pstree: Any = pstree_pb2

Record = Mapping[str, Any]


class SmallImage(Enum):
    """The kinds of small images: magics and message of each."""

    INVENTORY = (INVENTORY_MAGICS, _inventory.Inventory)
    PSTREE = (PSTREE_MAGICS, _pstree.PstreeEntry)
    IDS = ((COMMON_MAGIC, 0x54432030), _inventory.KernelObjects)
    TIMENS = ((COMMON_MAGIC, 0x43114433), _inventory.Clocks)
    CORE = (CORE_MAGICS, _core.Core)
    MM = (MM_MAGICS, _mm.Mm)
    FS = ((COMMON_MAGIC, 0x51403912), _files.Place)
    FDINFO = ((COMMON_MAGIC, 0x56213732), _files.FileDescriptor)
    FILES = ((COMMON_MAGIC, 0x56303138), _files.File)
    TTY_INFO = ((COMMON_MAGIC, 0x59453036), _files.Terminal)
    MEMFD = ((COMMON_MAGIC, 0x48453499), _files.MemoryInode)
    PIPES_DATA = ((COMMON_MAGIC, 0x56453709), _files.PipeData)

    @property
    def magics(self) -> tuple[int, ...]:
        """What the file begins with."""
        magics: tuple[int, ...] = self.value[0]
        return magics

    @property
    def message(self) -> Any:  # noqa: ANN401  see above
        """The class of its records."""
        return self.value[1]

    def encode(self, records: Iterable[Record]) -> list[bytes]:
        """Return the bodies of these records."""
        return [self.value[1](**record).SerializeToString() for record in records]
