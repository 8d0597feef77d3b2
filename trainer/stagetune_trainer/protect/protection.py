"""What protects a stage from forgetting, put together for the Train task.

Three moments: the bare base is in memory (`look_at_base`: what it says and holds is put onto the
volume, unless it is there), the stage is open (`objective`, `rows`, `meters`), and the stage is
published (`close`).
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from stagetune_api import names
from stagetune_api.stage import PlannedStage, StageConfig
from stagetune_api.training_spec import MethodType
from stagetune_trainer.checkpoint import Fence, remove_drafts
from stagetune_trainer.data.batch import Batch
from stagetune_trainer.data.batches import TrainingRows, open_split, open_training_rows
from stagetune_trainer.data.store import Split
from stagetune_trainer.decoder import Decoder
from stagetune_trainer.errors import InterruptedRunError
from stagetune_trainer.loop import StopRequest
from stagetune_trainer.loss import AnswerLoss
from stagetune_trainer.metrics import ProgressLog
from stagetune_trainer.model import Numerics
from stagetune_trainer.protect.anchor import Anchor, anchor_reference, store_hidden_states
from stagetune_trainer.protect.meters import Meters, open_meters
from stagetune_trainer.protect.objective import Objective
from stagetune_trainer.protect.replay import RowsWithReplay, open_replay_rows
from stagetune_trainer.protect.teacher import METER_TOP_K, Teacher, TeacherSpec, open_teacher
from stagetune_trainer.ranks import Ranks
from stagetune_trainer.references import ReferenceFolder


class Protection:
    """The protection of one stage."""

    def __init__(
        self,
        config: StageConfig,
        stage: PlannedStage,
        numerics: Numerics,
        *,
        fence: Fence,
        log: ProgressLog,
        stop: StopRequest,
    ) -> None:
        self._config = config
        self._stage = stage
        self._numerics = numerics
        self._fence = fence
        self._log = log
        self._stop = stop
        layout = names.RunLayout(Path(config.run_directory))
        self._cache = layout.cache
        self._stage_root = layout.stage(stage.directory).root
        spec = config.protection
        self._distillation = spec.distillation if _counts(spec.distillation) else None
        self._anchor = spec.anchor if _counts(spec.anchor) else None
        self._replay = spec.replay
        self._meter_teacher: Teacher | None = None
        self._teacher: Teacher | None = None
        self._hidden_states: Path | None = None
        self._opened_anchor: Anchor | None = None

    def is_complete(self) -> bool:
        """Whether the volume holds all that `look_at_base` would have to ask the base model for."""
        shared = [self._teacher_spec(Split.VALIDATION, METER_TOP_K).reference]
        if self._distillation is not None:
            shared.append(self._teacher_spec(Split.TRAIN, self._distillation.top_k).reference)
        own = []
        if self._anchor is not None:
            indices = open_training_rows(self._config, self._stage).all_indices()
            own.append(anchor_reference(self._stage.layers.last, indices))
        run, stage = self._folder(self._cache), self._folder(self._stage_root)
        return all(map(run.has, shared)) and all(map(stage.has, own))

    def look_at_base(self, decoder: Decoder) -> None:
        """Make sure that the volume holds what `decoder`, the bare base model, has to say.

        That is done once: what is loaded later may be a part of the model. Raises FencedError,
        InterruptedRunError when asked to stop, OSError as the file system does.
        """
        if self._meter_teacher is not None:
            return
        if self._fence.writes:
            self._cache.mkdir(parents=True, exist_ok=True)
            self._fence.check()
            remove_drafts(self._cache)
        self._meter_teacher = self._open_teacher(decoder, Split.VALIDATION, METER_TOP_K)
        if self._distillation is not None:
            top_k = self._distillation.top_k
            self._teacher = self._open_teacher(
                decoder, Split.TRAIN, top_k, before_batch=self._leave_if_asked
            )
        if self._anchor is not None:
            rows = open_split(self._config, Split.TRAIN)
            training = open_training_rows(self._config, self._stage)
            self._hidden_states = store_hidden_states(
                self._folder(self._stage_root),
                decoder,
                self._numerics,
                rows,
                layer=self._stage.layers.last,
                indices=training.all_indices(),
                micro_batch_size=self._micro_batch_size,
                before_batch=self._leave_if_asked,
            )

    def objective(self, loss: AnswerLoss) -> Objective:
        """Return what the open stage minimises; after `look_at_base`."""
        anchor = None
        if self._hidden_states is not None:
            if self._config.method.type is MethodType.EXPAND:
                raise ValueError("an expanded model has no layer to be anchored")
            layer = loss.decoder.layers[self._stage.layers.last]
            anchor = self._opened_anchor = Anchor(self._hidden_states, layer)
        return Objective(
            loss,
            teacher=self._teacher,
            distillation_weight=self._distillation.weight if self._distillation else 0.0,
            anchor=anchor,
            anchor_weight=self._anchor.weight if self._anchor else 0.0,
            replay_weight=self._replay.ratio if self._replay else 0.0,
        )

    def micro_batches(self, rows: TrainingRows) -> Callable[[int], list[Batch]]:
        """Return the micro-batches of a step, those of replayed text among them."""
        if self._replay is None:
            return rows.micro_batches
        replay = open_replay_rows(self._config, self._stage, self._replay)
        return RowsWithReplay(rows, replay).micro_batches

    def meters(self, loss: AnswerLoss, ranks: Ranks) -> Meters:
        """Return what is measured beside the validation loss; after `look_at_base`."""
        if self._meter_teacher is None:
            raise ValueError("the base model was not looked at")
        return open_meters(
            self._config,
            loss,
            self._numerics,
            self._meter_teacher,
            lambda: ranks.any(self._stop.requested),
            ranks,
        )

    def close(self) -> None:
        """Remove what only this stage needed; after its output is published.

        What cannot be removed is told and left: the output is there all the same.
        """
        if self._opened_anchor is not None:
            # A network file system keeps a file that is open, and the folder with it.
            self._opened_anchor.close()
        anchor = names.StageLayout(self._stage_root).anchor
        if self._fence.writes and anchor.exists():
            self._fence.check()
            try:
                shutil.rmtree(anchor)
            except OSError as error:
                self._log.message(f"{anchor} could not be removed: {error}")

    @property
    def _micro_batch_size(self) -> int:
        # Not the stage's: after a lack of memory the file has a smaller one.
        return self._config.training.micro_batch_size

    def _open_teacher(
        self,
        decoder: Decoder,
        split: Split,
        top_k: int,
        before_batch: Callable[[], None] = lambda: None,
    ) -> Teacher:
        return open_teacher(
            self._folder(self._cache),
            self._teacher_spec(split, top_k),
            lambda: AnswerLoss(decoder),
            self._numerics,
            vocabulary=decoder.head_weight.shape[0],
            before_batch=before_batch,
        )

    def _teacher_spec(self, split: Split, top_k: int) -> TeacherSpec:
        return TeacherSpec(
            name=split.value,
            rows=open_split(self._config, split),
            top_k=top_k,
            micro_batch_size=self._micro_batch_size,
        )

    def _folder(self, directory: Path) -> ReferenceFolder:
        return ReferenceFolder(directory, self._config, self._numerics, self._fence, self._log)

    def _leave_if_asked(self) -> None:
        if self._stop.requested:
            raise InterruptedRunError("no step was taken: the base model was being looked at")


def _counts(spec: object) -> bool:
    """Whether a part of the protection is there and has a weight."""
    return getattr(spec, "weight", 0.0) > 0
