"""The same load on one system after the other, several times over."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from benchmarks.plan import Plan
from benchmarks.progress import ProgressBar
from benchmarks.runner import run
from benchmarks.samples import Result
from benchmarks.systems import System


def measure_rounds(
    plan: Plan,
    under_test: Sequence[System],
    num_rounds: int,
    console: Console,
    read: Callable[[System, Result], Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Every round: each system is started, loaded and stopped. Returns a record of each run, in order.

    Args:
        read: what the record keeps of a run; may raise.

    Raises:
        DvdError: a system did not start.
    """
    records = []
    for round_number in range(num_rounds):
        for system in under_test:
            console.print(f"round {round_number + 1}/{num_rounds}: {system.name}", highlight=False)
            with system.serving() as target:
                result = run(plan, target, ProgressBar(console))
            about = {"system": system.name, "command": system.command, "round": round_number + 1}
            records.append(about | dict(read(system, result)))
    return records
