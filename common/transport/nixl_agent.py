"""NIXL's agents as the feature plane uses them: one for each end of each connection, made and ended with it.

An agent that is gone touches no memory any more, whatever its peer does; so memory outlives its agent, and a peer that
restarts meets a new agent under a new name: nothing of its former registrations and metadata is left.

Everything here blocks: it belongs on threads. Every failure of the library is a ``TransportFailed``. Agents have no
thread of their own, as NIXL's would spin: data moves while ``read`` or ``progress`` is called.

Without RDMA hardware UCX reads in software, and serves whoever reaches its port: a stranger there can read or crash
this process. With it, nothing is encrypted. So the network must be isolated, and without RDMA devices UCX opens its
ports only on the interface that the connection uses (IPv4). What ``UCX_*`` in the environment says goes first.
"""

import fcntl
import functools
import importlib
import importlib.util
import ipaddress
import logging
import mmap
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from common.service.errors import ConfigError, TransportFailed

log = logging.getLogger(__name__)

NOT_INSTALLED: Final = "the library is not installed; pip install 'dvd-serve[nixl]'"
MIN_PAUSE: Final = 50e-6
MAX_PAUSE: Final = 1e-3
"""Seconds between two looks at a transfer; from one to the other by doubling."""
_MODULES: Final = ("nixl_cu13", "nixl_cu12")  # the same library but for device memory, which we do not use
_BACKEND: Final = "UCX"
_RDMA_DEVICES: Final = Path("/sys/class/infiniband")
_SIOCGIFADDR: Final = 0x8915


@functools.cache
def load_library() -> Any:
    """The module of NIXL. Raises ConfigError: it is not installed, or cannot be loaded on this machine."""
    # UCX would take over fatal signals, which `faulthandler` reports, and log to stdout, as NIXL does below.
    os.environ.setdefault("UCX_ERROR_SIGNALS", "")
    os.environ.setdefault("UCX_LOG_FILE", "stderr")
    raise_exceptions = logging.raiseExceptions
    try:
        library = _import_first()
    except ImportError as error:
        raise ConfigError(f"transport nixl: the library does not work here: {error}") from None
    finally:
        logging.raiseExceptions = raise_exceptions
    logger = logging.getLogger("nixl")
    logger.handlers.clear()
    logger.propagate = True
    if "NIXL_LOG_LEVEL" not in os.environ:
        logger.setLevel(logging.WARNING)
    return library


def is_installed() -> bool:
    """Whether the library can be had. Loads nothing: UCX changes how a process allocates memory."""
    return any(importlib.util.find_spec(name) for name in _MODULES)


def check_agent(local_address: str) -> None:
    """Make an agent for connections at ``local_address`` and end it; also loads what the first one needs.

    Raises:
        ConfigError: there can be none.
    """
    try:
        ExposedMemory(mmap.PAGESIZE, local_address).close()
    except TransportFailed as error:
        raise ConfigError(f"transport nixl: {error.message}; see the log") from None


def rdma_devices() -> list[str]:
    """Names of the RDMA devices of this machine, such as ``mlx5_0``."""
    return sorted(device.name for device in _RDMA_DEVICES.glob("*"))


def ucx_settings(local_address: str) -> str:
    """What UCX is told for a connection whose end here is ``local_address`` ("" for a unix socket)."""
    if not local_address or ipaddress.ip_address(local_address.partition("%")[0]).is_loopback:
        return "NET_DEVICES=lo"
    if rdma_devices():
        return ""  # UCX takes the best; which of them reach the peer is for it or for the operator to know
    interface = _interface_of(local_address)
    return f"NET_DEVICES={interface}" if interface else ""


class _Agent:
    def __init__(self, local_address: str) -> None:
        library = load_library()
        self._agent: Any = None
        with self._starting("NIXL cannot start"):
            sync_mode = library.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
            config = library.nixl_agent_config(enable_prog_thread=False, backends=[], sync_mode=sync_mode)
            self._agent = library.nixl_agent(f"dvd-{secrets.token_hex(8)}", config)
            self._agent.create_backend(_BACKEND, {"engine_config": ucx_settings(local_address)})

    @contextmanager
    def _starting(self, message: str) -> Iterator[None]:
        """Ends an agent that cannot be used at once, and not only with the last traceback that knows of it."""
        try:
            with _translated(message):
                yield
        except TransportFailed:
            self._agent = None
            raise

    def _register(self, memory: np.ndarray[Any, Any]) -> Any:
        region = (memory.ctypes.data, memory.nbytes, 0, "")
        return self._agent.register_memory([region], "DRAM", [_BACKEND])


