"""Text that is replayed during training: from a source, or written by the base model itself.

Prepare tokenises it once, into rows that are no longer than the longest training row, so that what
is replayed needs no more memory than what is trained on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from stagetune_api.artifact import digest_of_file
from stagetune_api.problems import ProblemReason
from stagetune_api.stage import StageConfig
from stagetune_api.training_spec import GeneratedTextSpec
from stagetune_trainer.data.general import list_text_files, read_general_rows
from stagetune_trainer.data.order import Purpose
from stagetune_trainer.data.store import StoredRow
from stagetune_trainer.data.template import IGNORED
from stagetune_trainer.model import Numerics, choose_numerics, load_base
from stagetune_trainer.sources import Source, SourceKind

_SEQUENCES_AT_ONCE = 32
_SHORTEST_NEW_TEXT = 8
"""Tokens that are written before the model may end its text."""


class ReplayText(Protocol):
    """Where replayed rows come from."""

    @property
    def settings(self) -> dict[str, object]:
        """All that decides the text beside base model and seed, as JSON under `replay`."""

    def rows(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Iterator[StoredRow]:
        """Yield the rows, each of at most `max_length` tokens; every token but the first is a
        label."""


@dataclass(frozen=True, kw_only=True)
class TextFromSource:
    """Text of the user's."""

    source: Source
    files: list[Path]
    max_tokens: int

    @property
    def settings(self) -> dict[str, object]:
        """The files' content and how much of it is read."""
        files = [digest_of_file(file) for file in self.files]
        return {"replay": {"files": files, "maxTokens": self.max_tokens}}

    def rows(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Iterator[StoredRow]:
        """Yield passages; raises UserError for a line without text, or where there is none."""
        return read_general_rows(
            self.source,
            self.files,
            tokenizer,
            max_length=max_length,
            max_tokens=self.max_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class TextFromBase:
    """Text that the base model samples from nothing (as in LLM-QAT, arXiv 2305.17888).

    A text begins as the tokenizer begins any text; where that is with nothing, it begins with a
    token that is drawn evenly from the vocabulary. It ends where the model ends it.
    """

    spec: GeneratedTextSpec
    directory: Path
    """Folder of the base model."""
    digest: str
    numerics: Numerics
    seed: int

    @property
    def settings(self) -> dict[str, object]:
        """How much is sampled, how, and in which number format."""
        dtype = str(self.numerics.dtype)
        return {"replay": {**self.spec.model_dump(mode="json"), "dtype": dtype}}

    def rows(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Iterator[StoredRow]:
        """Yield texts of `spec.tokens` tokens in all; the same ones for the same seed."""
        model: Any = load_base(self.directory, self.digest, self.numerics).model
        beginnings = _beginnings(tokenizer, model.config.get_text_config().vocab_size, self.seed)
        left, number = self.spec.tokens, 0
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            while left > 1:
                prompts = [next(beginnings) for _ in range(_SEQUENCES_AT_ONCE)]
                for ids in self._continued(model, tokenizer, prompts, max_length):
                    ids = ids[:left]
                    if len(ids) < 2:
                        return
                    number += 1
                    left -= len(ids)
                    labels = [IGNORED, *ids[1:]]
                    yield StoredRow(input_ids=ids, labels=labels, file="generated", row=number)

    @torch.no_grad()
    def _continued(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[list[int]],
        max_length: int,
    ) -> list[list[int]]:
        """Return the prompts with what the model writes behind them, up to its end of text."""
        ends = _end_tokens(model, tokenizer)
        width = len(prompts[0])
        new_tokens = max_length - width
        inputs = torch.tensor(prompts, device=self.numerics.device)
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            min_new_tokens=min(_SHORTEST_NEW_TEXT, new_tokens),
            do_sample=True,
            num_beams=1,
            temperature=self.spec.temperature,
            # What the model's own generation_config may hold would narrow the distribution.
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=ends[0] if ends else 0,
            eos_token_id=ends or None,
        )
        return [_until_end(ids, ends, after=width) for ids in output.tolist()]


def find_replay_text(
    config: StageConfig,
    base_directory: Path,
    base_digest: str,
    *,
    resolve: Callable[[Source], Path],
    kept_apart: Sequence[Path],
) -> ReplayText | None:
    """Return where replayed text comes from, if anything is replayed.

    `kept_apart` are the files on which forgetting is measured. Raises UserError where one of them
    would be trained on, and for a source that cannot be had.
    """
    replay = config.protection.replay
    if replay is None:
        return None
    if replay.generated is not None:
        return TextFromBase(
            spec=replay.generated,
            directory=base_directory,
            digest=base_digest,
            numerics=choose_numerics(config.training.precision),
            seed=config.training.seed,
        )
    source = Source(
        uri=replay.source or "", path="spec.protection.replay.source", kind=SourceKind.TEXT
    )
    files = list_text_files(source, resolve(source))
    digests = {digest_of_file(file) for file in kept_apart}
    for file in files:
        if digest_of_file(file) in digests:
            raise source.error(
                f"{file.name} is a file of spec.evaluation.generalText too: text that is trained "
                "on measures no forgetting; give one of the two other text",
                ProblemReason.CONFLICT,
            )
    return TextFromSource(source=source, files=files, max_tokens=replay.max_tokens)


def _beginnings(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, seed: int
) -> Iterator[list[int]]:
    """Yield what texts begin with, for ever."""
    empty: list[int] = tokenizer("", return_attention_mask=False, verbose=False)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    beginning = [token for token in empty if token not in ends]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ordinary = [token for token in range(min(len(tokenizer), vocab_size)) if token not in special]
    random = np.random.RandomState([seed, Purpose.GENERATED_TEXT])
    while True:
        yield beginning or [ordinary[random.randint(len(ordinary))]]


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = model.generation_config.eos_token_id
    tokens = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*tokens, tokenizer.eos_token_id] if token is not None})


def _until_end(ids: list[int], ends: list[int], *, after: int) -> list[int]:
    """Return `ids` up to the first end of text behind the first `after` tokens, that included."""
    for index in range(after, len(ids)):
        if ids[index] in ends:
            return ids[: index + 1]
    return ids
