"""The Train task: one stage, from its verified parent to its published output."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from stagetune_api import names
from stagetune_api.artifact import (
    ArtifactContent,
    ArtifactFile,
    ArtifactKind,
    ArtifactManifest,
    digest_of_json,
)
from stagetune_api.progress import ProgressKind
from stagetune_api.report import CheckpointRef, Outcome, StageReport, TrainResult
from stagetune_api.spec import GradientCheckpointing
from stagetune_api.stage import PlannedStage, StageConfig, Task
from stagetune_trainer.checkpoint import (
    Fence,
    newest_good_checkpoint,
    provenance_of,
    prune_checkpoints,
    publish_directory,
    remove_drafts,
)
from stagetune_trainer.data.batches import open_training_rows, open_validation_rows
from stagetune_trainer.decoder import Decoder, checkpoint_activations, freeze_prefix
from stagetune_trainer.loop import StageLoop, StopRequest, train
from stagetune_trainer.loss import AnswerLoss
from stagetune_trainer.methods import Method, make_method
from stagetune_trainer.methods.lora import keep_earlier_adapters_still
from stagetune_trainer.metrics import ProgressLog, peak_memory_bytes
from stagetune_trainer.model import apply_chain, choose_numerics, load_base, load_chain
from stagetune_trainer.training_state import RandomState, TrainingState

_STATE_FORMAT = 1
"""Raised when a checkpoint of before can no longer be gone on from."""


@dataclass(frozen=True, kw_only=True)
class _Identity:
    """What every artifact of this stage says of itself."""

    stage: PlannedStage
    base: str
    data: str
    parent: str
    settings: str

    def content(
        self, kind: ArtifactKind, step: int, files: Sequence[ArtifactFile]
    ) -> ArtifactContent:
        return ArtifactContent(
            kind=kind,
            name=self.stage.name,
            base=self.base,
            data=self.data,
            parent=self.parent,
            layers=self.stage.layers,
            step=step,
            settings=self.settings,
            files=list(files),
        )


def settings_digest(config: StageConfig) -> str:
    """Return the digest of all that decides a stage's numbers.

    Estimates and how often to save are left out: they change no bit of the result.
    """
    stage = config.stage
    if stage is None:
        raise ValueError("only a Train task has settings")
    training = config.training.model_dump(mode="json", exclude={"checkpoint_interval_seconds"})
    return digest_of_json(
        {
            "method": config.method.model_dump(mode="json"),
            "training": training,
            "stage": stage.model_dump(mode="json", exclude={"estimate"}),
            "model": config.model_digest,
            "data": config.data_digest,
            "parent": config.chain[-1].digest if config.chain else config.model_digest,
            "format": _STATE_FORMAT,
        }
    )


def train_stage(
    config: StageConfig, log: ProgressLog, stop: StopRequest, fence: Fence, started: float
) -> StageReport:
    """Train the stage that `config` names and publish its output.

    Goes on from the newest sound checkpoint of the same settings. Raises ArtifactError for a
    damaged parent, DivergedError, InterruptedRunError after saving, FencedError.
    """
    stage, base, data = config.stage, config.model_digest, config.data_digest
    if stage is None or base is None or data is None or config.model_directory is None:
        raise ValueError("a Train task needs a stage, a model and data")
    layout = names.RunLayout(Path(config.run_directory)).stage(stage.directory)
    layout.checkpoints.mkdir(parents=True, exist_ok=True)
    remove_drafts(layout.root)
    remove_drafts(layout.checkpoints)
    numerics = choose_numerics(config.training.precision)
    identity = _Identity(
        stage=stage,
        base=base,
        data=data,
        parent=config.chain[-1].digest if config.chain else base,
        settings=settings_digest(config),
    )
    method = make_method(config.method)

    log.message(f"loading {config.model_directory} and {len(config.chain)} finished stage(s)")
    outputs = load_chain(config.chain, base)
    decoder = load_base(Path(config.model_directory), base, numerics)
    apply_chain(decoder, outputs, method)
    del outputs
    loss = AnswerLoss(decoder)
    torch.manual_seed(config.training.seed * 1000003 + stage.index)
    state = _open_stage(decoder, method, config, stage)
    saved_step = _resume(state, layout, identity, log)
    log.forget_after(state.loop.step)

    earlier_seconds = state.loop.elapsed_seconds

    def save(state: TrainingState, random_state: RandomState) -> None:
        nonlocal saved_step
        if state.loop.step == saved_step:
            return  # already on the disk
        state.loop.elapsed_seconds = earlier_seconds + time.monotonic() - started
        _save_checkpoint(state, random_state, config, layout, identity, fence, log)
        saved_step = state.loop.step

    training_rows = open_training_rows(config, stage)
    validation_rows = open_validation_rows(config)
    loop = StageLoop(
        stage=stage,
        training=config.training,
        numerics=numerics,
        loss=loss,
        micro_batches=training_rows.micro_batches,
        validation_batches=validation_rows.batches,
        save=save,
        stop=stop,
        log=log,
    )
    train(loop, state)

    manifest = _publish_output(decoder, method, state, config, layout, identity, fence)
    log.message(f"published {layout.output} with digest {manifest.digest[:12]}")
    return StageReport(
        task=Task.TRAIN,
        name=stage.name,
        attempt=config.attempt,
        outcome=Outcome.SUCCEEDED,
        seconds=earlier_seconds,
        peak_memory_bytes=peak_memory_bytes(numerics.device),
        device=numerics.device.type,
        output=CheckpointRef(path=str(layout.output), digest=manifest.digest, step=state.loop.step),
        train=_result(state, stage),
    )


def _open_stage(
    decoder: Decoder, method: Method, config: StageConfig, stage: PlannedStage
) -> TrainingState:
    """Open the stage's parameters and cut the prefix off; the optimizer is built last."""
    parameters = method.open(decoder, stage)
    first = stage.layers.first
    decoder.model.train()
    if config.training.gradient_checkpointing is GradientCheckpointing.ALWAYS:
        checkpoint_activations(decoder, first)
    freeze_prefix(decoder, first, embeddings_train=stage.embeddings)
    keep_earlier_adapters_still(decoder)
    return TrainingState(
        parameters=parameters,
        optimizer=make_optimizer(parameters, config.training.weight_decay),
        keeps_best=config.training.early_stopping is not None,
    )


