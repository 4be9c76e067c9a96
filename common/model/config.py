"""The one description of a model, read from either checkpoint format: InternVL's own and that of transformers.

The file's values always win; where a key is absent, the default is that of the code which publishes the format
(``configuration_internvl_chat.py``, ``configuration_intern_vit.py``, transformers' ``configuration_internvl.py``),
because a saved config leaves out what equals its default. Reads no weights: see checkpoint.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from common.model.geometry import Tiling
from common.model.section import MISSING, Section, read_section
from common.model.shards import has_weights, tensor_names
from common.service.errors import CheckpointError

Layout = Literal["github", "hf"]
PixelShuffleVersion = Literal["v1", "v2"]
NormType = Literal["layer_norm", "rms_norm"]

SYSTEM_MESSAGES: Final[Mapping[str, str]] = {
    "internvl2_5": (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    ),
    "internvl3_5_gpt_oss": (
        "You are InternVL, a large language model trained by Shanghai AI Laboratory.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-06\n\nReasoning: low\n\n"
        "# Valid channels: final. Channel must be included for every message."
    ),
}
"""Default system message of each prompt template of the InternVL format (``conversation.py``)."""

TEXT_MODEL_TYPES: Final = ("qwen2", "qwen3", "qwen3_moe", "gpt_oss", "internlm3")

_TEXT_ARCHITECTURES: Final[Mapping[str, str]] = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "GptOssForCausalLM": "gpt_oss",
    "InternLM3ForCausalLM": "internlm3",
}
_IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
_IMAGENET_STD: Final = (0.229, 0.224, 0.225)
_QUANTIZATION: Final = "quantization_config"
_HEAD_NAMES: Final = ("lm_head.weight", "language_model.lm_head.weight")

VIR_HEADS: Final = 16
"""Heads of the attention that pools a tile for the resolution router; in no config (INTERNVL.md 2.2)."""

CONFIG_FILES: Final = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
"""The files ``load_config`` reads, those that exist."""


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """An InternViT: 300M-style (LayerNorm, qkv bias) or 6B-style (RMSNorm, normalised q and k, no qkv bias)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int
    norm_type: NormType
    layer_norm_eps: float
    qkv_bias: bool
    qk_normalization: bool
    hidden_act: str

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, slots=True)
class FlashConfig:
    """When a tile of a Flash checkpoint is sent with 64 instead of 256 tokens."""

    relative_threshold: float
    absolute_threshold: float


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling values for requests that name none, and the ids that end a reply. ``top_k`` 0: off."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InternVLConfig:
    """All that both servers must agree on.

    ``text`` is the language model's configuration as it is on disk, always with a ``model_type`` that transformers
    knows, and with the checkpoint's ``quantization_config`` where there is one. ``select_layer`` indexes the ViT's
    hidden states, -1 is the last. ``system_message`` is what a conversation without one starts with; None: nothing.
    """

    layout: Layout
    vision: VisionConfig
    text: Mapping[str, Any]
    downsample_ratio: float
    ps_version: PixelShuffleVersion
    select_layer: int
    tiling: Tiling
    template: str
    system_message: str | None
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    projector_act: str
    flash: FlashConfig | None
    tie_word_embeddings: bool
    generation: GenerationDefaults

    @property
    def tokens_per_tile(self) -> int:
        """Tokens of one uncompressed tile: 256 for 448 pixels, patch 14 and ratio 0.5."""
        return round(self.tiling.tile_size // self.vision.patch_size * self.downsample_ratio) ** 2

    @property
    def text_hidden_size(self) -> int:
        return int(self.text["hidden_size"])

    @property
    def vocab_size(self) -> int:
        return int(self.text["vocab_size"])

    @property
    def fp8_block(self) -> tuple[int, int] | None:
        """Rows and columns of an FP8 weight that share a scale, in a checkpoint that says how it has such weights."""
        quantization = self.text.get(_QUANTIZATION)
        if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
            return None
        rows, columns = quantization["weight_block_size"]
        return rows, columns

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and reply together that the language model was made for."""
        return int(self.text["max_position_embeddings"])


def load_config(path: Path) -> InternVLConfig:
    """Read ``config.json`` and the processor and generation files beside it.

    Raises:
        CheckpointError: naming file and key for what is missing, unknown or out of range.
    """
    if not path.is_dir():
        raise CheckpointError(f"model {path}: no such directory; name the one that holds the checkpoint")
    top = read_section(path, "config.json")
    if top is None:
        raise CheckpointError(f"no config.json in {path.name!r}: not an InternVL checkpoint folder")
    architectures = top.get("architectures", list, [])
    if "InternVLChatModel" in architectures or top.values.get("model_type") == "internvl_chat":
        config = _github_config(path, top)
    elif "InternVLForConditionalGeneration" in architectures or top.values.get("model_type") == "internvl":
        config = _hf_config(path, top)
    else:
        raise top.error(
            "architectures",
            f"expected InternVLChatModel or InternVLForConditionalGeneration, found {str(architectures)[:64]}",
        )
    _check_geometry(top, config)
    return config


def _github_config(path: Path, top: Section) -> InternVLConfig:
    vision = _github_vision(top.section("vision_config"))
    text = _text_config(top, "llm_config")
    processor = read_section(path, "preprocessor_config.json") or Section("preprocessor_config.json", "", {})
    template = top.choice("template", tuple(SYSTEM_MESSAGES))
    return InternVLConfig(
        layout="github",
        vision=vision,
        text=text,
        downsample_ratio=top.positive("downsample_ratio", float, 0.5),
        ps_version=top.choice("ps_version", ("v1", "v2"), "v1"),
        select_layer=top.get("select_layer", int, -1),
        tiling=_tiling(
            top,
            ("min_dynamic_patch", 1),
            ("max_dynamic_patch", 6),
            use_thumbnail=top.get("use_thumbnail", bool, False),
            tile_size=top.positive("force_image_size", int, vision.image_size),
            dynamic=top.get("dynamic_image_size", bool, False),
        ),
        template=template,
        system_message=_system_message(top, template),
        image_mean=_rgb(processor, "image_mean", _IMAGENET_MEAN),
        image_std=_rgb(processor, "image_std", _IMAGENET_STD),
        projector_act="gelu",
        flash=_flash(top),
        tie_word_embeddings=_is_tied(path, top, text),
        generation=_generation(path, top, text),
    )


def _hf_config(path: Path, top: Section) -> InternVLConfig:
    vision = _hf_vision(top.section("vision_config"))
    text = _text_config(top, "text_config")
    processor = _hf_image_processor(path)
    top.choice("vision_feature_select_strategy", ("default",), "default")
    return InternVLConfig(
        layout="hf",
        vision=vision,
        text=text,
        downsample_ratio=top.positive("downsample_ratio", float, 0.5),
        ps_version="v2",
        select_layer=top.get("vision_feature_layer", int, -1),
        # InternVLProcessor passes crop_to_patches=True and a thumbnail whatever the image processor's own file says,
        # and the published -HF files do say crop_to_patches false. One tile is asked for with max_patches 1.
        tiling=_tiling(
            processor, ("min_patches", 1), ("max_patches", 12), use_thumbnail=True, tile_size=_hf_tile_size(processor)
        ),
        template="internvl3_5_gpt_oss" if text["model_type"] == "gpt_oss" else "internvl2_5",
        system_message=None,
        image_mean=_rgb(processor, "image_mean"),
        image_std=_rgb(processor, "image_std"),
        projector_act=top.get("projector_hidden_act", str, "gelu"),
        flash=_flash(top),
        tie_word_embeddings=_is_tied(path, top, text),
        generation=_generation(path, top, text),
    )


def _system_message(top: Section, template: str) -> str | None:
    """An explicit null is no system turn at all, which is neither the template's default nor an empty message."""
    if top.values.get("system_message", "") is None:
        return None
    return top.get("system_message", str, SYSTEM_MESSAGES[template])


def _github_vision(section: Section) -> VisionConfig:
    return VisionConfig(
        hidden_size=section.positive("hidden_size", int, 3200),
        intermediate_size=section.positive("intermediate_size", int, 12800),
        num_hidden_layers=section.positive("num_hidden_layers", int, 48),
        num_attention_heads=section.positive("num_attention_heads", int, 25),
        image_size=section.positive("image_size", int, 224),
        patch_size=section.positive("patch_size", int, 14),
        num_channels=section.positive("num_channels", int, 3),
        norm_type=section.choice("norm_type", ("layer_norm", "rms_norm"), "rms_norm"),
        layer_norm_eps=section.positive("layer_norm_eps", float, 1e-6),
        qkv_bias=section.get("qkv_bias", bool, False),
        qk_normalization=section.get("qk_normalization", bool, True),
        hidden_act=section.get("hidden_act", str, "gelu"),
    )


def _hf_vision(section: Section) -> VisionConfig:
    _require(section, "use_mean_pooling", True)
    _require(section, "use_absolute_position_embeddings", True)
    return VisionConfig(
        hidden_size=section.positive("hidden_size", int, 1024),
        intermediate_size=section.positive("intermediate_size", int, 4096),
        num_hidden_layers=section.positive("num_hidden_layers", int, 24),
        num_attention_heads=section.positive("num_attention_heads", int, 16),
        image_size=_side(section, "image_size", 448),
        patch_size=_side(section, "patch_size", 14),
        num_channels=section.positive("num_channels", int, 3),
        norm_type=section.choice("norm_type", ("layer_norm", "rms_norm"), "layer_norm"),
        layer_norm_eps=section.positive("layer_norm_eps", float, 1e-6),
        qkv_bias=section.get("attention_bias", bool, False),
        qk_normalization=section.get("use_qk_norm", bool, False),
        hidden_act=section.get("hidden_act", str, "gelu"),
    )


def _require(section: Section, key: str, value: bool) -> None:
    """Refuse a switch of the transformers class that no InternVL model uses and our ViT does not have."""
    if section.get(key, bool, value) is not value:
        raise section.error(key, f"only {value} is supported")


def _side(section: Section, key: str, default: int) -> int:
    """A side in pixels, written as a number or as [height, width]."""
    value = section.values.get(key)
    if isinstance(value, list):
        if len(value) != 2 or value[0] != value[1]:
            raise section.error(key, f"expected a square, found {str(value)[:64]}")
        section = Section(section.file, section.path, {key: value[0]})
    return section.positive(key, int, default)


def _text_config(top: Section, key: str) -> dict[str, Any]:
    section = top.section(key)
    text = dict(section.values)
    if not section.has("model_type"):
        architecture = next(iter(section.get("architectures", list, [])), "")
        if architecture not in _TEXT_ARCHITECTURES:
            raise section.error("model_type", f"missing, expected one of {', '.join(TEXT_MODEL_TYPES)}")
        text["model_type"] = _TEXT_ARCHITECTURES[architecture]
    else:
        section.choice("model_type", TEXT_MODEL_TYPES)
    for key in ("hidden_size", "vocab_size", "max_position_embeddings"):
        section.positive(key, int)
    for declared in (top, section):
        if isinstance(declared.values.get(_QUANTIZATION), dict):
            _check_fp8(declared.section(_QUANTIZATION))
            text[_QUANTIZATION] = declared.values[_QUANTIZATION]
            break
    return text


def _check_fp8(section: Section) -> None:
    """Of FP8 weights only: what else a config names may be how somebody once ran the model. Tensors do not lie."""
    if section.values.get("quant_method") != "fp8":
        return
    block = section.get("weight_block_size", list)
    if len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise section.error("weight_block_size", f"expected rows and columns of a block, found {str(block)[:64]}")
    section.choice("activation_scheme", ("dynamic",), "dynamic")


def _tiling(
    section: Section,
    minimum: tuple[str, int],
    maximum: tuple[str, int],
    *,
    use_thumbnail: bool,
    tile_size: int,
    dynamic: bool = True,
) -> Tiling:
    min_tiles = section.positive(minimum[0], int, minimum[1])
    max_tiles = section.positive(maximum[0], int, maximum[1])
    if min_tiles > max_tiles:
        raise section.error(minimum[0], f"{min_tiles} is above {maximum[0]} {max_tiles}")
    return Tiling(min_tiles, max_tiles, use_thumbnail, tile_size, dynamic)


def _hf_image_processor(path: Path) -> Section:
    """transformers 5 nests the image processor in processor_config.json, which wins over the older file."""
    processor = read_section(path, "processor_config.json")
    if processor is not None and processor.has("image_processor"):
        return processor.section("image_processor")
    image_processor = read_section(path, "preprocessor_config.json")
    if image_processor is None:
        raise CheckpointError("neither preprocessor_config.json nor an image_processor in processor_config.json")
    return image_processor


def _hf_tile_size(processor: Section) -> int:
    size = processor.section("size")
    height, width = size.positive("height", int), size.positive("width", int)
    if height != width:
        raise processor.error("size", f"expected a square, found {height} x {width}")
    return height


def _rgb(section: Section, key: str, default: Any = MISSING) -> tuple[float, float, float]:
    values = section.get(key, list, default if default is MISSING else list(default))
    if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
        raise section.error(key, f"expected three numbers, found {str(values)[:64]}")
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _flash(top: Section) -> FlashConfig | None:
    if not top.get("flash_mode", bool, False):
        return None
    thresholds = {key: top.get(key, float) for key in ("flash_relative_threshold", "flash_absolute_threshold")}
    for key, value in thresholds.items():
        if not 0 <= value <= 1:
            raise top.error(key, f"expected a number from 0 to 1, found {value}")
    return FlashConfig(*thresholds.values())


def _is_tied(path: Path, top: Section, text: Mapping[str, Any]) -> bool:
    """Whether the language model's head is its embedding. A head on disk decides, as in transformers 5.

    The flag alone does not tell: a config leaves it out when it equals its class's default, which has changed from
    version to version and differs between the top level and the text config.
    """
    default = text.get("tie_word_embeddings")
    flag = top.get("tie_word_embeddings", bool, True if default is None else default)
    has_head = has_weights(path) and not tensor_names(path).isdisjoint(_HEAD_NAMES)
    return flag and not has_head


def _generation(path: Path, top: Section, text: Mapping[str, Any]) -> GenerationDefaults:
    """An explicit ``do_sample: false`` means greedy; sampling values a file does not name are neutral."""
    section = read_section(path, "generation_config.json") or Section("generation_config.json", "", {})
    is_greedy = section.get("do_sample", bool, True) is False
    return GenerationDefaults(
        temperature=0.0 if is_greedy else section.get("temperature", float, 1.0),
        top_p=section.get("top_p", float, 1.0),
        top_k=section.get("top_k", int, 0),
        repetition_penalty=section.positive("repetition_penalty", float, 1.0),
        eos_token_ids=_eos_token_ids(section, top, Section(top.file, "text config.", text)),
    )


def _eos_token_ids(*sections: Section) -> tuple[int, ...]:
    """Ids of the first section that names any: the order in which transformers' ``generate`` looks for them."""
    for section in sections:
        value = section.values.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(token_id, int) for token_id in ids):
            raise section.error("eos_token_id", f"expected token ids, found {str(value)[:64]}")
        return tuple(ids)
    return ()


