"""`make cluster-demo`: from nothing to a finished run on a real node, for a person to watch.

Builds and starts whatever is missing, installs the chart, applies the quick start's manifest, shows
the stages as they grow, and compares the exported weights with those of the same run without a
cluster. Exits with 1 if anything differs.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from local_cluster.binaries import BinariesUnavailableError
from local_cluster.node import why_no_node
from staged_cluster import NAMESPACE, StagedCluster, digests_of_weights, staged_cluster
from stagetune_api.status import format_duration

Object = dict[str, Any]
ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
NAME = "finance-qa"
RUN_SECONDS = 6 * 3600.0

console = Console()


def main(arguments: Sequence[str] | None = None) -> int:
    """Show a whole run on a node; return the exit code."""
    parser = argparse.ArgumentParser(prog="cluster_demo", description=__doc__)
    parser.add_argument(
        "--fraction", type=float, default=1.0, help="of the training rows that each stage sees"
    )
    fraction = parser.parse_args(arguments).fraction
    if reason := why_no_node():
        console.print(reason)
        return 1
    started = time.monotonic()
    _run([sys.executable, str(QUICKSTART / "build_inputs.py")])
    try:
        with staged_cluster(_tell, "demo") as staged, TemporaryDirectory() as scratch:
            console.rule("the run on the cluster")
            _put_inputs(staged, Path(scratch))
            remote = _manifest("finance-qa-cluster.yaml", fraction)
            remote["metadata"]["namespace"] = NAMESPACE
            staged.apply(remote)
            staged.await_status(
                NAME,
                lambda status: status.get("state") == "Succeeded",
                what="end",
                seconds=RUN_SECONDS,
                on_change=_show,
            )
            console.print(staged.cluster.kubectl("-n", NAMESPACE, "get", "sft,jobs"))
            exported = digests_of_weights(staged.folder(NAME) / "export")
            console.rule("the same run without a cluster")
            expected = _run_locally(Path(scratch), fraction)
    except BinariesUnavailableError as error:
        console.print(str(error))
        return 1
    except (AssertionError, TimeoutError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        return 1
    return _compare(exported, expected, time.monotonic() - started)


def _tell(text: str) -> None:
    console.print(text, highlight=False)


def _manifest(file: str, fraction: float) -> Object:
    manifest: Object = YAML(typ="safe", pure=True).load((QUICKSTART / file).read_text())
    if fraction < 1:
        manifest["spec"]["schedule"]["dataFraction"] = fraction
    return manifest


def _put_inputs(staged: StagedCluster, scratch: Path) -> None:
    claimed = scratch / "claimed"
    claimed.mkdir()
    for name in ("inputs", "general_text.jsonl"):
        (claimed / name).symlink_to(QUICKSTART / name)
    staged.put_inputs("finance-qa-inputs", claimed)


def _run_locally(scratch: Path, fraction: float) -> dict[str, str]:
    manifest = QUICKSTART / f".demo-{scratch.name}.yaml"
    try:
        with manifest.open("w") as file:
            YAML(typ="safe", pure=True).dump(_manifest("finance-qa.yaml", fraction), file)
        run = scratch / "local"
        command = ["-m", "stagetune", "run", str(manifest), "--run-dir", str(run)]
        _run([sys.executable, *command])
    finally:
        manifest.unlink()
    return digests_of_weights(run / "export")


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, cwd=ROOT, check=True, timeout=RUN_SECONDS)


def _show(status: Object) -> None:
    """Print the run's line, and the table of stages whenever a stage has ended."""
    columns = [status.get(name, "") for name in ("state", "stage", "progress", "loss", "eta")]
    message = next(
        (
            item.get("message", "")
            for item in status.get("conditions", [])
            if item["type"] == "Reconciling"
        ),
        "",
    )
    now = time.strftime("%H:%M:%S")
    console.print(now, *(text for text in columns if text), f"[dim]{message}[/dim]")
    states = {stage["state"] for stage in status.get("stages", [])}
    if "Succeeded" in states and ("Queued" in states or states == {"Succeeded"}):
        console.print(_table(status["stages"]))


def _table(stages: Sequence[Object]) -> Table:
    table = Table()
    titles = ("stage", "layers", "state", "step", "validation loss", "queued", "hand-over", "took")
    for title in titles:
        table.add_column(title)
    for stage in stages:
        layers, measured = stage["layers"], stage.get("measured", {})
        loss = stage.get("validationLoss")
        table.add_row(
            stage["name"],
            f"{layers['first']}-{layers['last']}",
            stage["state"],
            f"{stage['step']}/{stage['totalSteps']}",
            "" if loss is None else f"{loss:.4f}",
            _seconds(stage.get("queuedSeconds")),
            _seconds(stage.get("handoffSeconds")),
            format_duration(measured["seconds"]) if measured else "",
        )
    return table


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def _compare(exported: dict[str, str], expected: dict[str, str], seconds: float) -> int:
    console.rule("the exported weights")
    for name in sorted(exported.keys() | expected.keys()):
        same = exported.get(name) == expected.get(name)
        console.print(f"{name}: cluster {exported.get(name, '-')}", highlight=False)
        verdict = "the same" if same else "[red]NOT the same[/red]"
        console.print(f"{name}: local   {expected.get(name, '-')}  {verdict}", highlight=False)
    if not exported or exported != expected:
        console.print("[red]The run on the cluster and the one without differ.[/red]")
        return 1
    console.print(f"Bit for bit the same model, after {format_duration(seconds)} in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
