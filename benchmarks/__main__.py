"""``python -m benchmarks NAME``: run one benchmark; without a name, list them."""

import sys

from benchmarks import cancel, latency

BENCHMARKS = {"cancel": cancel.main, "latency": latency.main}


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in BENCHMARKS:
        BENCHMARKS[sys.argv[1]](sys.argv[2:])
        return
    known = "\n".join(f"  {name}" for name in BENCHMARKS)
    sys.exit(f"usage: python -m benchmarks NAME [OPTIONS], where NAME is one of\n{known}")


if __name__ == "__main__":
    main()
