# SPDX-License-Identifier: MIT
"""Hosts on one machine: network namespaces joined by pairs of virtual Ethernet devices; and tables of nftables.

The only user of pyroute2.

    with Network() as network:
        source, destination = network.host("source"), network.host("destination")
        link = network.join(source, destination, rate_bits=10**10)
        server = subprocess.Popen([..., "--address", link.first], preexec_fn=source.enter)

Kernel facts: a network namespace lives as long as a task is in it or a descriptor of it is open, and its devices end
with it, also those whose other end is elsewhere; setns(2) moves one thread. So the namespaces here have no names: what
holds them is a descriptor, and whatever ends this process, nothing is left of them once the tasks in them have ended.

A delay is netem's where the kernel has it; where not, Link.missing_delay_s says what somebody else must add. A rate is
tbf's, at both ends. Its bucket must hold a segment of up to 64 KiB as the sender makes them, else it cuts them up.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from lazyd.errors import SystemCallError
from lazyd.hints import TYPE_CHECKING
from lazyd.tuples import NamedTuple

if TYPE_CHECKING:
    from pyroute2 import IPRoute

_CLONE_NEWNET = 0x40000000
_HERE = "/proc/thread-self/ns/net"
_LEAST_BUCKET_BYTES = 256 << 10
_BUCKETS_A_SECOND = 500
"""A bucket holds what the rate is in 2 ms: less, and a busy machine's timers keep the link below its rate."""
_QUEUE_S = 0.05
_NETEM_PACKETS = 200_000
_ROOT = 0xFFFFFFFF

_libc = ctypes.CDLL(None, use_errno=True)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise SystemCallError("setns(CLONE_NEWNET)", number, hint="entering a network namespace needs root")


def _unshare() -> None:
    if _libc.unshare(_CLONE_NEWNET):
        number = ctypes.get_errno()
        raise SystemCallError("unshare(CLONE_NEWNET)", number, hint="making a network namespace needs root")


@contextmanager
def _and_back() -> Iterator[None]:
    """Put this thread back into its network namespace, whatever happens."""
    before = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        _setns(before)
        os.close(before)


class Host:
    """A network namespace with its loopback up, made by Network.host()."""

    def __init__(self, name: str) -> None:
        self.name = name
        with _and_back():
            _unshare()
            self._descriptor = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
        self.links = 0

    def enter(self) -> None:
        """Move this thread here for good: what a child does between fork and exec (preexec_fn)."""
        _setns(self._descriptor)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Have this thread here for a while: sockets that it makes stay here."""
        with _and_back():
            self.enter()
            yield

    def fileno(self) -> int:
        """Return the descriptor of its network namespace."""
        return self._descriptor

    def close(self) -> None:
        """Let go of it: it ends with the last task in it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Link:
    """What joins two hosts, made by Network.join()."""

    def __init__(self, ends: list[_End], rate_bits: int, delay_s: float) -> None:
        self._ends = ends
        self._rate_bits = rate_bits
        self._delay_s = delay_s
        self.first, self.second = (end.address for end in ends)
        """The hosts' addresses."""
        self.missing_delay_s = 0.0
        """What of the wanted delay (one way) this kernel cannot add."""
        self.mend()

    def cut(self) -> None:
        """Have it swallow everything, with nobody told: a cable that is cut somewhere on the way."""
        for end in self._ends:
            with end.host.inside(), _routes() as routes:
                routes.tc("replace", "blackhole", end.device)

    def mend(self) -> None:
        """Have it carry what it should again."""
        for end in self._ends:
            with end.host.inside(), _routes() as routes:
                _clear(routes, end.device)
                can_delay = bool(self._delay_s) and _delay(routes, end.device, self._delay_s)
                if self._rate_bits:
                    _limit(routes, end.device, self._rate_bits, below_delay=can_delay)
            self.missing_delay_s = 0.0 if can_delay else self._delay_s


class _End(NamedTuple):
    host: Host
    device: int
    address: str


