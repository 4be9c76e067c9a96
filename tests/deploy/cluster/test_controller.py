"""The controller makes what shall be, replaces what is lost, and takes nothing away that a router still uses."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from common.service.errors import InvalidRequest, Unavailable
from deploy.cluster.controller import Controller
from deploy.cluster.listener import Listener
from deploy.cluster.spec import ClusterSpec
from protos.status_pb2 import VisionLoad
from tests.deploy.cluster.fake_ground import FakeGround

SPEC = {
    "model": "nano",
    "insecure_network": True,
    "vision": {"replicas": 2, "max_replicas": 4},
    "language": {"replicas": 2},
    "routers": {"replicas": 2, "cpus": 0.5},
}


class FakeListener(Listener):
    """Hears everybody but those at ``silent`` addresses; ``queued_tiles`` is the load of each vision server."""

    def __init__(self) -> None:
        super().__init__()
        self.followed: tuple[list[str], list[str]] = ([], [])
        self.silent: set[str] = set()
        self.queued_tiles = 0

    def follow(self, vision, language) -> None:
        self.followed = (list(vision), list(language))

    def hears(self, address: str) -> bool:
        return address not in self.silent

    @property
    def vision_loads(self) -> list[VisionLoad]:
        load = VisionLoad(queued_tiles=self.queued_tiles, running_tiles=self.queued_tiles, tiles_per_second=10)
        return [load for _ in self.followed[0]]


class Play:
    """A controller on fake ground, and a clock that a test moves."""

    def __init__(self, controller: Controller, ground: FakeGround, listener: FakeListener, clock: list[float]) -> None:
        self.controller = controller
        self.listener = listener
        self.ground = ground
        self._clock = clock

    async def steps(self, count: int = 1, seconds: float = 1.0) -> None:
        for _ in range(count):
            self._clock[0] += seconds
            await self.controller.step()

    async def serve(self) -> None:
        """Until everything is ready and known to the routers."""
        await self.steps()
        self.ground.become_ready()
        await self.steps(2)
        assert self.controller.status()["has_served"]

    def phases(self, tier: str) -> dict[str, str]:
        members = self.controller.status()["members"]
        return {member["replica"]: member["phase"] for member in members if member["tier"] == tier}


Start = Callable[..., Awaitable[Play]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    started: list[Controller] = []
    clock = [1000.0]

    async def start_controller(ground: FakeGround | None = None, **changes) -> Play:
        ground = ground or FakeGround()
        spec = ClusterSpec(**{**SPEC, **changes})
        listener = FakeListener()
        controller = Controller(spec, "incarnation", ground, listener, clock=lambda: clock[0])
        started.append(controller)
        await controller.open()
        return Play(controller, ground, listener, clock)

    yield start_controller
    for controller in started:
        await controller.close()


async def test_everything_is_placed_at_once_and_told_when_ready(start):
    play = await start()
    await play.steps()
    starts = [call for call in play.ground.calls if call[0] == "start"]
    assert [replica for _, replica, _ in starts] == [
        *("vision-0.1", "vision-1.2", "language-0.3", "language-1.4", "router-0.5", "router-1.6")
    ]
    for tier in ("vision", "language", "router"):
        assert len({node for _, replica, node in starts if replica.startswith(tier)}) == 2
    assert not play.controller.status()["is_complete"]
    play.ground.become_ready()
    await play.steps()
    status = play.controller.status()
    assert status["is_complete"] and status["has_served"] and not status["failure"]
    for router in play.ground.of("router"):
        vision, language = play.ground.servers[router].members
        assert (len(vision), len(language)) == (2, 2)


async def test_a_server_that_cannot_start_fails_the_cluster_with_its_words(start):
    play = await start()
    await play.steps()
    play.ground.end("vision-1.2", "vision-1 ended with status 2: no such directory", is_final=True)
    await play.steps()
    assert play.controller.failure == "on 10.0.0.2: vision-1 ended with status 2: no such directory"


async def test_one_that_dies_is_tried_again_three_times_before_serving(start):
    play = await start()
    await play.steps()
    for _ in range(3):
        assert not play.controller.failure
        (replica,) = [name for name in play.ground.of("vision") if name.startswith("vision-0.")]
        play.ground.end(replica, "vision-0 ended with signal SIGKILL: it said nothing")
        await play.steps(2, seconds=10)
    assert "vision-0 ended with signal SIGKILL" in play.controller.failure


async def test_who_dies_comes_back_in_its_slot_and_later_each_time(start):
    play = await start()
    await play.serve()
    pauses = []
    for _ in range(4):
        (replica,) = [name for name in play.ground.of("language") if name.startswith("language-1.")]
        play.ground.end(replica)
        await play.steps(seconds=0.1)
        assert play.controller.status()["waiting"][0]["server"] == "language-1"
        num_steps = 0
        while len(play.ground.of("language")) < 2:
            await play.steps(seconds=0.5)
            num_steps += 1
        pauses.append(num_steps)
        play.ground.become_ready()
        await play.steps()
    assert pauses == [2, 4, 8, 16]
    assert play.controller.status()["is_complete"] and not play.controller.failure
    await play.steps(seconds=60)  # it has been well for a while
    (replica,) = [name for name in play.ground.of("language") if name.startswith("language-1.")]
    play.ground.end(replica)
    await play.steps(2)
    assert len(play.ground.of("language")) == 2


async def test_servers_of_a_lost_node_are_replaced_elsewhere(start):
    play = await start()
    await play.serve()
    lost = [name for name, server in play.ground.servers.items() if server.node.node_id == "n1"]
    assert lost
    play.ground.lose_node("n1")
    await play.steps()
    for router in play.ground.of("router"):
        if not play.ground.servers[router].report.address:
            continue
        vision, language = play.ground.servers[router].members
        assert len(vision) + len(language) == 4 - sum("router" not in name for name in lost)
    await play.steps(2)
    play.ground.become_ready()
    await play.steps(2)
    assert play.controller.status()["is_complete"]
    assert {server.node.node_id for server in play.ground.servers.values()} == {"n2", "n3"}


async def test_a_larger_group_is_placed_and_told(start):
    play = await start()
    await play.serve()
    play.controller.scale({"vision": 4})
    await play.steps()
    assert len(play.ground.of("vision")) == 4
    play.ground.become_ready()
    await play.steps()
    for router in play.ground.of("router"):
        assert len(play.ground.servers[router].members[0]) == 4


async def test_who_leaves_drains_after_every_router_has_read_of_it(start):
    play = await start()
    await play.serve()
    play.controller.scale({"vision": 1})
    play.ground.calls.clear()
    await play.steps(seconds=0.1)
    assert sorted(call[:2] for call in play.ground.calls) == [("tell", "router-0.5"), ("tell", "router-1.6")]
    await play.steps(5, seconds=0.1)
    assert len(play.ground.calls) == 2  # written, perhaps not yet read
    await play.steps(seconds=1)
    assert play.ground.calls[2:] == [("stop", "vision-1.2")]
    assert play.ground.servers["vision-1.2"].graces == [None]
    await play.steps(3)
    assert play.phases("vision") == {"vision-0.1": "ready", "vision-1.2": "leaving"}
    play.ground.end("vision-1.2")
    await play.steps()
    assert play.phases("vision") == {"vision-0.1": "ready"}
    assert play.controller.status()["waiting"] == []


@pytest.mark.parametrize(("tier", "size", "allowed"), [("vision", 5, "1 to 4"), ("language", 0, "at least 1")])
async def test_the_operator_is_told_what_is_allowed(start, tier, size, allowed):
    play = await start()
    with pytest.raises(InvalidRequest, match=f"{tier}={size}: this cluster may have {allowed}"):
        play.controller.scale({"router": 3, tier: size})
    assert play.controller.status()["groups"]["router"]["desired"] == 2


async def test_a_controller_started_anew_takes_over(start):
    play = await start()
    await play.serve()
    play.controller.scale({"vision": 3})
    await play.steps()
    starts = [call for call in play.ground.calls if call[0] == "start"]
    other = await start(play.ground)
    await other.steps(2)
    assert [call for call in play.ground.calls if call[0] == "start"] == starts
    play.ground.become_ready()
    await other.steps(2)
    assert other.controller.status()["is_complete"]
    assert other.controller.status()["groups"]["vision"]["desired"] == 3


async def test_one_that_was_saved_but_never_started_is_started_again(start):
    """The controller died between the two."""
    play = await start()
    await play.steps()
    del play.ground.servers["language-1.4"]
    other = await start(play.ground)
    await other.steps(2)
    assert other.phases("language") == {"language-0.3": "starting", "language-1.7": "placed"}


async def test_nothing_is_changed_while_the_head_is_lost(start):
    """Actors vanish with their raylets although their servers live."""
    play = await start()
    await play.serve()
    known = {router: play.ground.servers[router].members for router in play.ground.of("router")}
    for replica in [*play.ground.of("vision"), *play.ground.of("language")]:
        del play.ground.servers[replica]
    play.ground.calls.clear()
    play.ground.is_head_lost = True
    for _ in range(5):
        with pytest.raises(Unavailable):
            await play.steps(seconds=30)
    assert play.ground.calls == []
    assert {router: play.ground.servers[router].members for router in play.ground.of("router")} == known


async def test_what_has_no_place_is_said_and_before_serving_it_fails_the_cluster(start):
    play = await start(FakeGround(num_nodes=1, cpus=4.0), routers={"replicas": 1, "cpus": 1})
    await play.steps(2)
    assert not play.controller.failure
    assert "router-0 has no place: no node has CPU 1 free" in play.controller.status()["problem"]
    await play.steps(5)
    assert "router-0 has no place" in play.controller.failure


async def test_what_has_no_place_later_waits_for_a_node(start):
    play = await start(FakeGround(num_nodes=2, cpus=3.0))
    await play.serve()
    play.controller.scale({"vision": 4})
    await play.steps(10)
    assert "vision-2 has no place" in play.controller.status()["problem"]
    assert not play.controller.failure
    play.ground.alive = [*play.ground.alive, *FakeGround(num_nodes=3).alive[2:]]
    await play.steps(2)
    assert play.controller.status()["problem"] == ""
    assert len(play.ground.of("vision")) == 4


async def test_a_server_that_says_nothing_is_replaced_one_at_a_time(start):
    """Its process lives, so its actor is content."""
    play = await start()
    await play.serve()
    play.listener.silent = {play.ground.servers[replica].report.address for replica in play.ground.of("vision")}
    await play.steps(15)
    assert set(play.phases("vision").values()) == {"ready"}
    await play.steps(5)
    assert sorted(play.phases("vision").values()) == ["leaving", "ready", "starting"]
    (leaving,) = [name for name, phase in play.phases("vision").items() if phase == "leaving"]
    assert play.ground.servers[leaving].graces == [5.0]  # it will not drain
    assert set(play.phases("language").values()) == {"ready"}


async def test_the_vision_group_follows_its_queue(start):
    play = await start(autoscale={"cooldown_up": 2, "cooldown_down": 10})
    await play.serve()
    play.listener.queued_tiles = 150
    await play.steps(5)
    assert len(play.ground.of("vision")) == 4
    play.ground.become_ready()
    await play.steps(2)
    play.listener.queued_tiles = 0
    await play.steps(8)
    assert list(play.phases("vision").values()) == ["ready"] * 4
    for _ in range(40):
        for replica in [name for name, phase in play.phases("vision").items() if phase == "leaving"]:
            play.ground.end(replica)
        await play.steps()
    assert list(play.phases("vision").values()) == ["ready"]
    assert play.controller.status()["groups"]["vision"] == {"desired": 1, "min": 1, "max": 4, "is_scaled": True}


async def test_the_end_goes_with_the_flow_of_work(start):
    play = await start()
    await play.serve()
    play.controller.stop()
    for tier in ("router", "language", "vision"):
        play.ground.calls.clear()
        await play.steps(2)
        stopped = [call[1] for call in play.ground.calls if call[0] == "stop"]
        assert sorted(stopped) == sorted(play.ground.of(tier))
        for replica in stopped:
            play.ground.end(replica)
    await play.steps()
    assert play.ground.servers == {}
    assert play.controller.status()["members"] == []


async def test_a_forced_end_goes_at_once(start):
    play = await start()
    await play.serve()
    play.controller.scale({"vision": 3})
    await play.steps()
    play.controller.stop(is_forced=True)
    await play.steps()
    assert "vision-2.7" not in play.ground.servers  # it had not begun
    assert [server.graces for server in play.ground.servers.values()] == [[1.0]] * 6