class ExposedMemory(_Agent):
    """Memory of this process that one peer may read.

    Args:
        local_address: of the connection to the peer; see ``ucx_settings``.
    """

    def __init__(self, num_bytes: int, local_address: str) -> None:
        super().__init__(local_address)
        self.bytes = np.empty(num_bytes, np.uint8)  # the system gives pages only when they are first written
        with self._starting("memory cannot be registered"):
            self._register(self.bytes)
            self.metadata: Final = bytes(self._agent.get_agent_metadata())

    @property
    def address(self) -> int:
        return int(self.bytes.ctypes.data)

    def progress(self) -> None:
        """Answer the peer where the hardware does not: to be called while it may be reading."""
        with _translated("the connection broke"):
            self._agent.get_new_notifs()  # none of ours; a peer that sends some fills no memory

    def close(self) -> None:
        """Nobody reads any more when this returns."""
        self._agent = None
        self.bytes = np.empty(0, np.uint8)


class RemoteMemory(_Agent):
    """The ``ExposedMemory`` of a peer.

    Args:
        metadata: what the peer says of its agent. NIXL connects to where it points: not for strangers.
    """

    def __init__(self, metadata: bytes, local_address: str) -> None:
        super().__init__(local_address)
        self._writing: dict[int, tuple[Any, memoryview]] = {}  # by handle: what a transfer may still write
        with self._starting("the peer's metadata are of no use"):
            self._peer = self._agent.add_remote_agent(metadata)

    def read(self, address: int, memory: memoryview, is_over: Callable[[], bool]) -> None:
        """Fill ``memory`` with what lies at ``address`` in the peer.

        Raises:
            TransportFailed: the peer is gone, or ``is_over`` said to give up. ``memory`` may then be written until
                ``close``, which holds on to it.
        """
        failure = ""
        try:
            self._transfer(address, memory, is_over)
        except TransportFailed as error:
            failure = error.message  # and not its traceback, whose frames would keep the agent alive
        if failure:
            raise TransportFailed(failure)

    def close(self) -> None:
        """No memory is written any more when this returns."""
        writing = list(self._writing.values())
        self._writing.clear()
        memory = [memory for _, memory in writing]
        while writing:  # no name holds a handle, and so the agent, beyond its turn
            with suppress(TransportFailed), _translated("a transfer does not end"):
                writing.pop()[0].release()
        self._agent = None
        memory.clear()

    def _transfer(self, address: int, memory: memoryview, is_over: Callable[[], bool]) -> None:
        local = np.frombuffer(memory, np.uint8)
        with _translated("the peer's memory cannot be read"):
            registration = self._register(local)
            handle = self._agent.initialize_xfer("READ", *self._regions(local, address), self._peer)
            self._writing[id(handle)] = handle, memory
            self._run(handle, is_over)
            del self._writing[id(handle)]
            handle.release()
            self._agent.deregister_memory(registration, [_BACKEND])

    def _regions(self, local: np.ndarray[Any, Any], address: int) -> tuple[Any, Any]:
        regions = ((local.ctypes.data, local.nbytes, 0), (address, local.nbytes, 0))
        ours, theirs = (self._agent.get_xfer_descs([region], "DRAM") for region in regions)
        return ours, theirs

    def _run(self, handle: Any, is_over: Callable[[], bool]) -> None:
        state = self._agent.transfer(handle)
        pause = MIN_PAUSE
        while state == "PROC":
            if is_over():
                raise TransportFailed("reading the peer's memory was given up")
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)
            state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise TransportFailed("the peer's memory cannot be read")


def _import_first() -> Any:
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise ConfigError(f"transport nixl: {NOT_INSTALLED}")


@contextmanager
def _translated(message: str) -> Iterator[None]:
    try:
        yield
    except _errors() as error:
        log.warning("nixl: %s: %s", message, error)
        error.__traceback__ = None  # its frames hold on to the agent
        raise TransportFailed(message) from None


@functools.cache
def _errors() -> tuple[type[Exception], ...]:
    """What NIXL raises: classes of its own without a common base, and what C++ exceptions become."""
    bindings = vars(load_library()._bindings).values()
    own = (each for each in bindings if isinstance(each, type) and issubclass(each, Exception))
    return (RuntimeError, ValueError, *own)


def _interface_of(address: str) -> str:
    """The network interface with this IPv4 address as its first; "" if none has."""
    for _, name in socket.if_nameindex():
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""
