"""What is not audited is not called clean, and what we depend on is pinned to one version each."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.supply_chain import Audit, pinned

ROOT = Path(__file__).parents[2]
CONSTRAINTS = (ROOT / "constraints.txt").read_text("utf-8")
CLEAN = {"name": "idna", "version": "3.20", "vulns": []}
SKIPPED = {"name": "numpy", "skip_reason": "Dependency not found on PyPI and could not be audited: numpy (2.4.6)"}
FAULTY = {
    "name": "pillow",
    "version": "12.0.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["12.2.0"], "aliases": [], "description": ""}],
}


def report(*packages: object) -> Audit:
    return Audit.of(json.dumps({"dependencies": packages, "fixes": []}))


@pytest.mark.parametrize(
    ("found", "said", "status", "strict_status"),
    [
        (report(CLEAN), "audited 1 packages: 0 known", 0, 0),
        (report(CLEAN, SKIPPED), "NOT AUDITED: 1 packages the service did not answer for: numpy", 0, 1),
        (report(SKIPPED), "NOT AUDITED: the advisory service knows none", 0, 1),
        (report(), "NOT AUDITED", 0, 1),
        (Audit.of(""), "NOT AUDITED: no advisory service reachable", 0, 1),
        (report(FAULTY, CLEAN), "pillow 12.0.0: PYSEC-1, fixed in 12.2.0", 1, 1),
        (report(FAULTY, SKIPPED), "PYSEC-1", 1, 1),
    ],
    ids=["clean", "holes", "nothing known", "nothing asked", "unreachable", "found", "found with holes"],
)
def test_silence_is_not_a_clean_bill(found, said, status, strict_status):
    assert said in found.describe()
    assert found.exit_status(is_required=False) == status
    assert found.exit_status(is_required=True) == strict_status


def test_every_constraint_is_one_version():
    lines = pinned(CONSTRAINTS)
    assert len(lines) > 100
    assert not [line for line in lines if "+" in line]
    for loose in ("numpy", "numpy>=2", "numpy==2.*", "numpy==2,<3", "numpy==2; python_version > '3'"):
        with pytest.raises(ValueError, match="not pinned"):
            pinned(loose)


def test_all_that_we_ask_for_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    names = {canonicalize_name(Requirement(line).name) for line in asked} - {canonicalize_name(project["name"])}
    known = {canonicalize_name(line.partition("==")[0]) for line in pinned(CONSTRAINTS)}
    assert sorted(names - known) == []


def test_tools_of_make_check_are_pinned():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert re.search(r"pip-audit==[\d.]+ cyclonedx-bom==[\d.]+", makefile)
