"""Whatever the layout, each role gets exactly its parameters, reads exactly its bytes, and says what is wrong."""

import os
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from common.model.checkpoint import Checkpoint, Role, load_role
from common.model.config import load_config
from common.service.errors import CheckpointError
from tests.checkpoints import VISION_6B, VISION_300M, make_checkpoint

LAYOUTS = ("hf", "hf_legacy", "github")
FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "gpt_oss", "internlm3")


def language_model(path, dtype=torch.float32):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**load_config(path).text)).to(dtype)
    return model.requires_grad_(False)


def unset(parameters):
    """The same parameters full of NaN, so that none passes for loaded."""
    return {name: torch.full_like(parameter, float("nan")) for name, parameter in parameters.items()}


def load(path, role, parameters, **options):
    checkpoint = Checkpoint.open(path)
    load_role(checkpoint, load_config(path), role, parameters, **options)
    return checkpoint


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name].float(), expected[name].float())]
    assert not different


class TestParity:
    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_language(self, tmp_path, layout, family, shards):
        made = make_checkpoint(tmp_path, layout=layout, text=family, shards=shards)
        parameters = unset(dict(language_model(tmp_path).named_parameters()))
        load(tmp_path, "language", parameters)
        assert_equal(parameters, made.parameters("language"))

    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("vision", [VISION_300M, VISION_6B], ids=["300m", "6b"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_vision(self, tmp_path, layout, vision, shards):
        made = make_checkpoint(tmp_path, layout=layout, vision=vision, shards=shards)
        expected = made.parameters("vision")
        parameters = unset(expected)
        load(tmp_path, "vision", parameters)
        assert_equal(parameters, expected)

    @pytest.mark.parametrize("role", ["vision", "language"])
    @pytest.mark.parametrize(
        ("on_disk", "in_memory"),
        [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
    )
    def test_dtypes_are_converted(self, tmp_path, role, on_disk, in_memory):
        made = make_checkpoint(tmp_path, layout="hf_legacy", text="qwen3_moe", dtype=on_disk)
        expected = made.parameters(role)
        expected = {name: parameter.to(in_memory) for name, parameter in expected.items()}
        parameters = unset(expected)
        load(tmp_path, role, parameters)
        assert_equal(parameters, expected)

    def test_a_tensor_larger_than_the_staging_buffer(self, tmp_path, monkeypatch):
        monkeypatch.setattr("common.model.checkpoint.STAGING_BYTES", 1024)
        made = make_checkpoint(tmp_path, dtype=torch.bfloat16)
        expected = made.parameters("language")
        parameters = unset(expected)
        load(tmp_path, "language", parameters)
        assert_equal(parameters, expected)

    def test_more_bytes_than_one_read_call_gives(self, tmp_path, monkeypatch):
        monkeypatch.setattr("common.model.checkpoint._MAX_READ_BYTES", 1000)
        expected = make_checkpoint(tmp_path).parameters("language")
        parameters = unset(expected)
        load(tmp_path, "language", parameters)
        assert_equal(parameters, expected)

    def test_what_save_pretrained_writes(self, tmp_path):
        made = make_checkpoint(tmp_path, text="qwen3_moe")
        made.reference().save_pretrained(tmp_path)
        assert any(name.startswith("language_model.model.") for name in Checkpoint.open(tmp_path).entries)
        expected = made.parameters("language")
        parameters = unset(expected)
        load(tmp_path, "language", parameters)
        assert_equal(parameters, expected)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_factory_writes_the_names_of_save_pretrained(self, tmp_path, family):
        made = make_checkpoint(tmp_path / "ours", layout="hf_legacy", text=family)
        made.reference().save_pretrained(tmp_path / "theirs")
        ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
        assert_equal(ours, theirs)


class TestTiedHead:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_one_tensor_on_disk_and_in_memory(self, tmp_path, layout):
        made = make_checkpoint(tmp_path, layout=layout, tie_word_embeddings=True)
        model = language_model(tmp_path)
        load(tmp_path, "language", dict(model.named_parameters()))
        assert torch.equal(model.lm_head.weight, made.reference().lm_head.weight)

    def test_a_head_with_memory_of_its_own_gets_the_embedding(self, tmp_path):
        made = make_checkpoint(tmp_path, tie_word_embeddings=True)
        expected = made.parameters("language")
        parameters = unset(expected)
        load(tmp_path, "language", parameters)
        assert_equal(parameters, expected)


class TestBytesRead:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_each_role_reads_its_own_tensors_and_the_headers(self, tmp_path, layout):
        made = make_checkpoint(tmp_path, layout=layout, text="qwen3_moe", shards=3, dtype=torch.bfloat16)
        read = 0
        for role, expected in (
            ("vision", made.parameters("vision")),
            ("language", made.parameters("language")),
        ):
            checkpoint = load(tmp_path, role, unset(expected))
            assert checkpoint.tensor_bytes_read == sum(2 * parameter.numel() for parameter in expected.values())
            assert checkpoint.bytes_read == checkpoint.tensor_bytes_read + checkpoint.header_bytes_read
            read += checkpoint.tensor_bytes_read
        files = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
        assert read + checkpoint.header_bytes_read == files

    def test_opening_reads_headers_only(self, tmp_path):
        make_checkpoint(tmp_path, shards=2)
        checkpoint = Checkpoint.open(tmp_path)
        raw = [file.read_bytes() for file in tmp_path.glob("*.safetensors")]
        assert checkpoint.bytes_read == sum(8 + int.from_bytes(data[:8], "little") for data in raw)

    def test_progress_ends_with_everything_done(self, tmp_path):
        made = make_checkpoint(tmp_path)
        calls = []
        checkpoint = load(
            tmp_path,
            "vision",
            unset(made.parameters("vision")),
            progress=lambda done, total: calls.append((done, total)),
        )
        assert calls == sorted(calls)
        assert {total for _, total in calls} == {checkpoint.tensor_bytes_read} == {calls[-1][0]}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("original"), layout="github", text="qwen3_moe")


class TestErrors:
    """Found before the first tensor is read: the counters stay at zero."""

    @pytest.fixture
    def made(self, original, tmp_path):
        return replace(original, path=shutil.copytree(original.path, tmp_path / "checkpoint"))

    def change(self, path, remove=(), add=None):
        tensors = load_file(path / "model.safetensors")
        for name in remove:
            del tensors[name]
        save_file(tensors | (add or {}), path / "model.safetensors")

    def check(self, made, role, message):
        checkpoint = Checkpoint.open(made.path)
        expected = made.parameters(role)
        with pytest.raises(CheckpointError, match=message):
            load_role(checkpoint, load_config(made.path), role, unset(expected))
        assert checkpoint.tensor_bytes_read == 0

    def test_missing(self, made):
        self.change(made.path, remove=["vision_model.encoder.layers.1.ls2", "language_model.model.norm.weight"])
        self.check(
            made, "vision", r"vision tensor 'vision_model.encoder.layers.1.ls2' is missing: .*\[48\], found in none"
        )
        self.check(made, "language", r"language tensor 'language_model.model.norm.weight' is missing: .*\[40\]")

    @pytest.mark.parametrize(
        "name",
        [
            "model.vision_tower.encoder.layer.1.lambda_2",
            "model.vision_tower.encoder.layer.0.attention.projection_layer.bias",
            "model.vision_tower.encoder.layer.0.attention.k_proj.bias",
            "model.vision_tower.embeddings.patch_embeddings.projection.weight",
            "model.multi_modal_projector.linear_2.weight",
            "model.language_model.layers.1.self_attn.q_proj.weight",
            "lm_head.weight",
        ],
    )
    def test_missing_tensors_are_called_by_the_names_of_their_layout(self, tmp_path, name):
        made = make_checkpoint(tmp_path)
        self.change(made.path, remove=[name])
        self.check(
            made, "language" if "language" in name or "head" in name else "vision", f"tensor '{name}' is missing"
        )

    def test_a_missing_expert(self, made):
        name = "language_model.model.layers.1.mlp.experts.4.up_proj.weight"
        self.change(made.path, remove=[name])
        self.check(made, "language", f"language tensor '{name}' is missing")

    @pytest.mark.parametrize(
        ("role", "name"),
        [
            ("vision", "vision_model.encoder.layers.2.ls1"),
            ("vision", "vision_model.encoder.layers.0.attn.q_norm.weight"),
            ("language", "language_model.model.layers.0.mlp.experts.6.up_proj.weight"),
            ("language", "language_model.model.layers.7.mlp.gate.weight"),
        ],
    )
    def test_extra(self, made, role, name):
        self.change(made.path, add={name: torch.zeros(48)})
        self.check(made, role, f"tensor '{name}' in shard 'model.safetensors' is extra")

    def test_mxfp4_experts_are_named_for_what_they_are(self, made):
        name = "language_model.model.layers.0.mlp.experts.gate_up_proj_blocks"
        self.change(made.path, add={name: torch.zeros(4, dtype=torch.uint8)})
        self.check(made, "language", "MXFP4 is not supported")

    @pytest.mark.parametrize("role", ["vision", "language"])
    def test_of_no_known_part(self, made, role):
        self.change(made.path, add={"audio_tower.weight": torch.zeros(1)})
        self.check(made, role, "'audio_tower.weight' in shard 'model.safetensors' is of no known part")

    @pytest.mark.parametrize(
        ("role", "name", "shape"),
        [
            ("vision", "vision_model.encoder.layers.0.attn.qkv.weight", (48, 144)),
            ("vision", "mlp1.0.weight", (191,)),
            ("language", "language_model.model.layers.0.mlp.experts.0.gate_proj.weight", (23, 40)),
            ("language", "language_model.lm_head.weight", (512, 40, 1)),
        ],
    )
    def test_mis_shaped(self, made, role, name, shape):
        original = list(Checkpoint.open(made.path).entries[name].shape)
        self.change(made.path, add={name: torch.zeros(shape)})
        message = f"tensor '{name}' in shard 'model.safetensors': expected shape {original}, found {list(shape)}"
        self.check(made, role, message.replace("[", r"\[").replace("]", r"\]"))

    def test_stored_twice(self, made):
        again = {"lm_head.weight": torch.zeros(512, 40)}
        self.change(made.path, add=again)
        self.check(made, "language", "the same parameter is also stored as")

    def test_fused_and_in_parts(self, made):
        part = {"vision_tower.encoder.layer.0.attention.k_proj.weight": torch.zeros(48, 48)}
        self.change(made.path, add=part)
        self.check(made, "vision", "the same parameter is also stored as")

    def test_not_floating_point(self, made):
        self.change(made.path, add={"mlp1.0.bias": torch.zeros(192, dtype=torch.int32)})
        self.check(made, "vision", "tensor 'mlp1.0.bias' .* expected one of .*BF16.* found I32")

    def test_a_file_that_disappears_after_opening(self, made):
        checkpoint = Checkpoint.open(made.path)
        config = load_config(made.path)
        (made.path / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"shard 'model.safetensors' cannot be opened \(FileNotFoundError\)"):
            load_role(checkpoint, config, "vision", unset(made.parameters("vision")))

    def test_a_file_that_shrinks_while_it_is_read(self, made):
        checkpoint = Checkpoint.open(made.path)
        config = load_config(made.path)
        last = max(checkpoint.entries.values(), key=lambda entry: entry.offset)
        os.truncate(made.path / "model.safetensors", last.offset + 3)
        role: Role = "vision" if not last.name.startswith("language_model.") else "language"
        expected = made.parameters(role)
        with pytest.raises(
            CheckpointError, match=f"tensor '{last.name}' .* truncated: expected {last.num_bytes}.* found 3"
        ):
            load_role(checkpoint, config, role, unset(expected))


class TestFlash:
    """Tensors of the resolution router and its second projector (names and shapes of the Flash checkpoints)."""

    def tensors(self, hidden=48, text=56):
        shapes = {"pooling_before_gating.query_token": (1, hidden), "gating.gate.0.weight": (hidden,)}
        for index, (rows, columns) in {
            1: (2 * text, 16 * hidden),
            4: (2 * text, 2 * text),
            7: (text, 2 * text),
        }.items():
            shapes[f"mlp2.{index}.weight"] = (rows, columns)
        for index in range(1, 5):
            shapes |= {
                f"pooling_before_gating.attn{index}.in_proj_weight": (3 * hidden, hidden),
                f"pooling_before_gating.attn{index}.out_proj.bias": (hidden,),
                f"pooling_before_gating.norm{index}.weight": (hidden,),
                f"gating.block{index}.5.weight": (hidden,),
            }
        return {name: torch.randn(shape) for name, shape in shapes.items()}

    def add(self, path, tensors):
        save_file(load_file(path / "model.safetensors") | tensors, path / "model.safetensors")

    def test_a_server_without_router_leaves_them_on_disk(self, tmp_path):
        made = make_checkpoint(tmp_path, layout="github")
        self.add(tmp_path, self.tensors())
        expected = made.parameters("vision")
        checkpoint = load(tmp_path, "vision", unset(expected))
        assert checkpoint.tensor_bytes_read == sum(4 * parameter.numel() for parameter in expected.values())
        load(tmp_path, "language", unset(made.parameters("language")))

    def test_all_but_the_two_unused_attentions_are_loaded(self, tmp_path):
        made = make_checkpoint(tmp_path, layout="github")
        flash = self.tensors()
        self.add(tmp_path, flash)
        used = {
            name: tensor
            for name, tensor in flash.items()
            if not any(f"{part}{n}." in name for part in ("attn", "norm") for n in (3, 4))
        }
        expected = made.parameters("vision") | used
        parameters = unset(expected)
        load(tmp_path, "vision", parameters)
        assert_equal(parameters, expected)

    def test_hf_names(self, tmp_path):
        made = make_checkpoint(tmp_path)
        weight = torch.randn(3 * 48, 48)
        query, key, value = weight.chunk(3)
        disk = {
            "model.pooling_before_gating.attn1.query.weight": query,
            "model.pooling_before_gating.attn1.key.weight": key,
            "model.pooling_before_gating.attn1.value.weight": value,
            "model.mlp2.dense2.weight": torch.randn(4, 4),
            "model.mlp2.norm.bias": torch.randn(4),
            "model.gating.block2.dense_in.weight": torch.randn(4, 4),
            "model.gating.block2.norm.weight": torch.randn(4),
            "model.gating.gate.gate_proj.bias": torch.randn(2),
        }
        self.add(tmp_path, {name: tensor.clone() for name, tensor in disk.items()})
        expected = made.parameters("vision") | {
            "pooling_before_gating.attn1.in_proj_weight": weight,
            "mlp2.4.weight": disk["model.mlp2.dense2.weight"],
            "mlp2.0.bias": disk["model.mlp2.norm.bias"],
            "gating.block2.0.weight": disk["model.gating.block2.dense_in.weight"],
            "gating.block2.5.weight": disk["model.gating.block2.norm.weight"],
            "gating.gate.1.bias": disk["model.gating.gate.gate_proj.bias"],
        }
        parameters = unset(expected)
        load(tmp_path, "vision", parameters)
        assert_equal(parameters, expected)


class TestFingerprint:
    def of(self, path):
        return Checkpoint.open(path).fingerprint(load_config(path))

    def test_is_a_property_of_the_files(self, tmp_path):
        for name in ("first", "second"):
            make_checkpoint(tmp_path / name, shards=2)
        first = self.of(tmp_path / "first")
        assert len(first) == 16
        assert first == self.of(tmp_path / "second") == self.of(tmp_path / "first")

    def test_differs_for_other_weights_shapes_and_preprocessing(self, tmp_path):
        made: dict[str, dict[str, Any]] = {
            "base": {},
            "weights": {"seed": 1},
            "dtype": {"dtype": torch.bfloat16},
            "vision": {"vision": VISION_6B},
            "tiles": {"max_tiles": 6},
            "layout": {"layout": "github"},
        }
        for name, options in made.items():
            make_checkpoint(tmp_path / name, **options)
        assert len({self.of(tmp_path / name) for name in made}) == len(made)

    def test_reads_a_few_kilobytes_a_shard(self, tmp_path):
        make_checkpoint(tmp_path, shards=3)
        checkpoint = Checkpoint.open(tmp_path)
        opened = checkpoint.bytes_read
        checkpoint.fingerprint(load_config(tmp_path))
        assert 0 < checkpoint.bytes_read - opened <= 3 * 2 * 4096
