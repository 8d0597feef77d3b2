"""Estimates against what was measured (docs/plan.md) and against PyTorch's own counters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from stagetune_api.facts import DataFacts, Facts, ModelFacts
from stagetune_api.stage import StageEstimate
from stagetune_api.training_spec import (
    ExpandSpec,
    LayerRange,
    LoraSpec,
    MethodSpec,
    MethodType,
    TrainingSpec,
)
from stagetune_operator.activation_bytes import layer_activation_bytes
from stagetune_operator.estimate import (
    CHECKPOINTS_AT_ONCE,
    CPU_PROCESS_BYTES,
    DEVICE_CONTEXT_BYTES,
    Machine,
    estimate_full_fine_tuning,
    estimate_stage,
)
from stagetune_operator.model_facts import model_facts_from_config
from stagetune_operator.stage_scope import StageScope
from stagetune_operator.step_flops import step_flops
from stagetune_trainer.checkpoint import KEPT_CHECKPOINTS

GIB = 2**30
CPU = Machine(is_gpu=False)
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FULL = MethodSpec()
LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def _model(config: dict[str, Any]) -> ModelFacts:
    model = model_facts_from_config(config)
    assert isinstance(model, ModelFacts), model
    return model


QWEN = _model(json.loads((EXAMPLES / "qwen2.5-7b-instruct.config.json").read_text()))
LLAMA = _model(LLAMA_3_8B)


def _facts(model: ModelFacts, row_tokens: int = 1024, answer_share: float = 1.0) -> Facts:
    """Return facts of 100 rows of equal length; with all of it answer, the head sees all."""
    tokens = 100 * row_tokens
    data = DataFacts(
        train_rows=100,
        validation_rows=10,
        train_tokens=tokens,
        train_answer_tokens=round(answer_share * tokens),
        max_row_tokens=row_tokens,
    )
    return Facts(model=model, data=data, model_directory="models/base")


def _training(checkpointing: str = "Always", **values: Any) -> TrainingSpec:
    return TrainingSpec(learning_rate=1e-4, gradient_checkpointing=checkpointing, **values)


def _lora(rank: int = 16, targets: list[str] | None = None) -> MethodSpec:
    return MethodSpec(type=MethodType.LORA, lora=LoraSpec(rank=rank, target_modules=targets))


def _scope(first: int, end: int, **opened: Any) -> StageScope:
    return StageScope(LayerRange(first=first, last=end - 1), **opened)


def _estimate(
    facts: Facts,
    scope: StageScope,
    method: MethodSpec = FULL,
    training: TrainingSpec | None = None,
    machine: Machine | None = None,
) -> StageEstimate:
    return estimate_stage(facts, method, training or _training(), scope, machine or Machine())


# Operations, against the measured table of docs/plan.md (GF per token at rows of 1024 tokens).


def _gigaflops_per_token(
    model: ModelFacts, checkpointing: str, scope: StageScope, method: MethodSpec = FULL
) -> float:
    training = _training(checkpointing, batch_size=16)
    return step_flops(_facts(model), method, training, scope) / (16 * 1024) / 1e9


@pytest.mark.parametrize(
    ("first", "head", "measured", "measured_with_checkpointing"),
    [
        (0, False, 31.4, 41.0),
        (8, False, 27.4, 34.3),
        (16, False, 23.5, 27.6),
        (24, True, 20.6, 22.0),
    ],
)
def test_operations_of_qwen_stages_are_those_measured(
    first: int, head: bool, measured: float, measured_with_checkpointing: float
) -> None:
    scope = _scope(first, first + 4, head=head)

    assert _gigaflops_per_token(QWEN, "Never", scope) == pytest.approx(measured, rel=0.01)
    assert _gigaflops_per_token(QWEN, "Always", scope) == pytest.approx(
        measured_with_checkpointing, rel=0.01
    )


@pytest.mark.parametrize(
    ("model", "checkpointing", "stages", "full", "lora"),
    [
        (QWEN, "Never", 25.6, 43.7, 29.5),
        (QWEN, "Always", 31.1, 53.3, 39.2),
        (LLAMA, "Never", 26.9, 46.6, 31.6),
        (LLAMA, "Always", 33.0, 57.4, 42.4),
    ],
)
def test_mean_stage_full_and_lora_operations_are_those_measured(
    model: ModelFacts, checkpointing: str, stages: float, full: float, lora: float
) -> None:
    top = model.num_layers
    scopes = [_scope(first, first + 4, head=first + 4 == top) for first in range(0, top, 4)]
    everything = _scope(0, top, embeddings=True, head=True)

    costs = [_gigaflops_per_token(model, checkpointing, scope) for scope in scopes]

    assert sum(costs) / len(costs) == pytest.approx(stages, rel=0.01)
    assert _gigaflops_per_token(model, checkpointing, everything) == pytest.approx(full, rel=0.01)
    assert _gigaflops_per_token(model, checkpointing, _scope(0, top), _lora()) == pytest.approx(
        lora, rel=0.01
    )


# Operations, against PyTorch's counter on small models of several families.


def _tiny_config(model_type: str) -> PretrainedConfig:
    config = CONFIG_MAPPING[model_type](
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=400,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    if model_type not in ("phi", "phi3"):
        config.head_dim = 16
    return config


def _tiny_facts(config: PretrainedConfig) -> Facts:
    return _facts(_model(json.loads(config.to_json_string())), row_tokens=128)


def _counted_flops(model: PreTrainedModel, checkpointing: str) -> int:
    """Return what PyTorch counts for two rows of 128 tokens, all of them answers."""
    model.train()
    if checkpointing == "Always":
        model.activation_checkpointing_enable()
        # Otherwise autograd would walk the frozen prefix too.
        model.disable_input_require_grads()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(2, 128, dtype=torch.long)).logits.float().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "phi"])
@pytest.mark.parametrize("checkpointing", ["Never", "Always"])
@pytest.mark.parametrize(("first", "end", "head"), [(0, 2, False), (2, 4, False), (4, 6, True)])
def test_operations_equal_pytorchs_own_count(
    model_type: str, checkpointing: str, first: int, end: int, head: bool
) -> None:
    config = _tiny_config(model_type)
    config.tie_word_embeddings = False
    # Fused attention computes its scores again in the backward pass and is counted with that.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.requires_grad_(False)
    model.model.layers[first:end].requires_grad_(True)
    model.get_output_embeddings().requires_grad_(head)

    estimated = step_flops(
        _tiny_facts(config),
        FULL,
        _training(checkpointing, batch_size=2),
        _scope(first, end, head=head),
    )

    assert estimated == _counted_flops(model, checkpointing)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("checkpointing", ["Never", "Always"])
@pytest.mark.parametrize("head", [False, True])
def test_operations_with_an_open_top_equal_pytorchs_own_count(
    model_type: str, checkpointing: str, head: bool
) -> None:
    config = _tiny_config(model_type)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.requires_grad_(False)
    for index in (1, 2, 5):
        model.model.layers[index].requires_grad_(True)
    model.get_output_embeddings().requires_grad_(head)

    estimated = step_flops(
        _tiny_facts(config),
        FULL,
        _training(checkpointing, batch_size=2),
        _scope(1, 3, head=head, top_layers=LayerRange(first=5, last=5)),
    )

    assert estimated == _counted_flops(model, checkpointing)


@pytest.mark.parametrize("checkpointing", ["Never", "Always"])
@pytest.mark.parametrize(
    ("first", "adapted", "top"),
    [
        (2, {0, 1}, set()),
        (0, {4, 5}, set()),
        (4, {0, 1, 2, 3}, set()),
        (1, {0, 3}, {5}),
    ],
)
def test_operations_of_adapters_are_near_pytorchs_own_count(
    checkpointing: str, first: int, adapted: set[int], top: set[int]
) -> None:
    config = _tiny_config("llama")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    opened = {first, first + 1} | top
    adapters = peft.LoraConfig(
        r=8,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        layers_to_transform=sorted(opened | adapted),
    )
    peft.inject_adapter_in_model(adapters, model)
    for index, layer in enumerate(model.model.layers):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("lora_" in name and index in opened)

    estimated = step_flops(
        _tiny_facts(config),
        _lora(rank=8),
        _training(checkpointing, batch_size=2),
        _scope(
            first,
            first + 2,
            idle_ranks=dict.fromkeys(adapted, (8,)),
            top_layers=LayerRange(first=min(top), last=max(top)) if top else None,
        ),
    )

    # What comes into the lowest open layer needs no gradient under adapters: a little less.
    assert estimated == pytest.approx(_counted_flops(model, checkpointing), rel=0.04)


def test_only_answer_tokens_reach_the_head() -> None:
    training = _training(batch_size=16)
    scope = _scope(24, 28, head=True)

    all_tokens, half = (
        step_flops(_facts(QWEN, answer_share=share), FULL, training, scope) for share in (1.0, 0.5)
    )

    assert all_tokens - half == 16 * 512 * 3 * 2 * QWEN.vocab_size * QWEN.hidden_size


# Activations.


@pytest.mark.parametrize(
    ("model", "trained", "frozen"), [(QWEN, 260_000, 186_000), (LLAMA, 238_000, 169_000)]
)
def test_a_layer_keeps_what_was_measured(model: ModelFacts, trained: int, frozen: int) -> None:
    for opened, measured in ((True, trained), (False, frozen)):
        bf16 = layer_activation_bytes(model, trained=opened, element=2, row_tokens=1024)
        fp32 = layer_activation_bytes(model, trained=opened, element=4, row_tokens=1024)
        assert bf16 == pytest.approx(measured, rel=0.01)
        assert fp32 == 2 * bf16


def _kept_bytes_per_token(model_type: str, *, trained: bool, masks: bool = False) -> float:
    """Return what autograd keeps of one bf16 layer with fp32 masters and repeated keys.

    Either of the mask, with `masks`, or of all else.
    """
    config = _tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    layer = model.model.layers[0].requires_grad_(trained)
    if trained:
        layer.float()
    rows, length = 2, 120
    hidden = torch.randn(rows, length, 96, dtype=torch.bfloat16, requires_grad=True) * 1
    kinds = config.layer_types[:1] if model_type == "gemma3_text" else []
    rotary = model.model.rotary_emb(hidden, torch.arange(length)[None], *kinds)
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()
    of_all_layers = {part.untyped_storage().data_ptr() for part in rotary}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Weights and their bf16 copies have no dimension of tokens; the mask has two.
        is_activation = length in tensor.shape or tensor.shape[0] == rows * length
        is_mask = tensor.shape[-2:] == mask.shape[-2:]
        if is_activation and is_mask is masks and storage.data_ptr() not in of_all_layers:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return sum(size for size, _ in kept.values()) / (rows * length)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "phi"])
@pytest.mark.parametrize("trained", [True, False])
def test_what_a_layer_keeps_is_near_what_autograd_keeps(model_type: str, trained: bool) -> None:
    facts = _tiny_facts(_tiny_config(model_type))

    estimated = layer_activation_bytes(facts.model, trained=trained, element=2, row_tokens=128)

    kept = _kept_bytes_per_token(model_type, trained=trained)
    assert 0.98 * kept <= estimated <= 1.3 * kept


@pytest.mark.parametrize("trained", [True, False])
def test_a_layer_keeps_the_mask_between_packed_rows_as_numbers(trained: bool) -> None:
    assert _kept_bytes_per_token("llama", trained=trained, masks=True) == 2 * 120

    facts = _facts(QWEN, row_tokens=2048, answer_share=0.01)
    for checkpointing, layers in (("Never", 20), ("Always", 1)):
        plain, packed = (
            _estimate(facts, _scope(8, 12), training=_training(checkpointing, packing=packing))
            for packing in (False, True)
        )
        assert packed.activation_bytes - plain.activation_bytes == layers * 2048 * 2 * 2048


def test_attention_over_packed_rows_is_counted_as_over_the_longest_row() -> None:
    facts = _facts(QWEN, row_tokens=100)
    longest = facts.data.model_copy(update={"max_row_tokens": 2048})
    uneven = facts.model_copy(update={"data": longest})

    plain, packed = (
        step_flops(uneven, FULL, _training("Never", packing=packing), _scope(0, 28))
        for packing in (False, True)
    )

    # Forward and twice that backward, in each layer, for every token.
    heads = QWEN.num_attention_heads * QWEN.head_dim
    assert packed - plain == 16 * 100 * 28 * 3 * 4 * heads * (2048 - 100)


def test_without_checkpointing_every_layer_above_the_prefix_is_kept() -> None:
    facts = _facts(QWEN, row_tokens=2048, answer_share=0.01)
    training = _training("Never")
    trained, frozen = (
        2048 * layer_activation_bytes(QWEN, trained=trained, element=2, row_tokens=2048)
        for trained in (True, False)
    )

    low, high = (_estimate(facts, _scope(first, first + 4), training=training) for first in (8, 20))

    assert low.activation_bytes - high.activation_bytes == 12 * frozen
    assert low.activation_bytes >= 4 * trained + 16 * frozen


def test_with_checkpointing_a_layer_above_the_prefix_costs_its_border() -> None:
    facts = _facts(QWEN, row_tokens=2048, answer_share=0.01)

    low, high = (_estimate(facts, _scope(first, first + 4)) for first in (8, 20))

    assert low.activation_bytes - high.activation_bytes == 12 * 2048 * 2 * QWEN.hidden_size


def test_scores_are_counted_where_attention_cannot_be_fused() -> None:
    config = {**LLAMA_3_8B, "model_type": "gemma2", "head_dim": 128}
    model = _model(config)

    short, long = (
        layer_activation_bytes(model, trained=False, element=2, row_tokens=tokens)
        for tokens in (1000, 2000)
    )

    assert long - short == 32 * 1000 * 6


# Memory, disk and trainable parameters.


def test_a_full_stage_holds_sixteen_bytes_for_each_parameter_it_trains() -> None:
    estimate = _estimate(_facts(QWEN), _scope(0, 4))

    assert estimate.trainable_parameters == 4 * 233_057_792
    assert estimate.training_state_bytes == 16 * estimate.trainable_parameters
    assert estimate.weights_bytes == 2 * (7_615_616_512 - estimate.trainable_parameters)
    assert estimate.disk_bytes == (3 * 16 + 2) * estimate.trainable_parameters
    assert estimate.memory_bytes == (
        estimate.weights_bytes
        + estimate.training_state_bytes
        + estimate.activation_bytes
        + DEVICE_CONTEXT_BYTES
    )


@pytest.mark.parametrize(
    ("model", "scope", "calculated"),
    [
        (QWEN, _scope(0, 4), 29.9),
        (QWEN, _scope(24, 28, head=True), 37.7),
        (LLAMA, _scope(0, 4), 29.9),
        (LLAMA, _scope(28, 32, head=True), 37.3),
    ],
)
def test_memory_of_a_stage_is_near_the_reference_calculation(
    model: ModelFacts, scope: StageScope, calculated: float
) -> None:
    """The reference keeps a bf16 copy of all that trains; here only the largest piece has one."""
    facts = _facts(model, row_tokens=2048, answer_share=0.25)

    assert _estimate(facts, scope).memory_bytes / GIB == pytest.approx(calculated, rel=0.1)


def test_memory_of_lora_is_near_the_reference_calculation() -> None:
    facts = _facts(QWEN, row_tokens=2048, answer_share=0.25)

    estimate = _estimate(facts, _scope(0, 28), _lora())

    assert estimate.trainable_parameters == 40_370_176
    assert estimate.memory_bytes / GIB == pytest.approx(16.7, rel=0.05)


def test_embeddings_and_head_train_with_their_stages() -> None:
    facts = _facts(QWEN)
    plain = _estimate(facts, _scope(0, 4)).trainable_parameters

    embeddings = _estimate(facts, _scope(0, 4, embeddings=True)).trainable_parameters
    head = _estimate(facts, _scope(24, 28, head=True)).trainable_parameters

    assert embeddings - plain == 544_997_376
    assert head - plain == 544_997_376 + QWEN.hidden_size


def test_an_open_top_trains_beside_the_group_and_keeps_what_a_trained_layer_keeps() -> None:
    facts, training = _facts(QWEN, row_tokens=2048, answer_share=0.01), _training("Never")
    top = LayerRange(first=26, last=27)
    trained, frozen = (
        2048 * layer_activation_bytes(QWEN, trained=trained, element=2, row_tokens=2048)
        for trained in (True, False)
    )

    plain = _estimate(facts, _scope(8, 12), training=training)
    opened = _estimate(facts, _scope(8, 12, top_layers=top), training=training)

    copy = 2 * QWEN.layer.parameters
    assert opened.activation_bytes - plain.activation_bytes == 2 * (trained - frozen + copy)
    assert opened.trainable_parameters == 6 * QWEN.layer.parameters
    assert _estimate(facts, _scope(8, 12, top_layers=top), _lora(64)).trainable_parameters == (
        6 * _estimate(facts, _scope(0, 1), _lora(64)).trainable_parameters
    )


def test_adapters_of_earlier_stages_stay_in_memory() -> None:
    facts = _facts(QWEN)
    per_layer = 64 * sum(sum(shape) for shape in QWEN.layer.linear_shapes.values())

    first = _estimate(facts, _scope(0, 4), _lora(64))
    third = _estimate(facts, _scope(8, 12, idle_ranks=dict.fromkeys(range(8), (64,))), _lora(64))

    assert first.trainable_parameters == third.trainable_parameters == 4 * per_layer
    assert first.weights_bytes == 2 * QWEN.parameters
    assert third.weights_bytes == 2 * QWEN.parameters + 8 * 4 * per_layer


def test_target_modules_limit_the_adapters() -> None:
    estimate = _estimate(_facts(QWEN), _scope(0, 4), _lora(8, ["q_proj", "v_proj"]))

    assert estimate.trainable_parameters == 4 * 8 * (3584 + 3584 + 3584 + 512)


def test_full_fine_tuning_trains_everything_and_costs_one() -> None:
    estimate = estimate_full_fine_tuning(_facts(QWEN), _training())

    assert estimate.trainable_parameters == QWEN.parameters
    assert estimate.weights_bytes == 0
    assert estimate.relative_step_flops == 1.0


def test_a_cpu_computes_in_fp32_and_holds_the_process_instead_of_a_context() -> None:
    facts = _facts(QWEN, answer_share=0.01)
    on_cpu = _estimate(facts, _scope(0, 4), machine=Machine(is_gpu=False))
    fp32 = _estimate(facts, _scope(0, 4), training=_training(precision="FP32"))
    bf16 = _estimate(facts, _scope(0, 4), training=_training(precision="BF16"))

    assert on_cpu.weights_bytes == fp32.weights_bytes == 2 * bf16.weights_bytes
    assert on_cpu.overhead_bytes == CPU_PROCESS_BYTES
    assert fp32.overhead_bytes == DEVICE_CONTEXT_BYTES
    own = [estimate.memory_bytes - estimate.overhead_bytes for estimate in (on_cpu, fp32)]
    assert own[0] == own[1]
    assert _estimate(facts, _scope(0, 4)) == bf16


def test_a_process_that_prepare_has_measured_counts_as_it_is() -> None:
    facts = _facts(QWEN).model_copy(update={"process_bytes": 300_000_000})

    estimate = _estimate(facts, _scope(0, 4), machine=CPU)

    assert estimate.overhead_bytes == 300_000_000
    assert estimate.peak_bytes("cpu") == estimate.memory_bytes
    on_gpu = _estimate(facts, _scope(0, 4))
    # PyTorch does not count the context that it works in.
    assert on_gpu.peak_bytes("cuda") == on_gpu.memory_bytes - DEVICE_CONTEXT_BYTES


def test_the_best_weights_so_far_count_where_host_memory_is_the_device_s() -> None:
    stopping = {"early_stopping": {"patience": 2}}
    for machine, kept in ((CPU, 4), (Machine(), 0)):
        plain, found = (
            _estimate(_facts(QWEN), _scope(0, 4), training=_training(**options), machine=machine)
            for options in ({}, stopping)
        )
        more = kept * plain.trainable_parameters
        assert found.training_state_bytes - plain.training_state_bytes == more
        assert found.memory_bytes - plain.memory_bytes == more


def test_a_phase_that_takes_more_than_a_step_decides() -> None:
    """Adapters of rank 1 in one layer above a cache take next to nothing."""
    facts = _facts(QWEN, row_tokens=64, answer_share=0.1)
    scope = _scope(27, 28, prefix_cached=True, loaded_from=20)
    small = _lora(1)

    filled = _estimate(facts, scope, small)
    measured = _estimate(facts, replace(scope, loaded_from=26, measures_general=True), small)
    asked = _estimate(facts, replace(scope, asks_base=True), small)

    above = 2 * (QWEN.head_parameters + QWEN.final_norm_parameters + QWEN.layer.parameters)
    layers = 2 * (7 * QWEN.layer.parameters + QWEN.final_norm_parameters)
    assert filled.memory_bytes == layers + DEVICE_CONTEXT_BYTES
    # 64 tokens at the head, their logits and the softmax of them.
    logits = 64 * QWEN.vocab_size * 4
    rest = measured.memory_bytes - DEVICE_CONTEXT_BYTES - above - logits
    assert 0 < rest < 16 * measured.trainable_parameters
    assert asked.memory_bytes == (
        2 * QWEN.parameters + 7 * QWEN.vocab_size * 16 + DEVICE_CONTEXT_BYTES
    )


SMALL = {
    "LoRA": (_lora(64), {}),
    "8-bit moments": (FULL, {"optimizer": "AdamW8bit", "micro_batch_size": 1}),
}


@pytest.mark.parametrize(("method", "options"), SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("model", [QWEN, LLAMA], ids=["qwen", "llama"])
def test_four_layers_at_7b_take_20_gib_and_above_a_cache_at_the_top_10(
    model: ModelFacts, method: MethodSpec, options: dict[str, Any]
) -> None:
    """On a card of 24 GB; rows of 1,024 tokens, two in five of them answers."""
    facts = _facts(model, row_tokens=1024, answer_share=0.4)
    training = _training(**options)
    depth = model.num_layers
    groups = [(first, first + 4) for first in range(0, depth, 4)]

    stages = [_estimate(facts, _scope(*group), method, training) for group in groups]
    cached = _scope(depth - 4, depth, prefix_cached=True, loaded_from=depth - 8)
    top = _estimate(facts, cached, method, training)

    assert max(stage.memory_bytes for stage in stages) <= 20 * GIB
    assert top.memory_bytes <= 10 * GIB


# Properties.


@settings(deadline=None)
@given(first=st.integers(0, 27), size=st.integers(1, 28), micro=st.sampled_from([1, 2, 4]))
def test_a_stage_is_never_dearer_than_full_fine_tuning(first: int, size: int, micro: int) -> None:
    facts = _facts(QWEN, answer_share=0.3)
    training = _training(batch_size=16, micro_batch_size=micro)
    scope = _scope(first, min(first + size, 28))

    stage = _estimate(facts, scope, training=training)

    full = estimate_full_fine_tuning(facts, training)
    assert 0 < stage.relative_step_flops <= 1
    assert stage.memory_bytes < full.memory_bytes
    assert stage.activation_bytes <= full.activation_bytes


@settings(deadline=None)
@given(first=st.integers(0, 26), method=st.sampled_from([FULL, _lora()]))
def test_the_higher_a_stage_the_less_it_computes(first: int, method: MethodSpec) -> None:
    facts = _facts(QWEN, answer_share=0.3)

    lower, higher = (_estimate(facts, _scope(at, at + 1), method) for at in (first, first + 1))

    assert higher.step_flops < lower.step_flops
    assert higher.activation_bytes < lower.activation_bytes
    assert higher.trainable_parameters == lower.trainable_parameters


def _stage(training: TrainingSpec, method: MethodSpec = FULL) -> StageEstimate:
    return estimate_stage(_facts(QWEN), method, training, StageScope(LayerRange(first=0, last=3)))


def _bytes_per_parameter(estimate: StageEstimate) -> float:
    return estimate.training_state_bytes / estimate.trainable_parameters


def test_training_state_follows_the_optimizer_and_its_number_format() -> None:
    """Masters, gradients and moments: 4 + 4 + 8; 2 + 2 + 2.03; 4 + 4 + 2.03 bytes."""
    small = {"optimizer": "AdamW8bit", "micro_batch_size": 16}
    assert _bytes_per_parameter(_stage(TrainingSpec())) == 16
    bf16 = _stage(TrainingSpec.model_validate(small))
    fp32 = _stage(TrainingSpec.model_validate({**small, "precision": "FP32"}))
    temporary = 32 * 2**24
    for estimate, expected in ((bf16, 6 + 1 / 32), (fp32, 10 + 1 / 32)):
        state = estimate.training_state_bytes - temporary
        assert state / estimate.trainable_parameters == pytest.approx(expected, rel=1e-6)
    adapters = MethodSpec(type=MethodType.LORA)
    lora = _stage(TrainingSpec.model_validate(small), adapters)
    state = lora.training_state_bytes - 32 * 16 * QWEN.intermediate_size
    assert state / lora.trainable_parameters == pytest.approx(10 + 1 / 32, rel=1e-6)


def test_in_the_backward_pass_the_largest_gradient_counts_alone() -> None:
    usual, one_by_one = (
        _stage(TrainingSpec(micro_batch_size=16, optimizer_in_backward=value))
        for value in (False, True)
    )
    largest = QWEN.hidden_size * QWEN.intermediate_size
    saved = usual.training_state_bytes - one_by_one.training_state_bytes
    assert saved == 4 * (usual.trainable_parameters - largest)
    assert usual.memory_bytes - one_by_one.memory_bytes == saved


def test_checkpoints_with_8_bit_moments_are_smaller() -> None:
    usual, small = (
        _stage(TrainingSpec.model_validate({"optimizer": optimizer}))
        for optimizer in ("AdamW", "AdamW8bit")
    )
    count = usual.trainable_parameters
    assert usual.disk_bytes == count * (3 * 16 + 2)
    assert small.disk_bytes == pytest.approx(count * (3 * (6 + 1 / 32) + 2), rel=1e-6)


def test_as_many_checkpoints_are_counted_as_there_are_while_one_is_written() -> None:
    assert CHECKPOINTS_AT_ONCE == KEPT_CHECKPOINTS + 1


# QLoRA, DoRA and Expand.


def _matrices(model: ModelFacts) -> int:
    return sum(inputs * outputs for inputs, outputs in model.layer.linear_shapes.values())


def test_4_bit_weights_take_4_127_bits_and_the_rest_its_own() -> None:
    method = MethodSpec(type=MethodType.QLORA, lora=LoraSpec(rank=16))
    facts = _facts(QWEN)
    small = _estimate(facts, _scope(8, 12), method)
    plain = _estimate(facts, _scope(8, 12), _lora())

    in_nf4 = 28 * _matrices(QWEN)
    expected = in_nf4 * 4.126953125 / 8 + (QWEN.parameters - in_nf4) * 2
    assert small.weights_bytes == pytest.approx(expected, abs=1)
    # One matrix stands dequantised beside the activations of LoRA.
    assert small.activation_bytes - plain.activation_bytes == 2 * 18944 * 3584
    assert small.step_flops == plain.step_flops
    assert small.disk_bytes == plain.disk_bytes
    assert small.memory_bytes < plain.memory_bytes / 2


def test_dora_trains_a_length_for_each_output_more() -> None:
    facts, scope = _facts(QWEN), _scope(8, 12)
    method = MethodSpec(type=MethodType.LORA, lora=LoraSpec(rank=16, dora=True))
    outputs = sum(outputs for _, outputs in QWEN.layer.linear_shapes.values())

    found = _estimate(facts, scope, method).trainable_parameters
    assert found == _estimate(facts, scope, _lora()).trainable_parameters + 4 * outputs


@pytest.mark.parametrize("checkpointing", ["Always", "Never"])
def test_added_blocks_cost_what_as_many_layers_of_a_deeper_model_do(checkpointing: str) -> None:
    method = MethodSpec(type=MethodType.EXPAND, expand=ExpandSpec(layers_per_block=4))
    facts, training = _facts(QWEN), _training(checkpointing)
    deeper = _facts(QWEN.model_copy(update={"num_layers": 28 + 7}))

    # Behind layer 27 of the base stands layer 34 of 35.
    found = _estimate(facts, _scope(24, 28), method, training)
    expected = _estimate(deeper, _scope(34, 35), FULL, training)
    same = {"relative_step_flops"}
    assert found.model_dump(exclude=same) == expected.model_dump(exclude=same)
    # Full fine-tuning, the yardstick, is that of the base.
    full = estimate_full_fine_tuning(facts, training)
    assert found.relative_step_flops == pytest.approx(found.step_flops / full.step_flops, abs=1e-6)
