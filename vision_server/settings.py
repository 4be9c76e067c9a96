"""Options of the vision server."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from common.service.program import WorkerSettings
from common.service.settings import Field
from common.transport.registry import TransportChoice
from vision_server.media import MAX_PIXELS


class VisionSettings(WorkerSettings):
    """The vision server of DvD: images in, features out to language servers."""

    program: ClassVar[str] = "dvd vision"

    model: Path = Field(description="checkpoint directory, in InternVL or transformers format")
    served_model_name: str | None = Field(None, description="name in metrics and status; default: the directory's name")
    name: str = Field("vision-0", description="name of this server, a metric label")
    listen: str = Field("127.0.0.1:9001", description="gRPC address, host:port (port 0: any free one) or unix:/path")
    metrics_listen: str | None = Field("127.0.0.1:0", description="host:port of /metrics; null switches it off")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="of weights and arithmetic")
    max_batch_tiles: int | None = Field(None, ge=1, description="tiles per batch; default: what suits the device")
    max_queued_tiles: int = Field(512, ge=1, description="tiles of all images held at once; more are refused")
    max_tiles_per_image: int = Field(40, ge=1, le=255, description="thumbnail not counted")
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="pixels of one image")
    decode_workers: int = Field(2, ge=1, description="processes that decode and tile images")
    feature_cache_bytes: int = Field(2**30, ge=0, description="of images encoded lately that are kept; 0: none")
    batch_invariant: bool = Field(
        False, description="features of a tile are the same bits whatever it is batched with; costs speed"
    )
    cuda_graphs: bool = Field(True, description="on CUDA, replay batches that were captured at the start")
    compile: bool = Field(False, description="torch.compile the layers, on CUDA; on a CPU the tower's are fused")
    threads: int | None = Field(None, ge=1, description="CPU threads of one batch; default: torch's choice")
    nice: int = Field(
        0,
        ge=0,
        le=19,
        description="OS priority of what computes; 19: only on cores that nobody else wants at the moment",
    )
    transports: tuple[TransportChoice, ...] = Field(
        ("auto",), min_length=1, description="ways to deliver features; auto: all but nixl"
    )
    encode_timeout: float = Field(60.0, gt=0, description="seconds for an image whose caller sets no deadline")
    shutdown_timeout: float = Field(60.0, gt=0, description="seconds to finish admitted images after SIGTERM")

    @model_validator(mode="after")
    def _an_image_must_fit(self) -> Self:
        if self.max_queued_tiles <= self.max_tiles_per_image:
            raise ValueError("max_queued_tiles must exceed max_tiles_per_image, or the largest image never gets in")
        return self

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.resolve().name
