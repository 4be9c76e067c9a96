"""Rows 2 and 4: a language server dies or hangs before, in and after an answer, and every answer is the one that the
undisturbed system gives: greedy, drawn by seed, or after a grammar, streamed or not."""

import pytest

from tests.faults.extent import variants
from tests.faults.system import DEADLINE

pytestmark = pytest.mark.timeout(600)

DETECT_DEATH, DETECT_HANG = 1.0, 3.0
BUSY = 4.0
"""Seconds more that a machine with other work may take."""


@pytest.mark.parametrize(
    "failpoint",
    variants(
        "language.step=kill:3",  # images are on their way
        "language.token=kill:25",  # in the middle of several answers
        "language.finish=kill:2",  # all tokens were sent, only the end is missing
        more=[
            "language.admit=kill:2",  # before the images are asked for
            "language.token=kill:1",  # before the first token
        ],
    ),
)
def test_row_2_killed_at_work(system, story, failpoint):
    victim = system["language-b"]
    with story.fault():
        victim.arm(failpoint)
        system.until(lambda: not victim.is_running, "its death")
        story.detected(lambda: system.ready("language") == 1, DEADLINE)
        story.go_on()
        victim.arm()
        victim.start()
        system.until_ready()
    story.recovery()
    story.report.assert_no_harm()


def test_row_2_killed_under_load_is_noticed_at_once(system, story):
    with story.fault():
        system["language-a"].kill()
        story.detected(lambda: system.ready("language") == 1, DETECT_DEATH + BUSY)
        story.go_on()
    story.report.assert_no_harm()


def test_row_2_one_after_the_other(system, story):
    """Who took over is lost as well, as soon as the first is back."""
    with story.fault():
        for name in ("language-a", "language-b"):
            system[name].kill()
            story.go_on()
            system[name].start()
            system.until_ready()
    story.recovery()
    story.report.assert_no_harm()


def test_row_2_all_killed_is_a_503(system, load, story):
    """Nothing is in work when they die, as it would be blamed for both deaths."""
    load.pause()
    with story.fault():
        for victim in system.of("language"):
            victim.kill()
        load.go_on()
        story.detected(lambda: system.ready("language") == 0, DETECT_DEATH + BUSY)
        seen = len(load.outcomes)
        system.until(lambda: len(load.outcomes) > seen + 4, "answers")
    report = story.report
    report.assert_truth()
    failed = [outcome for outcome in report.outcomes if outcome.state == "failed"]
    assert failed and all(outcome.status == 503 or "worker_unavailable" in outcome.error for outcome in failed), report


def test_row_4_stopped(system, story):
    with story.fault():
        system["language-a"].stop()
        story.detected(lambda: system.ready("language") == 1, DETECT_HANG + BUSY)
        story.go_on()
        system["language-a"].go_on()
        system.until_ready()
    story.recovery()
    story.report.assert_no_harm()


def test_row_4_the_engine_hangs_while_the_server_speaks(system, story):
    victim = system["language-b"]
    with story.fault():
        victim.arm("language.step=hang:2")
        system.until(lambda: victim.hits("language.step"), "the hang")
        story.detected(lambda: system.ready("language") == 1, DETECT_HANG + BUSY)
        story.go_on()
        victim.kill()
        victim.arm()
        victim.start()
        system.until_ready()
    story.recovery()
    story.report.assert_no_harm()
