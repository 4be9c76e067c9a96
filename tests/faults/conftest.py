"""One system under steady load for all tests that do not need another one; whatever a test breaks is mended.

Modules that need another system define ``system`` anew.
"""

from collections.abc import Iterator
from typing import Final

import pytest

from tests.faults.load import Load, Story
from tests.faults.system import System

# Small bounds: what would take a minute of overload, or of a slow reader, takes seconds.
BOUNDS: Final = {"router": {"max_num_queued_image_reqs": 24, "slow_reader_timeout": 3.0}}


@pytest.fixture(scope="session")
def shared_system(tmp_path_factory) -> Iterator[System]:
    """Two vision servers, two language servers, a router."""
    with System(tmp_path_factory.mktemp("faults"), options=BOUNDS) as system:
        yield system


@pytest.fixture(scope="module")
def system(shared_system) -> System:
    return shared_system


@pytest.fixture(scope="module")
def load(system) -> Iterator[Load]:
    with Load(system) as load:
        load.pause()
        system.baseline()
        yield load


@pytest.fixture
def story(system, load, request) -> Iterator[Story]:
    """Of a fault to a whole system under load. At the end, nothing may be held that was not held before."""
    load.pause()
    system.mend()
    load.go_on()
    story = Story(load, request.node.name)
    story.before()
    yield story
    load.pause()
    print(story.report)
    system.mend()
    system.assert_baseline()
