"""pvc:// sources: what lies on a claim, the same bits as from a file, and no way off the claim."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagetune_api.names import TrainerExitCode
from stagetune_api.report import StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer.errors import UserError
from stagetune_trainer.run import run_task
from stagetune_trainer.sources import Source, SourceKind, resolve_source

MakeConfig = Callable[..., StageConfig]


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    """Two claims, `data` and `other`, and beside them what no source may reach."""
    folder = tmp_path / "claims"
    (folder / "data" / "rows").mkdir(parents=True)
    (folder / "data" / "rows" / "train.jsonl").write_text("{}\n")
    (folder / "other").mkdir()
    (folder / "other" / "secret.jsonl").write_text("{}\n")
    (tmp_path / "token").write_text("x")
    return folder


def resolve(uri: str, claims: Path | None) -> Path:
    source = Source(uri=uri, path="spec.dataset.source", kind=SourceKind.ROWS)
    return resolve_source(
        source, manifest_directory=Path("/"), cache_directory=Path("/"), claims_directory=claims
    )


def message_of(uri: str, claims: Path | None) -> str:
    with pytest.raises(UserError) as caught:
        resolve(uri, claims)
    (problem,) = caught.value.problems
    assert problem.path == "spec.dataset.source"
    assert problem.message.startswith(f"{uri}: ")
    return problem.message


@pytest.mark.parametrize("uri", ["pvc://data/rows", "pvc://data/rows/", "pvc://data/./rows"])
def test_path_counts_from_the_root_of_the_claim(uri: str, claims: Path) -> None:
    assert resolve(uri, claims) == claims / "data" / "rows"
    assert resolve(f"{uri}/train.jsonl", claims) == claims / "data" / "rows" / "train.jsonl"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("pvc://data/nowhere.jsonl", "the claim data has no nowhere.jsonl; check the path"),
        ("pvc://nowhere/rows", "the claim nowhere is not mounted"),
        ("pvc://data/../other/secret.jsonl", "write pvc://claim/path, without '..'"),
        ("pvc://../token", "write pvc://claim/path, without '..'"),
        ("pvc:///etc/passwd", "write pvc://claim/path, without '..'"),
        ("pvc://./data", "write pvc://claim/path, without '..'"),
    ],
)
def test_what_is_not_on_a_claim_is_refused_with_the_cure(uri: str, said: str, claims: Path) -> None:
    assert said in message_of(uri, claims)


def test_without_claims_there_are_none(tmp_path: Path) -> None:
    assert "there are no claims here" in message_of("pvc://data/rows", None)


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("rows/more.jsonl", "../../other/secret.jsonl"),
        ("rows/more.jsonl", "/etc/passwd"),
        ("rows/deep/more.jsonl", "../../../../token"),
        ("rows/deep", "/etc"),
        ("rows/gone.jsonl", "/nowhere/at/all"),
        ("rows", "/etc"),
    ],
)
def test_link_that_leaves_the_claim_is_refused(link: str, target: str, claims: Path) -> None:
    path = claims / "data" / link
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    said = message_of("pvc://data/rows", claims)
    assert f"{link} is a link that leaves the claim data" in said
    assert "relative link to a file on the same claim" in said


def test_link_behind_a_link_is_found(claims: Path) -> None:
    (claims / "data" / "blobs").mkdir()
    (claims / "data" / "blobs" / "x.jsonl").symlink_to("/etc/passwd")
    (claims / "data" / "rows" / "blobs").symlink_to("../blobs")
    assert "is a link that leaves the claim" in message_of("pvc://data/rows", claims)


def test_links_inside_the_claim_are_followed(claims: Path) -> None:
    """As in a hub's cache that somebody copied: snapshots of links to blobs."""
    blobs = claims / "data" / "blobs"
    blobs.mkdir()
    (blobs / "x").write_text("{}\n")
    (claims / "data" / "rows" / "more.jsonl").symlink_to("../blobs/x")
    (claims / "data" / "rows" / "loop").symlink_to("../rows")
    (claims / "data" / "rows" / "circle").symlink_to("circle")
    assert resolve("pvc://data/rows", claims) == claims / "data" / "rows"


def test_files_that_may_not_be_read_are_named_with_the_user(
    claims: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = claims / "data" / "rows"

    def refuse(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    said = message_of("pvc://data/rows", claims)
    assert f"{folder} may not be read by user {os.getuid()}" in said


def test_run_from_claims_gives_the_same_bits_as_one_from_files(
    make_later_config: MakeConfig,
    make_stage: Callable[..., dict[str, Any]],
    make_tiny_model: Callable[..., Path],
    make_chat_rows: Callable[[int], list[dict[str, Any]]],
    save_jsonl: Callable[..., Path],
    never: Any,
    tmp_path: Path,
) -> None:
    """Model, rows, validation rows, general text, stages and exported weights."""
    save_jsonl(tmp_path / "files" / "rows.jsonl", make_chat_rows(40)[:32])
    save_jsonl(tmp_path / "files" / "held-out.jsonl", make_chat_rows(40)[32:])
    (tmp_path / "files" / "text.md").write_text("Paris is old. It has been there for long.\n")
    claims = tmp_path / "claims"
    shutil.copytree(tmp_path / "files", claims / "data")
    shutil.copytree(make_tiny_model("llama"), claims / "models" / "llama")

    def whole_run(name: str, model: str, data: str) -> list[StageReport]:
        fields: dict[str, Any] = {
            "run_directory": str(tmp_path / name / "run"),
            "models_directory": str(tmp_path / name / "models"),
            "claims_directory": str(claims),
            "model": {"source": model},
            "dataset": {
                "source": f"{data}/rows.jsonl",
                "validation": {"fraction": None, "source": f"{data}/held-out.jsonl"},
            },
            "evaluation": {"generalText": {"source": f"{data}/text.md"}},
        }
        reports = []
        chain: list[StageReport] = []
        for index in range(2):
            stage = make_stage(index, 2 * index, 2 * index + 1)
            config = make_later_config("Train", chain=chain, stage=stage, **fields)
            report, code = run_task(config, never)
            assert code is TrainerExitCode.SUCCEEDED, report.failure
            chain.append(report)
            reports.append(report)
        config = make_later_config("Export", chain=chain, **fields)
        report, code = run_task(config, never)
        assert code is TrainerExitCode.SUCCEEDED, report.failure
        return [*reports, report]

    files = whole_run("a", f"file://{make_tiny_model('llama')}", f"file://{tmp_path}/files")
    claimed = whole_run("b", "pvc://models/llama", "pvc://data")
    for one, other in zip(files[:2], claimed[:2], strict=True):
        assert one.output is not None
        assert other.output is not None
        assert one.output.digest == other.output.digest
    keys = [sorted(p.name for p in (tmp_path / n / "models").glob("[0-9a-f]*")) for n in "ab"]
    assert keys[0] == keys[1]
    exports = [tmp_path / name / "run" / "export" for name in "ab"]
    names = [{p.name for p in export.iterdir()} for export in exports]
    assert names[0] == names[1]
    differing = {
        name
        for name in names[0]
        if (exports[0] / name).read_bytes() != (exports[1] / name).read_bytes()
    }
    # The model card says where model and data came from, and the manifest covers the card.
    assert differing == {"README.md", "manifest.json"}
