"""Stagetune's images, built on this machine and handed to a node without an image registry.

buildah builds the Dockerfiles in a store of its own in the cache, on a base that debootstrap makes
of the machine's own Debian. Each state of the sources has a folder `images-KEY`, an OCI layout of
both images. It shares the layers with the folder before it, so a change of our code packs our code.
"""

import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import ssl
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from local_cluster.binaries import BinariesUnavailableError, cache_directory, provide_folder

REPOSITORY = Path(__file__).parents[3]
KINDS = ("operator", "trainer")
LIBRARIES = ("Dockerfile.operator", "Dockerfile.trainer", "uv.lock")
CODE = (".dockerignore", "pyproject.toml", "README.md", "LICENSE", "crds", *KINDS, "client")
BASE_VARIABLE = "STAGETUNE_TEST_BASE_IMAGE"
"""Names an image to build upon that can be pulled; without it debootstrap makes one."""
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
NOT_IN_BASE = (
    # What debootstrap takes over from this machine, then what nobody reads in an image.
    *("etc/apt/sources.list", "etc/resolv.conf", "etc/hostname", "var/log/bootstrap.log"),
    *("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"),
)
INDEX_VARIABLE = re.compile(
    "(UV|PIP)_(DEFAULT_INDEX|INDEX|INDEX_URL|EXTRA_INDEX_URL|INSECURE_HOST|TRUSTED_HOST"
    "|HTTP_TIMEOUT|DEFAULT_TIMEOUT)|UV_INDEX_[A-Z0-9_]+_(USERNAME|PASSWORD)"
)
NEEDED_BYTES = 16 * 10**9
"""The store, the layout and, where uv has none of it yet, uv's cache: 6.3, 2.9 and 6.1 GB."""
NEEDED_BYTES_FOR_CODE = 10**9
STEP_SECONDS = 3600
SCRATCH = "images-scratch-"
UV_CACHE = "/run/uv-cache"

Tell = Callable[[str], None]


class Image(NamedTuple):
    """An image in an OCI layout."""

    name: str
    """What a pod asks for."""
    layout: Path
    digest: str
    """Of its manifest: the same digest is the same image."""

    @property
    def full_name(self) -> str:
        """What a kubelet asks containerd for when a pod asks for `name`."""
        return f"docker.io/{self.name}"

    def write_archive(self, archive: Path, known: Collection[str] = ()) -> None:
        """Write the image as an OCI archive without the blobs whose digests are in `known`.

        `known` is what the containerd that imports it has (`ctr content list --quiet`). Whole, a
        trainer's archive has 3 GB; for one that has the image's libraries, half a megabyte. The
        archive has no name in it: given one here and by `ctr images import --index-name` as well,
        containerd would let the image expire.
        """
        manifest = _read(self.layout, self.digest)
        entry = {
            "mediaType": manifest["mediaType"],
            "digest": self.digest,
            "size": _blob(self.layout, self.digest).stat().st_size,
        }
        index = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
        header = tarfile.TarInfo("index.json")
        header.size = len(index)
        with tarfile.open(archive, "w") as file:
            file.add(self.layout / "oci-layout", "oci-layout")
            file.addfile(header, io.BytesIO(index))
            for digest in _digests(self.layout, self.digest):
                if digest not in known:
                    blob = _blob(self.layout, digest)
                    file.add(blob, str(blob.relative_to(self.layout)))


class Images(NamedTuple):
    """The images of one state of the sources."""

    operator: Image
    trainer: Image


class ImagesUnavailableError(BinariesUnavailableError):
    """This machine has no images and cannot build them; the text says why and what helps."""


def provide_images(tell: Tell) -> Images:
    """Return both images, building them first where they are not there yet.

    Raises ImagesUnavailableError if this machine cannot build them, and CalledProcessError with
    the builder's last words as a note if it can and a Dockerfile fails.
    """
    layout = provide_folder(images_directory(), partial(_make, tell=tell), tell)
    digests = {_name(entry): entry["digest"] for entry in _entries(layout)}
    return Images(*(Image(name, layout, digests[name]) for name in map(image_name, KINDS)))


