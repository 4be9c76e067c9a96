"""Feature frames made of anything, into the parser and on into the language server's feature memory, for a while.

    python -m tests.fuzz.frames --seconds 60 --seed 1

Begins with frames as senders pack them. Atheris mutates what reaches new branches; where it is not to be had, they are
mutated blindly. The first finding ends it, and says what to pass as ``--again``. An input is some frames after one
another. Before each stand four bytes: bits (1: sign it with the ticket, which no stranger has; 2: mend the checksum;
4: the payload comes after all other frames; 8: seal it with the ticket, too; 16, of the first: the server takes nothing
in clear), length of the payload, length of the header.
"""

import argparse
import base64
import math
import os
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Final

try:
    import atheris
except ImportError:  # it has wheels for some releases of Python
    atheris = None  # type: ignore[assignment,unused-ignore]

# What is watched for new branches has to be imported inside.
with (
    atheris.instrument_imports(include=["protos.frame", "protos.seal", "language_server"]) if atheris else nullcontext()
):
    from language_server.feature_image import FeatureLayout, ImageKey
    from language_server.features import FeatureStore
    from language_server.reservation import Lease
    from protos import frame, seal
from common.transport.base import place_frame
from protos.frame import FrameHeader, FrameRejected

_LEAD: Final = struct.Struct("<BBH")
_SIGN, _MEND, _LATE, _SEAL, _DEMAND = 1, 2, 4, 8, 16
_TOKENS: Final = 4
_LAYOUT: Final = FeatureLayout(b"f" * frame.ID_BYTES, 2, "float32", _TOKENS, is_flash=True)
_REQUEST: Final = b"r" * frame.ID_BYTES
_SIZES: Final = (3, 1)
"""Tiles of the images of the request."""
_MAX_FRAMES: Final = 8
_CRC32C: Final = struct.Struct("<I")
_CRC32C_AT: Final = 68  # the table in protos/frame.py
_REJECTIONS: Final = frozenset(
    {
        *("magic", "version", "fingerprint", "ticket", "dtype", "shape", "size", "checksum", "nonfinite"),
        *("seal", "unsealed"),
        *("unknown_request", "tombstone", "stale", "duplicate"),
    }
)


def header(image: int, first: int, tokens: tuple[int, ...], attempt: int = 0) -> FrameHeader:
    """One that fits the request."""
    names = (_LAYOUT.fingerprint, _REQUEST, image, attempt, first, _SIZES[image])
    return FrameHeader(*names, _LAYOUT.hidden_size, _LAYOUT.dtype, tokens, 0)


def seeds() -> Iterator[bytes]:
    """Inputs that are taken, and some that are nearly."""
    good = [header(0, 0, (4, 1)), header(0, 2, (4,)), header(1, 0, (1,)), header(0, 0, (4, 4, 1), attempt=1)]
    strange = [
        replace(good[0], fingerprint=bytes(16)),
        replace(good[0], request_id=bytes(16)),
        replace(good[0], dtype="bfloat16"),
        replace(good[0], hidden_size=3),
        replace(good[0], num_image_tiles=frame.MAX_TILES),
        replace(good[0], image_index=9),
    ]
    demanded = (_SIGN | _SEAL, _SIGN | _SEAL | _DEMAND, _SIGN | _MEND | _DEMAND)
    for bits in (0, _SIGN | _MEND, _SIGN | _MEND | _LATE, *demanded):
        yield b"".join(pack(each, bits) for each in good)
        for each in (*good, *strange):
            yield pack(each, bits) * 2
    yield pack(good[1], _SIGN)[:-1] + b"\1"  # damaged on its way
    packed, payload = sealed(pack_header(good[1]), bytes(good[1].payload_bytes), b"?" * 32)  # as if for another image
    for bits in (_SIGN, _SIGN | _DEMAND):
        yield _LEAD.pack(bits, len(payload), len(packed)) + packed + payload
    yield pack(good[1], _SIGN | _MEND)[:-4] + struct.pack("<f", math.nan)


