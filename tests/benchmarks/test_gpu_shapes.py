"""The whole script on the smallest shape: what it does on a card it does here."""

import json

from benchmarks.arrivals import ClosedLoop, OpenLoop
from benchmarks.gpu_shapes import COLOCATED, DIVIDED, comparison, main, make_plan


def test_each_size_is_warmed_up_and_then_measured():
    plan = make_plan([448, 896], 4, None, 10, 8)
    assert [phase.name for phase in plan.phases] == ["warm-up, 448 px", "448 px", "warm-up, 896 px", "896 px"]
    assert [phase.sources[0].num_requests for phase in plan.phases] == [4, 10, 4, 10]
    assert {phase.sources[0].arrivals for phase in plan.phases} == {ClosedLoop(4)}
    assert make_plan([448], 4, 16.0, 10, 8).phases[1].sources[0].arrivals == OpenLoop(16.0)


def test_the_table_shows_medians_and_what_dividing_gains():
    def record(system: str, rate: float) -> dict:
        row = dict.fromkeys(("TTFT p50, ms", "TTFT p99, ms", "TPOT p50, ms", "ITL p99, ms"), 10.0)
        return {"system": system, "figures": {"448 px": {"requests/s": rate, **row}}}

    rounds = [record(DIVIDED, 3.0), record(COLOCATED, 1.0), record(DIVIDED, 9.0), record(COLOCATED, 1.0)]
    rounds += [record(DIVIDED, 2.0), record(COLOCATED, 5.0)]
    table = comparison("8B", rounds)
    assert table.rows[0] == ["448 px", "requests/s", "3", "1", "3.00 x"]


def test_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--shape=tiny", "--device=cpu", "--dtype=float32", "--sizes=448", "--concurrency=2", "--requests=2"]
    main([*options, "--tokens=4", f"--kv-cache-bytes={2**24}", f"--results={tmp_path}"])
    (file,) = tmp_path.glob("*-gpu_shapes-tiny.json")
    record = json.loads(file.read_text())
    assert record["command"].startswith("python -m benchmarks gpu_shapes --shape=tiny")
    runs = record["figures"]["runs"]
    assert [run["system"] for run in runs] == [DIVIDED, COLOCATED]
    assert "--colocated" in runs[1]["command"] and "--colocated" not in runs[0]["command"]
    assert all(run["summaries"][0]["num_completed"] == 2 for run in runs)
    assert "requests/s" in capsys.readouterr().out
