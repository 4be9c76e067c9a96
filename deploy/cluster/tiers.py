"""The three kinds of servers, in the order in which features flow."""

from typing import Final, Literal

Tier = Literal["vision", "language", "router"]
TIERS: Final[tuple[Tier, ...]] = ("vision", "language", "router")
