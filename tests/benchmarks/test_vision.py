"""The vision benchmark compares like with like, counts operations, and measures a server that really serves."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import vision, vision_serve, vision_shares, vision_subjects
from benchmarks.vision import check_alike, compared, main, measure, ratio
from benchmarks.vision_shares import operations_per_tile
from benchmarks.vision_subjects import Encoder, Ours, Subject, Took, Transformers, Vllm, pictures, random_tiles
from common.model.config import load_config
from common.service.errors import ConfigError, InternalError, Unavailable
from tests.checkpoints import VISION_300M, make_checkpoint
from vision_server.encoder import VisionModel
from vision_server.media import decode, open_image
from vision_server.tiling import make_tiles

PYTHON = Path(sys.executable)
VLLM = """
import torch

class SamplingParams:
    def __init__(self, **options):
        assert options["max_tokens"] == 1

class Output:
    def __init__(self, num_tokens):
        self.prompt_token_ids = [0] * num_tokens

class Model:
    def extract_feature(self, pixels):
        assert not torch.is_grad_enabled()
        return pixels.mean((2, 3))

class LLM:
    def __init__(self, model, **options):
        print("loading", model)
        assert not options["enable_prefix_caching"] and options["mm_processor_cache_gb"] == 0
        self.lengths = []

    def apply_model(self, function):
        return [function(Model())]

    def generate(self, prompts, sampling, use_tqdm):
        (prompt,) = prompts
        if "multi_modal_data" in prompt:
            assert prompt["multi_modal_data"]["image"].size == (896, 896)
            return [Output(7)]
        assert len(prompt["prompt_token_ids"]) == 7
        return [Output(7)]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), layout="hf", vision=VISION_300M)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def peer(tmp_path):
    """A program that is vision_peer.py, in an environment whose vLLM is a few lines."""
    (tmp_path / "vllm.py").write_text(VLLM)
    program = tmp_path / "program.py"
    program.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        f"runpy.run_path({str(vision_subjects._PEER)!r}, run_name='__main__')\n"
    )
    return program


def test_ours_and_transformers_do_the_same(checkpoint):
    tiles = random_tiles(2, 448)
    both: list[Encoder] = [Ours(checkpoint.path, "float32", tiles), Transformers(checkpoint.path, "float32", tiles)]
    assert check_alike(both)["transformers"] > 0.99999
    assert all(each.encode().seconds > 0 for each in both)


def test_a_peer_that_does_something_else_is_found_out(checkpoint):
    ours = Ours(checkpoint.path, "float32", random_tiles(1, 448))
    other = Ours(checkpoint.path, "float32", 255 - random_tiles(1, 448))
    other.features = torch.randn_like(ours.features)
    with pytest.raises(InternalError, match="others than ours"):
        check_alike([ours, other])


def test_vllm_is_asked_in_a_process_of_its_own(peer, tmp_path):
    tiles = random_tiles(2, 448)
    with Vllm(PYTHON, tmp_path, "float32", tiles, pictures(1)[0], peer) as vllm:
        torch.testing.assert_close(vllm.features, vision_subjects.pixels_of(tiles).mean((2, 3)))
        assert vllm.encode().seconds > 0
        assert abs(vllm.picture().seconds) < 60
        process = vllm._process
    assert process.poll() is not None


