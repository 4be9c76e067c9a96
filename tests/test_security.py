"""SECURITY.md is true where a machine can tell: its limits are those of the code, what it points at is there."""

import importlib
import re
from pathlib import Path

import pytest

from common.service import metrics
from common.service.settings import Settings
from router.settings import RouterSettings
from router.tenants import parse_tenants
from vision_server.settings import VisionSettings

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "SECURITY.md").read_text("utf-8")
PROGRAMS: dict[str, type[Settings]] = {"router": RouterSettings, "vision": VisionSettings}
UNITS = {"": 1, "s": 1, "KiB": 2**10, "MB": 10**6, "MiB": 2**20}
LIMITS = re.findall(r"^\| [^|]+ \| `([^`]+)` \| (\d+) ?(\w*) \| [^|]+ \|$", PAGE, re.MULTILINE)


def value_of(place: str) -> object:
    program, _, flag = place.partition(" --")
    if flag:
        return PROGRAMS[program].model_fields[flag.replace("-", "_")].default
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_table_is_read():
    section = PAGE.partition("## Limits")[2].partition("\n## ")[0]
    assert len(LIMITS) == section.count("\n| ") - 1 > 30


@pytest.mark.parametrize(("place", "number", "unit"), LIMITS, ids=[place for place, _, _ in LIMITS])
def test_limits_are_those_of_the_code(place, number, unit):
    assert value_of(place) == int(number) * UNITS[unit]


def test_every_limit_of_a_router_is_in_the_table():
    bounds = {f"router --{name.replace('_', '-')}" for name in RouterSettings.model_fields if name.startswith("max_")}
    # Budgets that a request may raise, and how long one may wait, are no limits on what strangers send.
    no_bounds = {"router --max-dynamic-patch", "router --max-queue-time"}
    assert sorted(bounds - no_bounds - {place for place, _, _ in LIMITS}) == []


def test_what_it_points_at_is_there():
    paths = re.findall(r"`((?:router|vision_server|tests|deploy|common)/[\w/.]*)`", PAGE)
    assert len(paths) >= 6
    assert [path for path in paths if not (ROOT / path).exists()] == []
    exposed = metrics.exposition("router") + metrics.exposition("vision")
    families = set(re.findall(r"\b(dvd_\w+_total)\b", PAGE))
    assert len(families) >= 4
    assert [name for name in families if f"# TYPE {name} ".encode() not in exposed] == []


def test_its_keys_file_is_one():
    ((text),) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    first, second = parse_tenants(text.replace("0d3f...", "0d3f" * 16))
    assert (first.quota.requests_per_minute, first.quota.tiles_per_minute) == (600, 5000)
    assert len(second.digests) == 1
