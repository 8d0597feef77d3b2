"""Expand: where blocks stand, that they begin as nothing, and that others load the result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config

import tiny_decoders
from stagetune_api.expansion import block_indices, expanded_index, num_blocks
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import StageReport
from stagetune_api.stage import StageConfig
from stagetune_api.training_spec import ExpandSpec, LayerRange
from stagetune_trainer import model_card
from stagetune_trainer.decoder import freeze_prefix
from stagetune_trainer.errors import UserError
from stagetune_trainer.methods.expand import ExpandMethod, check_expandable, residual_writers
from stagetune_trainer.run import run_task
from stop_requests import AfterChecks

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3"]
METHOD = {"type": "Expand", "expand": {"layersPerBlock": 2}}
MakeConfig = Callable[..., StageConfig]
MakeStage = Callable[..., dict[str, Any]]
MakeModel = Callable[..., Path]


def expand(size: int) -> ExpandMethod:
    return ExpandMethod(ExpandSpec(layers_per_block=size))


def test_blocks_stand_behind_every_few_layers() -> None:
    assert [expanded_index(layer, 2) for layer in range(5)] == [0, 1, 3, 4, 6]
    assert num_blocks(5, 2) == 2
    assert block_indices(LayerRange(first=0, last=4), 2) == [2, 5]
    assert block_indices(LayerRange(first=2, last=3), 2) == [5]
    assert block_indices(LayerRange(first=4, last=4), 2) == []
    assert block_indices(LayerRange(first=0, last=1), 1) == [1, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_expanded_model_begins_as_the_base_to_the_bit(
    family: str, make_tiny_model: MakeModel, tmp_path: Path
) -> None:
    directory = make_tiny_model(family, num_layers=5)
    check_expandable(directory, ExpandSpec(layers_per_block=2))
    base, deeper = tiny_decoders.load(directory), tiny_decoders.load(directory)
    method = expand(2)
    method.reshape(deeper)
    assert deeper.num_layers == 7
    assert torch.equal(tiny_decoders.logits(deeper), tiny_decoders.logits(base))
    # Two matrices of a block are zero, the others those of the layer below it.
    for index in (2, 5):
        copied, below = deeper.layers[index].state_dict(), deeper.layers[index - 1].state_dict()
        different = {
            name.removesuffix(".bias").removesuffix(".weight")
            for name, value in copied.items()
            if not torch.equal(value, below[name])
        }
        assert len(different) == 2
        zero = [v for name, v in copied.items() if name.rpartition(".")[0] in different]
        assert not any(value.any() for value in zero)
    # What comes back from disk is the same, and so is what it generates from a cache.
    deeper.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.num_hidden_layers == 7
    prompt = {"input_ids": torch.arange(3, 15).reshape(1, 12), "max_new_tokens": 8}
    expected = base.model.generate(**prompt, do_sample=False, use_cache=False)
    assert torch.equal(loaded.generate(**prompt, do_sample=False), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_opens_the_blocks_behind_its_layers_and_nothing_else(
    family: str, make_tiny_model: MakeModel
) -> None:
    decoder = tiny_decoders.load(make_tiny_model(family, num_layers=6))
    method = expand(2)
    method.reshape(decoder)
    stage = tiny_decoders.stage(2, 3, top_layers=LayerRange(first=5, last=5))
    opened = method.open(decoder, stage)
    assert method.lowest_layer(stage) == 5
    wanted = {
        f"{decoder.layers_path}.{index}.{name}"
        for index in (5, 8)
        for name, _ in decoder.layers[index].named_parameters()
    }
    assert set(opened) == wanted
    assert {n for n, p in decoder.model.named_parameters() if p.requires_grad} == wanted
    # Trained, handed on and put back, it is the same model.
    tiny_decoders.perturb(opened)
    restored = tiny_decoders.load(make_tiny_model(family, num_layers=6))
    method.reshape(restored)
    method.apply(restored, stage.layers, method.output(decoder, opened))
    assert torch.equal(tiny_decoders.logits(restored), tiny_decoders.logits(decoder))


def test_layers_of_two_kinds_keep_their_kind(make_tiny_model: MakeModel) -> None:
    decoder = tiny_decoders.load(make_tiny_model("gemma2", num_layers=4))
    kinds = decoder.model.config.layer_types
    expand(2).reshape(decoder)
    assert decoder.model.config.layer_types == [*kinds[:2], kinds[1], *kinds[2:], kinds[3]]
    assert [layer.self_attn.layer_idx for layer in decoder.layers] == [0, 1, 2, 3, 4, 5]


def test_prefix_below_the_lowest_block_costs_a_forward_pass_only(
    make_tiny_model: MakeModel,
) -> None:
    def flops(first: int | None) -> int:
        decoder = tiny_decoders.load(make_tiny_model("llama", num_layers=8))
        method = expand(2)
        method.reshape(decoder)
        stage = tiny_decoders.stage(6, 7)
        method.open(decoder, stage)
        lowest = method.lowest_layer(stage)
        assert lowest == 11
        freeze_prefix(decoder, lowest if first is None else first, embeddings_train=False)
        with FlopCounterMode(display=False) as counter:
            tokens = torch.arange(3, 27).reshape(2, 12)
            decoder.model(input_ids=tokens).logits.sum().backward()
        return counter.get_total_flops()

    forward = tiny_decoders.load(make_tiny_model("llama", num_layers=8))
    expand(2).reshape(forward)
    with FlopCounterMode(display=False) as counter:
        tiny_decoders.logits(forward)
    assert flops(None) < 1.4 * counter.get_total_flops()


def test_layer_without_two_writers_is_refused(make_tiny_model: MakeModel) -> None:
    layer = tiny_decoders.load(make_tiny_model("llama")).layers[0]
    assert residual_writers(layer, 32) == (layer.self_attn.o_proj, layer.mlp.down_proj)
    layer.mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match="has 1 blocks"):
        residual_writers(layer, 32)


def test_block_that_does_something_is_refused_before_it_trains(make_tiny_model: MakeModel) -> None:
    decoder = tiny_decoders.load(make_tiny_model("llama"))
    method = expand(2)
    method.reshape(decoder)
    with torch.no_grad():
        decoder.layers[2].mlp.down_proj.weight.add_(1)
    method.open(decoder, tiny_decoders.stage(2, 3))
    with pytest.raises(UserError, match=r"llama model: its added blocks \[2\] do not begin"):
        method.open(decoder, tiny_decoders.stage(0, 1))


def test_model_that_transformers_would_build_otherwise_is_refused_in_prepare(
    make_tiny_model: MakeModel,
    make_stage_config: MakeConfig,
    never: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A family whose layers are told by their place in the decoder: every other one is larger.
    from transformers.models.llama import modeling_llama

    attention = modeling_llama.LlamaAttention
    begin = attention.__init__

    def by_place(self: Any, config: Any, layer_idx: int) -> None:
        begin(self, config, layer_idx)
        self.uses_rotation = layer_idx % 2 == 0

    monkeypatch.setattr(attention, "__init__", by_place)
    report, code = run_task(make_stage_config(method=METHOD), never)
    assert code is TrainerExitCode.USER_ERROR
    assert report.failure is not None
    assert "spec.method.type" in report.failure.message
    assert "Expand cannot add blocks to a llama model" in report.failure.message
    assert "uses_rotation" in report.failure.message
    assert run_task(make_stage_config(method={"type": "Full"}, attempt=2), never)[1] is (
        TrainerExitCode.SUCCEEDED
    )


def run_stages(
    make_config: MakeConfig, stages: list[dict[str, Any]], stop: Any, **fields: Any
) -> list[StageReport]:
    chain: list[StageReport] = []
    for stage in stages:
        config = make_config("Train", chain=chain, stage=stage, method=METHOD, **fields)
        report, code = run_task(config, stop)
        assert code is TrainerExitCode.SUCCEEDED, report.failure
        chain.append(report)
    return chain


def test_run_of_two_stages_ends_in_a_deeper_model_for_transformers(
    make_later_config: MakeConfig, make_stage: MakeStage, never: Any
) -> None:
    stages = [make_stage(0, 0, 1), make_stage(1, 2, 3)]
    chain = run_stages(make_later_config, stages, never)
    for report, index in zip(chain, (2, 5), strict=True):
        assert report.output is not None
        assert report.train is not None
        assert report.train.validation_loss < report.train.initial_validation_loss
        tensors = load_file(Path(report.output.path) / "model.safetensors")
        assert all(name.startswith(f"model.layers.{index}.") for name in tensors)
    scores = {}
    for task in ("Evaluate", "Export"):
        config = make_later_config(task, chain=chain, stages=stages, method=METHOD)
        report, code = run_task(config, never)
        assert code is TrainerExitCode.SUCCEEDED, report.failure
        scores[task] = report
    evaluation = scores["Evaluate"].evaluation
    assert evaluation is not None
    assert chain[1].train is not None
    trained = chain[1].train.validation_loss
    assert evaluation.after.validation_loss == pytest.approx(trained, rel=1e-4)
    folder = Path(str(scores["Export"].export))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert len(model.model.layers) == 6
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 6
    assert "| Decoder layers | 6, of which 2 were added;" in (folder / "README.md").read_text()


def test_stopped_stage_of_blocks_goes_on_to_the_same_bits(
    make_later_config: MakeConfig, make_stage: MakeStage, never: Any, tmp_path: Path
) -> None:
    stage = make_stage(0, 2, 3)
    whole = str(tmp_path / "whole")
    unbroken = run_stages(make_later_config, [stage], never, run_directory=whole)[0]
    fields = {"stage": stage, "method": METHOD, "run_directory": str(tmp_path / "stopped")}
    _, code = run_task(make_later_config("Train", **fields), AfterChecks(13))
    assert code is TrainerExitCode.INTERRUPTED
    resumed, code = run_task(make_later_config("Train", **fields), never)
    assert code is TrainerExitCode.SUCCEEDED, resumed.failure
    assert unbroken.output is not None
    assert resumed.output is not None
    assert resumed.output.digest == unbroken.output.digest


def test_model_card_tells_the_depth_of_a_model_whose_text_part_has_its_own_configuration(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    text = {"num_hidden_layers": 6, "hidden_size": 32, "num_attention_heads": 4}
    Gemma3Config(text_config=text).save_pretrained(tmp_path)
    assert "num_hidden_layers" not in json.loads((tmp_path / "config.json").read_text())
    ((name, depth),) = model_card._depth(make_stage_config(method=METHOD), tmp_path)
    assert name == "Decoder layers"
    assert depth.startswith("6, of which 2 were added")
