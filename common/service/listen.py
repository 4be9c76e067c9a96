"""Whether an address can be listened on, and if not, why, in words for the operator.

The libraries that listen for us say too little (gRPC: that it failed) or too much. Knows nothing of what listens.
"""

import errno
import ipaddress
import socket
from pathlib import Path
from typing import Final

from common.service.errors import ConfigError

UNIX: Final = "unix:"
_REASONS: Final = {
    errno.EADDRINUSE: "in use; end what listens there, or choose another port (0 takes any free one)",
    errno.EADDRNOTAVAIL: "not an address of this machine",
    errno.EACCES: "not permitted to this user",
    errno.ENOENT: "no such directory",
}


def split_host_port(listen: str) -> tuple[str, int]:
    """``host:port`` in its parts, brackets of IPv6 taken off. Raises ConfigError for another form."""
    host, colon, port = listen.rpartition(":")
    if not (colon and host and port.isascii() and port.isdecimal() and int(port[:6]) <= 65535):
        raise ConfigError(f"cannot listen on {listen[:64]}: expected host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_local(listen: str) -> bool:
    """Whether only this machine reaches ``host:port`` or ``unix:/path``. Raises ConfigError for another form."""
    return listen.startswith(UNIX) or is_loopback(split_host_port(listen)[0])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it. Of names that is known of one: others may mean anything tomorrow."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def cannot_listen(listen: object, error: Exception) -> ConfigError:
    """What to raise when listening has failed with an error of the system, or one of ZeroMQ, which looks alike."""
    said = getattr(error, "strerror", None) or str(error)
    reason = _REASONS.get(getattr(error, "errno", None) or 0) or said.partition(" (")[0].lower()
    return ConfigError(f"cannot listen on {listen}: {reason}")


def check_free(listen: str) -> None:
    """Try ``host:port`` or ``unix:/path`` and let go of it again.

    Raises:
        ConfigError: it is taken, not of this machine, or no address at all.
    """
    if listen.startswith(UNIX):
        return _check_socket(Path(listen.removeprefix(UNIX)))
    host, port = split_host_port(listen)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise cannot_listen(listen, error) from None


def _check_socket(path: Path) -> None:
    """A socket nobody answers on was left by somebody who was killed; it will be replaced."""
    if not path.parent.is_dir():
        raise ConfigError(f"cannot listen on {UNIX}{path}: no such directory")
    if path.exists() and not path.is_socket():
        raise ConfigError(f"cannot listen on {UNIX}{path}: something else has this name")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            is_taken = path.is_socket() and probe.connect_ex(str(path)) == 0
        except OSError as error:  # too long
            raise cannot_listen(f"{UNIX}{path}", error) from None
    if is_taken:
        raise ConfigError(f"cannot listen on {UNIX}{path}: in use; end what listens there")
