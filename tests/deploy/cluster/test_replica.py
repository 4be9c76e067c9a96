"""What a replica writes is what the programs read."""

import pytest
from pydantic import SecretStr

from deploy.cluster.probe import ENDED, Answer, Probe
from deploy.cluster.replica import Report, write_members
from deploy.cluster.spec import ClusterSpec
from deploy.cluster.tiers import TIERS
from deploy.settings import PROGRAMS
from router.discovery import parse_members


def test_a_router_reads_the_members_that_were_written(tmp_path):
    path = tmp_path / "vision"
    write_members(path, [])
    assert parse_members(path.read_text()) == []
    addresses = ["10.0.0.1:9001", "[fd00::2]:9001"]
    write_members(path, addresses)
    assert parse_members(path.read_text()) == addresses
    assert list(tmp_path.iterdir()) == [path]


def test_every_program_knows_the_options_it_is_given():
    spec = ClusterSpec(model="nano", api_keys=[SecretStr("k")])
    for tier in TIERS:
        assert set(spec.options(tier)) <= set(PROGRAMS[tier].model_fields)


def test_a_report_begins_empty():
    assert Report() == Report(phase="starting", address="", reason="", is_final=False)


@pytest.mark.parametrize(
    ("held", "answer"),
    [("", Answer.STRANGE), ("ab12", Answer.OURS), ("cd34", Answer.REPLACED), (ENDED, Answer.REPLACED)],
)
def test_what_the_head_holds_says_what_became_of_us(held, answer):
    assert Probe("127.0.0.1:1", "one", "ab12", {}).judge(held) is answer


def test_a_probe_of_nobody_answers_at_once():
    probe = Probe("127.0.0.1:1", "one", "ab12", {})
    probe.start()
    assert probe.poll() is Answer.UNREACHABLE