def make_optimizer(
    parameters: dict[str, nn.Parameter], weight_decay: float
) -> torch.optim.Optimizer:
    """Return AdamW over `parameters`; its rate is set before every step."""
    matrices = [parameter for parameter in parameters.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=True)


def _resume(
    state: TrainingState,
    layout: names.StageLayout,
    identity: _Identity,
    log: ProgressLog,
) -> int | None:
    """Go on from the newest sound checkpoint, and return its step; None where there is none."""
    found = newest_good_checkpoint(
        layout.checkpoints,
        settings=identity.settings,
        on_bad=lambda error: log.message(f"not used and moved aside: {error}"),
    )
    if found is None:
        return None
    state.load(found[0])
    log.message(f"going on from step {state.loop.step} ({found[0]})")
    return state.loop.step


def _save_checkpoint(
    state: TrainingState,
    random_state: RandomState,
    config: StageConfig,
    layout: names.StageLayout,
    identity: _Identity,
    fence: Fence,
    log: ProgressLog,
) -> None:
    step = state.loop.step
    final = layout.checkpoints / names.checkpoint_directory_name(step)
    manifest = publish_directory(
        final,
        lambda draft: state.save(draft, random_state),
        content=lambda files: identity.content(ArtifactKind.CHECKPOINT, step, files),
        provenance=provenance_of(config.run_name, config.attempt),
        before_rename=fence.check,
    )
    prune_checkpoints(layout.checkpoints)
    log.write(
        ProgressKind.CHECKPOINT,
        step=step,
        checkpoint=CheckpointRef(path=str(final), digest=manifest.digest, step=step),
    )


def _publish_output(
    decoder: Decoder,
    method: Method,
    state: TrainingState,
    config: StageConfig,
    layout: names.StageLayout,
    identity: _Identity,
    fence: Fence,
) -> ArtifactManifest:
    trained = {name: value.detach().cpu() for name, value in state.parameters.items()}
    tensors = {
        name: tensor.contiguous() for name, tensor in method.output(decoder, trained).items()
    }
    return publish_directory(
        layout.output,
        lambda draft: save_file(tensors, draft / names.WEIGHTS_FILE, metadata={"format": "pt"}),
        content=lambda files: identity.content(ArtifactKind.STAGE_OUTPUT, state.loop.step, files),
        provenance=provenance_of(config.run_name, config.attempt),
        before_rename=fence.check,
    )


def _result(state: TrainingState, stage: PlannedStage) -> TrainResult:
    progress = state.loop
    handed_on = progress.best_validation_loss if state.keeps_best else progress.validation_loss
    if progress.initial_validation_loss is None or handed_on is None:
        raise ValueError("a stage ends with a validation")
    return TrainResult(
        steps=progress.step,
        planned_steps=stage.steps,
        stopped_early=progress.stopped_early,
        best_step=progress.best_step if state.keeps_best else progress.step,
        loss=progress.loss,
        initial_validation_loss=progress.initial_validation_loss,
        validation_loss=handed_on,
        trainable_parameters=sum(value.numel() for value in state.parameters.values()),
        tokens=progress.tokens,
        tokens_per_second=progress.tokens / max(progress.train_seconds, 1e-9),
        train_seconds=progress.train_seconds,
    )
