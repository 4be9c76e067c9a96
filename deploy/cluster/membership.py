"""What each router was told of its servers, and since when all of them know. Pure; times are in seconds."""

from collections.abc import Iterable
from typing import Final

from router.discovery import FILE_POLL_SECONDS

Members = tuple[list[str], list[str]]
"""Addresses of vision and of language servers."""

_READ_SECONDS: Final = 2 * FILE_POLL_SECONDS
"""From writing the files of a router to the moment when it has certainly read them."""


class Membership:
    """By replica of the router."""

    def __init__(self) -> None:
        self._told: dict[str, Members] = {}
        self._told_at = 0.0

    def knows(self, router: str, members: Members) -> bool:
        """Whether it was told exactly this last."""
        return self._told.get(router) == members

    def note(self, router: str, members: Members, now: float) -> None:
        """It has been told."""
        self._told[router] = members
        self._told_at = now

    def forget(self, router: str) -> None:
        """It is gone."""
        self._told.pop(router, None)

    def is_read(self, routers: Iterable[str], members: Members, now: float) -> bool:
        """Whether none of them sends anything to anybody else any more."""
        names = list(routers)
        return not names or (
            all(self.knows(router, members) for router in names) and now - self._told_at >= _READ_SECONDS
        )
