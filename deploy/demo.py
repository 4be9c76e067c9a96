"""``dvd demo``: the whole system on this machine, three pictures, three answers, and where the time went."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from deploy.client import ChatClient, user_message
from deploy.local import LocalDeployment, to_stderr
from deploy.nano import data
from deploy.settings import NANO, DemoSettings, ServeSettings, model_directory

_MAX_TOKENS = 32  # a right answer is one short sentence


@dataclass(frozen=True, slots=True)
class Question:
    """A picture with a question that has one right answer."""

    image: Path
    question: str
    answer: str


def questions() -> list[Question]:
    """The pictures in the checkpoint's folder, with what ``data.py`` says of them."""
    directory = model_directory(NANO) / "images"
    samples = {name: data.demo(name) for name in data.DEMOS}
    return [Question(directory / f"{name}.png", each.question, each.answer) for name, each in samples.items()]


def main(settings: DemoSettings) -> int:
    """``dvd demo``: 0 when every answer is right."""
    console = Console(highlight=False)
    echo = to_stderr if settings.verbose else None
    deployment = LocalDeployment(ServeSettings(model=NANO, port=0, enable_per_request_metrics=True), echo=echo)
    with console.status("starting a vision server, a language server and a router ..."):
        deployment.start()
    with deployment, ChatClient(deployment.address) as client:
        console.print(f"ready at {deployment.address} model {NANO} vision x1 language x1\n")
        num_wrong = sum(not _ask(client, console, question) for question in questions())
    console.print("stopped; all answers are right" if num_wrong == 0 else f"stopped; {num_wrong} answers are wrong")
    return 0 if num_wrong == 0 else 1


def _ask(client: ChatClient, console: Console, question: Question) -> bool:
    """Print question, streamed answer and times; returns whether the answer is right."""
    console.print(f"{_shown(question.image)}  {question.question}")
    console.print("  ", end="")
    with contextlib.closing(
        client.stream(
            [user_message(question.question, [question.image])], model=NANO, temperature=0, max_tokens=_MAX_TOKENS
        )
    ) as pieces:
        for piece in pieces:
            console.out(piece, end="", highlight=False)
    answer = client.last
    assert answer is not None  # the stream came to its end
    is_right = answer.text.strip() == question.answer
    console.print("" if is_right else f"  (wrong: expected {question.answer!r})", markup=False)
    console.print(f"  {stage_times(answer.metrics)}\n", style="dim")
    return is_right


def stage_times(metrics: dict[str, Any]) -> str:
    """One line from the ``metrics`` block of an answer: queues count to their stage, waiting for features to none."""
    stages = metrics["dvd"]
    vision = _sum(stages, "decode_ms", "vision_queue_ms", "encode_ms")
    transmission = _sum(stages, "transfer_ms")
    language = _sum(stages, "language_queue_ms", "prefill_ms") + metrics["generation_time_ms"]
    language -= _sum(stages, "feature_wait_ms")
    return f"vision {vision:.0f} ms | transmission {transmission:.1f} ms | language {language:.0f} ms"


def _sum(stages: dict[str, Any], *names: str) -> float:
    """Milliseconds; null means that the stage did not run."""
    return sum(float(stages[name] or 0) for name in names)


def _shown(image: Path) -> Path:
    """Relative where that is shorter."""
    with contextlib.suppress(ValueError):
        return image.relative_to(Path.cwd())
    return image
