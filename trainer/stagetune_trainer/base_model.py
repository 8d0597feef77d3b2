"""The base model as one folder that every later step loads the same way.

Comes after `sources` and before `data`. Whatever the source, the result is an ordinary Hugging
Face folder: config, safetensors weights, tokenizer with its chat template, and our manifest. Its
name is made of its content, so runs share it and nothing in it can change unnoticed.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from stagetune_api.artifact import (
    ArtifactContent,
    ArtifactError,
    ArtifactKind,
    ArtifactManifest,
    Provenance,
    digest_of_file,
    digest_of_json,
    verify_artifact,
)
from stagetune_api.problems import ProblemReason
from stagetune_api.spec import ModelSpec
from stagetune_trainer.checkpoint import publish_directory, remove_drafts
from stagetune_trainer.data.template import ChatTemplate
from stagetune_trainer.errors import UserError
from stagetune_trainer.gguf_model import CONVERTER, convert_gguf
from stagetune_trainer.measure import measure_model
from stagetune_trainer.model_config import check_config, check_config_file
from stagetune_trainer.sources import GGUF_SUFFIX

_SOURCE_PATH = "spec.model.source"
_CONFIG_FILE = "config.json"
_GENERATION_CONFIG_FILE = "generation_config.json"
_CHAT_TEMPLATE_FILE = "chat_template.jinja"
_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_WEIGHTS_FILE = "model.safetensors"
# Taken by name and not by pattern: transformers loads what else may lie in a folder (an adapter,
# say) without being asked.
_OTHER_FILES = (
    _CONFIG_FILE,
    _GENERATION_CONFIG_FILE,
    _CHAT_TEMPLATE_FILE,
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A prepared base model."""

    directory: Path
    """Folder that holds it."""
    manifest: ArtifactManifest
    """The folder's manifest, checked."""
    was_reused: bool
    """Whether it had been prepared before."""