def test_a_vllm_that_cannot_start_says_why(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("raise SystemExit('no such model')")
    with pytest.raises(Unavailable, match="no such model"):
        Vllm(PYTHON, tmp_path, "float32", random_tiles(1, 448), b"", program)
    with pytest.raises(ConfigError, match="no such file"):
        Vllm(tmp_path / "python", tmp_path, "float32", random_tiles(1, 448), b"")


def test_rounds_alternate_and_the_first_does_not_count():
    order: list[str] = []

    def subject(name: str, seconds: list[float]) -> Subject:
        left = iter(seconds)

        def run() -> Took:
            order.append(name)
            return Took(next(left), 1.0)

        return Subject(name, run)

    rounds = measure([subject("a", [100, 1, 2, 3]), subject("b", [100, 3, 4, 9])], 3)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [figure["seconds"] for figure in rounds["a"]] == [1, 2, 3]
    assert ratio(rounds["b"], rounds["a"]) == 3
    table = compared("title", rounds, num_tiles=4)
    assert table.rows[0][:6] == ["a", "2", "2", "1.00 x", "1", "1.00 x"]
    assert table.rows[1][1:6] == ["1", "4", "3.00 x", "3", "3.00 x"]
    assert [row[-1] for row in table.rows] == ["300%", "100%"]


def test_the_operations_of_a_tile(checkpoint):
    """Against the parameters of the model itself, and the definition of attention."""
    config = load_config(checkpoint.path)
    with torch.device("meta"):
        model = VisionModel(config)
    layers = sum(p.numel() for p in model.vision_model.encoder.parameters() if p.dim() > 1)
    projector = sum(p.numel() for p in model.mlp1.parameters() if p.dim() > 1)
    embedding = model.vision_model.embeddings.patch_embedding.weight.numel()
    attention = config.vision.num_hidden_layers * 2 * 1025**2 * config.vision.hidden_size
    assert operations_per_tile(config) == 2 * (1025 * layers + attention + 256 * projector + 1024 * embedding)


def test_products_are_scaled_to_the_operations_asked_for():
    few, many = (vision_subjects.Products("float32", operations) for operations in (2e10, 4e10))
    assert many._num_products == pytest.approx(2 * few._num_products)
    assert many.run().seconds > 0


def test_a_run_leaves_a_table_and_a_record(checkpoint, tmp_path, capsys):
    words = ["--model", str(checkpoint.path), "--against", "transformers", "--dtype", "float32", "--tiles", "1"]
    main([*words, "--rounds", "1", "--results", str(tmp_path), "--trace", str(tmp_path / "trace.json")])
    (file,) = tmp_path.glob("*-vision-float32.json")
    figures = json.loads(file.read_text())["figures"]
    assert set(figures["from_tiles"]) == {"DvD", "transformers", "products alone"}
    assert set(figures["from_jpeg"]) == {"DvD", "products alone"}
    assert "transformers" in capsys.readouterr().out
    assert "mm" in (tmp_path / "trace.json").read_text()


def test_a_server_under_load_is_measured_against_the_bare_encoder(checkpoint, capsys):
    main(["--model", str(checkpoint.path), "--dtype", "float32", "--serve", "--rounds", "1", "--seconds", "2"])
    shown = capsys.readouterr().out
    assert "server under load" in shown and "%" in shown


def test_pictures_differ_and_have_five_tiles(checkpoint):
    images = pictures(3)
    assert len(set(images)) == 3
    tiling = load_config(checkpoint.path).tiling
    assert len(make_tiles(decode(open_image(images[0])), tiling)) == vision_subjects.PICTURE_TILES


def test_what_was_kept_is_a_median_of_ratios():
    rates = [(4.0, 2.0), (1.0, 0.9), (2.0, 2.0)]
    rounds = [{"bare": a, "served": b, "bare_core_s": 1.0, "served_core_s": 1.25} for a, b in rates]
    bare, served = vision_serve.kept_table(rounds).rows
    assert (bare[2], bare[4]) == ("100%", "100%")
    assert (served[2], served[4]) == ("90%", "80%")


def test_the_shares_of_a_card_are_measured(tmp_path, capsys):
    """On a CPU: what the script does on a card it does here."""
    cpu = torch.device("cpu")
    vision_shares.measure_shares(["--x"], "tiny", "float32", cpu, tmp_path / "trace.json", tmp_path, batches=(1, 2))
    (file,) = tmp_path.glob("*-vision-tiny-cpu.json")
    records = json.loads(file.read_text())["figures"]
    assert [record["tiles"] for record in records] == [1, 2]
    assert all(record["share"] > 0 and record["tiles_per_s"] > 0 for record in records)
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())
    assert "tiles/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "--model is needed"),
        (["--model", "x", "--against", "sglang"], "sglang"),
        (["--model", "x", "--against", "vllm"], "needs --vllm"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, match):
    with pytest.raises(ConfigError, match=match):
        vision.main(words)
