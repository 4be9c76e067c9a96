"""Keys from a file: whole or not at all, read again when it changes; each tenant has its quota and its caches."""

import asyncio
import hashlib
import logging
import os

import pytest
from openai import AsyncOpenAI, RateLimitError

from common.service import metrics
from common.service.errors import ConfigError
from router.api.translate import cache_scope
from router.quotas import Quota
from router.settings import RouterSettings
from router.tenants import MAX_KEYS, Tenants, parse_tenants
from tests.router.conftest import CHAT, error_of, png, running_system, user

DIGEST = hashlib.sha256(b"sesame").hexdigest()
ONE = f"tenants:\n- name: one\n  sha256: {DIGEST}\n"
WRONG = [
    ("", "Expected `object`"),
    ("tenants: []", "length >= 1 - at `$.tenants`"),
    ("tenants:\n- name: [\n  key: secret-key", "line 3: not YAML"),
    ("tenants:\n- name: a\n", "tenants[0]: sha256 or key is missing"),
    ("tenants:\n- name: a b\n  key: secret-key\n", "$.tenants[0].name"),
    ("tenants:\n- name: a\n  sha256: secret-key\n", "$.tenants[0].sha256"),
    ("tenants:\n- name: a\n  key: secret-key\n  requests_per_minute: 0\n", "$.tenants[0].requests_per_minute"),
    ("tenants:\n- name: a\n  key: secret-key\n  requests_per_minit: 1\n", "unknown field `requests_per_minit`"),
    ("tenants:\n- {name: a, key: secret-key}\n- {name: a, key: other}\n", "name a is there 2 times"),
    ("tenants:\n- {name: a, key: secret-key}\n- {name: b, key: [x, secret-key]}\n", "key with sha256"),
    ("tenants:\n- {name: a, key: [" + ", ".join(f"k{i}" for i in range(MAX_KEYS + 1)) + "]}", "at most 1024"),
    ("tenants: !!python/object/apply:os.system [secret-key]", "not YAML"),
]


