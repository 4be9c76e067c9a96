"""Both config formats become the same description, with the file's values, and every complaint names file and key."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from transformers import AutoConfig

from common.model.config import SYSTEM_MESSAGES, FlashConfig, GenerationDefaults, VisionConfig, load_config
from common.model.geometry import Tiling
from common.service.errors import CheckpointError
from tests.checkpoints import VISION_6B, VISION_300M, make_checkpoint

LAYOUTS = ("hf", "hf_legacy", "github")
FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "gpt_oss", "internlm3")


def edit(path, name, **changes):
    """Change keys of a JSON file; None removes a key, a dotted key reaches into an object."""
    values = json.loads((path / name).read_text())
    for dotted, value in changes.items():
        *outer, key = dotted.split("__")
        target = values
        for part in outer:
            target = target[part]
        target.pop(key, None)
        if value is not None:
            target[key] = value
    (path / name).write_text(json.dumps(values))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for layout in ("github", "hf"):
        make_checkpoint(folder / layout, layout=layout)
    return folder


@pytest.fixture
def github(originals, tmp_path):
    return shutil.copytree(originals / "github", tmp_path / "checkpoint")


@pytest.fixture
def hf(originals, tmp_path):
    return shutil.copytree(originals / "hf", tmp_path / "checkpoint")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_300m_vision_tower(tmp_path, layout):
    make_checkpoint(tmp_path, layout=layout, vision=VISION_300M)
    assert load_config(tmp_path).vision == VisionConfig(
        48, 96, 2, 3, 448, 14, 3, "layer_norm", 1e-6, qkv_bias=True, qk_normalization=False, hidden_act="gelu"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_6b_vision_tower(tmp_path, layout):
    make_checkpoint(tmp_path, layout=layout, vision=VISION_6B)
    vision = load_config(tmp_path).vision
    assert vision == VisionConfig(
        40, 80, 2, 5, 448, 14, 3, "rms_norm", 1e-6, qkv_bias=False, qk_normalization=True, hidden_act="gelu"
    )
    assert vision.head_dim == 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_but_text_and_prompt_are_equal_in_all_layouts(tmp_path, layout):
    make_checkpoint(tmp_path, layout=layout, max_tiles=7)
    config = load_config(tmp_path)
    assert (config.downsample_ratio, config.ps_version, config.select_layer) == (0.5, "v2", -1)
    assert config.tiling == Tiling(1, 7, use_thumbnail=True, tile_size=448, dynamic=True)
    assert config.image_mean == (0.485, 0.456, 0.406)
    assert config.image_std == (0.229, 0.224, 0.225)
    assert (config.projector_act, config.flash, config.tie_word_embeddings) == ("gelu", None, False)
    assert config.generation == GenerationDefaults(1.0, 1.0, 0, 1.0, (2,))
    assert (config.tokens_per_tile, config.text_hidden_size, config.vocab_size, config.max_model_len) == (
        256,
        56,
        512,
        16384,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_builds_the_same_language_model_from_the_text_config(tmp_path, layout, family):
    checkpoint = make_checkpoint(tmp_path, layout=layout, text=family)
    text = load_config(tmp_path).text
    built = AutoConfig.for_model(**text)
    original = checkpoint.reference().config.text_config
    ignored = {"architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}
    expected = {key: value for key, value in original.to_dict().items() if key not in ignored}
    assert expected.items() <= built.to_dict().items()


def test_prompt_formats(tmp_path):
    found = {}
    for layout in ("hf", "github"):
        for family in ("qwen3", "gpt_oss"):
            path = tmp_path / f"{layout}-{family}"
            make_checkpoint(path, layout=layout, text=family)
            config = load_config(path)
            found[layout, family] = (config.template, config.system_message)
    assert found == {
        ("hf", "qwen3"): ("internvl2_5", None),
        ("hf", "gpt_oss"): ("internvl3_5_gpt_oss", None),
        ("github", "qwen3"): ("internvl2_5", SYSTEM_MESSAGES["internvl2_5"]),
        ("github", "gpt_oss"): ("internvl3_5_gpt_oss", SYSTEM_MESSAGES["internvl3_5_gpt_oss"]),
    }


@pytest.mark.parametrize("message", [None, "", "Be brief."])
def test_a_github_config_can_say_that_there_is_no_system_turn(github, message):
    """Null is none at all; an empty message is a system turn of no words, as the published code has it."""
    values = json.loads((github / "config.json").read_text())
    (github / "config.json").write_text(json.dumps(values | {"system_message": message}))
    assert load_config(github).system_message == message


def test_the_published_8b_config(tmp_path):
    published = {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "template": "internvl2_5",
        "downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1, "force_image_size": 448,
        "dynamic_image_size": True, "min_dynamic_patch": 1, "max_dynamic_patch": 12, "use_thumbnail": True,
        "pad2square": False, "eos_token_id": 151645, "pad_token_id": 151643, "tie_word_embeddings": False,
        "llm_config": {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096,
            "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "attention_bias": False, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
            "rope_scaling": None, "sliding_window": None, "max_position_embeddings": 40960, "vocab_size": 151936,
            "bos_token_id": 151643, "eos_token_id": 151645,
        },
        "vision_config": {
            "model_type": "intern_vit_6b", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 448, "patch_size": 14, "num_channels": 3, "hidden_act": "gelu",
            "norm_type": "layer_norm", "layer_norm_eps": 1e-6, "qkv_bias": True, "qk_normalization": False,
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = load_config(tmp_path)
    assert config.vision == VisionConfig(
        1024, 4096, 24, 16, 448, 14, 3, "layer_norm", 1e-6, qkv_bias=True, qk_normalization=False, hidden_act="gelu"
    )
    assert config.tiling == Tiling(1, 12, use_thumbnail=True)
    assert (config.tokens_per_tile, config.text_hidden_size, config.max_model_len) == (256, 4096, 40960)
    assert config.generation.eos_token_ids == (151645,)
    assert AutoConfig.for_model(**config.text).rope_parameters == {"rope_theta": 1000000, "rope_type": "default"}


def test_github_values_come_from_the_file(github):
    edit(
        github,
        "config.json",
        ps_version="v1",
        min_dynamic_patch=2,
        max_dynamic_patch=9,
        use_thumbnail=False,
        dynamic_image_size=False,
        force_image_size=896,
        select_layer=-2,
        downsample_ratio=0.25,
        system_message="Be brief.",
        flash_mode=True,
        flash_relative_threshold=0.1,
        flash_absolute_threshold=0.5,
    )
    config = load_config(github)
    assert (config.ps_version, config.select_layer, config.system_message) == ("v1", -2, "Be brief.")
    assert config.tiling == Tiling(2, 9, use_thumbnail=False, tile_size=896, dynamic=False)
    assert config.tokens_per_tile == 256
    assert config.flash == FlashConfig(0.1, 0.5)


def test_github_defaults_are_those_of_the_published_code(github):
    absent = ("ps_version", "min_dynamic_patch", "max_dynamic_patch", "use_thumbnail", "dynamic_image_size")
    edit(github, "config.json", **dict.fromkeys(absent))
    (github / "preprocessor_config.json").unlink()
    config = load_config(github)
    assert config.ps_version == "v1"
    assert config.tiling == Tiling(1, 6, use_thumbnail=False, tile_size=448, dynamic=False)
    assert config.image_mean == (0.485, 0.456, 0.406)


def test_hf_tiles_although_the_published_files_say_crop_to_patches_false(hf):
    assert json.loads((hf / "preprocessor_config.json").read_text())["crop_to_patches"] is False
    assert load_config(hf).tiling.dynamic


def test_the_image_processor_nested_by_transformers_5_wins(hf):
    nested = {"size": {"height": 448, "width": 448}, "max_patches": 3, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    edit(hf, "processor_config.json", image_processor=nested)
    config = load_config(hf)
    assert (config.tiling.max_tiles, config.image_mean, config.image_std) == (3, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_a_config_that_leaves_out_defaults_reads_as_those(hf):
    edit(hf, "config.json", vision_config={"attention_bias": True, "num_hidden_layers": 2})
    vision = load_config(hf).vision
    assert (vision.hidden_size, vision.num_attention_heads, vision.image_size, vision.qkv_bias) == (1024, 16, 448, True)


def test_a_github_text_config_without_model_type_is_known_by_its_class(github):
    edit(github, "config.json", llm_config__model_type=None)
    assert load_config(github).text["model_type"] == "qwen3"


class TestGeneration:
    def test_values_of_the_file(self, hf):
        edit(
            hf,
            "generation_config.json",
            temperature=0.6,
            top_p=0.9,
            top_k=20,
            repetition_penalty=1.1,
            eos_token_id=[7, 2],
        )
        assert load_config(hf).generation == GenerationDefaults(0.6, 0.9, 20, 1.1, (7, 2))

    def test_no_sampling_means_greedy(self, hf):
        edit(hf, "generation_config.json", do_sample=False, temperature=0.6)
        assert load_config(hf).generation.temperature == 0.0

    def test_eos_of_the_config_if_there_is_no_file(self, hf):
        (hf / "generation_config.json").unlink()
        edit(hf, "config.json", text_config__eos_token_id=5)
        assert load_config(hf).generation.eos_token_ids == (5,)


class TestTiedHead:
    """The head on disk decides: flags are left out of files when they equal a default that varies by version."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shards", [1, 2])
    @pytest.mark.parametrize("tied", [False, True])
    def test_without_any_flag(self, tmp_path, layout, shards, tied):
        make_checkpoint(tmp_path, layout=layout, shards=shards, tie_word_embeddings=tied)
        text = "llm_config" if layout == "github" else "text_config"
        edit(tmp_path, "config.json", tie_word_embeddings=None, **{f"{text}__tie_word_embeddings": None})
        assert load_config(tmp_path).tie_word_embeddings is tied

    def test_a_stored_head_is_used_whatever_the_flag(self, hf):
        edit(hf, "config.json", tie_word_embeddings=True)
        assert load_config(hf).tie_word_embeddings is False

    def test_the_flag_alone_if_there_are_no_weights(self, hf):
        (hf / "model.safetensors").unlink()
        assert load_config(hf).tie_word_embeddings is False
        edit(hf, "config.json", tie_word_embeddings=True)
        assert load_config(hf).tie_word_embeddings is True


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}, "architectures.*Llava"),
            ({"template": "internlm2-chat"}, "template.*internvl2_5.*found 'internlm2-chat'"),
            ({"template": None}, "template.*missing"),
            ({"ps_version": "v3"}, "ps_version.*expected one of v1, v2"),
            ({"vision_config": None}, "vision_config: missing"),
            ({"vision_config__hidden_size": "48"}, "vision_config.hidden_size.*expected int"),
            ({"vision_config__hidden_size": True}, "vision_config.hidden_size.*expected int"),
            ({"vision_config__hidden_size": -48}, "vision_config.hidden_size.*positive"),
            ({"vision_config__num_attention_heads": 5}, "hidden_size 48 is not a multiple of 5 heads"),
            ({"vision_config__norm_type": "batch_norm"}, "vision_config.norm_type.*rms_norm"),
            ({"force_image_size": 450}, "multiples of patch_size 14"),
            ({"downsample_ratio": 0.3}, "downsample_ratio 0.3"),
            ({"select_layer": 9}, "select_layer 9"),
            ({"min_dynamic_patch": 13}, "min_dynamic_patch.*above max_dynamic_patch"),
            ({"llm_config__model_type": "mamba"}, "llm_config.model_type.*qwen3.*found 'mamba'"),
            ({"llm_config__vocab_size": None}, "llm_config.vocab_size: missing"),
            ({"flash_mode": True}, "flash_relative_threshold: missing"),
        ],
    )
    def test_github(self, github, changes, message):
        edit(github, "config.json", **changes)
        with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
            load_config(github)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vision_config__use_mean_pooling": False}, "vision_config.use_mean_pooling.*only True"),
            ({"vision_config__image_size": [448, 224]}, "vision_config.image_size.*square"),
            ({"vision_feature_layer": [1, 2]}, "vision_feature_layer.*expected int"),
            ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy.*default"),
            ({"text_config": None}, "text_config: missing"),
        ],
    )
    def test_hf(self, hf, changes, message):
        edit(hf, "config.json", **changes)
        with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
            load_config(hf)

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("preprocessor_config.json", {"size": {"height": 448, "width": 224}}, "size: expected a square"),
            ("preprocessor_config.json", {"size": {"shortest_edge": 448}}, "size.height: missing"),
            ("preprocessor_config.json", {"image_mean": [0.5]}, "image_mean: expected three numbers"),
            ("preprocessor_config.json", {"image_std": None}, "image_std: missing"),
            ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id: expected token ids"),
            ("generation_config.json", {"top_p": "high"}, "top_p: expected float"),
        ],
    )
    def test_files_beside_it(self, hf, name, changes, message):
        edit(hf, name, **changes)
        with pytest.raises(CheckpointError, match=f"{name}: {message}"):
            load_config(hf)

    def test_no_folder_and_no_config(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no config.json"):
            load_config(tmp_path)
        with pytest.raises(CheckpointError, match=r"absent: no such directory"):
            load_config(tmp_path / "absent")

    def test_no_image_processor(self, hf):
        (hf / "preprocessor_config.json").unlink()
        with pytest.raises(CheckpointError, match=r"neither preprocessor_config.json nor"):
            load_config(hf)

    @pytest.mark.parametrize("text", ["{", "[]", '"model"'])
    def test_not_a_json_object(self, hf, text):
        (hf / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config.json: (not JSON|expected a JSON object)"):
            load_config(hf)


def test_the_config_can_be_read_without_torch(hf):
    code = (
        "import sys, pathlib; from common.model.config import load_config; load_config(pathlib.Path(sys.argv[1])); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(hf)], check=True, timeout=60)


def test_frozen(hf):
    config = load_config(hf)
    with pytest.raises(AttributeError):
        config.template = "other"  # type: ignore[misc]
    assert replace(config, template="other").template == "other"
