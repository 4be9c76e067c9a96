"""Options of ``dvd up``, ``status``, ``scale`` and ``down``. What a cluster is stands in its own file."""

from typing import ClassVar, Literal

from common.service.settings import Field, Settings


class UpSettings(Settings):
    """Start the cluster that FILE describes on a Ray cluster, wait until it serves, and leave it running."""

    program: ClassVar[str] = "dvd up"

    insecure: bool = Field(False, description="accept a Ray cluster that takes orders without a token")


class StatusSettings(Settings):
    """Show the servers of a cluster. --json is short for --format json."""

    program: ClassVar[str] = "dvd status"

    format: Literal["table", "json"] = Field("table", description="table or json")
    watch: bool = Field(False, description="show it again and again, until Ctrl-C")
    interval: float = Field(2.0, gt=0, description="seconds between two looks with --watch")


class ScaleSettings(Settings):
    """Change how many servers a group of a cluster has: dvd scale [NAME] vision=3 language=2 routers=2."""

    program: ClassVar[str] = "dvd scale"


class DownSettings(Settings):
    """End a cluster: drain its routers, then its language servers, then its vision servers, and remove every trace."""

    program: ClassVar[str] = "dvd down"

    force: bool = Field(False, description="do not wait for running requests, nor for a Ray that cannot be asked")
