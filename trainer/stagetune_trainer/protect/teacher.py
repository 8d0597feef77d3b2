"""The teacher: what the base model says at the answers, computed once and kept on the volume.

The first stage computes it with the base model that it has loaded anyway, before anything is put
on it; every later stage reads it. A file that is missing, damaged or of other inputs is computed
anew by whichever stage finds it so, which has the bare base in its hands at that moment too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stagetune_api import names
from stagetune_api.artifact import ArtifactKind
from stagetune_trainer.data.batch import Batch, collate
from stagetune_trainer.data.store import RowReader
from stagetune_trainer.data.template import IGNORED
from stagetune_trainer.loss import AnswerLoss
from stagetune_trainer.model import Numerics
from stagetune_trainer.protect.distillation import TeacherTargets, full_logits, likeliest
from stagetune_trainer.references import Reference, ReferenceFolder
from stagetune_trainer.tensor_file import RowTensors, TensorFileWriter, row_offsets

METER_TOP_K = 256
"""Likeliest tokens that the meter of a stage looks at."""
_POSITIONS_AT_ONCE = 512


class Teacher:
    """The base model's distribution at every answer token of some rows."""

    def __init__(self, path: Path, *, vocabulary: int) -> None:
        self._tensors = RowTensors(path)
        self._vocabulary = vocabulary

    def targets(self, batch: Batch, device: torch.device) -> TeacherTargets:
        """Return what the base says at the answer tokens of `batch`, in their order."""
        tokens = self._tensors.rows("tokens", batch.rows).to(device, torch.int64)
        kept = self._tensors.rows("log_probabilities", batch.rows).to(device).float()
        rest = self._tensors.rows("log_rest", batch.rows).to(device).float()
        has_rest = tokens.shape[1] < self._vocabulary
        everything = torch.cat([kept, rest.unsqueeze(1)], dim=1) if has_rest else kept
        # Rounded to fp16, the probabilities are not quite one in all.
        everything = everything.log_softmax(dim=-1)
        return TeacherTargets(
            tokens=tokens,
            log_probabilities=everything[:, : tokens.shape[1]],
            log_rest=everything[:, -1] if has_rest else None,
        )


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """What a teacher's file holds."""

    name: str
    """Name of the rows: `train` or `validation`."""
    rows: RowReader
    top_k: int
    """Likeliest tokens that are kept; all of them where there are fewer."""
    micro_batch_size: int

    @property
    def reference(self) -> Reference:
        """What the file is called, and what decides its numbers."""
        return Reference(
            name=f"teacher-{self.name}",
            kind=ArtifactKind.TEACHER,
            settings={"rows": self.name, "topK": self.top_k},
        )


def open_teacher(
    folder: ReferenceFolder,
    spec: TeacherSpec,
    loss: Callable[[], AnswerLoss],
    numerics: Numerics,
    *,
    vocabulary: int,
    before_batch: Callable[[], None] = lambda: None,
) -> Teacher:
    """Return the teacher of `spec`'s rows, computed by `loss` on the base where it is not there.

    `before_batch` may raise to give up.
    """

    def write(directory: Path) -> None:
        path = directory / names.TEACHER_FILE
        top_k = min(spec.top_k, vocabulary)
        _compute(path, spec, loss(), numerics, top_k=top_k, before_batch=before_batch)

    directory = folder.obtain(spec.reference, write)
    return Teacher(directory / names.TEACHER_FILE, vocabulary=vocabulary)


@torch.no_grad()
def _compute(
    path: Path,
    spec: TeacherSpec,
    loss: AnswerLoss,
    numerics: Numerics,
    *,
    top_k: int,
    before_batch: Callable[[], None],
) -> None:
    offsets = row_offsets(_answer_counts(spec.rows))
    count = int(offsets[-1])
    writer = TensorFileWriter(
        path,
        {
            "offsets": (torch.int64, (len(offsets),)),
            "tokens": (torch.int32, (count, top_k)),
            "log_probabilities": (torch.float16, (count, top_k)),
            "log_rest": (torch.float16, (count,)),
        },
    )
    writer.write("offsets", 0, offsets)
    for rows in batches_of(spec.rows, range(len(spec.rows)), spec.micro_batch_size):
        before_batch()
        batch = collate([spec.rows[row] for row in rows], rows=rows)
        with numerics.autocast():
            features, _ = loss.features_of(batch)
            parts = [
                likeliest(full_logits(loss.head, part), top_k)
                for part in torch.split(features, _POSITIONS_AT_ONCE)
            ]
        tokens, kept, rest = (torch.cat(column) for column in zip(*parts, strict=True))
        start = 0
        for row in rows:
            begin, end = int(offsets[row]), int(offsets[row + 1])
            place = slice(start, start + end - begin)
            writer.write("tokens", begin, tokens[place])
            writer.write("log_probabilities", begin, kept[place])
            writer.write("log_rest", begin, _finite_fp16(rest[place]))
            start = place.stop
    writer.close()


def batches_of(rows: RowReader, indices: range | list[int], size: int) -> list[tuple[int, ...]]:
    """Return `indices` in groups of `size` rows of like length, the longest first."""
    ordered = sorted(indices, key=lambda index: -int(rows.lengths[index]))
    return [tuple(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def _finite_fp16(values: Tensor) -> Tensor:
    """Return log-probabilities that fp16 can hold; below e to the -60000 nothing is left anyway."""
    return values.clamp_min(-60000.0)


def _answer_counts(rows: RowReader) -> Tensor:
    """Return the number of answer tokens of each row; the first token is predicted by nothing."""
    counts = [int((np.asarray(row.labels)[1:] != IGNORED).sum()) for row in rows]
    return torch.tensor(counts, dtype=torch.int64)
