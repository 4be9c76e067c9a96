"""How many variants of a fault are tried: one of each kind, or every one (``make faults FAULTS=all``)."""

import os
from collections.abc import Iterable
from typing import Final, TypeVar

IS_FULL: Final = os.environ.get("FAULTS") == "all"

T = TypeVar("T")


def variants(*always: T, more: Iterable[T] = ()) -> list[T]:
    """Parameters of a test. ``more`` cost time and rarely find what the others do not."""
    return [*always, *(more if IS_FULL else ())]
