"""The ledger says who is missing and who is too many, and comes back from its text as it was."""

from deploy.cluster.ledger import Ledger, Member, addresses


def ledger(*phases: str, desired: int = 2) -> Ledger:
    """Vision servers on nodes n0, n1, n0, ..."""
    found = Ledger({"vision": desired, "language": 0, "router": 0})
    for slot, phase in enumerate(phases):
        member = found.add("vision", slot, f"n{slot % 2}", "10.0.0.1")
        member.phase, member.address = phase, f"10.0.0.1:{9000 + slot}"  # type: ignore[assignment]
    return found


def names(members: list[Member]) -> list[str]:
    return [member.server for member in members]


def test_the_lowest_free_slots_are_filled():
    assert ledger(desired=3).missing_slots("vision") == [0, 1, 2]
    found = ledger("ready", "ready", "ready", desired=3)
    del found.members["vision-1.2"]
    assert found.missing_slots("vision") == [1]
    assert found.add("vision", 1, "n0", "").replica == "vision-1.4"


def test_who_drains_still_has_its_name_and_is_no_longer_counted():
    assert ledger("leaving", "ready").missing_slots("vision") == [2]


def test_those_leave_who_do_not_serve_then_those_on_the_fullest_node():
    assert names(ledger("ready", "starting", "ready").surplus("vision")) == ["vision-1"]
    assert names(ledger("ready", "ready", "ready").surplus("vision")) == ["vision-2"]  # n0 has two
    assert names(ledger("ready", "ready", "ready", desired=1).surplus("vision")) == ["vision-2", "vision-1"]
    assert ledger("ready", "leaving").surplus("vision") == []


def test_complete_means_nobody_is_on_the_way():
    assert ledger("ready", "ready").is_complete
    assert not ledger("ready", "starting").is_complete
    assert not ledger("ready", "ready", "leaving").is_complete


def test_it_comes_back_from_its_text():
    found = ledger("ready", "leaving", "placed")
    found.has_served = True
    assert Ledger.from_json(found.to_json()) == found
    assert addresses(found.ready("vision")) == ["10.0.0.1:9000"]
