"""Where a receiver may listen: one address of this machine, or a socket in a directory closed to other users."""

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from common.service.errors import ConfigError

PRIVATE_DIRECTORY: Final = "unix-dir:"
_WILDCARDS: Final = ("", "*", "0.0.0.0", "[::]", "::")
_MAX_SOCKET_PATH_BYTES: Final = 107


def check_host_port(listen: str) -> str:
    """``listen`` itself, if it is ``host:port`` with a host that senders can dial.

    Raises:
        ConfigError: another form, or a wildcard: what is bound is what senders are told.
    """
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"listen {listen!r}: must be host:port or {PRIVATE_DIRECTORY}/path")
    if host in _WILDCARDS:
        raise ConfigError(f"listen {listen!r}: name one address of this machine, as senders dial what is bound")
    return listen


def new_socket_path(listen: str, transport: str) -> Path:
    """A fresh name in the directory of ``unix-dir:/path``: no server ever meets the socket of its predecessor.

    Raises:
        ConfigError: the directory cannot be made, is open to others, or its path is too long.
    """
    directory = Path(listen.removeprefix(PRIVATE_DIRECTORY)).absolute()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise ConfigError(f"listen {listen!r}: {error.strerror}") from None
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"listen {listen!r}: the directory must be this user's and closed to others (mode 0700)")
    path = directory / f"{transport}-{secrets.token_hex(4)}.sock"
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        raise ConfigError(f"listen {listen!r}: too long, a socket's path has at most {_MAX_SOCKET_PATH_BYTES} bytes")
    return path


def nth_port(listen: str, index: int) -> str:
    """``host:port`` with the port ``index`` higher: one port cannot serve two transports. Port 0 and sockets stay."""
    host, _, port = listen.rpartition(":")
    if listen.startswith(PRIVATE_DIRECTORY) or not port.isdecimal() or int(port) == 0:
        return listen
    return f"{host}:{int(port) + index}"


def remove_socket(address: str) -> None:
    """Remove the file of ``ipc:///path`` or ``unix:/path``; does nothing for other addresses, or when it is gone."""
    for scheme in ("ipc://", "unix:"):
        if address.startswith(scheme):
            Path(address.removeprefix(scheme)).unlink(missing_ok=True)
