"""Who may come in: API keys, kept and compared as digests, and the tenants they belong to.

    tenants:
    - name: team-a                    letters, digits and . _ - ; caches of a tenant are its own
      sha256: [<64 hex digits>, ...]  of its keys, one or several; or ``key: ...``, the key itself
      max_concurrent_requests: 8      these four are optional
      requests_per_minute: 600
      tokens_per_minute: 200000       prompt and reply
      tiles_per_minute: 5000

The file is read again when it changes, by whoever holds it. One that cannot be read, or is wrong anywhere, changes
nothing. A digest for it: ``printf %s "$KEY" | sha256sum``.
"""

import asyncio
import hashlib
import hmac
import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
import yaml
from msgspec import Meta, Struct

from common.service.errors import ConfigError
from router.quotas import Meter, Quota

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.5
MAX_FILE_BYTES: Final = 2**20
MAX_KEYS: Final = 1024
"""All are compared with every request's."""

_Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
_Digest = Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{64}$")]
_Key = Annotated[str, Meta(min_length=1, max_length=4096)]
_Limit = Annotated[int, Meta(ge=1, le=2**53)]


class TenantEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of the file."""

    name: _Name
    sha256: _Digest | list[_Digest] = []
    key: _Key | list[_Key] = []
    max_concurrent_requests: _Limit | None = None
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    tiles_per_minute: _Limit | None = None

    @property
    def digests(self) -> list[bytes]:
        """Of its keys, 32 bytes each."""
        return [*map(bytes.fromhex, _listed(self.sha256)), *map(digest_of, _listed(self.key))]

    @property
    def quota(self) -> Quota:
        return Quota(
            self.max_concurrent_requests, self.requests_per_minute, self.tokens_per_minute, self.tiles_per_minute
        )


class _KeysFile(Struct, frozen=True, forbid_unknown_fields=True):
    tenants: Annotated[list[TenantEntry], Meta(min_length=1)]


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose keys open the door.

    Args:
        scope: of its caches: a name that no other tenant has.
        meter: None: no quota.
    """

    scope: str
    meter: Meter | None = None


def parse_tenants(text: str) -> list[TenantEntry]:
    """The text of a keys file. Raises ValueError naming line or field, and never a key."""
    try:
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:  # its own words quote the line, which may hold a key
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}not YAML: {error.problem or 'malformed'}") from None
    except yaml.YAMLError:
        raise ValueError("not YAML") from None
    try:
        entries = msgspec.convert(content, _KeysFile).tenants
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    for index, entry in enumerate(entries):
        if not entry.digests:
            raise ValueError(f"tenants[{index}]: sha256 or key is missing")
    _check_unique([entry.name for entry in entries], "name")
    digests = [digest for entry in entries for digest in entry.digests]
    _check_unique([digest.hex() for digest in digests], "key")
    if len(digests) > MAX_KEYS:
        raise ValueError(f"{len(digests)} keys: at most {MAX_KEYS} are allowed")
    return entries


def digest_of(key: str) -> bytes:
    """32 bytes."""
    return hashlib.sha256(key.encode()).digest()


class Tenants:
    """All that may come in now. Nobody listed: everybody may.

    Args:
        keys: without a quota, each a tenant.
        path: of a keys file, read here.
        num_sharers: router processes that divide every quota among them.

    Raises:
        ConfigError: the file cannot be read or is wrong.
    """

    def __init__(self, keys: Sequence[str], path: Path | None = None, num_sharers: int = 1) -> None:
        self._path = path
        self._num_sharers = num_sharers
        self._fixed = {digest_of(key): Tenant(digest_of(key).hex()) for key in keys}
        self._meters: dict[str, Meter] = {}
        self._by_digest: dict[bytes, Tenant] = dict(self._fixed)
        self._content = b""
        self._problem = ""
        if path is not None:
            try:
                self._content = _read(path)
                self._set(parse_tenants(_decoded(self._content)))
            except ValueError as error:
                raise ConfigError(f"--api-keys-file {path}: {error}") from None

    def __bool__(self) -> bool:
        return bool(self._by_digest)

    def find(self, token: str) -> Tenant | None:
        """Whose key it is, None for a wrong one. Takes the same time for every wrong one."""
        offered = digest_of(token)
        matches = [digest for digest in self._by_digest if hmac.compare_digest(digest, offered)]
        return self._by_digest[matches[0]] if matches else None

    async def follow(self) -> None:
        """Take over what the file says, whenever it has changed and then stood still between two looks: half a file
        is not taken. Until cancelled."""
        seen = self._content
        while self._path is not None:
            await asyncio.sleep(POLL_SECONDS)
            try:
                content = await asyncio.to_thread(_read, self._path)
                if content == seen and content != self._content:
                    self._set(await asyncio.to_thread(parse_tenants, _decoded(content)))
                    self._content, self._problem = content, ""
                    log.info("--api-keys-file %s: %d tenants from now on", self._path, len(self._meters))
                elif content == self._content:
                    self._problem = ""
                seen = content
            except ValueError as error:
                self._tell(str(error))

    def _set(self, entries: Iterable[TenantEntry]) -> None:
        """Whoever stays keeps what was counted; running requests of a key that has gone run to their end."""
        now = time.monotonic()
        meters: dict[str, Meter] = {}
        found: dict[bytes, Tenant] = {}
        for entry in entries:
            quota = entry.quota.divided_among(self._num_sharers)
            meter = self._meters.get(entry.name) or Meter(quota, now)
            meter.set_quota(quota, now)
            meters[entry.name] = meter
            found |= dict.fromkeys(entry.digests, Tenant(f"tenant:{entry.name}", meter))
        self._meters, self._by_digest = meters, {**self._fixed, **found}

    def _tell(self, problem: str) -> None:
        """Once, not at every look."""
        if problem != self._problem:
            self._problem = problem
            log.error("--api-keys-file %s: %s; the keys stay as they were", self._path, problem)


def _read(path: Path) -> bytes:
    """Raises ValueError saying why it cannot be had."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError((error.strerror or "cannot be read").lower()) from None
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
    return content


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("not a text in UTF-8") from None


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _check_unique(values: Sequence[str], what: str) -> None:
    """Raises ValueError naming the entry's name, or what a digest begins with."""
    value, count = Counter(values).most_common(1)[0]
    if count > 1:
        shown = value if what == "name" else f"with sha256 {value[:8]}..."
        raise ValueError(f"{what} {shown} is there {count} times")
