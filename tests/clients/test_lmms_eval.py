"""lmms-eval scores nano on pictures whose answers are known, one of them wrongly: both really read and compare."""

import json

from tests.clients.conftest import run_shown, shown
from tests.end_to_end.conftest import sample_of

SAMPLES = [sample_of(task, seed) for task in ("number", "shape", "count") for seed in (1, 2)]
WRONG = 3


def test_the_score_is_right(nano, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    lines = []
    for index, sample in enumerate(SAMPLES):
        sample.images[0].save(pictures / f"{index}.png")
        answer = "A green elephant." if index == WRONG else sample.answer
        lines.append(json.dumps({"file_name": f"{index}.png", "question": sample.question, "answer": answer}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "pictures.yaml").write_text(shown("lmms-eval task", nano.address, tmp_path))
    (tmp_path / "pictures.py").write_text(shown("lmms-eval function", nano.address, tmp_path))

    run_shown("lmms-eval", nano.address, tmp_path, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

    (results,) = tmp_path.rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["pictures"]["exact_match,none"] == 5 / 6
    (samples,) = tmp_path.rglob("*_samples_pictures.jsonl")
    said = {sample["doc_id"]: sample["filtered_resps"] for sample in map(json.loads, samples.read_text().splitlines())}
    assert [said[index] for index in range(len(SAMPLES))] == [sample.answer for sample in SAMPLES]
