"""``python -m language_server.tensor_parallel PARENT``: what rank 0 starts, with a socket as stdin."""

import sys

from common.service.parent import die_with


def main() -> None:
    """Tie us to our parent before the imports, which take seconds."""
    die_with(int(sys.argv[1]))
    from language_server.tensor_parallel import worker

    worker.main()


if __name__ == "__main__":
    main()
