"""The media of a request as they come: parts become bytes that have a price in tiles and no place in the prompt yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from common.model.geometry import Tiling, count_tiles
from common.service import metrics
from common.service.errors import InvalidRequest
from protos.status_pb2 import ModelInfo
from protos.vision_pb2 import ProbeReply, TilingOptions
from router.api.named_media import MediaNames, NamedFrames
from router.api.schemas import ChatCompletionRequest, ImageUrl, Part, VideoUrl
from router.api.tiles import FRAME, TileBudgets
from router.api.video import FrameWish, resolve_frames
from router.media import CompressedImage, MediaLimits, load_image, load_video
from router.settings import RouterSettings


@dataclass(slots=True)
class Medium:
    """An image, a video file, or a frame of a list."""

    data: bytes
    param: str  # where it stands in the request, for error messages
    tiling: TilingOptions
    num_tiles: int  # thumbnail included; of a video the most it may have, until its length is known
    is_video: bool = False
    frames: FrameWish | None = None  # of a video whose number of frames depends on its length

    def set_length(self, length: ProbeReply) -> None:
        """The number of frames is known now."""
        if self.frames is not None:
            self.num_tiles = self.tiling.num_frames = self.frames.count(length)
            self.frames = None


@dataclass(frozen=True, slots=True)
class ImagePart:
    """One image of a message."""

    medium: Medium


@dataclass(frozen=True, slots=True)
class VideoPart:
    """One video of a message: a file, whose tiles are its frames, or one medium for each frame."""

    media: Sequence[Medium]


@dataclass(frozen=True, slots=True)
class MediaCount:
    """Media of all messages, before anything of them is read."""

    images: int
    videos: int  # files and lists of frames
    items: int  # images, files, and each frame of a list

    @classmethod
    def of(cls, request: ChatCompletionRequest) -> "MediaCount":
        lists = (message.content for message in request.messages if isinstance(message.content, list))
        parts = [part for parts in lists for part in parts if part.type != "text"]
        images = sum(part.type == "image_url" for part in parts)
        videos = [_num_items(part) for part in parts if part.type in ("video_url", "video")]
        return cls(images, len(videos), images + sum(videos))


@dataclass(slots=True)
class MediaReader:
    """Reads the media parts of one request, one after another."""

    request: ChatCompletionRequest
    model: ModelInfo
    settings: RouterSettings
    budgets: TileBudgets
    names: MediaNames
    fetched: Mapping[str, bytes]
    num_pixels: int = 0
    num_named: int = 0  # frames of named lists, beyond one for each
    limits: MediaLimits = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        self.limits = MediaLimits(settings.max_item_bytes, settings.max_video_bytes, settings.max_image_pixels)

    def image(self, part: Part, param: str) -> ImagePart:
        """Read and price an ``image_url`` part.

        Raises:
            InvalidRequest, RequestTooLarge: it is missing or cannot be used.
        """
        param = f"{param}.image_url"
        source = ImageUrl(part.image_url) if isinstance(part.image_url, str) else part.image_url or ImageUrl()
        if source.url is None:
            return ImagePart(self._named_image(part, source, param))
        url_param = param if isinstance(part.image_url, str) else f"{param}.url"
        tiling = self.budgets.of(source, param)
        image = self._load(source.url, url_param)
        self.names.bind_image(part.uuid, image, source)
        return ImagePart(self._price(image, tiling, url_param))

    def video(self, part: Part, param: str) -> VideoPart:
        """Read and price a ``video_url`` or ``video`` part. Raises as ``image``."""
        param = f"{param}.{part.type}"
        if part.type == "video":
            if part.video is None:
                return self._named_video(part, VideoUrl(), param)
            return VideoPart(self._frames(part, part.video, param))
        source = VideoUrl(part.video_url) if isinstance(part.video_url, str) else part.video_url or VideoUrl()
        if source.frames is not None:
            _check_only_frames(source, param)
            return VideoPart(self._frames(part, source.frames, f"{param}.frames"))
        if source.url is None:
            return self._named_video(part, source, param)
        url_param = param if isinstance(part.video_url, str) else f"{param}.url"
        wish = resolve_frames(source, self.request, self.settings, param)
        data = load_video(source.url, self.limits, url_param, fetched=self.fetched)
        self.names.bind_video(part.uuid, data, source)
        return VideoPart([self._file(data, wish, url_param)])

    def _named_image(self, part: Part, source: ImageUrl, param: str) -> Medium:
        """As it was said to be when it was sent, unless this part says something itself."""
        named = self.names.image(part.uuid)
        if named is None:
            raise _missing("image", part, param)
        tiling = self.budgets.of(named.source if _says_nothing(source) else source, param)
        return self._price(named.image, tiling, param)

    def _named_video(self, part: Part, source: VideoUrl, param: str) -> VideoPart:
        """Likewise. A list of frames is looked at as it is, now as then."""
        named = self.names.video(part.uuid)
        if named is None:
            raise _missing("video", part, param)
        if isinstance(named, NamedFrames):
            _check_only_frames(source, param)
            self._count_named(len(named.images) - 1, param)
            return VideoPart([self._frame(image, param) for image in named.images])
        said = named.source if _says_nothing(source) else source
        return VideoPart([self._file(named.data, resolve_frames(said, self.request, self.settings, param), param)])

    def _file(self, data: bytes, wish: FrameWish, param: str) -> Medium:
        # No frame is cut: what the other options say of tiles is the same for all videos.
        tiling = TilingOptions(min_dynamic_patch=1, max_dynamic_patch=1, num_frames=wish.limit)
        return Medium(data, param, tiling, wish.limit, is_video=True, frames=None if wish.is_exact else wish)

    def _frames(self, part: Part, urls: Sequence[str], param: str) -> list[Medium]:
        """All of a list."""
        limit = self.settings.max_video_frames
        if len(urls) > limit:
            metrics.MEDIA_REJECTED.labels("items").inc()
            raise InvalidRequest(f"at most {limit} frames are allowed", code="too_many_media_items", param=param)
        params = [f"{param}[{index}]" for index in range(len(urls))]
        images = [self._load(url, place) for url, place in zip(urls, params, strict=True)]
        media = [self._frame(image, place) for image, place in zip(images, params, strict=True)]
        self.names.bind_frames(part.uuid, images)
        return media

    def _frame(self, image: CompressedImage, param: str) -> Medium:
        """An ordinary image that is one tile."""
        medium = self._price(image, self.budgets.of(FRAME, param), param)
        medium.is_video = True
        return medium

    def _count_named(self, num_more: int, param: str) -> None:
        """Frames of a name count like frames that are sent, which was not known before."""
        self.num_named += num_more
        check_limit(MediaCount.of(self.request).items + self.num_named, self.settings, param)

    def _load(self, url: str, param: str) -> CompressedImage:
        exif_orientation = self.settings.exif_orientation
        return load_image(url, self.limits, param, exif_orientation=exif_orientation, fetched=self.fetched)

    def _price(self, image: CompressedImage, tiling: Tiling, param: str) -> Medium:
        self._count_pixels(image, param)
        options = TilingOptions(
            min_dynamic_patch=tiling.min_tiles,
            max_dynamic_patch=tiling.max_tiles,
            use_thumbnail=tiling.use_thumbnail,
            exif_orientation=self.settings.exif_orientation,
        )
        return Medium(image.data, param, options, count_tiles(image.width, image.height, tiling))

    def _count_pixels(self, image: CompressedImage, param: str) -> None:
        self.num_pixels += image.num_pixels
        if self.num_pixels > self.settings.max_request_pixels:
            metrics.MEDIA_REJECTED.labels("pixels").inc()
            message = f"all images together may have at most {self.settings.max_request_pixels} pixels"
            raise InvalidRequest(message, code="invalid_image", param=param)


def check_num_items(request: ChatCompletionRequest, settings: RouterSettings) -> MediaCount:
    """Raises InvalidRequest: ``too_many_media_items``."""
    count = MediaCount.of(request)
    check_limit(count.items, settings, "messages")
    return count


def check_limit(num_items: int, settings: RouterSettings, param: str) -> None:
    """Raises InvalidRequest: ``too_many_media_items``."""
    if num_items > settings.max_media_items:
        metrics.MEDIA_REJECTED.labels("items").inc()
        message = f"at most {settings.max_media_items} images, videos and listed frames are allowed"
        raise InvalidRequest(message, code="too_many_media_items", param=param)


def _num_items(part: Part) -> int:
    """A file is one, a list of frames as many as it has."""
    frames = part.video
    if part.type == "video_url":
        frames = part.video_url.frames if isinstance(part.video_url, VideoUrl) else None
    return 1 if frames is None else len(frames)


def _check_only_frames(source: VideoUrl, param: str) -> None:
    """A list of frames is looked at as it is."""
    for name in ("url", "num_frames", "fps"):
        if getattr(source, name) is not None:
            raise InvalidRequest(f"frames and {name} cannot both be given", param=f"{param}.{name}")


def _says_nothing(source: ImageUrl | VideoUrl) -> bool:
    return all(getattr(source, name) is None for name in source.__struct_fields__)


def _missing(what: str, part: Part, param: str) -> InvalidRequest:
    if part.uuid is not None:
        return InvalidRequest(f"the {what} is unknown or forgotten, send it", code="unknown_media_uuid", param=param)
    return InvalidRequest(f"the {what} is missing, send it", param=param)
