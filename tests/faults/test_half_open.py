"""Rows 6 and 8: a host drops off the network and nobody is told: no FIN, no RST, only silence.

Every server is on a host of its own (a network namespace), and the clients with the router. Needs root.
"""

from collections.abc import Iterator

import pytest
from pyroute2 import netns  # type: ignore[import-untyped]

from tests.end_to_end.namespaces import Host, network
from tests.faults.extent import variants
from tests.faults.system import System

pytestmark = pytest.mark.timeout(600)

DETECT_SILENCE = 5.0
BUSY = 5.0
"""Seconds more that a machine with other work may take."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, Host]]:
    with network(["vision-a", "vision-b", "language-a", "language-b", "router-a"]) as hosts:
        # This thread moves to the router's host, and with it whatever it starts.
        netns.pushns(hosts["router-a"].namespace)
        try:
            yield hosts
        finally:
            netns.popns()


@pytest.fixture(scope="module")
def system(tmp_path_factory, hosts) -> Iterator[System]:
    with System(tmp_path_factory.mktemp("faults"), hosts=hosts) as system:
        yield system


@pytest.mark.parametrize(("name", "tier"), variants(("vision-a", "vision"), more=[("language-b", "language")]))
def test_row_8_a_host_drops_off_the_network(system, hosts, story, name, tier):
    with story.fault():
        hosts[name].set_link("down")
        try:
            story.detected(lambda: system.ready(tier) == 1, DETECT_SILENCE + BUSY)
            story.go_on()
        finally:
            hosts[name].set_link("up")
        system.until_ready()
    story.recovery()
    story.report.assert_no_harm()
