"""The profile of gradient norms: equal to autograd's, found again, measured anew when asked to."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stagetune_api import names
from stagetune_api.facts import GradientFacts
from stagetune_api.names import TERMINATION_MESSAGE_MAX_BYTES, TrainerExitCode
from stagetune_api.report import StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer.data.batch import Batch
from stagetune_trainer.data.batches import open_profile_batches
from stagetune_trainer.decoder import Decoder, checkpoint_activations, find_decoder
from stagetune_trainer.gradient_profile import PROFILE_FILE, relative_gradient_norms
from stagetune_trainer.model import Numerics
from stagetune_trainer.run import run_task
from stop_requests import NeverAsked

MakeConfig = Callable[..., StageConfig]
FP32 = Numerics(device=torch.device("cpu"), dtype=torch.float32)


def prepared(config: StageConfig) -> StageReport:
    report, code = run_task(config, NeverAsked())
    assert code == TrainerExitCode.SUCCEEDED, report.failure
    return report


def profile_of(report: StageReport) -> GradientFacts:
    assert report.facts is not None
    assert report.facts.gradients is not None
    return report.facts.gradients


def load(directory: Path | str) -> Decoder:
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.requires_grad_(False)
    return find_decoder(model)


def batches_of(report: StageReport, config: StageConfig, count: int) -> list[Batch]:
    assert report.facts is not None
    digest = report.facts.data.digest
    return open_profile_batches(config.model_copy(update={"data_digest": digest}), count)


def norms_by_autograd(directory: str, batches: list[Batch]) -> list[float]:
    """The same by the model's own loss and `torch.autograd.grad`, layer by layer."""
    sums: list[float] = []
    for batch in batches:
        model = AutoModelForCausalLM.from_pretrained(directory)
        loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
        of_batch = []
        for layer in model.model.layers:
            weights = list(layer.parameters())
            gradients = torch.autograd.grad(loss, weights, retain_graph=True)
            norms = [
                math.sqrt(sum(float(value.detach().double().square().sum()) for value in values))
                for values in (gradients, weights)
            ]
            of_batch.append(norms[0] / norms[1])
        sums = [a + b for a, b in zip(sums or [0.0] * len(of_batch), of_batch, strict=True)]
    return [total / len(batches) for total in sums]


@pytest.mark.parametrize("checkpointing", ["Always", "Never"])
def test_profile_is_that_of_autograd(checkpointing: str, make_stage_config: MakeConfig) -> None:
    config = make_stage_config(
        gradient_norm={"batches": 3}, training={"gradientCheckpointing": checkpointing}
    )

    report = prepared(config)

    profile, batches = profile_of(report), batches_of(report, config, 3)
    assert report.facts is not None
    expected = norms_by_autograd(report.facts.model_directory, batches)
    assert profile.relative_norms == pytest.approx(expected, rel=2e-3)
    assert (profile.rows, len(batches)) == (12, 6)
    assert profile.tokens == sum(batch.num_tokens for batch in batches)


