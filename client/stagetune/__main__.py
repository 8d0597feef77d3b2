"""The command line: `stagetune run|validate|plan|status`, also as `kubectl stagetune`.

Exit codes are in `stagetune_api.names.ExitCode` and docs/command-line.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from stagetune.display import make_display
from stagetune.local_run import (
    RunFailedError,
    RunInterruptedError,
    cluster_sections,
    run_locally,
)
from stagetune.manifest_file import ManifestFile, read_manifest_file
from stagetune.planning import Assumptions, facts_for_plan
from stagetune.run_lock import RunIsBusyError
from stagetune.run_report import RunReport
from stagetune.status_board import read_status
from stagetune.trainer_process import trainer_is_installed
from stagetune.views import print_model, print_plan, print_problems, print_report, print_status
from stagetune_api.names import ExitCode, RunLayout
from stagetune_api.problems import InvalidManifestError
from stagetune_api.spec_checks import Runner, check_runner, num_gpus
from stagetune_api.stage import plan_engine
from stagetune_operator.estimate import Machine
from stagetune_operator.plan import make_plan

_OUTPUTS = ("text", "json", "yaml")
_RUNNERS = {"cluster": Runner.CLUSTER, "local": Runner.LOCAL}
_PIPE_WIDTH = 200
"""Columns of a table that goes into a file or a pipe."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _make_parser().parse_args(arguments)
    out = Console(emoji=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    err = Console(stderr=True, emoji=False, width=None if sys.stderr.isatty() else _PIPE_WIDTH)
    try:
        code: int = options.command(options, out, err)
    except InvalidManifestError as error:
        print_problems(err, error.problems)
        return ExitCode.INVALID
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        return ExitCode.FAILED
    except OSError as error:
        _print_line(err, str(error))
        return ExitCode.FAILED
    return code


def run(options: argparse.Namespace, out: Console, err: Console) -> int:
    """Run a manifest on this machine, or go on with it."""
    if not trainer_is_installed():
        err.print("This needs the trainer's packages: pip install 'stagetune[trainer]'")
        return ExitCode.FAILED
    file = read_manifest_file(options.file)
    if passed_over := cluster_sections(file.manifest.spec):
        _print_line(out, f"On clusters only, without effect here: {', '.join(passed_over)}.")
    try:
        with make_display(out) as listeners:
            report = run_locally(file, _run_directory(options, file), listeners)
    except RunInterruptedError as error:
        _print_line(err, f"Stopped: {error}. The same command goes on from there.")
        return ExitCode.INTERRUPTED
    except (RunFailedError, RunIsBusyError) as error:
        _print_line(err, str(error))
        return ExitCode.FAILED
    print_report(out, RunReport.model_validate_json(report.read_bytes()))
    return ExitCode.DONE


def validate(options: argparse.Namespace, out: Console, err: Console) -> int:
    """Say everything that is wrong with a manifest."""
    file = read_manifest_file(options.file)
    where = _RUNNERS.get(options.runner)
    if where and (problems := check_runner(file.manifest.spec, where)):
        raise InvalidManifestError(file.with_lines(problems))
    suffix = f" for {options.runner} runs" if where else ""
    _print_line(out, f"{options.file}: {file.manifest.metadata.name} is valid{suffix}.")
    return ExitCode.DONE


def plan(options: argparse.Namespace, out: Console, err: Console) -> int:
    """Show the stages of a manifest with what they will need."""
    file = read_manifest_file(options.file)
    given = Assumptions(
        model_config=options.model_config,
        rows=options.rows,
        tokens_per_row=options.tokens_per_row,
        answer_tokens_per_row=options.answer_tokens_per_row,
    )
    found = facts_for_plan(file, _run_directory(options, file), given)
    runtime = file.manifest.spec.runtime
    engine = plan_engine(runtime, num_gpus=num_gpus(file.manifest.spec))
    result = make_plan(file.manifest.spec, found.facts, Machine(engine=engine))
    if isinstance(result, list):
        raise InvalidManifestError(result)
    if options.output != "text":
        print_model(out, result, options.output)
        return ExitCode.DONE
    print_plan(out, result)
    for note in found.notes:
        _print_line(out, note)
    return ExitCode.DONE


def status(options: argparse.Namespace, out: Console, err: Console) -> int:
    """Show where a run stands."""
    if options.file.is_dir() or options.file.suffix not in (".yaml", ".yml"):
        directory = options.file
    else:
        directory = _run_directory(options, read_manifest_file(options.file))
    found = read_status(RunLayout(directory).status)
    if found is None:
        _print_line(err, f"There is no run in {directory}.")
        return ExitCode.FAILED
    if options.output == "text":
        print_status(out, found)
    else:
        print_model(out, found, options.output)
    return ExitCode.DONE


def _print_line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _run_directory(options: argparse.Namespace, file: ManifestFile) -> Path:
    if options.run_dir is not None:
        return Path(options.run_dir)
    return Path("runs") / file.manifest.metadata.name


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stagetune", description="Staged fine-tuning.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: object, help: str, file_help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=command)
        sub.add_argument("file", type=Path, metavar="FILE", help=file_help)
        if name != "validate":
            sub.add_argument(
                "--run-dir", type=Path, metavar="DIR", help="the run's folder (runs/NAME)"
            )
        return sub

    manifest = "a StagedFineTune manifest (YAML)"
    add("run", run, "Run a manifest on this machine, or go on with it.", manifest)
    checker = add("validate", validate, "Say everything that is wrong with a manifest.", manifest)
    checker.add_argument(
        "--runner", choices=tuple(_RUNNERS), help="also say what keeps it from running there"
    )
    planner = add("plan", plan, "Show the stages and what they will need.", manifest)
    planner.add_argument(
        "--model-config", type=Path, metavar="FILE", help="config.json of a model not fetched yet"
    )
    for name, help in (
        ("--rows", "training rows, for data not fetched yet"),
        ("--tokens-per-row", "tokens of one row (default: maxLength)"),
        ("--answer-tokens-per-row", "answer tokens of one row (default: half)"),
    ):
        planner.add_argument(name, type=_positive, metavar="N", help=help)
    shower = add("status", status, "Show where a run stands.", f"{manifest}, or the run's folder")
    for sub in (planner, shower):
        sub.add_argument("-o", "--output", choices=_OUTPUTS, default="text")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
