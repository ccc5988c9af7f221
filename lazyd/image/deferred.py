# SPDX-License-Identifier: MIT
"""Defers the half of protobuf that is not used: it is a quarter of the time from start to the listening socket.

Seen in protobuf 5.29 to 7.36: google.protobuf.descriptor_pool imports the implementation in pure Python, and that the
text format and much else, also where the one in C (upb) does all the work; and what its own pool, in Python, is made
of. When the first class of messages is made, upb asks for the well-known types, of which images have none: they import
datetime and typing.
"""

from __future__ import annotations

import sys
from types import ModuleType

from lazyd.deferred import defer

_WELL_KNOWN_TYPES = "google.protobuf.internal.well_known_types"

for name in (
    "google.protobuf.internal.python_message",
    "google.protobuf.internal.python_edition_defaults",
    "google.protobuf.descriptor_database",
    "google.protobuf.text_encoding",
):
    defer(name)

if _WELL_KNOWN_TYPES not in sys.modules:
    sys.modules[_WELL_KNOWN_TYPES] = ModuleType(_WELL_KNOWN_TYPES)
    vars(sys.modules[_WELL_KNOWN_TYPES])["WKTBASES"] = {}  # names of messages, and what is added to their classes