def image_name(kind: str) -> str:
    """Return the name of the operator's or the trainer's image in tests."""
    return f"stagetune/{kind}:test"


def images_directory(sources: Path | None = None) -> Path:
    """Return the folder in which the images are, or will be once they are built.

    `sources` is the repository, or a copy of what is in its images.
    """
    key = hashlib.sha256(libraries_key(sources).encode())
    _add_files(key, sources or REPOSITORY, CODE)
    return cache_directory() / f"images-{key.hexdigest()[:12]}"


def libraries_key(sources: Path | None = None) -> str:
    """Return what tells apart the states of everything in the images except our code."""
    base = (os.environ.get(BASE_VARIABLE), BASE_PACKAGES, NOT_IN_BASE)
    key = hashlib.sha256(repr(base).encode())
    _add_files(key, sources or REPOSITORY, LIBRARIES)
    return key.hexdigest()


def read_settings() -> dict[str, str]:
    """Return where this machine's pip and uv take packages from, as environment variables."""
    found = {name: value for name, value in os.environ.items() if INDEX_VARIABLE.fullmatch(name)}
    pip = shutil.which("pip3") or shutil.which("pip")
    listed = _try([pip, "config", "list"]).stdout if pip else ""
    for name, value in re.findall(r"^\w+\.((?:extra-)?index-url)='(.*)'$", listed, re.MULTILINE):
        found.setdefault(f"PIP_{name.replace('-', '_').upper()}", value)
    if "PIP_INDEX_URL" in found and not {"UV_INDEX_URL", "UV_DEFAULT_INDEX"} & found.keys():
        found["UV_DEFAULT_INDEX"] = found["PIP_INDEX_URL"]
    if "PIP_EXTRA_INDEX_URL" in found and not {"UV_EXTRA_INDEX_URL", "UV_INDEX"} & found.keys():
        found["UV_INDEX"] = found["PIP_EXTRA_INDEX_URL"]
    return found


def format_settings() -> str:
    """Return the settings as the Dockerfiles read them from the secret `build-env`."""
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in read_settings().items()]
    return "".join(lines)


def _make(layout: Path, lock: int, tell: Tell) -> None:
    """Fill a folder with both images, and forget what is older than the folder before it."""
    for path in layout.parent.glob("images-*"):
        # What killed builds left: no other can be under way, for the lock is held.
        if path != layout and (path.name.startswith(SCRATCH) or path.suffix == ".tmp"):
            shutil.rmtree(path)
    older = [path.parent for path in layout.parent.glob("images-*/libraries")]
    older.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    key = libraries_key()
    only_code = any((path / "libraries").read_text() == key for path in older)
    needed = NEEDED_BYTES_FOR_CODE if only_code else NEEDED_BYTES
    if (free := shutil.disk_usage(layout).free) < needed:
        raise ImagesUnavailableError(
            f"building the images takes {needed / 1e9:.0f} GB and {layout.parent} has "
            f"{free / 1e9:.1f} GB left; free some, or set XDG_CACHE_HOME to a folder with more"
        )
    packed: dict[str, Any] = {}
    for path in older:
        packed |= _link_layers(path, layout)
    with tempfile.TemporaryDirectory(dir=layout.parent, prefix=SCRATCH) as scratch:
        sources = Path(scratch) / "sources"
        for file in _files(REPOSITORY, (*LIBRARIES, *CODE)):
            copy = sources / file.relative_to(REPOSITORY)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
        if images_directory(sources).name != layout.name.removesuffix(".tmp"):
            raise RuntimeError("the sources changed at this very moment; build the images again")
        builder = _Builder(Path(scratch), lock)
        base = os.environ.get(BASE_VARIABLE) or builder.provide_base(tell)
        for kind in KINDS:
            tell(f"building {image_name(kind)}")
            builder.build(kind, base, sources)
            _push(builder, image_name(kind), layout, packed)
            packed |= _packed_layers(layout)
        if not only_code:
            builder.run("rmi", "--prune")
    used = {name for entry in _entries(layout) for name in _digests(layout, entry["digest"])}
    for blob in (layout / "blobs/sha256").iterdir():
        if f"sha256:{blob.name}" not in used:
            blob.unlink()
    (layout / "libraries").write_text(key)
    for path in older[1:]:
        shutil.rmtree(path)


