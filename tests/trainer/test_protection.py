"""Terms of the objective on a tiny model: what they are, and that no split changes the gradient."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from stagetune_api.stage import PlannedStage, StageConfig
from stagetune_api.training_spec import LayerRange, ReplaySpec
from stagetune_trainer.checkpoint import Fence
from stagetune_trainer.data.batch import Batch, collate
from stagetune_trainer.data.batches import TrainingRows, open_split, open_training_rows
from stagetune_trainer.data.store import RowReader, Split
from stagetune_trainer.data.template import IGNORED
from stagetune_trainer.decoder import Decoder, checkpoint_activations, freeze_prefix
from stagetune_trainer.loss import AnswerLoss
from stagetune_trainer.metrics import ProgressLog
from stagetune_trainer.model import Numerics, load_base
from stagetune_trainer.protect import anchor, distillation, teacher
from stagetune_trainer.protect.distillation import TeacherTargets, answer_sums, full_logits
from stagetune_trainer.protect.objective import Objective
from stagetune_trainer.protect.protection import Protection
from stagetune_trainer.protect.replay import ReplayRows
from stagetune_trainer.protect.teacher import TeacherSpec, open_teacher
from stagetune_trainer.references import ReferenceFolder
from stagetune_trainer.tensor_file import RowTensors, TensorFileWriter, row_offsets

MakeConfig = Callable[..., StageConfig]
MakeStage = Callable[..., dict[str, Any]]
FP32 = Numerics(device=torch.device("cpu"), dtype=torch.float32)
BF16 = Numerics(device=torch.device("cpu"), dtype=torch.bfloat16)
PROTECTION = {
    "distillation": {"weight": 0.5, "topK": 16},
    "anchor": {"weight": 0.3},
    "replay": {"ratio": 0.5, "generated": {"tokens": 256}},
}


def changed(decoder: Decoder, scale: float = 0.2) -> Decoder:
    """Return `decoder` with noise on the weights of its layers."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in decoder.layers.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += scale * parameter.std() * noise if parameter.ndim > 1 else 0
    return decoder


class Workbench:
    """A prepared run, its base model and the protection of its first stage."""

    def __init__(self, config: StageConfig, never: Any, numerics: Numerics = FP32) -> None:
        assert config.stage is not None
        assert config.model_directory is not None
        assert config.model_digest is not None
        self.config = config
        self.stage: PlannedStage = config.stage
        self.numerics = numerics
        self._never = never
        self._folder = Path(config.model_directory)
        self._digest = config.model_digest
        self._root = Path(config.run_directory)

    def base(self) -> Decoder:
        return load_base(self._folder, self._digest, self.numerics)

    def protection(self) -> Protection:
        fence = Fence(self._root / "fence")
        log = ProgressLog(task=self.config.task, name="x", attempt=1, sinks=[])
        return Protection(
            self.config, self.stage, self.numerics, fence=fence, log=log, stop=self._never
        )

    def objective(self, decoder: Decoder, base: Decoder | None = None) -> Objective:
        protection = self.protection()
        protection.look_at_base(base or self.base())
        return protection.objective(AnswerLoss(decoder))

    def reader(self, split: Split = Split.TRAIN) -> RowReader:
        return open_split(self.config, split)

    def batches(self, size: int, *, count: int = 8) -> list[Batch]:
        """Return the first `count` training rows in micro-batches of `size`, and some replay."""
        rows = self.reader()
        batches = [
            collate(
                [rows[row] for row in range(start, start + size)], rows=range(start, start + size)
            )
            for start in range(0, count, size)
        ]
        if self.config.protection.replay is None:
            return batches
        replay = ReplayRows(
            self.reader(Split.REPLAY), key=(7, 0), per_step=4, micro_batch_size=size
        )
        return [*batches, *replay.micro_batches(0)]


@pytest.fixture
def bench(
    make_later_config: MakeConfig, make_stage: MakeStage, never: Any
) -> Callable[..., Workbench]:
    """`bench(protection, numerics=..., **fields)` of a stage over layers 1 and 2 of four."""

    def make(
        protection: dict[str, Any] | None = None, *, numerics: Numerics = FP32, **fields: Any
    ) -> Workbench:
        config = make_later_config(
            "Train",
            stage=make_stage(0, 1, 2),
            protection=PROTECTION if protection is None else protection,
            **fields,
        )
        return Workbench(config, never, numerics)

    return make


def gradients(
    decoder: Decoder, objective: Objective, batches: list[Batch], numerics: Numerics = FP32
) -> dict[str, Tensor]:
    """Return the gradients of the batch's objective, by parameter."""
    decoder.model.zero_grad()
    counts = objective.counts(batches)
    for batch in batches:
        with numerics.autocast():
            sums = objective.sums(batch)
        objective.weighted(sums, counts).backward()  # type: ignore[no-untyped-call]
    return {
        name: parameter.grad.clone()
        for name, parameter in decoder.model.named_parameters()
        if parameter.grad is not None
    }


