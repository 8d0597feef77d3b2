"""The images as they are handed to a node: who they run as, what is in them and what is not."""

import base64
import json
import re
import ssl
import subprocess
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow
import pytest

from local_cluster.binaries import cache_directory, hold_lock
from local_cluster.image_builder import ImagesUnavailableError, buildah_command, read_settings
from local_cluster.images import KINDS, REPOSITORY, Image, Images, provide_images

pytestmark = pytest.mark.cluster

CODE = "opt/stagetune/code/"
USER = 65532
STEP_SECONDS = 900
OPERATOR_BYTES = 100 * 10**6
"""61 MB when it was last measured, packed and with its base."""
TRAINER_BYTES = 3.5 * 10**9
"""2.9 GB when it was last measured."""
SETTINGS_FILES = ("pip.conf", "uv.toml", ".netrc", "sources.list", "build-env", "ca-bundle")
RUN = """\
set -e
mount --bind "$0" "$0"
mount -o remount,bind,ro "$0"
mount -t tmpfs tmpfs "$0/tmp"
mount -t proc proc "$0/proc"
mount --rbind /dev "$0/dev"
exec chroot --userspec=65532:65532 "$0" /usr/bin/env -i "$@"
"""
"""As a pod with a read-only root runs it; ends with every mount, for it has its own name space."""


class Content(NamedTuple):
    """What the layers of an image hold, also what a later layer hides."""

    sizes: dict[str, int]
    secrets: dict[str, str]
    """Where something of this machine is, and what."""
    not_public: list[str]
    """Files with a certificate that is not in Mozilla's list."""


@pytest.fixture(scope="module")
def images(tell: Callable[[str], None]) -> Images:
    """Both images; where nothing of them is there yet, that takes ten minutes."""
    try:
        return provide_images(tell)
    except ImagesUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=KINDS)
def image(request: pytest.FixtureRequest, images: Images) -> Image:
    """Each image."""
    found: Image = getattr(images, request.param)
    return found


@pytest.fixture(scope="module")
def content(image: Image) -> Content:
    """Everything in the image's layers, read once."""
    settings = read_settings()
    hosts = [urlsplit(word).hostname for value in settings.values() for word in value.split()]
    # Hosts of the lock itself are everybody's and lie in the images of any machine.
    lock = (REPOSITORY / "uv.lock").read_text()
    needles = {host.encode() for host in hosts if host and f"//{host}/" not in lock}
    needles |= {value.encode() for name, value in settings.items() if name.endswith("PASSWORD")}
    pattern = re.compile(b"|".join(map(re.escape, sorted(needles)))) if needles else None
    sizes, secrets, certificates = {}, {}, {}
    for name, size, read in files_of(image):
        sizes[name] = size
        if size > 2 * 10**6 or name.endswith((".so", ".pyc")):
            continue
        text = read()
        if pattern is not None and (found := pattern.search(text)):
            secrets[name] = found[0].decode()
        if b"BEGIN CERTIFICATE" in text:
            certificates[name] = certificates_in(text)
    public = set().union(
        *(found for name, found in certificates.items() if "ca-certificates/mozilla/" in name),
        *(found for name, found in certificates.items() if name.endswith("certifi/cacert.pem")),
    )
    mine = machine_certificates() - public
    return Content(sizes, secrets, [name for name, found in certificates.items() if found & mine])


def config_of(image: Image) -> dict[str, Any]:
    manifest = json.loads(blob(image, image.digest).read_bytes())
    config: dict[str, Any] = json.loads(blob(image, manifest["config"]["digest"]).read_bytes())
    return config


def blob(image: Image, digest: str) -> Path:
    return image.layout / "blobs" / digest.replace(":", "/")


def layers_of(image: Image) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = json.loads(blob(image, image.digest).read_bytes())["layers"]
    return layers


