"""Options of ``dvd profile``. Imports neither torch nor numpy: the command line reads it to know its variables."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import model_validator

from common.service.errors import ConfigError
from common.service.settings import Field, SecretStr, Settings

Count = Annotated[int, Field(ge=1)]


class ProfileSettings(Settings):
    """Measure the engines of a model on this machine, or a running deployment, into a hardware card (JSON)."""

    program: ClassVar[str] = "dvd profile"

    model: str | None = Field(None, description="directory of the checkpoint, or `nano`: its engines, on this machine")
    url: str | None = Field(None, description="a running deployment instead, such as http://127.0.0.1:8000")
    output: Path | None = Field(None, description="file for the card (-o); unset: only the table is printed")
    name: str | None = Field(None, description="of the card; unset: the device")
    price_per_device_hour: float | None = Field(None, ge=0, description="of one device, written into the card")
    seconds: float = Field(10.0, gt=0, description="for each of vision, prompts, generation, transports, router; about")
    rounds: int = Field(3, ge=1, description="at least this many: each round measures everything once")

    device: str = Field("auto", description="of the engines: auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="of weights and arithmetic")
    threads: int | None = Field(None, ge=1, description="CPU threads of the engines; unset: torch's choice")

    tiles: list[Count] = Field([1, 2, 4, 8, 16, 32], min_length=1, description="batches of the vision engine")
    lengths: list[Count] = Field([64, 256, 1024, 4096], min_length=1, description="tokens of prompts")
    prompts: list[Count] = Field([1, 4], min_length=1, description="prompts read at once; of a deployment only 1")
    batches: list[Count] = Field([1, 4, 16, 64], min_length=1, description="sequences that generate at once")
    contexts: list[Count] = Field([128, 1024], min_length=1, description="tokens of sequences that generate")
    transports: list[str] = Field([], description="between two processes here; unset: all there are")

    api_key: SecretStr = Field(SecretStr(""), description="bearer token of the deployment")
    timeout: float = Field(600.0, gt=0, description="seconds one request to the deployment may take")
    image_sizes: list[Count] = Field([448, 896, 1344], min_length=1, description="sides of pictures, pixels")
    clients: list[Count] = Field([2, 4], min_length=1, description="that ask about the largest picture at once")
    hardware: str | None = Field(None, description="what the deployment runs on, in words; it does not say")
    kv_tokens: int | None = Field(None, ge=1, description="that its language server's KV memory holds; likewise")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.model is None) == (self.url is None) and not self.dump_config:
            raise ConfigError("expected a MODEL, or --url of a running deployment, and not both")
        if self.url is not None and self.kv_tokens is None:
            raise ConfigError("--url needs --kv-tokens: no request tells how much the KV memory holds")
        return self
