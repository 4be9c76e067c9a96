"""What rank 0 tells a worker before anything else, as JSON."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Order:
    """Plain values only.

    Attributes:
        rank: of ``num_ranks``; who reads an order is never rank 0.
        device: its own; ranks on a CPU share one.
        directory: private, where the ranks meet.
        timeout: seconds that another rank may take to answer.
        kv_memory_fraction: of the free memory of a GPU, what KV may take.
        threads: CPU threads of one step; None: torch's choice.
    """

    model: str
    rank: int
    num_ranks: int
    device: str
    dtype: str
    directory: str
    timeout: float
    kv_memory_fraction: float
    threads: int | None
    log_level: str

    @classmethod
    def from_json(cls, text: str) -> "Order":
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))
