"""Rows 21, 22 and 29: servers that are replaced, started in any order, or of another checkpoint, and what those that
were killed leave behind."""

import os
import random
import time
from pathlib import Path

import pytest

from deploy.settings import model_directory

pytestmark = pytest.mark.timeout(600)

GRACE = 30.0
SHARED_MEMORY = Path("/dev/shm")


def test_row_21_rolling_restart_of_everything_but_the_router(system, story):
    """SIGTERM, wait for the end, start again, one after the other, under load."""
    with story.fault():
        for server in [*system.of("vision"), *system.of("language")]:
            assert server.drain(GRACE) == 0, server.log
            server.start()
            system.until_ready()
    story.recovery()
    story.report.assert_no_harm()


def test_row_21_the_second_signal_forces(system, load, story):
    """An answer that would take a minute does not hold up an operator who means it."""
    victim = system["language-a"]
    with story.fault():
        victim.arm("language.token=sleep(20)")
        system.until(lambda: victim.hits("language.token"), "work that lasts")
        victim.terminate()
        system.until(lambda: system.ready("language") == 1, "its draining", GRACE)
        victim.terminate()
        assert victim.ended(GRACE) == 1
        story.go_on()
    story.report.assert_no_harm()


def test_row_22_any_start_order(system, load, story):
    load.pause()
    for server in system.servers.values():
        server.kill()
    order = list(system.servers)
    random.Random(22).shuffle(order)
    with story.fault():
        for name in order:
            system[name].start()
            time.sleep(0.2)
        system.until_ready()
        load.go_on()
    story.recovery()
    story.report.assert_no_harm()


def test_row_22_another_checkpoint_is_refused(system, story):
    """It comes back with other weights: it gets no work, and the log says why."""
    victim = system["vision-b"]
    model = victim.options["model"]
    with story.fault():
        assert victim.drain(GRACE) == 0
        victim.options["model"] = str(model_directory("nano-flash"))
        victim.start()
        try:
            system.until(lambda: system.states("vision").get("refused") == 1, "its refusal")
            story.go_on()
        finally:
            victim.options["model"] = model
            victim.kill()
    story.report.assert_no_harm()
    assert "serves another checkpoint" in system["router-a"].log


def test_row_29_nothing_is_left_by_servers_that_were_killed(system, load, story):
    """Shared memory, sockets and files: those of the dead go with them, or with their successors' start."""
    before = set(os.listdir(SHARED_MEMORY)), set(os.listdir(system.directory))
    with story.fault():
        for name in ("vision-a", "language-a"):
            system[name].kill()
            story.go_on()
            system[name].start()
            system.until_ready()
    story.recovery()
    ours = {name for name in os.listdir(SHARED_MEMORY) if "dvd" in name}
    assert (ours - before[0], set(os.listdir(system.directory)) - before[1]) == (set(), set())
    story.report.assert_no_harm()
