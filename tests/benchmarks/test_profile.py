"""``dvd profile``: what is measured becomes a card, and a card says where its figures come from."""

import os
import socket

import pytest
import torch

from benchmarks import router, transport
from benchmarks.profile import answers, ways
from benchmarks.profile.answers import Images
from benchmarks.profile.deployment import Usage
from benchmarks.profile.engines import measure_language
from benchmarks.profile.turns import Effort, Sizes, affordable, take_turns
from benchmarks.simulator.hardware import HardwareCard
from common.service.errors import ConfigError, Unavailable
from deploy import cli
from deploy.settings import model_directory
from tests.benchmarks.conftest import phase_result, sample

SMALL = ["--seconds", "0.05", "--rounds", "1", "--tiles", "1", "--lengths", "32", "--prompts", "1,2"]
STEPS = ["--batches", "1,3", "--contexts", "24,48", "--threads", "1"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measured_ways(monkeypatch):
    """What transports and routers do is measured by tests of their own, in many processes; here are their figures."""

    async def transports(names, messages, num_rounds, in_flight, show):
        assert in_flight == 1
        assert os.sched_getaffinity(0) == transport.SENDING
        sizes = {message.name: len(message.payload) for message in messages}
        rates = {(size, name): [sizes[size] / (1e-4 + sizes[size] / 2e9) / 1e9] for size in sizes for name in names}
        return [transport._case(size, name, rates, sizes[size]) for size, name in rates]

    def routers(loads, options):
        def turns(load):
            return {subject: router.Turn(subject, 100.0, 0.1 + load.num_tokens / 1000, 0.5, {"p50": 1.0, "p99": 2.0})
                    for subject in router.SUBJECTS}  # fmt: skip

        return [router.make_case(load, [turns(load)]) for load in loads]

    monkeypatch.setattr(transport, "measure", transports)
    monkeypatch.setattr(router, "measure", routers)


@pytest.mark.usefixtures("measured_ways")
def test_engines_become_a_card(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Effort, "limit", 60.0)  # a machine that is busy with other tests affords everything, too
    path = tmp_path / "card.json"
    argv = ["profile", "nano", "-o", str(path), "--device", "cpu", "--transports", "tcp", *SMALL, *STEPS]
    assert cli.main([*argv, "--price-per-device-hour", "2.5"]) == 0
    card = HardwareCard.load(path)
    assert HardwareCard.from_json(card.to_json()) == card
    assert (card.model, card.source.kind, card.price_per_device_hour) == ("nano", "measured", 2.5)
    assert card.source.text.startswith("dvd profile nano -o ")
    vision, language = card.vision_part(), card.language_part()
    assert [point.batch for point in vision.tiles] == [1] == [vision.max_batch]
    assert 0 < vision.image_s_per_tile < 1
    assert {(point.batch, point.length) for point in language.prefill} == {(1, 32), (2, 32)}
    assert {(point.batch, point.context) for point in language.decode} == {(n, at) for n in (1, 3) for at in (24, 48)}
    assert language.kv_tokens >= 8192
    way = card.transport("tcp")
    assert way.gb_per_s == pytest.approx(2.0, rel=0.01)
    assert way.latency_s == pytest.approx(1e-4, rel=0.01)
    assert card.router.s_per_token == pytest.approx(1e-5)
    assert card.router.s_per_request == pytest.approx(1e-3)
    shown = capsys.readouterr().out
    for words in ("1 x 32 tokens", "3 sequences at 48", "JPEG to tiles", "GB/s", str(path)):
        assert words in shown


def test_turns_alternate_until_the_time_is_over():
    order, now = [], [0.0]

    def piece(name):
        def once():
            order.append(name)
            now[0] += 1.0
            return float(len(order))

        return once

    times = take_turns({name: piece(name) for name in "ab"}, 3.5, 1, lambda: now[0])
    assert order == ["a", "b", "b", "a"]
    assert times == {"a": [1, 4], "b": [2, 3]}
    assert [len(each) for each in take_turns({"a": piece("a")}, 0.0, 3, lambda: now[0]).values()] == [3]


@pytest.mark.parametrize(("limit", "kept"), [(0.5, [1]), (2.0, [1, 2]), (9.0, [1, 2, 8])])
def test_sizes_that_take_too_long_are_left_out(limit, kept):
    done = []

    def work(size):
        done.append(size)
        return float(size)

    assert affordable([8, 2, 1, 2], work, limit) == kept
    assert max(done) <= 8


def test_a_large_message_that_took_no_longer_has_no_latency():
    way = ways.transport_rates((10**3, 10**6), (2e-3, 1e-3))
    assert (way.gb_per_s, way.latency_s) == (1.0, 0.0)


def test_tokens_that_cost_less_than_nothing_cost_nothing():
    costs = ways.router_rates((1, 2e-3), (64, 1e-3))
    assert (costs.s_per_request, costs.s_per_token) == (2e-3, 0.0)


def picture(sent_at: float, tiles: int, ttft: float = 0.1, **more):
    stages = {"images": 1, "tiles": tiles, "image_tokens": 256 * tiles, "feature_bytes": 1000 * tiles, **more}
    told = {"encode_ms": 50.0 * tiles, "decode_ms": 5.0 * tiles, "transfer_ms": 2.0, "transport": "shm"}
    return sample(sent_at, ttft, gaps=(), metrics={"dvd": told | stages})


def test_vision_rates_come_from_the_block_and_from_many_at_once():
    alone = [phase_result(picture(0, 1), picture(1, 1)), phase_result(picture(2, 5, encode_ms=200.0))]
    at_once = {2: [phase_result(picture(0, 5, 0.5), picture(0, 5, 1.0))]}
    rates = answers.vision_rates(Images(alone, at_once), num_servers=2)
    assert {point.batch: point.tiles_per_s for point in rates.tiles} == {1: 20.0, 5: 25.0, 10: 5.0}
    assert (rates.max_batch, rates.image_s_per_tile) == (10, 0.005)
    smallest = answers.smallest(answers.good(alone))
    assert {name: way.gb_per_s for name, way in answers.transport_rates(smallest).items()} == {"shm": 5e-4}


def test_a_router_that_tells_nothing_is_refused():
    with pytest.raises(Unavailable, match=r"encode_ms.*--enable-per-request-metrics"):
        answers.refuse_silence([phase_result(sample(0))])
    with pytest.raises(Unavailable, match="encode_ms, transfer_ms"):
        answers.refuse_silence([phase_result(picture(0, 1, encode_ms=None, transfer_ms=None))])
    answers.refuse_silence([phase_result(picture(0, 1))])


def test_lengths_are_those_the_server_counted():
    told = {"dvd": {"prefill_ms": 10.0}}
    prompts = [[phase_result(sample(0, prompt_tokens=length, metrics=told))] for length in (40, 90)]
    assert [(p.length, p.tokens_per_s) for p in answers.prefill_points(prompts)] == [(40, 4000), (90, 9000)]
    steps = {
        (1, 32): [phase_result(sample(0, prompt_tokens=20, gaps=(0.01, 0.03)))],
        (4, 32): [phase_result(sample(0, prompt_tokens=24, gaps=(0.03, 0.03)))],
    }
    points = answers.decode_points(steps)
    assert [(p.batch, p.context) for p in points] == [(1, 23), (4, 23)]
    assert [p.step_s for p in points] == pytest.approx([0.02, 0.03])
    with pytest.raises(Unavailable, match="1 streams of 8 tokens"):
        answers.decode_points({(1, 8): [phase_result(sample(0, gaps=()))]})


def test_steps_are_counted_while_all_streams_run():
    """The one began early and alone; the other reads its tokens two at a time."""
    early = sample(0.0, 1.0, gaps=(0.1,) * 10 + (0.5,) * 8)
    late = sample(0.0, 2.0, gaps=(0.0, 1.0) * 6)
    (point,) = answers.decode_points({(2, 8): [phase_result(early, late)]})
    assert point.step_s == pytest.approx(4.0 * 2 / (8 + 9))


def test_what_a_router_costs():
    short = phase_result(*(sample(at, gaps=()) for at in range(9)))
    long = phase_result(*(sample(at, gaps=(0.01,) * 10) for at in range(4)))
    costs = answers.cpu_costs([short], 0.02, [long], 0.06)
    assert [costs.s_per_token, costs.s_per_request] == pytest.approx([1e-3, 1e-3])
    left = phase_result(sample(0, 0.1, metrics={"dvd": {"prefill_ms": 70.0, "language_queue_ms": 10.0}}))
    assert answers.unexplained(left).s_per_request == pytest.approx(0.02)


def test_what_a_router_needs_idle_is_not_counted():
    before, idle, after = Usage(1.0, 10.0), Usage(1.5, 12.0), Usage(4.0, 16.0)
    share = idle.share_since(before)
    assert (share, after.seconds_since(idle, share)) == (0.25, 1.5)
    assert Usage(1.6, 20.0).seconds_since(idle, share) == 0.0


def test_one_piece_may_take_a_share_of_the_time():
    assert Effort(8.0, 3).limit == 2.0


def test_nobody_there(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert cli.main(["profile", "--url", f"http://127.0.0.1:{port}", "--kv-tokens", "1000"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dvd: error: http://127.0.0.1:{port}: no server answers: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "expected a MODEL, or --url of a running deployment, and not both"),
        (["nano", "--url", "http://127.0.0.1:1"], "and not both"),
        (["--url", "http://127.0.0.1:1"], "--url needs --kv-tokens"),
        (["--url", "nowhere", "--kv-tokens", "9"], "base_url nowhere: expected http://HOST:PORT"),
        (["nano", "--device", "abacus"], "device 'abacus' is unknown to torch"),
        (["nano", "--transports", "pigeon"], "transports pigeon: this machine has"),
        (["nano", "--secnds", "1"], "unknown flag --secnds; did you mean --seconds?"),
        (["nano", "-o", "no/such/card.json"], "--output no/such/card.json: no such directory"),
        (["nowhere"], "model nowhere: no such directory"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, argv, complaint):
    assert cli.main(["profile", *argv]) == 2
    output = capsys.readouterr()
    assert complaint in output.err
    assert (output.out, output.err.count("\n")) == ("", 1)


def test_lengths_that_no_model_takes_are_refused():
    nano, effort = model_directory("nano"), Effort(0.01, 1)
    with pytest.raises(ConfigError, match="lengths 100000: this model and its KV memory take 1 to 8191"):
        measure_language(nano, "cpu", "float32", Sizes([1], [10**5], [1], [1], [8]), effort)
    with pytest.raises(ConfigError, match="contexts 8192: this model and its KV memory take 1 to 8159"):
        measure_language(nano, "cpu", "float32", Sizes([1], [8], [1], [1], [8192]), effort)
