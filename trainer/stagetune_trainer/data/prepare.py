"""The Prepare task: a base model and tokenised rows on the volume, and the facts for the plan.

It needs no GPU. Everything is published under its digest, so a repeated attempt with the same
inputs gives the same digests, and skips what is there already.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from stagetune_api import names
from stagetune_api.artifact import (
    ArtifactContent,
    ArtifactError,
    ArtifactKind,
    ArtifactManifest,
    digest_of_file,
    digest_of_json,
    verify_artifact,
)
from stagetune_api.facts import DataFacts, Facts
from stagetune_api.files import write_file_atomically
from stagetune_api.report import CheckpointRef, Outcome, StageReport
from stagetune_api.stage import StageConfig, Task
from stagetune_trainer.base_model import BaseModel, load_tokenizer, prepare_base_model
from stagetune_trainer.checkpoint import (
    Fence,
    provenance_of,
    publish_directory,
    remove_drafts,
)
from stagetune_trainer.data.general import list_text_files
from stagetune_trainer.data.replay_text import find_replay_text
from stagetune_trainer.data.report import DataReport, SplitReport
from stagetune_trainer.data.rows import TRAINING_WORDS, VALIDATION_WORDS, list_row_files
from stagetune_trainer.data.store import DATA_DIRECTORY, Split
from stagetune_trainer.data.template import ChatTemplate
from stagetune_trainer.data.tokenise import DataFiles, DataInputs, DataWriter
from stagetune_trainer.errors import UserError
from stagetune_trainer.measure import measure_model
from stagetune_trainer.memory import peak_memory_bytes, resident_bytes
from stagetune_trainer.methods import check_model, check_packages
from stagetune_trainer.metrics import ProgressLog
from stagetune_trainer.sources import Source, SourceKind, resolve_source

DOWNLOADS_DIRECTORY = "downloads"
"""Cache of hub downloads below the models directory."""
_MODEL_SECRET, _DATASET_SECRET = "model", "dataset"
"""Folders of the mounted Secrets with tokens."""
_TOKENISER_VERSION = 1
"""Raised when equal inputs would give other tokens, so that an old result is not used again."""


def prepare_task(config: StageConfig, log: ProgressLog, fence: Fence) -> StageReport:
    """Prepare the run's model and data and report the facts.

    Raises UserError with the manifest's paths, FencedError, OSError as the file system does.
    """
    layout = names.RunLayout(Path(config.run_directory))
    # Otherwise the drafts of a newer attempt would be removed.
    fence.check()
    remove_drafts(layout.prepare)
    facts = prepare(config, say=log.message, before_publish=fence.check)
    data_directory = layout.data
    digest = facts.data.digest
    return StageReport(
        task=Task.PREPARE,
        name="prepare",
        attempt=config.attempt,
        outcome=Outcome.SUCCEEDED,
        peak_memory_bytes=peak_memory_bytes(torch.device("cpu")),
        device="cuda" if torch.cuda.is_available() else "cpu",
        facts=facts,
        output=CheckpointRef(path=str(data_directory), digest=digest, step=0) if digest else None,
    )


def prepare(
    config: StageConfig,
    *,
    say: Callable[[str], None] = lambda text: None,
    before_publish: Callable[[], None] = lambda: None,
) -> Facts:
    """Publish the base model and the tokenised rows, write both reports, and return the facts.

    `say` is told what is going on; `before_publish` may raise to forbid the run's outputs. Raises
    UserError with the manifest's paths; the data report is written then too.
    """
    check_packages(config.method)
    # Before anything is read: stages load the same code, and it stays.
    process_bytes = resident_bytes()
    say(f"fetching {config.model.source}")
    base = _prepare_model(config)
    check_model(config.method, base.directory)
    say(f"{'found' if base.was_reused else 'wrote'} the base model in {base.directory}")
    tokenizer = load_tokenizer(base.directory)
    say(f"fetching {config.dataset.source}")
    writer = DataWriter(
        inputs=_fetch_inputs(config, base),
        spec=config.dataset,
        seed=config.training.seed,
        tokenizer=tokenizer,
        template=ChatTemplate(tokenizer),
    )
    settings = _settings_digest(config, writer, base)
    directory = names.RunLayout(Path(config.run_directory)).prepare
    found = _find_prepared(directory, base, settings)
    if found is not None:
        say(f"found the tokenised rows in {directory}")
        return _with_profile(config, found, say)
    manifest = _publish_data(config, writer, base, settings, before_publish)
    for warning in writer.warnings:
        say(f"warning: {warning}")
    facts = Facts(
        model=measure_model(base.directory),
        data=_data_facts(writer.report(), manifest.digest),
        model_directory=str(base.directory),
        process_bytes=process_bytes,
    )
    write_file_atomically(directory / names.FACTS_FILE, facts.model_dump_json(indent=2))
    say(f"tokenised {facts.data.train_rows} + {facts.data.validation_rows} rows in {directory}")
    return _with_profile(config, facts, say)


def _with_profile(config: StageConfig, facts: Facts, say: Callable[[str], None]) -> Facts:
    """Return `facts` with the profile of gradients that the schedule asks for, if it does."""
    if config.gradient_norm is None:
        return facts.model_copy(update={"gradients": None})
    # Imported here: it brings the whole trainer with it.
    from stagetune_trainer.gradient_profile import with_gradient_profile

    facts = with_gradient_profile(config, facts, say)
    directory = names.RunLayout(Path(config.run_directory)).prepare
    write_file_atomically(directory / names.FACTS_FILE, facts.model_dump_json(indent=2))
    return facts


def _prepare_model(config: StageConfig) -> BaseModel:
    models_directory = Path(config.models_directory)
    source = Source(
        uri=config.model.source,
        path="spec.model.source",
        kind=SourceKind.MODEL,
        revision=config.model.revision,
        secret=_MODEL_SECRET,
    )
    return prepare_base_model(
        config.model,
        _resolve(config, source),
        models_directory,
        provenance_of(config.run_name, config.attempt),
    )


def _resolve(config: StageConfig, source: Source) -> Path:
    return resolve_source(
        source,
        manifest_directory=Path(config.manifest_directory),
        cache_directory=Path(config.models_directory) / DOWNLOADS_DIRECTORY,
        claims_directory=Path(config.claims_directory) if config.claims_directory else None,
    )


def _fetch_inputs(config: StageConfig, base: BaseModel) -> DataInputs:
    """Bring all data to this machine; raises UserError for what cannot be had."""
    spec = config.dataset
    dataset = Source(
        uri=spec.source,
        path="spec.dataset.source",
        kind=SourceKind.ROWS,
        revision=spec.revision,
        secret=_DATASET_SECRET,
    )
    validation = None
    if spec.validation.source is not None:
        source = Source(
            uri=spec.validation.source,
            path="spec.dataset.validation.source",
            kind=SourceKind.ROWS,
            secret=_DATASET_SECRET
            if _is_on_same_hub(spec.source, spec.validation.source)
            else None,
        )
        validation = _row_files(config, source, VALIDATION_WORDS)
    general = None
    text = config.evaluation.general_text
    if text is not None:
        source = Source(
            uri=text.source, path="spec.evaluation.generalText.source", kind=SourceKind.TEXT
        )
        root = _resolve(config, source)
        general = DataFiles(source=source, root=root, files=list_text_files(source, root))
    return DataInputs(
        dataset=_row_files(config, dataset, TRAINING_WORDS),
        validation=validation,
        general=general,
        general_max_tokens=text.max_tokens if text is not None else 0,
        replay=find_replay_text(
            config,
            base.directory,
            base.manifest.digest,
            resolve=partial(_resolve, config),
            kept_apart=general.files if general is not None else [],
        ),
    )


def _is_on_same_hub(first: str, second: str) -> bool:
    """Whether a token for one source may be shown where the other lies."""
    return first.partition("://")[0] == second.partition("://")[0]


def _row_files(config: StageConfig, source: Source, words: frozenset[str]) -> DataFiles:
    root = _resolve(config, source)
    return DataFiles(source=source, root=root, files=list_row_files(source, root, words))


def _settings_digest(config: StageConfig, writer: DataWriter, base: BaseModel) -> str:
    """Return the digest of all that decides the tokens; where the files lie is no part of it."""
    inputs = writer.inputs
    spec = config.dataset.model_dump(mode="json", exclude={"source", "revision", "secret_name"})
    spec["validation"].pop("source", None)
    files = {
        name: [
            [file_name, digest_of_file(path)]
            for file_name, path in zip(data.names, data.files, strict=True)
        ]
        for name, data in (
            ("dataset", inputs.dataset),
            ("validation", inputs.validation),
            ("general", inputs.general),
        )
        if data is not None
    }
    return digest_of_json(
        {
            **(inputs.replay.settings if inputs.replay is not None else {}),
            "version": _TOKENISER_VERSION,
            "dataset": spec,
            "seed": config.training.seed,
            "generalMaxTokens": inputs.general_max_tokens,
            "files": files,
            "base": base.manifest.digest,
        }
    )


def _find_prepared(directory: Path, base: BaseModel, settings: str) -> Facts | None:
    """Return the facts of an earlier attempt, if all that it left is sound and of these inputs."""
    try:
        manifest = verify_artifact(directory / DATA_DIRECTORY, kind=ArtifactKind.DATASET)
        facts = Facts.model_validate_json((directory / names.FACTS_FILE).read_bytes())
        DataReport.model_validate_json((directory / names.DATA_REPORT_FILE).read_bytes())
    except (ArtifactError, ValueError, FileNotFoundError):
        return None
    if (
        manifest.content.settings != settings
        or facts.data.digest != manifest.digest
        or facts.model.digest != base.manifest.digest
    ):
        return None
    return facts.model_copy(update={"model_directory": str(base.directory)})


def _publish_data(
    config: StageConfig,
    writer: DataWriter,
    base: BaseModel,
    settings: str,
    before_publish: Callable[[], None],
) -> ArtifactManifest:
    """Publish the tokenised rows and write the data report, which a failure needs even more."""
    directory = names.RunLayout(Path(config.run_directory)).prepare
    directory.mkdir(parents=True, exist_ok=True)
    try:
        manifest = publish_directory(
            directory / DATA_DIRECTORY,
            writer.write,
            content=lambda files: ArtifactContent(
                kind=ArtifactKind.DATASET,
                base=base.manifest.digest,
                settings=settings,
                files=files,
            ),
            provenance=provenance_of(config.run_name, config.attempt),
            before_rename=before_publish,
        )
    except UserError:
        _write_report(directory, writer)
        raise
    _write_report(directory, writer)
    return manifest


def _write_report(directory: Path, writer: DataWriter) -> None:
    text = writer.report().model_dump_json(indent=2, exclude_none=True)
    write_file_atomically(directory / names.DATA_REPORT_FILE, text)


def _data_facts(report: DataReport, digest: str) -> DataFacts:
    train: SplitReport = report.splits[Split.TRAIN.value]
    validation = report.splits[Split.VALIDATION.value]
    replay = report.splits.get(Split.REPLAY.value)
    general = report.splits.get(Split.GENERAL.value)
    return DataFacts(
        train_rows=train.rows,
        validation_rows=validation.rows,
        train_tokens=train.tokens,
        train_answer_tokens=train.answer_tokens,
        max_row_tokens=max(
            [train.max_tokens, validation.max_tokens, *([replay.max_tokens] if replay else [])]
        ),
        replay_rows=replay.rows if replay else 0,
        replay_tokens=replay.tokens if replay else 0,
        max_general_tokens=general.max_tokens if general else 0,
        digest=digest,
    )
