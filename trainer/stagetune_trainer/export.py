"""The Export task: the chain of stages becomes a folder that others load as it is."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from stagetune_api import names
from stagetune_api.artifact import ArtifactContent, ArtifactKind, verify_artifact
from stagetune_api.report import CheckpointRef, Outcome, StageReport
from stagetune_api.spec import ExportFormat, RetainPolicy
from stagetune_api.stage import StageConfig, Task
from stagetune_api.training_spec import LoraSpec
from stagetune_trainer.assemble import assemble
from stagetune_trainer.averaging import needs_averaging, scale_adapters
from stagetune_trainer.checkpoint import Fence, provenance_of, publish_directory, remove_drafts
from stagetune_trainer.memory import peak_memory_bytes
from stagetune_trainer.methods.adapter_file import join_adapters
from stagetune_trainer.metrics import ProgressLog
from stagetune_trainer.model import load_chain
from stagetune_trainer.model_card import write_model_card
from stagetune_trainer.retention import remove_intermediates

_PEFT_PREFIX = "base_model.model."


def export(config: StageConfig, log: ProgressLog, fence: Fence) -> StageReport:
    """Write the finished run as a Hugging Face folder, or as a PEFT adapter folder.

    Raises ArtifactError where a stage's output is damaged; nothing is exported then. Needs neither
    checkpoints nor tokenised rows: with `retain: Result` those go when the result is there.
    """
    layout = names.RunLayout(Path(config.run_directory))
    # Otherwise the drafts of a newer attempt would be removed.
    fence.check()
    remove_drafts(layout.root)
    log.message(f"writing {layout.export}")
    write = _write_adapter if config.export.format is ExportFormat.ADAPTER else _write_merged

    def write_all(draft: Path) -> None:
        write(config, draft)
        tokenizer = AutoTokenizer.from_pretrained(config.model_directory, trust_remote_code=False)
        tokenizer.save_pretrained(draft)
        write_model_card(config, draft)

    manifest = publish_directory(
        layout.export,
        write_all,
        content=lambda files: ArtifactContent(
            kind=ArtifactKind.EXPORT,
            name=config.run_name,
            base=config.model_digest,
            data=config.data_digest,
            parent=config.chain[-1].digest,
            files=files,
        ),
        provenance=provenance_of(config.run_name, config.attempt),
        before_rename=fence.check,
    )
    log.message(f"published {layout.export} with digest {manifest.digest[:12]}")
    if config.retain is RetainPolicy.RESULT:
        verify_artifact(layout.export, digest=manifest.digest, kind=ArtifactKind.EXPORT)
        fence.check()
        remove_intermediates(layout, log)
    return StageReport(
        task=Task.EXPORT,
        name="export",
        attempt=config.attempt,
        outcome=Outcome.SUCCEEDED,
        peak_memory_bytes=peak_memory_bytes(torch.device("cpu")),
        output=CheckpointRef(path=str(layout.export), digest=manifest.digest, step=0),
        export=str(layout.export),
    )


def _write_merged(config: StageConfig, draft: Path) -> None:
    """Write an ordinary Hugging Face folder; the weights never need to be on a GPU for it."""
    decoder = assemble(config, torch.device("cpu"))
    decoder.model.save_pretrained(draft)


def _write_adapter(config: StageConfig, draft: Path) -> None:
    """Write the adapters of all stages as one PEFT adapter."""
    if config.model_digest is None:
        raise ValueError("an Export task needs the base model's digest")
    verify_artifact(Path(str(config.model_directory)), digest=config.model_digest)
    outputs = [output.tensors for output in load_chain(config.chain, config.model_digest)]
    adapter = join_adapters(outputs, config.method.lora or LoraSpec())
    tensors = adapter.tensors
    if needs_averaging(config):
        base = AutoConfig.from_pretrained(str(config.model_directory), trust_remote_code=False)
        num_layers = base.get_text_config().num_hidden_layers
        tensors = scale_adapters(tensors, config, num_layers)
    save_file(
        {f"{_PEFT_PREFIX}{name}": tensor for name, tensor in tensors.items()},
        draft / names.ADAPTER_WEIGHTS_FILE,
        metadata={"format": "pt"},
    )
    adapter.config.base_model_name_or_path = _base_name(config)
    adapter.config.revision = config.model.revision
    adapter.config.inference_mode = True
    adapter.config.save_pretrained(draft)
    # PEFT writes a set in the order of the process's hashes; equal adapters shall be equal files.
    path = draft / "adapter_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["target_modules"] = sorted(fields["target_modules"])
    path.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")


def _base_name(config: StageConfig) -> str:
    """Return what PEFT loads the base from: the hub's name, or the folder of a local model."""
    scheme, _, rest = config.model.source.partition("://")
    return rest if scheme in ("hf", "ms") else str(config.model_directory)
