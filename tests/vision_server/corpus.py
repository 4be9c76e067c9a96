"""Bad images, made from good ones and by hand (RELIABILITY.md section 8): name -> bytes.

Deterministic. Nothing here is large; what it would become is.
"""

import io
import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, ImageCms, PngImagePlugin

from tests.vision_server.neighbours import encoded, picture

KINDS = ("PNG", "BMP", "GIF", "WEBP", "JPEG")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def corpus() -> dict[str, bytes]:
    """All of it."""
    parts = (
        damaged,
        chunk_by_chunk,
        impostors,
        modes,
        orientations,
        animations,
        metadata,
        sizes,
        pngs,
        jpegs,
        gifs,
        webps,
        bmps,
    )
    return {name: data for part in parts for name, data in part()}


def damaged() -> Iterator[tuple[str, bytes]]:
    """Cut off, and with bits flipped."""
    rng = random.Random(7)
    for kind in KINDS:
        data = encoded(picture(160, 120), kind)
        for tenth in range(1, 10):
            yield f"{kind} cut to {tenth}/10", data[: len(data) * tenth // 10]
        for length in (1, 4, 12, 30):
            yield f"{kind} cut to {length} bytes", data[:length]
        yield f"{kind} without its end", data[:-1]
        for number in range(20):
            broken = bytearray(data)
            for _ in range(rng.randint(1, 8)):
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            yield f"{kind} with flipped bits, {number}", bytes(broken)


def chunk_by_chunk() -> Iterator[tuple[str, bytes]]:
    """A PNG cut off before and inside each of its chunks, and with each check sum, kind and length wrong."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 50)
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = picture(60, 40).quantize(16)
    data = encoded(plain, pnginfo=info, icc_profile=icc, transparency=bytes(range(16)), dpi=(72, 72))
    at = len(PNG_MAGIC)
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8].decode(), at + 12 + length
        for name, cut in {"before": at, "in the length of": at + 2, "in the body of": at + 8 + length // 2}.items():
            yield f"PNG cut {name} {kind}", data[:cut]
        yield f"PNG with a bad check sum of {kind}", data[: end - 1] + bytes([data[end - 1] ^ 1]) + data[end:]
        yield f"PNG with {kind} of another kind", data[: at + 4] + b"zzZz" + data[at + 8 :]
        yield f"PNG with {kind} twice", data[:end] + data[at:end] + data[end:]
        yield f"PNG without {kind}", data[:at] + data[end:]
        for number in (0, length + 1, 2**31 - 1, 2**32 - 1):
            yield f"PNG with {kind} of {number} bytes, it says", data[:at] + struct.pack(">I", number) + data[at + 4 :]
        at = end


def impostors() -> Iterator[tuple[str, bytes]]:
    """One format's beginning on another's body, and files that are two things at once."""
    samples = {kind: encoded(picture(64, 64), kind) for kind in KINDS}
    for kind, data in samples.items():
        for other, body in samples.items():
            if other != kind:
                yield f"{kind} on {other}", data[:16] + body[16:]
        yield f"{kind} then HTML", data + b"<html><script>alert(1)</script></html>"
        yield f"HTML then {kind}", b"<html></html>" + data
        yield f"{kind} then a ZIP", data + b"PK\x05\x06" + bytes(18)
        yield f"{kind} twice", data + data
    yield "nothing", b""
    yield "zeros", bytes(5000)
    yield "TIFF", encoded(picture(64, 64), "TIFF")
    yield "ICO", encoded(picture(64, 64), "ICO")
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100000 100000\n"


def modes() -> Iterator[tuple[str, bytes]]:
    source = picture(60, 40)
    for mode in ("1", "L", "LA", "P", "RGBA"):
        yield f"PNG {mode}", encoded(source.convert(mode))
    yield "PNG of 16 bits", encoded(Image.new("I;16", (60, 40), 40_000))
    yield "PNG of 16 bits and three channels", png(60, 40, 16, 2, bytes((60 * 6 + 1) * 40))
    yield "PNG of a palette with transparency", encoded(source.quantize(16), transparency=bytes(range(16)))
    yield "PNG with a transparent colour", encoded(source, transparency=(1, 2, 3))
    for mode in ("L", "CMYK", "YCbCr"):
        yield f"JPEG {mode}", encoded(source.convert(mode), "JPEG")
    for mode in ("1", "L", "P", "RGBA"):
        yield f"BMP {mode}", encoded(source.convert(mode), "BMP")
    yield "WEBP RGBA", encoded(source.convert("RGBA"), "WEBP", lossless=True)


def orientations() -> Iterator[tuple[str, bytes]]:
    for number in (*range(10), 65535):
        exif = Image.Exif()
        exif[0x0112] = number
        for kind in ("JPEG", "PNG", "WEBP"):
            yield f"{kind} of orientation {number}", encoded(picture(60, 40), kind, exif=exif.tobytes())
    head = b"Exif\0\0II*\0"
    for name, tail in {
        "an EXIF that points at itself": struct.pack("<IH", 8, 1) + struct.pack("<HHII", 0x8769, 4, 1, 8),
        "an EXIF of 65535 entries": struct.pack("<IH", 8, 65535) + bytes(40_000),
        "an EXIF that points nowhere": struct.pack("<I", 2**32 - 1),
        "an EXIF whose entry is huge": struct.pack("<IH", 8, 1) + struct.pack("<HHII", 0x0112, 3, 2**31, 8),
        "an EXIF that is empty": b"",
    }.items():
        yield name, encoded(picture(60, 40), "JPEG", exif=head + tail)


def animations() -> Iterator[tuple[str, bytes]]:
    frames = [picture(80, 60, seed=n) for n in range(12)]
    for kind in ("GIF", "WEBP", "PNG"):
        yield f"{kind} that moves", encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    moving = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    yield "PNG that promises 2 ** 31 pictures", moving.replace(b"acTL\0\0\0\x0c", b"acTL\x7f\xff\xff\xff")
    many = [Image.new("P", (2, 2), n % 256) for n in range(3000)]
    yield "GIF of 3000 pictures", encoded(many[0], "GIF", save_all=True, append_images=many[1:], optimize=False)


def metadata() -> Iterator[tuple[str, bytes]]:
    """More beside the picture than in it."""
    body = zlib.compress(bytes((30 * 3 + 1) * 20))
    bomb = zlib.compress(bytes(200_000_000), 9)
    for name, prefix in ((b"zTXt", b"Comment\0\0"), (b"iCCP", b"icc\0\0"), (b"iTXt", b"Comment\0\1\0\0\0")):
        bombed = png_of(chunk(b"IHDR", header(30, 20)), chunk(name, prefix + bomb), body)
        yield f"PNG with a bomb in {name.decode()}", bombed
    text = chunk(b"tEXt", b"Comment\0" + b"x" * 5_000_000)
    yield "PNG with 5 MB of text", png_of(chunk(b"IHDR", header(30, 20)), text, body)
    many = chunk(b"tEXt", b"k\0v") * 50_000
    yield "PNG with 50000 texts", png_of(chunk(b"IHDR", header(30, 20)), many, body)
    for kind in ("JPEG", "PNG", "WEBP"):
        yield (
            f"{kind} with 2 MB of colour profile",
            encoded(picture(60, 40), kind, icc_profile=bytes(range(256)) * 8000),
        )
    jpeg = encoded(picture(60, 40), "JPEG")
    yield "JPEG with 2000 comments", jpeg[:2] + (b"\xff\xfe\x00\x40" + b"x" * 62) * 2000 + jpeg[2:]
    yield "JPEG with 5 MB of fill bytes", jpeg[:2] + b"\xff" * 5_000_000 + jpeg[3:]
    xmp = b"http://ns.adobe.com/xap/1.0/\0" + b'<x:xmpmeta tiff:Orientation="9"' * 1500
    yield "JPEG with XMP that is none", jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + jpeg[2:]


def sizes() -> Iterator[tuple[str, bytes]]:
    for width, height in ((1, 1), (1, 65535), (65535, 1), (200, 1), (1, 200)):
        yield f"PNG of {width}x{height}", encoded(Image.new("RGB", (width, height), "green"))
    for side in (7072, 13_000, 30_000):
        yield f"PNG of {side}x{side} in one bit", png(side, side, 1, 0, bytes(side * ((side + 7) // 8 + 1)))
    yield "PNG of 50 million pixels in one row", png(50_000_000, 1, 1, 0, bytes(6_250_001))
    yield "PNG of 7071x7071 in one bit", png(7071, 7071, 1, 0, bytes(7071 * 885))


def pngs() -> Iterator[tuple[str, bytes]]:
    rows = bytes((30 * 3 + 1) * 20)
    yield "PNG without pixels", png_of(chunk(b"IHDR", header(30, 20)), b"", b"")
    yield "PNG of no width", png(0, 20, 8, 2, rows)
    yield "PNG of 2 ** 31 pixels a side", png(2**31 - 1, 2**31 - 1, 8, 2, rows)
    yield "PNG with a deflate bomb for pixels", png(30, 20, 8, 2, rows + bytes(300_000_000))
    yield "PNG of too few pixels", png(30, 20, 8, 2, rows[:300])
    yield "PNG of unknown depth", png(30, 20, 7, 2, rows)
    yield "PNG of unknown colour", png(30, 20, 8, 5, rows)
    yield "PNG with a palette of nothing", png(30, 20, 8, 3, bytes(31 * 20))
    yield "PNG whose chunk is too long", PNG_MAGIC + struct.pack(">I", 2**31 - 1) + b"IHDR" + header(30, 20)
    yield "PNG with bad check sums", encoded(picture(60, 40)).replace(b"IDAT", b"IDAT", 1)[:-20] + bytes(20)
    yield (
        "PNG interlaced",
        png_of(chunk(b"IHDR", header(2000, 2000, interlaced=1)), b"", zlib.compress(bytes(13_000_000))),
    )
    scattered = b"".join(chunk(b"IDAT", bytes([byte])) for byte in zlib.compress(rows))
    yield "PNG in single bytes", PNG_MAGIC + chunk(b"IHDR", header(30, 20)) + scattered + chunk(b"IEND", b"")


def jpegs() -> Iterator[tuple[str, bytes]]:
    yield "JPEG of 500 scans", jpeg_of_scans(1500, 500)
    jpeg = encoded(picture(160, 120), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    for name, size in {
        "65535x700": (700, 65535),
        "65535x65535": (65535, 65535),
        "0x120": (120, 0),
        "160x0": (0, 160),
    }.items():
        yield f"JPEG that claims {name}", jpeg[:at] + struct.pack(">HH", *size) + jpeg[at + 4 :]
    yield "JPEG without tables", jpeg.replace(b"\xff\xdb", b"\xff\xfe").replace(b"\xff\xc4", b"\xff\xfe")
    yield "JPEG of arithmetic coding", jpeg.replace(b"\xff\xc0", b"\xff\xc9")
    yield "JPEG of restart markers", jpeg[: jpeg.index(b"\xff\xda") + 14] + b"\xff\xd0" * 100_000 + b"\xff\xd9"
    several = io.BytesIO()
    picture(60, 40).save(several, "MPO", save_all=True, append_images=[picture(60, 40, seed=1)])
    yield "JPEG of several pictures", several.getvalue()
    yield "JPEG of several pictures, cut", several.getvalue()[:900]


def jpeg_of_scans(side: int, num_scans: int) -> bytes:
    """Each scan costs a look at every pixel, and a few bytes."""
    flat = encoded(Image.new("L", (side, side), 90), "JPEG", progressive=True)
    last = flat.rindex(b"\xff\xda")
    return flat[:last] + flat[last:-2] * num_scans + b"\xff\xd9"


def gifs() -> Iterator[tuple[str, bytes]]:
    gif = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    for width, height in ((65535, 65535), (65535, 700), (0, 0), (1, 1)):
        gif[6:10] = struct.pack("<HH", width, height)
        yield f"GIF with a canvas of {width}x{height}", bytes(gif)
    gif[6:10] = struct.pack("<HH", 8, 8)
    frame = gif.index(b"\x2c")
    for box in ((0, 0, 65535, 65535), (65535, 65535, 8, 8), (4, 4, 8, 8), (0, 0, 0, 0)):
        yield (
            f"GIF with a picture at {box}",
            bytes(gif[: frame + 1]) + struct.pack("<4H", *box) + bytes(gif[frame + 9 :]),
        )
    for bits in (0, 1, 12, 255):
        yield f"GIF of {bits} bits", bytes(gif[: frame + 10]) + bytes([bits]) + bytes(gif[frame + 11 :])
    yield "GIF of comments", bytes(gif[:frame]) + (b"!\xfe\xff" + b"x" * 255 + b"\0") * 5000 + bytes(gif[frame:])


def webps() -> Iterator[tuple[str, bytes]]:
    webp = encoded(picture(64, 64), "WEBP", lossless=True)
    for size in (0, 2**32 - 1, 10, len(webp) * 2):
        yield f"WEBP of {size} bytes, it says", webp[:4] + struct.pack("<I", size) + webp[8:]

    def canvas(side: int, flags: int, body: bytes) -> bytes:
        extended = b"VP8X" + struct.pack("<II", 10, flags) + 2 * struct.pack("<I", side - 1)[:3]
        return b"RIFF" + struct.pack("<I", 4 + len(extended) + len(body)) + b"WEBP" + extended + body

    for side in (64, 7000, 16_383, 2**24):
        yield f"WEBP with a canvas of {side}", canvas(side, 0, webp[12:])
        moving = b"ANIM" + struct.pack("<IIH", 6, 0, 0)
        picture_bytes = bytes(6) + 2 * struct.pack("<I", 63)[:3] + bytes(4) + webp[12:]
        frame = b"ANMF" + struct.pack("<I", len(picture_bytes)) + picture_bytes
        yield f"WEBP that moves on a canvas of {side}", canvas(side, 2, moving + frame)
        yield f"WEBP without a picture, canvas {side}", canvas(side, 2, moving)


def bmps() -> Iterator[tuple[str, bytes]]:
    def bmp(
        width: int, height: int, bits: int = 24, compression: int = 0, colours: int = 0, body: bytes = b""
    ) -> bytes:
        info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 0, 0, colours, 0)
        palette = bytes(4 * min(colours, 256)) if bits <= 8 else b""
        start = 14 + len(info) + len(palette)
        return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + palette + body

    yield "BMP upside down", bmp(20, -10, body=bytes(60 * 10))
    yield "BMP of negative width", bmp(-20, 10, body=bytes(60 * 10))
    yield "BMP of the lowest height", bmp(20, -(2**31), body=bytes(600))
    yield "BMP of 2 ** 31 pixels", bmp(2**31 - 1, 2**31 - 1)
    yield "BMP of 7000x7000 without pixels", bmp(7000, 7000)
    yield "BMP of 2 ** 31 colours", bmp(20, 10, 8, 0, 2**31, bytes(200))
    for bits in (0, 2, 7, 16, 64, 65535):
        yield f"BMP of {bits} bits", bmp(20, 10, bits, body=bytes(2000))
    for compression in (3, 4, 5, 6, 99):
        yield f"BMP of compression {compression}", bmp(20, 10, 24, compression, body=bytes(2000))
    for name, run in {
        "runs": b"\xff\x01" * 300_000,
        "line ends": b"\0\0" * 300_000,
        "jumps": b"\0\x02\xff\xff" * 200_000,
        "literals cut short": b"\0\xff",
        "an early end": b"\0\1",
    }.items():
        yield f"BMP RLE8 of {name}", bmp(7000, 7000, 8, 1, 256, run)
        yield f"BMP RLE4 of {name}", bmp(7000, 7000, 4, 2, 16, run)


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """``rows``: as they are before compression, each behind its filter byte."""
    return png_of(chunk(b"IHDR", header(width, height, bits, colour)), b"", zlib.compress(rows, 9))


def png_of(head: bytes, more: bytes, pixels: bytes) -> bytes:
    return PNG_MAGIC + head + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def header(width: int, height: int, bits: int = 8, colour: int = 2, interlaced: int = 0) -> bytes:
    return struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
