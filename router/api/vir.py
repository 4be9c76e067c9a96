"""Which tiles a Flash model compresses: what the client asked for, else the server's setting, else the checkpoint."""

from typing import Final

from common.service.errors import InvalidRequest
from protos.status_pb2 import ModelInfo
from protos.vision_pb2 import (
    VIR_MODE_AUTO,
    VIR_MODE_FORCE64,
    VIR_MODE_OFF,
    VIR_SCOPE_ABSOLUTE,
    VIR_SCOPE_IMAGE,
    VIR_SCOPE_REQUEST,
    VirMode,
    VirOptions,
    VirScope,
)
from router.api.schemas import ChatCompletionRequest, DvdFields, VirFields
from router.settings import RouterSettings

_MODES: Final[dict[str, VirMode]] = {"off": VIR_MODE_OFF, "auto": VIR_MODE_AUTO, "force64": VIR_MODE_FORCE64}
_SCOPES: Final[dict[str, VirScope]] = {
    "request": VIR_SCOPE_REQUEST,
    "image": VIR_SCOPE_IMAGE,
    "absolute": VIR_SCOPE_ABSOLUTE,
}


def resolve_vir(
    request: ChatCompletionRequest, model: ModelInfo, settings: RouterSettings, num_images: int
) -> VirOptions | None:
    """The options of all images of a request; None for a model that compresses nothing.

    The scope is REQUEST only where images really depend on one another: where ViR decides, and there are several.

    Raises:
        InvalidRequest: ``unsupported_parameter`` for a wish that only a Flash model can fulfil.
    """
    asked = (request.dvd or DvdFields()).vir or VirFields()
    if not model.is_flash:
        _check_base(asked)
        return None
    mode = _MODES[asked.mode or settings.vir_mode]
    scope = _SCOPES[asked.scope or settings.vir_scope]
    if scope == VIR_SCOPE_REQUEST and (mode != VIR_MODE_AUTO or num_images < 2):
        scope = VIR_SCOPE_IMAGE
    return VirOptions(
        mode=mode,
        scope=scope,
        relative_threshold=_given(asked.relative_threshold, model.vir_relative_threshold),
        absolute_threshold=_given(asked.absolute_threshold, model.vir_absolute_threshold),
    )


def _check_base(asked: VirFields) -> None:
    """A base model has 256 tokens for every tile, whichever words say so."""
    wishes = {
        "mode": asked.mode == "force64",
        "relative_threshold": asked.relative_threshold is not None,
        "absolute_threshold": asked.absolute_threshold is not None,
    }
    for name, is_wished in wishes.items():
        if is_wished:
            param = f"dvd.vir.{name}"
            raise InvalidRequest(f"{param} needs a Flash model", code="unsupported_parameter", param=param)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
