"""Who may call what among our own programs, where they know one another by certificate (``common.service.keys``).

A certificate is for a role, so that one that was stolen from a vision server cannot order features to be sent
anywhere, nor read what users ask: a delivery address comes from a router only (RELIABILITY.md section 5.8).
"""

from collections.abc import Iterable, Mapping
from typing import Final, Literal, get_args

Role = Literal["router", "vision", "language", "client"]
"""``client`` is whoever only looks: ``dvd status``, ``dvd encode --server``, the controller of a cluster."""
ROLES: Final[tuple[Role, ...]] = get_args(Role)

_DOMAIN: Final = ".dvd.internal"
_ANY: Final = frozenset(ROLES)
_ROUTER: Final = frozenset[Role]({"router"})

CALLERS: Final[Mapping[str, frozenset[Role]]] = {
    "/dvd.v1.Language/Generate": _ROUTER,
    "/dvd.v1.Language/Tokenize": _ROUTER,
    "/dvd.v1.Language/Detokenize": _ROUTER,
    "/dvd.v1.Language/WatchStatus": _ANY,
    "/dvd.v1.Vision/Encode": _ROUTER,
    "/dvd.v1.Vision/Score": _ROUTER,
    "/dvd.v1.Vision/Probe": _ROUTER,
    "/dvd.v1.Vision/Extract": frozenset({"router", "client"}),  # its features go back to whoever asks
    "/dvd.v1.Vision/WatchStatus": _ANY,
    "/dvd.v1.FeaturePlane/Deliver": frozenset({"vision"}),
    "/dvd.v1.Lease/Renew": _ROUTER,
    "/dvd.v1.Carrier/Carry": _ANY,  # each call that it carries is looked up by its own name
    "/grpc.health.v1.Health/Check": _ANY,
    "/grpc.health.v1.Health/List": _ANY,
    "/grpc.health.v1.Health/Watch": _ANY,
}
"""By method. What is not in here nobody may call."""


def role_name(role: Role) -> str:
    """As a certificate names it: ``vision.dvd.internal``, wherever that server runs."""
    return role + _DOMAIN


def is_role_name(name: str) -> bool:
    """Whether ``name`` is kept for roles."""
    return name.lower().endswith(_DOMAIN)


def roles_in(names: Iterable[str]) -> frozenset[Role]:
    """The roles among the names of a certificate."""
    found = set(names)
    return frozenset(role for role in ROLES if role_name(role) in found)


def may_call(method: str, names: Iterable[str]) -> bool:
    """Whether whoever shows a certificate with these names may call ``method``."""
    return bool(CALLERS.get(method, frozenset()) & roles_in(names))
