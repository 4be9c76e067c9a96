"""``python -m benchmarks NAME``: run one benchmark; without a name, list them."""

import importlib
import sys
from typing import Final

from benchmarks.settings import require_extra
from common.service.errors import DvdError

BENCHMARKS: Final = (
    "cancel",
    "compare",
    "decode",
    "engine",
    "gpu_parity",
    "gpu_shapes",
    "latency",
    "overhead",
    "overlap",
    "overload",
    "page",
    "quantization",
    "router",
    "simulator.paper",
    "soak",
    "transport",
    "vision",
)
"""Modules of this package, each with a ``main(argv)``."""


def main() -> int | None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHMARKS:
        known = "\n".join(f"  {each}" for each in BENCHMARKS)
        sys.exit(f"usage: python -m benchmarks NAME [OPTIONS], where NAME is one of\n{known}")
    try:
        require_extra()
        status: int | None = importlib.import_module(f"benchmarks.{name}").main(sys.argv[2:])
        return status
    except DvdError as error:
        sys.exit(f"python -m benchmarks: error: {error}")


if __name__ == "__main__":
    sys.exit(main())
