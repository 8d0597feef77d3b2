"""What an export keeps of the tuning: averaged with the base, and less of it lower down."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from stagetune_api.names import TrainerExitCode
from stagetune_api.report import EvaluationResult, StageReport
from stagetune_api.stage import StageConfig
from stagetune_api.training_spec import DepthScalingSpec
from stagetune_trainer.assemble import assemble
from stagetune_trainer.averaging import choose_alpha, depth_of_layer
from stagetune_trainer.run import run_task

MakeConfig = Callable[..., StageConfig]
CPU = torch.device("cpu")


class Tuned:
    """A run of two overlapping stages, from which finished models are made."""

    def __init__(
        self, make: MakeConfig, make_stage: Callable[..., dict[str, Any]], never: Any, **fields: Any
    ) -> None:
        self._make, self._never, self._fields = make, never, fields
        self._stages = [make_stage(0, 0, 2), make_stage(1, 2, 3)]
        if fields.get("method", {}).get("type") != "LoRA":
            self._stages[0]["embeddings"] = self._stages[1]["head"] = True
        self._chain: list[StageReport] = []
        for stage in self._stages:
            self._chain.append(self.task("Train", stage=stage))

    def config(self, task: str, **fields: Any) -> StageConfig:
        return self._make(task, chain=self._chain, **{**self._fields, **fields})

    def task(self, task: str, **fields: Any) -> StageReport:
        report, code = run_task(self.config(task, **fields), self._never)
        assert code is TrainerExitCode.SUCCEEDED, report.failure
        return report

    def weights(self, **protection: Any) -> dict[str, Tensor]:
        """Return the finished model's weights."""
        config = self.config("Evaluate", protection=protection)
        return {
            name: value.clone() for name, value in assemble(config, CPU).model.named_parameters()
        }

    def base(self) -> dict[str, Tensor]:
        directory = self.config("Evaluate").model_directory
        assert directory is not None
        model = AutoModelForCausalLM.from_pretrained(directory)
        return dict(model.named_parameters())

    def export(self, **fields: Any) -> StageReport:
        return self.task("Export", stages=self._stages, **fields)


@pytest.fixture(params=["Full", "LoRA"])
def tuned(
    request: pytest.FixtureRequest,
    make_later_config: MakeConfig,
    make_stage: Callable[..., dict[str, Any]],
    never: Any,
) -> Tuned:
    return Tuned(make_later_config, make_stage, never, method={"type": request.param})


def different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_whole_share_is_the_tuned_model_and_none_of_it_the_base_to_the_bit(tuned: Tuned) -> None:
    plain = tuned.weights()
    assert different(tuned.base(), plain)
    assert different(tuned.weights(averaging={"alpha": 1.0}), plain) == []
    assert different(tuned.weights(averaging={"alpha": 0.0}), tuned.base()) == []
    assert different(tuned.weights(depthScaling={"bottom": 1.0}), plain) == []


def test_share_lies_on_the_line_from_the_base_to_the_tuned_model(tuned: Tuned) -> None:
    base, plain, found = tuned.base(), tuned.weights(), tuned.weights(averaging={"alpha": 0.3})
    for name, value in found.items():
        expected = base[name] + 0.3 * (plain[name] - base[name])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_depth_scaling_keeps_less_lower_down_and_works_with_averaging(tuned: Tuned) -> None:
    base, plain = tuned.base(), tuned.weights()
    found = tuned.weights(depthScaling={"bottom": 0.4}, averaging={"alpha": 0.5})
    kept = {"0": 0.4, "1": 0.6, "2": 0.8, "3": 1.0, "embed_tokens": 0.4, "norm": 1.0, "lm_head": 1}
    seen = set()
    for name, value in found.items():
        parts = name.split(".")
        place = parts[2] if parts[1] == "layers" else parts[1] if parts[0] == "model" else parts[0]
        seen.add(place)
        expected = base[name] + 0.5 * kept[place] * (plain[name] - base[name])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    assert seen == set(kept)


def test_only_layer_of_a_model_keeps_its_whole_change() -> None:
    assert depth_of_layer(0, 1, DepthScalingSpec(bottom=0.2)) == 1.0


