"""Servers of a tier are spread over the nodes; what one server needs comes from one node."""

import pytest

from common.service.errors import Unavailable
from deploy.cluster.placement import Node, Placed, Room
from deploy.cluster.spec import LanguageGroup


def node(name: str, cpus: float = 4.0, gpus: float = 0.0, free_cpus: float | None = None) -> Node:
    total = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    return Node(name, f"10.0.0.{name[-1]}", total, total | {"CPU": cpus if free_cpus is None else free_cpus})


def places(room: Room, tier, count: int, bundle, **options) -> list[str]:
    return [room.take(tier, bundle, **options).node_id for _ in range(count)]


def test_vision_is_spread():
    room = Room([node("n1"), node("n2"), node("n3")])
    assert sorted(places(room, "vision", 6, {"CPU": 1.0})) == ["n1", "n1", "n2", "n2", "n3", "n3"]


def test_a_tier_is_spread_by_its_own_count():
    """A node full of language servers is as good for a vision server as another, as long as there is room."""
    room = Room(
        [node("n1"), node("n2")], [Placed("language", "n1", {"CPU": 1.0}), Placed("vision", "n2", {"CPU": 1.0})]
    )
    assert room.take("vision", {"CPU": 1.0}).node_id == "n1"


def test_of_equals_the_one_with_most_room():
    room = Room([node("n1", free_cpus=2.0), node("n2", free_cpus=3.0)])
    assert room.take("vision", {"CPU": 1.0}).node_id == "n2"


def test_room_is_used_up():
    room = Room([node("n1", 2.0), node("n2", 1.0)])
    assert sorted(places(room, "vision", 3, {"CPU": 1.0})) == ["n1", "n1", "n2"]
    with pytest.raises(Unavailable, match=r"no node has CPU 1 free: lower vision\.replicas or what one takes"):
        room.take("vision", {"CPU": 1.0})


def test_what_ray_has_not_yet_subtracted_is_not_given_twice():
    room = Room([node("n1", 1.0)], [Placed("vision", "n1", {"CPU": 1.0})])
    with pytest.raises(Unavailable):
        room.take("vision", {"CPU": 1.0})


def test_a_tensor_parallel_group_is_packed_on_one_node():
    """Two ranks of one GPU each never go to two nodes with one GPU each."""
    bundle = LanguageGroup.model_construct(
        cpus=2.0, gpus=1.0, resources={}, tensor_parallel_size=2, replicas=1, options={}
    ).bundle
    assert bundle == {"CPU": 4.0, "GPU": 2.0}
    nodes = [node("n1", 8, gpus=1), node("n2", 8, gpus=1)]
    with pytest.raises(Unavailable, match=r"no node has GPU 2 \(the largest has 1\): lower language\.gpus, or add"):
        Room(nodes).take("language", bundle)
    assert Room([*nodes, node("n3", 8, gpus=4)]).take("language", bundle).node_id == "n3"


def test_a_fixed_port_takes_one_router_a_node():
    room = Room([node("n1", 8), node("n2", 1)], [Placed("router", "n1", {"CPU": 1.0})])
    assert room.take("router", {"CPU": 1.0}, one_per_node=True).node_id == "n2"
    with pytest.raises(Unavailable, match=r"every node has a router already, and their port is fixed"):
        room.take("router", {"CPU": 1.0}, one_per_node=True)


def test_what_is_missing_is_named():
    with pytest.raises(Unavailable, match=r"no node has fpga 1 \(the largest has 0\): lower vision\.resources\.fpga"):
        Room([node("n1")]).take("vision", {"CPU": 1.0, "fpga": 1.0})
    with pytest.raises(Unavailable, match=r"no node has CPU 1 \(the largest has 0\): lower routers\.cpus"):
        Room([]).take("router", {"CPU": 1.0})


def test_shares_of_a_gpu_add_up():
    room = Room([node("n1", 8, gpus=1)])
    assert places(room, "vision", 10, {"GPU": 0.1}) == ["n1"] * 10
    with pytest.raises(Unavailable):
        room.take("vision", {"GPU": 0.1})
