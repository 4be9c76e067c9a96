"""vLLM's own vision part, timed inside vLLM: a program for vLLM's environment, which has none of our packages.

    VENV/bin/python vision_peer.py --model DIR --pixels IN.safetensors --features OUT.safetensors --picture FILE.jpeg

Loads the checkpoint as ``vllm.LLM`` does on this machine, and answers each line on stdin with a line of JSON: seconds
and processor seconds. ``pixels``: tower, pixel shuffle and projector of normalised pixels. ``picture``: a request with
the picture, to its first token, less one with as many tokens of text: all that vLLM does for it. Answers have the
standard output for themselves. Nothing is cached between requests.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final, TextIO

_ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model lives in this process
}
_MAX_MODEL_LEN: Final = 4096
_TEXT_TOKEN: Final = 100
Took = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--pixels", required=True)
    parser.add_argument("--features", required=True, help="written once, for comparison")
    parser.add_argument("--picture", required=True)
    arguments = parser.parse_args()
    answers = _own_stdout()
    os.environ.update(_ENVIRONMENT, OMP_NUM_THREADS=str(arguments.threads))
    from safetensors.torch import load_file, save_file

    peer = Peer(arguments.model, arguments.dtype, load_file(arguments.pixels)["pixels"], arguments.picture)
    save_file({"features": peer.encode_pixels().float().contiguous()}, arguments.features)
    print("ready", file=answers, flush=True)
    work = {"pixels": lambda: _timed(peer.encode_pixels), "picture": peer.picture}
    for line in sys.stdin:
        print(json.dumps(work[line.strip()]()), file=answers, flush=True)


class Peer:
    """vLLM with the checkpoint.

    Args:
        pixels: [n, 3, S, S].
        picture: file.
    """

    def __init__(self, model: str, dtype: str, pixels: Any, picture: str) -> None:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

        self._engine = LLM(
            model,
            dtype=dtype,
            max_model_len=_MAX_MODEL_LEN,
            max_num_batched_tokens=_MAX_MODEL_LEN,  # a prompt is one step
            enforce_eager=True,
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            limit_mm_per_prompt={"image": 1, "video": 0},
            skip_mm_profiling=True,
        )
        models: list[Any] = []
        self._engine.apply_model(models.append)
        self._model = models[0]
        self._pixels = pixels
        self._picture = picture
        self._one_token = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)

    def encode_pixels(self) -> Any:
        import torch

        with torch.inference_mode():
            return self._model.extract_feature(self._pixels)

    def picture(self) -> Took:
        from PIL import Image

        num_tokens = 0

        def image() -> None:
            nonlocal num_tokens
            prompt = {"prompt": "<IMG_CONTEXT>", "multi_modal_data": {"image": Image.open(self._picture)}}
            (output,) = self._engine.generate([prompt], self._one_token, use_tqdm=False)
            num_tokens = len(output.prompt_token_ids)

        def text() -> None:
            prompt = {"prompt_token_ids": [_TEXT_TOKEN] * num_tokens}
            self._engine.generate([prompt], self._one_token, use_tqdm=False)

        with_image, without = _timed(image), _timed(text)
        return {what: with_image[what] - without[what] for what in with_image}


def _timed(work: Callable[[], object]) -> Took:
    started, used = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - used}


def _own_stdout() -> TextIO:
    """What was the standard output; what vLLM prints goes to the standard error instead."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main()