def opened(decoder: Decoder, *, checkpointing: bool = False) -> Decoder:
    """Return `decoder` with layers 1 and 2 open, as a stage opens them."""
    for _, layer in decoder.group(LayerRange(first=1, last=2)):
        layer.requires_grad_(True)
    decoder.model.train()
    if checkpointing:
        checkpoint_activations(decoder, 1)
    freeze_prefix(decoder, 1, embeddings_train=False)
    return decoder


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_split_into_micro_batches_gives_the_gradient_of_all_terms(
    bench: Callable[..., Workbench], checkpointing: bool
) -> None:
    work = bench()
    decoder = opened(changed(work.base()), checkpointing=checkpointing)
    objective = work.objective(decoder)
    expected = gradients(decoder, objective, work.batches(8))
    assert {name.split(".")[2] for name in expected} == {"1", "2"}
    for size in (1, 2, 4):
        found = gradients(decoder, objective, work.batches(size))
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=2e-3, atol=2e-6)


def test_each_term_alone_changes_the_gradient(bench: Callable[..., Workbench]) -> None:
    plain = bench({})
    decoder = opened(changed(plain.base()))
    expected = gradients(decoder, plain.objective(decoder), plain.batches(4))
    for name in PROTECTION:
        work = bench({name: PROTECTION[name]})
        found = gradients(decoder, work.objective(decoder), work.batches(4))
        assert any(not torch.allclose(found[key], expected[key], rtol=1e-3) for key in expected), (
            name
        )


def test_weight_of_zero_is_the_loss_on_answers_alone(bench: Callable[..., Workbench]) -> None:
    work = bench({"distillation": {"weight": 0}, "anchor": {"weight": 0}})
    decoder = opened(work.base())
    assert set(work.objective(decoder).sums(work.batches(4)[0])) == {"answers"}
    assert not (Path(work.config.run_directory) / "cache" / "teacher-train").exists()


@torch.no_grad()
def test_base_itself_has_no_distance_from_the_base(bench: Callable[..., Workbench]) -> None:
    """But for the rounding of what is stored: fp16 log-probabilities, bf16 hidden states."""
    work = bench()
    decoder = work.base()
    objective = work.objective(decoder, decoder)
    batch = work.batches(4)[0]
    sums, counts = objective.sums(batch), objective.counts([batch])
    assert 0 <= float(sums["distillation"]) / counts["distillation"] < 1e-5
    assert 0 <= float(sums["anchor"]) / counts["anchor"] < 1e-5


@torch.no_grad()
def test_base_in_bf16_has_no_distance_at_its_border_at_all(
    bench: Callable[..., Workbench],
) -> None:
    work = bench({"anchor": {"weight": 1}}, numerics=BF16)
    decoder = work.base()
    objective = work.objective(decoder, decoder)
    rows = TrainingRows(work.reader(), stage=work.stage, seed=7, batch_size=4, micro_batch_size=1)
    for batch in rows.micro_batches(0):
        with BF16.autocast():
            assert float(objective.sums(batch)["anchor"]) < 1e-5


def divergence_over_everything(base: Decoder, tuned: Decoder, batch: Batch) -> Tensor:
    """Return KL(base || tuned) at each answer token, from all logits of both models."""
    logs = []
    for decoder in (base, tuned):
        loss = AnswerLoss(decoder)
        features, _ = loss.features(batch.input_ids, batch.labels)
        logs.append(functional.log_softmax(full_logits(loss.head, features), dim=-1))
    return (logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1)


@pytest.mark.parametrize("top_k", [1024, 64, 1])
@torch.no_grad()
def test_divergence_is_that_over_the_whole_vocabulary_or_below(
    top_k: int, bench: Callable[..., Workbench]
) -> None:
    work = bench({"distillation": {"weight": 1, "topK": top_k}})
    base, tuned = work.base(), changed(work.base(), scale=0.5)
    batch = work.batches(8)[0]
    found = float(work.objective(tuned).sums(batch)["distillation"])
    expected = float(divergence_over_everything(base, tuned, batch).sum())
    if top_k == 1024:
        assert found == pytest.approx(expected, rel=2e-3)
    else:
        assert 0 < found < expected