def files_of(image: Image) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Yield every file of every layer: its path, its size, and what reads it before the next."""
    for layer in layers_of(image):
        path = str(blob(image, layer["digest"]))
        with (
            pyarrow.input_stream(path, compression="zstd") as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            for member in archive:
                if member.isfile():
                    file = archive.extractfile(member)
                    assert file is not None
                    yield member.name, member.size, file.read


def certificates_in(text: bytes) -> set[bytes]:
    found = re.findall(rb"BEGIN CERTIFICATE-+\s+([A-Za-z0-9+/=\s]+?)-+END", text)
    return {base64.b64decode(one) for one in found}


def machine_certificates() -> set[bytes]:
    bundle = ssl.get_default_verify_paths().cafile
    return certificates_in(Path(bundle).read_bytes()) if bundle else set()


@contextmanager
def mounted(image: Image, tell: Callable[[str], None]) -> Iterator[Path]:
    """Mount the image where buildah has it; one it has no more is taken from the layout."""
    with hold_lock(cache_directory() / "images.lock", tell):
        manifest = json.loads(blob(image, image.digest).read_bytes())
        number = manifest["config"]["digest"].removeprefix("sha256:")
        kept = number in buildah("images", "--all", "--quiet", "--no-trunc")
        container = buildah("from", number if kept else f"oci:{image.layout}:{image.name}").strip()
        try:
            yield Path(buildah("mount", container).strip())
        finally:
            buildah("rm", container)


def buildah(*arguments: str) -> str:
    return subprocess.run(
        [*buildah_command(), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=STEP_SECONDS,
    ).stdout


def test_image_runs_its_program_as_nobody(image: Image) -> None:
    config = config_of(image)["config"]
    kind = image.name.removeprefix("stagetune/").removesuffix(":test")
    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] == ["python", "-m", f"stagetune_{kind}"]
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_nothing_of_the_build_is_in_the_environment_or_the_history(image: Image) -> None:
    config = config_of(image)
    names = {variable.partition("=")[0] for variable in config["config"]["Env"]}
    ours = {"PATH", "HOME", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "PYTHONSAFEPATH"}
    assert ours <= names
    assert not [name for name in names if re.search("INDEX|PROXY|CERT|CA_", name.upper())]
    history = json.dumps(config["history"])
    for value in read_settings().values():
        assert value not in history or value.isdigit()


def test_nothing_of_this_machine_is_in_the_files(image: Image, content: Content) -> None:
    assert content.secrets == {}
    assert content.not_public == []
    named = [name for name in content.sizes if PurePosixPath(name).name in SETTINGS_FILES]
    assert named == []
    left = ("run/", "tmp/", "root/.cache/", "src/", "dist/", "var/lib/apt/lists/")
    assert [name for name in content.sizes if name.startswith(left)] == []


def test_code_is_the_last_layer_and_compiled(image: Image, content: Content) -> None:
    assert layers_of(image)[-1]["size"] < 5 * 10**6
    sources = {name for name in content.sizes if name.endswith(".py") and name.startswith(CODE)}
    assert f"{CODE}stagetune_api/stage.py" in sources
    compiled = {name for name in content.sizes if name.endswith(".pyc")}
    for name in sources:
        path = PurePosixPath(name)
        start = f"{path.parent}/__pycache__/{path.stem}.cpython-"
        assert any(other.startswith(start) for other in compiled), name


def test_standard_library_is_compiled(content: Content) -> None:
    """Or every process in a pod would compile what it imports of it: nothing can be kept there."""
    library = re.compile(r"^usr/(local/)?lib/python3\.\d+/(asyncio/|json/|logging/)?[a-z_]+\.py$")
    sources = [PurePosixPath(name) for name in content.sizes if library.match(name)]
    assert {"argparse", "decoder"} <= {path.stem for path in sources}
    for path in sources:
        start = f"{path.parent}/__pycache__/{path.stem}.cpython-"
        assert any(other.startswith(start) and other.endswith(".pyc") for other in content.sizes)


def test_images_are_as_large_as_they_need_be(images: Images) -> None:
    operator, trainer = (sum(layer["size"] for layer in layers_of(one)) for one in images)
    assert operator < OPERATOR_BYTES
    assert trainer < TRAINER_BYTES


def test_operator_has_no_torch(image: Image, content: Content) -> None:
    packages = {name.rpartition("/site-packages/")[2].partition("/")[0] for name in content.sizes}
    is_trainer = image.name.startswith("stagetune/trainer")
    assert ("torch" in packages) == is_trainer
    assert ("kopf" in packages) == (not is_trainer)


def run_as_nobody(
    image: Image, program: str, tell: Callable[[str], None]
) -> "subprocess.CompletedProcess[str]":
    """Run a Python program in the image as a pod with a read-only root does."""
    config = config_of(image)["config"]
    python = [*config["Env"], config["Entrypoint"][0], "-c", program]
    with mounted(image, tell) as root:
        return subprocess.run(
            ["unshare", "--mount", "sh", "-c", RUN, str(root), *python],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=STEP_SECONDS,
        )


def test_program_works_as_nobody_with_a_read_only_root(
    image: Image, tell: Callable[[str], None]
) -> None:
    kind = image.name.removeprefix("stagetune/").removesuffix(":test")
    module = {"operator": "stagetune_operator.plan", "trainer": "stagetune_trainer.run"}[kind]
    program = f"""
import errno, os, tempfile
import {module}
assert os.getuid() == os.getgid() == {USER}
assert {module}.__file__.startswith("/{CODE}"), {module}.__file__
tempfile.TemporaryFile().close()
try:
    open("/opt/stagetune/new", "w")
except OSError as error:
    print(errno.errorcode[error.errno])
"""
    done = run_as_nobody(image, program, tell)
    assert (done.returncode, done.stdout) == (0, "EROFS\n"), done.stderr


def test_deepspeed_is_there_for_the_trainer_and_leaves_nothing_behind(
    images: Images, tell: Callable[[str], None]
) -> None:
    program = f"""
import os
import deepspeed
assert os.getuid() == {USER}
print(deepspeed.__version__, os.listdir("/tmp"))
"""
    done = run_as_nobody(images.trainer, program, tell)
    assert done.returncode == 0, done.stderr
    # It says first, on standard output, that it finds no GPU.
    lock = tomllib.loads((REPOSITORY / "uv.lock").read_text())
    (version,) = (one["version"] for one in lock["package"] if one["name"] == "deepspeed")
    assert done.stdout.splitlines()[-1] == f"{version} []"


def test_packages_of_the_trainer_have_what_they_require(
    images: Images, tell: Callable[[str], None]
) -> None:
    program = """
from importlib.metadata import distributions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
installed = {canonicalize_name(one.name): one for one in distributions()}
assert {"torch", "deepspeed", "ninja"} <= installed.keys()
for one in installed.values():
    for text in one.requires or ():
        needed = Requirement(text)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            found = installed.get(canonicalize_name(needed.name))
            if found is None or not needed.specifier.contains(found.version, prereleases=True):
                print(one.name, "requires", needed, "and finds", found and found.version)
"""
    done = run_as_nobody(images.trainer, program, tell)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
