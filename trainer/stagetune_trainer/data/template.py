"""From a conversation to token ids and the labels of its answers.

Works on any chat template by rendering beginnings of the conversation and comparing them: what the
model is given before an answer must be, to the token, what it will be given when it is served. Only
the answers carry labels, each with the token that ends its turn; what a template puts behind that
token (ChatML's line break) is written by the server and not by the model, so it is not learned.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from stagetune_api.problems import ProblemReason
from stagetune_trainer.errors import UserError

IGNORED = -100
"""Label of a token that is not learned, as everywhere in the field."""

_PATH = "spec.model.chatTemplate"
# Templates that write today's date would give other tokens every day. Llama 3.1's own template
# falls back to this day.
_RENDER_DATE = date(2024, 7, 26)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(?P<format>[^'"]*)\1\s*\)""")
_PROBE_ANSWER = "Yes."


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """A conversation as the model sees it."""

    input_ids: list[int]
    """Token ids up to the end of the last answer."""
    labels: list[int]
    """The token's id where it is learned, -100 elsewhere; as long as `input_ids`."""
    prompt_ids: list[int]
    """Token ids of everything before the last answer, generation prompt included."""

    @property
    def num_answer_tokens(self) -> int:
        """Number of tokens that are learned."""
        return sum(label != IGNORED for label in self.labels)

    def cut(self, max_length: int) -> "EncodedRow":
        """Return the first `max_length` tokens of the row."""
        return EncodedRow(
            input_ids=self.input_ids[:max_length],
            labels=self.labels[:max_length],
            prompt_ids=self.prompt_ids,
        )


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of a row that are all learned or all not."""

    text: str
    learned: bool


class ChatTemplate:
    """A tokenizer's chat template, checked once and then applied to rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the template of `tokenizer`.

        Raises UserError at spec.model.chatTemplate where there is none, where it cannot be
        rendered, or where the tokens of an answer cannot be told from the rest.
        """
        self._tokenizer = tokenizer
        self.text = _template_of(tokenizer)
        self._frozen = _DATE_CALL.sub(
            lambda call: repr(_RENDER_DATE.strftime(call["format"])), self.text
        )
        special = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        if isinstance(tokenizer.eos_token, str) and isinstance(tokenizer.eos_token_id, int):
            special[tokenizer.eos_token] = tokenizer.eos_token_id
        self._special = re.compile(
            "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
            or r"(?!)"
        )
        self.end_of_turn = self._probe()
        self.end_of_turn_id = special[self.end_of_turn]

    @property
    def digest(self) -> str:
        """sha256 of the template's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def encode(self, turns: Sequence[Turn]) -> EncodedRow | str:
        """Return the row's tokens and labels, or the reason why this row cannot be used.

        `turns` end with an assistant's turn. Raises UserError where the template renders an earlier
        answer differently once the conversation goes on: no row of several answers can then be
        right.
        """
        if reason := self._find_special_token(turns):
            return reason
        try:
            text = self._render(turns)
            prompts = {
                index: self._render(turns[:index], prompt=True)
                for index, turn in enumerate(turns)
                if turn.role == "assistant"
            }
            self._check_earlier_answers(turns, text, prompts)
        except TemplateError as error:
            return f"the chat template refuses it: {error}"
        for turn in turns:
            if turn.content.strip() not in text:
                return f"the chat template changes the {turn.role} turn's text or leaves it out"
        input_ids = self._tokenize(text)
        labels = [IGNORED] * len(input_ids)
        prompt_ids: list[int] = []
        end = 0
        for index, prompt in prompts.items():
            if reason := self._find_trouble(turns[index], text, prompt):
                return reason
            prompt_ids = self._tokenize(prompt)
            start = len(prompt_ids)
            if input_ids[:start] != prompt_ids:
                return (
                    "the answer's first characters and the prompt's last ones make one token; "
                    "remove the white space at the answer's beginning"
                )
            end = input_ids.index(self.end_of_turn_id, start) + 1
            labels[start:end] = input_ids[start:end]
        return EncodedRow(input_ids=input_ids[:end], labels=labels[:end], prompt_ids=prompt_ids)

    def describe(self, row: EncodedRow) -> list[Piece]:
        """Return the row's text in pieces that are learned and pieces that are not."""
        pieces = []
        start = 0
        for end in range(1, len(row.labels) + 1):
            learned = row.labels[start] != IGNORED
            if end == len(row.labels) or (row.labels[end] != IGNORED) != learned:
                text = self._tokenizer.decode(row.input_ids[start:end], skip_special_tokens=False)
                pieces.append(Piece(text=str(text), learned=learned))
                start = end
        return pieces

    def _render(self, turns: Sequence[Turn], *, prompt: bool = False) -> str:
        text = self._tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in turns],
            chat_template=self._frozen,
            tokenize=False,
            add_generation_prompt=prompt,
        )
        if not isinstance(text, str):
            raise TypeError(f"a rendered conversation is a string, not {type(text).__name__}")
        return text

    def _tokenize(self, text: str) -> list[int]:
        # The template writes the beginning-of-text token where there is one.
        ids: list[int] = self._tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids

    def _check_earlier_answers(
        self, turns: Sequence[Turn], text: str, prompts: dict[int, str]
    ) -> None:
        """Check that each answer but the last reads the same as when it was the last one."""
        for index in list(prompts)[:-1]:
            end = text.find(self.end_of_turn, len(prompts[index])) + len(self.end_of_turn)
            alone = self._render(turns[: index + 1])
            if alone[:end] != text[:end] or not text.startswith(prompts[index]):
                raise UserError.at(
                    _PATH,
                    "the template renders an answer differently once the conversation goes on "
                    f"({_around_difference(alone, text)}), so rows with several answers cannot be "
                    "learned as they will be served; give a chatTemplate that renders every turn "
                    "the same wherever it stands, or data with one answer a row",
                )

    def _find_special_token(self, turns: Sequence[Turn]) -> str | None:
        """Return why the turns could forge others, or None if they cannot."""
        for turn in turns:
            if match := self._special.search(turn.content):
                return (
                    f"the {turn.role} turn holds {match[0]!r}, which the tokenizer uses as a sign"
                )
        return None

    def _find_trouble(self, turn: Turn, text: str, prompt: str) -> str | None:
        """Return why the answer cannot be found in the rendered text, or None if it can."""
        if not text.startswith(prompt):
            return "the chat template renders the turns before the answer differently with it"
        end = text.find(self.end_of_turn, len(prompt))
        if end < 0:
            return f"the chat template does not end the answer with {self.end_of_turn!r}"
        if turn.content.strip() not in text[len(prompt) : end]:
            return "the chat template does not put the answer behind its generation prompt"
        return None

    def _probe(self) -> str:
        """Render a small conversation and return the token that ends an assistant's turn."""
        question = Turn("user", "Is water wet?")
        try:
            prompt = self._render([question], prompt=True)
            text = self._render([question, Turn("assistant", _PROBE_ANSWER)])
        except TemplateError as error:
            raise _template_error(f"cannot be rendered: {error}") from error
        if not text.startswith(prompt) or _PROBE_ANSWER not in text[len(prompt) :]:
            raise _template_error(
                "does not continue its generation prompt with the answer "
                f"({_around_difference(prompt, text)})"
            )
        before, _, after = text[len(prompt) :].rpartition(_PROBE_ANSWER)
        end = self._special.search(after)
        if end is None:
            raise _template_error(
                "ends an assistant's turn without a special token, so a model tuned with it would "
                "never stop"
            )
        if self._special.search(before) or self._tokenize(text)[
            : len(self._tokenize(prompt))
        ] != self._tokenize(prompt):
            raise _template_error(
                "does not render the whole beginning of an assistant's turn when it is asked for a "
                "generation prompt"
            )
        return end[0]


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        template: Any = tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError.at(
            _PATH,
            "the tokenizer has no chat template, as is usual for a base model that was not tuned "
            "for chats; give one here (docs/data.md shows one)",
            ProblemReason.REQUIRED,
        ) from error
    return str(template)


def _template_error(what: str) -> UserError:
    return UserError.at(_PATH, f"the chat template {what}; give another one here")


def _around_difference(left: str, right: str) -> str:
    """Return a few characters of both texts from where they part."""
    start = next(
        (index for index, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]),
        min(len(left), len(right)),
    )
    return f"{left[start : start + 30]!r} against {right[start : start + 30]!r}"
