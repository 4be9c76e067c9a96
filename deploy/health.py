"""Whether the program of this container is well: what its health check and its probes run.

    python -m deploy.health [--live]

The program says by ``DVD_ANNOUNCE`` who it is and where it listens, once it is ready; ``DVD_KEYS`` holds its keys. Exit
status 0 if it is ready for requests, or with ``--live``, if it answers at all; 1 if not, and why on standard error.
"""

import argparse
import os
import ssl
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, cast

import grpc

from common.service.announce import Announcement
from common.service.errors import ConfigError
from common.service.roles import Role, role_name

TIMEOUT_SECONDS: Final = 4.0
"""Less than the timeout of those who run us, so that they hear why."""

_ANYWHERE: Final = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Ask once; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deploy.health", description=__doc__)
    parser.add_argument("--live", action="store_true", help="is it alive, ready or not?")
    is_live_enough = parser.parse_args(argv).live
    problem = find_problem(environ, is_live_enough=is_live_enough)
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


def find_problem(environ: Mapping[str, str], *, is_live_enough: bool) -> str:
    """What is wrong, in words; "" if nothing is.

    Args:
        environ: of the program that is asked after.
        is_live_enough: an answer is enough, whatever it says.
    """
    if "DVD_ANNOUNCE" not in environ:
        return "DVD_ANNOUNCE is not set: who shall be asked?"
    found = Announcement.read(Path(environ["DVD_ANNOUNCE"]))
    if found is None:
        return "not ready: nothing was announced yet"
    if found.role == "router":
        return _ask_router(found.address, "/live" if is_live_enough else "/health")
    keys = environ.get("DVD_KEYS", "null")
    return _ask_server(found, None if keys == "null" else Path(keys), is_live_enough=is_live_enough)


def _ask_router(address: str, path: str) -> str:
    # Imported here: whoever asks a vision or language server pays for it every few seconds otherwise.
    import httpx

    # It is ourselves whom we ask: that its certificate is for a public name, which loopback is not, does not matter.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    is_socket = address.startswith("unix:")
    transport = httpx.HTTPTransport(verify=context, uds=address.removeprefix("unix:") if is_socket else None)
    scheme, _, place = address.rpartition("://")
    url = f"{scheme or 'http'}://{'localhost' if is_socket else nearest(place)}{path}"
    try:
        with httpx.Client(transport=transport, timeout=TIMEOUT_SECONDS, trust_env=False) as client:
            status = client.get(url).status_code
    except httpx.HTTPError as error:
        return f"{address} does not answer: {type(error).__name__}"
    return "" if status == 200 else f"not ready: {path} says {status}"


def _ask_server(found: Announcement, keys: Path | None, *, is_live_enough: bool) -> str:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    try:
        with _channel(nearest(found.address), keys, cast(Role, found.role)) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            reply = check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
    except ConfigError as error:
        return error.message
    except grpc.RpcError as error:
        return f"{found.address} does not answer: {error.code().name}"
    if is_live_enough or reply.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"not ready: {health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)}"


def _channel(address: str, directory: Path | None, role: Role) -> grpc.Channel:
    """To a program of ``role``, with its own keys, which let anybody of its deployment in. Raises ConfigError."""
    options = [("grpc.enable_http_proxy", 0)]
    if directory is None:
        return grpc.insecure_channel(address, options)
    from common.service.keys import Keys

    name = [("grpc.ssl_target_name_override", role_name(role))]
    return grpc.secure_channel(address, Keys(directory, role).channel_credentials(), [*options, *name])


def nearest(address: str) -> str:
    """Where to dial a program of this machine that listens at ``address``: all addresses include loopback."""
    host, colon, port = address.rpartition(":")
    return f"{_ANYWHERE.get(host, host)}{colon}{port}"


if __name__ == "__main__":
    sys.exit(main())
