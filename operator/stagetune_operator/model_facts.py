"""The shape of a model from its `config.json` alone, so that a plan needs no download.

Prepare measures the same facts on the real model (`stagetune_trainer.model`), for any family; this
table knows the families below and answers with a Problem for the rest. Parameter counts are exact.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stagetune_api.facts import LayerFacts, ModelFacts
from stagetune_api.problems import Problem, ProblemReason

_PATH = "spec.model.source"
_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_QUERY_KEY_VALUE = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
_ATTENTION = _QUERY_KEY_VALUE | {"self_attn.o_proj"}
_FEED_FORWARD = frozenset({"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
_PHI = _QUERY_KEY_VALUE | {"self_attn.dense", "mlp.fc1", "mlp.fc2"}


@dataclass(frozen=True)
class _Family:
    """What the configuration of a model type leaves unsaid."""

    linear_modules: frozenset[str] = _ATTENTION | _FEED_FORWARD
    biased: frozenset[str] = frozenset()
    bias_switches: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Configuration keys that give biases to these modules."""
    hidden_norms: int = 2
    """Norms of the hidden size in a layer."""
    query_key_norms: bool = False
    query_key_norm_switch: str | None = None
    norm_vectors: int = 1
    """Vectors of a norm: a LayerNorm has a bias too."""
    head_bias: bool = False
    tied: bool = False
    head_dim: int | None = None
    """Head dimension where the configuration has none; None: hidden size over heads."""


_ATTENTION_BIAS = {"attention_bias": _ATTENTION}
_GEMMA = _Family(bias_switches=_ATTENTION_BIAS, tied=True, head_dim=256)
_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(bias_switches={**_ATTENTION_BIAS, "mlp_bias": _FEED_FORWARD}),
    "mistral": _Family(),
    "qwen2": _Family(biased=_QUERY_KEY_VALUE),
    "qwen3": _Family(bias_switches=_ATTENTION_BIAS, query_key_norms=True, head_dim=128),
    "gemma": _GEMMA,
    "gemma2": _Family(bias_switches=_ATTENTION_BIAS, hidden_norms=4, tied=True, head_dim=256),
    "gemma3_text": _Family(
        bias_switches=_ATTENTION_BIAS, hidden_norms=4, query_key_norms=True, tied=True, head_dim=256
    ),
    "phi3": _Family(
        linear_modules=frozenset(
            {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
        )
    ),
    "phi": _Family(
        linear_modules=_PHI,
        biased=_PHI,
        hidden_norms=1,
        query_key_norm_switch="qk_layernorm",
        norm_vectors=2,
        head_bias=True,
    ),
}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


def model_facts_from_config(config: Mapping[str, Any]) -> ModelFacts | list[Problem]:
    """Return the facts of the model that `config` (a parsed config.json) describes.

    Where the model type is unknown or a size is missing, the problems say so; nothing is guessed.
    """
    model_type = config.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        return [_unknown_family(model_type)]
    problems = list(_size_problems(config))
    return problems or _facts(str(model_type), family, config)


def _unknown_family(model_type: object) -> Problem:
    return Problem(
        path=_PATH,
        reason=ProblemReason.NOT_YET_SUPPORTED,
        message=f"the plan cannot be made from config.json: its model_type {model_type!r} is not "
        f"one of {', '.join(sorted(_FAMILIES))}; `stagetune run` measures any model in prepare",
    )


def _size_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    for key in _SIZES:
        value = config.get(key)
        if not isinstance(value, int) or value < 1:
            yield Problem(
                path=_PATH,
                reason=ProblemReason.REQUIRED if value is None else ProblemReason.INVALID,
                message=f"config.json says {key}: {value!r}; a positive whole number is needed. "
                "Is the file that of a decoder-only language model?",
            )


def _facts(model_type: str, family: _Family, config: Mapping[str, Any]) -> ModelFacts:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or family.head_dim or hidden // heads
    shapes = _linear_shapes(family, config, head_dim)
    tied = bool(config.get("tie_word_embeddings", family.tied))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return ModelFacts(
        model_type=model_type,
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        vocab_size=vocabulary,
        num_attention_heads=heads,
        head_dim=head_dim,
        tied_embeddings=tied,
        layer=LayerFacts(
            parameters=_layer_parameters(family, config, shapes, head_dim), linear_shapes=shapes
        ),
        embedding_parameters=vocabulary * hidden,
        head_parameters=(0 if tied else vocabulary * hidden)
        + (vocabulary if family.head_bias else 0),
        final_norm_parameters=family.norm_vectors * hidden,
        dtype_bytes=_DTYPE_BYTES.get(dtype, 4),
    )


def _linear_shapes(
    family: _Family, config: Mapping[str, Any], head_dim: int
) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of the family's linear modules, by their name inside a layer."""
    hidden, feed_forward = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * head_dim
    key = (config.get("num_key_value_heads") or config["num_attention_heads"]) * head_dim
    shapes = {
        "self_attn.q_proj": (hidden, query),
        "self_attn.k_proj": (hidden, key),
        "self_attn.v_proj": (hidden, key),
        "self_attn.qkv_proj": (hidden, query + 2 * key),
        "self_attn.o_proj": (query, hidden),
        "self_attn.dense": (query, hidden),
        "mlp.gate_proj": (hidden, feed_forward),
        "mlp.up_proj": (hidden, feed_forward),
        "mlp.gate_up_proj": (hidden, 2 * feed_forward),
        "mlp.down_proj": (feed_forward, hidden),
        "mlp.fc1": (hidden, feed_forward),
        "mlp.fc2": (feed_forward, hidden),
    }
    return {name: shape for name, shape in shapes.items() if name in family.linear_modules}


def _layer_parameters(
    family: _Family,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    head_dim: int,
) -> int:
    switched = [
        modules for key, modules in family.bias_switches.items() if bool(config.get(key, False))
    ]
    biased = family.biased.union(*switched)
    matrices = sum(inputs * outputs for inputs, outputs in shapes.values())
    biases = sum(outputs for name, (_, outputs) in shapes.items() if name in biased)
    norms: int = family.hidden_norms * config["hidden_size"]
    switch = family.query_key_norm_switch
    if family.query_key_norms or (switch is not None and config.get(switch)):
        norms += 2 * head_dim
    return matrices + biases + family.norm_vectors * norms
