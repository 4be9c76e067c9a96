"""``python -m language_server --model DIRECTORY ...``: startup -> serve -> drain."""

import sys
from collections.abc import Sequence

import torch

from common.service.priority import yield_to_others
from common.service.program import run_program, run_worker
from language_server.server import LanguageServer
from language_server.settings import LanguageSettings

TITLE = "language server"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a language server until SIGTERM or SIGINT; returns the exit status."""
    return run_program(TITLE, LanguageSettings, argv, run)


async def run(settings: LanguageSettings) -> int:
    """0 after a drain, 1 when the engine died."""
    yield_to_others(settings.nice)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return await run_worker(TITLE, lambda: LanguageServer(settings))


if __name__ == "__main__":
    sys.exit(main())