class Network:
    """Some hosts and the links between them. As a context manager it lets go of all of them."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._links = 0

    def host(self, name: str) -> Host:
        """Make a host."""
        one = Host(name)
        self._stack.callback(one.close)
        with one.inside(), _routes() as routes:
            routes.link("set", index=_index(routes, "lo"), state="up")
        return one

    def join(self, first: Host, second: Host, *, rate_bits: int = 0, delay_s: float = 0.0) -> Link:
        """Join two hosts by a link of a rate in bit/s (0: as fast as it goes) and a delay, both in each direction."""
        subnet = self._links
        self._links += 1
        ends = [(first, f"10.77.{subnet}.1", second), (second, f"10.77.{subnet}.2", first)]
        names = [f"to-{other.name}"[:13] + f"{other.links}" for _, _, other in ends]
        with first.inside(), _routes() as routes:
            peer = {"ifname": names[1], "net_ns_fd": second.fileno()}
            routes.link("add", ifname=names[0], kind="veth", peer=peer)
        made = []
        for (host, address, _), name in zip(ends, names, strict=True):
            with host.inside(), _routes() as routes:
                index = _index(routes, name)
                routes.addr("add", index=index, address=address, prefixlen=30)
                routes.link("set", index=index, state="up")
            host.links += 1
            made.append(_End(host, index, address))
        return Link(made, rate_bits, delay_s)

    def close(self) -> None:
        """Let go of all hosts."""
        self._stack.close()

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def has_netem() -> bool:
    """Tell whether this kernel can delay what a link carries."""
    with Network() as network:
        ends = network.host("a"), network.host("b")
        return not network.join(*ends, delay_s=0.001).missing_delay_s


_FAMILY_INET = 1


def firewall_tables(prefix: str) -> set[str]:
    """Return the names of this thread's host's nftables tables of the family inet that begin so."""
    from pyroute2.nftables.main import NFTables  # noqa: PLC0415

    with NFTables(nfgen_family=_FAMILY_INET) as tables:
        names = {str(dict(table["attrs"])["NFTA_TABLE_NAME"]) for table in tables.get_tables()}
    return {name for name in names if name.startswith(prefix)}


def delete_firewall_table(name: str) -> None:
    """Delete a table of the family inet of this thread's host."""
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415
    from pyroute2.nftables.main import NFTables  # noqa: PLC0415

    with NFTables(nfgen_family=_FAMILY_INET) as tables:
        try:
            tables.table("del", name=name)
        except NetlinkError as error:
            raise SystemCallError(f"deleting the nftables table {name}", error.code) from error


@contextmanager
def _routes() -> Iterator[IPRoute]:
    from pyroute2 import IPRoute  # noqa: PLC0415  it takes 0.3 s, and few need it
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    with IPRoute() as routes:
        try:
            yield routes
        except NetlinkError as error:
            raise SystemCallError("netlink", error.code, hint="making links needs root") from error


def _index(routes: IPRoute, name: str) -> int:
    """Return the number of a device."""
    return int(routes.link_lookup(ifname=name)[0])


def _clear(routes: IPRoute, index: int) -> None:
    """Have a device send as it is told, at once."""
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    try:
        routes.tc("del", index=index, parent=_ROOT)
    except NetlinkError as error:
        if error.code != errno.ENOENT:
            raise


def _delay(routes: IPRoute, index: int, delay_s: float) -> bool:
    """Delay what leaves by a device; return False if the kernel has no netem."""
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    try:
        routes.tc("add", "netem", index, "1:", delay=int(delay_s * 1e6), limit=_NETEM_PACKETS)
    except NetlinkError as error:
        if error.code == errno.ENOENT:
            return False
        raise
    return True


def _limit(routes: IPRoute, index: int, rate_bits: int, *, below_delay: bool) -> None:
    """Limit the rate of what leaves by a device, behind its delay if it has one."""
    bucket = max(_LEAST_BUCKET_BYTES, rate_bits // 8 // _BUCKETS_A_SECOND)
    where = {"parent": "1:1"} if below_delay else {}
    routes.tc(
        "add", "tbf", index, "2:", rate=f"{rate_bits}bit", burst=bucket, latency=f"{_QUEUE_S * 1000:.0f}ms", **where
    )
