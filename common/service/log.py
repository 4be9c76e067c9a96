"""One line per record on stderr. What must never be logged is said in API.md section 9."""

import logging
import sys


def configure(process: str, level: str = "info") -> None:
    """Send the records of this process to stderr, marked with its name."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format=f"%(asctime)s {process} %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    # One line per HTTP request of a library tells nobody anything.
    for chatty in ("httpx", "httpcore", "urllib3", "asyncio", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
