"""``/openapi.json`` and ``/docs``: every route, nothing from elsewhere, and nobody without a key."""

import re

import msgspec
from starlette.routing import Route

from router.api.schemas import ChatCompletionRequest
from tests.router.conftest import error_of, running_system


def references(value):
    if isinstance(value, dict):
        yield from (value[key] for key in value if key == "$ref")
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from references(item)


async def test_every_route_is_described_with_its_error_body(system):
    response = await system.http.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert document["openapi"].startswith("3.1.")
    described = {(path, method) for path, operations in document["paths"].items() for method in operations}
    routes = [route for route in system.router._routes.routes if isinstance(route, Route)]
    assert described == {
        (route.path.replace(":path}", "}"), method.lower())
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
    }
    schemas = document["components"]["schemas"]
    for path, method in described:
        responses = document["paths"][path][method]["responses"]
        for status in ("4XX", "5XX"):
            assert responses[status]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas
    assert error_of(await system.http.get("/nothing")).keys() == schemas["ErrorDetail"]["properties"].keys()


async def test_the_schema_is_that_of_the_types_which_read_requests(system):
    document = (await system.http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert set(schemas["ChatCompletionRequest"]["properties"]) == set(ChatCompletionRequest.__struct_fields__)
    assert schemas["Part"]["properties"]["uuid"]["anyOf"][0]["pattern"] == "^[\\x20-\\x7e]{1,128}$"  # not Python's end
    assert schemas["CompletionRequest"]["properties"]["logprobs"]["anyOf"][0] == {
        "type": "integer",
        "minimum": 0,
        "maximum": 20,
    }
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert "best_of" in document["paths"][path]["post"]["description"]


async def test_the_page_needs_nothing_else(system):
    response = await system.http.get("/docs")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    page = response.text
    assert "/v1/chat/completions" in page and "ErrorBody" in page
    assert "<script" not in page and "http:" not in page and "https:" not in page
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["openapi.json"]


async def test_docs_need_a_key_and_so_does_what_they_name():
    async with running_system(api_key=["sesame"]) as system:
        key = {"Authorization": "Bearer sesame"}
        document = msgspec.json.decode((await system.http.get("/openapi.json", headers=key)).content)
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                status = (await system.http.request(method, path)).status_code
                assert (status == 401) == (operation["security"] != []), path


async def test_docs_can_be_turned_off():
    async with running_system(disable_docs=True) as system:
        for path in ("/docs", "/openapi.json"):
            assert error_of(await system.http.get(path))["code"] == "not_found"
