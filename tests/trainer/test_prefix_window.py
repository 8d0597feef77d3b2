"""A decoder cut at a border, and one with weights above it alone, compute what the whole does."""

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from stagetune_trainer.decoder import Decoder, find_decoder
from stagetune_trainer.loss import AnswerLoss
from stagetune_trainer.prefix.window import LayerWindow, WindowError
from stagetune_trainer.tail_model import (
    drop_below,
    is_whole,
    layers_without_weights,
    load_part,
    lowest_loaded,
)

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3"]
TYPES = [torch.float32, torch.bfloat16]
MakeModel = Callable[..., Path]


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.eval()


def some_tokens(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def hidden(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    states: torch.Tensor = decoder.backbone(input_ids=tokens, use_cache=False).last_hidden_state
    return states


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_cut_in_three_is_the_pass_in_every_family(
    family: str, make_tiny_model: MakeModel
) -> None:
    decoder = find_decoder(load(make_tiny_model(family)))
    tokens = some_tokens()
    expected = hidden(decoder, tokens)
    window = LayerWindow(decoder)
    low = window.run(tokens, stop=1)
    middle = window.run(tokens, start=1, states=low, stop=3)
    with window.above(3, middle):
        found = hidden(decoder, torch.zeros_like(tokens))
    assert torch.equal(found, expected)
    assert torch.equal(middle, window.run(tokens, stop=3))
    # Nothing of it stays.
    assert torch.equal(hidden(decoder, tokens), expected)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [1, 3])
def test_a_model_with_weights_above_a_border_computes_as_the_whole(
    first: int, family: str, dtype: torch.dtype, make_tiny_model: MakeModel
) -> None:
    directory = make_tiny_model(family)
    whole = find_decoder(load(directory, dtype))
    tokens = some_tokens()
    states = LayerWindow(whole).run(tokens, stop=first)
    expected = hidden(whole, tokens)
    model = load_part(directory, dtype, first)
    assert model is not None
    tail = find_decoder(model)
    assert lowest_loaded(tail) == first
    assert tail.embeddings.weight.is_meta is not tail.is_tied
    assert not tail.model.training
    for name, tensor in tail.model.named_parameters():
        if not tensor.is_meta:
            assert tensor.dtype is dtype
            assert torch.equal(tensor, whole.model.get_parameter(name)), name
    for name, buffer in tail.model.named_buffers():
        assert torch.equal(buffer, whole.model.get_buffer(name)), name
    window = LayerWindow(tail)
    with window.above(first, states):
        assert torch.equal(hidden(tail, tokens), expected)
        logits = tail.model(input_ids=tokens).logits
    assert torch.equal(logits, whole.model(input_ids=tokens).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("below", [0, 1])
def test_the_layers_between_two_borders_compute_as_in_the_whole(
    below: int, family: str, make_tiny_model: MakeModel
) -> None:
    directory = make_tiny_model(family)
    whole, tokens = LayerWindow(find_decoder(load(directory))), some_tokens()
    states = whole.run(tokens, stop=below) if below else None
    expected = whole.run(tokens, stop=3)
    model = load_part(directory, torch.float32, below, 3)
    assert model is not None
    part = find_decoder(model)
    assert layers_without_weights(part) == {*range(below), 3}
    assert part.embeddings.weight.is_meta is (below > 0)
    assert part.head_weight.is_meta is (below > 0 or not part.is_tied)
    assert not is_whole(part)
    found = LayerWindow(part).run(tokens, start=below, states=states, stop=3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_below_can_be_dropped_from_a_whole_model(
    family: str, make_tiny_model: MakeModel
) -> None:
    decoder = find_decoder(load(make_tiny_model(family)))
    tokens = some_tokens()
    window = LayerWindow(decoder)
    states = window.run(tokens, stop=2)
    expected = hidden(decoder, tokens)
    drop_below(decoder, 2)
    assert lowest_loaded(decoder) == 2
    with window.above(2, states):
        assert torch.equal(hidden(decoder, tokens), expected)


def test_a_sharded_model_is_loaded_from_the_files_that_hold_its_upper_layers(
    tmp_path: Path, make_tiny_model: MakeModel
) -> None:
    load(make_tiny_model("llama")).save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = load_part(tmp_path, torch.float32, 2)
    assert model is not None
    whole = load(tmp_path)
    above = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(above), whole.get_parameter(above))


def test_a_model_whose_files_name_its_weights_otherwise_is_not_loaded_in_part(
    tmp_path: Path, make_tiny_model: MakeModel
) -> None:
    model = load(make_tiny_model("llama"))
    model.model.save_pretrained(tmp_path)
    assert load_part(tmp_path, torch.float32, 2) is None


def test_a_model_that_keeps_more_than_parameters_is_not_loaded_in_part(
    make_tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A persistent buffer is read from the files too; the tail would have that of a new model."""
    build = LlamaMLP.__init__

    def with_a_buffer(module: LlamaMLP, *args: Any, **kwargs: Any) -> None:
        build(module, *args, **kwargs)
        module.register_buffer("bias", torch.zeros(3))

    monkeypatch.setattr(LlamaMLP, "__init__", with_a_buffer)
    assert load_part(make_tiny_model("llama"), torch.float32, 2) is None


def test_a_model_with_a_type_of_its_own_for_some_weights_is_not_loaded_in_part(
    make_tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["norm"])
    assert load_part(make_tiny_model("llama"), torch.bfloat16, 2) is None


def test_a_file_with_two_matrices_for_a_tied_one_is_not_loaded_in_part(
    tmp_path: Path, make_tiny_model: MakeModel
) -> None:
    """transformers leaves the two apart then."""
    directory = tmp_path / "model"
    shutil.copytree(make_tiny_model("llama", tie_word_embeddings=True), directory)
    assert load_part(directory, torch.float32, 2) is not None
    tensors = load_file(directory / "model.safetensors")
    other = tensors["model.embed_tokens.weight"] + 1
    save_file(
        {**tensors, "lm_head.weight": other}, directory / "model.safetensors", {"format": "pt"}
    )
    assert load_part(directory, torch.float32, 2) is None


def test_weights_that_are_dropped_leave_the_memory(make_tiny_model: MakeModel) -> None:
    decoder = find_decoder(load(make_tiny_model("llama", tie_word_embeddings=False)))
    weights = [
        weakref.ref(parameter.untyped_storage())
        for part in (decoder.layers[0], decoder.embeddings)
        for parameter in part.parameters()
    ]
    LayerWindow(decoder)
    drop_below(decoder, 1)
    gc.collect()
    assert not any(weight() for weight in weights)


def test_the_head_is_checked_without_what_lies_below(make_tiny_model: MakeModel) -> None:
    """A soft cap is the model's own; the check finds it in the upper layers alone."""
    directory = make_tiny_model("gemma2")
    model = load_part(directory, torch.float32, 2)
    assert model is not None
    tail = find_decoder(model)
    window = LayerWindow(tail)
    with window.probing(2):
        loss = AnswerLoss(tail)
    assert loss.head.module is tail.head


def test_a_step_above_a_border_costs_what_lies_above_it(make_tiny_model: MakeModel) -> None:
    """The whole step has one forward pass of the layers below more, and nothing else."""
    decoder = find_decoder(load(make_tiny_model("llama", num_layers=8)))
    decoder.model.requires_grad_(False)
    decoder.layers[7].requires_grad_(True)
    tokens = some_tokens()
    loss = AnswerLoss(decoder)
    window = LayerWindow(decoder)
    states = window.run(tokens, stop=7)
    with FlopCounterMode(display=False) as below:
        window.run(tokens, stop=7)
    with FlopCounterMode(display=False) as whole:
        loss(tokens, tokens)[0].backward()
    with FlopCounterMode(display=False) as above, window.above(7, states):
        loss(tokens, tokens)[0].backward()
    assert above.get_total_flops() == whole.get_total_flops() - below.get_total_flops()
    assert above.get_total_flops() < 0.5 * whole.get_total_flops()


def test_layers_that_return_more_than_a_tensor_are_not_cut(make_tiny_model: MakeModel) -> None:
    decoder = find_decoder(load(make_tiny_model("llama")))
    plain = decoder.layers[1].forward

    def returns_a_tuple(*args: Any, **kwargs: Any) -> Any:
        return (plain(*args, **kwargs),)

    decoder.layers[1].forward = returns_a_tuple  # type: ignore[method-assign]
    with pytest.raises(WindowError, match="LlamaDecoderLayer returns more"):
        LayerWindow(decoder).run(some_tokens(), stop=2)


def test_states_are_known_again_in_another_tensor_and_changed_ones_are_refused(
    make_tiny_model: MakeModel,
) -> None:
    """As DeepSpeed's hooks hand them to a layer, and as a family that rescales them would."""
    decoder = find_decoder(load(make_tiny_model("llama")))
    tokens = some_tokens()
    expected = hidden(decoder, tokens)
    window = LayerWindow(decoder)
    states = window.run(tokens, stop=2)
    hook = decoder.layers[2].register_forward_pre_hook(lambda _, given: (given[0].detach(),))
    with window.above(2, states):
        assert torch.equal(hidden(decoder, tokens), expected)
    hook.remove()
    decoder.layers[2].register_forward_pre_hook(lambda _, given: (2 * given[0],))
    with window.above(2, states), pytest.raises(WindowError, match="layer 2 is not given"):
        hidden(decoder, tokens)
