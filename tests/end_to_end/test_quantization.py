"""Nano still reads its pictures with eight-bit language weights, through the flag of ``dvd serve``."""

from tests.end_to_end.conftest import data_url, openai_client, sample_of, serve, user

NUM_SAMPLES = 4


def test_answers_are_right():
    log: list[str] = []
    samples = [sample_of(task, seed) for task in ("number", "shape", "count") for seed in range(NUM_SAMPLES)]
    options = {"quantization": "bitsandbytes", "device": "cpu"}
    with serve("nano", echo=log.append, **options) as deployment, openai_client(deployment) as client:
        replies = [ask(client, sample) for sample in samples]
    right = sum(reply == sample.answer for reply, sample in zip(replies, samples, strict=True))
    assert right >= 0.8 * len(samples)
    assert "quantization bitsandbytes" in "".join(log)


def ask(client, sample):
    messages = [user(sample.question, *(data_url(image) for image in sample.images))]
    reply = client.chat.completions.create(model="nano", messages=messages, temperature=0)
    return reply.choices[0].message.content
