"""``dvd plan``: from options to a cluster that `dvd up` would take."""

import json

import pytest

from benchmarks.settings import PlanSettings
from benchmarks.simulator import command
from benchmarks.simulator.cluster import cluster_yaml
from benchmarks.simulator.jobs import jobs
from benchmarks.simulator.pipeline import Cards, Layout, Scenario, simulate
from benchmarks.simulator.roofline import published, published_card
from benchmarks.simulator.search import Limits, estimate, evaluate, splits
from benchmarks.workload import Size, Workload, fixed
from common.service.errors import ConfigError
from deploy import cli
from deploy.cluster.spec import ClusterSpec
from tests.benchmarks.simulator.conftest import PREFILL_TOKEN_S, round_card

SHORT = ["--duration=5", "--warmup=1", "--output-tokens=8"]


def settings(*flags):
    return PlanSettings.load([*SHORT, *flags])


def test_a_plan_is_printed_and_written(tmp_path, capsys):
    card = tmp_path / "card.json"
    card.write_text(round_card().to_json())
    flags = ["--card", str(card), "--devices=4", "--price=2", "--burst=5", "--vir-share=0.5", f"--results={tmp_path}"]
    assert cli.main(["plan", *SHORT, *flags]) == 0
    said = capsys.readouterr().out
    assert "* " in said and "undivided" in said and "without ViR" in said and "by hand" in said
    record = json.loads((tmp_path / "plan.json").read_bytes())
    assert record["best"] in record["candidates"]
    assert record["best"]["outcome"]["cost_per_million"] > 0
    assert (tmp_path / "plan.svg").read_text().lstrip().startswith("<?xml")
    spec = ClusterSpec.load(tmp_path / "cluster.yaml")
    layout = record["best"]["layout"]
    assert (spec.vision.replicas, spec.language.replicas) == (layout["num_vision"], layout["num_language"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--card=b200"], "--card b200: expected a100, h100, h200, l4, or a file"),
        (["--model=GPT"], "model GPT: expected one of InternVL3_5-1B"),
        (["--card=l4", "--model=InternVL3_5-38B", "--language-devices=2"], "does not fit; 4 do"),
        (["--vision=2"], "--vision and --language: expected both"),
        (["--transport=pigeon"], "transport pigeon: card H100 SXM 80 GB has"),
        (["--model=InternVL3_5-38B", "--card=a100", "--devices=2"], "expected at least 3"),
        (["--image-size=large"], "--image-size large"),
        (["--input-tokens=1000000"], "a request of .* tokens: the KV memory"),
        (["--vision=1", "--language=1", "--model-path=models", "--results=RESULTS"], "cluster.yaml: model"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_option(tmp_path, flags, said, capsys):
    flags = [flag.replace("RESULTS", str(tmp_path)) for flag in flags]
    with pytest.raises(ConfigError, match=said):
        command.main(settings(*flags), [])


def test_with_plenty_of_both_the_split_is_that_of_the_work():
    """A request is a second of vision (ten tiles) and a quarter of language: four to one."""
    workload = Workload(image_sizes=((Size(1344, 1344), 1.0),), input_tokens=fixed(1), output_tokens=fixed(1))
    card = round_card()
    cards, scenario = Cards(card, card), command.make_scenario(settings("--image-size=1344", "--output-tokens=1"))
    capacity = estimate(cards, scenario)
    assert capacity.vision == pytest.approx(1.0)
    assert capacity.language == pytest.approx(1 / (2560 + 128) * 1e4, rel=0.1)
    assert splits(10, cards, capacity)[0] == Layout(8, 2)
    assert splits(1000, cards, capacity)[0].num_vision == pytest.approx(789, abs=15)
    assert [job.prompt_tokens for job, _ in zip(jobs(workload, 0), range(2), strict=False)] == [2561, 2561]


def test_the_rate_that_is_found_keeps_the_limits_and_twice_it_does_not():
    card = round_card()
    cards, scenario = Cards(card, card), command.make_scenario(settings("--image-size=448"))
    limits, capacity, layout = Limits(0.5, 0.2), estimate(cards, scenario), Layout(3, 1)
    found = evaluate(layout, cards, scenario, limits, capacity, None)
    assert found.keeps_limits
    assert (found.outcome.ttft_p99 or 1) < 0.5
    assert 5 < found.rate < 27
    assert not evaluate(layout, cards, scenario, limits, capacity, 2 * found.rate).keeps_limits


def test_equal_seeds_are_equal_runs():
    card = published_card("h100", "InternVL3_5-8B")
    scenario = command.make_scenario(settings("--request-rate=20", "--image-reuse-ratio=0.5", "--vir-share=0.5"))
    once, again = (simulate(Layout(1, 2), Cards(card, card), scenario) for _ in range(2))
    assert once == again


def test_reuse_and_smaller_tiles_save_what_they_should():
    card = round_card()

    def busy(**changes):
        asked = command.make_scenario(settings("--request-rate=2", "--duration=60"))
        asked = Scenario(**{name: getattr(asked, name) for name in Scenario.__slots__} | changes)
        return simulate(Layout(2, 2), Cards(card, card), asked).utilisation

    plain, small = busy(), busy(vir_share=1.0)
    assert small["vision"] == pytest.approx(plain["vision"])
    saved = 2 * 5 * (256 - 64) * PREFILL_TOKEN_S / 2  # requests/s, tiles, tokens, for one of two servers
    assert plain["language"] - small["language"] == pytest.approx(saved, rel=0.1)
    half = busy(workload=Workload(image_sizes=((Size(896, 896), 1.0),), image_reuse_ratio=0.5))
    assert half["vision"] == pytest.approx(0.5 * plain["vision"], rel=0.25)


@pytest.mark.parametrize("device", published().devices)
@pytest.mark.parametrize("model", published().models)
def test_published_hardware_has_a_card_for_every_model(device, model):
    card = published_card(device, model)
    language = card.language_part()
    assert language.kv_tokens > 4096
    assert language.decode_seconds(1, 1) < language.decode_seconds(64, 4096)
    assert device.upper() in card.name and "Assumed, not measured" in card.source.text


def test_a_cluster_has_the_devices_of_its_plan():
    card = published_card("a100", "InternVL3_5-38B", language_devices=8)
    text = cluster_yaml(Layout(3, 2, 2), Cards(card, card), "/models/InternVL3_5-38B")
    assert "tensor_parallel_size: 8" in text and "replicas: 3" in text
    with pytest.raises(ConfigError, match=r"vision\.replicas"):
        cluster_yaml(Layout(2000, 2), Cards(card, card), "/models/x")
