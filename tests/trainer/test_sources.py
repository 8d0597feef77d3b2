"""Sources: files, and both hubs' real clients against small servers on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from stagetune_trainer.errors import UserError
from stagetune_trainer.sources import Source, SourceKind, resolve_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "secret-token"
MODEL_FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 100,
    "tokenizer.json": b'{"a": 1}',
    "merges.txt": b"a b\n",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ x }}",
    "pytorch_model.bin": b"pickle",
    "modeling_custom.py": b"import os",
    "consolidated.safetensors": b"again",
    "original/params.json": b"{}",
    "small.gguf": b"GGUF",
    "README.md": b"# Model",
}
WANTED = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
}
DATA_FILES = {
    "data/train.jsonl": b'{"question": "Q", "answer": "A"}\n',
    "data/test.csv": b"question,answer\n",
    "extra/more.parquet": b"PAR1",
    "loader.py": b"import os",
    "README.md": b"# Data",
}
# Resolves each source of the list on standard input in one process, as prepare would.
SCRIPT = """
import json, sys
from pathlib import Path
from stagetune_trainer.errors import UserError
from stagetune_trainer.sources import Source, SourceKind, resolve_source
results = []
for wanted in json.load(sys.stdin):
    source = Source(
        uri=wanted["uri"], path="spec.model.source", kind=SourceKind(wanted["kind"]),
        revision=wanted.get("revision"), secret=wanted.get("secret"),
    )
    try:
        found = resolve_source(
            source, manifest_directory=Path(), cache_directory=Path(sys.argv[1])
        )
    except UserError as error:
        problem = error.problems[0]
        results.append({"path": problem.path, "message": problem.message})
    else:
        files = [found] if found.is_file() else [p for p in found.rglob("*") if p.is_file()]
        names = {p.relative_to(found).as_posix(): p.read_bytes().decode() for p in files}
        results.append({"found": str(found), "files": names})
print(json.dumps(results))
"""


@dataclass
class Hub:
    """What a hub's server holds, and what it was asked for."""

    models: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    datasets: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    """Files that nobody gets."""
    broken: bool = False
    """Whether every request gets a server error."""
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    address: str = ""

    def downloads(self) -> list[str]:
        """Names of the files whose content was sent."""
        return [request.removeprefix("GET ") for request in self.requests if "GET " in request]


