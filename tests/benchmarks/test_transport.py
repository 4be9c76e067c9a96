"""Transports are measured between real processes, and a ratio compares what was measured in the same round."""

import asyncio

import msgspec
import pytest

from benchmarks import transport
from benchmarks.page import page
from benchmarks.transport import MEMCPY, Case, main, make_message, measure, print_cases
from benchmarks.transport_peer import BARE_ZMQ, RAW, TICKET
from benchmarks.transport_sink import Sink
from protos.frame import FrameRejected, checksum, is_signed_by, parse_header
from protos.seal import pack_frame

MESSAGES = ((2, 64), (1, 16))


@pytest.fixture(scope="module")
def measured() -> list[Case]:
    messages = [make_message(tiles, hidden, 2**18) for tiles, hidden in MESSAGES]
    return asyncio.run(measure(("tcp", "zmq"), messages, 3, 2, lambda _: None))


def test_every_subject_moves_every_message_in_every_round(measured):
    subjects = {MEMCPY, RAW, "tcp", "tcp, sealed", BARE_ZMQ, "zmq", "zmq, sealed"}
    assert {(case.message, case.subject) for case in measured} == {
        (name, subject) for name in ("0.0655 MB", "0.00819 MB") for subject in subjects
    }
    assert all(len(case.rounds) == 3 and min(case.rounds) > 0 for case in measured)


def test_ratios_are_medians_of_the_rounds():
    rates = {
        ("1 MB", RAW): [4.0, 2.0, 8.0],
        ("1 MB", "zmq"): [2.0, 2.0, 2.0],
        ("1 MB", BARE_ZMQ): [2.5, 2.0, 2.0],
        ("1 MB", "tcp"): [3.0, 2.0, 6.0],
    }
    cases = {subject: transport._case(message, subject, rates, 10**6) for message, subject in rates}
    assert cases["zmq"].of_raw_socket == 0.5
    assert cases["zmq"].of_bare_zmq == 1.0
    assert cases["tcp"].of_raw_socket == 0.75
    assert (cases["tcp"].of_bare_zmq, cases["tcp"].of_memcpy, cases[RAW].of_raw_socket) == (None, None, None)
    assert cases["tcp"].gb_per_s == 3.0
    assert cases["tcp"].microseconds == pytest.approx(1e3 / 3)


def test_a_message_is_a_frame_that_the_sink_takes_and_a_damaged_one_is_not():
    message = make_message(2, 64, 10**6)
    header = parse_header(message.packed_header)
    assert is_signed_by(message.packed_header, TICKET)
    assert len(message.payload) == header.payload_bytes == 2 * 256 * 64 * 2
    assert message.count == 15
    for lend in (None, lambda: bytearray(header.payload_bytes)):
        placed = Sink().place(header, message.packed_header, lend)
        placed[:] = message.payload
        Sink().commit(header, placed, checksum(placed))
        placed[3] ^= 1
        with pytest.raises(FrameRejected, match="checksum"):
            Sink().commit(header, placed, checksum(placed))


def test_a_sealed_message_is_opened_by_the_sink():
    message = make_message(2, 64, 10**6)
    packed, sealed = pack_frame(message.header, memoryview(message.payload), TICKET, is_sealed=True)
    header = parse_header(packed)
    placed = Sink().place(header, packed)
    placed[:] = sealed
    Sink().commit(header, placed, 0)
    assert placed == message.payload
    with pytest.raises(FrameRejected, match="seal"):
        Sink().commit(header, placed, 0)  # it is open already


def test_the_table_shows_ratios_where_there_are_some(measured, capsys):
    print_cases(measured)
    shown = capsys.readouterr().out
    assert "of raw socket" in shown and BARE_ZMQ in shown


def test_the_command_and_its_page(tmp_path, capsys):
    load = ["--transports", "tcp", "--messages", "1x16", "--batch-mb", "0.1", "--rounds", "1"]
    main([*load, "--results", str(tmp_path)])
    (record,) = tmp_path.glob("*-transport.json")
    assert str(record) in capsys.readouterr().out
    cases = msgspec.json.decode(record.read_bytes())["figures"]
    assert [case["subject"] for case in cases] == [MEMCPY, RAW, "tcp", "tcp, sealed"]
    assert "| tcp |" in page(tmp_path)


def test_a_transport_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--transports", "pigeon"])
    assert "pigeon" in capsys.readouterr().err
