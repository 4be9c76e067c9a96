"""``dvd``: one command, one subcommand per program. Everything heavy is imported by the subcommand that needs it."""

import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from types import UnionType
from typing import Any, Final, get_args

from benchmarks import settings as bench_options
from benchmarks.profile.settings import ProfileSettings
from common.service.errors import ConfigError, DvdError, StartupError
from common.service.settings import Settings, check_environment
from deploy import settings as options
from deploy.cluster import settings as cluster_options
from deploy.encode.settings import EncodeSettings

_DISTRIBUTION = "dvd-serve"
_USAGE_STATUS = 2

Command = Callable[[Sequence[str]], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0 done, 1 failed, 2 asked for something impossible."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except StartupError as error:
        print(f"dvd: error: {error}", file=sys.stderr)
        return _USAGE_STATUS
    except DvdError as error:
        print(f"dvd: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # what a shell reports for a command ended by Ctrl-C


def _run(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("--help", "-h"):
        print(_help())
        return 0
    if name == "--version":
        print(f"dvd {version(_DISTRIBUTION)}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name[:64]}{_nearest(name, COMMANDS)}; see dvd --help")
    check_environment([*options.PROGRAMS.values(), *_OWN_SETTINGS])
    return COMMANDS[name][0](rest) or 0


def _serve(argv: Sequence[str]) -> int:
    settings = options.ServeSettings.load(model_first(options.ServeSettings, argv))
    from deploy.local import serve

    return serve(settings)


def _set_compute_defaults() -> None:
    """As for the children of ``dvd serve``. Before torch is imported: OpenMP looks once."""
    from deploy.process import compute_defaults

    os.environ.update(compute_defaults(os.environ))


def _vision(argv: Sequence[str]) -> int | None:
    _set_compute_defaults()
    from vision_server.__main__ import main as run

    return run(_resolved(options.PROGRAMS["vision"], argv))


def _language(argv: Sequence[str]) -> int | None:
    _set_compute_defaults()
    from language_server.__main__ import main as run

    return run(_resolved(options.PROGRAMS["language"], argv))


def _router(argv: Sequence[str]) -> int | None:
    from router.__main__ import main as run

    return run(list(argv))


def _chat(argv: Sequence[str]) -> int:
    from deploy.chat import main as run

    _exit_on_sigterm()
    return run(options.ChatSettings.load(model_first(options.ChatSettings, argv)))


def _generate(argv: Sequence[str]) -> int:
    flags, words = generate_arguments(argv)
    settings = options.GenerateSettings.load(flags)
    if len(words) > 1:
        raise ConfigError(f"several prompts, the second is {words[1][:64]!r}; put one in quotes, or say --prompts FILE")
    from deploy.offline.command import main as run

    _exit_on_sigterm()
    return run(settings, words[0] if words else None)


def _encode(argv: Sequence[str]) -> int:
    flags, words = encode_arguments(argv)
    settings = EncodeSettings.load(flags)
    _set_compute_defaults()
    from deploy.encode.command import main as run

    _exit_on_sigterm()
    return run(settings, words)


def _doctor(argv: Sequence[str]) -> int:
    from deploy.doctor import main as run

    return run(options.DoctorSettings.load(model_first(options.DoctorSettings, argv)))


def _keys(argv: Sequence[str]) -> int:
    flags, words = _split(options.KeysSettings, argv)
    settings = options.KeysSettings.load(flags)
    from deploy.keys import main as run

    return run(settings, words)


def _demo(argv: Sequence[str]) -> int:
    from deploy.demo import main as run

    _exit_on_sigterm()
    return run(options.DemoSettings.load(argv))


def _bench(argv: Sequence[str]) -> int | None:
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("--help", "-h"):
        print(_bench_help())
        return 0
    if name not in BENCHMARKS:
        raise ConfigError(f"unknown benchmark {name[:64]}{_nearest(name, BENCHMARKS)}; see dvd bench --help")
    return BENCHMARKS[name][0](rest)


def _bench_serve(argv: Sequence[str]) -> int:
    settings = bench_options.BenchServeSettings.load(argv)
    bench_options.require_extra()
    from benchmarks.serve import main as run

    return run(settings, argv)


def _bench_table18(argv: Sequence[str]) -> int:
    settings = bench_options.Table18Settings.load(model_first(bench_options.Table18Settings, argv))
    bench_options.require_extra()
    from benchmarks.table18 import main as run

    _exit_on_sigterm()
    return run(settings, argv)


def _plan(argv: Sequence[str]) -> int:
    settings = bench_options.PlanSettings.load(model_first(bench_options.PlanSettings, argv))
    bench_options.require_extra()
    from benchmarks.simulator.command import main as run

    return run(settings, argv)


def _profile(argv: Sequence[str]) -> int:
    spelt = [re.sub(r"^-o(?==|$)", "--output", argument) for argument in argv]
    settings = ProfileSettings.load(model_first(ProfileSettings, spelt))
    bench_options.require_extra()
    _set_compute_defaults()
    from benchmarks.profile.command import main as run

    _exit_on_sigterm()
    return run(settings, argv)


def _up(argv: Sequence[str]) -> int:
    flags, words = _split(cluster_options.UpSettings, argv)
    settings = cluster_options.UpSettings.load(flags)
    from deploy.cluster.commands import up

    _exit_on_sigterm()
    return up(settings, words)


def _status(argv: Sequence[str]) -> int:
    argv = ["--format=json" if argument == "--json" else argument for argument in argv]
    flags, words = _split(cluster_options.StatusSettings, argv)
    settings = cluster_options.StatusSettings.load(flags)
    from deploy.cluster.commands import status

    _exit_on_sigterm()
    return status(settings, words)


def _scale(argv: Sequence[str]) -> int:
    flags, words = _split(cluster_options.ScaleSettings, argv)
    settings = cluster_options.ScaleSettings.load(flags)
    from deploy.cluster.commands import scale

    return scale(settings, words)


def _down(argv: Sequence[str]) -> int:
    flags, words = _split(cluster_options.DownSettings, argv)
    settings = cluster_options.DownSettings.load(flags)
    from deploy.cluster.commands import down

    return down(settings, words)


def _exit_on_sigterm() -> None:
    """Unwind the stack, so that servers are stopped and directories removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


COMMANDS: Final[Mapping[str, tuple[Command, str]]] = {
    "serve": (_serve, "MODEL: vision, language and router on this machine"),
    "vision": (_vision, "MODEL: one vision server"),
    "language": (_language, "MODEL: one language server"),
    "router": (_router, "the OpenAI-compatible gateway"),
    "up": (_up, "FILE: a cluster, placed and scaled by Ray"),
    "status": (_status, "[NAME]: what the servers of a cluster do"),
    "scale": (_scale, "[NAME] vision=N language=N routers=N: have more or fewer"),
    "down": (_down, "[NAME]: end a cluster"),
    "chat": (_chat, "[MODEL]: chat in the terminal, with images"),
    "generate": (_generate, "MODEL PROMPT: start, answer about --image FILE, stop"),
    "encode": (_encode, "MODEL IMAGE ... -o FILE: what the vision half makes of images"),
    "keys": (_keys, "init DIR: certificates for servers on several machines"),
    "doctor": (_doctor, "[MODEL]: can this machine run it?"),
    "demo": (_demo, "serve the nano model, ask about three pictures, stop"),
    "bench": (_bench, "NAME: measure a server"),
    "plan": (_plan, "[MODEL]: how many of which servers, simulated"),
    "profile": (_profile, "MODEL -o FILE: how fast this hardware is, as a card for dvd plan"),
}
BENCHMARKS: Final[Mapping[str, tuple[Command, str]]] = {
    "serve": (_bench_serve, "load any OpenAI-compatible server: throughput, latency, goodput"),
    "table18": (_bench_table18, "[MODEL]: the paper's table on this machine: baseline, + DvD, + DvD + ViR"),
}
_OWN_SETTINGS: Final[tuple[type[Settings], ...]] = (
    options.ServeSettings,
    options.ChatSettings,
    options.GenerateSettings,
    EncodeSettings,
    options.DoctorSettings,
    options.KeysSettings,
    options.DemoSettings,
    cluster_options.UpSettings,
    cluster_options.StatusSettings,
    cluster_options.ScaleSettings,
    cluster_options.DownSettings,
    bench_options.BenchServeSettings,
    bench_options.Table18Settings,
    bench_options.PlanSettings,
    ProfileSettings,
)


def model_first(declared: type[Settings], argv: Sequence[str]) -> list[str]:
    """``MODEL --flag ...`` in any order as flags only: the one bare word becomes ``--model``.

    Two bare words are left as they are: ``Settings.load`` knows whether one of them is the value of a misspelt flag.
    """
    flags, words = _split(declared, argv)
    return [f"--model={words[0]}", *flags] if len(words) == 1 else [*flags, *words]


def generate_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """``MODEL PROMPT --flag ...`` in any order as flags, and what is left: the prompt. After ``--`` all is words."""
    argv = ["--format=json" if argument == "--json" else argument for argument in argv]
    end = argv.index("--") if "--" in argv else len(argv)
    flags, words = _split(options.GenerateSettings, argv[:end])
    words += argv[end + 1 :]
    if words and not any(flag.startswith("--model=") for flag in flags):
        flags.append(f"--model={words.pop(0)}")
    # In quotes: a bare value would be divided at its commas.
    return [re.sub(r'^--image=([^"]*)$', r'--image="\1"', flag) for flag in flags], words


def encode_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """``MODEL IMAGE ... -o FILE --flag ...`` in any order as flags and words. After ``--`` all is words."""
    end = argv.index("--") if "--" in argv else len(argv)
    spelt = [re.sub(r"^-o(?==|$)", "--output", argument) for argument in argv[:end]]
    flags, words = _split(EncodeSettings, spelt)
    return flags, [*words, *argv[end + 1 :]]


def _resolved(declared: type[Settings], argv: Sequence[str]) -> list[str]:
    """The same for a program that only knows directories: the name of a model that comes with DvD is replaced."""
    names = {f"--model={name}": name for name in options.EMBEDDED}
    flags = model_first(declared, argv)
    return [f"--model={options.model_directory(names[flag])}" if flag in names else flag for flag in flags]


def _split(declared: type[Settings], argv: Sequence[str]) -> tuple[list[str], list[str]]:
    flags: list[str] = []
    words: list[str] = []
    rest = iter(argv)
    for argument in rest:
        if not argument.startswith("-"):
            words.append(argument)
        elif "=" in argument or not _takes_value(declared, argument):
            flags.append(argument)
        else:
            value = next(rest, None)
            flags.append(argument if value is None else f"{argument}={value}")
    return flags, words


def _takes_value(declared: type[Settings], flag: str) -> bool:
    """False also for what is unknown: ``Settings.load`` names it."""
    field = declared.model_fields.get(flag.removeprefix("--").replace("-", "_"))
    return field is not None and not _is_switch(field.annotation)


def _is_switch(annotation: Any) -> bool:
    return annotation is bool or (isinstance(annotation, UnionType) and bool in get_args(annotation))


def _help() -> str:
    lines = [f"  {name:<10}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dvd COMMAND [options]",
            "",
            "Decoupled vision-language serving: InternVL3.5 with vision and language on separate servers.",
            "",
            *lines,
            "",
            "dvd COMMAND --help lists its options; each is also a DVD_* variable and a key of --config FILE.",
            "MODEL is a directory with a checkpoint, or comes with DvD: `nano`, and `nano-flash` with a router.",
        ]
    )


def _bench_help() -> str:
    lines = [f"  {name:<10}{about}" for name, (_, about) in BENCHMARKS.items()]
    return "\n".join(["usage: dvd bench NAME [options]", "", *lines, "", "dvd bench NAME --help lists its options."])


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


if __name__ == "__main__":
    sys.exit(main())
