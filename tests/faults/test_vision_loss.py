"""Rows 1, 4 and 5: a vision server dies, hangs or crawls, and no client notices."""

import pytest

from tests.faults.extent import variants
from tests.faults.system import DEADLINE

pytestmark = pytest.mark.timeout(600)

DETECT_DEATH, DETECT_HANG = 1.0, 3.0
BUSY = 4.0
"""Seconds more that a machine with other work may take."""


def test_row_1_killed_while_idle(system, load, story):
    load.pause()
    with story.fault():
        system["vision-a"].kill()
        load.go_on()
        story.detected(lambda: system.ready("vision") == 1, DETECT_DEATH + BUSY)
        story.go_on()
        system["vision-a"].start()
        system.until_ready()
    story.recovery()
    story.report.assert_no_harm()


@pytest.mark.parametrize(
    "place", variants("vision.batch", "vision.deliver", more=["vision.encode.before", "vision.encode.after"])
)
def test_row_1_killed_at_work(system, story, place):
    """While it encodes, while it transfers, and when only the reply is missing."""
    victim = system["vision-b"]
    with story.fault():
        victim.arm(f"{place}=kill:2")
        system.until(lambda: not victim.is_running, "its death")
        story.detected(lambda: system.ready("vision") == 1, DEADLINE)
        story.go_on()
        victim.arm()
        victim.start()
        system.until_ready()
    story.recovery()
    story.report.assert_no_harm()


def test_row_1_killed_under_load_is_noticed_at_once(system, story):
    with story.fault():
        system["vision-a"].kill()
        story.detected(lambda: system.ready("vision") == 1, DETECT_DEATH + BUSY)
        story.go_on()
    story.report.assert_no_harm()


def test_row_1_all_killed_is_a_503_and_text_is_served_on(system, load, story):
    """No peer is left: an image gets a status at once, words an answer. Nothing is in work when they die: it would be
    blamed for both deaths."""
    load.pause()
    with story.fault():
        for victim in system.of("vision"):
            victim.kill()
        load.go_on()
        story.detected(lambda: system.ready("vision") == 0, DETECT_DEATH + BUSY)
        load.wait(4)
    report = story.report
    report.assert_truth()
    failed = [outcome for outcome in report.outcomes if outcome.state == "failed"]
    assert failed and all(outcome.kind != "text" and outcome.status == 503 for outcome in failed), report


def test_row_4_stopped(system, story):
    """SIGSTOP: its connections live, and nobody answers on them."""
    with story.fault():
        system["vision-a"].stop()
        story.detected(lambda: system.ready("vision") == 1, DETECT_HANG + BUSY)
        story.go_on()
        system["vision-a"].go_on()
        system.until_ready()
    story.recovery()
    story.report.assert_no_harm()


def test_row_4_the_device_hangs_while_the_server_speaks(system, story):
    """A stuck kernel: heartbeats go on, progress does not."""
    victim = system["vision-b"]
    with story.fault():
        victim.arm("vision.batch=hang:1")
        system.until(lambda: victim.hits("vision.batch"), "the hang")
        story.detected(lambda: system.ready("vision") == 1, DETECT_HANG + BUSY)
        story.go_on()
        victim.kill()
        victim.arm()
        victim.start()
        system.until_ready()
    story.recovery()
    story.report.assert_no_harm()


def test_row_5_a_slow_server_slows_nobody_for_long(system, story):
    """Every batch takes half a second more, ten times what it needs."""
    with story.fault():
        system["vision-a"].arm("vision.batch=sleep(0.5)")
        story.go_on()
        story.go_on()
        system["vision-a"].arm()
    story.recovery()
    report = story.report
    report.assert_no_harm()
    assert report.fault.p99 < report.before.p99 + 5.0, report
