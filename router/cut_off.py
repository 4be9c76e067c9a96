"""The end of a drain that has waited long enough: whatever still runs is ended."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class CutOff:
    """Belongs to the event loop."""

    def __init__(self) -> None:
        self._is_set = False
        self._endings: set[Callable[[], None]] = set()

    @contextmanager
    def calls(self, ending: Callable[[], None]) -> Iterator[None]:
        """``ending`` is called when it comes, or now where it has; not after this block."""
        if self._is_set:
            ending()
        self._endings.add(ending)
        try:
            yield
        finally:
            self._endings.discard(ending)

    def set(self) -> None:
        """Now."""
        self._is_set = True
        for ending in list(self._endings):
            ending()
