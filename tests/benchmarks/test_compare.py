"""One system beside another: the same load, the same figures, and ratios that say which is which."""

import msgspec
import pytest
from rich.console import Console

from benchmarks import compare
from benchmarks.compare import by_system, comparison, figures, measure, systems
from benchmarks.page import page
from benchmarks.presets import make_plan
from benchmarks.settings import BenchServeSettings
from benchmarks.systems import Dvd, Vllm
from common.service.errors import ConfigError


def test_systems_are_known_by_name():
    divided, undivided = systems(["dvd", "colocated"], "nano", "float32", None)
    assert divided == Dvd("DvD", "nano", {"dtype": "float32"})
    assert undivided.command == "dvd serve nano --dtype=float32 --colocated"


@pytest.mark.parametrize(("name", "message"), [("sglang", "expected some of dvd"), ("vllm", "--vllm: needed")])
def test_what_cannot_be_measured_is_said(name, message):
    with pytest.raises(ConfigError, match=message):
        systems([name], "nano", "float32", None)


def test_a_command_that_is_not_there_is_named(tmp_path):
    peer = Vllm(tmp_path / "vllm", "nano", "float32")
    with pytest.raises(ConfigError, match="no such file"), peer.serving():
        pass


def test_medians_of_rounds_and_the_first_system_over_the_others():
    rounds = {
        "ours": [{"requests/s": 4.0}, {"requests/s": 6.0}, {"requests/s": 5.0}],
        "theirs": [{"requests/s": 2.0}, {"requests/s": 2.5}, {"requests/s": 9.0}],
    }
    table = comparison(rounds)
    assert table.columns == ["", "ours", "theirs", "ours / theirs"]
    assert table.rows == [["requests/s", "5", "2.5", "2.00 x"]]
    assert table.notes == ["Medians of 3 rounds."]


def test_a_figure_that_one_system_lacks_has_no_ratio():
    table = comparison({"ours": [{"ITL p99, ms": 20.0}], "theirs": [{}]})
    assert table.rows == [["ITL p99, ms", "20", "-", "-"]]


def test_nano_is_measured_in_all_three_phases():
    options = {"preset": "text-beside-images", "input_tokens": "16", "duration": 1.5, "warmup": 0.0}
    plan = make_plan(BenchServeSettings.model_validate(options))
    (record,) = measure(plan, [Dvd("DvD", "nano", {"threads": 1, "vision_nice": 0})], 1, Console(quiet=True))
    (found,) = by_system([record])["DvD"]
    assert found["failed requests"] == 0
    assert found["text alone: requests/s"] > 0
    assert found["text alone: ITL p99, ms"] >= found["text alone: ITL p50, ms"] > 0
    assert {summary["phase"] for summary in record["summaries"]} == {
        compare.TEXT_ALONE,
        compare.IMAGES_ALONE,
        compare.BOTH,
    }


def test_nano_is_asked_by_sixteen_clients(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "Console", lambda **_: Console(width=160, no_color=True))
    options = {"threads": 1, "vision_nice": 0}
    monkeypatch.setattr(compare, "systems", lambda *_: [Dvd("DvD", "nano", options)])
    argv = ["--preset", "language", "--seconds", "1.5", "--warmup", "0", "--results", str(tmp_path)]
    compare.main(argv)
    assert "Sixteen clients" in capsys.readouterr().out
    (path,) = tmp_path.glob("*-compare-language-nano-float32.json")
    (found,) = by_system(msgspec.json.decode(path.read_bytes())["figures"]["runs"])["DvD"]
    assert found["failed requests"] == 0
    assert found["text: requests/s"] > 0
    assert found["text and images: ITL p99, ms"] >= found["text and images: ITL p50, ms"] > 0
    assert "Sixteen clients" in page(tmp_path)


def test_figures_need_all_three_phases():
    with pytest.raises(KeyError):
        figures([])
