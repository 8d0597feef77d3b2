"""The images' recipes, what decides whether they are built anew, and how they are handed over."""

import difflib
import hashlib
import io
import json
import os
import re
import tarfile
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from local_cluster import image_builder, images
from local_cluster.image_builder import ImagesUnavailableError, read_settings
from local_cluster.images import (
    KINDS,
    REPOSITORY,
    Image,
    images_directory,
    libraries_key,
    provide_images,
)

BUILDAH = '''\
#!/usr/bin/env python3
"""As buildah pushes: a layer that is there under its unpacked digest is taken as it is."""
import hashlib, json, os, sys
from pathlib import Path

arguments = [one for one in sys.argv[1:] if not one.startswith(("--root=", "--runroot="))]
with open(os.environ["CALLS"], "a") as calls:
    print(*arguments, file=calls)
if "push" in arguments:
    layout, name = arguments[-1].removeprefix("oci:").split(":", 1)
    blobs = Path(layout, "blobs/sha256")
    blobs.mkdir(parents=True, exist_ok=True)

    def add(content):
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"digest": f"sha256:{digest}", "size": len(content)}

    layers, unpacked = [], []
    for content in (b"libraries of " + name.encode(), os.environ["CODE"].encode()):
        digest = hashlib.sha256(content).hexdigest()
        unpacked.append(f"sha256:{digest}")
        there = (blobs / digest).exists()
        layers.append({"digest": unpacked[-1], "size": 1} if there else add(b"packed " + content))
    config = add(json.dumps({"rootfs": {"diff_ids": unpacked}}).encode())
    manifest = {"mediaType": "manifest", "config": config, "layers": layers}
    entry = add(json.dumps(manifest).encode())
    entry["annotations"] = {"org.opencontainers.image.ref.name": name}
    index = Path(layout, "index.json")
    entries = json.loads(index.read_text())["manifests"] if index.exists() else []
    index.write_text(json.dumps({"manifests": [*entries, entry]}))
    Path(layout, "oci-layout").write_text("{}")
'''