def replace(path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    os.replace(path.with_suffix(".new"), path)


def test_an_entry_is_a_name_keys_and_limits():
    (entry,) = parse_tenants(ONE.replace(DIGEST, f"[{DIGEST.upper()}]") + "  key: other\n  tiles_per_minute: 7\n")
    assert entry.digests == [bytes.fromhex(DIGEST), hashlib.sha256(b"other").digest()]
    assert entry.quota == Quota(tiles_per_minute=7)


@pytest.mark.parametrize(("text", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_is_wrong_is_named_and_no_key_is_told(text, said):
    with pytest.raises(ValueError) as caught:
        parse_tenants(text)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_router_does_not_start_with_half_of_its_keys(tmp_path):
    path = tmp_path / "keys.yaml"
    with pytest.raises(ConfigError, match=r"--api-keys-file .*keys\.yaml: no such file"):
        Tenants([], path)
    path.write_text(ONE + "- name: two\n")
    with pytest.raises(ConfigError, match=r"tenants\[1\]: sha256 or key is missing"):
        Tenants([], path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        Tenants([], path)


def test_keys_of_one_tenant_share_its_caches_and_others_do_not(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text("tenants:\n- {name: one, key: [a, b]}\n- {name: two, key: c}\n")
    tenants = Tenants(["d"], path)
    found = [tenants.find(key) for key in "abcd"]
    scopes = [cache_scope(tenant.scope, None) for tenant in found if tenant is not None]
    assert scopes[0] == scopes[1]
    assert len(set(scopes)) == 3 and len(scopes) == 4
    assert tenants.find("e") is None and tenants.find("") is None


async def test_a_file_that_changes_is_taken_over_and_a_wrong_one_is_not(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("router.tenants.POLL_SECONDS", 0.02)
    caplog.set_level(logging.INFO, "router.tenants")
    path = tmp_path / "keys.yaml"
    path.write_text(ONE + "  requests_per_minute: 2\n")
    tenants = Tenants([], path)
    first = tenants.find("sesame")
    assert first is not None and first.meter is not None
    following = asyncio.create_task(tenants.follow())
    try:
        replace(path, "tenants: []\n")
        await until(lambda: "the keys stay as they were" in caplog.text)
        assert tenants.find("sesame") is first
        path.unlink()
        await until(lambda: "no such file" in caplog.text)
        assert tenants.find("sesame") is first
        replace(path, ONE + "- {name: two, key: open}\n")
        await until(lambda: tenants.find("open"))
        second = tenants.find("sesame")
        assert second is not None and second.meter is first.meter
        replace(path, "tenants:\n- {name: two, key: open}\n")
        await until(lambda: tenants.find("sesame") is None)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert caplog.text.count("length >= 1") == 1


async def test_a_tenant_beyond_its_quota_is_told_when_to_come_again(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(ONE + "  requests_per_minute: 2\n- {name: two, key: free}\n")
    before = metrics.QUOTA_REJECTIONS.labels("requests")._value.get()
    async with running_system(api_keys_file=path) as system:
        system.http.headers["authorization"] = "Bearer sesame"
        assert (await system.http.get("/v1/models")).status_code == 200
        answers = [await system.chat() for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
        refusal = answers[2]
        assert (error_of(refusal)["type"], error_of(refusal)["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert refusal.headers["x-should-retry"] == "true"
        assert 1 <= int(refusal.headers["retry-after"]) <= 30
        assert 0 < int(refusal.headers["retry-after-ms"]) <= 30_000
        assert len(system.language.requests) == 2
        async with AsyncOpenAI(base_url=f"{system.url}/v1", api_key="sesame", max_retries=0) as client:
            with pytest.raises(RateLimitError):
                await client.chat.completions.create(model="fake", messages=[user("hello")])
        other = await system.chat()
        assert other.status_code == 429
        free = {"authorization": "Bearer free"}
        answer = await system.http.post(CHAT, json={"messages": [user("hello")]}, headers=free)
        assert answer.status_code == 200
        assert "x-ratelimit-limit-requests" not in answer.headers
    assert metrics.QUOTA_REJECTIONS.labels("requests")._value.get() == before + 3


async def test_tokens_are_charged_as_used_and_tiles_before_any_server_is_asked(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(ONE + "  max_concurrent_requests: 1\n  tokens_per_minute: 100000\n  tiles_per_minute: 1\n")
    async with running_system(api_keys_file=path) as system:
        system.http.headers["authorization"] = "Bearer sesame"
        answer = await system.chat(max_tokens=3000)
        used = answer.json()["usage"]["total_tokens"]
        assert 100000 - int(answer.headers["x-ratelimit-remaining-tokens"]) >= 3000
        seen = await system.chat(messages=[user("what?", png())])
        assert seen.status_code == 200
        assert int(seen.headers["x-ratelimit-remaining-tokens"]) < 100000 - used
        refused = await system.chat(messages=[user("what?", png())])
        assert (refused.status_code, refused.headers["x-should-retry"]) == (429, "true")
        assert len(system.language.requests) == 2
        after = int(refused.headers["x-ratelimit-remaining-tokens"])
        assert after > 100000 - 3000


async def test_a_stream_that_runs_takes_the_only_place(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(ONE + "  max_concurrent_requests: 1\n")
    async with running_system(api_keys_file=path) as system:
        system.http.headers["authorization"] = "Bearer sesame"
        system.language.at_token.closes_after = 1
        body = {"messages": [user("hello you there")], "stream": True}
        async with system.http.stream("POST", CHAT, json=body) as stream:
            assert stream.status_code == 200
            assert (await system.chat()).status_code == 429
            assert (await system.http.get("/load")).json() == {"server_load": 1}
        await system.until_idle()
        system.language.at_token.closes_after = None
        system.language.at_token.is_open.set()
        assert (await system.chat()).status_code == 200


def test_the_file_is_an_option(tmp_path):
    settings = RouterSettings.load(["--vision", "a:1", "--language", "b:2", "--api-keys-file", str(tmp_path / "k")])
    assert settings.api_keys_file == tmp_path / "k"


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)