def pack(each: FrameHeader, bits: int) -> bytes:
    payload = b"".join(struct.pack("<f", number) for number in range(each.payload_bytes // 4))
    packed = pack_header(frame.with_checksum(each, payload))
    return _LEAD.pack(bits, len(payload), len(packed)) + packed + payload


def pack_header(each: FrameHeader) -> bytes:
    """Signed by a stranger."""
    return frame.pack_header(each, b"?" * 32)


def split(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Bits, header and payload of each frame; what is cut short is short."""
    at = 0
    for _ in range(_MAX_FRAMES):
        if len(data) < at + _LEAD.size:
            return
        bits, num_payload_bytes, num_header_bytes = _LEAD.unpack_from(data, at)
        at += _LEAD.size
        packed = data[at : at + num_header_bytes]
        at += num_header_bytes
        yield bits, packed, data[at : at + num_payload_bytes]
        at += num_payload_bytes


class Target:
    """What is done with an input. Raises AssertionError where something does not hold, or what must not be raised."""

    def __init__(self) -> None:
        self.num_inputs = 0
        self.verdicts: Counter[str] = Counter()

    def told(self, data: bytes) -> None:
        """Try one, and say which it was if something is wrong."""
        self.num_inputs += 1
        try:
            self(data)
        except BaseException:
            print(f"found: --again {base64.b64encode(data).decode()}", flush=True)
            raise

    def report(self) -> None:
        verdicts = ", ".join(f"{name} {count}" for name, count in self.verdicts.most_common())
        print(f"{self.num_inputs} inputs; frames: {verdicts}", flush=True)

    def __call__(self, data: bytes) -> None:
        demands = bool(data[:1]) and bool(data[0] & _DEMAND)
        num_bytes = sum(_SIZES) * _TOKENS * _LAYOUT.row_bytes
        store = FeatureStore(_LAYOUT, num_bytes, seals_features=demands, clock=lambda: 0.0)
        keys = [ImageKey(bytes([index]) * 32, num_tiles * _TOKENS) for index, num_tiles in enumerate(_SIZES)]
        lease = store.try_reserve(_REQUEST, keys, lifetime=60.0)
        assert lease is not None
        late: list[Callable[[], None]] = []
        for bits, packed, payload in split(data):
            check_parser(packed)
            commit = self._place(store, lease, bits, packed, payload)
            if commit is None:
                continue
            if bits & _LATE:
                late.append(commit)
            else:
                self._commit(store, lease, commit)
        for commit in late:
            self._commit(store, lease, commit)
        lease.release()
        assert store.reserved_bytes == 0
        assert store.num_awaited == 0

    def _place(
        self, store: FeatureStore, lease: Lease, bits: int, packed: bytes, payload: bytes
    ) -> Callable[[], None] | None:
        """What a receiver does before the payload comes; None: the frame was refused."""
        before = known(lease)
        ticket = ticket_of(lease, packed) if bits & _SIGN else b"?" * 32
        if bits & _MEND and len(packed) >= _CRC32C_AT + _CRC32C.size:
            crc32c = _CRC32C.pack(frame.checksum(payload))
            packed = packed[:_CRC32C_AT] + crc32c + packed[_CRC32C_AT + _CRC32C.size :]
        if bits & _SIGN:
            packed, payload = sealed(packed, payload, ticket) if bits & _SEAL else (signed(packed, ticket), payload)
        try:
            parsed, memory = place_frame(store, packed, len(payload))
        except FrameRejected as rejection:
            self._count(rejection)
            assert known(lease) == before
            return None
        assert bits & _SIGN, "a frame without a ticket was placed"
        assert len(memory) == len(payload) <= sum(_SIZES) * _TOKENS * _LAYOUT.row_bytes
        memory[:] = payload
        return lambda: store.commit(parsed, memory, frame.checksum(memory))

    def _commit(self, store: FeatureStore, lease: Lease, commit: Callable[[], None]) -> None:
        before = known(lease)
        try:
            commit()
        except FrameRejected as rejection:
            self._count(rejection)
            assert known(lease) == before
        else:
            self.verdicts["ok"] += 1
            assert known(lease) != before
        for index, num_tiles in enumerate(_SIZES):
            num_tokens = store.num_ready_tokens(_REQUEST, index)
            assert num_tokens <= num_tiles * _TOKENS
            if not num_tokens:
                continue
            rows = store.rows(_REQUEST, index, 0, num_tokens)
            assert rows.shape == (num_tokens, _LAYOUT.hidden_size)
            assert all(map(math.isfinite, rows.flatten().tolist()))
        assert store.reserved_bytes + store.cached_bytes <= sum(_SIZES) * _TOKENS * _LAYOUT.row_bytes

    def _count(self, rejection: FrameRejected) -> None:
        assert rejection.reason in _REJECTIONS, rejection
        self.verdicts[rejection.reason] += 1


def check_parser(packed: bytes) -> None:
    """A header that packs to the same bytes again, or a refusal."""
    try:
        parsed = frame.parse_header(packed)
    except FrameRejected as rejection:
        assert rejection.reason in _REJECTIONS, rejection
        return
    assert frame.pack_header(parsed, b"?" * 32)[: -frame.MAC_BYTES] == packed[: -frame.MAC_BYTES]


def known(lease: Lease) -> list[int]:
    """How many tiles of each image are there."""
    return [sum(image.is_ready(tile) for tile in range(image.num_tiles)) for image in lease.images]


def ticket_of(lease: Lease, packed: bytes) -> bytes:
    try:
        return lease.missing.get(frame.parse_header(packed).image_index, b"?" * 32)
    except FrameRejected:
        return b"?" * 32


def signed(packed: bytes, ticket: bytes) -> bytes:
    try:
        return frame.pack_header(frame.parse_header(packed), ticket)
    except FrameRejected:
        return packed


def sealed(packed: bytes, payload: bytes, ticket: bytes) -> tuple[bytes, bytes]:
    try:
        parsed = frame.parse_header(packed)
    except FrameRejected:
        return packed, payload
    header_and_seal, ciphertext = seal.pack_frame(parsed, memoryview(payload), ticket, is_sealed=True)
    return header_and_seal, bytes(ciphertext)


def mutate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Blindly: bytes set, flipped, cut out, repeated, numbers at their bounds, and parts of another input."""
    mutated = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(mutated) + 1)
        match rng.randrange(6):
            case 0 if at < len(mutated):
                mutated[at] ^= 1 << rng.randrange(8)
            case 1:
                mutated[at : at + 2] = rng.choice([b"\0\0", b"\1\0", b"\xff\xff", b"\xff\x7f", b"\0\x80", b"\0\1"])
            case 2:
                del mutated[at : at + rng.randrange(1, 40)]
            case 3:
                mutated[at:at] = mutated[at : at + rng.randrange(1, 200)]
            case 4:
                mutated[at:at] = rng.randbytes(rng.randrange(1, 9))
            case _:
                mutated[at:] = rng.choice(others)[at:]
    return bytes(mutated)


def run_blindly(target: Target, seconds: float, seed: int) -> None:
    rng, inputs = random.Random(seed), list(seeds())
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        target.told(mutate(rng.choice(inputs), rng, inputs))
    target.report()


def run_guided(target: Target, seconds: float, seed: int) -> None:
    """Never returns: libFuzzer owns the process, and ends it as soon as something is found."""
    deadline = time.monotonic() + seconds
    corpus = tempfile.TemporaryDirectory()
    for number, data in enumerate(seeds()):
        Path(corpus.name, str(number)).write_bytes(data)

    def one(data: bytes) -> None:
        target.told(data)
        if target.num_inputs % 256 == 0 and time.monotonic() >= deadline:
            target.report()
            corpus.cleanup()
            os._exit(0)

    options = [f"-seed={seed}", "-max_len=1500", f"-artifact_prefix={corpus.name}/", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, corpus.name], one)
    atheris.Fuzz()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.frames")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blindly", action="store_true", help="without Atheris, even where it is installed")
    parser.add_argument("--again", help="one finding, as it was printed")
    options = parser.parse_args(arguments)
    target = Target()
    if options.again:
        target(base64.b64decode(options.again))
        return 0
    is_guided = atheris is not None and not options.blindly
    print(f"seed {options.seed}, {'guided by coverage' if is_guided else 'blindly'}", flush=True)
    (run_guided if is_guided else run_blindly)(target, options.seconds, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
