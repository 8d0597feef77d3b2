"""The decoder's parts are found by structure, and the frozen prefix costs a forward pass only."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from stagetune_api.training_spec import LayerRange
from stagetune_trainer.decoder import (
    Decoder,
    checkpoint_activations,
    find_decoder,
    freeze_prefix,
)
from stagetune_trainer.loss import AnswerLoss

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3"]
MakeModel = Callable[..., Path]


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def random_batch(rows: int = 3, length: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 300, (rows, length), generator=generator)
    labels = input_ids.clone()
    labels[:, : length // 2] = -100
    return input_ids, labels


def open_layers(decoder: Decoder, first: int, last: int) -> None:
    decoder.model.requires_grad_(False)
    for index in range(first, last + 1):
        decoder.layers[index].requires_grad_(True)


def step_flops(decoder: Decoder) -> int:
    loss = AnswerLoss(decoder)
    input_ids, labels = random_batch(2, 64)
    with FlopCounterMode(display=False) as counter:
        loss_sum, _ = loss(input_ids, labels)
        loss_sum.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_loss_is_the_model_s_own_loss_in_every_family(
    family: str, make_tiny_model: MakeModel
) -> None:
    model = load(make_tiny_model(family)).eval()
    decoder = find_decoder(model)
    input_ids, labels = random_batch()
    expected = model(input_ids=input_ids, labels=labels).loss
    loss_sum, count = AnswerLoss(decoder)(input_ids, labels)
    assert count == int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(loss_sum / count, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model_in_every_family(
    family: str, make_tiny_model: MakeModel
) -> None:
    input_ids, labels = random_batch()
    whole = load(make_tiny_model(family)).eval()
    whole(input_ids=input_ids, labels=labels).loss.backward()
    decoder = find_decoder(load(make_tiny_model(family)).eval())
    open_layers(decoder, 2, 3)
    freeze_prefix(decoder, 2, embeddings_train=False)
    loss_sum, count = AnswerLoss(decoder)(input_ids, labels)
    (loss_sum / count).backward()
    expected = dict(whole.named_parameters())
    for name, parameter in decoder.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6, msg=name
            )
        else:
            assert parameter.grad is None, name


def test_model_with_an_unknown_head_computes_its_logits_itself(make_tiny_model: MakeModel) -> None:
    model = load(make_tiny_model("llama")).eval()
    input_ids, labels = random_batch()
    plain = AnswerLoss(find_decoder(model))(input_ids, labels)[0]
    forward = model.forward

    def scaled(*arguments: object, **options: object) -> object:
        output = forward(*arguments, **options)
        output.logits = output.logits * 3.0
        return output

    model.forward = scaled
    scaled_loss = AnswerLoss(find_decoder(model))(input_ids, labels)[0]
    expected = torch.nn.functional.cross_entropy(
        model(input_ids=input_ids).logits[:, :-1].flatten(0, 1),
        labels[:, 1:].flatten(),
        reduction="sum",
    )
    torch.testing.assert_close(scaled_loss, expected)
    assert abs((scaled_loss - plain).item()) > 0.01


def test_bf16_loss_is_summed_in_fp32(make_tiny_model: MakeModel) -> None:
    exact = find_decoder(load(make_tiny_model("llama")).eval())
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model("llama"), dtype=torch.bfloat16)
    rounded = find_decoder(model.eval())
    input_ids, labels = random_batch(rows=8, length=200)
    expected = AnswerLoss(exact)(input_ids, labels)[0].item()
    found = AnswerLoss(rounded)(input_ids, labels)[0]
    assert found.dtype is torch.float32
    # The logits are rounded, the sum of 800 of them must not be: in bf16 it would be 2 % off.
    assert found.item() == pytest.approx(expected, rel=2e-3)


def test_layers_are_chosen_by_index_and_not_by_the_beginning_of_a_name(
    make_tiny_model: MakeModel,
) -> None:
    decoder = find_decoder(load(make_tiny_model("llama", num_layers=12)))
    names = [name for name, _ in decoder.group(LayerRange(first=1, last=1))]
    assert names == ["model.layers.1"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prefix_costs_a_forward_pass_only(checkpointing: bool, make_tiny_model: MakeModel) -> None:
    num_layers = 8

    def flops_of_top_layer(*, cut: bool) -> int:
        decoder = find_decoder(load(make_tiny_model("llama", num_layers=num_layers)))
        open_layers(decoder, num_layers - 1, num_layers - 1)
        decoder.model.train()
        if checkpointing and cut:
            checkpoint_activations(decoder, num_layers - 1)
        elif checkpointing:
            decoder.model.activation_checkpointing_enable()
        if cut:
            freeze_prefix(decoder, num_layers - 1, embeddings_train=False)
        return step_flops(decoder)

    decoder = find_decoder(load(make_tiny_model("llama", num_layers=num_layers)))
    input_ids, labels = random_batch(2, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        AnswerLoss(decoder)(input_ids, labels)
    # AnswerLoss's probe runs inside the counter; it costs the same in both measurements.
    forward = counter.get_total_flops()
    top = flops_of_top_layer(cut=True)
    # One layer of eight: its backward pass takes two forwards of a layer, its recompute one.
    assert top <= forward * (1 + (3.2 if checkpointing else 2.2) / num_layers) * 1.1
    if checkpointing:
        trapped = flops_of_top_layer(cut=False)
        assert trapped > 1.5 * top, "the trap is not there any more: is the cut still needed?"


def test_input_gradients_do_not_reach_the_prefix_even_when_asked_for(
    make_tiny_model: MakeModel,
) -> None:
    decoder = find_decoder(load(make_tiny_model("llama")))
    open_layers(decoder, 3, 3)
    freeze_prefix(decoder, 3, embeddings_train=False)
    decoder.model.enable_input_require_grads()
    reached = []
    decoder.layers[1].register_full_backward_hook(lambda *_: reached.append(1))
    input_ids, labels = random_batch()
    AnswerLoss(decoder)(input_ids, labels)[0].backward()
    assert decoder.layers[3].mlp.up_proj.weight.grad is not None
    assert reached == []


def test_padding_on_the_right_changes_no_loss(make_tiny_model: MakeModel) -> None:
    loss = AnswerLoss(find_decoder(load(make_tiny_model("qwen2")).eval()))
    input_ids, labels = random_batch(rows=1)
    alone, count = loss(input_ids, labels)
    padded_ids = torch.nn.functional.pad(input_ids, (0, 9), value=0)
    padded_labels = torch.nn.functional.pad(labels, (0, 9), value=-100)
    padded, padded_count = loss(padded_ids, padded_labels)
    assert count == padded_count
    torch.testing.assert_close(padded, alone)


def test_model_that_is_no_decoder_is_refused_with_the_reason(make_tiny_model: MakeModel) -> None:
    model = load(make_tiny_model("llama"))
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="no list of 5 decoder layers"):
        find_decoder(model)