def buildah_command() -> list[str]:
    """Return how buildah is called upon the store in the cache; hold `images.lock` meanwhile."""
    store = cache_directory() / "containers"
    return ["buildah", f"--root={store}", f"--runroot={store / 'run'}"]


class _Builder:
    """buildah with a store that nothing else uses."""

    def __init__(self, scratch: Path, lock: int) -> None:
        self._scratch = scratch
        self._lock = lock
        self._command = buildah_command()
        self._install_programs()
        tried = _try([*self._command, "--storage-driver=overlay", "images"])
        # Without overlay every layer is a whole copy.
        self._command.append(f"--storage-driver={'overlay' if tried.returncode == 0 else 'vfs'}")
        # What an interrupted build left: no other can be under way, for the lock is held.
        self.run("rm", "--all")

    def run(self, *arguments: str) -> str:
        """Run buildah and return its output."""
        return self._run([*self._command, *arguments])

    def build(self, kind: str, base: str, sources: Path) -> None:
        """Build an image; its layers stay, and what did not change is taken from them."""
        cache = Path(os.environ.get("UV_CACHE_DIR") or cache_directory().parent / "uv")
        cache.mkdir(parents=True, exist_ok=True)
        secrets = {"build-env": self._scratch / "build-env"}
        secrets["build-env"].write_text(format_settings() + f"UV_CACHE_DIR={UV_CACHE}\n")
        authorities = os.environ.get("PIP_CERT") or ssl.get_default_verify_paths().cafile
        if authorities is not None:
            secrets["ca-bundle"] = Path(authorities)
        self.run(
            *("build", "--layers", "--isolation=chroot", "--network=host", "--format=oci"),
            *(f"--secret=id={name},src={path}" for name, path in secrets.items()),
            *(f"--build-arg=BASE_IMAGE={base}", f"--volume={cache}:{UV_CACHE}"),
            *("--file", str(sources / f"Dockerfile.{kind}"), f"--tag={image_name(kind)}"),
            str(sources),
        )

    def provide_base(self, tell: Tell) -> str:
        """Return the name of a base of this machine's Debian release, made where it is missing."""
        lines = _try(["apt-get", "indextargets", "--format=$(RELEASE) $(REPO_URI) $(COMPONENT)"])
        sources = [line.split() for line in lines.stdout.splitlines()]
        release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
        mirrors = [mirror for name, mirror, _ in sources if name == release]
        components = sorted({component for name, _, component in sources if name == release})
        if not mirrors:
            raise ImagesUnavailableError(
                f"apt has no source of the release {release!r} to make a base image of; set "
                f"{BASE_VARIABLE} to an image with Python 3.11 or newer that can be pulled"
            )
        key = hashlib.sha256(repr((BASE_PACKAGES, NOT_IN_BASE)).encode()).hexdigest()[:12]
        name = f"localhost/stagetune-base:{release}-{key}"
        if name not in self.run("images", "--format={{.Name}}:{{.Tag}}").split():
            tell(f"making a base image of {release}")
            container = self.run("from", "scratch").strip()
            root = Path(self.run("mount", container).strip())
            # In a name space of its own, so that no mount of it is left however it ends.
            command = ["unshare", "--mount", "debootstrap", "--variant=minbase"]
            command += [f"--include={BASE_PACKAGES}", f"--components={','.join(components)}"]
            self._prepare([*command, release, str(root), mirrors[0]])
            for path in (root / name for name in NOT_IN_BASE):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            self.run("commit", "--rm", "--format=oci", container, name)
        return name

    def _install_programs(self) -> None:
        if shutil.which("buildah") and shutil.which("debootstrap"):
            return
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise ImagesUnavailableError(
                "building the images takes root, buildah and debootstrap; as root, run "
                "`apt-get install buildah debootstrap`"
            )
        self._prepare(["apt-get", "update"])
        install = ["apt-get", "install", "--yes", "--no-install-recommends"]
        self._prepare([*install, "buildah", "debootstrap"])

    def _prepare(self, command: list[str]) -> None:
        try:
            self._run(command)
        except subprocess.CalledProcessError as error:
            raise ImagesUnavailableError(
                f"{' '.join(command)} failed: {' '.join(error.__notes__)}; it takes the package "
                f"mirrors of this machine's apt sources"
            ) from error

    def _run(self, command: Sequence[str]) -> str:
        """Run a program that keeps the lock for as long as it lives; return its output."""
        done = _try(command, self._lock, {"TMPDIR": str(self._scratch)})
        if done.returncode != 0:
            error = subprocess.CalledProcessError(done.returncode, command)
            error.add_note("\n".join(done.stderr.splitlines()[-15:]))
            raise error
        return done.stdout


