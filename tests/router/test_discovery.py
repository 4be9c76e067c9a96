"""Where servers are said to be. A source that cannot be read changes nothing; what it says later does."""

import asyncio
import json
import logging
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.service import metrics
from common.service.errors import ConfigError
from router import discovery
from router.discovery import Discovery, DnsName, Fixed, WatchedFile, difference, merge, parse_entry, parse_members
from router.settings import RouterSettings

ENTRIES = [
    ("10.0.0.1:9001", Fixed("10.0.0.1:9001")),
    ("vision-0.cluster_a.internal:9001", Fixed("vision-0.cluster_a.internal:9001")),
    ("[2001:DB8::0:1]:9001", Fixed("[2001:db8::1]:9001")),
    ("unix:/run/dvd/vision.sock", Fixed("unix:/run/dvd/vision.sock")),
    ("dns:vision:9001", DnsName("vision", 9001)),
    ("file:/run/dvd/vision", WatchedFile(Path("/run/dvd/vision"))),
]
MALFORMED = [
    "", "vision", "vision:", ":9001", "vision:0", "vision:65536", "vision:9001x", "vision:٣", "http://vision:9001",
    "::1:9001", "[::1:9001", "[vision]:9001", "a b:1", "unix:", "unix:relative.sock", "file:", "file:relative",
    "dns:vision", "dns::9001", "dns:vision:99999999999", "ipv4:10.0.0.1:9001",
]  # fmt: skip


@pytest.mark.parametrize(("entry", "source"), ENTRIES)
def test_every_kind_of_entry(entry, source):
    assert parse_entry(entry) == source


@pytest.mark.parametrize("entry", MALFORMED)
def test_a_malformed_entry_is_refused_by_flag_and_entry(entry):
    with pytest.raises(ValueError, match=r"expected|not an IPv6"):
        parse_entry(entry)
    with pytest.raises(ConfigError) as refusal:
        RouterSettings.load(
            ["--vision", json.dumps(["10.0.0.1:9001", entry], ensure_ascii=False), "--language", "10.0.0.2:9101"]
        )
    assert refusal.value.message.startswith(f"--vision {entry}: ")


def test_both_tiers_may_mix_kinds():
    settings = RouterSettings.load(["--vision", "a:1,dns:b:2,file:/c", "--language", "unix:/d,file:/e"])
    assert settings.vision == ["a:1", "dns:b:2", "file:/c"]
    with pytest.raises(ConfigError, match="--language dns:b: expected HOST:PORT"):
        RouterSettings.load(["--vision", "a:1", "--language", "unix:/d,dns:b"])


def test_lines_of_a_file():
    text = "# vision servers\n\n10.0.0.1:9001\r\n  10.0.0.2:9001  # rack 3\nunix:/run/a#b.sock\n10.0.0.1:9001\n"
    assert parse_members(text) == ["10.0.0.1:9001", "10.0.0.2:9001", "unix:/run/a#b.sock"]
    assert parse_members("# nobody\n") == []


@pytest.mark.parametrize("line", ["10.0.0.2", "dns:vision:9001", "file:/other", "10.0.0.2:9001 10.0.0.3:9001"])
def test_a_malformed_line_is_named(line):
    with pytest.raises(ValueError, match="line 2: expected HOST:PORT or unix:/path, found"):
        parse_members(f"10.0.0.1:9001\n{line}\n")


@given(st.text(max_size=200))
def test_a_file_of_anything_is_addresses_or_a_value_error(text):
    try:
        addresses = parse_members(text)
    except ValueError:
        return
    assert all(isinstance(parse_entry(address), Fixed) for address in addresses)


names = st.lists(st.sampled_from("abcdef"), max_size=8)


@given(names, names)
def test_what_came_and_what_went(before, after):
    came, went = difference(before, after)
    assert set(before) - set(went) | set(came) == set(after)
    assert not set(came) & set(before)
    assert set(went) <= set(before)
    assert sorted(set(came)) == sorted(came)


@given(st.lists(names, max_size=4))
def test_an_address_counts_once_where_it_is_first_named(groups):
    merged = merge(groups)
    flat = [address for group in groups for address in group]
    assert merged == sorted(set(flat), key=flat.index)


class Members:
    """What a ``Discovery`` last told, and a way to wait for it."""

    def __init__(self, *entries: str, interval: float = 0.01) -> None:
        self.now: list[str] = []
        self.num_told = 0
        self._told = asyncio.Event()
        self._discovery = Discovery("vision", entries, interval, self._take)

    async def __aenter__(self) -> "Members":
        self._discovery.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._discovery.close()

    async def until(self, *addresses: str) -> None:
        async with asyncio.timeout(10):
            while self.now != list(addresses):
                self._told.clear()
                await self._told.wait()

    def _take(self, addresses: list[str]) -> None:
        self.now = addresses
        self.num_told += 1
        self._told.set()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(discovery, "FILE_POLL_SECONDS", 0.01)


async def until_logged(caplog, words: str) -> None:
    async with asyncio.timeout(10):
        while words not in caplog.text:
            await asyncio.sleep(0.01)


def replace(path: Path, *lines: str) -> None:
    """As a careful writer does it."""
    draft = path.with_suffix(".new")
    draft.write_text("\n".join(lines))
    draft.replace(path)


