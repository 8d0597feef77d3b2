"""Stagetune's images: what they are made of, and where they lie for a node without a registry.

Each state of the sources has a folder `images-KEY` in the cache, an OCI layout of both images. It
shares the layers with the folder before it, so a change of our code packs our code.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from local_cluster.binaries import cache_directory, provide_folder
from local_cluster.image_builder import (
    BASE_PACKAGES,
    BASE_VARIABLE,
    NOT_IN_BASE,
    Builder,
    ImagesUnavailableError,
    Tell,
    format_settings,
)

REPOSITORY = Path(__file__).parents[3]
KINDS = ("operator", "trainer")
LIBRARIES = ("Dockerfile.operator", "Dockerfile.trainer", "uv.lock")
CODE = (".dockerignore", "pyproject.toml", "README.md", "LICENSE", "crds", *KINDS, "client")
NEEDED_BYTES = 26 * 10**9
"""At the peak, while buildah makes a layer of the trainer's libraries, with uv's cache full as
`make setup` leaves it: 24.6 GB were measured. 10 of them stay."""
NEEDED_BYTES_FOR_CODE = 10**9
SCRATCH = "images-scratch-"


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
        builder = Builder(Path(scratch), lock)
        base = os.environ.get(BASE_VARIABLE) or builder.provide_base(tell)
        for kind in KINDS:
            tell(f"building {image_name(kind)}")
            builder.build(sources / f"Dockerfile.{kind}", image_name(kind), base)
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


def _push(builder: Builder, name: str, layout: Path, packed: Mapping[str, Any]) -> None:
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
