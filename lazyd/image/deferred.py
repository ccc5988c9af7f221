# SPDX-License-Identifier: MIT
"""Defers the half of protobuf that is not used: it is a quarter of the time from start to the listening socket.

Seen in protobuf 5.29 to 7.36: google.protobuf.descriptor_pool imports the implementation in pure Python, and that the
text format and much else, also where the one in C (upb) does all the work; and what its own pool, in Python, is made
of. The well-known types, of which images have none, import calendar.
"""

from __future__ import annotations

from lazyd.deferred import defer

for name in (
    "google.protobuf.internal.python_message",
    "google.protobuf.internal.python_edition_defaults",
    "google.protobuf.descriptor_database",
    "google.protobuf.text_encoding",
    "calendar",
):
    defer(name)
