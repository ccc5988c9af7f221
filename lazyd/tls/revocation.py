# SPDX-License-Identifier: MIT
"""Which certificates are revoked, as stock criu sees it (by GnuTLS; seen, 4.1.1 and 4.2.1).

OpenSSL's own check is another: it refuses everybody once a list has expired, and everybody whose authority has no list.
Stock accepts both, so somebody's working migration would fail here. So lists are read here: issuer and serial numbers,
by the few rules of DER that they need (X.690; RFC 5280, sections 4.1 and 5.1). A list is a file that the user names; as
in stock, its signature is not checked.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from pathlib import Path

from lazyd.errors import TlsError
from lazyd.tuples import NamedTuple

_SEQUENCE, _INTEGER, _UTC_TIME, _GENERALIZED_TIME, _VERSION_TAG = 0x30, 0x02, 0x17, 0x18, 0xA0
_LIST = re.compile(rb"-----BEGIN X509 CRL-----(.+?)-----END X509 CRL-----", re.DOTALL)


class Identity(NamedTuple):
    """What names a certificate: its issuer's name, as DER, and its serial number."""

    issuer: bytes
    serial: bytes


class _Value(NamedTuple):
    tag: int
    content: bytes
    whole: bytes


def _values(content: bytes) -> Iterator[_Value]:
    """Yield the values that stand in a row; ValueError if they are no DER."""
    at = 0
    while at < len(content):
        if at + 2 > len(content):
            raise ValueError("a value ends in its head")
        tag, length, start = content[at], content[at + 1], at + 2
        if length >= 0x80:
            count = length & 0x7F
            if not 0 < count <= 4 or start + count > len(content):
                raise ValueError("a length that DER does not have")
            length = int.from_bytes(content[start : start + count], "big")
            start += count
        if start + length > len(content):
            raise ValueError("a value is longer than what it is in")
        yield _Value(tag, content[start : start + length], content[at : start + length])
        at = start + length


def _only(content: bytes) -> bytes:
    """Return what is in the sequence that the content is."""
    (outer,) = _values(content)
    if outer.tag != _SEQUENCE:
        raise ValueError("no sequence")
    return outer.content


def certificate_identity(certificate: bytes) -> Identity:
    """Return what names a certificate, which OpenSSL has parsed before."""
    signed = next(_values(_only(certificate)))
    fields = [value for value in _values(signed.content) if value.tag != _VERSION_TAG]
    serial, _, issuer = fields[:3]
    return Identity(issuer.whole, serial.content)


def _list_identities(content: bytes) -> Iterator[Identity]:
    signed = next(_values(_only(content)))
    fields = list(_values(signed.content))
    if fields and fields[0].tag == _INTEGER:  # the version, where there is one
        del fields[0]
    _, issuer, *rest = fields
    while rest and rest[0].tag in (_UTC_TIME, _GENERALIZED_TIME):
        del rest[0]
    if rest and rest[0].tag == _SEQUENCE:
        for entry in _values(rest[0].content):
            serial = next(_values(entry.content))
            yield Identity(issuer.whole, serial.content)


def read_revoked(path: Path) -> frozenset[Identity]:
    """Return what the lists in a PEM file revoke; TlsError if it is no such file."""
    try:
        lists = _LIST.findall(path.read_bytes())
    except OSError as error:
        raise TlsError(path, f"the revocation list cannot be read: {(error.strerror or '').lower()}") from error
    if not lists:
        raise TlsError(path, "no revocation list in PEM form")
    found: set[Identity] = set()
    for text in lists:
        try:
            found.update(_list_identities(binascii.a2b_base64(text)))
        except (ValueError, StopIteration) as error:
            raise TlsError(path, f"not a revocation list: {error}") from error
    return frozenset(found)
