"""Packed rows: the same rows, the same loss and gradient, and none of them sees another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from stagetune_api import names
from stagetune_api.report import FailureClass, Outcome, StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer.data.batch import Batch, collate
from stagetune_trainer.data.packing import pack
from stagetune_trainer.data.store import StoredRow
from stagetune_trainer.decoder import Decoder, find_decoder
from stagetune_trainer.loss import AnswerLoss
from stagetune_trainer.packing_check import why_not_packed
from stagetune_trainer.prefix.window import LayerWindow
from stagetune_trainer.run import run_task
from tiny_decoders import load

MakeConfig = Callable[..., StageConfig]
MakeStage = Callable[..., dict[str, Any]]
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3"]
PACKED = {"packing": True}


def stored(*tokens: int) -> StoredRow:
    """A row whose second half is learned."""
    labels = [-100] * (len(tokens) // 2) + list(tokens[len(tokens) // 2 :])
    return StoredRow(input_ids=list(tokens), labels=labels, file="", row=1)


FIRST, SECOND, THIRD = stored(3, 4, 5, 6, 7, 8), stored(9, 10, 11), stored(12, 13, 14, 15)


def packed() -> Batch:
    return collate([FIRST, SECOND, THIRD], counts=[2, 1], rows=(4, 5, 6))


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize(
    "lengths", [[5], [9, 1, 1, 1], [3, 3, 3, 3, 3], list(range(1, 40)), [40, 2, 2, 2, 2, 2]]
)
def test_every_row_is_in_one_sequence_that_is_no_longer_than_allowed(
    lengths: list[int], at_once: int
) -> None:
    capacity = max(lengths)
    sequences = pack(lengths, capacity, at_once)
    assert sorted(place for sequence in sequences for place in sequence) == list(
        range(len(lengths))
    )
    widths = [sum(lengths[place] for place in sequence) for sequence in sequences]
    assert max(widths) <= capacity
    assert widths == sorted(widths, reverse=True)
    # No better packing has fewer than this, and no micro-batch more is computed than needed.
    least = math.ceil(sum(lengths) / capacity)
    assert math.ceil(len(sequences) / at_once) <= math.ceil((least + 1) / at_once)


def test_sequences_are_as_short_as_cost_no_padding() -> None:
    """Four sequences of 10 are computed at once as well as one of 40, with less attention."""
    assert [len(sequence) for sequence in pack([10] * 4, 40, 4)] == [1, 1, 1, 1]
    assert [len(sequence) for sequence in pack([40, *[2] * 20], 40, 4)] == [1, 20]


def test_packing_computes_little_padding() -> None:
    lengths = [2 + 7 * number % 61 for number in range(64)]
    sequences = pack(lengths, max(lengths), 4)
    widths = [sum(lengths[place] for place in sequence) for sequence in sequences]
    computed = sum(len(widths[at : at + 4]) * widths[at] for at in range(0, len(widths), 4))
    assert computed < 1.06 * sum(lengths)


def test_packed_rows_have_positions_of_their_own_and_no_label_across_them() -> None:
    batch = packed()
    assert batch.input_ids.tolist() == [
        [3, 4, 5, 6, 7, 8, 9, 10, 11],
        [12, 13, 14, 15, 0, 0, 0, 0, 0],
    ]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3, 4]]
    learned_first = collate([FIRST, StoredRow(input_ids=[9, 10], labels=[9, 10], file="", row=1)])
    together = collate(
        [FIRST, StoredRow(input_ids=[9, 10], labels=[9, 10], file="", row=1)], counts=[2]
    )
    assert together.num_answer_tokens == learned_first.num_answer_tokens == 4
    assert batch.num_padding_tokens == 5
    assert batch.is_token(torch.device("cpu")).sum(dim=1).tolist() == [9, 4]
    assert collate([FIRST, SECOND]).position_ids is None


def tiny(make_tiny_model: Callable[..., Path], family: str) -> Decoder:
    decoder = load(make_tiny_model(family))
    decoder.model.eval()
    return decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_packed_rows_is_that_of_single_rows(
    family: str, make_tiny_model: Callable[..., Path]
) -> None:
    decoder = tiny(make_tiny_model, family)
    loss = AnswerLoss(decoder)
    decoder.model.requires_grad_(True)

    def gradients(batches: Sequence[Batch]) -> tuple[float, int, dict[str, Tensor]]:
        decoder.model.zero_grad()
        total, count = 0.0, 0
        for batch in batches:
            found, answers = loss.of(batch)
            found.backward()  # type: ignore[no-untyped-call]
            total, count = total + float(found.detach()), count + answers
        named = decoder.model.named_parameters()
        return total, count, {name: p.grad.clone() for name, p in named if p.grad is not None}

    alone = gradients([collate([row]) for row in (FIRST, SECOND, THIRD)])
    together = gradients([packed()])

    assert together[1] == alone[1] == 7
    assert together[0] == pytest.approx(alone[0], rel=1e-5)
    for name, expected in alone[2].items():
        torch.testing.assert_close(together[2][name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_row_changes_no_bit_of_its_neighbours(
    family: str, make_tiny_model: Callable[..., Path]
) -> None:
    loss = AnswerLoss(tiny(make_tiny_model, family))
    other = stored(30, 31, 32, 33, 34, 35)
    with torch.no_grad():
        before, _ = loss.features_of(packed())
        after, _ = loss.features_of(collate([other, SECOND, THIRD], counts=[2, 1]))
        last, _ = loss.features_of(collate([FIRST, stored(40, 41, 42), THIRD], counts=[2, 1]))
    # Three answer tokens of the first row, two of the second, two of the third.
    assert torch.equal(before[3:], after[3:])
    assert not torch.equal(before[:3], after[:3])
    assert torch.equal(before[:3], last[:3])
    assert torch.equal(before[5:], last[5:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [0, 2])
def test_families_that_keep_rows_apart_pass_the_check(
    family: str, first: int, make_tiny_model: Callable[..., Path]
) -> None:
    decoder = tiny(make_tiny_model, family)
    assert why_not_packed(decoder, LayerWindow(decoder), first) is None


UNFIT: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4, "intermediate_size": 64},
    "bloom": {"n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
}


@pytest.mark.parametrize("family", UNFIT)
def test_families_whose_rows_see_each_other_are_found_out(family: str) -> None:
    options = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, **UNFIT[family]}
    config = CONFIG_MAPPING[family](**options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    decoder = find_decoder(model.requires_grad_(False))
    assert why_not_packed(decoder, LayerWindow(decoder), 0) is not None


def test_a_leak_in_any_layer_is_found_out(make_tiny_model: Callable[..., Path]) -> None:
    """One layer that passes something on from token to token, as recurrent ones do."""
    decoder = tiny(make_tiny_model, "llama")
    window = LayerWindow(decoder)
    forward = decoder.layers[2].forward

    def leaking(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mixed = hidden + 1e-6 * hidden.cumsum(dim=1)
        output: Tensor = forward(mixed, *args, **kwargs)
        return output

    decoder.layers[2].forward = leaking
    assert why_not_packed(decoder, window, 0) == "rows of one sequence see each other"


@pytest.fixture
def run_stages(
    make_later_config: MakeConfig, make_stage: MakeStage, tmp_path: Path, never: Any
) -> Callable[..., list[StageReport]]:
    """`run_stages(name, cached=..., **fields)`: two stages of two passes each."""

    def run(name: str, *, cached: bool = False, **fields: Any) -> list[StageReport]:
        reports: list[StageReport] = []
        for index, first in enumerate((0, 2)):
            options = {"prefixCache": {"used": True, "reason": "asked for"}} if cached else {}
            stage = make_stage(index, first, first + 1, epochs=2.0, steps=16, **options)
            directory = str(tmp_path / name)
            config = make_later_config(
                "Train", stage=stage, chain=reports, run_directory=directory, **fields
            )
            report, _ = run_task(config, never)
            assert report.outcome is Outcome.SUCCEEDED, report.failure
            reports.append(report)
        return reports

    return run


def losses(report: StageReport) -> list[dict[str, Any]]:
    """Return the losses and gradients' norms of every step."""
    assert report.output is not None
    path = Path(report.output.path).parent / names.METRICS_FILE
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = ("step", "loss", "losses", "gradNorm")
    return [
        {key: line[key] for key in kept if key in line} for line in lines if line["kind"] == "Step"
    ]


