"""The Train task: one stage, from its verified parent to its published output."""

from collections.abc import Sequence

import torch
from torch import nn

from stagetune_api.progress import ProgressKind
from stagetune_api.report import CheckpointRef, Outcome, StageReport, TrainResult
from stagetune_api.stage import PlannedStage, StageConfig, Task
from stagetune_api.training_spec import GradientCheckpointing, MethodType
from stagetune_trainer.checkpoint import Fence
from stagetune_trainer.data.ahead import BatchesAhead
from stagetune_trainer.data.batch import Batch
from stagetune_trainer.data.batches import open_training_rows, open_validation_rows
from stagetune_trainer.decoder import Decoder, checkpoint_activations, freeze_prefix
from stagetune_trainer.loop import StageLoop, StopRequest, train
from stagetune_trainer.loss import AnswerLoss
from stagetune_trainer.memory import give_back_at_once, peak_memory_bytes, release_memory
from stagetune_trainer.methods import Method, make_method
from stagetune_trainer.metrics import ProgressLog
from stagetune_trainer.model import Numerics, choose_numerics
from stagetune_trainer.optimizers import choose_master_dtype, make_optimizer
from stagetune_trainer.packing_check import check_packing
from stagetune_trainer.protect.meters import Meters
from stagetune_trainer.protect.protection import Protection
from stagetune_trainer.ranks import ALONE, Ranks
from stagetune_trainer.stage_folder import StageFolder
from stagetune_trainer.stage_model import StageModel, StageModelLoader, agree_on_border
from stagetune_trainer.start_clock import StartClock
from stagetune_trainer.training_state import HeldTensors, TrainingState, WholeTensors
from stagetune_trainer.update import Update, make_update

READ_AHEAD_BYTES = 2**28
"""So many bytes of hidden states, about, are read for a step before it begins."""


def train_stage(
    config: StageConfig,
    log: ProgressLog,
    stop: StopRequest,
    fence: Fence,
    clock: StartClock,
    ranks: Ranks = ALONE,
) -> StageReport:
    """Train the stage that `config` names and publish its output.

    Goes on from the newest sound checkpoint of the same settings. Raises ArtifactError for a
    damaged parent, DivergedError, InterruptedRunError after saving, FencedError. Where `ranks` are
    several, all of them call this together; what the first one returns counts.
    """
    stage = config.stage
    if stage is None:
        raise ValueError("a Train task needs a stage")
    folder = StageFolder(config=config, stage=stage, fence=fence, log=log, started=clock.started)
    numerics = choose_numerics(config.training.precision)
    if config.method.type is MethodType.QLORA and numerics.device.type == "cpu":
        # Every product makes its weight anew; a fifth of a stage's memory would be gaps.
        give_back_at_once()
    method = make_method(config.method, choose_master_dtype(config.training, numerics))
    protection = Protection(config, stage, numerics, fence=fence, log=log, stop=stop)
    loader = StageModelLoader(
        config=config,
        stage=stage,
        method=method,
        numerics=numerics,
        protection=protection,
        fence=fence,
        log=log,
        stop=stop,
    )
    with ranks.first_goes_ahead():
        model = loader.load()
    agree_on_border(model, config, ranks)
    decoder = model.decoder
    if config.training.packing:
        check_packing(decoder, model.window, model.lowest_loaded)
    # Both look at how the decoder computes; below the cache it cannot.
    with model.window.probing(model.lowest_loaded):
        loss = AnswerLoss(decoder, model.prefix)
        parameters = _open_stage(model, method, config, stage)
    num_trainable = sum(value.numel() for value in parameters.values())
    held, update = _take_over(parameters, decoder, config, numerics, ranks)
    state = TrainingState(
        held=held,
        names=frozenset(parameters),
        ranks=ranks,
        keeps_best=config.training.early_stopping is not None,
    )
    folder.resume(state)
    micro_batches = protection.micro_batches(open_training_rows(config, stage))
    ahead = BatchesAhead(
        lambda step: _read_ahead(micro_batches(step), model, ranks), steps=stage.steps
    )
    loop = StageLoop(
        stage=stage,
        training=config.training,
        numerics=numerics,
        loss=loss,
        objective=protection.objective(loss),
        update=update,
        micro_batches=ahead.of,
        validation_batches=open_validation_rows(config).batches,
        save=folder.save,
        stop=stop,
        log=log,
        ranks=ranks,
    )
    meters = protection.meters(loss, ranks)
    clock.loaded()
    _measure_base(meters, state, stage, log)
    with ahead:
        train(loop, state)
    # The meters look at more tokens at once than a step, and need nothing of what it took.
    release_memory()
    measured = _measure(meters, state, log)
    output = _publish(folder, method, decoder, state)
    protection.close()
    model.close()
    return StageReport(
        task=Task.TRAIN,
        name=stage.name,
        attempt=config.attempt,
        outcome=Outcome.SUCCEEDED,
        seconds=folder.earlier_seconds,
        peak_memory_bytes=ranks.highest(peak_memory_bytes(numerics.device)),
        device=numerics.device.type,
        output=output,
        train=_result(state, stage, num_trainable).model_copy(update=measured),
    )


