"""The model card of an export: what it was made from, how, and what was measured."""

import json
from pathlib import Path

from transformers import AutoConfig

from stagetune_api import names
from stagetune_api.report import EvaluationResult, StageReport
from stagetune_api.spec import ExportFormat
from stagetune_api.stage import PlannedStage, StageConfig
from stagetune_api.training_spec import ExpandSpec, MethodType
from stagetune_trainer.averaging import alpha_of


def write_model_card(config: StageConfig, directory: Path) -> None:
    """Write `README.md` into an export folder; every number comes from a report of the run."""
    layout = names.RunLayout(Path(config.run_directory))
    reports = [_read(layout.stage(stage.directory).report) for stage in config.stages]
    evaluation = _read(layout.task("evaluate").report)
    parts = [
        _header(config),
        f"# {config.run_name}\n",
        f"Tuned in {len(config.stages)} stages from `{config.model.source}` with Stagetune.\n",
        _settings(config, directory),
        _stage_table(config.stages, reports),
    ]
    if evaluation is not None and evaluation.evaluation is not None:
        parts.append(_evaluation_table(evaluation.evaluation))
    parts.append(_usage(config))
    (directory / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _read(path: Path) -> StageReport | None:
    return StageReport.model_validate_json(path.read_bytes()) if path.exists() else None


def _header(config: StageConfig) -> str:
    """Return the YAML header that model hubs read; JSON strings are YAML strings."""
    library = "peft" if config.export.format is ExportFormat.ADAPTER else "transformers"
    scheme, _, rest = config.model.source.partition("://")
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if scheme == "hf":
        lines.append(f"base_model: {json.dumps(rest)}")
    lines += ["tags:", "- stagetune", "- staged-fine-tuning", "---\n"]
    return "\n".join(lines)


def _settings(config: StageConfig, directory: Path) -> str:
    training = config.training
    # Once each where stages have sizes of their own, in running order.
    sizes = dict.fromkeys(stage.batch_size or training.batch_size for stage in config.stages)
    rows = [
        ("Method", config.method.type.value),
        *_depth(config, directory),
        ("Base model", config.model.source),
        ("Base revision", config.model.revision or "–"),
        ("Base digest", f"`{config.model_digest}`"),
        ("Data", config.dataset.source),
        ("Data digest", f"`{config.data_digest}`"),
        ("Batch size", ", ".join(map(str, sizes)) or training.batch_size),
        ("Optimizer", training.optimizer.value),
        ("Learning-rate schedule", training.learning_rate_schedule.value),
        ("Seed", training.seed),
        *_kept_change(config),
    ]
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| setting | value |", "| --- | --- |", *lines, ""])


def _kept_change(config: StageConfig) -> list[tuple[str, str]]:
    """Return what of the tuning the weights hold, where that is not all of it."""
    rows = []
    averaging, scaling = config.protection.averaging, config.protection.depth_scaling
    if averaging is not None:
        how = "as set" if averaging.alpha is not None else "chosen on the validation rows"
        text = f"{alpha_of(config):g} of the tuned weights, the rest the base's ({how})"
        rows.append(("Weight averaging", text))
    if scaling is not None:
        text = f"{scaling.bottom:g} of the bottommost layer's change, rising to 1 at the top"
        rows.append(("Depth scaling", text))
    return rows


def _depth(config: StageConfig, directory: Path) -> list[tuple[str, str]]:
    """Return the row with the depth of an expanded model; none for other methods."""
    if config.method.type is not MethodType.EXPAND:
        return []
    size = (config.method.expand or ExpandSpec()).layers_per_block
    exported = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    depth: int = exported.get_text_config().num_hidden_layers
    # Every block follows `size` layers of the base.
    added = depth // (size + 1)
    text = f"{depth}, of which {added} were added; the table below counts those of the base"
    return [("Decoder layers", text)]


def _stage_table(stages: list[PlannedStage], reports: list[StageReport | None]) -> str:
    lines = [
        "## Stages\n",
        "| stage | layers | learning rate | steps | validation loss | seconds | output digest |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stage, report in zip(stages, reports, strict=True):
        layers = ", ".join(f"{part.first}–{part.last}" for part in stage.layer_ranges)
        measured = "– | – | – | –"
        if report is not None and report.train is not None and report.output is not None:
            measured = (
                f"{report.train.steps} | {report.train.initial_validation_loss:.4f} → "
                f"{report.train.validation_loss:.4f} | {report.seconds:.0f} | "
                f"`{report.output.digest[:12]}`"
            )
        lines.append(f"| {stage.name} | {layers} | {stage.learning_rate:.3g} | {measured} |")
    return "\n".join([*lines, ""])


def _evaluation_table(result: EvaluationResult) -> str:
    rows = [
        ("validation loss", result.before.validation_loss, result.after.validation_loss),
        (
            f"exact match of {result.exact_match_rows} greedy answers",
            result.before.exact_match,
            result.after.exact_match,
        ),
        ("loss on general text", result.before.general_loss, result.after.general_loss),
        ("KL to the base on answers", None, result.after.kl_to_base),
    ]
    lines = ["## Before and after\n", "| measure | base | this model |", "| --- | --- | --- |"]
    for name, before, after in rows:
        if before is not None or after is not None:
            lines.append(f"| {name} | {_number(before)} | {_number(after)} |")
    return "\n".join([*lines, ""])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _usage(config: StageConfig) -> str:
    if config.export.format is ExportFormat.ADAPTER:
        code = (
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM\n\n"
            'base = AutoModelForCausalLM.from_pretrained("<the base model>")\n'
            'model = PeftModel.from_pretrained(base, "<this folder>")'
        )
    else:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("<this folder>")\n'
            'model = AutoModelForCausalLM.from_pretrained("<this folder>")'
        )
    return f"## Loading it\n\n```python\n{code}\n```\n"
