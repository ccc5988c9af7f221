# SPDX-License-Identifier: MIT
"""The extended state of a thread: what PTRACE_GETREGSET returns as NT_X86_XSTATE, taken apart.

Intel's manual, volume 1, chapter 13: 512 bytes that FXSAVE defines, a header of 64 whose first word says which parts
are in use, then the parts, each where CPUID says. The kernel writes the processor's XCR0 into bytes that the legacy
area leaves to software (offset 464; arch/x86/include/asm/user.h), and zeros or initial values into parts not in use.
"""

from __future__ import annotations

import struct

from lazyd.errors import DumpError
from lazyd.target._target import ffi, lib
from lazyd.tuples import NamedTuple

_LEGACY_BYTES, _HEADER_BYTES = 512, 64
_XCR0_AT = 464
# Bits of XCR0.
YMM, BOUNDS, BOUNDS_CONFIGURATION, MASKS, ZMM_UPPER, ZMM_HIGH, PROTECTION_KEYS = 2, 3, 4, 5, 6, 7, 9
_IMAGES_HOLD = {0, 1, YMM, BOUNDS, BOUNDS_CONFIGURATION, MASKS, ZMM_UPPER, ZMM_HIGH, PROTECTION_KEYS}


class ExtendedState(NamedTuple):
    """The legacy area whole, and the parts that this processor has, by their bit in XCR0."""

    legacy: bytes
    in_use: int
    parts: dict[int, bytes]


def parse(area: bytes) -> ExtendedState:
    """Take an area apart; DumpError if a part is in use that images have no place for."""
    legacy, header = area[:_LEGACY_BYTES], area[_LEGACY_BYTES : _LEGACY_BYTES + _HEADER_BYTES]
    if len(header) < _HEADER_BYTES:
        return ExtendedState(legacy, 3, {})  # a processor without XSAVE
    (in_use,) = struct.unpack_from("<Q", header)
    (xcr0,) = struct.unpack_from("<Q", area, _XCR0_AT)
    parts = {}
    for bit in range(2, 63):
        if not (xcr0 | in_use) >> bit & 1:
            continue
        if bit not in _IMAGES_HOLD:
            if in_use >> bit & 1:
                raise DumpError(f"a thread uses part {bit} of its processor's extended state, which no image can hold")
            continue
        offset, size = _part(bit)
        parts[bit] = area[offset : offset + size]
    return ExtendedState(legacy, in_use, parts)


def part_place(bit: int) -> tuple[int, int]:
    """Return offset and size of a part; LookupError if this processor has none."""
    offset, size = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    if lib.lz_xstate_part(bit, offset, size):
        raise LookupError(bit)
    return offset[0], size[0]


def _part(bit: int) -> tuple[int, int]:
    try:
        return part_place(bit)
    except LookupError:
        raise DumpError(f"this processor does not say where part {bit} of its extended state is") from None


XSAVE_FIELDS = {
    YMM: ("ymmh_space", "I"),
    BOUNDS: ("bndreg_state", "Q"),
    BOUNDS_CONFIGURATION: ("bndcsr_state", "Q"),
    MASKS: ("opmask_reg", "Q"),
    ZMM_UPPER: ("zmm_upper", "Q"),
    ZMM_HIGH: ("hi16_zmm", "Q"),
    PROTECTION_KEYS: ("pkru", "I"),
}
"""Of each component that images keep: its field in core.proto, and the struct letter of its elements."""
