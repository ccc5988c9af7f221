# SPDX-License-Identifier: MIT
"""TCP as both ends of the page server's protocol use it: connecting, listening, noticing a dead peer in seconds.

Kernel facts (tcp(7); the last one seen on 6.18):

- Keepalive asks a peer on an idle connection whether it is there. While something is sent and not acknowledged, it
  does not ask: then retransmission decides, which gives up after a quarter of an hour.
- TCP_USER_TIMEOUT bounds that too. But it also ends a connection to a peer that lives and only does not read: zero
  window probes that are answered do not count.

So a peer that always reads (a server, of the few bytes that ask for pages) gets both. One that may pause (of bulk: a
full disk, a limited rate) gets keepalive alone, and is_silent() tells whoever must know while it sends.
"""

from __future__ import annotations

import errno
import socket
import struct

from lazyd.enums import Enum
from lazyd.errors import ProtocolError, SystemCallError

DEAD_AFTER_S = 6
"""How long a peer that is gone may stay unnoticed."""
_INFO_BYTES = 192
_BACKLOG = 128
# struct tcp_info (linux/tcp.h): tcpi_probes is its fourth byte, tcpi_unacked and tcpi_last_ack_recv (ms) are u32.
_INFO_PROBES, _INFO_UNACKED, _INFO_LAST_ACK = 3, 24, 56


class Peer(Enum):
    """What is known of the other end."""

    ALWAYS_READS = 0
    MAY_PAUSE = 1


def prepare(connection: socket.socket, peer: Peer, dead_after_s: int = DEAD_AFTER_S) -> None:
    """Have a dead peer noticed, and small messages sent at once; a socket that is not TCP stays as it is.

    dead_after_s: at least 2. Half of it a connection is idle before the peer is asked, once a second.
    """
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, dead_after_s // 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, dead_after_s - dead_after_s // 2)
    if peer is Peer.ALWAYS_READS:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, dead_after_s * 1000)


def is_silent(connection: socket.socket, dead_after_s: int = DEAD_AFTER_S) -> bool:
    """Tell whether what was sent is not acknowledged for so long: the peer, or the link, is gone."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    (unacknowledged,) = struct.unpack_from("=I", info, _INFO_UNACKED)
    (last_ms,) = struct.unpack_from("=I", info, _INFO_LAST_ACK)
    return bool(unacknowledged or info[_INFO_PROBES] > 1) and last_ms > dead_after_s * 1000


def connect(address: str, port: int, peer: Peer, *, timeout_s: float = 30.0) -> socket.socket:
    """Connect, and prepare the connection, which blocks. The error names the peer, and what to look at."""
    where = f"{address}:{port}"
    try:
        connection = socket.create_connection((address, port), timeout_s)
    except socket.gaierror as error:
        raise ProtocolError(where, f"no such host: {(error.strerror or str(error)).lower()}") from error
    except OSError as error:
        number = error.errno or errno.ETIMEDOUT
        raise SystemCallError("connect", number, path=where, hint=_CONNECT_HINTS.get(number, "")) from error
    connection.settimeout(None)
    prepare(connection, peer)
    return connection


_CONNECT_HINTS = {
    errno.ECONNREFUSED: "nobody listens there: is the other end up, and is it this port?",
    errno.ECONNRESET: "whoever listens there, or something between, hangs up at once",
    errno.ETIMEDOUT: "no answer: is the host up, and does a firewall let this port through?",
    errno.EHOSTUNREACH: "is the host up?",
    errno.ENETUNREACH: "no route: is the address right?",
}


def listen(address: str, port: int) -> socket.socket:
    """Listen at an address (a name, IPv4 or IPv6; "" for all) and a port (0: any)."""
    where = f"{address or 'any address'}:{port}"
    try:
        found = socket.getaddrinfo(address or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ProtocolError(where, f"no such host: {(error.strerror or str(error)).lower()}") from error
    family, _, _, _, target = found[0]
    try:
        return socket.create_server(target[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        number = error.errno or errno.EADDRNOTAVAIL
        raise SystemCallError("listen", number, path=where, hint=_LISTEN_HINTS.get(number, "")) from error


_LISTEN_HINTS = {
    errno.EADDRINUSE: "another program has this port",
    errno.EADDRNOTAVAIL: "no interface here has this address",
    errno.EACCES: "ports below 1024 need root",
}
