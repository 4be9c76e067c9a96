"""A system whose language model lies in two processes answers like any other; without one of them it ends."""

import os
import re
import signal

import pytest

from common.service.errors import Unavailable
from tests.deploy.test_local import children_of
from tests.end_to_end.conftest import data_url, openai_client, sample_of, serve, user


def test_pictures_are_read_and_a_lost_rank_ends_the_system():
    with serve("nano", tensor_parallel_size=2, dtype="float32") as deployment, openai_client(deployment) as client:
        samples = [sample_of("number", seed) for seed in (3, 4, 5)]
        for sample in samples:
            message = user(sample.question, *(data_url(image) for image in sample.images))
            reply = client.chat.completions.create(model="nano", messages=[message], temperature=0)
            assert reply.choices[0].message.content == sample.answer

        language = next(process for process in deployment.processes if process.name == "language")
        (rank,) = children_of(language.pid)
        os.kill(rank, signal.SIGKILL)
        with pytest.raises(Unavailable) as failure:
            deployment.watch()
        assert re.fullmatch(
            r"language ended with status 1: .*tensor-parallel rank 1 ended with signal SIGKILL.*", str(failure.value)
        )