def test_average_is_rounded_once(
    make_later_config: MakeConfig, make_stage: Callable[..., dict[str, Any]], never: Any
) -> None:
    """In bf16 the tuned weight would be rounded before the average, and the average again."""
    run = Tuned(
        make_later_config, make_stage, never, method={"type": "LoRA"}, export={"dtype": "BF16"}
    )
    exact = Tuned(
        make_later_config, make_stage, never, method={"type": "LoRA"}, export={"dtype": "FP32"}
    )
    found = run.weights(averaging={"alpha": 0.3})
    # The base is read in bf16, so the line begins at the rounded weights.
    delta = {name: value - exact.base()[name] for name, value in exact.weights().items()}
    for name, value in found.items():
        base = exact.base()[name].bfloat16()
        expected = torch.lerp(base.float(), base.float() + delta[name], 0.3).bfloat16()
        assert value.dtype is torch.bfloat16
        unequal = (value != expected).float().mean()
        assert float(unequal) < 0.002, name


def test_adapter_export_gives_the_same_model_as_the_merged_one(
    make_later_config: MakeConfig,
    make_stage: Callable[..., dict[str, Any]],
    never: Any,
    tmp_path: Path,
) -> None:
    from peft import PeftModel

    run = Tuned(make_later_config, make_stage, never, method={"type": "LoRA"})
    protection = {"averaging": {"alpha": 0.5}, "depthScaling": {"bottom": 0.4}}
    expected = run.weights(**protection)
    report = run.export(protection=protection, export={"format": "Adapter"})
    assert report.export is not None
    directory = run.config("Evaluate").model_directory
    assert directory is not None
    base = AutoModelForCausalLM.from_pretrained(directory)
    merged: Any = PeftModel.from_pretrained(base, report.export)
    found = dict(merged.merge_and_unload().named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    card = (Path(report.export) / "README.md").read_text()
    assert "| Weight averaging | 0.5 of the tuned weights, the rest the base's (as set) |" in card
    assert (
        "| Depth scaling | 0.4 of the bottommost layer's change, rising to 1 at the top |" in card
    )


def evaluation(report: StageReport) -> EvaluationResult:
    assert report.evaluation is not None
    return report.evaluation


def test_share_is_chosen_on_the_validation_rows_and_measured(tuned: Tuned) -> None:
    auto = {"averaging": {"tolerance": 0.05}}
    found = evaluation(tuned.task("Evaluate", protection=auto))
    assert found.averaging is not None
    losses = found.averaging.validation_losses
    assert found.averaging.alphas == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert losses[0] == pytest.approx(found.before.validation_loss, rel=1e-6)
    within = [loss <= min(losses) + 0.05 for loss in losses]
    index = found.averaging.alphas.index(found.averaging.chosen)
    assert within.index(True) == index
    assert index > 0
    assert found.after.validation_loss == pytest.approx(losses[index], rel=1e-6)
    set_by_hand = {"averaging": {"alpha": found.averaging.chosen}}
    again = evaluation(tuned.task("Evaluate", protection=set_by_hand))
    assert again.averaging is None
    assert again.after == found.after


def test_export_takes_the_share_that_was_chosen_and_repeats_to_the_bit(tuned: Tuned) -> None:
    auto: dict[str, Any] = {"averaging": {}}
    first = tuned.export(protection=auto, averaging_alpha=0.4)
    assert first.export is not None
    assert first.output is not None
    expected = tuned.weights(averaging={"alpha": 0.4})
    found = load_file(Path(first.export) / "model.safetensors")
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert "chosen on the validation rows" in (Path(first.export) / "README.md").read_text()
    again = tuned.export(protection=auto, averaging_alpha=0.4)
    assert again.output is not None
    assert again.output.digest == first.output.digest


def test_export_without_the_chosen_share_is_refused(make_stage_config: MakeConfig) -> None:
    digest = "a" * 64
    with pytest.raises(ValidationError, match="averagingAlpha"):
        make_stage_config(
            task="Export",
            model_directory="/model",
            model_digest=digest,
            data_digest=digest,
            chain=[{"path": "/output", "digest": digest}],
            protection={"averaging": {}},
        )


@pytest.mark.parametrize(("tolerance", "chosen"), [(0.0, 0.7), (0.1, 0.4), (10.0, 0.0)])
def test_smallest_share_within_the_tolerance_is_chosen(tolerance: float, chosen: float) -> None:
    result = choose_alpha(lambda alpha: (alpha - 0.7) ** 2, tolerance)
    assert result.chosen == chosen