def _try(
    command: Sequence[str], lock: int | None = None, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **(variables or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=STEP_SECONDS,
        pass_fds=[] if lock is None else [lock],
    )


def _push(builder: _Builder, name: str, layout: Path, packed: Mapping[str, Any]) -> None:
    """Add an image to `layout`, with the layers in `packed` as they were packed before.

    Packing the libraries takes minutes. Empty files stand in for those layers under the digest
    that they have unpacked: buildah takes them for the layers and writes only what is missing.
    """
    stand_ins = [_blob(layout, digest) for digest in packed]
    for path in stand_ins:
        path.touch()
    compression = ("--compression-format=zstd", "--compression-level=3")
    builder.run("push", "--format=oci", *compression, name, f"oci:{layout}:{name}")
    for path in stand_ins:
        path.unlink()
    entries = _entries(layout)
    entry = next(entry for entry in entries if _name(entry) == name)
    manifest = _read(layout, entry["digest"])
    manifest["layers"] = [packed.get(layer["digest"], layer) for layer in manifest["layers"]]
    content = json.dumps(manifest).encode()
    entry |= {"digest": f"sha256:{hashlib.sha256(content).hexdigest()}", "size": len(content)}
    _blob(layout, entry["digest"]).write_bytes(content)
    index = {"schemaVersion": 2, "manifests": entries}
    (layout / "index.json").write_text(json.dumps(index))


def _packed_layers(layout: Path) -> dict[str, Any]:
    """Return the layers of all images in `layout` by the digests that they have unpacked."""
    found: dict[str, Any] = {}
    for entry in _entries(layout):
        manifest = _read(layout, entry["digest"])
        config = _read(layout, manifest["config"]["digest"])
        found |= dict(zip(config["rootfs"]["diff_ids"], manifest["layers"], strict=True))
    return found


def _link_layers(older: Path, layout: Path) -> dict[str, Any]:
    """Have `layout` share the layers of an older one, and return them as `_packed_layers` does."""
    packed = _packed_layers(older)
    for layer in packed.values():
        blob = _blob(layout, layer["digest"])
        blob.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            blob.hardlink_to(_blob(older, layer["digest"]))
    return packed


def _entries(layout: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((layout / "index.json").read_text())["manifests"]
    return entries


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry["annotations"]["org.opencontainers.image.ref.name"])


def _digests(layout: Path, manifest_digest: str) -> list[str]:
    """Return the digests of an image's blobs: manifest, config, layers."""
    manifest = _read(layout, manifest_digest)
    described = [manifest["config"], *manifest["layers"]]
    return [manifest_digest, *dict.fromkeys(str(entry["digest"]) for entry in described)]


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def _read(layout: Path, digest: str) -> Any:
    return json.loads(_blob(layout, digest).read_bytes())


def _add_files(key: "hashlib._Hash", sources: Path, names: Sequence[str]) -> None:
    for file in _files(sources, names):
        content = file.read_bytes()
        key.update(f"{file.relative_to(sources)} {len(content)}\n".encode() + content)


def _files(sources: Path, names: Sequence[str]) -> list[Path]:
    found = [path for name in names for path in [sources / name, *(sources / name).rglob("*")]]
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


if __name__ == "__main__":
    print(format_settings(), end="")  # noqa: T201
