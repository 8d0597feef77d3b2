"""A published folder appears whole or not at all, and whatever is wrong with it is named."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stagetune_api import names
from stagetune_api.artifact import (
    ArtifactContent,
    ArtifactError,
    ArtifactFile,
    ArtifactKind,
    ArtifactManifest,
    Provenance,
    read_manifest,
    verify_artifact,
)
from stagetune_api.files import write_file_atomically
from stagetune_trainer.checkpoint import (
    Fence,
    newest_good_checkpoint,
    prune_checkpoints,
    publish_directory,
    remove_drafts,
)
from stagetune_trainer.errors import FencedError

SETTINGS = "a" * 64
FILE_SYSTEM_CALLS = ("open", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir")


class PowerCutError(BaseException):
    """The machine is gone: nothing after this runs, not even clean-up."""


def provenance(attempt: int = 1) -> Provenance:
    return Provenance(run_name="tiny", attempt=attempt, created_at="2026-01-01T00:00:00Z")


def content(files: list[ArtifactFile], step: int = 5, settings: str = SETTINGS) -> ArtifactContent:
    return ArtifactContent(
        kind=ArtifactKind.CHECKPOINT, name="layers-0-1", step=step, settings=settings, files=files
    )


def writer(text: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(text.encode() * 100)
        (directory / "nested").mkdir()
        (directory / "nested" / "loop.json").write_text("{}")

    return write


def publish(
    final: Path, text: str = "new", *, attempt: int = 1, step: int = 5, settings: str = SETTINGS
) -> ArtifactManifest:
    return publish_directory(
        final,
        writer(text),
        content=lambda files: content(files, step, settings),
        provenance=provenance(attempt),
    )


@pytest.fixture
def cut_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """`cut_after(n)`: the n-th file-system call from now does not happen, nor any after it."""
    real = {name: getattr(os, name) for name in FILE_SYSTEM_CALLS}
    left = -1

    def shim(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                raise PowerCutError(name)
            if left > 0:
                left -= 1
            return real[name](*arguments, **options)

        return call

    for name in FILE_SYSTEM_CALLS:
        monkeypatch.setattr(os, name, shim(name))

    def arm(calls: int) -> None:
        nonlocal left
        left = calls

    yield arm
    left = -1


def test_publish_describes_every_file_and_can_be_verified(tmp_path: Path) -> None:
    manifest = publish(tmp_path / "step-000005")
    assert [file.path for file in manifest.content.files] == [
        "model.safetensors",
        "nested/loop.json",
    ]
    assert verify_artifact(tmp_path / "step-000005", digest=manifest.digest) == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000005"]


def test_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    first = publish(tmp_path / "a", attempt=1)
    second = publish(tmp_path / "b", attempt=7)
    assert first.digest == second.digest
    assert first.checksum != second.checksum
    assert publish(tmp_path / "c", "other").digest != first.digest


@pytest.mark.parametrize("existing", [False, True])
def test_power_cut_at_any_call_leaves_the_old_state_or_the_new(
    existing: bool, tmp_path: Path, cut_after: Callable[[int], None]
) -> None:
    """Also where the place is taken by something else: that is moved aside, not lost."""
    calls = 0
    finished = False
    while not finished:
        root = tmp_path / str(calls)
        root.mkdir()
        final = root / "output"
        old = publish(final, "old") if existing else None
        cut_after(calls)
        try:
            publish(final, "new", attempt=2)
            finished = True
        except PowerCutError:
            pass
        cut_after(-1)
        if final.exists():
            manifest = verify_artifact(final)
            if old is not None and manifest.digest != old.digest:
                assert verify_artifact(root / ".output.bad-1").digest == old.digest
        else:
            # Between moving the old one aside and the rename nothing stands there; both are kept.
            assert old is None or verify_artifact(root / ".output.bad-1").digest == old.digest
        # Whatever was left behind, the next attempt succeeds and cleans up.
        remove_drafts(root)
        again = publish(final, "new", attempt=3)
        assert verify_artifact(final).digest == again.digest
        assert not list(root.glob(".*.tmp"))
        shutil.rmtree(root)
        calls += 1
    assert calls > 20, "the shim saw too few calls to be in the way of a publish"


def test_power_cut_while_replacing_a_file_leaves_one_of_the_two(
    tmp_path: Path, cut_after: Callable[[int], None]
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    for calls in range(20):
        cut_after(calls)
        try:
            write_file_atomically(path, "new")
        except PowerCutError:
            cut_after(-1)
            assert path.read_text() in ("old", "new")
            continue
        cut_after(-1)
        break
    assert path.read_text() == "new"
    assert calls > 3


def damage_flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def damage_zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def damage_remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_zero, damage_remove])
@pytest.mark.parametrize("name", ["model.safetensors", "nested/loop.json", "manifest.json"])
def test_damage_is_found_and_the_file_named(
    damage: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    final = tmp_path / "output"
    publish(final)
    damage(final / name)
    with pytest.raises(ArtifactError, match=name) as caught:
        verify_artifact(final)
    assert caught.value.path == final / name


def test_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path: Path) -> None:
    final = tmp_path / "output"
    publish(final)
    path = final / names.MANIFEST_FILE
    sound = path.read_bytes()
    for position in range(0, len(sound), 7):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        with pytest.raises(ArtifactError, match="manifest"):
            read_manifest(final)


def test_swapped_folders_are_refused_by_name(tmp_path: Path) -> None:
    first = publish(tmp_path / "first", "one")
    publish(tmp_path / "second", "two")
    (tmp_path / "first").rename(tmp_path / "x")
    (tmp_path / "second").rename(tmp_path / "first")
    with pytest.raises(ArtifactError, match="first: is not the expected artifact"):
        verify_artifact(tmp_path / "first", digest=first.digest)


def test_swapped_files_between_two_artifacts_are_refused_by_name(tmp_path: Path) -> None:
    publish(tmp_path / "first", "one")
    publish(tmp_path / "second", "two")
    moved = tmp_path / "first" / "model.safetensors"
    (tmp_path / "second" / "model.safetensors").replace(moved)
    with pytest.raises(ArtifactError, match=r"first/model\.safetensors: is damaged"):
        verify_artifact(tmp_path / "first")


def test_newest_sound_checkpoint_counts_and_damaged_ones_are_moved_aside(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        publish(tmp_path / names.checkpoint_directory_name(step), step=step)
    damage_flip(tmp_path / "step-000015" / "model.safetensors")
    said: list[ArtifactError] = []
    found = newest_good_checkpoint(tmp_path, settings=SETTINGS, on_bad=said.append)
    assert found is not None
    assert found[0].name == "step-000010"
    assert [error.path.name for error in said] == ["model.safetensors"]
    assert (tmp_path / ".step-000015.bad-1").exists()


def test_checkpoint_of_another_stage_or_other_settings_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "step-000005", settings="b" * 64)
    said: list[ArtifactError] = []
    assert newest_good_checkpoint(tmp_path, settings=SETTINGS, on_bad=said.append) is None
    assert "another stage or was made with other settings" in str(said[0])


def test_two_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        publish(tmp_path / names.checkpoint_directory_name(step), step=step)
        prune_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000015", "step-000020"]


def test_only_the_newest_attempt_may_publish(tmp_path: Path) -> None:
    zombie = Fence(tmp_path / "fence", 1)
    zombie.check()
    Fence(tmp_path / "fence", 2).check()
    assert names.newest_attempt(tmp_path / "fence") == 2
    with pytest.raises(FencedError, match="attempt 2 has started"):
        zombie.check()
    with pytest.raises(FencedError):
        Fence(tmp_path / "fence", 1)
    final = tmp_path / "output"
    with pytest.raises(FencedError):
        publish_directory(
            final, writer("x"), content=content, provenance=provenance(), before_rename=zombie.check
        )
    assert not final.exists()


def test_full_disk_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "output"
    old = publish(final, "old")

    def fail(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        publish_directory(final, fail, content=content, provenance=provenance(2))
    assert verify_artifact(final).digest == old.digest
    assert not list(tmp_path.glob(".*.tmp")), "a full disk must not stay full of drafts"