def _check_geometry(top: Section, config: InternVLConfig) -> None:
    for problem in _geometry_problems(config):
        raise CheckpointError(f"{top.file}: {problem}")


def _geometry_problems(config: InternVLConfig) -> Iterator[str]:
    vision, side = config.vision, config.tiling.tile_size
    if vision.hidden_size % vision.num_attention_heads:
        yield f"vision hidden_size {vision.hidden_size} is not a multiple of {vision.num_attention_heads} heads"
    if vision.image_size % vision.patch_size or side % vision.patch_size:
        yield f"image sizes {vision.image_size} and {side} must be multiples of patch_size {vision.patch_size}"
    if (factor := 1 / config.downsample_ratio) != int(factor) or side // vision.patch_size % int(factor):
        yield f"downsample_ratio {config.downsample_ratio} does not divide {side // vision.patch_size} patches a side"
    if config.flash is not None:
        if vision.hidden_size % VIR_HEADS:
            yield f"vision hidden_size {vision.hidden_size} is not a multiple of the {VIR_HEADS} heads of ViR"
        if side // vision.patch_size % int(2 * factor):
            yield f"{side // vision.patch_size} patches a side cannot be divided once more for compressed tiles"
    num_states = vision.num_hidden_layers + 1
    if not -num_states <= config.select_layer < num_states:
        yield f"select_layer {config.select_layer} of a ViT with {vision.num_hidden_layers} layers"
