"""The Ray head as the operator's commands see it: reached or not, guarded or not, and asked through a child process.

Every wait has a deadline, and every failure is one line. Knows nothing of what the answers mean.
"""

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, Self

import grpc

from common.service.errors import StartupError, Unavailable
from deploy.cluster.spec import AUTO

_REACH_SECONDS: Final = 5.0
_CONNECT_SECONDS: Final = 30.0
_CALL_SECONDS: Final = 30.0
_MAX_ERROR_BYTES: Final = 2**20
_NO_CLUSTER: Final = "no Ray cluster on this machine: ray start --head, or say ray.address: local"
# Any call of the head's interface; what matters is how it treats a stranger.
_STRANGERS_CALL: Final = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_HOW_TO_GUARD: Final = (
    "start every node with RAY_AUTH_MODE=token (a token: ray get-auth-token --generate; the head: ray start --head"
    " --dashboard-host 127.0.0.1)"
)


class Head:
    """One connection to a Ray cluster, through ``deploy.cluster.bridge``.

    Args:
        address: ``auto`` or ``HOST:PORT``.
        cluster: whose names are asked for.
        incarnation: of the cluster that must be up there; None: none needs to be.
        is_insecure: also a head that takes orders from everybody will do.

    Raises:
        StartupError: Ray is not installed, not reachable, not guarded, or refuses us.
        Unavailable: it is another head than the one we know.
    """

    def __init__(
        self, address: str, cluster: str, *, incarnation: str | None = None, is_insecure: bool = False
    ) -> None:
        require_ray()
        self._num_calls = 0
        self._unread = b""  # of the answers
        given, address = address, _find_head() if address == AUTO else address
        _reach(given, address)
        with tempfile.TemporaryFile() as errors:
            self._errors = os.dup(errors.fileno())
            self._child = subprocess.Popen(
                [sys.executable, "-m", "deploy.cluster.bridge"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(),
                process_group=0,  # Ctrl-C is for us: we have to clean up through it
            )
        try:
            self.address: str = self._connect(address, cluster)
            if not is_insecure:
                check_guard(self.address)
            if incarnation is not None and self.call("incarnation") != incarnation:
                raise Unavailable(f"the Ray head at {self.address} does not know this cluster")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the controller. Raises Unavailable."""
        return self.call("ask", method=method, arguments=list(arguments))

    def call(self, do: str, seconds: float = _CALL_SECONDS, **arguments: Any) -> Any:
        """Call a method of the bridge. Raises Unavailable when it fails or takes too long."""
        assert self._child.stdin is not None
        self._num_calls += 1
        record = json.dumps({"do": do, "number": self._num_calls, **arguments}).encode() + b"\n"
        try:
            self._child.stdin.write(record)
            self._child.stdin.flush()
        except OSError:
            raise Unavailable(f"Ray ended the connection: {self._last_words()}") from None
        answer = self._read_answer(time.monotonic() + seconds)
        if "error" in answer:
            raise Unavailable(" ".join(str(answer["error"]).split()))
        return answer["value"]

    def close(self) -> None:
        """Hang up."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):  # what is still in the pipe has no reader
                stream.close()
        os.close(self._errors)

    def _connect(self, address: str, cluster: str) -> str:
        try:
            return str(self.call("connect", _CONNECT_SECONDS, address=address, cluster=cluster))
        except Unavailable as error:
            raise StartupError(f"ray.address {address}: {_explain(str(error), address)}") from None

    def _read_answer(self, deadline: float) -> dict[str, Any]:
        """Of the last call. Those of calls that Ctrl-C or a deadline ended come late, and nobody wants them."""
        while True:
            answer: dict[str, Any] = json.loads(self._read_line(deadline))
            if answer["number"] == self._num_calls:
                return answer

    def _read_line(self, deadline: float) -> bytes:
        assert self._child.stdout is not None
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise Unavailable("the Ray head does not answer")
            received = os.read(self._child.stdout.fileno(), 65536)
            if not received:
                raise Unavailable(f"Ray ended the connection: {self._last_words()}")
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self) -> str:
        self._child.wait()
        said = os.pread(self._errors, _MAX_ERROR_BYTES, 0).decode("utf-8", "replace")
        lines = [line.strip() for line in said.splitlines()]
        return next((line for line in reversed(lines) if line), "it said nothing")


def require_ray() -> None:
    """Raises StartupError when it is not installed; does not import it."""
    if importlib.util.find_spec("ray") is None:
        raise StartupError("dvd up needs ray: pip install 'dvd-serve[ray]'")


def is_reachable(address: str) -> bool:
    """Whether a head answers there, be it ours or not."""
    try:
        return _strangers_status(address) is not grpc.StatusCode.UNIMPLEMENTED
    except Unavailable:
        return False


def has_token() -> bool:
    """Whether Ray would find one; where it looks is Ray's rule."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(path).is_file()


def _environment() -> dict[str, str]:
    """Ours, and the token is used if there is one: by itself Ray does so only where it starts a cluster."""
    defaults = {"RAY_AUTH_MODE": "token"} if has_token() else {}
    return {**defaults, **os.environ, "RAY_USAGE_STATS_ENABLED": "0"}


def _find_head() -> str:
    """As Ray finds it: a variable, or what the last head on this machine left. Raises StartupError."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        left = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        with contextlib.suppress(OSError):
            address = left.read_text("utf-8").strip()
    if not address:
        raise StartupError(f"ray.address {AUTO}: {_NO_CLUSTER}")
    return address


def _reach(given: str, address: str) -> None:
    try:
        status = _strangers_status(address)
    except Unavailable as error:
        if given == AUTO:
            raise StartupError(f"ray.address {AUTO}: the head at {address} is gone; {_NO_CLUSTER}") from None
        raise StartupError(f"ray.address {address}: {error}") from None
    if status is grpc.StatusCode.UNIMPLEMENTED:
        raise StartupError(f"ray.address {address}: this is not the head of a Ray cluster")


def check_guard(address: str) -> None:
    if _strangers_status(address) is grpc.StatusCode.UNAUTHENTICATED:
        return
    raise StartupError(
        f"the Ray cluster at {address} takes orders from everybody who reaches it: {_HOW_TO_GUARD}, or say --insecure"
    )


def _strangers_status(address: str) -> grpc.StatusCode:
    """How the head answers somebody without a token. Raises Unavailable when nobody answers."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_STRANGERS_CALL)(b"", timeout=_REACH_SECONDS)
        except grpc.RpcError as error:
            status: grpc.StatusCode = error.code()
            if status is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise Unavailable(
                    f"no answer within {_REACH_SECONDS:g} s; is the head up, and the port open?"
                ) from None
            if status is grpc.StatusCode.UNAVAILABLE:
                why = "connection refused" if "refused" in (error.details() or "") else "cannot be reached"
                raise Unavailable(f"{why}; start a head there (ray start --head), or say ray.address: local") from None
            return status
    return grpc.StatusCode.OK


def _explain(message: str, address: str) -> str:
    """What Ray says, in one line that says what to do."""
    if "AuthenticationError" in message or "Unauthenticated" in message:
        return (
            "our token is not the cluster's: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, or copy ~/.ray/auth_token"
        )
    if "node_ip_address" in message or "raylet" in message or "this node" in message:
        return f"this machine is no node of that cluster: ray start --address {address}"
    return message