class HubHandler(BaseHTTPRequestHandler):
    """What both hubs have in common."""

    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.hub.broken:
            self.send_body(b"broken", status=503)
        else:
            self.answer(urlsplit(self.path))

    def answer(self, url: Any) -> None:
        raise NotImplementedError

    def send_json(self, value: object, *, status: int = 200, headers: Any = None) -> None:
        self.send_body(json.dumps(value).encode(), status=status, headers=headers)

    def send_body(self, body: bytes, *, status: int = 200, headers: Any = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


class HuggingFaceHandler(HubHandler):
    """The part of the Hugging Face hub's API that its client calls."""

    def answer(self, url: Any) -> None:
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] == "api":
            self.answer_api(parts[1], "/".join(parts[2:4]), parts[4:])
            return
        kind = "models"
        if parts[0] == "datasets":
            kind, parts = "datasets", parts[1:]
        files = self.files_of(kind, "/".join(parts[:2]))
        name = "/".join(parts[4:])
        if files is None or parts[2] != "resolve":
            return
        if name not in files:
            self.send_error_code(404, "EntryNotFound")
            return
        if name in self.hub.refused and self.command == "GET":
            self.send_json({"error": "no"}, status=403)
            return
        self.hub.requests.append(f"{self.command} {name}")
        etag = hashlib.sha256(files[name]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self.send_body(files[name], headers=headers)

    def answer_api(self, kind: str, name: str, rest: list[str]) -> None:
        files = self.files_of(kind, name)
        if files is None:
            return
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", COMMIT):
            self.send_error_code(404, "RevisionNotFound")
        elif rest and rest[0] == "tree":
            entries = [
                {
                    "type": "file",
                    "path": path,
                    "size": len(body),
                    "oid": hashlib.sha1(body).hexdigest(),
                }
                for path, body in files.items()
            ]
            self.send_json(entries)
        else:
            siblings = [{"rfilename": path} for path in files]
            self.send_json({"id": name, "sha": COMMIT, "siblings": siblings, "tags": []})

    def files_of(self, kind: str, name: str) -> Mapping[str, bytes] | None:
        """Return the repository's files, or answer why there are none."""
        files = (self.hub.models if kind == "models" else self.hub.datasets).get(name)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name in self.hub.gated:
            self.send_error_code(403, "GatedRepo")
        elif files is None or (name in self.hub.private and not allowed):
            self.send_error_code(401 if not allowed else 404, "RepoNotFound")
        else:
            return files
        return None

    def send_error_code(self, status: int, code: str) -> None:
        self.send_json({"error": code}, status=status, headers={"X-Error-Code": code})


class ModelScopeHandler(HubHandler):
    """The part of ModelScope's API that its client calls."""

    def answer(self, url: Any) -> None:
        self.hub.tokens.add(self.headers.get("Cookie", ""))
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        parts = url.path.strip("/").split("/")
        kind, name, rest = parts[2], "/".join(parts[3:5]), "/".join(parts[5:])
        files = (self.hub.models if kind == "models" else self.hub.datasets).get(name)
        if files is None or query.get("Revision", "master") not in ("master", "v1"):
            self.send_json({"Code": 10010205001, "Message": "not found"}, status=404)
        elif rest in ("repo/files", "repo/tree"):
            entries = [
                {
                    "Path": path,
                    "Type": "blob",
                    "Size": len(body),
                    "Sha256": hashlib.sha256(body).hexdigest(),
                }
                for path, body in files.items()
            ]
            self.send_json({"Code": 200, "Data": {"Files": entries}, "Success": True})
        elif rest == "repo" and "FilePath" in query:
            self.hub.requests.append(f"{self.command} {query['FilePath']}")
            self.send_body(files[query["FilePath"]])
        else:
            self.send_json({"Code": 200, "Data": {"Path": name}, "Success": True})


def _serve(handler: type[HubHandler]) -> Iterator[Hub]:
    hub = Hub(
        models={"org/model": MODEL_FILES, "org/empty": {"README.md": b"x"}},
        datasets={"org/rows": DATA_FILES},
    )
    bound = type("Bound", (handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), bound) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


@pytest.fixture
def hugging_face() -> Iterator[Hub]:
    """A server that answers as the Hugging Face hub does."""
    yield from _serve(HuggingFaceHandler)


@pytest.fixture
def model_scope() -> Iterator[Hub]:
    """A server that answers as ModelScope does."""
    yield from _serve(ModelScopeHandler)


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`resolve(hub, source, ..., **environment)` in a process of its own.

    Both clients read their environment when they are imported, so each test needs a new process.
    """

    def run(hub: Hub, *sources: Mapping[str, Any], **environment: str) -> list[dict[str, Any]]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "MODELSCOPE_"))
        }
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "cache")],
            input=json.dumps(sources),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=inherited
            | {
                "HF_ENDPOINT": hub.address,
                "HF_HOME": str(tmp_path / "hf"),
                "MODELSCOPE_ENDPOINT": hub.address,
                "MODELSCOPE_HOME": str(tmp_path / "ms"),
                "MODELSCOPE_CACHE": str(tmp_path / "ms-cache"),
                "MODELSCOPE_API_MAX_RETRIES": "1",
                "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0",
                "NO_PROXY": "127.0.0.1",
            }
            | environment,
        )
        assert result.returncode == 0, result.stderr
        answers: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
        return answers

    return run


def _model(uri: str, **options: Any) -> dict[str, Any]:
    return {"uri": uri, "kind": "model", **options}


def _rows(uri: str, **options: Any) -> dict[str, Any]:
    return {"uri": uri, "kind": "rows", **options}


Resolve = Callable[..., list[dict[str, Any]]]


@pytest.mark.parametrize(
    "uri", ["file://./rows.jsonl", "file://rows.jsonl", "file://{}/rows.jsonl"]
)
def test_file_sources_count_from_the_manifest_or_from_the_root(uri: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    source = Source(uri=uri.format(tmp_path), path="spec.dataset.source", kind=SourceKind.ROWS)
    found = resolve_source(source, manifest_directory=tmp_path, cache_directory=tmp_path / "cache")
    assert found.samefile(tmp_path / "rows.jsonl")
    assert not (tmp_path / "cache").exists()


def test_file_that_is_not_there_is_named_with_path_and_cure(tmp_path: Path) -> None:
    source = Source(uri="file://./x.jsonl", path="spec.dataset.source", kind=SourceKind.ROWS)
    with pytest.raises(UserError) as caught:
        resolve_source(source, manifest_directory=tmp_path, cache_directory=tmp_path)
    message = str(caught.value)
    assert message.startswith("spec.dataset.source: file://./x.jsonl: there is no ")
    assert str(tmp_path / "x.jsonl") in message
    assert "counts from the manifest's folder" in message


def test_token_of_a_secret_is_sent_and_shown_to_nobody_else(
    hugging_face: Hub, resolve: Resolve, tmp_path: Path
) -> None:
    """Each source has a Secret of its own; a token that is none is not quoted."""
    hugging_face.private.add("org/model")
    secrets = tmp_path / "secrets"
    (secrets / "model").mkdir(parents=True)
    (secrets / "dataset").mkdir()
    (secrets / "model" / "token").write_text("an-old-token")
    (secrets / "dataset" / "token").write_text("wrong-token-of-data\nwith a second line")
    place = {"STAGETUNE_SECRETS_DIRECTORY": str(secrets)}
    old, without, broken = resolve(
        hugging_face,
        _model("hf://org/model", secret="model"),
        _model("hf://org/model"),
        _rows("hf://org/rows", secret="dataset"),
        **place,
    )
    assert "Bearer an-old-token" in hugging_face.tokens
    assert "set spec.model.secretName if it is private" in old["message"]
    assert "set HF_TOKEN if it is private" in without["message"]
    assert "the token in the Secret is no token" in broken["message"]
    assert not [text for text in ("an-old-token", "wrong") if text in f"{old}{without}{broken}"]
    (secrets / "model" / "token").write_text(f"{TOKEN}\n")
    (opened,) = resolve(hugging_face, _model("hf://org/model", secret="model"), **place)
    assert set(opened["files"]) == WANTED
    assert f"Bearer {TOKEN}" in hugging_face.tokens


def test_s3_sources_are_refused(tmp_path: Path) -> None:
    source = Source(uri="s3://bucket/x", path="spec.dataset.source", kind=SourceKind.ROWS)
    with pytest.raises(UserError, match="not supported"):
        resolve_source(source, manifest_directory=tmp_path, cache_directory=tmp_path)


def test_hugging_face_model_is_fetched_without_pickles_and_code(
    hugging_face: Hub, resolve: Resolve
) -> None:
    (result,) = resolve(hugging_face, _model("hf://org/model"))
    assert set(result["files"]) == WANTED
    assert result["files"]["merges.txt"] == "a b\n"
    assert set(hugging_face.downloads()) == WANTED
    assert hugging_face.tokens == {""}


def test_hugging_face_rows_and_single_files(hugging_face: Hub, resolve: Resolve) -> None:
    everything, folder, file, gguf = resolve(
        hugging_face,
        _rows("hf://org/rows", revision=COMMIT),
        _rows("hf://org/rows/data"),
        _rows("hf://org/rows/data/test.csv", revision="main"),
        _model("hf://org/model/small.gguf"),
    )
    assert set(everything["files"]) == {"data/train.jsonl", "data/test.csv", "extra/more.parquet"}
    assert set(folder["files"]) == {"train.jsonl", "test.csv"}
    assert file["found"].endswith("/data/test.csv")
    assert gguf["found"].endswith("/small.gguf")


def test_hugging_face_token_comes_from_the_environment(
    hugging_face: Hub, resolve: Resolve, tmp_path: Path
) -> None:
    hugging_face.private.add("org/model")
    # A token stored on the machine is not used.
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(TOKEN)
    (refused,) = resolve(hugging_face, _model("hf://org/model"))
    assert "set HF_TOKEN if it is private" in refused["message"]
    assert hugging_face.tokens == {""}
    (found,) = resolve(hugging_face, _model("hf://org/model"), HF_TOKEN=TOKEN)
    assert set(found["files"]) == WANTED


def test_hugging_face_download_goes_on_and_works_without_the_hub(
    hugging_face: Hub, resolve: Resolve
) -> None:
    hugging_face.refused.add("model.safetensors")
    (broken_off,) = resolve(hugging_face, _model("hf://org/model", revision=COMMIT))
    assert "does not open it" in broken_off["message"]
    hugging_face.refused.clear()
    (whole,) = resolve(hugging_face, _model("hf://org/model", revision=COMMIT))
    assert set(whole["files"]) == WANTED
    assert sorted(hugging_face.downloads()) == sorted(WANTED)
    (offline,) = resolve(hugging_face, _model("hf://org/model"), HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline["message"]
    (pinned,) = resolve(hugging_face, _model("hf://org/model", revision=COMMIT), HF_HUB_OFFLINE="1")
    assert set(pinned["files"]) == WANTED


def test_hugging_face_problems_have_a_path_and_a_cure(hugging_face: Hub, resolve: Resolve) -> None:
    hugging_face.gated.add("org/gated")
    results = resolve(
        hugging_face,
        _model("hf://org/nothing"),
        _model("hf://org/gated"),
        _model("hf://org/model", revision="v9"),
        _model("hf://org/empty"),
        _rows("hf://org/rows/nowhere.jsonl"),
        _model("hf://model"),
        _model("hf://org/model@main"),
        _model("hf://org/model/../other"),
    )
    messages = [result["message"] for result in results]
    assert "there is no such repository, or the token does not open it" in messages[0]
    assert "is gated; accept its terms" in messages[1]
    assert "has no revision 'v9'" in messages[2]
    assert "the repository has no files of the kinds" in messages[3]
    assert "the repository has no nowhere.jsonl" in messages[4]
    assert "write hf://org/name" in messages[5]
    assert "is not the name of a repository" in messages[6]
    assert "write hf://org/name" in messages[7]
    assert results[2]["path"] == "spec.model.revision"
    assert {result["path"] for result in results} == {"spec.model.source", "spec.model.revision"}


def test_hugging_face_hub_that_does_not_answer(hugging_face: Hub, resolve: Resolve) -> None:
    hugging_face.broken = True
    (broken,) = resolve(hugging_face, _model("hf://org/model"))
    assert "cannot be reached" in broken["message"]
    assert "set HF_ENDPOINT to a mirror" in broken["message"]
    (refused,) = resolve(Hub(address="http://127.0.0.1:9"), _model("hf://org/model"))
    assert "http://127.0.0.1:9 cannot be reached" in refused["message"]


def test_model_scope_model_and_rows_are_fetched(model_scope: Hub, resolve: Resolve) -> None:
    model, rows, file, tagged = resolve(
        model_scope,
        _model("ms://org/model"),
        _rows("ms://org/rows"),
        _rows("ms://org/rows/data/test.csv"),
        _model("ms://org/model", revision="v1"),
    )
    assert set(model["files"]) == WANTED
    assert model["files"]["merges.txt"] == "a b\n"
    assert set(rows["files"]) == {"data/train.jsonl", "data/test.csv", "extra/more.parquet"}
    assert file["found"].endswith("/data/test.csv")
    assert set(tagged["files"]) == WANTED
    fetched = set(model_scope.downloads())
    assert fetched == WANTED | {"data/train.jsonl", "data/test.csv", "extra/more.parquet"}


def test_model_scope_problems_have_a_path_and_a_cure(model_scope: Hub, resolve: Resolve) -> None:
    missing, revision, empty = resolve(
        model_scope,
        _model("ms://org/nothing"),
        _model("ms://org/model", revision="v9"),
        _model("ms://org/empty"),
    )
    assert "set MODELSCOPE_API_TOKEN if it is private" in missing["message"]
    assert "with the revision 'v9'" in revision["message"]
    assert "the repository has no files of the kinds" in empty["message"]
    (unreachable,) = resolve(Hub(address="http://127.0.0.1:9"), _model("ms://org/model"))
    assert "ModelScope cannot be reached" in unreachable["message"]


def test_model_scope_token_comes_from_the_environment(model_scope: Hub, resolve: Resolve) -> None:
    resolve(model_scope, _model("ms://org/model"), MODELSCOPE_API_TOKEN=TOKEN)
    assert any(TOKEN in cookie for cookie in model_scope.tokens)