def test_many_positions_are_computed_in_parts_with_the_same_gradient(
    bench: Callable[..., Workbench],
) -> None:
    work = bench({"distillation": {"weight": 1, "topK": 16}})
    loss = AnswerLoss(changed(work.base()))
    batch = work.batches(8)[0]
    features, targets = loss.features(batch.input_ids, batch.labels)
    assert len(features) > features.shape[1]
    logits = full_logits(loss.head, features + 0.1)
    tokens, kept, rest = distillation.likeliest(logits, 16)
    teacher = TeacherTargets(tokens=tokens, log_probabilities=kept, log_rest=rest)
    results = []
    for whole in (False, True):
        leaf = features.detach().clone().requires_grad_(True)
        if whole:
            sums = distillation._chunk_sums(loss.head, leaf, targets, teacher)
        else:
            sums = answer_sums(loss.head, leaf, targets, teacher)
        (sums[0] + sums[1]).backward()  # type: ignore[no-untyped-call]
        results.append((sums[0].detach(), sums[1].detach(), leaf.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        expected = loss.head.cross_entropy_sum(features, targets)
    torch.testing.assert_close(sums[0].detach(), expected)


def test_rest_of_a_sure_base_has_a_finite_gradient() -> None:
    """Where next to nothing is left beside the likeliest tokens, 1 minus them is rounding error."""
    logits = torch.tensor([[60.0, 1.0, 0.5, -30.0]], requires_grad=True)
    tokens = torch.tensor([[0, 1]])
    base = torch.tensor([[40.0, 2.0, -3.0, -20.0]])
    kept_tokens, kept, rest = distillation.likeliest(base, 2)
    assert torch.equal(kept_tokens, tokens)
    teacher = TeacherTargets(tokens=tokens, log_probabilities=kept, log_rest=rest)
    divergence = distillation.bucket_divergence(logits, logits.logsumexp(-1), teacher)
    divergence.sum().backward()  # type: ignore[no-untyped-call]
    assert math.isfinite(float(divergence.sum().detach()))
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@torch.no_grad()
def test_anchor_is_the_mean_relative_distance_of_real_tokens(
    bench: Callable[..., Workbench],
) -> None:
    work = bench({"anchor": {"weight": 1}})
    base, tuned = work.base(), changed(work.base(), scale=0.5)
    batch = collate([work.reader()[row] for row in (0, 9, 20)], rows=(0, 9, 20))
    assert len(set(batch.lengths)) > 1
    states = []
    for decoder in (base, tuned):
        taken: list[Tensor] = []
        hook = decoder.layers[3].register_forward_pre_hook(
            lambda module, args, taken=taken: taken.append(args[0])
        )
        decoder.backbone(input_ids=batch.input_ids, use_cache=False)
        hook.remove()
        states.append(taken[0])
    objective = work.objective(tuned)
    sums, counts = objective.sums(batch), objective.counts([batch])
    expected = sum(
        float(
            (states[1][row, t] - states[0][row, t]).square().sum()
            / states[0][row, t].square().sum()
        )
        for row, length in enumerate(batch.lengths)
        for t in range(length)
    ) / sum(batch.lengths)
    assert float(sums["anchor"]) / counts["anchor"] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("ratio", "batch_size", "added"), [(0.25, 16, 4), (0.01, 16, 1), (0.5, 5, 2), (0.9, 1, 1)]
)
def test_ratio_says_how_many_rows_are_added(ratio: float, batch_size: int, added: int) -> None:
    assert ReplaySpec(ratio=ratio).rows_per_step(batch_size) == added


def test_replayed_rows_come_beside_the_batch_and_all_of_them_as_often(
    bench: Callable[..., Workbench],
) -> None:
    work = bench({"replay": {"ratio": 0.5, "generated": {"tokens": 512}}})
    protection = work.protection()
    rows = TrainingRows(work.reader(), stage=work.stage, seed=7, batch_size=4, micro_batch_size=2)
    micro_batches = protection.micro_batches(rows)
    num_replayed = len(work.reader(Split.REPLAY))
    seen: list[int] = []
    for step in range(num_replayed):  # two rows a step: two passes
        batches = micro_batches(step)
        own = [row for batch in batches if not batch.is_replay for row in batch.rows]
        replayed = [row for batch in batches if batch.is_replay for row in batch.rows]
        assert sorted(own) == sorted(rows.batch_indices(step))
        assert len(replayed) == 2
        seen += replayed
    assert sorted(seen) == sorted([*range(num_replayed)] * 2)
    # The rows of a step follow from the step alone.
    again = work.protection().micro_batches(rows)(5)
    assert [batch.rows for batch in again] == [batch.rows for batch in micro_batches(5)]


@torch.no_grad()
def test_mean_loss_on_replayed_tokens_counts_with_the_ratio(
    bench: Callable[..., Workbench],
) -> None:
    """However long the replayed rows are: the ratio is of the losses, not of the tokens."""
    work = bench({"replay": {"ratio": 0.25, "generated": {"tokens": 512}}})
    decoder = opened(work.base())
    objective = work.objective(decoder)
    batches = work.batches(4)
    counts = objective.counts(batches)
    total = sum(float(objective.weighted(objective.sums(batch), counts)) for batch in batches)
    means = []
    for is_replay in (False, True):
        part = [batch for batch in batches if batch.is_replay is is_replay]
        sums = [AnswerLoss(decoder)(batch.input_ids, batch.labels) for batch in part]
        means.append(float(sum(value for value, _ in sums)) / sum(count for _, count in sums))
    assert total == pytest.approx(means[0] + 0.25 * means[1], rel=1e-5)


def test_generated_text_has_its_budget_and_every_token_but_the_first_is_learned(
    bench: Callable[..., Workbench],
) -> None:
    work = bench({"replay": {"ratio": 0.5, "generated": {"tokens": 300}}})
    rows = work.reader(Split.REPLAY)
    assert sum(len(row.input_ids) for row in rows) in (299, 300)
    longest = max(len(row.input_ids) for row in work.reader())
    for row in rows:
        assert 2 <= len(row.input_ids) <= longest
        assert list(row.labels) == [IGNORED, *row.input_ids[1:]]
    assert len({tuple(row.input_ids) for row in rows}) == len(rows)


def test_file_that_is_written_in_pieces_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = torch.randn(7, 3)
    offsets = row_offsets(torch.tensor([2, 0, 5]))
    writer = TensorFileWriter(
        path,
        {
            "offsets": (torch.int64, (4,)),
            "half": (torch.float16, (7, 3)),
            "brain": (torch.bfloat16, (7, 3)),
            "numbers": (torch.int32, (7,)),
        },
    )
    writer.write("offsets", 0, offsets)
    for start in (4, 0, 2):
        end = min(start + 3, 7)
        for name in ("half", "brain"):
            writer.write(name, start, values[start:end])
        writer.write("numbers", start, torch.arange(start, end))
    writer.close()
    loaded = load_file(path)
    assert torch.equal(loaded["half"], values.half())
    assert torch.equal(loaded["brain"], values.bfloat16())
    assert torch.equal(loaded["numbers"], torch.arange(7, dtype=torch.int32))
    rows = RowTensors(path)
    assert torch.equal(rows.rows("half", (2, 0)), values.half()[[2, 3, 4, 5, 6, 0, 1]])
    assert rows.rows("numbers", (1,)).shape == (0,)


def test_file_takes_all_of_its_room_at_once(tmp_path: Path) -> None:
    """Written through a mapping, a file with holes kills the process where the disk runs full."""
    path = tmp_path / "x.safetensors"
    TensorFileWriter(path, {"half": (torch.float16, (1000, 1000))})
    assert path.stat().st_size > 2_000_000
    assert path.stat().st_blocks * 512 >= path.stat().st_size


def test_stage_that_ran_out_of_memory_looks_at_fewer_rows_at_once_everywhere(
    make_later_config: MakeConfig, make_stage: MakeStage, never: Any, monkeypatch: Any
) -> None:
    """The file has then a smaller micro-batch than the stage's own."""
    sizes: list[int] = []

    def counted(stored: Any, **options: Any) -> Batch:
        sizes.append(len(stored))
        return collate(stored, **options)

    for module in (anchor, teacher):
        monkeypatch.setattr(module, "collate", counted)
    stage = make_stage(0, 1, 2, batchSize=8, microBatchSize=4)
    training = {"batchSize": 8, "microBatchSize": 2}
    config = make_later_config("Train", stage=stage, training=training, protection=PROTECTION)
    work = Workbench(config, never)
    protection = work.protection()
    protection.look_at_base(work.base())
    replayed = protection.micro_batches(open_training_rows(config, work.stage))(0)
    assert [len(batch.lengths) for batch in replayed] == [2, 2, 2, 2, 2, 2]
    assert set(sizes) == {2}


def test_reference_of_another_depth_is_not_taken_for_this_one(
    bench: Callable[..., Workbench], tmp_path: Path
) -> None:
    work = bench({})
    log = ProgressLog(task=work.config.task, name="x", attempt=1, sinks=[])
    folder = ReferenceFolder(tmp_path / "cache", work.config, FP32, Fence(tmp_path / "fence"), log)
    looked: list[int] = []

    def teacher(top_k: int) -> TeacherTargets:
        def loss() -> AnswerLoss:
            looked.append(top_k)
            return AnswerLoss(work.base())

        spec = TeacherSpec(name="train", rows=work.reader(), top_k=top_k, micro_batch_size=4)
        vocabulary = work.base().head_weight.shape[0]
        opened = open_teacher(folder, spec, loss, FP32, vocabulary=vocabulary)
        return opened.targets(work.batches(2)[0], torch.device("cpu"))

    assert teacher(8).tokens.shape[1] == 8
    assert teacher(8).tokens.shape[1] == 8
    assert teacher(4).tokens.shape[1] == 4
    assert looked == [8, 4]
