"""Names into addresses, as the system knows them; no opinion on which of them are good."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Final

MAX_LOOKUPS: Final = 32
"""At a time. A look-up may be stuck for longer than a fetch may take."""


def look_up(host: str, port: int) -> list[str]:
    """All addresses of a host, each once. Blocks. Raises OSError."""
    try:
        # The dot says that the name is whole: no domain that this machine searches is put behind it.
        found = socket.getaddrinfo(f"{host}.", port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError("not a name") from None
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class SystemResolver:
    """Looks up in threads nobody waits for: stuck ones hold up neither other work nor the end of the process."""

    def __init__(self, look_up: Callable[[str, int], list[str]] = look_up, max_lookups: int = MAX_LOOKUPS) -> None:
        self._look_up = look_up
        self._free = asyncio.Semaphore(max_lookups)

    async def __call__(self, host: str, port: int) -> list[str]:
        """What ``look_up`` says and raises. Whoever is cancelled leaves a thread behind, which counts until its end."""
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[str] | OSError] = loop.create_future()

        def tell(found: list[str] | OSError) -> None:
            self._free.release()
            if not answer.done():  # else nobody waits any more
                answer.set_result(found)

        def look() -> None:
            found: list[str] | OSError
            try:
                found = self._look_up(host, port)
            except OSError as error:
                found = error
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(tell, found)

        threading.Thread(target=look, name="look up a media host", daemon=True).start()
        found = await answer
        if isinstance(found, OSError):
            raise found
        return found
