# SPDX-License-Identifier: MIT
"""stats-dump: what a dump says of itself, in the words of the dialect that its pagemaps are in.

Field 9 is pages_zero where zero holes are entries, and pages_lazy in stock CRIU; stock refuses a message without it.
"""

from __future__ import annotations

from lazyd.hints import Any
from lazyd.image.framing import STATS_MAGICS
from lazyd.image.pagemap import Dialect
from lazyd.image.pb import stats_pb2
from lazyd.image.writer import ImagesWriter
from lazyd.tuples import NamedTuple

STATS_DUMP = "stats-dump"
_UINT32_MAX = (1 << 32) - 1

_stats: Any = stats_pb2


class DumpStats(NamedTuple):
    """Times in seconds; pages of private memory.

    freezing: until all threads were stopped. frozen: from then on until they were let go or killed. memdump: looking
    at memory and copying it; memwrite: the copying alone.
    """

    freezing: float
    frozen: float
    memdump: float
    memwrite: float
    pages_scanned: int
    pages_skipped_parent: int
    pages_written: int
    pages_zero: int
    pages_lazy: int


def encode_stats(stats: DumpStats, dialect: Dialect) -> bytes:
    """Return the message for a stats-dump file."""

    def microseconds(seconds: float) -> int:
        return min(int(seconds * 1e6), _UINT32_MAX)

    message = _stats.Stats()
    dump = message.dump
    dump.freezing_time = microseconds(stats.freezing)
    dump.frozen_time = microseconds(stats.frozen)
    dump.memdump_time = microseconds(stats.memdump)
    dump.memwrite_time = microseconds(stats.memwrite)
    dump.pages_scanned = stats.pages_scanned
    dump.pages_skipped_parent = stats.pages_skipped_parent
    dump.pages_written = stats.pages_written
    dump.irmap_resolve = 0
    dump.pages_lazy_or_zero = stats.pages_zero if dialect is Dialect.BOOLEANS else stats.pages_lazy
    return bytes(message.SerializeToString())


def write_stats(writer: ImagesWriter, stats: DumpStats, dialect: Dialect) -> None:
    """Write stats-dump."""
    writer.write_small(STATS_DUMP, STATS_MAGICS, [encode_stats(stats, dialect)])
