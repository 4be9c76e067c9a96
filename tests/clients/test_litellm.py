"""LiteLLM: sync, async, streaming, its router, its probes; what is wrong is its own exception, and asked only once."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.clients.conftest import run_client, shown
from tests.end_to_end.conftest import data_url, sample_of, scrape
from tests.router.conftest import running_system

CALLS = Path(__file__).parent / "litellm_calls.py"
SAMPLE = sample_of("number", 1)
ERRORS = ("model_not_found", "invalid_value", "invalid_image")
ONE_RETRY = """
import sys, litellm
try:
    litellm.completion(
        model=sys.argv[1], api_base=sys.argv[2], api_key="none", messages=[{"role": "user", "content": "hello"}],
        num_retries=1,
    )
except litellm.ServiceUnavailableError as error:
    print(error)
"""


def num_errors(address: str, codes: tuple[str, ...] = ERRORS) -> dict[str, float]:
    """By code, over all stages."""
    samples = scrape(address)
    return {
        code: sum(value for name, value in samples.items() if f"dvd_request_errors_total{{code={code}," in name)
        for code in codes
    }


@pytest.fixture(scope="module")
def results(nano, tmp_path_factory):
    url = data_url(SAMPLE.images[0])
    before = num_errors(nano.address)
    home = tmp_path_factory.mktemp("litellm")
    answers = json.loads(run_client("litellm", "python", str(CALLS), nano.address, SAMPLE.question, url, home=home))
    after = num_errors(nano.address)
    return {**answers, "errors": {code: after[code] - before[code] for code in ERRORS}}


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_every_way_of_asking_gets_the_answer(results, provider):
    said = results[provider]
    answers = {way: said[way] for way in ("sync", "async", "stream", "async stream", "router")}
    assert answers == dict.fromkeys(answers, SAMPLE.answer)
    assert said["usage"] == said["streamed usage"] > 256
    assert json.loads(said["schema"])["seen"] in ("number", "shape")


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_models_are_listed_and_the_probe_finds_it_well(results, provider):
    assert [name.removeprefix(f"{provider}/") for name in results[provider]["models"]] == ["nano"]
    assert results[provider]["health"] is None


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_errors_are_its_own_exceptions(results, provider):
    kind, text = results[provider]["no such model"]
    assert (kind, "gpt-17" in text) == ("NotFoundError", True)
    kind, text = results[provider]["out of bounds"]
    assert (kind, "temperature" in text) == ("BadRequestError", True)
    assert results[provider]["no image"][0] == "BadRequestError"


def test_what_cannot_succeed_is_asked_once(results):
    assert results["errors"] == dict.fromkeys(ERRORS, 2)  # once by each provider


def test_the_documented_snippet(nano, tmp_path):
    text = shown("litellm", nano.address, tmp_path)
    assert run_client("litellm", "python", "-c", text, home=tmp_path) == "The number is 7059.\n"


async def test_what_may_succeed_is_asked_again(tmp_path):
    async with running_system(start_workers=False) as nobody:

        def ask() -> tuple[str, float]:
            before = num_errors(nobody.url, ("not_ready",))
            where = ("hosted_vllm/nano", f"{nobody.url}/v1")
            said = run_client("litellm", "python", "-c", ONE_RETRY, *where, home=tmp_path)
            return said, num_errors(nobody.url, ("not_ready",))["not_ready"] - before["not_ready"]

        said, num_asked = await asyncio.to_thread(ask)
    assert '"code":"not_ready"' in said
    assert num_asked == 2