def prepare_base_model(
    spec: ModelSpec, source: Path, models_directory: Path, provenance: Provenance
) -> BaseModel:
    """Return the base model made of `source`, a folder of safetensors or a GGUF file.

    A sound one from an earlier run is used again, a damaged one is moved aside and made anew.
    Raises UserError where the source is not a decoder-only language model that can be loaded
    without running code from it.
    """
    files = _find_files(source)
    key = _key(files, spec)
    final = models_directory / key
    models_directory.mkdir(parents=True, exist_ok=True)
    with _lock(models_directory / f".{key}.lock"):
        try:
            manifest = verify_artifact(final, kind=ArtifactKind.BASE_MODEL)
        except ArtifactError:
            # Missing or damaged: publishing moves what is there aside.
            pass
        else:
            return BaseModel(directory=final, manifest=manifest, was_reused=True)
        remove_drafts(models_directory, key)
        manifest = publish_directory(
            final,
            lambda draft: _write(draft, files, spec),
            # No name: equal models have an equal digest, whatever the manifest calls them.
            content=lambda written: ArtifactContent(kind=ArtifactKind.BASE_MODEL, files=written),
            provenance=provenance,
        )
    return BaseModel(directory=final, manifest=manifest, was_reused=False)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `directory`; raises UserError where there is none that loads."""
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    # What a broken tokenizer raises depends on the file and the library that reads it.
    except Exception as error:
        raise UserError.at(
            _SOURCE_PATH,
            f"its tokenizer cannot be loaded ({type(error).__name__}: {str(error)[:300]}); the "
            "folder needs tokenizer.json and tokenizer_config.json as save_pretrained writes them",
        ) from error


def _find_files(source: Path) -> Mapping[str, Path]:
    """Return the files that the model is made of, by their name in the prepared folder."""
    if source.is_file():
        if source.suffix.lower() != GGUF_SUFFIX:
            raise UserError.at(
                _SOURCE_PATH,
                f"{source.name} is not a GGUF file; give a folder of safetensors or one .gguf file",
            )
        return {source.name: source}
    if not (source / _CONFIG_FILE).is_file():
        raise UserError.at(
            _SOURCE_PATH,
            f"{source} has no {_CONFIG_FILE}; give the folder that save_pretrained wrote, or one "
            ".gguf file",
            ProblemReason.NOT_FOUND,
        )
    check_config_file(source / _CONFIG_FILE)
    names = [*_OTHER_FILES, *_weight_files(source)]
    return {name: source / name for name in names if (source / name).is_file()}


def _weight_files(source: Path) -> list[str]:
    """Return the names of the files with weights that transformers would load, index included."""
    if (source / _SINGLE_WEIGHTS_FILE).is_file():
        return [_SINGLE_WEIGHTS_FILE]
    index = source / _INDEX_FILE
    if index.is_file():
        shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [name for name in shards if not (source / name).is_file()]
        if missing or not shards or any(Path(name).name != name for name in shards):
            raise UserError.at(
                _SOURCE_PATH,
                f"{index} names files that are not there ({', '.join(missing[:5])}); fetch the "
                "model again",
                ProblemReason.NOT_FOUND,
            )
        return [_INDEX_FILE, *shards]
    pickled = sorted(
        path.name for path in source.iterdir() if path.suffix in (".bin", ".pt", ".pth")
    )
    found = f" but {', '.join(pickled[:3])}, which can carry code" if pickled else ""
    raise UserError.at(
        _SOURCE_PATH,
        f"{source} has no safetensors weights{found}; load it where you trust it and write it with "
        "model.save_pretrained(folder), which writes safetensors",
        ProblemReason.INVALID if pickled else ProblemReason.NOT_FOUND,
    )


def _key(files: Mapping[str, Path], spec: ModelSpec) -> str:
    """Return the name of the prepared folder: what it is made of, and how."""
    content = {
        "files": {name: digest_of_file(path) for name, path in sorted(files.items())},
        "converter": CONVERTER,
        "chatTemplate": spec.chat_template,
    }
    return digest_of_json(content)[:16]


def _write(draft: Path, files: Mapping[str, Path], spec: ModelSpec) -> None:
    """Put the whole model into `draft`, checked as far as it can be without running it."""
    gguf = next((path for path in files.values() if path.suffix.lower() == GGUF_SUFFIX), None)
    if gguf is not None:
        convert_gguf(gguf, draft)
    else:
        for name, path in files.items():
            _link(path, draft / name)
    config = check_config(draft)
    measure_model(draft)
    if spec.chat_template is not None:
        _apply_chat_template(spec.chat_template, draft)
    template = ChatTemplate(load_tokenizer(draft))
    _let_generation_stop(draft, config, template.end_of_turn_id)


def _link(source: Path, target: Path) -> None:
    """Give `source` a second name, or copy it where the file system cannot."""
    # Hub caches hold symbolic links; the file behind them is what is wanted.
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _apply_chat_template(text: str, draft: Path) -> None:
    """Make `text` the tokenizer's only chat template."""
    for name in (_CHAT_TEMPLATE_FILE, "chat_template.json"):
        # Removed first: writing into a hard link would change the source.
        (draft / name).unlink(missing_ok=True)
    (draft / _CHAT_TEMPLATE_FILE).write_text(text, encoding="utf-8")


def _let_generation_stop(draft: Path, config: PreTrainedConfig, end_of_turn: int) -> None:
    """Put the token that ends a turn among those that end a generation.

    Without it a server never stops a model that was tuned with another template than its maker's.
    """
    path = draft / _GENERATION_CONFIG_FILE
    if path.exists():
        settings: dict[str, Any] = _read_json(path)
    else:
        # What transformers makes of the model's config where this file is missing.
        marks = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings = {name: getattr(config, name, None) for name in marks}
    known = settings.get("eos_token_id")
    stops = known if isinstance(known, list) else [] if known is None else [known]
    if end_of_turn in stops:
        return
    settings["eos_token_id"] = [*stops, end_of_turn]
    # Removed first: writing into a hard link would change the source.
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError.at(
            _SOURCE_PATH, f"{path} is not JSON ({error}); fetch the model again"
        ) from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process at a time prepare a model: runs share the folder and the draft's name."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
