"""Write what is made of something else in the chart, and the chart as one file for kubectl.

`make manifests` runs this after a change of the CRD, of values.yaml or of a template; tests hold
every file against it.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "charts" / "stagetune"
CRD = ROOT / "crds" / "stagetune.io_stagedfinetunes.yaml"
CRD_COPY = CHART / "files" / CRD.name
SCHEMA = CHART / "values.schema.json"
README = CHART / "README.md"
MANIFESTS = ROOT / "deploy" / "stagetune.yaml"
NAMESPACE = "stagetune-system"

_TABLE = re.compile(r"(?<=<!-- values -->\n).*(?=<!-- end of values -->)", re.DOTALL)
_HEAD = f"""\
# Generated from charts/stagetune and never edited; `make manifests` writes it anew.
# The CustomResourceDefinition comes before it: kubectl apply --server-side -f crds/
apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
  labels:
    pod-security.kubernetes.io/enforce: restricted
"""
_NOT_FOR_KUBECTL = re.compile(
    r" *(helm\.sh/chart: |app\.kubernetes\.io/managed-by: Helm$|# Source: |$)"
)
"""Whoever applies it by kubectl does not manage it by Helm."""


class Value(NamedTuple):
    """A documented value of the chart."""

    path: tuple[str, ...]
    default: Any
    description: str


def documented_values() -> list[Value]:
    """Return the values that a `# --` comment describes, in the order of values.yaml."""
    text = (CHART / "values.yaml").read_text()
    values = YAML(typ="safe").load(text)
    return [Value(path, _at(values, path), told) for path, told in _comments(text)]


def generated_files() -> dict[Path, str]:
    """Return what the files that take no Helm should hold."""
    return {CRD_COPY: CRD.read_text(), SCHEMA: _described_schema(), README: _readme()}


def render_manifests(helm: Path) -> str:
    """Return the chart with its defaults for kubectl, without the CustomResourceDefinition."""
    options = ["--namespace", NAMESPACE, "--set", "crds.enabled=false"]
    done = subprocess.run(
        [str(helm), "template", "stagetune", str(CHART), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    lines = (line for line in done.stdout.splitlines() if not _NOT_FOR_KUBECTL.match(line))
    return _HEAD + "\n".join(lines) + "\n"


def _comments(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path of each described value and its description."""
    parents: list[tuple[int, str]] = []
    told: list[str] = []
    for line in text.splitlines():
        if comment := re.match(r" *# ?(.*)", line):
            if comment[1].startswith("-- "):
                told = [comment[1].removeprefix("-- ")]
            elif told:
                told.append(comment[1])
        elif key := re.match(r"( *)([A-Za-z]+):", line):
            parents = [parent for parent in parents if parent[0] < len(key[1])]
            parents.append((len(key[1]), key[2]))
            if told:
                yield tuple(name for _, name in parents), " ".join(told)
            told = []
        else:
            told = []


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        values = values[name]
    return values


def _described_schema() -> str:
    schema = json.loads(SCHEMA.read_text())
    for value in documented_values():
        node = schema
        for name in value.path:
            node = node["properties"][name]
        node["description"] = value.description
    return json.dumps(schema, indent=2) + "\n"


def _readme() -> str:
    rows = ["| value | default | what it is |", "| --- | --- | --- |"]
    for value in documented_values():
        default = json.dumps(value.default).replace("|", "\\|")
        rows.append(f"| `{'.'.join(value.path)}` | `{default}` | {value.description} |")
    table = "\n".join(rows) + "\n"
    return _TABLE.sub(lambda _: table, README.read_text())


def main() -> None:
    """Write every file."""
    from local_cluster.programs import provide_helm

    helm = provide_helm(lambda text: sys.stderr.write(f"{text}\n"))
    for path, text in generated_files().items():
        path.write_text(text)
    MANIFESTS.write_text(render_manifests(helm))


if __name__ == "__main__":
    main()
