"""The shape read from a config.json is the one transformers builds from it, to the parameter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from stagetune_api.facts import ModelFacts
from stagetune_api.problems import ProblemReason
from stagetune_operator.model_facts import model_facts_from_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# No two sizes are equal or multiples of each other, so that a mix-up shows.
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 104,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD_DIM = {"head_dim": 10}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, **HEAD_DIM}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {}),
    ("mistral", HEAD_DIM),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", HEAD_DIM),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True, **HEAD_DIM}),
    ("gemma", HEAD_DIM),
    ("gemma2", HEAD_DIM),
    ("gemma2", {"attention_bias": True, "tie_word_embeddings": False, **HEAD_DIM}),
    ("gemma3_text", HEAD_DIM),
    ("phi3", {}),
    ("phi3", {"tie_word_embeddings": True}),
    ("phi", {}),
    ("phi", {"qk_layernorm": True}),
]


def _config(model_type: str, extra: dict[str, Any]) -> PretrainedConfig:
    return CONFIG_MAPPING[model_type](**SIZES, **extra)


def _model(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _facts(config: dict[str, Any]) -> ModelFacts:
    facts = model_facts_from_config(config)
    assert isinstance(facts, ModelFacts), facts
    return facts


@pytest.mark.parametrize(("model_type", "extra"), VARIANTS)
def test_counts_and_shapes_equal_those_of_the_model(model_type: str, extra: dict[str, Any]) -> None:
    config = _config(model_type, extra)
    model = _model(config)

    facts = _facts(json.loads(config.to_json_string()))

    layer = model.model.layers[0]
    linear = {
        name: (module.in_features, module.out_features)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert facts.parameters == _num_parameters(model)
    assert facts.layer.parameters == _num_parameters(layer)
    assert facts.layer.linear_shapes == linear
    assert facts.embedding_parameters == _num_parameters(model.get_input_embeddings())
    assert facts.tied_embeddings == tied
    assert facts.num_layers == len(model.model.layers)
    assert (
        facts.num_attention_heads * facts.head_dim
        == linear.get("self_attn.o_proj", linear.get("self_attn.dense", (0, 0)))[0]
    )


@pytest.mark.parametrize("model_type", sorted({model_type for model_type, _ in VARIANTS}))
def test_what_a_saved_config_leaves_out_is_the_familys_default(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type](num_hidden_layers=1)
    model = _model(config)

    facts = _facts(json.loads(config.to_json_string(use_diff=True)))

    assert facts.parameters == _num_parameters(model)


def test_the_qwen_example_has_the_published_sizes() -> None:
    config = json.loads((EXAMPLES / "qwen2.5-7b-instruct.config.json").read_text())

    facts = _facts(config)

    assert facts.parameters == 7_615_616_512
    assert facts.layer.parameters == 233_057_792
    assert facts.embedding_parameters == facts.head_parameters == 544_997_376
    assert facts.dtype_bytes == 2
    assert facts.digest is None


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_stored_number_format_is_read_under_both_its_names(key: str) -> None:
    config = {**_config("llama", {}).to_dict(), "dtype": None}

    assert _facts({**config, key: "bfloat16"}).dtype_bytes == 2
    assert _facts({**config, key: "float32"}).dtype_bytes == 4


@pytest.mark.parametrize("model_type", ["gemma3", "mixtral", None, 3])
def test_an_unknown_family_is_named_with_the_known_ones(model_type: object) -> None:
    problems = model_facts_from_config({**SIZES, "model_type": model_type})

    assert isinstance(problems, list)
    assert [problem.reason for problem in problems] == [ProblemReason.NOT_YET_SUPPORTED]
    assert repr(model_type) in problems[0].message
    assert "gemma3_text, llama, mistral, phi, phi3, qwen2, qwen3" in problems[0].message
    assert "stagetune run" in problems[0].message


def test_every_missing_or_wrong_size_is_named_at_once() -> None:
    config = {**SIZES, "model_type": "llama", "vocab_size": "many", "intermediate_size": 0}
    del config["hidden_size"]

    problems = model_facts_from_config(config)

    assert isinstance(problems, list)
    assert [(problem.reason, problem.message.split(";")[0]) for problem in problems] == [
        (ProblemReason.REQUIRED, "config.json says hidden_size: None"),
        (ProblemReason.INVALID, "config.json says intermediate_size: 0"),
        (ProblemReason.INVALID, "config.json says vocab_size: 'many'"),
    ]
