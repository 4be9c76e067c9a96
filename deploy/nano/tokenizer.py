"""The nano checkpoint's tokenizer: byte-level BPE of at most 512 tokens, learnt from the sentences of `data`.

Digits are single tokens; the special tokens and the chat template are those of the InternVL family.
"""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deploy.nano import data

VOCAB_SIZE = 512
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>",
    "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>",
]  # fmt: skip
TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% if message['content'] is string %}{{ message['content'] }}\
{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}\
{% elif part['type'] == 'video' %}{{ '<video>\\n' }}\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Learn the merges from seeded sentences; the same call always gives the same tokenizer."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=8192,
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    fast.chat_template = TEMPLATE
    return fast


def prompt(question: str, num_images: int) -> str:
    """The rendered chat with one unexpanded `<img><IMG_CONTEXT></img>` per image."""
    images = "<img><IMG_CONTEXT></img>\n" * num_images
    return f"<|im_start|>user\n{images}{question}<|im_end|>\n<|im_start|>assistant\n"


def _sentences() -> list[str]:
    rng = np.random.default_rng(0)
    limits = data.Limits(pair_weights=(1, 1, 1, 1))
    drawn = [data.draw(task, rng, limits) for task in (*data.TASKS, "text") for _ in range(200)]
    return ["system\n", "user\n", "assistant\n"] + [f"{d.question}\n{d.answer}" for d in drawn]
