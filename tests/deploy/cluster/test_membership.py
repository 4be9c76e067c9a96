"""A server may go when every router was told, long enough ago to have read it."""

from deploy.cluster.membership import Members, Membership

OLD: Members = (["a:1", "b:1"], ["c:1"])
NEW: Members = (["a:1"], ["c:1"])


def test_every_router_must_know_and_have_had_time_to_read():
    membership = Membership()
    membership.note("router-0.1", OLD, 0.0)
    membership.note("router-1.2", OLD, 0.0)
    membership.note("router-0.1", NEW, 10.0)
    assert membership.knows("router-0.1", NEW) and not membership.knows("router-1.2", NEW)
    assert not membership.is_read(["router-0.1", "router-1.2"], NEW, 20.0)
    membership.note("router-1.2", NEW, 20.0)
    assert not membership.is_read(["router-0.1", "router-1.2"], NEW, 20.5)
    assert membership.is_read(["router-0.1", "router-1.2"], NEW, 21.0)


def test_a_router_that_is_gone_needs_to_know_nothing():
    membership = Membership()
    assert membership.is_read([], NEW, 0.0)
    membership.note("router-0.1", OLD, 0.0)
    membership.forget("router-0.1")
    assert not membership.knows("router-0.1", OLD)
    assert membership.is_read([], NEW, 0.0)
