"""Which rows a step sees: every row once a pass, and the same ones after a resume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stagetune_api.stage import PlannedStage, RowRange, StageEstimate
from stagetune_api.training_spec import LayerRange
from stagetune_trainer.data.batch import collate
from stagetune_trainer.data.batches import FixedRows, TrainingRows
from stagetune_trainer.data.order import permutation
from stagetune_trainer.data.store import RowReader, RowWriter, Split, StoredRow


def _row(number: int) -> StoredRow:
    """A row of its own length whose second half is learned."""
    ids = [number] * (2 + number % 7)
    labels = [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]
    return StoredRow(input_ids=ids, labels=labels, file="rows.jsonl", row=number + 1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> RowReader:
    """600 rows: more than two of the batches they are stored in."""
    path = tmp_path_factory.mktemp("rows") / "rows.arrow"
    with RowWriter(path, with_questions=False) as writer:
        for number in range(600):
            writer.write(_row(number))
    return RowReader(path)


def _stage(start: int, end: int, index: int = 0) -> PlannedStage:
    return PlannedStage(
        index=index,
        name="layers-0-3",
        layers=LayerRange(first=0, last=3),
        embeddings=False,
        head=False,
        learning_rate=1e-4,
        epochs=2,
        rows=RowRange(start=start, end=end),
        steps=10,
        warmup_steps=0,
        validation_interval=5,
        estimate=StageEstimate(
            trainable_parameters=0,
            weights_bytes=0,
            training_state_bytes=0,
            activation_bytes=0,
            memory_bytes=0,
            disk_bytes=0,
            step_flops=0,
            relative_step_flops=0,
        ),
    )


def _training_rows(
    rows: RowReader, stage: PlannedStage, *, seed: int = 7, batch_size: int = 8, **options: Any
) -> TrainingRows:
    sizes = {"batch_size": batch_size, "micro_batch_size": 3}
    return TrainingRows(rows, stage=stage, seed=seed, **sizes, **options)


def test_stored_rows_come_back_by_index(rows: RowReader) -> None:
    assert len(rows) == 600
    for number in (0, 255, 256, 511, 512, 599):
        row, expected = rows[number], _row(number)
        assert row.input_ids.tolist() == expected.input_ids
        assert row.labels.tolist() == expected.labels
        assert (row.file, row.row) == (expected.file, expected.row)
    assert rows.lengths.tolist() == [len(_row(number).input_ids) for number in range(600)]
    assert [row.row for row in rows] == list(range(1, 601))
    with pytest.raises(IndexError):
        rows[600]


def test_every_row_is_seen_once_in_an_epoch_and_none_is_dropped(rows: RowReader) -> None:
    training = _training_rows(rows, _stage(0, 20))
    assert training.steps_per_epoch == 3
    sizes = [len(training.batch_indices(step)) for step in range(6)]
    assert sizes == [8, 8, 4, 8, 8, 4]
    for epoch in range(2):
        steps = range(3 * epoch, 3 * epoch + 3)
        seen = Counter(index for step in steps for index in training.batch_indices(step))
        assert len(seen) == 20
        assert set(seen.values()) == {1}


def test_epochs_and_stages_have_orders_of_their_own(rows: RowReader) -> None:
    stage = _training_rows(rows, _stage(0, 100), batch_size=100)
    other_stage = _training_rows(rows, _stage(0, 100, index=1), batch_size=100)
    other_seed = _training_rows(rows, _stage(0, 100), seed=8, batch_size=100)
    first = stage.batch_indices(0)
    assert sorted(first) == sorted(stage.batch_indices(1)) == sorted(other_stage.batch_indices(0))
    orders = [first, stage.batch_indices(1), other_stage.batch_indices(0)]
    assert len({tuple(order) for order in orders}) == 3
    assert sorted(first) != sorted(other_seed.batch_indices(0))


def test_any_step_can_be_computed_without_the_ones_before(rows: RowReader) -> None:
    replayed = _training_rows(rows, _stage(10, 60))
    expected = [replayed.batch_indices(step) for step in range(30)]
    for step in (29, 0, 13, 7, 6, 29):
        assert _training_rows(rows, _stage(10, 60)).batch_indices(step) == expected[step]
        assert replayed.batch_indices(step) == expected[step]


def test_ranges_of_disjoint_stages_share_no_row_and_miss_none(rows: RowReader) -> None:
    parts = [
        set(_training_rows(rows, _stage(start, start + 200), batch_size=200).batch_indices(0))
        for start in (0, 200, 400)
    ]
    assert set.union(*parts) == set(range(600))
    assert sum(map(len, parts)) == 600


def test_range_beyond_the_rows_is_refused(rows: RowReader) -> None:
    with pytest.raises(ValueError, match="wants rows up to 601, there are 600"):
        _training_rows(rows, _stage(0, 601))


def test_micro_batches_hold_the_steps_rows(rows: RowReader) -> None:
    training = _training_rows(rows, _stage(0, 20))
    batches = training.micro_batches(0)
    assert [batch.input_ids.shape[0] for batch in batches] == [3, 3, 2]
    seen = sorted(int(ids[0]) for batch in batches for ids in batch.input_ids)
    assert seen == sorted(training.batch_indices(0))


def test_rows_of_like_length_are_batched_together(rows: RowReader) -> None:
    batches = _training_rows(rows, _stage(0, 600), batch_size=60).micro_batches(0)
    widths = [batch.input_ids.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    padded = sum(batch.input_ids.numel() for batch in batches)
    tokens = sum(batch.num_tokens for batch in batches)
    assert padded < 1.1 * tokens


def test_batches_by_length_hold_every_row_once_in_an_epoch(rows: RowReader) -> None:
    grouped = _training_rows(rows, _stage(0, 203), group_by_length=True)
    plain = _training_rows(rows, _stage(0, 203))
    assert grouped.steps_per_epoch == plain.steps_per_epoch == 26
    for epoch in range(2):
        steps = range(26 * epoch, 26 * epoch + 26)
        batches = [grouped.batch_indices(step) for step in steps]
        assert sorted(map(len, batches)) == [3] + [8] * 25
        seen = sorted(index for batch in batches for index in batch)
        assert seen == sorted(plain.all_indices())


def test_batches_by_length_have_little_padding_and_no_order_of_lengths(rows: RowReader) -> None:
    grouped = _training_rows(rows, _stage(0, 600), group_by_length=True)
    plain = _training_rows(rows, _stage(0, 600))
    spreads = []
    for training in (plain, grouped):
        lengths = [rows.lengths[training.batch_indices(step)] for step in range(75)]
        spreads.append(np.mean([batch.max() - batch.min() for batch in lengths]))
    assert spreads[1] < spreads[0] / 4
    padding = [
        sum(
            batch.num_padding_tokens for step in range(75) for batch in training.micro_batches(step)
        )
        for training in (plain, grouped)
    ]
    assert padding[1] < padding[0] / 2
    means = [rows.lengths[grouped.batch_indices(step)].mean() for step in range(75)]
    assert abs(np.corrcoef(means, range(75))[0, 1]) < 0.3


def test_batches_by_length_follow_from_seed_stage_and_step_alone(rows: RowReader) -> None:
    def batches(**options: Any) -> list[list[int]]:
        stage = _stage(0, 100, index=options.pop("index", 0))
        training = _training_rows(rows, stage, group_by_length=True, **options)
        return [training.batch_indices(step) for step in (25, 3, 14, 13)]

    assert batches() == batches()
    assert batches() != batches(seed=8)
    assert batches() != batches(index=1)
    again = _training_rows(rows, _stage(0, 100), group_by_length=True)
    assert again.batch_indices(3) == batches()[1]
    assert sorted(again.batch_indices(0)) != sorted(again.batch_indices(13))


def test_small_data_is_still_shuffled_between_batches_by_length(rows: RowReader) -> None:
    # With one window an epoch every epoch would have the same batches.
    training = _training_rows(rows, _stage(0, 64), group_by_length=True)
    epochs = [
        {frozenset(training.batch_indices(step)) for step in range(8 * epoch, 8 * epoch + 8)}
        for epoch in range(2)
    ]
    assert not epochs[0] & epochs[1]


def test_collated_rows_are_padded_on_the_right() -> None:
    batch = collate([_row(3), _row(1)])
    assert batch.input_ids.tolist() == [[3, 3, 3, 3, 3], [1, 1, 1, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 3, 3, 3], [-100, 1, 1, -100, -100]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.num_tokens == 8
    assert batch.num_padding_tokens == 2
    assert batch.num_answer_tokens == 5


def test_label_of_the_first_token_is_not_counted() -> None:
    row = StoredRow(input_ids=[5, 6, 7], labels=[5, 6, 7], file="", row=1)
    assert collate([row]).num_answer_tokens == 2


def test_fixed_rows_are_all_seen_once_each_time(rows: RowReader) -> None:
    fixed = FixedRows(rows, micro_batch_size=64, split=Split.VALIDATION)
    for _ in range(2):
        batches = list(fixed.batches())
        assert sum(batch.num_tokens for batch in batches) == rows.lengths.sum()
        assert sum(batch.input_ids.shape[0] for batch in batches) == 600


def test_permutations_stay_what_they_were() -> None:
    # A resumed run of an older version must see the same rows.
    assert permutation(8, 42, 2).tolist() == [3, 2, 1, 5, 7, 4, 0, 6]
    assert sorted(permutation(1000, 1)) == list(range(1000))


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / "a.arrow", tmp_path / "b.arrow"]
    for path in paths:
        with RowWriter(path, with_questions=False) as writer:
            for number in range(300):
                row = _row(number)
                as_arrays = StoredRow(
                    input_ids=np.asarray(row.input_ids, np.int32),
                    labels=np.asarray(row.labels, np.int32),
                    file=row.file,
                    row=row.row,
                )
                writer.write(row if path is paths[0] else as_arrays)
    assert paths[0].read_bytes() == paths[1].read_bytes()
