"""The paper's table on this machine: what is compared with what, on which devices, and what cannot be."""

import json
import os
import re

import pytest
import torch

from benchmarks import table18
from benchmarks.settings import Table18Settings
from benchmarks.systems import Dvd
from benchmarks.table18 import BASELINE, DIVIDED, SIDES, WITH_VIR, Cell, Layout, Row

CORES = {0, 1, 2, 3}


def settings(**values):
    return Table18Settings.model_validate({"model": "nano", "device": "cpu", **values})


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: CORES)


def systems(layout):
    return {row.name: row.system for row in layout.rows}


def cells(*rates):
    return [Cell(rate, 10.0, {}) for rate in rates]


def test_on_a_cpu_all_rows_share_all_cores_or_vision_gets_the_other_half(four_cores):
    equal, added = table18.layouts(settings(dtype="float32"))
    assert systems(equal)[BASELINE] == Dvd(BASELINE, "nano", {"dtype": "float32", "colocated": True})
    assert systems(equal)[DIVIDED] == Dvd(DIVIDED, "nano", {"dtype": "float32"})
    assert systems(added)[BASELINE].cores == {0, 1}
    assert systems(added)[DIVIDED].options == {
        "dtype": "float32",
        "language_cores": [0, 1],
        "vision_cores": [2, 3],
    }


def test_one_core_cannot_be_added_to(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    _, added = table18.layouts(settings())
    assert added.rows == ()
    table = table18.table_of(added, {})
    assert table.rows[0][0].startswith("needs two cores")


@pytest.mark.parametrize(("num_gpus", "is_added"), [(1, False), (2, True)])
def test_on_gpus_both_tiers_share_one_or_vision_gets_a_second(monkeypatch, num_gpus, is_added):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    equal, added = table18.layouts(settings(device="auto"))
    assert systems(equal)[BASELINE].options == {"colocated": True, "device": "cuda:0"}
    assert systems(equal)[DIVIDED].options == {"device": "cuda:0"}
    assert bool(added.rows) is is_added
    if is_added:
        assert systems(added)[DIVIDED].options == {"language_devices": ["cuda:0"], "vision_devices": ["cuda:1"]}


def test_the_router_of_resolutions_needs_its_checkpoint(four_cores):
    equal, _ = table18.layouts(settings())
    assert equal.rows[-1] == Row(WITH_VIR, None, table18.NEEDS_FLASH)
    equal, _ = table18.layouts(settings(flash_model="/models/flash"))
    assert systems(equal)[WITH_VIR].model == "/models/flash"


def test_every_row_is_compared_with_the_baseline():
    system = Dvd("any", "nano", {})
    rows = (Row(BASELINE, system), Row(DIVIDED, system), Row(WITH_VIR, None, table18.NEEDS_FLASH))
    layout = Layout("equal devices", "4 cores", rows)
    table = table18.table_of(layout, {BASELINE: cells(4, 2, 1), DIVIDED: cells(6, 3, 2)})
    assert table.rows[0] == [BASELINE, "4", "2", "1"]
    assert table.rows[1] == [DIVIDED, "6 (1.50x)", "3 (1.50x)", "2 (2.00x)"]
    assert table.rows[2] == [f"{WITH_VIR} ({table18.NEEDS_FLASH})", "-", "-", "-"]
    assert table18.bars(layout, {BASELINE: cells(4, 2, 1)}) == {BASELINE: [4, 2, 1]}


def test_the_published_figures_stand_beside_ours():
    of_38b, of_241b = table18.paper_tables()
    assert of_38b.rows[2] == [WITH_VIR, "18.62 (1.50x)", "10.97 (4.05x)", "5.14 (3.47x)"]
    assert of_241b.rows[1] == [DIVIDED, "14.05 (1.24x)", "4.73 (1.86x)", "2.75 (2.01x)"]


def test_a_run_on_nano_leaves_figures_and_a_page(tmp_path, monkeypatch, capsys):
    """One layout with one row, a second for each size: the real programs, the real client."""
    layout = Layout("equal devices", "here", (Row(BASELINE, Dvd(BASELINE, "nano", {"threads": 1, "vision_nice": 0})),))
    monkeypatch.setattr(table18, "layouts", lambda _: [layout])
    options = settings(duration=1.0, warmup=0.0, concurrency=2, output_tokens=4, results=tmp_path)
    assert table18.main(options, ["nano"]) == 0
    assert "Requests/s, equal devices" in capsys.readouterr().out
    (raw,) = tmp_path.glob("*-table18-nano.json")
    record = json.loads(raw.read_text())
    (found,) = record["layouts"]
    assert found["commands"] == {BASELINE: "dvd serve nano --threads=1 --vision-nice=0"}
    assert [cell["summary"]["num_failed"] for cell in found["cells"][BASELINE]] == [0] * len(SIDES)
    page = raw.with_suffix(".html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"https?://|(src|href)=\"(?!#)", page)
