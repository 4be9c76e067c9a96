"""Which URLs may be fetched, and which addresses may be connected to (RELIABILITY.md section 5.2). Pure.

A URL is taken apart once, here, and what is sent later is put together from these pieces: no second parser has a say.
Whoever asks must name a host that belongs to the public, by its name; what the name stands for is judged as well.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final
from urllib.parse import quote, urljoin

import idna

HTTPS_PORT: Final = 443
MAX_URL_CHARS: Final = 8192
_MAX_HOST_CHARS: Final = 253
_URL: Final = re.compile(
    r"https://(?P<host>[^/?#:@%\[\]]+)(?::(?P<port>[0-9]{1,5}))?(?P<target>[/?][^#]*)?(?:#.*)?",
    re.ASCII | re.IGNORECASE,
)
_HOST: Final = re.compile(
    r"(?P<labels>(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*)(?P<top>[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)"
)
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
"""As the last label it makes an IPv4 address of a name, in some parsers: 127.1, 0x7f.1, 2130706433."""
_DOMAIN: Final = re.compile(r"(?P<host>[^:]+)(?::(?P<port>[0-9]{1,5}))?")
_INSIDE: Final = frozenset({"arpa", "home", "internal", "lan", "local", "localdomain", "localhost", "onion"})
"""Top-level names that never stand for a public server; cloud metadata has one in ``internal``."""
_PRINTABLE_ASCII: Final = "".join(map(chr, range(0x21, 0x7F)))

# IANA's registries of special addresses. Not ``is_global``, whose answers differ between releases of Python.
_NOT_PUBLIC_V4: Final = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "168.63.129.16/32",  # of one cloud, to its machines only
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",
            "240.0.0.0/4",
        ),
    )
)
_PRIVATE: Final[tuple[IPv4Network | IPv6Network, ...]] = (
    *map(IPv4Network, ("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")),
    *map(IPv6Network, ("::1/128", "fc00::/7")),
)
"""Of these an operator may allow some hosts."""
_NEVER: Final = (IPv4Network("100.100.100.200/32"), IPv6Network("fd00:ec2::254/128"))
"""Private by their numbers, and where clouds tell machines their secrets."""
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
_NOT_PUBLIC_V6: Final = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "3fff::/20")))
_NAT64: Final = IPv6Network("64:ff9b::/96")


class Blocked(ValueError):
    """Not to be fetched. Says why, to the log at most: clients learn that it is so and nothing else."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that was checked. All in ASCII."""

    host: str  # lower case; also what its certificate must name
    port: int
    path: str  # with the query, as it is sent

    @property
    def authority(self) -> str:
        """As in the ``Host`` header."""
        return self.host if self.port == HTTPS_PORT else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"https://{self.authority}{self.path}"


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """What an operator allows.

    Args:
        domains: (host, port) of the only servers that may be asked; empty: every public one, at the usual port.
        allows_private: these may be of the operator's own network. Nothing without ``domains``.
    """

    domains: frozenset[tuple[str, int]] = frozenset()
    allows_private: bool = False

    def parse(self, url: str) -> Target:
        """Check a URL. Raises Blocked."""
        _check_characters(url)
        match = _URL.fullmatch(url)
        if match is None:
            raise Blocked("not https://HOST/PATH")
        host, port = _normalise(match["host"], self._may_be_inside), int(match["port"] or HTTPS_PORT)
        if not self._is_allowed(host, port):
            raise Blocked("a host or a port that is not on the list")
        target = match["target"] or "/"
        return Target(host, port, quote(target if target.startswith("/") else f"/{target}", safe=_PRINTABLE_ASCII))

    def follow(self, target: Target, location: str) -> Target:
        """Where a redirect leads. Raises Blocked."""
        _check_characters(location)  # urljoin would leave some out
        try:
            url = urljoin(target.url, location)
        except ValueError:  # its message may name the host
            raise Blocked("no URL") from None
        return self.parse(url)

    def check(self, addresses: Sequence[str]) -> None:
        """What a name stands for: all of it must be allowed. Raises Blocked."""
        if not all(self.may_connect(ip_address(address)) for address in addresses):
            raise Blocked("an address that is not allowed")

    def may_connect(self, address: IPv4Address | IPv6Address) -> bool:
        return is_public(address) or (self._may_be_inside and is_private(address))

    @property
    def _may_be_inside(self) -> bool:
        return self.allows_private and bool(self.domains)

    def _is_allowed(self, host: str, port: int) -> bool:
        return (host, port) in self.domains if self.domains else port == HTTPS_PORT


def parse_domain(entry: str, may_be_inside: bool = False) -> tuple[str, int]:
    """``HOST`` or ``HOST:PORT``, as on the command line; ``may_be_inside``: a name of an own network, too. Raises
    ValueError."""
    match = _DOMAIN.fullmatch(entry)
    port = int(match["port"] or HTTPS_PORT) if match else 0
    if match is None or not 1 <= port <= 65535:
        raise ValueError("HOST or HOST:PORT is expected")
    return _normalise(match["host"], may_be_inside), port


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether it belongs to nobody's own network, also where it carries another address."""
    inner = _carried_by(address)
    if inner is not None:
        return is_public(inner)
    if isinstance(address, IPv4Address):
        return not _is_in(address, _NOT_PUBLIC_V4)
    return address in _GLOBAL_UNICAST and not _is_in(address, _NOT_PUBLIC_V6)


def is_private(address: IPv4Address | IPv6Address) -> bool:
    """Whether it belongs to an own network or this machine. What a cloud answers its machines at is link-local, and
    never among these."""
    inner = _carried_by(address)
    if inner is not None:
        return is_private(inner)
    return _is_in(address, _PRIVATE) and not _is_in(address, _NEVER)


def _check_characters(url: str) -> None:
    """What one parser skips, and the next one does not. Raises Blocked."""
    if len(url) > MAX_URL_CHARS:
        raise Blocked("too long")
    if not url.isprintable() or " " in url or "\\" in url:
        raise Blocked("a character that no URL has")


def _carried_by(address: IPv4Address | IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a gateway or the kernel would make of it."""
    if isinstance(address, IPv4Address):
        return None
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour


def _is_in(address: IPv4Address | IPv6Address, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    return any(address in network for network in networks)


def _normalise(host: str, may_be_inside: bool) -> str:
    """A host's name in ASCII and lower case. Raises Blocked, also for one written as a number."""
    host = host.lower()
    if len(host) > _MAX_HOST_CHARS:  # before IDNA looks at it
        raise Blocked("the name is too long")
    if not host.isascii():
        try:
            host = idna.encode(host).decode()
        except (idna.IDNAError, UnicodeError):
            raise Blocked("not a name") from None
    match = _HOST.fullmatch(host)
    if match is None or len(host) > _MAX_HOST_CHARS or _NUMBER.fullmatch(match["top"]):
        raise Blocked("not a name")
    if not may_be_inside and (not match["labels"] or match["top"] in _INSIDE):
        raise Blocked("not the name of a public server")
    return host