def tell_nobody(_: str) -> None:
    """Whoever waits for a test need not know."""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository whose images a pretended buildah builds, with an empty cache."""
    folder = tmp_path / "repository"
    for name in (*images.LIBRARIES, *images.CODE):
        path = folder / name / "module.py" if (REPOSITORY / name).is_dir() else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("buildah", BUILDAH), ("debootstrap", ""), ("pip3", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for name in filter(image_builder.INDEX_VARIABLE.fullmatch, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("CODE", "first")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv(image_builder.BASE_VARIABLE, "base")
    monkeypatch.setattr(images, "REPOSITORY", folder)
    monkeypatch.setattr(images, "NEEDED_BYTES", 0)
    monkeypatch.setattr(images, "NEEDED_BYTES_FOR_CODE", 0)
    return folder


def dockerfile(kind: str) -> str:
    return (REPOSITORY / f"Dockerfile.{kind}").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_image_runs_its_program_as_nobody_of_the_machine(kind: str) -> None:
    last_stage = dockerfile(kind).rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", last_stage, re.M) == ["65532:65532"]
    assert f'ENTRYPOINT ["python", "-m", "stagetune_{kind}"]' in last_stage
    assert "RUN " not in last_stage


@pytest.mark.parametrize("kind", KINDS)
def test_recipe_names_no_host_and_one_public_base(kind: str) -> None:
    assert "://" not in dockerfile(kind)
    assert re.findall(r"^ARG BASE_IMAGE=(.*)$", dockerfile(kind), re.M) == ["python:3.12-slim"]
    secrets = dockerfile(kind).count("--mount=type=secret,id=build-env --mount=type=secret,id=ca-")
    assert secrets == len(
        re.findall(r"uv build|uv pip install --python|venv /opt/uv", dockerfile(kind))
    )


def test_recipes_differ_in_what_they_are_for_alone() -> None:
    lines = []
    for kind in KINDS:
        text = re.sub(rf"(--extra |tagetune[_ ]){kind}", r"\1KIND", dockerfile(kind))
        lines.append([line for line in text.splitlines()[1:] if "image.description" not in line])
    changed = [line for line in difflib.ndiff(*lines) if line[0] in "-+"]
    deepspeed = re.compile("deepspeed|--require-hashes|--build-constraints", re.IGNORECASE)
    assert [line for line in changed if not deepspeed.search(line)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_all_python_code_is_compiled_for_a_root_that_is_read_only(kind: str) -> None:
    text = dockerfile(kind)
    assert "PYTHONDONTWRITEBYTECODE=1" in text
    # Libraries and our code by uv, the standard library by itself. No file's date counts, for who
    # unpacks an image may not keep it.
    assert text.count("PYC_INVALIDATION_MODE=UNCHECKED_HASH") == text.count("--compile-bytecode")
    assert text.count("--compile-bytecode") == 2
    assert (
        'compile_dir(get_path("stdlib")' in text.partition("\nFROM dependencies AS compiled\n")[2]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_libraries_are_those_of_the_lock_and_only_deepspeed_is_built(kind: str) -> None:
    (install,) = re.findall(r"uv pip install --python (?:.*\\\n)*.*", dockerfile(kind))
    words = install.replace("\\\n", " ").split()
    given = "/opt/stagetune/requirements.txt"
    assert "--require-hashes" in words
    assert words[words.index("--requirements") + 1] == given
    if kind == "operator":
        assert "--no-build" in words
    else:
        assert "--only-binary :all: --no-binary deepspeed" in " ".join(words)
        assert words[words.index("--build-constraints") + 1] == given


def test_lock_names_one_public_index_and_wheels_of_all_but_deepspeed() -> None:
    lock = tomllib.loads((REPOSITORY / "uv.lock").read_text())
    packages = [package for package in lock["package"] if "registry" in package["source"]]
    (index,) = {urlsplit(package["source"]["registry"]).hostname for package in packages}
    files = [one for package in packages for one in package.get("wheels", [package.get("sdist")])]
    (files_host,) = {urlsplit(file["url"]).hostname for file in files}
    # Mirrors of companies are under other domains, if they have a domain at all.
    assert str(index).endswith(".org")
    assert str(files_host).endswith(".org")
    assert [one["name"] for one in packages if not one.get("wheels")] == ["deepspeed"]


def test_uv_is_the_one_of_the_makefile() -> None:
    found = re.search(r"^UV_VERSION := (\S+)$", (REPOSITORY / "Makefile").read_text(), re.M)
    assert found is not None
    for kind in KINDS:
        assert f"\nARG UV_VERSION={found[1]}\n" in dockerfile(kind)


def test_version_is_the_one_of_the_distribution() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for kind in KINDS:
        assert f'org.opencontainers.image.version="{project["version"]}"' in dockerfile(kind)


def test_context_is_what_decides_the_images() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert let_in == {*images.CODE, "uv.lock"} - {".dockerignore"}


@pytest.mark.parametrize("name", ["trainer/module.py", "crds/module.py", "pyproject.toml"])
def test_change_of_our_code_keeps_the_libraries(repository: Path, name: str) -> None:
    directory, key = images_directory(), libraries_key()
    (repository / name).write_text("changed\n")
    assert images_directory() != directory
    assert libraries_key() == key


@pytest.mark.parametrize("name", ["uv.lock", "Dockerfile.trainer", "Dockerfile.operator"])
def test_change_of_the_lock_or_a_recipe_changes_both_keys(repository: Path, name: str) -> None:
    directory, key = images_directory(), libraries_key()
    (repository / name).write_text("changed\n")
    assert images_directory() != directory
    assert libraries_key() != key


def test_what_is_not_in_the_images_changes_nothing(repository: Path) -> None:
    directory = images_directory()
    (repository / "trainer/__pycache__").mkdir()
    (repository / "trainer/__pycache__/module.pyc").touch()
    (repository / "docs").mkdir()
    (repository / "docs/page.md").touch()
    assert images_directory() == directory


def test_renamed_module_changes_the_images(repository: Path) -> None:
    directory = images_directory()
    (repository / "client/module.py").rename(repository / "client/other.py")
    assert images_directory() != directory


def layers_of(image: Image) -> list[str]:
    manifest = json.loads(blob_of(image, image.digest).read_bytes())
    return [layer["digest"] for layer in manifest["layers"]]


def blob_of(image: Image, digest: str) -> Path:
    return image.layout / "blobs/sha256" / digest.removeprefix("sha256:")


def test_images_are_built_once(repository: Path, tmp_path: Path) -> None:
    built = provide_images(tell_nobody)
    assert provide_images(tell_nobody) == built
    assert [image.name for image in built] == ["stagetune/operator:test", "stagetune/trainer:test"]
    assert (tmp_path / "calls").read_text().count(" --layers ") == 2
    for image in built:
        assert image.layout == images_directory()
        contents = [blob_of(image, digest).read_bytes() for digest in layers_of(image)]
        assert contents == [b"packed libraries of " + image.name.encode(), b"packed first"]


def test_changed_code_packs_our_code_alone(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = provide_images(tell_nobody).trainer
    (repository / "trainer/module.py").write_text("changed\n")
    monkeypatch.setenv("CODE", "second")
    after = provide_images(tell_nobody).trainer
    assert after.digest != before.digest
    libraries, code = layers_of(after)
    assert libraries == layers_of(before)[0]
    assert blob_of(after, libraries).samefile(blob_of(before, libraries))
    assert blob_of(after, code).read_bytes() == b"packed second"
    used = {after.digest, *layers_of(after)}
    left = {f"sha256:{path.name}" for path in (after.layout / "blobs/sha256").iterdir()}
    assert used < left
    assert layers_of(before)[1] not in left
    for digest in left:
        assert digest == f"sha256:{hashlib.sha256(blob_of(after, digest).read_bytes()).hexdigest()}"


def test_folders_before_the_last_and_those_of_killed_builds_are_removed(
    repository: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache/stagetune"
    for name in ("images-0123456789ab.tmp", "images-scratch-x", "containerd-v1"):
        (cache / name).mkdir(parents=True)
    folders = []
    for text in ("one", "two", "three"):
        (repository / "trainer/module.py").write_text(text)
        folders.append(provide_images(tell_nobody).trainer.layout)
    kept = {path.name for path in cache.iterdir() if path.is_dir()}
    assert kept == {"containerd-v1", *(path.name for path in folders[1:])}


def test_change_during_the_build_is_for_the_next_one(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings_of_a_machine_where_somebody_writes_code() -> dict[str, str]:
        (repository / "crds/new.py").touch()
        return {}

    monkeypatch.setattr(
        image_builder, "read_settings", settings_of_a_machine_where_somebody_writes_code
    )
    directory = images_directory()
    assert provide_images(tell_nobody).trainer.layout == directory != images_directory()
    assert str(repository) not in (tmp_path / "calls").read_text()


def test_package_index_reaches_the_build_as_a_secret(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = tmp_path / "bin/pip3"
    pip.write_text("#!/bin/sh\necho \"global.index-url='mirror-of-pip'\"\n")
    monkeypatch.setenv("UV_INDEX_INTERNAL_PASSWORD", "it's secret")
    assert read_settings() == {
        "PIP_INDEX_URL": "mirror-of-pip",
        "UV_DEFAULT_INDEX": "mirror-of-pip",
        "UV_INDEX_INTERNAL_PASSWORD": "it's secret",
    }
    monkeypatch.setenv("UV_DEFAULT_INDEX", "mirror-of-uv")
    assert read_settings()["UV_DEFAULT_INDEX"] == "mirror-of-uv"
    provide_images(tell_nobody)
    calls = (tmp_path / "calls").read_text()
    assert "--secret=id=build-env,src=" in calls
    assert "mirror" not in calls
    assert "it's" not in calls
    assert not list((tmp_path / "cache/stagetune").glob("images-scratch-*"))


def test_too_little_disk_is_told_before_the_build(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "NEEDED_BYTES", 2**70)
    with pytest.raises(ImagesUnavailableError, match="GB left; free some"):
        provide_images(tell_nobody)
    assert not (tmp_path / "calls").exists()


def test_machine_that_cannot_build_is_told_what_to_do(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImagesUnavailableError, match="apt-get install buildah debootstrap"):
        provide_images(tell_nobody)


def test_archive_leaves_out_what_the_reader_has(repository: Path, tmp_path: Path) -> None:
    image = provide_images(tell_nobody).trainer
    archive = tmp_path / "archive.tar"
    image.write_archive(archive)
    with tarfile.open(archive) as file:
        whole = file.getnames()
        index = json.load(file.extractfile("index.json") or io.BytesIO())
    assert [entry["digest"] for entry in index["manifests"]] == [image.digest]
    known = layers_of(image)[0]
    image.write_archive(archive, known={known})
    with tarfile.open(archive) as file:
        missing = set(whole) - set(file.getnames())
    assert missing == {f"blobs/sha256/{known.removeprefix('sha256:')}"}
