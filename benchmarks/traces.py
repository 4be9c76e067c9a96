"""Public request traces, told apart by their header: BurstGPT, Azure LLM inference, Mooncake. Knows no clock.

* BurstGPT, CSV ``Timestamp,Model,Request tokens,Response tokens,...``: seconds.
* Azure, CSV ``TIMESTAMP,ContextTokens,GeneratedTokens``: date and time.
* Mooncake, JSON lines ``{"timestamp": ms, "input_length": ..., "output_length": ...}``.

Requests without input or output tokens failed when the trace was taken and are left out, as their publishers advise.
"""

import csv
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from benchmarks.arrivals import Recorded
from common.service.errors import ConfigError


class _Format(NamedTuple):
    """Names of the columns, in lower case, and how a timestamp becomes seconds."""

    at: str
    input_tokens: str
    output_tokens: str
    seconds: Callable[[Any], float]


def _seconds_of_date(text: str) -> float:
    when = datetime.fromisoformat(text)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


_BURSTGPT: Final = _Format("timestamp", "request tokens", "response tokens", float)
_AZURE: Final = _Format("timestamp", "contexttokens", "generatedtokens", _seconds_of_date)
_MOONCAKE: Final = _Format("timestamp", "input_length", "output_length", lambda value: float(value) / 1e3)


def read_trace(path: Path, limit: int | None = None) -> tuple[Recorded, ...]:
    """The first ``limit`` requests, in order of time, the first at 0.

    Raises:
        ConfigError: the file cannot be read, is of no known format, or has a bad line, which is named.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            found = sorted(itertools.islice(_requests(path, lines), limit), key=lambda request: request.at)
    except OSError as error:
        raise ConfigError(f"--trace {path}: {error.strerror}") from None
    except _BadLine as error:
        raise ConfigError(f"--trace {path}: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--trace {path}: not a text file") from None
    if not found:
        raise ConfigError(f"--trace {path}: no requests in it")
    first = found[0].at
    return tuple(Recorded(each.at - first, each.input_tokens, each.output_tokens) for each in found)


def _requests(path: Path, lines: Iterator[str]) -> Iterator[Recorded]:
    header = next(lines, "")
    if header.lstrip().startswith("{"):
        form, rows = _MOONCAKE, _json_rows(itertools.chain([header], lines))
    else:
        columns = [name.strip().lower() for name in next(csv.reader([header]), [])]
        form, rows = _csv_format(path, columns), _csv_rows(columns, lines)
    for number, row in rows:
        request = _request(form, number, row)
        if request.input_tokens > 0 and request.output_tokens > 0:
            yield request


class _BadLine(ValueError):
    """What is wrong with which line."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"line {number}: {message}")


def _csv_format(path: Path, columns: list[str]) -> _Format:
    for form in (_BURSTGPT, _AZURE):
        if {form.at, form.input_tokens, form.output_tokens} <= set(columns):
            return form
    raise ConfigError(
        f"--trace {path}: no known format; expected BurstGPT CSV (Timestamp, Request tokens, Response tokens), "
        "Azure CSV (TIMESTAMP, ContextTokens, GeneratedTokens) or Mooncake JSON lines (timestamp, input_length, ...)"
    )


def _csv_rows(columns: list[str], lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.reader(lines)
    for row in reader:
        if row:
            yield reader.line_num + 1, dict(zip(columns, row, strict=False))


def _json_rows(lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise _BadLine(number, str(error)) from None


def _request(form: _Format, number: int, row: Mapping[str, Any]) -> Recorded:
    def read(name: str, kind: Callable[[Any], Any]) -> Any:
        try:
            value = kind(row[name])
        except KeyError:
            raise _BadLine(number, f"no {name}") from None
        except (TypeError, ValueError):
            raise _BadLine(number, f"bad {name} {str(row[name])[:64]!r}") from None
        if not math.isfinite(value):
            raise _BadLine(number, f"bad {name} {str(row[name])[:64]!r}")
        return value

    return Recorded(read(form.at, form.seconds), read(form.input_tokens, int), read(form.output_tokens, int))
