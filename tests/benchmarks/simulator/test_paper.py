"""Table 18, simulated: every ratio within a fifth of the published one, but for those at 448 px that are named here.

At 448 px the 16 requests/s that are sent are the limit of the simulated divided system; the report's answers more than
it is sent.
"""

import pytest

from benchmarks.simulator import paper
from benchmarks.table18 import BASELINE, DIVIDED, PAPER, WITH_VIR

NOT_REPRODUCED = {
    "38B": {(DIVIDED, BASELINE, 448), (WITH_VIR, DIVIDED, 448)},
    "241B-A28B": {(WITH_VIR, DIVIDED, 448)},
}


@pytest.mark.parametrize("size", PAPER)
def test_ratios_are_those_of_the_paper_within_a_fifth(size):
    found = paper.ratios(size, paper.requests_per_s(size))
    assert len(found) == 9
    wrong = {(each.of, each.over, each.side) for each in found if abs(each.error) > 0.2}
    assert wrong == NOT_REPRODUCED[size]
    assert all(abs(each.error) < 0.35 for each in found)


def test_what_was_assumed_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(paper, "_SECONDS", 2.0)
    assert paper.main([]) == 0
    said = capsys.readouterr().out
    assert said.count("16 A100 more for vision") == 2 and "67% of tiles compressed" in said
