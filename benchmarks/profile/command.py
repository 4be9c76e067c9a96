"""``dvd profile``: options -> measurements -> a table, and a hardware card."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from benchmarks.plan import Target
from benchmarks.profile.settings import ProfileSettings
from benchmarks.profile.turns import Effort, Sizes
from benchmarks.record import hardware, versions
from benchmarks.serve import print_table, shown_command
from benchmarks.simulator.hardware import HardwareCard, Source
from benchmarks.tables import Table, number
from common.service.errors import ConfigError

_FILE_WIDTH: Final = 120
_UNKNOWN: Final = "a deployment, measured from outside"
_SOURCES: Final = (
    "vision, prompts, generation: engines alone in one process; image_s_per_tile: one core; kv_tokens: what a language"
    " server alone on this device would have; transports: two processes of one machine, one message at a time; router:"
    " CPU of the process, in front of servers that do nothing"
)


def main(settings: ProfileSettings, argv: Sequence[str]) -> int:
    """Measure, print the table and write the card. Raises DvdError; nothing is written then."""
    if settings.output is not None and not settings.output.resolve().parent.is_dir():
        raise ConfigError(f"--output {settings.output}: no such directory")
    effort = Effort(settings.seconds, settings.rounds)
    sizes = Sizes(settings.tiles, settings.lengths, settings.prompts, settings.batches, settings.contexts)
    if settings.url is not None:
        card = _of_deployment(settings, sizes, effort, argv)
    else:
        card = _of_engines(settings, sizes, effort, argv)
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    for table in tables(card):
        print_table(console, table)
    if settings.output is not None:
        _write(settings.output, card)
        console.print(str(settings.output), soft_wrap=True, highlight=False)
    return 0


def _of_engines(settings: ProfileSettings, sizes: Sizes, effort: Effort, argv: Sequence[str]) -> HardwareCard:
    # Only here: a deployment is measured without torch.
    import torch

    from benchmarks.profile import engines, ways
    from common.model.config import load_config
    from common.model.device import choose_device
    from deploy.settings import model_directory

    assert settings.model is not None  # or there would be a URL
    path = model_directory(settings.model)
    names = ways.chosen_transports(settings.transports)
    device = choose_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    show = Console(stderr=True).print if sys.stderr.isatty() else _say_nothing
    show("vision engine")
    vision = engines.measure_vision(path, settings.device, settings.dtype, sizes.tiles, effort)
    engines.release(settings.device)
    show("language engine")
    language = engines.measure_language(path, settings.device, settings.dtype, sizes, effort)
    engines.release(settings.device)
    show("transports")
    transports = ways.measure_transports(
        names,
        load_config(path).text_hidden_size,
        effort,
        lambda text: show(f"transports: {text}"),
    )
    show("router")
    router = ways.measure_router(effort)
    return HardwareCard(
        name=settings.name or _device_name(device.type),
        model=path.name,
        source=Source(kind="measured", text=f"{shown_command('profile', argv, 'dvd')}: {_SOURCES}"),
        versions=versions(),
        hardware=_hardware_in_words(torch.get_num_threads()),
        price_per_device_hour=settings.price_per_device_hour,
        vision=vision,
        language=language,
        transports=transports,
        router=router,
    )


def _of_deployment(settings: ProfileSettings, sizes: Sizes, effort: Effort, argv: Sequence[str]) -> HardwareCard:
    from benchmarks.profile.deployment import measure_deployment

    assert settings.url is not None and settings.kv_tokens is not None  # the options are checked
    target = Target(settings.url, None, settings.api_key.get_secret_value(), settings.timeout)
    found = measure_deployment(target, settings.image_sizes, settings.clients, sizes, settings.kv_tokens, effort)
    return HardwareCard(
        name=settings.name or settings.hardware or _UNKNOWN,
        model=found.model,
        source=Source(kind="measured", text=f"{shown_command('profile', argv, 'dvd')}: {found.sources}"),
        hardware=settings.hardware or _UNKNOWN,
        price_per_device_hour=settings.price_per_device_hour,
        vision=found.vision,
        language=found.language,
        transports=found.transports,
        router=found.router,
    )


def tables(card: HardwareCard) -> list[Table]:
    """What was measured, by kind of work."""
    rows: list[list[str]] = []
    if card.vision is not None:
        rows += [["vision", f"{each.batch} tiles", number(each.tiles_per_s), "tiles/s"] for each in card.vision.tiles]
        rows.append(["vision", "JPEG to tiles", number(1e3 * card.vision.image_s_per_tile), "CPU ms a tile"])
    if card.language is not None:
        for prompt in card.language.prefill:
            rows.append(
                ["prompts", f"{prompt.batch} x {prompt.length} tokens", number(prompt.tokens_per_s), "tokens/s"]
            )
        for step in card.language.decode:
            rows.append(
                ["generation", f"{step.batch} sequences at {step.context}", number(1e3 * step.step_s), "ms a step"]
            )
        rows.append(["KV memory", "", number(card.language.kv_tokens), "tokens"])
    for name, way in card.transports.items():
        rows.append(["transport", name, number(way.gb_per_s), "GB/s"])
        rows.append(["transport", f"{name}, latency", number(1e6 * way.latency_s), "µs"])
    rows.append(["router", "a request", number(1e6 * card.router.s_per_request), "CPU µs"])
    rows.append(["router", "a token", number(1e6 * card.router.s_per_token), "CPU µs"])
    return [
        Table(f"{card.name}: {card.model}", ["", "", "figure", "unit"], rows, num_labels=2, notes=[card.source.text])
    ]


def _write(path: Path, card: HardwareCard) -> None:
    """Raises ConfigError where nothing can be written."""
    try:
        path.write_text(card.to_json(), "utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from None


def _device_name(kind: str) -> str:
    found = hardware()
    gpus = found.get("gpus")
    return str(gpus[0]).partition(",")[0] if kind == "cuda" and gpus else f"{found['cores']} x {found['cpu']}"


def _hardware_in_words(num_threads: int) -> str:
    found = hardware()
    parts = [f"{found['cpu']}, {found['cores']} cores, {num_threads} threads, {found['memory_gib']} GiB"]
    return "; ".join([*parts, *found.get("gpus", [])])


def _say_nothing(text: str) -> None:
    del text
