"""Rows 6, 7, 9 and 10: the network between the servers is slow, lossy, cut or damaging, one way or both.

Every connection goes through a proxy; features over plain sockets, with gRPC to fall back to.
"""

from collections.abc import Iterator

import pytest

from tests.faults.extent import variants
from tests.faults.proxy import Mischief
from tests.faults.system import System

pytestmark = pytest.mark.timeout(600)

DETECT_PARTITION = 5.0
BUSY = 5.0
"""Seconds more that a machine with other work may take."""
FEATURES = ("language-a features", "language-b features")


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> Iterator[System]:
    with System(tmp_path_factory.mktemp("faults"), proxied=True) as system:
        yield system


@pytest.mark.parametrize(("link", "tier"), [("vision-a", "vision"), ("language-a", "language")])
@pytest.mark.parametrize("directions", variants((), more=[("to_server",), ("to_client",)]), ids="-".join)
def test_row_6_partition_of_a_server_from_the_router(system, story, link, tier, directions):
    """Routed around; when the link is whole again, nothing that was held back does harm."""
    with story.fault():
        system.links[link].misbehave(Mischief(blocks=True), *directions)
        if directions != ("to_server",):  # its heartbeats still arrive then
            story.detected(lambda: system.ready(tier) == 1, DETECT_PARTITION + BUSY)
        story.go_on()
        system.links[link].heal()
        system.until_ready()
    story.recovery()
    story.report.assert_no_harm()


@pytest.mark.parametrize("directions", variants((), more=[("to_server",), ("to_client",)]), ids="-".join)
def test_row_6_partition_of_vision_from_a_language_server(system, story, directions):
    """Features fall back to another transport; the ones held back come late, and twice."""
    with story.fault():
        system.links["language-a features"].misbehave(Mischief(blocks=True), *directions)
        story.go_on()
        system.links["language-a features"].heal()
    story.recovery()
    story.report.assert_no_harm()


@pytest.mark.parametrize(
    "mischief",
    variants(
        Mischief(jitter=0.05, loss=0.05),
        Mischief(rate=10e6 / 8),  # 10 Mbit/s
        more=[Mischief(delay=0.1), Mischief(jitter=0.05, loss=0.01)],
    ),
    ids=str,
)
def test_row_7_slow_links_slow_answers_only(system, story, mischief):
    with story.fault():
        for proxy in system.links.values():
            proxy.misbehave(mischief)
        story.go_on()
        for proxy in system.links.values():
            proxy.heal()
    story.recovery()
    story.report.assert_no_harm()


@pytest.mark.parametrize("link", variants("language-a", FEATURES[0], more=["vision-a"]))
def test_row_9_connections_reset_again_and_again(system, story, link):
    with story.fault():
        for _ in range(4):
            system.links[link].reset()
            story.go_on()
        system.until_ready()
    story.recovery()
    story.report.assert_no_harm()


@pytest.mark.parametrize("link", variants("vision-a", FEATURES[0], more=["language-a"]))
def test_row_9_cut_in_the_middle_of_a_message(system, story, link):
    """A frame is 64 KiB and a request with its picture some 10 KiB: half of one arrives."""
    with story.fault():
        system.links[link].misbehave(Mischief(cut_after=5000 if link != FEATURES[0] else 40_000))
        story.go_on()
        system.links[link].heal()
        system.until_ready()
    story.recovery()
    story.report.assert_no_harm()


def test_row_9_half_closed_connections(system, story):
    with story.fault():
        for link, proxy in system.links.items():
            proxy.half_close("to_server" if "features" in link else "to_client")
        story.go_on()
        system.until_ready()
    story.recovery()
    story.report.assert_no_harm()


def test_row_10_flipped_bits_never_reach_the_model(system, load, story):
    """Both ways into both language servers; what the checksum does not cover is TCP's to protect."""
    with story.fault():
        for link in FEATURES:
            system.links[link].misbehave(Mischief(corrupt=0.05), "to_server")
        story.go_on()
        for link in FEATURES:
            system.links[link].heal()
    story.recovery()
    story.report.assert_no_harm()


def test_row_10_duplicated_and_reordered_bytes(system, story):
    """What no TCP would do, a broken middlebox might: the stream is damaged, and given up."""
    with story.fault():
        for link in FEATURES:
            system.links[link].misbehave(Mischief(duplicate=0.03, reorder=0.03), "to_server")
        story.go_on()
        for link in FEATURES:
            system.links[link].heal()
    story.recovery()
    story.report.assert_no_harm()
