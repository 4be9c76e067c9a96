"""The router is measured as a program, beside applications that answer with the same events."""

import asyncio

import pytest

from benchmarks import router
from benchmarks.http_load import Connection, closed_loop, fixed_rate
from benchmarks.page import page
from benchmarks.router import Load, Turn, image_load, main, make_case, text_load
from common.service.errors import Unavailable

SMALL = ["--rounds", "1", "--seconds", "0.1", "--concurrency", "2", "--text-bytes", "500", "--image-bytes", "300000"]


def test_the_command(tmp_path, capsys):
    """Both subjects stream every token of every kind of request, or it raises; the record becomes a table."""
    assert main([*SMALL, "--tokens", "3", "--results", str(tmp_path)]) in (0, 1)
    (record,) = tmp_path.iterdir()
    shown = capsys.readouterr().out
    assert str(record) in shown
    assert shown.count("text, 0.5 KB") == shown.count("image, 0.3 MB") == 1
    assert "| image, 0.3 MB | 3 |" in page(tmp_path)


def test_bodies_have_their_size():
    assert len(text_load(1000, 64).body) == 1000
    assert len(image_load(2 * 10**6, 1).body) == pytest.approx(2 * 10**6, rel=0.01)


def test_figures_are_medians_over_rounds_of_what_was_measured_in_one():
    def turn(subject: router.Subject, requests_per_s: float, p50: float) -> Turn:
        return Turn(subject, requests_per_s, 1.0, 0.5, {"p50": p50, "p99": 2 * p50})

    measured = [
        (turn("bare app", 100, 1.0), turn("bare relay", 50, 1.0), turn("router", 50, 2.0)),
        (turn("bare app", 10, 5.0), turn("bare relay", 16, 5.0), turn("router", 8, 5.5)),
        (turn("bare app", 100, 1.0), turn("bare relay", 100, 1.0), turn("router", 70, 2.5)),
    ]
    rounds = [{each.subject: each for each in turns} for turns in measured]
    case = make_case(Load("text", b"", 1), rounds)
    assert (case.of_bare_app, case.added_p50_ms, case.added_p99_ms) == (0.7, 1.0, 2.0)
    assert case.of_bare_relay == 0.7
    assert case.is_held
    assert not make_case(Load("text", b"", 1), rounds[:1]).is_held


async def test_an_answer_in_pieces_is_timed_to_its_end():
    """Wherever it is cut."""
    connection = Connection()
    whole = b"HTTP/1.1 200 OK\r\n\r\n8\r\ndata: 0\n\n\r\n0\r\n\r\n"
    connection.connection_made(asyncio.Transport())
    connection._answer = asyncio.get_running_loop().create_future()
    for index in range(len(whole)):
        assert not connection._answer.done()
        connection.data_received(whole[index : index + 1])
    answer = await connection._answer
    assert answer.data == whole
    assert answer.first_token - answer.whole + answer.whole >= 0


class Refusal(asyncio.Protocol):
    """Says something, and hangs up."""

    def __init__(self, said: bytes) -> None:
        self._said = said

    def connection_made(self, transport):
        self._transport = transport

    def data_received(self, data):
        self._transport.write(self._said)
        self._transport.close()


@pytest.mark.parametrize("said", [b"HTTP/1.1 503 no\r\n\r\n", b""])
async def test_a_server_that_refuses_or_hangs_up_is_a_failure(said):
    server = await asyncio.get_running_loop().create_server(lambda: Refusal(said), "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        for load in (closed_loop(url, b"", 2, 5.0), fixed_rate(url, b"", 100.0, 0.01)):
            with pytest.raises(Unavailable, match="503" if said else "hung up"):
                await load
