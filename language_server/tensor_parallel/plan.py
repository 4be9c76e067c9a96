"""Who holds what: transformers' tensor-parallel plan of a model, as cuts of its parameters.

The plan is the model's own (``base_model_tp_plan`` of its config), but for GPT-OSS, for which transformers 5.23 plans
experts only. Knows nothing of processes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from common.model.cuts import Cut
from common.service.errors import ConfigError
from language_server.backbone import make_text_config

OPTION: Final = "--tensor-parallel-size"
HEAD: Final = "lm_head.weight"
_DIVIDED: Final = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size")
_ADDED_ONCE: Final = "added_once"  # ours: a bias behind a sum over the ranks

# As the plans of transformers would say it: heads and their sinks divided, every expert divided. Its experts are
# stored [expert, in, out], with gate and up interleaved, so that a range of columns holds whole pairs.
_GPT_OSS: Final[Mapping[str, str]] = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.sinks": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.experts.gate_up_proj": "rowwise",
    "layers.*.mlp.experts.gate_up_proj_bias": "rowwise",
    "layers.*.mlp.experts.down_proj": "colwise",
    "layers.*.mlp.experts.down_proj_bias": _ADDED_ONCE,
}
_OURS: Final = {"gpt_oss": _GPT_OSS}
_SUMMED: Final = ("rowwise", "moe_tp_experts")
_WHOLE: Final = ("moe_tp_experts", "replicate", "replicated_with_grad_allreduce")
_KNOWN: Final = frozenset({"colwise", "packed_colwise", _ADDED_ONCE, *_SUMMED, *_WHOLE})


@dataclass(frozen=True, slots=True)
class Plan:
    """Of one rank.

    Attributes:
        cuts: parameters of which it holds a share; it holds the others whole.
        summed: modules whose outputs the ranks add up.
        added_once: parameters that belong behind such a sum: rank 0 adds them, for the others they are zero.
    """

    cuts: Mapping[str, Cut]
    summed: tuple[str, ...]
    added_once: tuple[str, ...]


def check_size(text_config: Mapping[str, Any], num_ranks: int) -> None:
    """Refuse what cannot be divided.

    Raises:
        ConfigError: the model has no plan, or ``num_ranks`` does not divide its heads and layers.
        CheckpointError: a foreign text config.
    """
    config = make_text_config(text_config, tie_word_embeddings=False)
    _rules(config)
    lengths = {name: length for name in _DIVIDED if (length := getattr(config, name, None))}
    common = math.gcd(*lengths.values())
    if common % num_ranks == 0:
        return
    name = next(name for name, length in lengths.items() if length % num_ranks)
    allowed = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
    raise ConfigError(
        f"{OPTION} {num_ranks}: {name} of this model is {lengths[name]} and cannot be divided by it; allowed: {allowed}"
    )


def make_plan(model: Any, rank: int, num_ranks: int) -> Plan:
    """Of a ``*ForCausalLM`` in its full shape, which needs no memory. ``check_size`` must have passed."""
    rules = _rules(model.config)
    cuts: dict[str, Cut] = {}
    summed: list[str] = []
    added_once: list[str] = []
    for module_name, module in model.model.named_modules():
        rule = rules.get(_pattern(module_name))
        if rule in _SUMMED:
            summed.append(f"model.{module_name}")
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{module_name}.{name}"
            style = rules.get(_pattern(path), rule)
            if style == _ADDED_ONCE or (style == "rowwise" and name == "bias"):
                added_once.append(f"model.{path}")
            elif style is not None and style not in _WHOLE:
                cuts[f"model.{path}"] = _cut(style, tuple(parameter.shape), rank, num_ranks)
    cuts[HEAD] = _cut("colwise", (model.config.vocab_size, model.config.hidden_size), rank, num_ranks)
    return Plan(cuts, tuple(summed), tuple(added_once))


def _rules(config: Any) -> Mapping[str, str]:
    """Style by module or parameter of the base model, layer numbers as ``*``. Raises ConfigError without a plan."""
    rules: Mapping[str, str] = _OURS.get(config.model_type) or config.base_model_tp_plan or {}
    if not any(name.endswith(".k_proj") and style == "colwise" for name, style in rules.items()):
        raise ConfigError(f"{OPTION}: this release of transformers has no plan for {config.model_type}; allowed: 1")
    if foreign := sorted(set(rules.values()) - _KNOWN):
        raise ConfigError(
            f"{OPTION}: this release of transformers divides {config.model_type} by {foreign[0]!r}, which is unknown;"
            " allowed: 1"
        )
    return rules


def _cut(style: str, shape: tuple[int, ...], rank: int, num_ranks: int) -> Cut:
    """Matrices are [..., out, in]: a column of the plan's names is a row of ours."""
    dim = -1 if style == "rowwise" or len(shape) == 1 else -2
    num_slots = 2 if style == "packed_colwise" and len(shape) > 1 else 1
    return Cut(dim, shape[dim], rank, num_ranks, num_slots)


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
