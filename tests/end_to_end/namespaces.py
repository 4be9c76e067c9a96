"""Hosts on one network, as the kernel sees it: network namespaces on a bridge, each with an address of its own.

The bridge has a namespace too, so that nothing of the machine's own network is touched. Needs root.
"""

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import pytest
from pyroute2 import NetNS, netns  # type: ignore[import-untyped]

_BRIDGE: Final = "bridge"
_LINK: Final = "eth0"
_SUBNET: Final = "10.77.0"


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace; ``address`` is how the others reach it."""

    namespace: str
    address: str

    def command(self, *command: str) -> list[str]:
        """``command`` as it runs on this host; the process is the program itself, not a wrapper."""
        return ["nsenter", f"--net={os.path.join('/var/run/netns', self.namespace)}", *command]

    def set_link(self, state: str) -> None:
        """``down``: no packet in or out from now on, and nobody is told. ``up``: as before."""
        with NetNS(self.namespace) as network:
            network.link("set", index=network.link_lookup(ifname=_LINK)[0], state=state)


@contextlib.contextmanager
def network(names: Sequence[str]) -> Iterator[dict[str, Host]]:
    """Hosts by name, all gone at the end."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    prefix = f"dvd-{secrets.token_hex(3)}"
    switch = f"{prefix}-switch"
    hosts = {name: Host(f"{prefix}-{name}", f"{_SUBNET}.{number}") for number, name in enumerate(names, start=1)}
    with contextlib.ExitStack() as stack:
        for namespace in (switch, *(host.namespace for host in hosts.values())):
            netns.create(namespace)
            stack.callback(netns.remove, namespace)
        with NetNS(switch) as bridge:
            bridge.link("add", ifname=_BRIDGE, kind="bridge")
            (index,) = bridge.link_lookup(ifname=_BRIDGE)
            bridge.link("set", index=index, state="up")
            for number, host in enumerate(hosts.values(), start=1):
                _plug_in(bridge, index, host, f"port{number}")
        yield hosts


def _plug_in(bridge: NetNS, index: int, host: Host, port: str) -> None:
    bridge.link("add", ifname=port, kind="veth", peer={"ifname": _LINK, "net_ns_fd": host.namespace})
    bridge.link("set", index=bridge.link_lookup(ifname=port)[0], master=index, state="up")
    with NetNS(host.namespace) as own:
        (link,) = own.link_lookup(ifname=_LINK)
        own.addr("add", index=link, address=host.address, prefixlen=24)
        own.link("set", index=link, state="up")
        own.link("set", index=own.link_lookup(ifname="lo")[0], state="up")


def run_on(host: Host, *command: str) -> str:
    """Output of a short command on a host."""
    return subprocess.run(host.command(*command), check=True, capture_output=True, text=True, timeout=30).stdout
