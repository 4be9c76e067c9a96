"""The client's own cost is measured against a server whose tokens are all accounted for."""

import pytest

from benchmarks.overhead import Overhead, main, measure, print_overheads


@pytest.fixture(scope="module")
def measured() -> Overhead:
    return measure(streams=4, tokens_per_second=50.0, seconds=1.0, num_tokens=20, warmup=0.1)


def test_every_token_is_accounted_for(measured):
    assert measured.failures == 0
    assert measured.offered_tokens_per_s == 200
    assert 0 < measured.received_tokens_per_s <= 230
    assert measured.lateness is not None and measured.server_lateness is not None
    assert measured.lateness.count == measured.server_lateness.count > 0
    assert min(measured.lateness.percentiles.values()) > 0  # one clock for both: nothing arrives before it is sent
    assert measured.client_cpu > 0


def test_the_table(measured, capsys):
    print_overheads([measured])
    shown = capsys.readouterr().out
    assert "offered" in shown and "│ 200 " in shown


def test_the_command(tmp_path, capsys):
    load = ["--streams", "2", "--tokens-per-second", "50", "--tokens", "10", "--seconds", "0.3", "--warmup", "0"]
    assert main([*load, "--results", str(tmp_path)]) in (0, 1)
    (record,) = tmp_path.iterdir()
    assert str(record) in capsys.readouterr().out
