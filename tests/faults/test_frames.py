"""Rows 11 and 12: a vision server that sends frames twice, late, damaged, of a wrong shape, or full of NaN."""

import pytest

from tests.faults.extent import variants

pytestmark = pytest.mark.timeout(600)


def rejected(system, reason: str) -> float:
    """Frames that the language servers refused for a reason."""
    return sum(
        value
        for server in system.of("language")
        for key, value in server.metrics().items()
        if key.startswith("dvd_transfer_frames_rejected_total") and f"reason={reason}" in key
    )


def test_row_11_every_frame_comes_twice(system, story):
    with story.fault():
        for server in system.of("vision"):
            server.arm("vision.deliver=corrupt(duplicate)")
        story.go_on()
    story.report.assert_no_harm()
    assert all(server.hits("vision.deliver") for server in system.of("vision"))


def test_row_11_frames_come_late_and_overtake_each_other(system, story):
    with story.fault():
        for number, server in enumerate(system.of("vision")):
            server.arm(f"seed={number}; vision.deliver=sleep(0.7):40%")
        story.go_on()
    story.report.assert_no_harm()


def test_row_12_a_server_that_only_fails_is_not_asked_for_long(system, story):
    """Ejected after some failures in a row, tried again later, used again when it is well."""
    ejections = "dvd_server_ejections_total{reason=failures,server=vision-b,tier=vision}"
    answers = "dvd_dispatch_total{outcome=ok,server=vision-b,tier=vision}"
    before = system["router-a"].metrics().get(ejections, 0.0)
    with story.fault():
        system["vision-b"].arm("vision.encode.before=raise")
        system.until(lambda: system["router-a"].metrics().get(ejections, 0.0) > before, "its ejection")
        story.go_on()
        system["vision-b"].arm()
        so_far = system["router-a"].metrics()[answers]
        system.until(lambda: system["router-a"].metrics()[answers] > so_far, "its return")
    story.recovery()
    story.report.assert_no_harm()


@pytest.mark.parametrize(
    ("kind", "reason"),
    variants(
        ("bits", "checksum"),
        ("nan", "nonfinite"),
        more=[
            ("header", "ticket"),
            ("version", "version"),  # row 23: a build to come
            ("shape", "shape"),
        ],
    ),
)
def test_row_12_one_of_two_servers_sends_damaged_frames(system, story, kind, reason):
    """They are refused and counted, the image is encoded elsewhere, and nobody crashes."""
    before = rejected(system, reason)
    with story.fault():
        system["vision-b"].arm(f"vision.deliver=corrupt({kind})")
        system.until(lambda: rejected(system, reason) > before, f"a frame that is refused as {reason}")
        story.go_on()
        system["vision-b"].arm()
        system.until_ready()
    story.recovery()
    story.report.assert_no_harm()
    assert all(server.is_running for server in system.servers.values())