def test_gradients_never_stand_together(
    make_tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load(make_tiny_model("llama"))
    checkpoint_activations(decoder, 0)
    alive: list[int] = []
    import stagetune_trainer.gradient_profile as module

    original = module._take_norm

    def counting(key: str, squares: dict[str, float], parameter: torch.Tensor) -> None:
        layers = [layer for layer in decoder.layers if any(_has_gradient(layer))]
        alive.append(len(layers))
        original(key, squares, parameter)

    monkeypatch.setattr(module, "_take_norm", counting)
    tokens = torch.arange(3, 27).reshape(2, 12)

    relative_gradient_norms(decoder, FP32, [Batch(input_ids=tokens, labels=tokens, num_tokens=24)])

    assert len(alive) == sum(1 for layer in decoder.layers for _ in layer.parameters())
    assert set(alive) == {1}
    assert not any(_has_gradient(decoder.model))
    assert not any(value.requires_grad for value in decoder.model.parameters())


def _has_gradient(module: torch.nn.Module) -> list[bool]:
    return [value.grad is not None for value in module.parameters()]


@pytest.mark.parametrize("planted", range(4))
def test_profile_finds_the_layer_that_the_loss_pulls_at_most(
    planted: int, make_tiny_model: Callable[..., Path]
) -> None:
    """Two pairs of matrices share a product; with one small and one large the gradients grow."""
    tokens = torch.arange(3, 51).reshape(4, 12)
    batch = Batch(input_ids=tokens, labels=tokens, num_tokens=48)
    plain = relative_gradient_norms(load(make_tiny_model("llama")), FP32, [batch])
    decoder = load(make_tiny_model("llama"))
    factors = {"v_proj": 20.0, "o_proj": 1 / 20, "up_proj": 20.0, "down_proj": 1 / 20}
    with torch.no_grad():
        for name, value in decoder.layers[planted].named_parameters():
            value.mul_(factors.get(name.split(".")[-2], 1.0))

    found = relative_gradient_norms(decoder, FP32, [batch])

    assert max(range(4), key=found.__getitem__) == planted
    for index in {0, 1, 2, 3} - {planted}:
        assert found[index] == pytest.approx(plain[index], rel=1e-3)


def test_measuring_again_gives_the_same_bits(make_stage_config: MakeConfig) -> None:
    fields = {"gradient_norm": {"batches": 2}}
    first = prepared(make_stage_config(**fields))
    path = Path(make_stage_config().run_directory) / "prepare" / PROFILE_FILE
    before = path.read_bytes()
    path.unlink()

    second = prepared(make_stage_config(**fields, attempt=2))

    assert profile_of(first) == profile_of(second)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "is_measured"),
    [
        ({"gradient_norm": {"batches": 2, "skipBelow": 0.5, "cap": 3.0}}, False),
        ({"training": {"learningRate": 1e-2}}, False),
        ({"gradient_norm": {"batches": 3}}, True),
        ({"training": {"microBatchSize": 4}}, True),
    ],
)
def test_only_what_changes_the_numbers_is_measured_again(
    change: dict[str, Any],
    is_measured: bool,
    make_stage_config: MakeConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields: dict[str, Any] = {"gradient_norm": {"batches": 2}}
    first = prepared(make_stage_config(**fields))
    assert "measuring the gradient norm" in capsys.readouterr().out

    again = prepared(make_stage_config(**{**fields, **change}, attempt=2))

    said = capsys.readouterr().out
    assert ("measuring the gradient norm" in said) is is_measured
    assert "found the tokenised rows" in said
    assert (profile_of(first) == profile_of(again)) is not is_measured
    assert first.facts is not None
    assert again.facts is not None
    assert first.facts.data == again.facts.data


def test_damaged_profile_is_measured_again(make_stage_config: MakeConfig) -> None:
    fields = {"gradient_norm": {"batches": 2}}
    first = prepared(make_stage_config(**fields))
    path = Path(make_stage_config().run_directory) / "prepare" / PROFILE_FILE
    path.write_bytes(path.read_bytes()[:20])

    assert profile_of(prepared(make_stage_config(**fields, attempt=2))) == profile_of(first)


def test_no_profile_is_reported_where_none_is_asked_for(make_stage_config: MakeConfig) -> None:
    prepared(make_stage_config(gradient_norm={"batches": 2}))

    report = prepared(make_stage_config(attempt=2))

    assert report.facts is not None
    assert report.facts.gradients is None


def test_facts_file_holds_the_profile_and_a_deep_ones_report_fits_a_message(
    make_stage_config: MakeConfig,
) -> None:
    config = make_stage_config(gradient_norm={"batches": 1})
    report = prepared(config)
    stored = json.loads((Path(config.run_directory) / "prepare" / names.FACTS_FILE).read_text())
    assert stored["gradients"]["relativeNorms"] == profile_of(report).relative_norms
    assert report.facts is not None
    deep = GradientFacts(relative_norms=[1.234e-05] * 128, rows=10**6, tokens=10**9)
    facts = report.facts.model_copy(update={"gradients": deep})

    message = report.model_copy(update={"facts": facts}).termination_message()

    assert len(message.encode()) <= TERMINATION_MESSAGE_MAX_BYTES
    assert profile_of(StageReport.model_validate_json(message)) == deep
