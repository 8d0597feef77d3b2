"""Images of one static program, as OCI archives made without a builder."""

import hashlib
import io
import json
import platform
import tarfile
from pathlib import Path
from typing import Any

USER = 65532
"""Who runs in an image unless the pod says otherwise."""
_TYPES = "application/vnd.oci.image"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


def build_image(program: Path, *arguments: str) -> tuple[bytes, str]:
    """Return an OCI archive with an image of `program` alone, which runs it, and its digest.

    The program is `/NAME-OF-THE-FILE` and the entrypoint; `arguments` are what it is given unless
    the pod says otherwise.
    """
    layer = _tar({program.name: program.read_bytes()}, mode=0o755)
    machine = platform.machine()
    config = {
        "architecture": _MACHINES.get(machine, machine),
        "os": "linux",
        "config": {
            "User": str(USER),
            "Entrypoint": [f"/{program.name}"],
            "Cmd": list(arguments),
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
    }
    blobs = {_digest(layer): layer}
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_TYPES}.manifest.v1+json",
        "config": _add(blobs, f"{_TYPES}.config.v1+json", config),
        "layers": [_descriptor(f"{_TYPES}.layer.v1.tar", layer)],
    }
    entry = _add(blobs, f"{_TYPES}.manifest.v1+json", manifest)
    files = {f"blobs/sha256/{digest[7:]}": content for digest, content in blobs.items()}
    files["index.json"] = _json({"schemaVersion": 2, "manifests": [entry]})
    files["oci-layout"] = _json({"imageLayoutVersion": "1.0.0"})
    return _tar(files, mode=0o644), entry["digest"]


def _add(blobs: dict[str, bytes], media_type: str, document: Any) -> dict[str, Any]:
    content = _json(document)
    blobs[_digest(content)] = content
    return _descriptor(media_type, content)


def _descriptor(media_type: str, content: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _digest(content), "size": len(content)}


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _json(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True).encode()


def _tar(files: dict[str, bytes], *, mode: int) -> bytes:
    """Return an archive that is the same for the same files, whenever it is made."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as file:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            file.addfile(entry, io.BytesIO(content))
    return output.getvalue()
