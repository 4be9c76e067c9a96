"""What the operator's machine remembers of the clusters it started: one private file each, without keys or tokens."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from common.service.errors import ConfigError
from deploy.cluster.ledger import Member
from deploy.cluster.local_head import LocalHead


@dataclass(slots=True)
class ClusterState:
    """``members``: the last known ones, for when the head is lost. ``started_at``, ``lost_at``: seconds since 1970."""

    name: str
    incarnation: str
    address: str
    model: str
    started_at: float
    is_insecure: bool = False
    keys: str | None = None
    local_head: LocalHead | None = None
    members: list[Member] = field(default_factory=list)
    lost_at: float | None = None

    @classmethod
    def load(cls, name: str) -> Self | None:
        """None: no cluster of this name was started here. Raises ConfigError when the file cannot be read."""
        path = _path(name)
        try:
            content = json.loads(path.read_text("utf-8"))
            head = content.pop("local_head")
            members = [Member(**member) for member in content.pop("members")]
            return cls(local_head=None if head is None else LocalHead(**head), members=members, **content)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}: cannot be read ({type(error).__name__}); remove it") from None

    def save(self) -> None:
        """Raises ConfigError when it cannot be written."""
        path = _path(self.name)
        draft = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(asdict(self), file)
            draft.replace(path)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None

    def remove(self) -> None:
        """The cluster is no more."""
        _path(self.name).unlink(missing_ok=True)

    def take(self, status: Mapping[str, Any]) -> None:
        """Remember the members that the controller names."""
        fields = Member.__dataclass_fields__
        self.members = [Member(**{name: member[name] for name in fields}) for member in status["members"]]
        self.lost_at = None


def known_names() -> list[str]:
    """Clusters that were started from this machine."""
    return sorted(path.stem for path in _directory().glob("*.json"))


def resolve_name(words: list[str]) -> str:
    """The cluster a command is about: the one it names, or the only one.

    Raises:
        ConfigError: there is none, or more than one to choose from.
    """
    if len(words) > 1:
        raise ConfigError(f"expected one name of a cluster, found {' '.join(words)[:64]}")
    if words:
        return words[0]
    names = known_names()
    if not names:
        raise ConfigError("no cluster was started from this machine: dvd up cluster.yaml")
    if len(names) > 1:
        raise ConfigError(f"which cluster? name one of {', '.join(names)}")
    return names[0]


def _directory() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "dvd" / "clusters"


def _path(name: str) -> Path:
    if not name.replace("-", "").isalnum():  # also keeps slashes out
        raise ConfigError(f"{name[:64]}: not a name of a cluster")
    return _directory() / f"{name}.json"
