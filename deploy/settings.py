"""Options of the commands that are not a server program themselves. Imports the programs' settings, never torch."""

from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BeforeValidator, SecretStr, create_model, model_validator

from common.service.errors import ConfigError
from common.service.program import ServerSettings
from common.service.roles import Role
from common.service.settings import Field, Settings
from language_server.settings import LanguageSettings
from router.settings import RouterSettings
from vision_server.settings import VisionSettings

PROGRAMS: Final[dict[str, type[Settings]]] = {
    "vision": VisionSettings,
    "language": LanguageSettings,
    "router": RouterSettings,
}
NANO = "nano"
EMBEDDED: Final = {name: Path(__file__).parent / name for name in (NANO, "nano-flash")}
"""The models that come with DvD, by name."""

# What `dvd serve` decides itself for each program.
PLACED: Final = frozenset(
    {
        *("config", "dump_config", "announce", "name", "listen", "feature_listen", "uds", "vision", "language"),
        *("model", "served_model_name", "nice", "feature_advertise", "keys", "insecure_network"),
    }
)
# What divides the two tiers: senseless where they are one.
_DIVIDING: Final = (
    *("vision_servers", "language_servers", "vision_devices", "language_devices", "vision_cores", "language_cores"),
    *("vision_nice", "transports", "encrypt_features"),
)


def model_directory(model: str) -> Path:
    """Where a model's files are: ``nano`` and ``nano-flash`` come with DvD, anything else is a directory.

    Raises:
        ConfigError: there is no such directory, or it holds no model.
    """
    directory = EMBEDDED.get(model, Path(model))
    if not directory.is_dir():
        raise ConfigError(
            f"model {model}: no such directory; download the checkpoint first and name its directory, or say {NANO}"
        )
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model {model}: no config.json in this directory")
    return directory.resolve()


