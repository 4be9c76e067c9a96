"""Options of the router: bounds of API.md section 2 and resource caps of RELIABILITY.md section 5.6."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from common.service.errors import ConfigError
from common.service.program import KEYS_DESCRIPTION, ServerSettings
from common.service.rpc import MAX_MESSAGE_BYTES
from common.service.settings import Field, SecretStr
from protos.frame import MAX_TILES
from router.api.origins import is_origin
from router.discovery import parse_entry
from router.fetch.policy import parse_domain

MIB = 2**20

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
_PROXY: Final = re.compile(r"http://(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
_OVERLOAD_STATUSES: Final = (429, 503, 529)
MediumBytes = Annotated[int, Field(ge=1, le=MAX_MESSAGE_BYTES - MIB)]
"""What fits into one call to a vision server, with everything that goes along."""


class RouterSettings(ServerSettings):
    """The OpenAI-compatible gateway: takes HTTP requests and coordinates vision and language servers."""

    program: ClassVar[str] = "dvd router"

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes any free one")
    uds: Path | None = Field(None, description="listen on this Unix socket instead of host and port")
    ssl_certfile: Path | None = Field(None, description="speak HTTPS with this certificate, its chain included, in PEM")
    ssl_keyfile: Path | None = Field(None, description="its private key; unset: in the same file")
    ssl_ca_certs: Path | None = Field(
        None, description="let in only clients with a certificate of one of these authorities"
    )
    workers: int = Field(
        1,
        ge=1,
        le=256,
        description="router processes behind one port, where one core is not enough; bounds on what waits and what"
        " is held are divided among them",
    )
    worker_metrics_listen: str = Field(
        "127.0.0.1:0",
        description="host:port of /metrics of the first of several router processes, the next ports are the others';"
        " port 0: free ones, told in the log",
    )

    vision: list[str] = Field(
        min_length=1,
        description="vision servers, comma separated: HOST:PORT, unix:/path, dns:NAME:PORT (all its addresses) or"
        " file:/path (an address a line, read again when it changes)",
    )
    language: list[str] = Field(min_length=1, description="language servers, likewise")
    keys: Path | None = Field(None, description=KEYS_DESCRIPTION)
    discovery_interval: Seconds = Field(5.0, description="seconds between two look-ups of a DNS name")

    served_model_name: list[str] = Field(
        [], description="names clients may ask for, the first is shown; default: what the servers call the model"
    )
    root_path: str = Field(
        "", description="path under which a proxy serves this router; requests may come with it or without"
    )
    allowed_origins: list[str] = Field(
        [], description="origins whose pages may talk to this router from a browser (CORS), * for all; empty: none"
    )
    api_key: list[SecretStr] = Field([], description="accepted bearer tokens; empty: everybody may ask")
    api_keys_file: Path | None = Field(
        None, description="YAML file of tenants, their keys and quotas, read again when it changes (SECURITY.md)"
    )

    max_dynamic_patch: Count | None = Field(None, description="tiles per image by default; unset: the model's value")
    max_tiles_per_image: Count = Field(40, description="most tiles a client may ask for, thumbnail not counted")
    tile_budget: Literal["per_image", "shared"] = Field(
        "per_image", description="tiles each image may have, or all images of a request together, by default"
    )
    split_min_tiles: int = Field(
        4,
        ge=0,
        description="a large image is divided among idle vision servers, each of which gets so many tiles at least;"
        " 0: never",
    )
    exif_orientation: bool = Field(False, description="turn images as their EXIF says; published models do not")
    vir_mode: Literal["off", "auto", "force64"] = Field(
        "auto", description="Flash models, by default: 256 tokens for every tile, as ViR decides, or 64"
    )
    vir_scope: Literal["request", "image", "absolute"] = Field(
        "request",
        description="Flash models, by default: the tiles that a tile is compared with before it is compressed",
    )
    video_frames: Count = Field(8, description="frames of a video that are looked at by default")
    max_video_frames: Count = Field(128, le=MAX_TILES, description="most frames of a video, or in a list of frames")
    max_media_items: Count = Field(128, description="images, videos and listed frames per request")
    max_item_bytes: MediumBytes = Field(20 * 10**6, description="compressed bytes of one image")
    max_video_bytes: MediumBytes = Field(64 * MIB, description="bytes of one video file")
    max_image_pixels: Count = Field(50 * 10**6, description="pixels of one image")
    max_request_pixels: Count = Field(400 * 10**6, description="pixels of all images of a request")
    max_named_media_bytes: int = Field(
        512 * MIB,
        ge=0,
        description="bytes of media that clients gave a uuid to, kept so that later turns may leave them out; 0: none",
    )
    allow_media_urls: bool = Field(False, description="fetch images and videos from public https: URLs")
    allow_private_media: bool = Field(
        False, description="hosts of --allowed-media-domains may be of your own network: names and addresses"
    )
    allowed_media_domains: list[str] = Field(
        [],
        description="fetch them, but only from these hosts, comma separated: HOST or HOST:PORT, and no others where a"
        " redirect leads",
    )
    media_egress_proxy: str | None = Field(
        None,
        description="fetch through this proxy, http://HOST:PORT; it looks names up itself, so that only hosts of"
        " --allowed-media-domains can be asked",
    )
    media_fetch_timeout: Seconds = Field(5.0, description="seconds one fetch may take, redirects included")
    max_media_fetches: Count = Field(32, description="fetches at a time")
    max_n: Count = Field(64, description="choices per request")

    max_body_bytes: Count = Field(128 * MIB, description="bytes of one request body")
    max_held_body_bytes: Count = Field(2048 * MIB, description="bytes of all bodies and images held at once")
    max_header_bytes: Count = Field(32 * 1024, description="bytes of all headers of a request")
    max_headers: Count = Field(256, description="headers of a request")
    header_read_timeout: Seconds = Field(10.0, description="seconds a client has to send its headers")
    body_read_timeout: Seconds = Field(30.0, description="seconds a client has to send its body")
    slow_reader_timeout: Seconds = Field(30.0, description="seconds a client may leave its answer unread")

    sse_keep_alive_interval: float = Field(
        0.0,
        ge=0,
        le=600,
        description="seconds of silence after which a stream gets a comment, also before the first token: the status"
        " 200 goes with it, and errors behind it are events; 0: never",
    )

    max_num_queued_reqs: Count = Field(1024, description="text-only requests waiting for their first token")
    max_num_queued_image_reqs: Count = Field(
        512,
        description="image requests waiting for their first token; never more, in requests and in tiles, than three"
        " quarters of what the servers let wait",
    )
    max_num_queued_tokens: Count = Field(
        2**20, description="prompt tokens of the text-only requests that wait, and of the image requests likewise"
    )
    max_queue_time: Seconds | None = Field(
        None,
        description="requests that would wait longer for their first token, in seconds and as far as can be told, are"
        " refused; default: those that would miss their deadline",
    )
    overload_status: int = Field(
        503, description="HTTP status of a request that is refused because too many wait: 429, 503 or 529"
    )
    request_timeout: Seconds = Field(600.0, description="seconds a request may take in all")
    shutdown_timeout: Seconds = Field(60.0, description="seconds running requests get to end on shutdown")

    hedge_quantile: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="an encode that takes longer than this share of the latest ones is begun on a second, idle vision"
        " server as well; 0: never",
    )

    disable_docs: bool = Field(False, description="answer neither /openapi.json nor /docs")
    playground: bool = Field(
        False,
        description="a page at / to chat with the model and to watch requests on their way; with --api-key it asks for"
        " one",
    )
    metrics_compat: Literal["vllm"] | None = Field(
        None, description="export what is known under the metric names of vLLM as well"
    )
    enable_per_request_metrics: bool = Field(False, description="add stage times to every answer")

    @field_validator("vision", "language")
    @classmethod
    def _check_entries(cls, entries: list[str], info: ValidationInfo) -> list[str]:
        for entry in entries:
            try:
                parse_entry(entry)
            except ValueError as error:
                raise ConfigError(f"--{info.field_name} {entry[:64]}: {error}") from None
        return entries

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, path: str) -> str:
        if re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", path) is None:
            raise ValueError("it begins with a slash and does not end with one, such as /models/vl")
        return path

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if not is_origin(origin):
                raise ValueError("an origin is * or scheme://host[:port], without a path")
        return origins

    @field_validator("overload_status")
    @classmethod
    def _check_overload_status(cls, status: int) -> int:
        if status not in _OVERLOAD_STATUSES:
            raise ValueError(f"one of {', '.join(map(str, _OVERLOAD_STATUSES))} is allowed")
        return status

    @field_validator("allowed_media_domains")
    @classmethod
    def _check_domains(cls, entries: list[str], info: ValidationInfo) -> list[str]:
        for entry in entries:
            try:
                parse_domain(entry, may_be_inside=bool(info.data.get("allow_private_media")))
            except ValueError as error:
                raise ConfigError(f"--allowed-media-domains {entry[:64]}: {error}") from None
        return entries

    @field_validator("media_egress_proxy")
    @classmethod
    def _check_proxy(cls, proxy: str | None) -> str | None:
        if proxy is not None and _PROXY.fullmatch(proxy) is None:
            raise ValueError("http://HOST:PORT is expected")
        return proxy

    @model_validator(mode="after")
    def _check_media_hosts(self) -> "RouterSettings":
        for name in ("allow_private_media", "media_egress_proxy"):
            if getattr(self, name) and not self.allowed_media_domains:
                raise ValueError(f"{name} needs allowed_media_domains: the hosts it is for")
        return self

    @model_validator(mode="after")
    def _check_ssl(self) -> "RouterSettings":
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ConfigError("--ssl-keyfile and --ssl-ca-certs are of no use without --ssl-certfile")
        return self

    @model_validator(mode="after")
    def _check_tile_budget(self) -> "RouterSettings":
        if self.max_dynamic_patch is not None and self.max_dynamic_patch > self.max_tiles_per_image:
            raise ValueError("max_dynamic_patch is above max_tiles_per_image")
        return self

    @model_validator(mode="after")
    def _check_video_frames(self) -> "RouterSettings":
        if self.video_frames > self.max_video_frames:
            raise ValueError("video_frames is above max_video_frames")
        return self