def _publish(
    folder: StageFolder, method: Method, decoder: Decoder, state: TrainingState
) -> CheckpointRef | None:
    """Publish what the stage hands on and return where; the first process does, for all."""
    trained = state.held.parameters()
    if not state.ranks.is_first:
        return None
    step = state.loop.step
    manifest = folder.publish_output(method.output(decoder, trained), step)
    return CheckpointRef(path=str(folder.layout.output), digest=manifest.digest, step=step)


def _read_ahead(batches: Sequence[Batch], model: StageModel, ranks: Ranks) -> list[Batch]:
    """Return `batches`, those that this process computes with what their passes begin with.

    Of a step with many micro-batches the first ones: the others' states are read at their turn.
    """
    own = {id(batch) for batch, _ in ranks.deal(batches)}
    left = READ_AHEAD_BYTES
    found = []
    for batch in batches:
        if id(batch) in own and left > 0:
            batch = model.read_ahead(batch)
            left -= batch.states.nbytes if batch.states is not None else 0
        found.append(batch)
    return found


def _measure_base(
    meters: Meters, state: TrainingState, stage: PlannedStage, log: ProgressLog
) -> None:
    """Measure the base model on general text: before its first step, the first stage is that."""
    progress = state.loop
    if stage.index != 0 or progress.step != 0:
        return
    if progress.initial_general_loss is None:
        progress.initial_general_loss = meters.general_loss()
    if progress.initial_general_loss is not None:
        loss = progress.initial_general_loss
        log.write(ProgressKind.METERS, step=0, total_steps=stage.steps, general_loss=loss)


def _measure(meters: Meters, state: TrainingState, log: ProgressLog) -> dict[str, float | None]:
    """Measure what is handed on, log it, and return it by the fields of `TrainResult`."""
    measured = {"general_loss": meters.general_loss(), "kl_to_base": meters.kl_to_base()}
    if any(value is not None for value in measured.values()):
        log.write(ProgressKind.METERS, step=state.loop.step, **measured)
    return {**measured, "initial_general_loss": state.loop.initial_general_loss}


def _open_stage(
    model: StageModel, method: Method, config: StageConfig, stage: PlannedStage
) -> dict[str, nn.Parameter]:
    """Open the stage's parameters, cut the prefix off, and return them by the method's names."""
    decoder, first = model.decoder, model.first
    torch.manual_seed(config.training.seed * 1000003 + stage.index)
    parameters = method.open(decoder, stage)
    decoder.model.train()
    if config.training.gradient_checkpointing is GradientCheckpointing.ALWAYS:
        checkpoint_activations(decoder, first)
    freeze_prefix(decoder, first, embeddings_train=stage.embeddings)
    method.keep_still(decoder)
    return parameters


def _take_over(
    parameters: dict[str, nn.Parameter],
    decoder: Decoder,
    config: StageConfig,
    numerics: Numerics,
    ranks: Ranks,
) -> tuple[HeldTensors, Update]:
    """Build the optimizer, last of all, and return who holds and who updates what trains."""
    training = config.training
    optimizer = make_optimizer(parameters, training)
    if config.engine is None:
        return WholeTensors(parameters, optimizer), make_update(training, parameters, optimizer)
    # Imported here: one process alone does without.
    from stagetune_trainer.engines.deepspeed import share_stage

    shared = share_stage(
        config.engine,
        decoder,
        parameters,
        optimizer,
        numerics,
        ranks,
        max_grad_norm=training.max_grad_norm,
    )
    return shared, shared


def _result(state: TrainingState, stage: PlannedStage, num_trainable: int) -> TrainResult:
    progress = state.loop
    handed_on = progress.best_validation_loss if state.keeps_best else progress.validation_loss
    if progress.initial_validation_loss is None or handed_on is None:
        raise ValueError("a stage ends with a validation")
    return TrainResult(
        steps=progress.step,
        planned_steps=stage.steps,
        stopped_early=progress.stopped_early,
        stopped_by=progress.stopped_by,
        best_step=progress.best_step if state.keeps_best else progress.step,
        loss=progress.loss,
        initial_validation_loss=progress.initial_validation_loss,
        validation_loss=handed_on,
        trainable_parameters=num_trainable,
        tokens=progress.tokens,
        tokens_per_second=progress.tokens / max(progress.train_seconds, 1e-9),
        train_seconds=progress.train_seconds,
        padding_fraction=progress.padding_tokens
        / max(progress.tokens + progress.padding_tokens, 1),
    )