def weights(report: StageReport) -> dict[str, Tensor]:
    assert report.output is not None
    return load_file(Path(report.output.path) / names.WEIGHTS_FILE)


VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"method": {"type": "LoRA", "lora": {"rank": 2}}},
    "4 bits": {"method": {"type": "QLoRA", "lora": {"rank": 2}}},
    "added blocks": {"method": {"type": "Expand", "expand": {"layersPerBlock": 1}}},
    "protected": {
        "protection": {
            "distillation": {"weight": 0.1},
            "anchor": {"weight": 0.1},
            "replay": {"ratio": 0.5, "generated": {"tokens": 256}},
        }
    },
    "in the backward pass": {
        "training": {"optimizerInBackward": True, "microBatchSize": 4},
    },
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_a_packed_stage_is_the_same_stage_within_rounding(
    fields: dict[str, Any], run_stages: Callable[..., list[StageReport]]
) -> None:
    training = {"microBatchSize": 2, **fields.get("training", {})}
    plain = run_stages("plain", **{**fields, "training": training})
    together = run_stages("packed", **{**fields, "training": {**training, **PACKED}})
    cached = run_stages("cached", cached=True, **{**fields, "training": {**training, **PACKED}})

    for one, other in zip(plain, together, strict=True):
        for before, after in zip(losses(one), losses(other), strict=True):
            assert after["loss"] == pytest.approx(before["loss"], rel=1e-3)
            assert after["gradNorm"] == pytest.approx(before["gradNorm"], rel=1e-2)
            terms = before.get("losses", {})
            assert after.get("losses", {}) == pytest.approx(terms, rel=1e-2, abs=1e-4)
        for name, expected in weights(one).items():
            torch.testing.assert_close(weights(other)[name], expected, rtol=1e-2, atol=1e-3)
        assert one.train is not None
        assert other.train is not None
        assert one.train.tokens == other.train.tokens
    # With a cache to the bit, as without packing.
    assert [losses(report) for report in cached] == [losses(report) for report in together]


def test_packing_is_refused_where_rows_would_see_each_other(
    make_later_config: MakeConfig,
    make_stage: MakeStage,
    never: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stagetune_trainer.packing_check.why_not_packed", lambda *_: "it leaks")
    config = make_later_config("Train", stage=make_stage(0, 2, 3), training=PACKED)
    report, _ = run_task(config, never)
    assert report.failure is not None
    assert report.failure.failure_class is FailureClass.USER_ERROR
    assert "spec.training.packing: true is not possible for a llama model" in report.failure.message
