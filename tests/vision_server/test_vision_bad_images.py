"""Every bad image ends as tiles or as a refusal, in bounded time and memory, and good ones beside it come out right."""

import pytest
import pytest_asyncio

from common.service.errors import InvalidRequest
from tests.vision_server.corpus import corpus, jpeg_of_scans
from tests.vision_server.judge import OPTIONS, judge
from vision_server.decode_pool import DecodePool

pytestmark = pytest.mark.asyncio(loop_scope="module")

MUST_BE_REFUSED = (
    "nothing",
    "TIFF",
    "SVG",
    "PNG cut to 5/10",
    "JPEG cut to 5/10",
    "WEBP cut to 5/10",
    "BMP cut to 5/10",
    "GIF cut to 5/10",
    "HTML then JPEG",
    "PNG with a bomb in zTXt",
    "PNG with a bomb in iCCP",
    "PNG of 7072x7072 in one bit",
    "PNG of 13000x13000 in one bit",
    "PNG of 50 million pixels in one row",
    "JPEG that claims 65535x65535",
    "GIF with a canvas of 65535x65535",
    "WEBP with a canvas of 16777216",
    "BMP of the lowest height",
    "BMP of 2 ** 31 pixels",
    "BMP of 7000x7000 without pixels",
)
MUST_BE_READ = (
    "PNG of 16 bits",
    "PNG of a palette with transparency",
    "PNG of 1x65535",
    "PNG of 65535x1",
    "PNG of 7071x7071 in one bit",
    "JPEG CMYK",
    "JPEG of several pictures",
    "JPEG of 500 scans",
    "an EXIF that points at itself",
    "GIF of 3000 pictures",
    "WEBP that moves",
    "BMP upside down",
    "JPEG then a ZIP",
)
MOST_RESIDENT_BYTES = 1300 * 2**20
"""Of one worker; the greediest file is a moving WebP of 49 megapixels."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool():
    pool = DecodePool(2, max_pixels=50_000_000, max_tiles=40)
    await pool.start()
    yield pool
    await pool.close()


async def test_all_of_them(pool):
    images = corpus()
    verdict = await judge(pool, images)
    assert verdict.outcomes.keys() == images.keys()
    assert verdict.counts.keys() == {"tiles", "invalid_image"}
    assert [name for name in MUST_BE_REFUSED if verdict.outcomes[name] == "tiles"] == []
    assert [name for name in MUST_BE_READ if verdict.outcomes[name] != "tiles"] == []
    assert verdict.peak_bytes < MOST_RESIDENT_BYTES
    assert pool.num_crashes == 0


async def test_what_takes_too_long_is_refused():
    pool = DecodePool(1, max_pixels=50_000_000, max_tiles=40, seconds=0.5)
    await pool.start()
    try:
        with pytest.raises(InvalidRequest):
            await pool.tiles(jpeg_of_scans(6000, 1000), OPTIONS)
        assert pool.num_crashes == 1
    finally:
        await pool.close()
