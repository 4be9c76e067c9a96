"""``torch.compile``: where what it makes is kept between runs."""

import os
from pathlib import Path


def keep_compiled() -> None:
    """In the user's cache directory, unless the environment names another; torch's own choice is lost at a reboot."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dvd" / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory))
