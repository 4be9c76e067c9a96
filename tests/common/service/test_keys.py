"""Programs of one deployment know one another by certificate; whoever has none, or one for another role, gets none."""

import asyncio
import logging
import socket
import ssl
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2

from common.service import metrics, rpc
from common.service.errors import ConfigError
from common.service.keys import CA_FILE, CERTIFICATE_FILE, KEY_FILE, Keys
from common.service.roles import CALLERS, Role, role_name
from deploy.keys import _Authority
from deploy.keys import main as make_keys
from deploy.settings import KeysSettings
from protos import carrier_pb2, features_pb2, language_pb2, lease_pb2, vision_pb2
from protos.vision_pb2 import ExtractReply, ExtractRequest, ProbeReply, ProbeRequest
from protos.vision_pb2_grpc import VisionServicer, VisionStub, add_VisionServicer_to_server


@pytest.fixture(scope="module")
def deployments(tmp_path_factory) -> tuple[Path, Path]:
    """Ours, and one of somebody else."""
    roots = tmp_path_factory.mktemp("ours") / "keys", tmp_path_factory.mktemp("theirs") / "keys"
    for root in roots:
        make_keys(KeysSettings.load([]), ["init", str(root)])
    return roots


class Vision(VisionServicer):
    def __init__(self) -> None:
        self.num_calls = 0

    async def Probe(self, request, context):
        self.num_calls += 1
        return ProbeReply(num_frames=7)

    async def Extract(self, request, context):
        self.num_calls += 1
        yield ExtractReply(num_image_tiles=3)


@asynccontextmanager
async def serving(keys: Keys | None, listen: str = "127.0.0.1:0"):
    vision, server = Vision(), rpc.make_server()
    add_VisionServicer_to_server(vision, server)
    address = rpc.bind(server, listen, keys)
    await server.start()
    try:
        yield vision, address
    finally:
        await server.stop(None)


async def probe(channel: grpc.aio.Channel) -> Any:
    """The reply, or what gRPC says instead."""
    try:
        return await VisionStub(channel).Probe(ProbeRequest(), timeout=20)
    except grpc.aio.AioRpcError as error:
        return error
    finally:
        await channel.close()


@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_a_router_is_served_also_on_a_leased_channel(deployments, tmp_path, family):
    ours, _ = deployments
    listen = "127.0.0.1:0" if family == "tcp" else f"unix:{tmp_path}/s"
    async with serving(Keys(ours, "vision"), listen) as (_, address):
        for make in (rpc.make_channel, rpc.make_leased_channel):
            assert (await probe(make(address, Keys(ours, "router"), "vision"))).num_frames == 7


def strangers(ours: Path, theirs: Path):
    """Who must not get in, by what they show."""
    ca, foreign = (ours / CA_FILE).read_bytes(), theirs / "router"
    pair = [(foreign / name).read_bytes() for name in (KEY_FILE, CERTIFICATE_FILE)]
    options = [("grpc.ssl_target_name_override", role_name("vision"))]

    def showing(*pair: bytes):
        return lambda address: grpc.aio.secure_channel(
            address, grpc.ssl_channel_credentials(ca, *pair), options=options
        )

    yield "no encryption", rpc.make_channel
    yield "no certificate", showing()
    yield "that of another deployment", showing(*pair)


async def test_strangers_get_no_word(deployments):
    async with serving(Keys(deployments[0], "vision")) as (vision, address):
        for title, make in strangers(*deployments):
            error = await probe(make(address))
            assert error.code() == grpc.StatusCode.UNAVAILABLE, title
        assert vision.num_calls == 0


@pytest.mark.parametrize("index", [0, 1], ids=["another role", "another deployment"])
async def test_a_server_that_is_not_who_it_should_be_is_not_asked(deployments, index):
    async with serving(Keys(deployments[index], "language" if index == 0 else "vision")) as (vision, address):
        error = await probe(rpc.make_channel(address, Keys(deployments[0], "router"), "vision"))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert vision.num_calls == 0


@pytest.mark.parametrize("role", ["vision", "language", "client"])
async def test_only_a_router_may_order(deployments, role, caplog):
    failures = metrics.AUTH_FAILURES.labels("grpc")
    before = failures._value.get()
    async with serving(Keys(deployments[0], "vision")) as (vision, address):
        error = await probe(rpc.make_channel(address, Keys(deployments[0], role), "vision"))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "this certificate is for another role",
        )
        assert vision.num_calls == 0
    assert failures._value.get() == before + 1
    assert f"refused: {role}.dvd.internal called /dvd.v1.Vision/Probe" in caplog.text


@pytest.mark.parametrize("carried", [frozenset(), frozenset({"/dvd.v1.Vision/Extract"})], ids=["alone", "carried"])
async def test_a_stream_is_refused_before_its_first_message(deployments, carried):
    async with serving(Keys(deployments[0], "vision")) as (vision, address):
        cases: list[tuple[Role, Any]] = [("client", 3), ("language", grpc.StatusCode.PERMISSION_DENIED)]
        for role, expected in cases:
            channel = rpc.make_leased_channel(address, Keys(deployments[0], role), "vision", carried)
            call = VisionStub(channel).Extract(ExtractRequest(), timeout=20)
            try:
                found = (await call.read()).num_image_tiles
            except grpc.aio.AioRpcError as error:
                found = error.code()
            await channel.close()
            assert found == expected
        assert vision.num_calls == 1


