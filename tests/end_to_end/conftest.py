"""Whole systems: three processes on this machine, started as ``dvd serve`` starts them."""

import base64
import io
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from openai import OpenAI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from deploy.local import LocalDeployment
from deploy.nano import data
from deploy.process import Echo
from deploy.settings import ServeSettings, model_directory


@contextmanager
def serve(model: str, *, echo: Echo | None = None, **options: Any) -> Iterator[LocalDeployment]:
    """A system that answers; everything is gone when the block ends. One thread a server: tests run beside tests."""
    settings = ServeSettings(model=str(model_directory(model)), port=0, threads=1, **options)
    with LocalDeployment(settings, echo) as deployment:
        yield deployment


@pytest.fixture(scope="session", params=["auto", "grpc"])
def nano(request) -> Iterator[LocalDeployment]:
    """The embedded checkpoint, over the best transport of this machine and over the plainest."""
    with serve("nano", transports=[request.param], enable_per_request_metrics=True) as deployment:
        yield deployment


@pytest.fixture
def client(nano) -> Iterator[OpenAI]:
    with openai_client(nano) as connected:
        yield connected
    for process in nano.processes:
        assert process.exit_status() is None, "\n".join([process.failure(), *process.tail()])


def openai_client(deployment: LocalDeployment, **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{deployment.address}/v1", api_key="none", timeout=60, max_retries=0, **options)


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def user(text: str, *urls: str) -> dict[str, Any]:
    """A user message: images, then text."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def sample_of(task: str, seed: int) -> data.Sample:
    """A picture nano was not trained on, with its question and answer."""
    return data.sample(task, np.random.default_rng(10_000_000 + seed))


def scrape(address: str) -> dict[str, float]:
    """Samples of ``/metrics`` by name and labels, the model's name left out: ``name{a=b}``."""
    address = address if "://" in address else f"http://{address}"
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
    return {_key(sample.name, sample.labels): sample.value for sample in samples}


def _key(name: str, labels: dict[str, str]) -> str:
    rest = ",".join(f"{key}={value}" for key, value in sorted(labels.items()) if key != "model")
    return f"{name}{{{rest}}}" if rest else name
