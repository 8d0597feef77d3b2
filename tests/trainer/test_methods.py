"""What each method opens, hands on and puts back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stagetune_api.training_spec import LayerRange, LoraSpec, MethodSpec, TrainingSpec
from stagetune_trainer.methods import make_method
from stagetune_trainer.methods.adapters import merge_adapters
from stagetune_trainer.methods.lora import LoraMethod
from stagetune_trainer.optimizers import make_optimizer
from tiny_decoders import load, logits, perturb, stage

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "phi3"]
MakeModel = Callable[..., Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_full_stage_opens_its_layers_and_nothing_else(
    family: str, make_tiny_model: MakeModel
) -> None:
    decoder = load(make_tiny_model(family))
    opened = make_method(MethodSpec()).open(decoder, stage(1, 2))
    trainable = {name for name, p in decoder.model.named_parameters() if p.requires_grad}
    assert trainable == set(opened)
    assert {name.split(".layers.")[1].split(".")[0] for name in opened} == {"1", "2"}
    layer_parameters = sum(p.numel() for i in (1, 2) for p in decoder.layers[i].parameters())
    assert sum(p.numel() for p in opened.values()) == layer_parameters


def test_full_stage_opens_embeddings_norm_and_head_when_asked(make_tiny_model: MakeModel) -> None:
    decoder = load(make_tiny_model("llama", tie_word_embeddings=False))
    opened = make_method(MethodSpec()).open(decoder, stage(0, 3, embeddings=True, head=True))
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(opened)
    assert all(parameter.requires_grad for parameter in decoder.model.parameters())


def test_full_stage_keeps_fp32_masters_of_a_bf16_model(make_tiny_model: MakeModel) -> None:
    decoder = load(make_tiny_model("llama"), torch.bfloat16)
    method = make_method(MethodSpec())
    opened = method.open(decoder, stage(2, 3))
    assert {parameter.dtype for parameter in opened.values()} == {torch.float32}
    assert decoder.layers[0].mlp.up_proj.weight.dtype is torch.bfloat16
    handed_on = method.output(decoder, opened)
    assert {tensor.dtype for tensor in handed_on.values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["Full", "LoRA"])
def test_output_put_onto_the_base_gives_the_trained_model(
    kind: str, family: str, make_tiny_model: MakeModel
) -> None:
    spec = MethodSpec(type=kind)
    trained, method = load(make_tiny_model(family)), make_method(spec)
    before = logits(trained)
    parameters = method.open(trained, stage(1, 2))
    perturb(parameters)
    expected = logits(trained)
    assert not torch.equal(before, expected)

    restored = load(make_tiny_model(family))
    make_method(spec).apply(
        restored, LayerRange(first=1, last=2), method.output(trained, parameters)
    )
    assert torch.equal(logits(restored), expected)
    assert not any(parameter.requires_grad for parameter in restored.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_adapts_every_linear_module_of_its_layers_and_no_other(
    family: str, make_tiny_model: MakeModel
) -> None:
    decoder = load(make_tiny_model(family, num_layers=12))
    linear = {
        f"{decoder.layers_path}.1.{name}"
        for name, module in decoder.layers[1].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    opened = LoraMethod(LoraSpec(rank=2)).open(decoder, stage(1, 1))
    assert {name.rsplit(".lora_", 1)[0] for name in opened} == linear
    assert {name for name, p in decoder.model.named_parameters() if p.requires_grad} == {
        name.replace(".weight", ".default.weight") for name in opened
    }


def test_lora_begins_as_the_base_and_takes_only_the_named_modules(
    make_tiny_model: MakeModel,
) -> None:
    decoder = load(make_tiny_model("llama"))
    before = logits(decoder)
    method = LoraMethod(LoraSpec(rank=4, alpha=8.0, target_modules=["q_proj", "down_proj"]))
    opened = method.open(decoder, stage(2, 3))
    assert torch.equal(logits(decoder), before)
    assert {name.split(".")[-3] for name in opened} == {"q_proj", "down_proj"}


def test_earlier_adapters_stay_frozen_and_in_force(make_tiny_model: MakeModel) -> None:
    decoder, method = load(make_tiny_model("llama")), LoraMethod(LoraSpec(rank=2))
    first = method.open(decoder, stage(0, 1))
    perturb(first)
    expected = logits(decoder)
    output = method.output(decoder, first)

    later = load(make_tiny_model("llama"))
    method.apply(later, LayerRange(first=0, last=1), output)
    second = method.open(later, stage(2, 3, index=1))
    assert torch.equal(logits(later), expected)
    assert not set(first) & set(second)
    trainable = {name for name, p in later.model.named_parameters() if p.requires_grad}
    assert len(trainable) == len(second)


def test_merging_gives_a_plain_model_with_the_same_answers(make_tiny_model: MakeModel) -> None:
    decoder, method = load(make_tiny_model("qwen2")), LoraMethod(LoraSpec(rank=2))
    plain = set(decoder.model.state_dict())
    perturb(method.open(decoder, stage(0, 3)))
    expected = logits(decoder)
    merge_adapters(decoder)
    assert set(decoder.model.state_dict()) == plain
    torch.testing.assert_close(logits(decoder), expected, rtol=1e-4, atol=1e-5)


def test_optimizer_holds_what_the_stage_opened_and_nothing_else(make_tiny_model: MakeModel) -> None:
    decoder = load(make_tiny_model("llama"))
    opened = make_method(MethodSpec()).open(decoder, stage(1, 1))
    optimizer = make_optimizer(opened, TrainingSpec(weight_decay=0.1))
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in opened.values()}
    assert all(parameter.requires_grad for parameter in held)
    decayed, kept = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert all(parameter.ndim == 1 for parameter in kept["params"])
