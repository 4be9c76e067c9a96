"""A layout -> cluster.yaml, checked by what `dvd up` reads it with."""

from typing import Any, Final

import yaml
from pydantic import ValidationError

from benchmarks.simulator.pipeline import Cards, Layout
from common.service.errors import ConfigError
from deploy.cluster.mistakes import explain
from deploy.cluster.spec import ClusterSpec

_HEAD: Final = """\
# Made by dvd plan. Routers listen on their own host only: give api_keys or api_key_file, and keys, and drop
# routers.host, to let others in; deploy/cluster/example.yaml explains every key.
"""


def cluster_yaml(layout: Layout, cards: Cards, directory: str) -> str:
    """``directory``: of the checkpoint, on every node.

    Raises:
        ConfigError: a layout that `dvd up` would not take; names the key.
    """
    language = cards.language.language_part()
    content: dict[str, Any] = {
        "model": directory,
        "transports": ["auto"],
        "vision": {"replicas": layout.num_vision, "gpus": cards.vision.vision_part().devices},
        "language": {"replicas": layout.num_language, "gpus": 1, "tensor_parallel_size": language.devices},
        "routers": {"replicas": layout.num_routers, "host": "127.0.0.1"},
    }
    try:
        ClusterSpec(**content)
    except ValidationError as error:
        raise ConfigError(f"cluster.yaml: {explain(ClusterSpec, error)}") from None
    return _HEAD + yaml.safe_dump(content, sort_keys=False)
