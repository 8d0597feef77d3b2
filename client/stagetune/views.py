"""Plans, statuses and reports as tables for people, and as JSON or YAML for programs."""

import io
import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from rich.console import Console, Group
from rich.table import Table
from ruamel.yaml import YAML

from stagetune.display import format_bytes, stage_table
from stagetune.run_report import RunReport, StageSummary
from stagetune_api.problems import Problem
from stagetune_api.status import StagedFineTuneStatus, format_duration
from stagetune_operator.gradient_groups import GradientPlan
from stagetune_operator.plan import Plan

MUCH_PADDING = 0.25
"""Part of the positions of a stage's steps from which on padding is worth a word."""


def print_model(console: Console, model: BaseModel, output: str) -> None:
    """Print `model` as `json` or `yaml`, with the field names of the API."""
    data = model.model_dump(mode="json", exclude_none=True)
    if output == "json":
        text = json.dumps(data, indent=2, ensure_ascii=False)
    else:
        stream = io.StringIO()
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # untyped there
        yaml.allow_unicode = True
        yaml.dump(data, stream)
        text = stream.getvalue().rstrip("\n")
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_problems(console: Console, problems: tuple[Problem, ...]) -> None:
    """Print every problem on a line of its own: where, why, what to do."""
    for problem in problems:
        console.print(
            f"{problem.path}: {problem.reason}: {problem.message}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def print_plan(console: Console, plan: Plan) -> None:
    """Print the stages with their estimates, and what they add up to."""
    table = Table(title="Stages", title_justify="left")
    table.add_column("stage")
    for name in (
        "layers",
        "learning rate",
        "rows",
        "steps",
        "trainable",
        "memory",
        "disk",
        "step FLOPs",
        "of full",
    ):
        table.add_column(name, justify="right")
    for stage in plan.stages:
        estimate = stage.estimate
        table.add_row(
            stage.name,
            ", ".join(f"{layers.first}–{layers.last}" for layers in stage.layer_ranges)
            + (" +embeddings" if stage.embeddings else "")
            + (" +head" if stage.head else ""),
            f"{stage.learning_rate:.3g}",
            str(stage.rows.count),
            str(stage.steps),
            f"{estimate.trainable_parameters / 1e6:.1f} M",
            format_bytes(estimate.memory_bytes),
            format_bytes(estimate.disk_bytes),
            f"{estimate.step_flops:.3g}",
            f"{estimate.relative_step_flops:.2f}",
        )
    console.print(table)
    for stage in plan.stages:
        if stage.prefix_cache is not None:
            kept = "prefix cache" if stage.prefix_cache.used else "no prefix cache"
            console.print(
                f"{stage.name}: {kept}: {stage.prefix_cache.reason}.",
                highlight=False,
                soft_wrap=True,
            )
    if plan.gradients is not None:
        console.print(_gradient_table(plan.gradients))
    summary = plan.summary
    full = summary.full_fine_tuning
    added = ""
    if summary.added_layers:
        size = summary.added_parameters / 1e6
        added = f" and {size:.0f} M in {summary.added_layers} blocks that are added"
    console.print(
        f"{summary.parameters / 1e6:.0f} M parameters in {summary.num_layers} layers{added}; "
        f"{summary.train_rows} training rows with {summary.train_tokens} tokens, the longest of "
        f"{summary.max_row_tokens}, and {summary.validation_rows} validation rows.\n"
        f"{summary.total_steps} steps; all stages compute {summary.relative_total_flops:.2f} times "
        "one full fine-tuning pass over the data.\n"
        f"Peak memory {format_bytes(summary.peak_memory_bytes)} (full fine-tuning "
        f"{format_bytes(full.memory_bytes)}), disk {format_bytes(summary.disk_bytes)}.",
        highlight=False,
        soft_wrap=True,
    )


def _gradient_table(plan: GradientPlan) -> Table:
    rows = plan.profile.rows
    source = f"measured on {rows} rows" if rows else "assumed to be the same in all layers"
    table = Table(title=f"Gradient norms, {source}", title_justify="left")
    table.add_column("layers")
    for name in ("share", "decision", "epochs"):
        table.add_column(name, justify="right")
    for group in plan.groups:
        table.add_row(
            f"{group.layers.first}–{group.layers.last}",
            f"{group.share:.2f}",
            group.decision.value,
            f"{group.epochs:.3g}",
        )
    return table


def print_status(console: Console, status: StagedFineTuneStatus) -> None:
    """Print where a run stands."""
    console.print(stage_table(status))
    failed = [stage for stage in status.stages if stage.last_failure is not None]
    failures = [(stage.name, stage.last_failure) for stage in failed]
    if status.last_failure is not None and not failures:
        failures = [("run", status.last_failure)]
    for name, failure in failures:
        if failure is not None:
            console.print(
                f"{name}: {failure.failure_class} (exit code {failure.exit_code}): "
                f"{failure.message}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    if status.export:
        console.print(f"Exported to {status.export}", markup=False, highlight=False, soft_wrap=True)


def print_report(console: Console, report: RunReport) -> None:
    """Print what a finished run measured: before and after, samples, and its stages."""
    console.print(Group(_scores_table(report), _samples_table(report), _stages_table(report)))
    console.print(
        f"Prepared in {format_duration(report.prepare_seconds)}, evaluated in "
        f"{format_duration(report.evaluation_seconds)}, exported in "
        f"{format_duration(report.export_seconds)}; {format_duration(report.total_seconds)} in all "
        f"on {report.device}.",
        highlight=False,
        soft_wrap=True,
    )
    hint = padding_hint(report.stages)
    if hint is not None:
        console.print(hint, highlight=False, soft_wrap=True)
    if report.averaging is not None:
        console.print(
            f"The exported weights are {report.averaging.chosen:g} tuned and the rest the base's, "
            "as chosen on the validation rows.",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"Exported to {report.export}", markup=False, highlight=False, soft_wrap=True)


def padding_hint(stages: Sequence[StageSummary]) -> str | None:
    """Return what would be cheaper where much of a stage was padding; None where little was."""
    most = max((stage.padding_fraction or 0.0 for stage in stages), default=0.0)
    if most < MUCH_PADDING:
        return None
    return (
        f"{most:.0%} of what a stage computed was padding: rows differ much in length. "
        "spec.training.packing: true computes less of it, with the same rows in each step."
    )


def _scores_table(report: RunReport) -> Table:
    table = Table(title="Before and after", title_justify="left")
    table.add_column("measure")
    table.add_column("base", justify="right")
    table.add_column("tuned", justify="right")
    before, after = report.before, report.after
    rows: list[tuple[str, float | None, float | None]] = [
        ("validation loss (nats a token)", before.validation_loss, after.validation_loss),
        (
            f"exact match of {report.exact_match_rows} greedy answers",
            before.exact_match,
            after.exact_match,
        ),
        ("loss on general text (nats a token)", before.general_loss, after.general_loss),
        ("KL to the base on answers (nats a token)", None, after.kl_to_base),
    ]
    for name, base, tuned in rows:
        if base is not None or tuned is not None:
            table.add_row(name, _score(base), _score(tuned))
    return table


def _samples_table(report: RunReport) -> Table:
    table = Table(title="Sample answers", title_justify="left")
    for name in ("question", "reference", "base", "tuned"):
        table.add_column(name)
    for sample in report.samples:
        texts = (sample.question, sample.reference, sample.before, sample.after)
        table.add_row(*(_shortened(text) for text in texts))
    return table


def _stages_table(report: RunReport) -> Table:
    table = Table(title="Stages", title_justify="left")
    table.add_column("stage")
    has_general = any(stage.general_loss is not None for stage in report.stages)
    meters = ["KL to base", *(["general loss"] if has_general else [])]
    for name in (
        "steps",
        "validation loss",
        *meters,
        "seconds",
        "tokens/s",
        "padding",
        "peak memory",
        "planned",
    ):
        table.add_column(name, justify="right")
    for stage in report.stages:
        table.add_row(
            stage.name,
            str(stage.steps),
            f"{stage.initial_validation_loss:.4f} → {stage.validation_loss:.4f}",
            _score(stage.kl_to_base),
            *([_score(stage.general_loss)] if has_general else []),
            f"{stage.seconds:.0f}",
            f"{stage.tokens_per_second:.0f}",
            "–" if stage.padding_fraction is None else f"{100 * stage.padding_fraction:.0f} %",
            format_bytes(stage.peak_memory_bytes),
            _planned(stage),
        )
    return table


def _planned(stage: StageSummary) -> str:
    """Return the peak by the plan's estimate, and what it is of the measured one."""
    if stage.estimated_peak_memory_bytes is None or stage.peak_memory_ratio is None:
        return "–"
    return f"{format_bytes(stage.estimated_peak_memory_bytes)} ({stage.peak_memory_ratio:.2f})"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _shortened(text: str, width: int = 160) -> Any:
    from rich.text import Text

    return Text(text if len(text) <= width else text[: width - 1] + "…")
