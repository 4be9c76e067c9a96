"""Row 30, in short: random faults under load for ``CHAOS_SECONDS``; ``make chaos`` does it for an hour."""

import os
from collections.abc import Iterator

import pytest

from tests.faults import chaos
from tests.faults.load import Load
from tests.faults.system import System

SECONDS = float(os.environ.get("CHAOS_SECONDS", "300"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))

pytestmark = pytest.mark.timeout(2 * SECONDS + 600)


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> Iterator[System]:
    with System(tmp_path_factory.mktemp("chaos"), proxied=True) as system:
        yield system


@pytest.fixture(scope="module")
def load(system) -> Iterator[Load]:
    """Three requests a second at most: what matters is how long it lasts, and other tests run beside it."""
    with Load(system, pause=1.0) as load:
        load.pause()
        yield load


def test_row_30_whatever_happens_every_answer_is_right(system, load):
    came = chaos.run(system, load, seconds=SECONDS, seed=SEED, echo=print)
    print(came)
    came.check()


def test_a_schedule_can_be_replayed():
    """The same seed is the same schedule, another seed another one, and every kind of fault occurs in it."""
    faults = [chaos.schedule(SEED, number) for number in range(300)]
    assert faults == [chaos.schedule(SEED, number) for number in range(300)]
    assert faults != [chaos.schedule(SEED + 1, number) for number in range(300)]
    assert {fault.kind for fault in faults} == {*chaos.ACTIONS, *chaos.MISCHIEF, *chaos.DAMAGE, "is reset"}
