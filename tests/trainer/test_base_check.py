"""The base model's bytes are checked while the code is imported, and no less than before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagetune_api.artifact import ArtifactError
from stagetune_api.stage import StageConfig
from stagetune_trainer.base_check import begin_check, check_base


@pytest.fixture
def config(
    make_later_config: Callable[..., StageConfig], make_stage: Callable[..., dict[str, Any]]
) -> StageConfig:
    """A task with a prepared base model."""
    return make_later_config("Train", stage=make_stage(0, 2, 3))


def place(config: StageConfig) -> tuple[Path, str]:
    assert config.model_directory is not None
    assert config.model_digest is not None
    return Path(config.model_directory), config.model_digest


def damage(directory: Path) -> Path:
    """Turn one bit of the weights over."""
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def test_damaged_base_is_refused_by_a_check_that_was_begun(config: StageConfig) -> None:
    path = damage(place(config)[0])
    begin_check(config)
    with pytest.raises(ArtifactError, match="is damaged") as refusal:
        check_base(*place(config))
    assert refusal.value.path == path


def test_check_that_was_begun_counts_for_one_load(config: StageConfig) -> None:
    begin_check(config)
    check_base(*place(config))
    damage(place(config)[0])
    with pytest.raises(ArtifactError, match="is damaged"):
        check_base(*place(config))


def test_check_of_one_model_says_nothing_of_another(config: StageConfig) -> None:
    begin_check(config)
    with pytest.raises(ArtifactError, match="is not the expected artifact"):
        check_base(place(config)[0], "0" * 64)
    check_base(*place(config))


def test_task_without_a_base_model_begins_no_check(
    make_stage_config: Callable[..., StageConfig],
) -> None:
    begin_check(make_stage_config())
