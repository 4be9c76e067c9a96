"""Names of vLLM: off by default; with ``--metrics-compat vllm`` they say, with its labels, what ours say."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.service.errors import ConfigError
from protos.status_pb2 import LanguageLoad
from router.settings import RouterSettings
from tests.router.conftest import System, png, running_system, user

MINIMUM = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
}
Samples = dict[tuple[str, str], float]
"""By name and what labels say beyond the model's name and the engine's; those of all engines are added."""


async def families(system: System) -> dict:
    text = (await system.http.get("/metrics")).text
    return {family.name: family for family in text_string_to_metric_families(text)}


async def samples(system: System, prefix: str) -> Samples:
    found: Samples = {}
    for family in (await families(system)).values():
        for sample in family.samples:
            if sample.name.startswith(prefix):
                others = [sample.labels[name] for name in ("finished_reason", "reason", "le") if name in sample.labels]
                key = sample.name.removeprefix(prefix), "".join(others)
                found[key] = found.get(key, 0.0) + sample.value
    return found


def all_have_reported(system: System) -> bool:
    statuses = [worker.status for worker in system.router.fleet.language]
    return all(status is not None and status.language.total_kv_blocks for status in statuses)


def growth(before: Samples, after: Samples, name: str, label: str = "") -> float:
    return after[name, label] - before.get((name, label), 0.0)


async def test_they_are_off_by_default(system):
    await system.chat()
    assert [name for name in await families(system) if name.startswith("vllm:")] == []


def test_other_names_are_not_known():
    with pytest.raises(ConfigError, match="metrics_compat"):
        RouterSettings.load(["--vision", "a:1", "--language", "b:1", "--metrics-compat", "sglang"])


async def test_the_minimum_is_there_before_the_first_request():
    async with running_system(metrics_compat="vllm") as system:
        system.language.change(load=LanguageLoad(free_kv_blocks=30, total_kv_blocks=40))
        await system.until(lambda: all_have_reported(system))
        found = await families(system)
        assert {name: found[name].type for name in MINIMUM} == MINIMUM
        for family in (family for name, family in found.items() if name.startswith("vllm:")):
            assert family.samples, family.name
            for sample in family.samples:
                assert sample.labels["model_name"] == "fake"
                assert sample.labels["engine"] == "0"
                assert sample.labels.keys() <= {"model_name", "engine", "le", "reason", "finished_reason"}
        assert found["vllm:kv_cache_usage_perc"].samples[0].value == 0.25


async def test_they_count_what_ours_count():
    async with running_system(metrics_compat="vllm") as system:
        before = await samples(system, "vllm:")
        system.language.words = ["one", "two", "three"]
        body = {"messages": [user(png(), "x")], "n": 2, "max_tokens": 8}
        usage = (await system.chat(**body)).json()["usage"]
        await system.until_idle()
        after = await samples(system, "vllm:")
        assert growth(before, after, "prompt_tokens_total") == usage["prompt_tokens"] > 0
        assert growth(before, after, "prefix_cache_queries_total") == usage["prompt_tokens"]
        assert growth(before, after, "prefix_cache_hits_total") == usage["prompt_tokens_details"]["cached_tokens"]
        assert growth(before, after, "generation_tokens_total") == 6
        assert growth(before, after, "request_success_total", "stop") == 2
        assert growth(before, after, "time_to_first_token_seconds_count") == 1
        assert growth(before, after, "inter_token_latency_seconds_count") == 4
        assert growth(before, after, "e2e_request_latency_seconds_bucket", "+Inf") == 1
        assert growth(before, after, "request_params_n_sum") == 2
        assert growth(before, after, "request_params_max_tokens_sum") == 8
        assert growth(before, after, "mm_cache_queries_total") == 1
        assert growth(before, after, "mm_cache_hits_total") == 0
        for stage in ("queue", "prefill", "decode", "inference"):
            assert growth(before, after, f"request_{stage}_time_seconds_count") == 2
        ours = await samples(system, "dvd_")
        for bound in (bound for name, bound in after if name == "time_to_first_token_seconds_bucket"):
            key = "time_to_first_token_seconds_bucket", bound
            assert after[key] == ours[key]


async def test_a_request_is_waiting_then_running_then_neither():
    async with running_system(metrics_compat="vllm") as system:

        async def queue() -> tuple[float, float]:
            found = await samples(system, "vllm:num_requests_")
            return found["waiting", ""], found["running", ""]

        assert await queue() == (0, 0)
        system.language.at_admission.is_open.clear()
        system.language.at_token.closes_after = 1
        chat = asyncio.create_task(system.chat())
        await system.language.at_admission.wait_for(lambda gate: gate.num_entered == 1)
        assert await queue() == (1, 0)
        system.language.at_admission.is_open.set()
        await system.language.at_token.wait_for(lambda gate: gate.num_entered == 2)
        async with asyncio.timeout(10):
            while await queue() != (0, 1):
                await asyncio.sleep(0.01)
        system.language.at_token.is_open.set()
        assert (await chat).status_code == 200
        await system.until_idle()
        assert await queue() == (0, 0)


async def test_a_full_language_server_has_its_own_engine():
    async with running_system(metrics_compat="vllm", num_language=2) as system:
        for server, free in zip(system.languages, (10, 0), strict=True):
            server.change(load=LanguageLoad(free_kv_blocks=free, total_kv_blocks=10, num_preemptions=10 - free))
        await system.until(lambda: all_have_reported(system))
        preempted = (await families(system))["vllm:num_preemptions"].samples
        assert {sample.labels["engine"]: (sample.name, sample.value) for sample in preempted} == {
            "0": ("vllm:num_preemptions_total", 0),
            "1": ("vllm:num_preemptions_total", 10),
        }
        usage = (await families(system))["vllm:kv_cache_usage_perc"].samples
        assert {sample.labels["engine"]: sample.value for sample in usage} == {"0": 0, "1": 1}
