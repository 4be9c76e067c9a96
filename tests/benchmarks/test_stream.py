"""What counts as a token, and what as a good end (API.md section 4), whatever pieces the bytes arrive in."""

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.samples import Failure, Sample
from benchmarks.stream import AnswerStream, describe_error
from tests.benchmarks.conftest import DONE, ERROR, GOOD, ROLE, USAGE, chunk, sse


def read(*pieces: bytes) -> tuple[Sample, Failure | None]:
    """Each piece arrives a second after the one before, the first at 1."""
    sample = Sample("s", 0, 2, 0.0)
    answer = AnswerStream(sample)
    for second, piece in enumerate(pieces, start=1):
        answer.feed(piece, float(second))
    return sample, answer.finish()


def test_a_good_answer():
    sample, failure = read(*(sse(event) for event in GOOD))
    assert failure is None
    # The role is no token, empty text without a role is one, the end is none.
    assert (sample.first_at, sample.gaps, sample.ended_at) == (2.0, [1.0], 4.0)
    assert (sample.prompt_tokens, sample.output_tokens, sample.cached_tokens, sample.image_tokens) == (300, 2, 16, 256)
    assert sample.metrics["dvd"]["encode_ms"] == 5.0


@settings(deadline=None)
@given(st.sets(st.integers(1, len(sse(*GOOD)) - 1)), st.sampled_from([b"\n", b"\r\n"]))
def test_pieces_do_not_matter(cuts, newline):
    data = sse(*GOOD).replace(b"\n", newline)
    cuts = sorted(cuts)
    sample, failure = read(*(data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)))
    assert failure is None
    assert (sample.output_tokens, len(sample.gaps)) == (2, 1)


def test_without_usage_events_are_counted():
    sample, failure = read(sse(*GOOD[:4], DONE))
    assert failure is None
    assert (sample.output_tokens, sample.prompt_tokens) == (2, None)


@pytest.mark.parametrize(
    ("event", "is_token"),
    [
        (chunk({"role": "assistant", "content": ""}), False),
        (chunk({"role": "assistant"}), False),
        (chunk({"role": "assistant", "content": "a"}), True),  # LMDeploy repeats the role
        (chunk({"content": ""}), True),
        (chunk({"content": "a"}, "length"), True),  # vLLM's last token comes with the end
        (chunk({"content": ""}, "stop"), False),
        (chunk({}, "stop"), False),
        (chunk({"reasoning_content": "hm"}), True),
        (chunk({"reasoning": "hm"}), True),
        (chunk({"tool_calls": [{"index": 0}]}), True),
        ({"choices": [{"index": 0, "delta": None, "finish_reason": "stop"}]}, False),
    ],
)
def test_tokens(event, is_token):
    sample, _ = read(sse(event, chunk({}, "stop")))
    assert sample.output_tokens == is_token


def test_an_answer_without_tokens_is_good_and_has_a_first_sign():
    sample, failure = read(sse(ROLE), sse(chunk({}, "stop"), DONE))
    assert failure is None
    assert (sample.first_at, sample.ended_at, sample.output_tokens) == (2.0, 2.0, 0)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ((*GOOD[:3], DONE), Failure("no_finish_reason")),
        ((), Failure("no_finish_reason")),
        ((ROLE, chunk({}, "abort"), DONE), Failure("no_finish_reason", "abort")),
        (
            (*GOOD[:3], b"event: error\n", ERROR),
            Failure("error_event", "worker_unavailable", ERROR["error"]["message"]),
        ),
        ((*GOOD[:4], ERROR, DONE), Failure("error_event", "worker_unavailable", ERROR["error"]["message"])),
        ((ROLE, {"object": "error", "message": "out", "code": 500}), Failure("error_event", "500", "out")),
        ((ROLE, {"error": "out"}), Failure("error_event", "", "out")),
        ((*GOOD[:3], b"event: error\ndata: [DONE]\n\n"), Failure("error_event")),
    ],
)
def test_failures(events, expected):
    assert read(sse(*events))[1] == expected


def test_every_choice_must_end():
    def of(index: int, **more) -> dict:
        return {"choices": [{"index": index, "delta": {"content": "a"}, "finish_reason": None} | more]}

    assert read(sse(of(0), of(1), of(0, finish_reason="stop")))[1] == Failure("no_finish_reason")
    assert read(sse(of(0), of(1), of(0, finish_reason="stop"), of(1, finish_reason="length")))[1] is None


def test_comments_and_names_of_events_are_passed_over():
    assert read(b": keep-alive\n\nevent: message\nid: 3\n" + sse(*GOOD))[1] is None


@pytest.mark.parametrize("line", [b"data: {'a'}\n", b"data: [1]\n", b'data: {"choices": 3}\n'])
def test_what_is_no_chunk_is_said(line):
    with pytest.raises(msgspec.DecodeError):
        read(line)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (json.dumps(ERROR).encode(), ("worker_unavailable", "a server of ours is gone")),
        (b'{"object": "error", "message": "m", "code": 40303}', ("40303", "m")),
        (b'{"error": {"message": "m", "type": "t", "code": null}}', ("t", "m")),
        (b'{"detail": "m"}', ("", "")),
        (b"<html>Bad Gateway", ("", "<html>Bad Gateway")),
        (b"\xff" * 1000, ("", "\ufffd" * 200)),
        (b"[]", ("", "[]")),
    ],
)
def test_error_bodies(body, expected):
    assert describe_error(body) == expected


def test_null_fields_of_other_servers():
    event = {
        "choices": [{"index": 0, "delta": {"content": "a", "tool_calls": None}, "finish_reason": None}],
        "usage": None,
    }
    assert read(sse(event, chunk({}, "stop"), {**USAGE, "metrics": None}))[1] is None
