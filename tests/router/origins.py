"""A media server of strangers: real TLS with a certificate authority of its own, and answers that a test writes."""

import asyncio
import contextlib
import datetime
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from router.fetch.fetcher import FetchLimits, MediaFetcher
from router.fetch.policy import FetchPolicy

NAMES = ("a.example.com", "b.example.com")
"""What the certificate is for. All other names resolve as well, to the same place."""

Serve = Callable[[asyncio.StreamWriter], Awaitable[None]]


class LoopbackPolicy(FetchPolicy):
    """Of tests only: nothing on a command line allows this."""

    def may_connect(self, address: IPv4Address | IPv6Address) -> bool:
        return address.is_loopback or super().may_connect(address)


class Authority:
    """Signs one certificate."""

    def __init__(self, folder: Path) -> None:
        key, own_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        root = _certificate("a root", key, key, "a root", x509.BasicConstraints(ca=True, path_length=None))
        names = x509.SubjectAlternativeName([x509.DNSName(name) for name in NAMES])
        leaf = _certificate("a server", own_key, key, "a root", names)
        private = own_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        pem = folder / "server.pem"
        pem.write_bytes(private + leaf.public_bytes(serialization.Encoding.PEM))
        self.serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.serving.load_cert_chain(pem)
        self.trusting = ssl.create_default_context(cadata=root.public_bytes(serialization.Encoding.PEM).decode())


def _certificate(subject: str, key: Any, signer: Any, issuer: str, extension: Any) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    hour = datetime.timedelta(hours=1)
    subject_name, issuer_name = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in (subject, issuer)
    )
    builder = x509.CertificateBuilder(issuer_name, subject_name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - hour).not_valid_after(now + hour)
    return builder.add_extension(extension, critical=False).sign(signer, hashes.SHA256())


class Origin:
    """One server. ``answers`` says what is behind a path: bytes as they go over the wire, or who writes them."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.port = 0
        self.answers: dict[str, bytes | Serve] = {}
        self.requests: list[list[str]] = []
        """The lines of each head."""
        self.resolved: list[str] = []
        self.addresses: dict[str, list[list[str]]] = {}
        """What else a name resolves to, look-up by look-up; the last answer stays."""

    def url(self, path: str, host: str = NAMES[0]) -> str:
        return f"https://{host}:{self.port}{path}"

    def paths(self) -> list[str]:
        return [request[0].split()[1] for request in self.requests]

    async def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        answers = self.addresses.get(host, [["127.0.0.1"]])
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        if not addresses:
            raise OSError("no such name")
        return addresses

    def fetcher(
        self, hosts: Sequence[str] = (*NAMES, "c.example.com"), proxy: str | None = None, **limits: Any
    ) -> MediaFetcher:
        """One that may ask this server."""
        policy = LoopbackPolicy(frozenset((host, self.port) for host in hosts))
        return MediaFetcher(policy, FetchLimits(**limits), self.resolve, self.authority.trusting, proxy)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            self.requests.append(request)
            answer = self.answers.get(request[0].split()[1], reply(b"nothing here", "404 Not Found"))
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.transport.abort()  # whoever asked has left
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        else:
            writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


def reply(body: bytes = b"", status: str = "200 OK", **headers: Any) -> bytes:
    """An answer; underscores in names of headers are dashes."""
    fields = {"Content-Length": len(body), **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def moved(location: str, status: str = "302 Found", **headers: Any) -> bytes:
    return reply(b"", status, Location=location, **headers)


@asynccontextmanager
async def serving_origin(authority: Authority) -> AsyncIterator[Origin]:
    origin = Origin(authority)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(origin.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", ssl=authority.serving)
    origin.port = server.sockets[0].getsockname()[1]
    try:
        yield origin
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


class Proxy:
    """An operator's: looks nothing up, all names lead to one server. Refuses with ``status`` unless it is empty."""

    def __init__(self, port: int) -> None:
        self.url = ""
        self.asked: list[str] = []
        self.status = ""
        self._port = port

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head.split("\r\n")[0])
        if self.status:
            writer.write(f"HTTP/1.1 {self.status}\r\n\r\n".encode())
            writer.close()
            return
        to, back = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            await asyncio.gather(_pass_on(reader, back), _pass_on(to, writer))
        finally:
            back.close()
            writer.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()


@asynccontextmanager
async def running_proxy(origin: Origin) -> AsyncIterator[Proxy]:
    proxy = Proxy(origin.port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1")
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        await server.wait_closed()
