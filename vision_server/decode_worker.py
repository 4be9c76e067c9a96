"""``python -m vision_server.decode_worker``: the process in which strangers' bytes become tiles, one medium at a time.

Started by ``decode_pool.py``, which it shares one socket with and nothing else. It imports and tries out all it needs,
gives up everything else (``sandbox.py``), and serves until the other end closes. Whatever cannot be told as an outcome
ends the process, which costs that one medium. No torch here: starting takes a fraction of a second.
"""

import gc
import io
import mmap
import os
import signal
import socket
import sys
from itertools import islice
from typing import Final

import av
import numpy as np
from PIL import Image, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin

from common.model.geometry import Tiling, count_tiles
from common.service.errors import InvalidRequest
from common.service.parent import die_with
from common.service.priority import yield_to_others
from vision_server import sandbox, video
from vision_server.decode_job import MAX_RECORD_BYTES, READY, Job, Kind, Outcome
from vision_server.media import FORMATS, decode, invalid_image, open_image, upright_size
from vision_server.tiling import Tiles, make_tiles, tiles_of_pixels

_LAZILY_IMPORTED: Final = (MpoImagePlugin, TiffImagePlugin, WebPImagePlugin)
"""By Pillow, when it meets a file that needs them: too late in here."""


class DecodeWorker:
    """Args:
    seconds: of processor time for one medium; then the process is killed.
    """

    def __init__(self, channel: socket.socket, max_pixels: int, seconds: float) -> None:
        self._channel = channel
        self._max_pixels = max_pixels
        self._seconds = seconds

    def serve(self) -> None:
        """Returns when the other end has closed."""
        while True:
            record, descriptors, _, _ = socket.recv_fds(self._channel, MAX_RECORD_BYTES, 2)
            if not record:
                return
            job = Job.unpack(record)
            source, target = descriptors
            signal.setitimer(signal.ITIMER_PROF, self._seconds)  # SIGPROF ends the process
            try:
                outcome = self._work(job, source, target)
            finally:
                os.close(source)
                os.close(target)
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._channel.send(outcome.pack())

    def _work(self, job: Job, source: int, target: int) -> Outcome:
        data = os.pread(source, os.fstat(source).st_size, 0)
        try:
            if job.kind == Kind.PROBE:
                facts = video.probe(data, max_pixels=self._max_pixels)
                return Outcome(job.number, seconds=facts.seconds, num_frames=facts.num_frames)
            if job.options.num_frames:
                return Outcome(job.number, self._video(job, data, target))
            return Outcome(job.number, self._image(job, data, target))
        except InvalidRequest as refusal:
            return Outcome.refused(job.number, refusal)
        except MemoryError:
            return Outcome.refused(job.number, invalid_image("the medium takes too much memory to decode"))

    def _image(self, job: Job, data: bytes, target: int) -> int:
        image, tiling = open_image(data, max_pixels=self._max_pixels), job.options.tiling
        width, height = upright_size(image, exif_orientation=job.options.exif_orientation)
        num_tiles = count_tiles(width, height, tiling)
        if job.kind == Kind.MEASURE:
            return num_tiles
        wanted = job.options.wanted(num_tiles)
        rgb = decode(image, exif_orientation=job.options.exif_orientation)
        make_tiles(rgb, tiling, _room(target, len(wanted), tiling.tile_size), wanted)
        return len(wanted)

    def _video(self, job: Job, data: bytes, target: int) -> int:
        num_frames, side = job.options.num_frames, job.options.tiling.tile_size
        if job.kind == Kind.MEASURE:
            video.probe(data, max_pixels=self._max_pixels)
            return num_frames
        wanted, one_tile = job.options.wanted(num_frames), Tiling(1, 1, use_thumbnail=False, tile_size=side)
        tiles, shown = _room(target, len(wanted), side), None
        frames = video.sample_frames(data, num_frames, max_pixels=self._max_pixels)
        for number, frame in enumerate(islice(frames, wanted.start, wanted.stop)):
            if frame is shown:
                tiles[number] = tiles[number - 1]
            else:
                tiles_of_pixels(frame, one_tile, tiles[number : number + 1])
            shown = frame
        return len(wanted)


def _room(target: int, num_tiles: int, side: int) -> Tiles:
    shape = (num_tiles, side, side, 3)
    memory = mmap.mmap(target, num_tiles * side * side * 3)
    return np.frombuffer(memory, np.uint8).reshape(shape)


def _warm_up() -> None:
    """Compile kernels, or read them from disk, and have libraries load what they load late."""
    tiling = Tiling(1, 2, use_thumbnail=True, tile_size=8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for width, height in ((9, 16), (400, 2)):  # a wide one and a tower, once they are turned: there are two kernels
        picture = Image.new("RGB", (width, height))
        for kind in FORMATS:
            buffer = io.BytesIO()
            picture.save(buffer, kind, exif=exif.tobytes())
            make_tiles(decode(open_image(buffer.getvalue()), exif_orientation=True), tiling)
    for frame in video.sample_frames(_film(), 1):
        tiles_of_pixels(frame, tiling)


def _film() -> bytes:
    """A video of one black frame."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=1)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        black = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        for frame in (black, None):
            for packet in stream.encode(frame):
                container.mux(packet)
    return buffer.getvalue()


def main() -> None:
    parent, descriptor, memory_bytes, max_pixels = (int(argument) for argument in sys.argv[1:5])
    seconds, nice = float(sys.argv[5]), int(sys.argv[6])
    die_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the server, which closes the socket when it is done
        signal.signal(number, signal.SIG_IGN)
    _warm_up()  # not in the idle class: what it may have to compile is kept under a lock that others wait for
    yield_to_others(nice)
    channel = socket.socket(fileno=descriptor)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    is_filtered = sandbox.enter(memory_bytes)
    gc.freeze()
    os.dup2(nowhere, sys.stderr.fileno())  # until here the operator should read what fails
    channel.send(READY + (b" filtered" if is_filtered else b""))
    DecodeWorker(channel, max_pixels, seconds).serve()


if __name__ == "__main__":
    main()