async def failures(kind: str, more_than: float) -> None:
    """Wait until some more look-ups have failed."""
    async with asyncio.timeout(10):
        while failures_now(kind) <= more_than:
            await asyncio.sleep(0.01)


def failures_now(kind: str) -> float:
    return metrics.DISCOVERY_FAILURES.labels("vision", kind)._value.get()


async def test_fixed_addresses_are_told_at_once():
    async with Members("b:1", "unix:/a", "b:1") as members:
        assert members.now == ["b:1", "unix:/a"]


async def test_a_file_that_comes_and_changes(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "vision"
    async with Members("a:1", f"file:{path}") as members:
        assert members.now == ["a:1"]
        await until_logged(caplog, f"waiting for vision servers from file:{path}: no such file")
        replace(path, "b:2", "c:3")
        await members.until("a:1", "b:2", "c:3")
        replace(path, "c:3", "a:1")
        await members.until("a:1", "c:3")
        replace(path, "# nobody")
        await members.until("a:1")
    assert f"vision servers from file:{path}: +b:2 +c:3" in caplog.text
    assert f"vision servers from file:{path}: +a:1 -b:2" in caplog.text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"b:2\nthis is no address\n", "line 2: expected HOST:PORT or unix:/path, found 'this is no address'"),
        (b"\xff\xfe", "not a text in UTF-8"),
        (b"# " + b"x" * discovery.MAX_FILE_BYTES, f"more than {discovery.MAX_FILE_BYTES} bytes"),
        (None, "no such file or directory"),
    ],
)
async def test_an_unusable_file_keeps_what_is_known_and_is_said_once(tmp_path, caplog, content, problem):
    path = tmp_path / "vision"
    path.write_text("b:2\n")
    async with Members(f"file:{path}") as members:
        await members.until("b:2")
        before = failures_now("file")
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        await failures("file", more_than=before + 2)
        assert members.now == ["b:2"]
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert said == [f"vision servers from file:{path}: {problem}; keeping the 1 known ones"]
        replace(path, "c:3")
        await members.until("c:3")


class Resolver:
    """Stands in for ``socket.getaddrinfo``: answers what the test says."""

    def __init__(self, *hosts: str) -> None:
        self.hosts: tuple[str, ...] | None = hosts
        self.num_calls = 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self, name, port, **_):
        self.num_calls += 1
        assert self.may_answer.wait(30)
        if self.hosts is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(0, socket.SOCK_STREAM, 6, "", (host, port)) for host in self.hosts]


@pytest.fixture
def resolver(monkeypatch):
    fake = Resolver("10.0.0.2", "10.0.0.1", "10.0.0.2", "2001:db8::1")
    monkeypatch.setattr(socket, "getaddrinfo", fake)
    return fake


async def test_a_name_is_all_its_addresses(resolver):
    async with Members("dns:vision:9001", "10.0.0.9:9001") as members:
        await members.until("10.0.0.1:9001", "10.0.0.2:9001", "[2001:db8::1]:9001", "10.0.0.9:9001")
        resolver.hosts = ("10.0.0.3",)
        await members.until("10.0.0.3:9001", "10.0.0.9:9001")


async def test_a_name_that_does_not_resolve_keeps_what_is_known(resolver, caplog):
    resolver.hosts = None
    async with Members("dns:vision:9001") as members:
        await until_logged(caplog, "waiting for vision servers from dns:vision:9001: name or service not known")
        resolver.hosts = ("10.0.0.1",)
        await members.until("10.0.0.1:9001")
        resolver.hosts = None
        before = failures_now("dns")
        await failures("dns", more_than=before + 2)
        assert members.now == ["10.0.0.1:9001"]
    assert caplog.text.count("keeping the 1 known ones") == 1


async def test_a_stuck_resolver_holds_up_nobody(resolver, caplog, monkeypatch):
    """Neither the event loop nor, by threads that pile up, the process."""
    monkeypatch.setattr(discovery, "LOOKUP_TIMEOUT_SECONDS", 0.02)
    resolver.may_answer.clear()
    before = failures_now("dns")
    async with Members("a:1", "dns:vision:9001") as members:
        await failures("dns", more_than=before + 2)
        assert members.now == ["a:1"]
        assert resolver.num_calls == 1
        assert caplog.text.count("no answer within") == 1
        resolver.hosts = ("10.0.0.1",)
        resolver.may_answer.set()
        await members.until("a:1", "10.0.0.1:9001")


async def test_a_look_up_may_outlive_the_event_loop_that_asked(resolver):
    resolver.may_answer.clear()
    async with Members("dns:vision:9001"):
        async with asyncio.timeout(10):
            while not resolver.num_calls:
                await asyncio.sleep(0.01)
        (thread,) = [each for each in threading.enumerate() if each.name == "look up dns:vision:9001"]
    assert thread.daemon
    resolver.may_answer.set()
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()


async def test_the_real_resolver():
    async with Members("dns:localhost:9001") as members:
        async with asyncio.timeout(10):
            while not members.now:
                await asyncio.sleep(0.01)
        assert set(members.now) <= {"127.0.0.1:9001", "[::1]:9001"}
