"""Stages with an open top, several passes and cumulative groups, trained on a tiny model."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stagetune_api import names
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import Outcome, StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer.decoder import Decoder, find_decoder, freeze_prefix
from stagetune_trainer.methods import make_method
from stagetune_trainer.run import run_task
from stop_requests import AfterChecks, NeverAsked

MakeConfig = Callable[..., StageConfig]
MakeStage = Callable[..., dict[str, Any]]
Train = Callable[..., StageReport]
TOP = {"first": 3, "last": 3}
LORA = {"type": "LoRA", "lora": {"rank": 2, "dropout": 0.1}}


@pytest.fixture
def train(make_later_config: MakeConfig) -> Train:
    """`train(stage, chain=[reports], stop=..., **fields)`: the report of a stage that succeeded."""

    def run(stage: dict[str, Any], *, stop: Any = None, **fields: Any) -> StageReport:
        report, code = run_task(
            make_later_config("Train", stage=stage, **fields), stop or NeverAsked()
        )
        assert code in (TrainerExitCode.SUCCEEDED, TrainerExitCode.INTERRUPTED), report.failure
        return report

    return run


def output(report: StageReport) -> dict[str, torch.Tensor]:
    assert report.output is not None
    return load_file(Path(report.output.path) / names.WEIGHTS_FILE)


def digest(report: StageReport) -> str:
    assert report.output is not None
    return report.output.digest


def layers_in(tensors: dict[str, torch.Tensor]) -> set[int]:
    return {int(name.split(".layers.")[1].split(".")[0]) for name in tensors}


def base(model: Path) -> Decoder:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.requires_grad_(False)
    return find_decoder(loaded)


@pytest.mark.parametrize("method", [{"type": "Full"}, LORA], ids=["Full", "LoRA"])
@pytest.mark.parametrize("checkpointing", ["Always", "Never"])
def test_group_and_open_top_train_and_what_lies_between_does_not(
    method: dict[str, Any], checkpointing: str, train: Train, make_stage: MakeStage
) -> None:
    report = train(
        make_stage(0, 1, 1, topLayers=TOP),
        method=method,
        training={"gradientCheckpointing": checkpointing},
    )

    tensors = output(report)
    assert layers_in(tensors) == {1, 3}
    assert report.train is not None
    assert report.train.validation_loss < report.train.initial_validation_loss - 0.02
    assert report.train.trainable_parameters == sum(tensor.numel() for tensor in tensors.values())
    if method is LORA:
        assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


@pytest.mark.parametrize("method", [{"type": "Full"}, LORA], ids=["Full", "LoRA"])
def test_gradients_reach_the_group_through_the_frozen_layers_and_stop_below_it(
    method: dict[str, Any],
    make_tiny_model: Callable[..., Path],
    make_later_config: MakeConfig,
    make_stage: MakeStage,
) -> None:
    config = make_later_config("Train", stage=make_stage(0, 1, 1, topLayers=TOP), method=method)
    assert config.stage is not None
    decoder = base(make_tiny_model("llama"))
    opened = make_method(config.method).open(decoder, config.stage)
    freeze_prefix(decoder, config.stage.layers.first, embeddings_train=False)
    inputs: dict[int, bool] = {}
    for index, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(
            lambda _, args, index=index: inputs.update({index: args[0].requires_grad})
        )

    tokens = torch.arange(3, 15).reshape(1, 12)
    decoder.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    assert inputs == {0: False, 1: False, 2: True, 3: True}
    trained = {name for name, value in decoder.model.named_parameters() if value.grad is not None}
    assert len(trained) == len(opened)
    assert layers_in(dict.fromkeys(trained, torch.empty(0))) == {1, 3}


@pytest.mark.parametrize("method", [{"type": "Full"}, LORA], ids=["Full", "LoRA"])
def test_next_stage_goes_on_with_the_open_top_it_was_handed(
    method: dict[str, Any], train: Train, make_stage: MakeStage, make_later_config: MakeConfig
) -> None:
    first = train(make_stage(0, 0, 0, topLayers=TOP), method=method)
    second = train(make_stage(1, 1, 1, topLayers=TOP), method=method, chain=[first])

    assert first.train is not None
    assert second.train is not None
    assert second.train.initial_validation_loss == pytest.approx(first.train.validation_loss)
    before, after = output(first), output(second)
    again = sorted(set(before) & set(after))
    assert layers_in({name: before[name] for name in again}) == {3}
    assert all(before[name].shape == after[name].shape for name in again)
    assert any(not torch.equal(before[name], after[name]) for name in again)
    exported, code = run_task(
        make_later_config("Export", method=method, chain=[first, second]), NeverAsked()
    )
    assert code == TrainerExitCode.SUCCEEDED, exported.failure
    evaluated, code = run_task(
        make_later_config("Evaluate", method=method, chain=[first, second]), NeverAsked()
    )
    assert code == TrainerExitCode.SUCCEEDED, evaluated.failure
    assert evaluated.evaluation is not None
    assert evaluated.evaluation.after.validation_loss == pytest.approx(
        second.train.validation_loss, rel=1e-4
    )


def test_later_stage_wins_where_a_layer_was_opened_twice(
    train: Train,
    make_stage: MakeStage,
    make_later_config: MakeConfig,
    make_tiny_model: Callable[..., Path],
) -> None:
    first = train(make_stage(0, 0, 0, topLayers=TOP))
    second = train(make_stage(1, 1, 1, topLayers=TOP), chain=[first])

    report, _ = run_task(make_later_config("Export", chain=[first, second]), NeverAsked())

    assert report.export is not None
    exported = load_file(Path(report.export) / names.WEIGHTS_FILE)
    expected = {**output(first), **output(second)}
    assert layers_in(expected) == {0, 1, 3}
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    untouched = base(make_tiny_model("llama")).layers[2].state_dict()
    assert all(
        torch.equal(exported[f"model.layers.2.{name}"], tensor)
        for name, tensor in untouched.items()
    )


def test_two_passes_chain_and_cumulative_stages_go_on_with_all_that_is_open(
    train: Train, make_stage: MakeStage
) -> None:
    first = train(make_stage(0, 0, 1, name="layers-0-1"))
    grown = train(make_stage(1, 0, 3, name="layers-0-3"), chain=[first])
    again = train(make_stage(2, 0, 1, name="layers-0-1-p2"), chain=[first, grown])

    losses = [report.train for report in (first, grown, again)]
    for earlier, later in itertools.pairwise(losses):
        assert earlier is not None
        assert later is not None
        assert later.initial_validation_loss == pytest.approx(earlier.validation_loss)
    assert [layers_in(output(report)) for report in (first, grown, again)] == [
        {0, 1},
        {0, 1, 2, 3},
        {0, 1},
    ]
    assert again.output is not None
    assert Path(again.output.path).parent.name == "03-layers-0-1-p2"


@pytest.mark.parametrize("method", [{"type": "Full"}, LORA], ids=["Full", "LoRA"])
@pytest.mark.parametrize("checks", [2, 11])
def test_stopped_stage_with_an_open_top_goes_on_to_the_same_bits(
    method: dict[str, Any], checks: int, train: Train, make_stage: MakeStage, tmp_path: Path
) -> None:
    first = train(make_stage(0, 0, 0, topLayers=TOP), method=method)
    stage = make_stage(1, 1, 1, topLayers=TOP)
    interrupted = train(stage, method=method, chain=[first], stop=AfterChecks(checks))
    assert interrupted.outcome is Outcome.INTERRUPTED
    resumed = train(stage, method=method, chain=[first])
    (tmp_path / "run" / "stages" / "02-layers-1-1").rename(tmp_path / "aside")

    unbroken = train(stage, method=method, chain=[first])

    assert digest(resumed) == digest(unbroken)


def test_rank_of_a_stage_is_that_of_its_adapters_and_of_the_export(
    train: Train, make_stage: MakeStage, make_later_config: MakeConfig
) -> None:
    method = {"type": "LoRA", "lora": {"rank": 2}}
    first = train(make_stage(0, 0, 1), method=method)
    second = train(make_stage(1, 2, 3, rank=4), method=method, chain=[first])
    tensors = {**output(first), **output(second)}
    ranks = {
        int(name.split(".")[2]): tensor.shape[0]
        for name, tensor in tensors.items()
        if "lora_A" in name
    }
    assert ranks == {0: 2, 1: 2, 2: 4, 3: 4}

    chain = [first, second]
    merged, _ = run_task(make_later_config("Export", method=method, chain=chain), NeverAsked())
    assert merged.export is not None
    model = AutoModelForCausalLM.from_pretrained(merged.export)
    tokens = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    fields = {"method": method, "chain": chain, "export": {"format": "Adapter"}}
    adapter, code = run_task(make_later_config("Export", **fields), NeverAsked())
    assert code == TrainerExitCode.SUCCEEDED, adapter.failure
    assert adapter.export is not None
    settings = json.loads((Path(adapter.export) / "adapter_config.json").read_text())
    assert set(settings["rank_pattern"].values()) == {4}
    assert set(settings["alpha_pattern"].values()) == {8.0}
    config = make_later_config("Export", **fields)
    assert config.model_directory is not None
    loaded = AutoModelForCausalLM.from_pretrained(config.model_directory)
    with torch.no_grad():
        found = PeftModel.from_pretrained(loaded, adapter.export).eval()(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_batch_size_of_a_stage_that_contradicts_the_file_is_refused(
    make_later_config: MakeConfig, make_stage: MakeStage
) -> None:
    with pytest.raises(ValueError, match="batchSize is 4, and 8 in the stage"):
        make_later_config("Train", stage=make_stage(0, 0, 1, batchSize=8))
