"""How many tiles an image may have: the part, the request, ``detail`` and the configuration, in this order."""

from typing import Final

from common.model.geometry import Tiling
from common.service.errors import InvalidRequest
from protos.status_pb2 import ModelInfo
from router.api.schemas import ChatCompletionRequest, DvdFields, ImageUrl, ProcessorKwargs
from router.settings import RouterSettings

_Asked = tuple[int | None, str]  # a number, and the field that holds it

FRAME: Final = ImageUrl(url="", max_dynamic_patch=1, min_dynamic_patch=1)
"""A frame of a video is one tile, whatever else is said."""


class TileBudgets:
    """The budgets of one request.

    Args:
        num_images: among which a shared budget is divided.

    Raises:
        InvalidRequest: the request asks for more tiles for every image than this server allows.
    """

    def __init__(
        self, request: ChatCompletionRequest, model: ModelInfo, settings: RouterSettings, num_images: int
    ) -> None:
        self._request = request
        self._kwargs = request.mm_processor_kwargs or ProcessorKwargs()
        self._model = model
        self._settings = settings
        is_shared = ((request.dvd or DvdFields()).tile_budget or settings.tile_budget) == "shared"
        self._num_sharing = max(1, num_images) if is_shared else 1
        for value, param in (*self._request_wide("max_dynamic_patch"), *self._request_wide("min_dynamic_patch")):
            self._check_limit(value, param)

    def of(self, source: ImageUrl, param: str) -> Tiling:
        """The budget of one image.

        Raises:
            InvalidRequest: more tiles than this server allows, or a minimum above the maximum.
        """
        model = self._model
        if not model.dynamic_image_size:
            return Tiling(1, 1, model.use_thumbnail, model.image_size)
        asked_max, max_param = self._asked(source, "max_dynamic_patch", param)
        asked_min, min_param = self._asked(source, "min_dynamic_patch", param)
        self._check_limit(asked_max, max_param)
        max_tiles = asked_max or self._by_default(source)
        if source.max_dynamic_patch is None:
            # As in training: images that are seen together have the tiles of one (INTERNVL.md section 6.3).
            max_tiles = max(1, max_tiles // self._num_sharing)
        # A minimum of the configuration gives way to a smaller maximum; one the client asked for does not.
        min_tiles = asked_min or min(model.min_dynamic_patch or 1, max_tiles)
        if min_tiles > max_tiles:
            raise InvalidRequest(f"min_dynamic_patch is above the maximum of {max_tiles} tiles", param=min_param)
        return Tiling(min_tiles, max_tiles, model.use_thumbnail, model.image_size)

    def _by_default(self, source: ImageUrl) -> int:
        by_detail = {"low": 1, "high": self._model.max_dynamic_patch}.get(source.detail or "auto")
        return by_detail or self._settings.max_dynamic_patch or self._model.max_dynamic_patch or 1

    def _asked(self, source: ImageUrl, name: str, param: str) -> _Asked:
        """The first of the places where this number may stand."""
        own = (getattr(source, name), f"{param}.{name}")
        return next((asked for asked in (own, *self._request_wide(name)) if asked[0] is not None), own)

    def _request_wide(self, name: str) -> tuple[_Asked, _Asked]:
        return (getattr(self._request, name), name), (getattr(self._kwargs, name), f"mm_processor_kwargs.{name}")

    def _check_limit(self, value: int | None, param: str) -> None:
        limit = self._settings.max_tiles_per_image
        if value is not None and value > limit:
            raise InvalidRequest(f"{param.rpartition('.')[2]} may be at most {limit}", param=param)
