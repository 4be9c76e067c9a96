"""Options of a program: flag > ``DVD_*`` variable > ``--config`` file > default, derived from one typed class.

Each program declares a frozen subclass of ``Settings``; a field is a flag (``max_num_seqs`` -> ``--max-num-seqs``), a
key of the YAML file and a variable (``DVD_MAX_NUM_SEQS``). Unknown names are errors that name the nearest known one.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

import yaml
from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings.exceptions import SettingsError

from common.service.errors import ConfigError

ENV_PREFIX = "DVD_"
_FOR_TESTS = {"DVD_FAILPOINTS", "DVD_TEST_BUILD"}
"""No options: ``common.service.failpoints`` decides on them when a server starts."""


class Settings(BaseSettings):
    """Base of every program's options. Validated once in ``load``, never changed afterwards."""

    program: ClassVar[str] = "dvd"

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_parse_none_str="null")

    config: Path | None = Field(None, description="YAML file with any of these options")
    dump_config: bool = Field(False, description="print the effective options and exit")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """``load`` names its sources itself; a bare constructor call takes its arguments only."""
        return (init_settings,)

    @classmethod
    def load(cls, argv: Sequence[str]) -> Self:
        """Read the options of this program.

        Raises:
            ConfigError: an unknown name, a value of the wrong kind, or a file that cannot be read.
            SystemExit: after ``--help`` or ``--dump-config``.
        """
        flags = _flags(cls, argv)
        variables = _lists_from_commas(cls, EnvSettingsSource(cls, env_parse_none_str="null"))
        chosen_file = flags.get("config") or variables.get("config")
        values = {**_read_file(cls, chosen_file), **variables, **flags}
        try:
            settings = cls(**values)
        except ValidationError as error:
            raise _explain(error) from None
        if settings.dump_config:
            print(settings.dump(), end="")
            sys.exit(0)
        return settings

    def dump(self) -> str:
        """Effective values as YAML, secrets masked."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude={"config", "dump_config"}), sort_keys=False)


def check_environment(programs: Iterable[type[Settings]], environ: Mapping[str, str] | None = None) -> None:
    """Refuse ``DVD_*`` variables that no program knows.

    Raises:
        ConfigError: names the variable and the nearest known one.
    """
    known = {ENV_PREFIX + name.upper() for program in programs for name in program.model_fields} | _FOR_TESTS
    for name in environ if environ is not None else os.environ:
        if name.startswith(ENV_PREFIX) and name not in known:
            raise ConfigError(f"unknown variable {name}{_nearest(name, known)}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _flags(cls: type[Settings], argv: Sequence[str]) -> dict[str, Any]:
    known = {"--" + name.replace("_", "-") for name in cls.model_fields}
    for argument in argv:
        name = argument.split("=", 1)[0]
        if name.startswith("--") and name not in known | {"--help"} and not _is_negated(name, known):
            raise ConfigError(f"unknown flag {name[:64]}{_nearest(name, known)}")
    parser = _Parser(prog=cls.program, description=cls.__doc__, allow_abbrev=False)
    source: CliSettingsSource[Any] = CliSettingsSource(
        cls,
        root_parser=parser,
        parse_args_method=argparse.ArgumentParser.parse_args,
        add_argument_method=argparse.ArgumentParser.add_argument,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="null",
    )
    try:
        return dict(source(args=list(argv))())
    except SettingsError as error:
        raise ConfigError(str(error)) from None


def _is_negated(name: str, known: set[str]) -> bool:
    return name.startswith("--no-") and "--" + name.removeprefix("--no-") in known


def _lists_from_commas(cls: type[Settings], source: EnvSettingsSource) -> dict[str, Any]:
    """Variables as they are: ``DVD_VISION=a,b`` is a list where the field is one."""
    found = {}
    for name, field in cls.model_fields.items():
        raw = source.env_vars.get((ENV_PREFIX + name).lower())
        if raw is None or raw == "null":
            continue
        is_list = "list[" in str(field.annotation) or "tuple[" in str(field.annotation)
        found[name] = raw.split(",") if is_list else raw
    return found


def _read_file(cls: type[Settings], path: object) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(str(path)).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict | None):
        raise ConfigError(f"--config {path}: expected keys and values")
    values = {str(key).replace("-", "_"): value for key, value in (content or {}).items()}
    for name in values:
        if name not in cls.model_fields or name == "config":
            raise ConfigError(f"--config {path}: unknown key {name[:64]}{_nearest(name, cls.model_fields)}")
    return values


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _explain(error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return ConfigError(f"--{name.replace('_', '-')} is required")
    return ConfigError(f"{name}: {first['msg']} (got {str(first.get('input'))[:64]!r})")


__all__ = ["ConfigError", "Field", "InitSettingsSource", "SecretStr", "Settings", "check_environment"]