def shown_by(address: str, root: Path) -> bytes:
    """The certificate of a server, in PEM."""
    context = ssl.create_default_context(cafile=root / CA_FILE)
    context.load_cert_chain(root / "router" / CERTIFICATE_FILE, root / "router" / KEY_FILE)
    host, _, port = address.rpartition(":")
    name = role_name("vision")
    with socket.create_connection((host, int(port)), 20) as raw, context.wrap_socket(raw, server_hostname=name) as tls:
        shown = tls.getpeercert(binary_form=True)
    assert shown is not None
    return ssl.DER_cert_to_PEM_cert(shown).encode()


async def test_renewed_keys_are_taken_up_without_a_restart_and_bad_ones_are_not(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = tmp_path / "keys"
    make_keys(KeysSettings.load([]), ["init", str(root)])
    keys = Keys(root, "vision")
    async with serving(keys) as (_, address):
        path = root / "vision" / CERTIFICATE_FILE
        before = path.read_bytes()
        path.write_bytes(before[:100])
        assert (await probe(rpc.make_channel(address, Keys(root, "router"), "vision"))).num_frames == 7
        assert "the keys stay as they were" in caplog.text
        path.write_bytes(before)
        assert await asyncio.to_thread(shown_by, address, root) == before
        make_keys(KeysSettings.load(["--days=40"]), ["renew", str(root)])
        assert (await probe(rpc.make_channel(address, Keys(root, "router"), "vision"))).num_frames == 7
        keys.channel_credentials()  # of the same program: whoever reads them first takes nothing from the others
        assert await asyncio.to_thread(shown_by, address, root) == path.read_bytes() != before
        expected = (datetime.now(UTC) + timedelta(days=40)).date().isoformat()
        assert f"keys were replaced: valid until {expected}" in caplog.text


def expired(root: Path, other: Path) -> None:
    _Authority.open(root).write_pair(root / "vision", "vision", [], days=0)


def of_another_deployment(root: Path, other: Path) -> None:
    (root / "vision" / CA_FILE).write_bytes((other / CA_FILE).read_bytes())


def with_another_key(root: Path, other: Path) -> None:
    (root / "vision" / KEY_FILE).write_bytes((other / "vision" / KEY_FILE).read_bytes())


def of_a_router(root: Path, other: Path) -> None:
    _Authority.open(root).write_pair(root / "vision", "router", [], days=9)


def without_key(root: Path, other: Path) -> None:
    (root / "vision" / KEY_FILE).unlink()


def with_no_pem(root: Path, other: Path) -> None:
    (root / "vision" / KEY_FILE).write_text("secret")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (expired, r"vision/tls\.crt: expired on \d{4}-\d\d-\d\d; dvd keys renew"),
        (of_another_deployment, r"vision/tls\.crt: not signed by the authority in ca\.crt"),
        (with_another_key, r"vision/tls\.crt: tls\.key is not the key of this certificate"),
        (of_a_router, r"it is for the role router, and this program is vision: it must name vision\.dvd\.internal"),
        (without_key, r"vision/tls\.key: No such file or directory"),
        (with_no_pem, r"vision/tls\.key: not a private key in PEM"),
    ],
)
def test_a_program_says_at_its_start_what_is_wrong_with_its_keys(deployments, tmp_path, spoil, message):
    make_keys(KeysSettings.load([]), ["init", str(tmp_path / "keys")])
    spoil(tmp_path / "keys", deployments[1])
    with pytest.raises(ConfigError, match=message) as raised:
        Keys(tmp_path / "keys", "vision")
    assert "secret" not in str(raised.value)


def test_the_metric_tells_when_the_first_certificate_ends(deployments, tmp_path, monkeypatch):
    monkeypatch.setattr("common.service.keys._ends", {})
    make_keys(KeysSettings.load(["--days=900"]), ["init", str(tmp_path / "keys")])
    Keys(deployments[0], "router")
    Keys(tmp_path / "keys", "router")
    days = (metrics.CERT_EXPIRY_TIMESTAMP_SECONDS._value.get() - datetime.now(UTC).timestamp()) / 86400
    assert 363 < days <= 365


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:9001", "somewhere:9001"])
async def test_without_keys_no_port_is_open_to_other_machines(listen):
    with pytest.raises(ConfigError, match=r"other machines reach this address.* --keys DIR .*--insecure-network"):
        rpc.bind(rpc.make_server(), listen)


async def test_the_operator_may_say_that_the_network_is_guarded(caplog):
    server = rpc.make_server()
    assert rpc.bind(server, "0.0.0.0:0", guard="network").startswith("0.0.0.0:")
    await server.start()
    await server.stop(None)  # or the port stays open, for the tests that come later
    assert "INSECURE: 0.0.0.0:0 is open to the network without keys" in caplog.text


def test_every_method_says_who_may_call_it():
    files = [
        module.DESCRIPTOR for module in (carrier_pb2, features_pb2, language_pb2, lease_pb2, vision_pb2, health_pb2)
    ]
    pools = descriptor_pool.Default()
    services = [s for file in files for s in pools.FindFileByName(file.name).services_by_name.values()]
    assert {f"/{s.full_name}/{method.name}" for s in services for method in s.methods} == set(CALLERS)
