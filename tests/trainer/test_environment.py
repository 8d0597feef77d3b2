"""What a pod has: a read-only root, one folder to write to, and a user without a name."""

import getpass
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stagetune_api import names
from stagetune_api.report import StageReport
from stagetune_api.stage import StageConfig, Task
from stagetune_trainer.environment import set_up_environment
from stagetune_trainer.start_clock import StartClock, seconds_since_process_start

MakeConfig = Callable[..., StageConfig]
# Every task of a run, each in a process of its own, as its pod has it.
SCRIPT = """
import json, os, pwd, subprocess, sys
from pathlib import Path
volume = Path(sys.argv[1])
def run(name, **fields):
    config = json.loads((volume / "template.json").read_text()) | fields
    (volume / f"{name}.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "stagetune_trainer", str(volume / f"{name}.json")]
    code = subprocess.run([*command, f"--termination-message={volume}/{name}.log"]).returncode
    report = json.loads((volume / f"{name}.log").read_text())
    assert code == 0, report
    return report
facts = run("prepare")["facts"]
later = {
    "modelDirectory": facts["modelDirectory"],
    "modelDigest": facts["model"]["digest"],
    "dataDigest": facts["data"]["digest"],
}
stage = json.loads((volume / "stage.json").read_text())
output = run("train", task="Train", stage=stage, **later)["output"]
chain = [{"path": output["path"], "digest": output["digest"]}]
run("evaluate", task="Evaluate", chain=chain, evaluation={"samples": 1}, **later)
run("export", task="Export", chain=chain, stages=[stage], **later)
try:
    name = pwd.getpwuid(os.getuid()).pw_name
except KeyError:
    name = "nobody knows"
try:
    Path("/stagetune-was-here").touch()
    print("a root to write to")
except OSError:
    print("a root that is read-only for", os.getuid(), name)
"""


@pytest.fixture
def _environment_as_before() -> Iterator[None]:
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.usefixtures("_environment_as_before")
@pytest.mark.parametrize("home", [None, "", "/nonexistent"])
def test_home_that_cannot_be_written_is_replaced(
    home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    set_up_environment(Task.TRAIN)
    found = Path(os.environ["HOME"])
    assert found.parent == Path(tempfile.gettempdir())
    assert found.stat().st_mode & 0o077 == 0
    (found / "cache").mkdir()


@pytest.mark.usefixtures("_environment_as_before")
def test_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def unknown(number: int) -> Any:
        raise KeyError(f"uid not found: {number}")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    set_up_environment(Task.PREPARE)
    assert getpass.getuser() == "stagetune"


@pytest.mark.usefixtures("_environment_as_before")
def test_what_somebody_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("LOGNAME", "me")
    set_up_environment(Task.TRAIN)
    assert os.environ["HOME"] == str(tmp_path)
    assert (os.environ["HF_HUB_OFFLINE"], os.environ["LOGNAME"]) == ("0", "me")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def confined(volume: Path) -> list[str]:
    """Return the command's beginning that takes away what this machine lets us take away."""
    if os.getuid() != 0 or not (shutil.which("unshare") and shutil.which("setpriv")):
        return []
    mounts = f"mount --bind {volume} {volume} && mount --bind / / && mount -o remount,bind,ro /"
    # May read what only root could, as the interpreter may lie there; may write nothing.
    user = (
        "setpriv --reuid 65532 --regid 65532 --clear-groups --inh-caps -all,+dac_read_search "
        "--ambient-caps -all,+dac_read_search --bounding-set -all,+dac_read_search"
    )
    command = ["unshare", "-m", "sh", "-c", f'{mounts} && exec {user} "$@"', "sh"]
    works = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    return command if works else []


def test_whole_run_works_in_a_pods_confinement(
    make_stage_config: MakeConfig,
    make_stage: Callable[..., dict[str, Any]],
    make_tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    config = make_stage_config(
        attempt=0,
        run_directory=str(volume / "run"),
        models_directory=str(volume / "models"),
        retain="Result",
    )
    (volume / "template.json").write_text(config.model_dump_json(exclude_none=True))
    (volume / "stage.json").write_text(json.dumps(make_stage(0, 0, 1)))
    (volume / "tmp").mkdir()
    for path in (volume, volume / "tmp"):
        path.chmod(0o777)
    kept = ("PATH", "PYTHONPATH", "LANG", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    # Where the root is read-only there is one folder for temporary files; here it is this one.
    environment |= {"HOME": "/nonexistent", "TMPDIR": str(volume / "tmp")}
    prefix = confined(volume)
    result = subprocess.run(
        [*prefix, sys.executable, "-c", SCRIPT, str(volume)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    if prefix:
        assert "a root that is read-only for 65532" in result.stdout
    assert list((volume / "tmp").glob("stagetune-home-*")) == []
    layout = names.RunLayout(volume / "run").stage("01-layers-0-1")
    train = StageReport.model_validate_json(layout.report.read_bytes())
    assert train.timings is not None
    assert train.timings.imports_seconds is not None
    assert train.timings.load_seconds is not None
    assert train.timings.first_step_time is not None
    assert train.timings.start_time < train.timings.first_step_time
    assert train.timings.imports_seconds > 0.1
    assert train.seconds > train.timings.imports_seconds + train.timings.load_seconds


def test_process_began_before_its_own_clocks() -> None:
    script = (
        "import time; began = time.monotonic();"
        "from stagetune_trainer.start_clock import seconds_since_process_start;"
        "print(seconds_since_process_start() - (time.monotonic() - began))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    # The interpreter's own start, in whole ticks of a hundredth of a second.
    assert -0.02 < float(shown) < 10
    assert seconds_since_process_start() > 0


def test_clock_tells_only_what_it_has_seen() -> None:
    clock = StartClock(age_seconds=5)
    assert clock.timings().imports_seconds is None
    clock.imported()
    timings = clock.timings()
    assert timings.imports_seconds == pytest.approx(5, abs=1)
    assert (timings.load_seconds, timings.first_step_time) == (None, None)
