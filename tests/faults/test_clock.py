"""Row 24: a clock that jumps has no effect, because nothing that is measured or waited for knows the time of day.

A test that turns the clock of a whole system would have to turn the kernel's, and with it that of everybody else on the
machine; so it is the code that is looked at.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("protos", "common", "vision_server", "language_server", "router")
TIME_OF_DAY = {"time", "time_ns", "now", "utcnow", "today", "fromtimestamp", "localtime", "gmtime", "strftime", "ctime"}
CLOCKS = {"time", "datetime", "date"}
SHOWN = {
    "common/service/keys.py": 2,
    "common/service/tracing.py": 1,
    "router/api/answers.py": 1,
    "router/api/models.py": 1,
    "router/ui/pipeline_view.py": 1,
    "router/ui/recent.py": 1,
}
"""Where it is only told to others: when spans began, ``created`` of an answer and of a model, when a request of the
playground came; or compared with the end of a certificate, which is one of the calendar."""


def askings(tree: ast.AST) -> Iterator[int]:
    """Lines that ask for the time of day: ``time.time()``, ``datetime.now()``, ``from time import time``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            if owner in CLOCKS and node.attr in TIME_OF_DAY:
                yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "time" and TIME_OF_DAY & {a.name for a in node.names}:
            yield node.lineno


def test_row_24_no_server_measures_by_the_time_of_day():
    found: dict[str, int] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            lines = list(askings(ast.parse(path.read_text("utf-8"))))
            if lines:
                found[str(path.relative_to(ROOT))] = len(lines)
    assert found == SHOWN


@pytest.mark.parametrize(
    "line", ["time.time()", "datetime.datetime.now()", "from time import time_ns", "datetime.now(UTC)"]
)
def test_what_would_be_found(line):
    assert list(askings(ast.parse(line))) == [1]


@pytest.mark.parametrize("line", ["time.monotonic()", "loop.time()", "from time import monotonic", "self.now()"])
def test_what_would_not(line):
    assert list(askings(ast.parse(line))) == []
