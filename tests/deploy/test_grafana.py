"""The board and the alert rules ask for metrics that exist, by labels that these metrics have.

Written for the expressions that are there: a selector is a name with or without braces, and an aggregation is
``sum by (labels) (expression)``, so that its labels can be held against what is inside.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client.metrics import Counter, Gauge, Histogram, MetricWrapperBase

from common.service import metrics

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
BOARD: dict[str, Any] = json.loads((FOLDER / "board.json").read_text("utf-8"))
ALERTS: dict[str, Any] = yaml.safe_load((FOLDER / "alerts.yaml").read_text("utf-8"))

OF_EVERY_TARGET = {"instance", "job"}
"""Labels that Prometheus adds."""
NAME = re.compile(r"\b[a-z][a-z0-9]*_[a-z0-9_]+\b")
SELECTOR = re.compile(r"(?P<name>[a-z]\w*)\{(?P<matchers>[^}]*)\}")
MATCHER = re.compile(r'(?P<label>\w+)(?:=~|!~|!=|=)"[^"]*"')
GROUPING = re.compile(r"\b(?:by|on|without|ignoring) \((?P<labels>[\w, ]*)\) ?")
FUNCTIONS = {"histogram_quantile", "max_over_time", "label_values"}


class Expression(NamedTuple):
    place: str
    text: str


def expressions() -> Iterator[Expression]:
    for panel in BOARD["panels"]:
        for target in panel.get("targets", []):
            yield Expression(panel["title"], target["expr"])
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield Expression(rule["alert"], rule["expr"])


EXPRESSIONS = list(expressions())
each_expression = pytest.mark.parametrize("text", [e.text for e in EXPRESSIONS], ids=[e.place for e in EXPRESSIONS])


def series() -> dict[str, tuple[type, set[str]]]:
    """Kind and labels of everything that is exported, by the name Prometheus knows it by."""
    found: dict[str, tuple[type, set[str]]] = {}
    for family in vars(metrics).values():
        if not isinstance(family, MetricWrapperBase):
            continue
        (described,) = family.describe()
        labels = {*family._labelnames, "model", *OF_EVERY_TARGET}
        if isinstance(family, Histogram):
            found[described.name + "_bucket"] = Histogram, labels | {"le"}
            found |= {described.name + suffix: (Counter, labels) for suffix in ("_sum", "_count")}
        elif isinstance(family, Counter):
            found[described.name + "_total"] = Counter, labels
        else:
            found[described.name] = Gauge, labels
    return found


SERIES = series()


def names_in(text: str) -> list[str]:
    """Metrics that an expression asks for."""
    bare = GROUPING.sub("", re.sub(r"\{[^}]*\}", "", text))
    return [name for name in NAME.findall(bare) if name not in FUNCTIONS]


def argument(text: str, start: int) -> str:
    """What is between the parenthesis at ``start`` and the one that closes it."""
    depth = 0
    for end in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 1 : end]
    raise AssertionError(f"unbalanced: {text}")


@each_expression
def test_every_metric_is_declared(text):
    assert names_in(text)
    assert [name for name in names_in(text) if name not in SERIES] == []


@each_expression
def test_every_label_is_one_of_its_metric(text):
    for selector in SELECTOR.finditer(text):
        asked = {match["label"] for match in MATCHER.finditer(selector["matchers"])}
        assert asked, selector["matchers"]
        assert asked <= SERIES[selector["name"]][1], selector[0]
    for grouping in GROUPING.finditer(text):
        labels = set(re.findall(r"\w+", grouping["labels"]))
        is_aggregation = grouping[0].startswith("by")
        inside = argument(text, grouping.end()) if is_aggregation else text
        for name in names_in(inside):
            assert labels <= SERIES[name][1], f"{name} in {text}"


@each_expression
def test_rates_are_of_counters_and_quantiles_of_buckets(text):
    for function in re.finditer(r"\b(rate|increase|histogram_quantile|sum|max)\b(?: by \([^)]*\))? ?(?=\()", text):
        inside = argument(text, function.end())
        kinds = {SERIES[name][0] for name in names_in(inside)}
        if function[1] == "histogram_quantile":
            assert kinds == {Histogram}, text
            assert re.search(r"by \([^)]*\ble\)", inside), text
        elif function[1] in ("rate", "increase"):
            assert kinds <= {Counter, Histogram}, text
        elif "(" not in inside:  # of what it is now
            assert kinds == {Gauge}, text


def test_what_is_misspelled_would_be_found():
    assert names_in('sum by (tier) (rate(dvd_no_such_total{model="x"}[5m]))') == ["dvd_no_such_total"]
    assert "dvd_no_such_total" not in SERIES
    assert "server" not in SERIES["dvd_requests_running"][1]
    with pytest.raises(AssertionError):
        test_every_metric_is_declared("rate(dvd_http_requests[5m])")
    with pytest.raises(AssertionError):
        test_every_label_is_one_of_its_metric("sum by (server) (rate(dvd_http_requests_total[5m]))")
    with pytest.raises(AssertionError):
        test_every_label_is_one_of_its_metric('dvd_servers{kind="vision"}')
    with pytest.raises(AssertionError):
        test_rates_are_of_counters_and_quantiles_of_buckets("rate(dvd_requests_running[5m])")


def test_legends_and_texts_name_labels_that_are_left():
    for panel in BOARD["panels"]:
        for target in panel.get("targets", []):
            check_template(target["legendFormat"], r"\{\{(\w+)\}\}", target["expr"])
    for rule in (rule for group in ALERTS["groups"] for rule in group["rules"]):
        for words in rule["annotations"].values():
            check_template(words, r"\$labels\.(\w+)", rule["expr"])


def check_template(words: str, pattern: str, expression: str) -> None:
    asked = set(re.findall(pattern, words))
    groups = [set(re.findall(r"\w+", match["labels"])) for match in GROUPING.finditer(expression)]
    left = groups[0] if groups else SERIES[names_in(expression)[0]][1]
    assert asked <= left, f"{words}: {expression}"


def test_panels_lie_side_by_side():
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    identifiers = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(identifiers)) == len(identifiers)


def test_every_rule_says_how_urgent_it_is():
    names = [rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]]
    assert len(set(names)) == len(names)
    for rule in (rule for group in ALERTS["groups"] for rule in group["rules"]):
        assert rule["labels"]["severity"] in ("page", "ticket", "note"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]
