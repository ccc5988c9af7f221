# SPDX-License-Identifier: MIT
"""Defers the half of protobuf that is not used: it is a quarter of the time from start to the listening socket.

Seen in protobuf 5.29 to 7.36: google.protobuf.descriptor_pool imports the implementation in pure Python, and that the
text format and much else, also where the one in C (upb) does all the work. The well-known types, of which images have
none, import calendar.
"""

from __future__ import annotations

from lazyd.deferred import defer

defer("google.protobuf.internal.python_message")
defer("calendar")