def parse_cores(value: object) -> object:
    """``0-3,8`` or ``["0-3", "8"]`` as the cores it means; other values are left for pydantic to refuse."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list):
        return value
    return [core for part in parts for core in _core_range(str(part))]


def _core_range(part: str) -> range:
    first, dash, last = part.strip().partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise ValueError("expected cores such as 0-3,8")
    return range(int(first), int(last or first) + 1)


Cores = Annotated[list[int], BeforeValidator(parse_cores)]


class _ServeOptions(Settings):
    """Vision servers, language servers and a router on this machine. Also takes every option of the three programs."""

    program: ClassVar[str] = "dvd serve"

    model: str = Field(description="directory of the checkpoint, or `nano` for the one that comes with DvD")
    served_model_name: list[str] = Field(
        [], description="names clients may ask for, the first is shown; default: the directory's name"
    )
    vision_servers: int = Field(1, ge=1, le=64, description="vision servers to start")
    language_servers: int = Field(1, ge=1, le=64, description="language servers to start")
    colocated: bool = Field(
        False, description="vision and language in one process, one after the other: the baseline to compare with"
    )
    device: str = Field("auto", description="of both tiers: auto, cpu, cuda, cuda:1, ...")
    vision_devices: list[str] = Field([], description="devices the vision servers take in turn, instead of --device")
    language_devices: list[str] = Field([], description="devices the language servers take in turn")
    vision_cores: Cores = Field([], description="cores of the vision servers, such as 0-3; unset: all")
    language_cores: Cores = Field([], description="cores of the language servers; unset: all")
    vision_nice: int | None = Field(
        None,
        ge=0,
        le=19,
        description="OS priority of the vision servers; unset: 19 on a CPU, idle cores only, decode comes first",
    )
    playground: bool | None = Field(
        None,
        description="a page at / to chat with the model and to watch requests on their way; default: yes, unless API"
        " keys are set",
    )
    startup_timeout: float = Field(1800.0, gt=0, description="seconds until everything must be ready")
    shutdown_timeout: float = Field(60.0, gt=0, description="seconds running requests get to end on shutdown")

    @model_validator(mode="after")
    def _what_is_one_cannot_be_divided(self) -> Self:
        for name in _DIVIDING if self.colocated else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                flag = "--" + name.replace("_", "-")
                # Not a ValueError: pydantic would show all options beside the message.
                raise ConfigError(f"{flag} cannot be combined with --colocated: both tiers are one process then")
        return self

    @property
    def has_playground(self) -> bool:
        """Its files are open to all who reach this router: where there are keys, somebody must have asked for it."""
        return not getattr(self, "api_key", None) if self.playground is None else self.playground

    @property
    def model_names(self) -> list[str]:
        """At least one; the first is what clients see."""
        return self.served_model_name or [model_directory(self.model).name]


def _options_of_programs() -> dict[str, Any]:
    """Every option of the three programs but what ``dvd serve`` decides: what they may be told, it may be told."""
    options: dict[str, Any] = {}
    for program, declared in PROGRAMS.items():
        for name, field in declared.model_fields.items():
            if name in PLACED or name in _ServeOptions.model_fields or name in options:
                continue
            shared = [other for other, its in PROGRAMS.items() if name in its.model_fields]
            marked = copy(field)
            marked.description = f"{field.description} [{', '.join(shared) or program}]"
            options[name] = (field.annotation, marked)
    return options


if TYPE_CHECKING:

    class ServeSettings(_ServeOptions):
        """What the class below is: also all options of the programs."""

        def __init__(self, **values: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
else:
    ServeSettings = create_model(
        "ServeSettings", __base__=_ServeOptions, __doc__=_ServeOptions.__doc__, **_options_of_programs()
    )


class GenerateSettings(ServeSettings):
    """Start MODEL on this machine, answer PROMPT or every line of a file on stdout, stop. --json is short for
    --format json. Also takes every option of `dvd serve`."""

    program: ClassVar[str] = "dvd generate"

    image: list[str] = Field(
        [],
        description="image before the text: a file or a data: URL; repeat it for several. With --prompts: for each"
        " prompt that names none itself",
    )
    prompts: Path | None = Field(
        None,
        description="file with a prompt a line instead of PROMPT, - for stdin: plain text, or a JSON object with"
        " `prompt` and if need be `images`, `system`, `max_tokens`, ...; asked together, answered in order",
    )
    format: Literal["text", "json"] = Field(
        "text",
        description="text as it comes, or one JSON object a prompt with text, reasoning, finish_reason, usage, timing",
    )
    system: str | None = Field(None, description="system message")
    thinking: bool = Field(
        False,
        description="have the model think first; what it thinks goes to stderr for one PROMPT, with --json to"
        " `reasoning`",
    )
    max_tokens: int | None = Field(None, ge=1, description="longest answer in tokens; unset: what the context holds")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; unset: the model's value")
    top_p: float | None = Field(None, gt=0, le=1, description="share of probability to sample from")
    top_k: int | None = Field(None, ge=-1, description="tokens to sample from; -1: all")
    seed: int | None = Field(None, description="of sampling: the same seed, the same answer")


class ColocatedSettings(ServerSettings):
    """A vision and a language server in one process. ``dvd serve --colocated`` writes them."""

    program: ClassVar[str] = "python -m deploy.colocated"

    name: str = Field("colocated", description="name of this process in its announcement")
    metrics_listen: str | None = Field("127.0.0.1:0", description="host:port of /metrics; null switches it off")
    vision: VisionSettings = Field(description="options of `dvd vision`")
    language: LanguageSettings = Field(description="options of `dvd language`")


def options_of(program: str, settings: ServeSettings) -> dict[str, Any]:
    """What ``settings`` says to one program, ready for its options file; what they do not say keeps its default."""
    declared = ColocatedSettings if program == "colocated" else PROGRAMS[program]
    said = settings.model_fields_set - PLACED
    names = [name for name in declared.model_fields if name in said]
    return {name: _plain(getattr(settings, name)) for name in names}


def _plain(value: Any) -> Any:
    """As YAML can say it. Secrets are revealed: the file is private."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


class ChatSettings(Settings):
    """Chat in the terminal, with images. Asks a running server, or starts MODEL on this machine first."""

    program: ClassVar[str] = "dvd chat"

    model: str | None = Field(
        None, description="start this model here (a directory, or `nano`) instead of asking --url"
    )
    url: str = Field("http://127.0.0.1:8000", description="server to ask")
    api_key: SecretStr = Field(SecretStr(""), description="bearer token of the server")
    system: str | None = Field(None, description="system message")
    thinking: bool = Field(False, description="have the model think before each answer; shown dim")
    max_tokens: int | None = Field(None, ge=1, description="longest answer in tokens; unset: what the context holds")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; unset: the model's value")


class DoctorSettings(Settings):
    """Report whether this machine can run DvD, and MODEL if one is named. Exit status 1 when it cannot."""

    program: ClassVar[str] = "dvd doctor"

    model: str | None = Field(None, description="directory of a checkpoint to check, or `nano`")


class KeysSettings(Settings):
    """Make the certificates by which routers and servers on several machines know one another. Words: init DIR (all of
    a new deployment), add DIR NAME (another one, for --role), renew DIR (new ones for all)."""

    program: ClassVar[str] = "dvd keys"

    hosts: list[str] = Field(
        [],
        description="names and addresses of machines, comma separated, for clients that look for those, such as"
        " browsers; our own look for the role",
    )
    days: int = Field(365, ge=1, le=3650, description="days that certificates are valid")
    role: Role | None = Field(None, description="with add: what the certificate is for")


class DemoSettings(Settings):
    """Serve the nano checkpoint, ask about three pictures, stop. Exit status 1 when an answer is wrong."""

    program: ClassVar[str] = "dvd demo"

    verbose: bool = Field(False, description="show what the servers log")
