"""Options of ``dvd encode``. Imports no torch: asking a server needs none."""

from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from pydantic import model_validator

from common.service.errors import ConfigError
from common.service.settings import Field, Settings
from vision_server.media import MAX_PIXELS

_OF_THIS_PROCESS: Final = ("model", "device", "compute_dtype", "threads", "batch_invariant", "max_pixels")


class EncodeSettings(Settings):
    """Write what the vision half of MODEL makes of images into one safetensors file. Words: MODEL, then images and
    directories of images; with --server images only. -o is short for --output, -- ends the options."""

    program: ClassVar[str] = "dvd encode"

    model: str | None = Field(None, description="directory of the checkpoint, or the name of one that comes with DvD")
    server: str | None = Field(
        None, description="ask this running vision server, host:port or unix:/path, instead of loading MODEL here"
    )
    keys: Path | None = Field(
        None,
        description="with --server: directory with certificates as dvd keys init makes them, if the server has some",
    )
    output: Path = Field(description="file to write; a file of this name is replaced once the new one is complete")
    kind: Literal["projected", "last_hidden_state"] = Field(
        "projected",
        description="projected: what a language model reads, [tokens, text hidden]; last_hidden_state: of the vision"
        " tower, [tiles, 1 + patches, vision hidden], class token first",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of what is written")

    min_dynamic_patch: int | None = Field(
        None, ge=1, le=255, description="fewest tiles of an image; unset: the model's"
    )
    max_dynamic_patch: int | None = Field(
        None, ge=1, le=255, description="most tiles of an image, thumbnail not counted; unset: the model's"
    )
    thumbnail: bool | None = Field(
        None, description="the whole image as the last tile, where there are several; unset: as the model does"
    )
    exif_orientation: bool = Field(False, description="turn images as their EXIF says; published models do not")
    vir_mode: Literal["off", "auto", "force64"] = Field(
        "auto", description="Flash models: 256 tokens for every tile, as ViR decides, or 64"
    )
    vir_scope: Literal["request", "image", "absolute"] = Field(
        "image",
        description="Flash models: a tile is compared with those of its image (request means the same), or with none",
    )
    vir_relative_threshold: float | None = Field(
        None, ge=0, le=1, description="Flash models: quantile of the scores; unset: the model's"
    )
    vir_absolute_threshold: float | None = Field(
        None, ge=0, le=1, description="Flash models: least probability to be compressed; unset: the model's"
    )

    skip_bad: bool = Field(False, description="leave images out that cannot be read, instead of ending with status 1")
    max_tiles_in_flight: int = Field(
        64, ge=1, description="tiles that are being encoded or wait to be written; what memory they may take"
    )
    timeout: float = Field(600.0, gt=0, description="with --server: seconds for one image")

    device: str = Field("auto", description="without --server: auto, cpu, cuda, cuda:1, ...")
    compute_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="without --server: of weights and arithmetic"
    )
    threads: int | None = Field(None, ge=1, description="without --server: CPU threads; default: torch's choice")
    batch_invariant: bool = Field(
        False,
        description="without --server: a tile's features do not depend on what it is batched with, to the last bit",
    )
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="without --server: pixels of one image")

    @model_validator(mode="after")
    def _one_way_to_run(self) -> Self:
        if self.server is None:
            return self
        for name in _OF_THIS_PROCESS:
            if getattr(self, name) != type(self).model_fields[name].default:
                flag = "--" + name.replace("_", "-")
                # Not a ValueError: pydantic would show all options beside the message.
                raise ConfigError(f"{flag} cannot be combined with --server: the model is not loaded here then")
        return self
