"""Which parameter a tensor on disk belongs to, by its name alone, in every layout a checkpoint may have.

Canonical names: InternVL's own for vision, those of transformers' ``*ForCausalLM`` for language. Knows nothing of
files or tensors.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

from common.model.config import Layout

Role = Literal["vision", "language"]


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of a parameter that one tensor fills: slot ``slot`` of ``num_slots``, of one expert or of all."""

    slot: int = 0
    num_slots: int = 1
    expert: int | None = None


WHOLE: Final = Part()

# Left: transformers, without the leading "model."; right: InternVL.
_HF_VISION_NAMES: Final = (
    ("vision_tower.", "vision_model."),
    (".embeddings.cls_token", ".embeddings.class_embedding"),
    (".embeddings.patch_embeddings.projection.", ".embeddings.patch_embedding."),
    (".embeddings.position_embeddings", ".embeddings.position_embedding"),
    (".encoder.layer.", ".encoder.layers."),
    (".attention.projection_layer.", ".attn.proj."),
    (".attention.", ".attn."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".lambda_1", ".ls1"),
    (".lambda_2", ".ls2"),
    ("multi_modal_projector.layer_norm.", "mlp1.0."),
    ("multi_modal_projector.linear_1.", "mlp1.1."),
    ("multi_modal_projector.linear_2.", "mlp1.3."),
)
_HF_FLASH_NAMES: Final = (
    ("mlp2.norm.", "mlp2.0."),
    ("mlp2.dense1.", "mlp2.1."),
    ("mlp2.dense2.", "mlp2.4."),
    ("mlp2.dense3.", "mlp2.7."),
    (".gate.gate_norm.", ".gate.0."),
    (".gate.gate_proj.", ".gate.1."),
    (".dense_in.", ".0."),
    (".dense_out.", ".3."),
)
_FLASH_PREFIXES: Final = ("mlp2.", "pooling_before_gating.", "gating.")
_VISION_PREFIXES: Final = ("vision_model.", "vision_tower.", "multi_modal_projector.", "mlp1.", *_FLASH_PREFIXES)
_LANGUAGE_PREFIXES: Final = ("language_model.", "lm_head.")

_FUSED: Final = (
    (re.compile(r"(?P<base>vision_model\..*\.attn\.)(?P<slot>[qkv]_proj)\."), "qkv.", ("q_proj", "k_proj", "v_proj")),
    (
        re.compile(r"(?P<base>pooling_before_gating\.attn\d\.)(?P<slot>query|key|value)\."),
        "in_proj_",
        ("query", "key", "value"),
    ),
)
_EXPERT: Final = re.compile(r"(?P<base>.*\.mlp\.experts\.)(?P<expert>\d+)\.(?P<slot>gate|up|down)_proj\.weight")
_UNUSED: Final = (
    # Stored in Flash checkpoints, used by neither the published code nor lmdeploy.
    re.compile(r"pooling_before_gating\.(attn|norm)[34]\..*"),
    # Of masked pre-training, and a buffer that old checkpoints kept.
    re.compile(r"vision_model\.embeddings\.mask_token"),
    re.compile(r"model\..*\.rotary_emb\.inv_freq"),
)


def locate(name: str) -> tuple[Role | None, str, Part]:
    """Role, canonical parameter and part of it that the tensor called ``name`` on disk belongs to."""
    bare = name.removeprefix("model.")
    if bare.startswith(_VISION_PREFIXES):
        return "vision", *_locate_vision(bare)
    if bare.startswith(_LANGUAGE_PREFIXES):
        return "language", *_locate_language(bare)
    return None, name, WHOLE


def _locate_vision(name: str) -> tuple[str, Part]:
    for theirs, ours in (*_HF_VISION_NAMES, *_HF_FLASH_NAMES):
        name = name.replace(theirs, ours)
    name = re.sub(r"(gating\.block\d\.)norm\.", r"\g<1>5.", name)
    for pattern, fused, slots in _FUSED:
        if match := pattern.match(name):
            return match["base"] + fused + name[match.end() :], Part(slots.index(match["slot"]), len(slots))
    return name, WHOLE


def _locate_language(name: str) -> tuple[str, Part]:
    if not name.startswith("lm_head."):
        name = name.removeprefix("language_model.")
        name = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
    if match := _EXPERT.fullmatch(name):
        expert = int(match["expert"])
        if match["slot"] == "down":
            return match["base"] + "down_proj", Part(expert=expert)
        return match["base"] + "gate_up_proj", Part(("gate", "up").index(match["slot"]), 2, expert)
    return name, WHOLE


def is_unused(name: str, parameters: Collection[str]) -> bool:
    """Whether a tensor may be left on disk: documented as unused, or of a Flash module this server has not built."""
    if name in parameters:
        return False
    if any(pattern.fullmatch(name) for pattern in _UNUSED):
        return True
    prefix = next((prefix for prefix in _FLASH_PREFIXES if name.startswith(prefix)), None)
    return prefix is not None and not any(parameter.startswith(prefix) for parameter in parameters)


def name_on_disk(parameter: str, layout: Layout) -> str:
    """What a parameter is called in files of ``layout``, for messages."""
    is_vision = parameter.startswith(_VISION_PREFIXES)
    if layout == "github":
        return parameter if is_vision else f"language_model.{parameter}"
    if not is_vision:
        return re.sub(r"^model\.", "model.language_model.", parameter)
    for theirs, ours in _HF_VISION_NAMES:
        parameter = parameter.replace(ours, theirs)
    return "model." + parameter.replace(".attention.qkv.", ".attention.q_proj.")


def name_of_part(example: str, slot: int, expert: int | None) -> str:
    """The name that another part of the parameter would have, given that of one part on disk."""
    if expert is not None:
        example = re.sub(r"(\.experts\.)\d+\.", rf"\g<1>{expert}.", example)
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value")):
        if slot < len(names):
            example = re.sub(rf"\.({'|'.join(names)})\.", f".{names[slot]}.", example)
    return example
