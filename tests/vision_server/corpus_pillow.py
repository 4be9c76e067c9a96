"""Every image of Pillow's own test suite through the decode pool: ``make bad-images``.

    python -m tests.vision_server.corpus_pillow --directory build/corpus

Fetches Pillow's source by exact version and checksum, once, through pip; nothing is installed. Prints what
became of the files, and ends with status 1 if one ended as neither tiles nor a refusal, or a good image beside them
came out wrong.
"""

import argparse
import asyncio
import hashlib
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Final

from tests.vision_server.judge import Verdict, judge
from vision_server.decode_pool import DecodePool

VERSION: Final = "13.0.0"
SHA256: Final = "cdcd1ba258178f7356d74170c9a81ba4eab6a5d55748bc402a5a2a6fe6be3510"
MIN_FILES: Final = 1000


def fetch(directory: Path) -> Path:
    """The archive, downloaded if it is not there. Exits if it is not the one we know."""
    archive = directory / f"pillow-{VERSION}.tar.gz"
    if not archive.exists():
        directory.mkdir(parents=True, exist_ok=True)
        pinned = directory / "pillow.txt"
        pinned.write_text(f"pillow=={VERSION} --hash=sha256:{SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        what = ["--no-deps", "--no-binary", "pillow", "--require-hashes", "--requirement", str(pinned)]
        subprocess.run([*pip, *what, "--dest", str(directory)], check=True)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{archive} is not the published archive: remove it and try again")
    return archive


def images(archive: Path) -> dict[str, bytes]:
    """All files below ``Tests/images``: path -> bytes."""
    found = {}
    with tarfile.open(archive) as files:
        for member in files:
            _, is_image, name = member.name.partition("/Tests/images/")
            if is_image and (stream := files.extractfile(member)) is not None:
                found[name] = stream.read()
    return found


async def run(found: dict[str, bytes]) -> tuple[Verdict, int]:
    """The verdict, and how many workers were lost."""
    pool = DecodePool(2, max_pixels=50_000_000, max_tiles=40)
    await pool.start()
    try:
        return await judge(pool, found), pool.num_crashes
    finally:
        await pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="where the archive is kept")
    arguments = parser.parse_args()
    found = images(fetch(arguments.directory))
    if len(found) < MIN_FILES:
        sys.exit(f"only {len(found)} files in the archive")
    started = time.monotonic()
    verdict, num_crashes = asyncio.run(run(found))
    print(f"{len(found)} files in {time.monotonic() - started:.1f} s: {dict(verdict.counts)}")
    print(f"workers lost: {num_crashes}; most memory of a worker: {verdict.peak_bytes / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
