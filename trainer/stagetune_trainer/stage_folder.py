"""A stage's folder on the volume: its checkpoints and its output, all of one identity.

`train` computes, this keeps: every artifact of a stage says which base, data, parent and settings
it was made with, and one of another identity is never gone on from.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from stagetune_api import names
from stagetune_api.artifact import (
    ArtifactContent,
    ArtifactFile,
    ArtifactKind,
    ArtifactManifest,
    digest_of_json,
)
from stagetune_api.progress import ProgressKind
from stagetune_api.report import CheckpointRef
from stagetune_api.stage import PlannedStage, StageConfig
from stagetune_trainer.checkpoint import (
    Fence,
    newest_good_checkpoint,
    provenance_of,
    prune_checkpoints,
    publish_directory,
    remove_drafts,
)
from stagetune_trainer.metrics import ProgressLog
from stagetune_trainer.training_state import RandomState, Snapshot, TrainingState

_STATE_FORMAT = 1
"""Raised when a checkpoint of before can no longer be gone on from."""


def settings_digest(config: StageConfig) -> str:
    """Return the digest of all that decides a stage's numbers.

    Estimates, how often to save and the prefix cache are left out: they change no bit of the
    result. So are the size of a micro-batch and packing: every split of a batch gives the same
    gradient within rounding, and a stage that ran out of memory goes on from its checkpoint with a
    smaller one.
    """
    stage = config.stage
    if stage is None:
        raise ValueError("only a Train task has settings")
    left_out = {"checkpoint_interval_seconds", "micro_batch_size", "packing", "prefix_cache"}
    if not config.training.group_by_length:
        # Checkpoints of versions that did not know it say nothing of it.
        left_out.add("group_by_length")
    training = config.training.model_dump(mode="json", exclude=left_out)
    return digest_of_json(
        {
            "method": config.method.model_dump(mode="json"),
            "training": training,
            # What else protects does so at export.
            "protection": config.protection.model_dump(
                mode="json", include={"distillation", "anchor", "replay"}
            ),
            "stage": stage.model_dump(
                mode="json", exclude={"estimate", "micro_batch_size", "prefix_cache"}
            ),
            "model": config.model_digest,
            "data": config.data_digest,
            "parent": config.chain[-1].digest if config.chain else config.model_digest,
            "format": _STATE_FORMAT,
        }
    )


@dataclass(kw_only=True)
class StageFolder:
    """Where one attempt at a stage resumes from, saves to and publishes its output."""

    config: StageConfig
    stage: PlannedStage
    fence: Fence
    log: ProgressLog
    started: float
    """Monotonic time at which the process began."""
    layout: names.StageLayout = field(init=False)
    earlier_seconds: float = field(init=False, default=0.0)
    """Seconds of the attempts before this one, as far as a checkpoint knows them."""
    _settings: str = field(init=False)
    _saved_step: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        run = names.RunLayout(Path(self.config.run_directory))
        self.layout = run.stage(self.stage.directory)
        self._settings = settings_digest(self.config)
        if not self.fence.writes:
            return
        self.layout.checkpoints.mkdir(parents=True, exist_ok=True)
        # Otherwise the drafts of a newer attempt would be removed.
        self.fence.check()
        remove_drafts(self.layout.root)
        remove_drafts(self.layout.checkpoints)

    def resume(self, state: TrainingState) -> None:
        """Go on from the newest sound checkpoint of the same settings, if there is one."""
        path, digest = self._newest_checkpoint()
        path, digest = map(state.ranks.text_of_first, (path, digest))
        if path:
            state.load(Path(path))
            self._saved_step = state.loop.step
            self.earlier_seconds = state.loop.elapsed_seconds
            step = state.loop.step
            self.log.message(
                f"going on from step {step} ({path})",
                step=step,
                total_steps=self.stage.steps,
                tokens=state.loop.tokens,
                validation_loss=state.loop.validation_loss,
                checkpoint=CheckpointRef(path=path, digest=digest, step=step),
            )
        self.log.forget_after(state.loop.step, state.loop.validated_step)

    def _newest_checkpoint(self) -> tuple[str, str]:
        """Return path and digest of the newest sound one; empty where there is none, or to readers.

        The process that writes tells the others which one it is.
        """
        if not self.fence.writes:
            return "", ""
        found = newest_good_checkpoint(
            self.layout.checkpoints,
            settings=self._settings,
            on_bad=lambda error: self.log.message(f"not used and moved aside: {error}"),
        )
        return ("", "") if found is None else (str(found[0]), found[1].digest)

    def save(self, state: TrainingState, random_state: RandomState) -> None:
        """Publish a checkpoint, unless this step's is on the disk already."""
        step = state.loop.step
        if step == self._saved_step:
            return
        state.loop.elapsed_seconds = self.earlier_seconds + time.monotonic() - self.started
        snapshot = state.snapshot()
        if self.fence.writes:
            self._publish_checkpoint(snapshot, step, random_state)
        self._saved_step = step
        # Nobody leaves before it is there: a launcher ends the others soon after the first.
        state.ranks.wait()

    def _publish_checkpoint(self, snapshot: Snapshot, step: int, random_state: RandomState) -> None:
        final = self.layout.checkpoints / names.checkpoint_directory_name(step)
        manifest = publish_directory(
            final,
            lambda draft: snapshot.write(draft, random_state),
            content=lambda files: self._content(ArtifactKind.CHECKPOINT, step, files),
            provenance=provenance_of(self.config.run_name, self.config.attempt),
            before_rename=self.fence.check,
        )
        prune_checkpoints(self.layout.checkpoints)
        self.log.write(
            ProgressKind.CHECKPOINT,
            step=step,
            checkpoint=CheckpointRef(path=str(final), digest=manifest.digest, step=step),
        )

    def publish_output(self, tensors: Mapping[str, Tensor], step: int) -> ArtifactManifest:
        """Publish what the stage hands on."""
        weights = {name: tensor.contiguous() for name, tensor in tensors.items()}
        manifest = publish_directory(
            self.layout.output,
            lambda draft: save_file(weights, draft / names.WEIGHTS_FILE, metadata={"format": "pt"}),
            content=lambda files: self._content(ArtifactKind.STAGE_OUTPUT, step, files),
            provenance=provenance_of(self.config.run_name, self.config.attempt),
            before_rename=self.fence.check,
        )
        self.log.message(f"published {self.layout.output} with digest {manifest.digest[:12]}")
        return manifest

    def _content(
        self, kind: ArtifactKind, step: int, files: Sequence[ArtifactFile]
    ) -> ArtifactContent:
        chain = self.config.chain
        return ArtifactContent(
            kind=kind,
            name=self.stage.name,
            base=self.config.model_digest,
            data=self.config.data_digest,
            parent=chain[-1].digest if chain else self.config.model_digest,
            layers=self.stage.layers,
            step=step,
            settings=self._settings,
            files=list(files),
        )
