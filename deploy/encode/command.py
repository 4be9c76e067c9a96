"""``dvd encode``: images in, features out, in one file. What it has to say goes to stderr."""

import asyncio
import json
import signal
import sys
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from common.service.errors import ConfigError, DvdError, InternalError, InvalidRequest
from common.service.keys import Keys
from common.service.program import Progress
from deploy.encode.features_file import FeaturesFile
from deploy.encode.order import Order
from deploy.encode.peer import Features, VisionPeer, connect
from deploy.encode.pictures import Picture, find_pictures, measure, read_picture
from deploy.encode.settings import EncodeSettings
from protos.status_pb2 import WorkerStatus

_FORMAT: Final = 1
"""Of names and metadata in the file, for readers that will have to tell them apart."""
_BAD_IMAGE: Final = "invalid_image"
_ANY_NUMBER: Final = 2**62
_Load = Callable[[Progress], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Item:
    """An image whose header was read."""

    picture: Picture
    width: int
    height: int


def main(settings: EncodeSettings, words: Sequence[str]) -> int:
    """``words``: MODEL, unless it or a server is named by an option, then images. Returns 0 (143 after SIGTERM), or
    raises.

    Raises:
        ConfigError: the options make no sense, or the file cannot be written.
        InvalidRequest: an image cannot be used, and ``skip_bad`` was not said.
        DvdError: the server cannot be reached, cannot start, or failed.
    """
    model, paths = settings.model, list(words)
    if settings.server is None and model is None:
        if not paths:
            raise ConfigError("there is no model: dvd encode MODEL IMAGE ... -o FILE, or --server HOST:PORT")
        model = paths.pop(0)
    pictures = find_pictures([Path(path) for path in paths])
    # Pillow warns of large images in words of its own; they are judged by number.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    with FeaturesFile(settings.output, settings.dtype) as file:
        return asyncio.run(_until_sigterm(_Encoding(settings, file).run(model, pictures)))


async def _until_sigterm(work: Coroutine[Any, Any, int]) -> int:
    """The signal cancels ``work``. What a handler raises could come in the middle of anything, also where asyncio has
    started a process and not noted it yet."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    has_come = False

    def end() -> None:
        nonlocal has_come
        has_come = True
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, end)
    try:
        return await work
    except asyncio.CancelledError:
        if not has_come:
            raise
        return 128 + signal.SIGTERM


class _Encoding:
    """One run of the command."""

    def __init__(self, settings: EncodeSettings, file: FeaturesFile) -> None:
        self._settings = settings
        self._file = file

    async def run(self, model: str | None, pictures: Sequence[Picture]) -> int:
        """Headers first: what is no image costs no model."""
        items = list(self._measured(pictures))
        _check_any(items)
        server = self._settings.server
        if server is not None:
            keys = Keys.given(self._settings.keys, "client")
            async with connect(server, self._settings.timeout, keys) as peer:
                return await self._encode(items, peer)
        from deploy.encode.local_server import local_server  # and torch with it

        assert model is not None  # there is one of the two
        async with local_server(self._settings, model) as local, connect(local.address, timeout=None) as peer:
            return await self._encode(items, peer, local.load)

    def _measured(self, pictures: Sequence[Picture]) -> Iterator[_Item]:
        exif = self._settings.exif_orientation
        # A server knows its own limit.
        max_pixels = self._settings.max_pixels if self._settings.server is None else _ANY_NUMBER
        for picture in pictures:
            try:
                width, height = measure(read_picture(picture), exif_orientation=exif, max_pixels=max_pixels)
            except InvalidRequest as error:
                self._leave_out(picture, error)
            else:
                yield _Item(picture, width, height)

    async def _encode(self, items: Sequence[_Item], peer: VisionPeer, load: _Load | None = None) -> int:
        """Options are checked before weights are loaded."""
        status = await peer.status()
        order = Order.make(self._settings, status.model)
        names = [item.picture.name for item in items]
        self._file.begin(names, _metadata(status, order, items), num_dimensions=2 if order.is_projected else 3)
        if load is not None:
            with _bar("weights", unit="B", unit_scale=True) as bar:
                await load(lambda done, total: _advance(bar, done, total))
        written = await self._write(items, peer, order)
        _check_any(written)
        await asyncio.to_thread(self._file.finish, _metadata(status, order, written))
        self._report(written, order)
        return 0

    async def _write(self, items: Sequence[_Item], peer: VisionPeer, order: Order) -> list[_Item]:
        """Those that were written."""
        written: list[_Item] = []
        results = _in_order(items, peer, order, self._settings.max_tiles_in_flight)
        with _bar("images", total=len(items), unit="image") as bar:
            async with aclosing(results):
                async for item, features in results:
                    if isinstance(features, InvalidRequest):
                        self._leave_out(item.picture, features)
                    else:
                        name, shape = item.picture.name, features.shape(order)
                        await asyncio.to_thread(self._file.add, name, shape, features.parts, features.tokens_per_tile)
                        written.append(item)
                    bar.update()
        return written

    def _leave_out(self, picture: Picture, error: InvalidRequest) -> None:
        if not self._settings.skip_bad:
            raise _named(error, picture)
        tqdm.write(f"dvd encode: {picture.file}: {error.message}; left out", file=sys.stderr)

    def _report(self, written: Sequence[_Item], order: Order) -> None:
        num_tiles = sum(order.num_tiles(item.width, item.height) for item in written)
        size = f"{self._file.num_bytes / 1e6:.1f} MB"
        print(f"{self._settings.output}: {len(written)} images, {num_tiles} tiles, {size}", file=sys.stderr)


async def _in_order(
    items: Sequence[_Item], peer: VisionPeer, order: Order, max_tiles: int
) -> AsyncGenerator[tuple[_Item, Features | InvalidRequest], None]:
    """Results in the order of ``items``. As many are asked for at once as have ``max_tiles`` tiles, at least one."""
    waiting = deque(items)
    running: deque[tuple[_Item, asyncio.Task[Features | InvalidRequest]]] = deque()
    num_tiles = 0
    try:
        while waiting or running:
            while waiting and (not running or num_tiles + _num_tiles(waiting[0], order) <= max_tiles):
                item = waiting.popleft()
                num_tiles += _num_tiles(item, order)
                running.append((item, asyncio.create_task(_extract(item, peer, order))))
            item, task = running[0]
            features = await task
            running.popleft()
            yield item, features
            num_tiles -= _num_tiles(item, order)
    finally:
        for _, task in running:
            task.cancel()
        await asyncio.gather(*(task for _, task in running), return_exceptions=True)


async def _extract(item: _Item, peer: VisionPeer, order: Order) -> Features | InvalidRequest:
    """Returns the error of an image that cannot be used; every other one is raised with the image's name."""
    try:
        data = await asyncio.to_thread(read_picture, item.picture)
        features = await peer.extract(data, order)
        if features.num_tiles != (expected := _num_tiles(item, order)):
            raise InternalError(f"{expected} tiles were expected and {features.num_tiles} came; has the file changed?")
        return features
    except DvdError as error:
        if isinstance(error, InvalidRequest) and error.code == _BAD_IMAGE:
            return error
        raise _named(error, item.picture) from None


def _check_any(items: Sequence[_Item]) -> None:
    if not items:
        raise InvalidRequest("there is no image left: none of them can be used", code=_BAD_IMAGE)


def _num_tiles(item: _Item, order: Order) -> int:
    return order.num_tiles(item.width, item.height)


def _named(error: DvdError, picture: Picture) -> DvdError:
    return type(error)(f"{picture.file}: {error.message}", code=error.code)


def _metadata(status: WorkerStatus, order: Order, items: Sequence[_Item]) -> dict[str, str]:
    """The same whoever encoded: nothing of machines or times."""
    versions = {"dvd": version("dvd-serve"), "format": _FORMAT}
    return {
        "model": status.model.model,
        "fingerprint": status.fingerprint.hex(),
        **order.metadata(),
        "versions": json.dumps(versions),
        "images": json.dumps([_image_metadata(item, order) for item in items]),
    }


def _image_metadata(item: _Item, order: Order) -> dict[str, Any]:
    grid, num_tiles = order.grid(item.width, item.height), _num_tiles(item, order)
    return {
        "name": item.picture.name,
        "file": item.picture.file,
        "width": item.width,
        "height": item.height,
        "tiles": num_tiles,
        "grid": grid,
        "thumbnail": num_tiles > grid[0] * grid[1],
    }


def _bar(title: str, **options: Any) -> "tqdm[Any]":
    """On a terminal only."""
    return tqdm(desc=title, file=sys.stderr, disable=not sys.stderr.isatty(), **options)


def _advance(bar: "tqdm[Any]", done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
