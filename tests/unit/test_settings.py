"""The operator's settings: read from the environment, with everything wrong said at once."""

import pytest
from pydantic import ValidationError

from stagetune_operator.settings import ImagePullPolicy, LogFormat, Settings, SettingsError

IMAGE = {"STAGETUNE_TRAINER_IMAGE": "registry.example/stagetune-trainer@sha256:0"}


def problems_of(environment: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment(environment)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_the_image_is_all_that_has_to_be_said() -> None:
    settings = Settings.from_environment(IMAGE)
    assert settings.trainer_image == IMAGE["STAGETUNE_TRAINER_IMAGE"]
    assert settings.namespaces == ()
    assert settings.progress_url == ""
    assert settings.image_pull_policy is ImagePullPolicy.IF_NOT_PRESENT
    assert settings.trainer_user_id == 65532
    assert settings.workers == 8


def test_every_setting_is_read_from_its_variable() -> None:
    settings = Settings.from_environment(
        {
            **IMAGE,
            "STAGETUNE_NAMESPACES": "team-a, team-b,",
            "STAGETUNE_IMAGE_PULL_SECRETS": "mirror",
            "STAGETUNE_IMAGE_PULL_POLICY": "Always",
            "STAGETUNE_PROGRESS_URL": "http://stagetune-operator.stagetune:8080",
            "STAGETUNE_WORKERS": "4",
            "STAGETUNE_RESYNC_SECONDS": "30",
            "STAGETUNE_PORT_METRICS": "9200",
            "STAGETUNE_LOG_FORMAT": "json",
            "HOME": "/tmp",
        }
    )
    assert settings.namespaces == ("team-a", "team-b")
    assert settings.image_pull_secrets == ("mirror",)
    assert settings.image_pull_policy is ImagePullPolicy.ALWAYS
    assert settings.progress_url == "http://stagetune-operator.stagetune:8080"
    assert (settings.workers, settings.resync_seconds) == (4, 30.0)
    assert settings.port_metrics == 9200
    assert settings.log_format is LogFormat.JSON


def test_all_problems_are_said_at_once_and_by_the_variables_names() -> None:
    problems = problems_of(
        {
            "STAGETUNE_NAMESPACES": "team-a,Team_B",
            "STAGETUNE_WORKERS": "many",
            "STAGETUNE_PROGRESS_URL": "stagetune-operator:8080",
            "STAGETUNE_LOG_FORMAT": "xml",
            "STAGETUNE_RESYNC_SECONDS": "nan",
            "STAGETUNE_TRAINER_USER_ID": "0",
            "STAGETUNE_WORKER": "4",
        }
    )
    text = "\n".join(problems)
    assert len(problems) == 8
    assert "STAGETUNE_TRAINER_IMAGE is required and not set" in problems
    assert "STAGETUNE_WORKER is not a setting of the operator" in problems
    assert "STAGETUNE_NAMESPACES, entry 2: " in text
    assert "not 'Team_B'" in text
    for name in ("WORKERS", "PROGRESS_URL", "LOG_FORMAT", "RESYNC_SECONDS", "TRAINER_USER_ID"):
        assert f"STAGETUNE_{name}: " in text


def test_an_empty_variable_counts_as_not_set() -> None:
    settings = Settings.from_environment(
        {**IMAGE, "STAGETUNE_NAMESPACES": "", "STAGETUNE_WORKERS": " "}
    )
    assert settings.namespaces == ()
    assert settings.workers == 8
    empty = {"STAGETUNE_TRAINER_IMAGE": ""}
    assert problems_of(empty) == ["STAGETUNE_TRAINER_IMAGE is required and not set"]


@pytest.mark.parametrize(
    "name",
    [
        "STAGETUNE_SERVICE_HOST",
        "STAGETUNE_SERVICE_PORT",
        "STAGETUNE_SERVICE_PORT_METRICS",
        "STAGETUNE_PORT",
        "STAGETUNE_PORT_8080_TCP_ADDR",
        "STAGETUNE_METRICS_PORT",
        "STAGETUNE_OPERATOR_SERVICE_HOST",
        "STAGETUNE_OPERATOR_PORT_8080_TCP",
    ],
)
def test_what_the_kubelet_sets_for_services_is_no_setting(name: str) -> None:
    settings = Settings.from_environment({**IMAGE, name: "tcp://10.96.0.7:8080"})
    assert settings == Settings.from_environment(IMAGE)


def test_settings_do_not_change() -> None:
    settings = Settings.from_environment(IMAGE)
    with pytest.raises(ValidationError):
        settings.workers = 2
