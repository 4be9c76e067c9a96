"""HTTPS on the router's own port, for everybody or for clients with a certificate of their own."""

import ssl

import httpx
import pytest

from common.service.errors import ConfigError
from deploy.keys import main as make_keys
from deploy.settings import KeysSettings
from router.https import https_options
from router.settings import RouterSettings
from tests.router.conftest import CHAT, running_system, user


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Certificates that serve as those of a public authority would."""
    root = tmp_path_factory.mktemp("public") / "keys"
    make_keys(KeysSettings.load(["--hosts=127.0.0.1"]), ["init", str(root)])
    return root


def options(root, **more):
    return {"ssl_certfile": root / "router" / "tls.crt", "ssl_keyfile": root / "router" / "tls.key", **more}


def client(root, system, *, pair: bool = False) -> httpx.AsyncClient:
    context = ssl.create_default_context(cafile=root / "ca.crt")
    if pair:
        context.load_cert_chain(root / "client" / "tls.crt", root / "client" / "tls.key")
    return httpx.AsyncClient(base_url=system.url.replace("http:", "https:"), verify=context, timeout=20)


async def test_a_client_that_believes_the_authority_gets_an_answer_and_plain_http_gets_none(root):
    async with running_system(**options(root)) as system, client(root, system) as http:
        body = {"messages": [user("hello")]}
        assert (await http.post(CHAT, json=body)).json()["choices"][0]["message"]["content"] == "user: hello"
        streamed = await http.post(CHAT, json={**body, "stream": True})
        assert streamed.text.rstrip().endswith("data: [DONE]")
        with pytest.raises(httpx.TransportError):
            await system.http.get("/health")


async def test_with_an_authority_for_clients_only_those_come_in(root):
    async with running_system(**options(root, ssl_ca_certs=root / "ca.crt")) as system:
        async with client(root, system, pair=True) as http:
            assert (await http.get("/health")).status_code == 200
        async with client(root, system) as http:
            with pytest.raises(httpx.TransportError):
                await http.get("/health")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssl_certfile": None}, "are of no use without --ssl-certfile"),
        ({"ssl_certfile": "router/nothing"}, r"--ssl-certfile .*nothing: No such file or directory"),
        ({"ssl_certfile": "router/tls.key"}, r"--ssl-certfile .*tls\.key: not a certificate in PEM"),
        ({"ssl_keyfile": "router/nothing"}, r"--ssl-keyfile .*nothing: No such file or directory"),
        ({"ssl_keyfile": "vision/tls.key"}, r"--ssl-keyfile .*tls\.key: not the private key of --ssl-certfile"),
        ({"ssl_keyfile": None}, r"--ssl-certfile .*tls\.crt: not the private key of --ssl-certfile"),
        ({"ssl_ca_certs": "router/tls.key"}, r"--ssl-ca-certs .*tls\.key: no certificates in PEM"),
    ],
)
def test_files_that_do_not_serve_stop_the_start(root, changes, message):
    found = options(root) | {name: value and root / value for name, value in changes.items()}
    with pytest.raises(ConfigError, match=message):
        https_options(RouterSettings(**{"vision": ["a:1"], "language": ["b:1"], **found}))
