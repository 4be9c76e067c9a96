"""Media that clients gave names to, so that a later turn need not send them again (API.md section 3, ``uuid``).

A name means something inside one scope only: API key and ``cache_salt``. What is kept are the bytes as they were sent,
and what was said of them; identity stays the hash of the bytes, so a name that is bound to something else never brings
old features back. What was not named for longest is forgotten first.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from router.api.schemas import ImageUrl, VideoUrl
from router.media import CompressedImage

ENTRY_BYTES: Final = 1024
"""What a name costs beside its medium; bounds how many names of tiny media there can be."""


@dataclass(frozen=True, slots=True)
class NamedImage:
    """``source`` has no URL: only what was said of the image."""

    image: CompressedImage
    source: ImageUrl

    @property
    def num_bytes(self) -> int:
        return len(self.image.data)


@dataclass(frozen=True, slots=True)
class NamedVideo:
    """A file. ``source`` has no URL either."""

    data: bytes
    source: VideoUrl

    @property
    def num_bytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class NamedFrames:
    """A video that came as a list of its frames."""

    images: Sequence[CompressedImage]

    @property
    def num_bytes(self) -> int:
        return sum(len(image.data) + ENTRY_BYTES for image in self.images)


_Named = NamedImage | NamedVideo | NamedFrames
_Key = tuple[str, str]  # scope, name


class NamedMedia:
    """The media of all scopes. Requests are read in threads: may be used from any.

    Args:
        max_bytes: of all media together; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._media: OrderedDict[_Key, _Named] = OrderedDict()  # the one named last at the end
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def of(self, scope: str) -> "MediaNames":
        """The names of one scope."""
        return MediaNames(self, scope)

    def _bind(self, key: _Key, medium: _Named) -> None:
        with self._lock:
            self._drop(key)
            num_bytes = medium.num_bytes + ENTRY_BYTES
            if num_bytes > self._max_bytes:  # all others would have to go, and it would not fit then
                return
            while self._num_bytes + num_bytes > self._max_bytes:
                self._drop(next(iter(self._media)))
            self._media[key] = medium
            self._num_bytes += num_bytes

    def _find(self, key: _Key) -> _Named | None:
        with self._lock:
            medium = self._media.get(key)
            if medium is not None:
                self._media.move_to_end(key)
            return medium

    def _drop(self, key: _Key) -> None:
        medium = self._media.pop(key, None)
        if medium is not None:
            self._num_bytes -= medium.num_bytes + ENTRY_BYTES


class MediaNames:
    """What one request may name. A part without a name is ignored here."""

    def __init__(self, media: NamedMedia, scope: str) -> None:
        self._media = media
        self._scope = scope
        self.num_bytes_found = 0

    def bind_image(self, name: str | None, image: CompressedImage, source: ImageUrl) -> None:
        """From now on ``name`` is this image, whatever it was before."""
        if name is not None:
            named = NamedImage(image, msgspec.structs.replace(source, url=None))
            self._media._bind((self._scope, name), named)

    def bind_video(self, name: str | None, data: bytes, source: VideoUrl) -> None:
        """From now on ``name`` is this file."""
        if name is not None:
            self._media._bind((self._scope, name), NamedVideo(data, msgspec.structs.replace(source, url=None)))

    def bind_frames(self, name: str | None, images: Sequence[CompressedImage]) -> None:
        """From now on ``name`` is this list."""
        if name is not None:
            self._media._bind((self._scope, name), NamedFrames(images))

    def image(self, name: str | None) -> NamedImage | None:
        """None: no image of this scope, or forgotten."""
        found = self._find(name)
        return found if isinstance(found, NamedImage) else None

    def video(self, name: str | None) -> NamedVideo | NamedFrames | None:
        """None: no video of this scope, or forgotten."""
        found = self._find(name)
        return None if isinstance(found, NamedImage) else found

    def _find(self, name: str | None) -> _Named | None:
        found = None if name is None else self._media._find((self._scope, name))
        self.num_bytes_found += found.num_bytes if found is not None else 0
        return found
