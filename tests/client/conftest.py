"""What the command line's tests share: a tiny model and data on disk, and a manifest for them.

Trainer processes are real ones; only the model is small.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tiny_workspace import build_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and 40 rows of questions and answers."""
    return build_workspace(tmp_path_factory.mktemp("workspace"))


def merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` laid over it; None takes a key out."""
    result = dict(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


@pytest.fixture
def write_manifest(workspace: Path, tmp_path: Path) -> Callable[..., Path]:
    """`write_manifest(name="tiny", **spec) -> Path` of a valid manifest with changes laid over."""

    def write(name: str = "tiny", **changes: Any) -> Path:
        spec: dict[str, Any] = {
            "model": {"source": f"file://{workspace / 'model'}"},
            "dataset": {
                "source": f"file://{workspace / 'rows.jsonl'}",
                "validation": {"fraction": 0.2},
                "maxLength": 64,
            },
            "schedule": {"stageCount": 2, "epochsPerStage": 2},
            "training": {
                "learningRate": 3e-3,
                "batchSize": 4,
                "microBatchSize": 4,
                "checkpointIntervalSeconds": 1,
            },
            "evaluation": {
                "exactMatch": {"maxRows": 4, "maxNewTokens": 4},
                "generalText": {"source": f"file://{workspace / 'general.jsonl'}"},
                "samples": 2,
            },
        }
        document = {
            "apiVersion": "stagetune.io/v1alpha1",
            "kind": "StagedFineTune",
            "metadata": {"name": name},
            "spec": merged(spec, changes),
        }
        path = tmp_path / f"{name}.yaml"
        with path.open("w") as file:
            YAML(typ="safe", pure=True).dump(document, file)
        return path

    return write
