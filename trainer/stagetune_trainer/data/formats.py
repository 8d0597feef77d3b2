"""From a row's columns to the turns of a conversation.

Comes after `mapping` and before `template`. A row either fits or has a reason that its author can
act on.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from stagetune_trainer.data.json_stream import decoded_list
from stagetune_trainer.data.mapping import ColumnMapping
from stagetune_trainer.data.template import Turn

ROLES: Mapping[str, str] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
# Half of a pair: JSON can write it, UTF-8 and tokenizers cannot.
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRowError(Exception):
    """A row cannot be used; the message is the reason that the report shows."""


def read_turns(columns: Mapping[str, Any], mapping: ColumnMapping) -> list[Turn]:
    """Return the turns of a row; raises BadRowError with the reason where it has none."""
    turns = _system_turn(columns, mapping)
    if mapping.messages is not None:
        turns += _turns_of_messages(_value(columns, mapping.messages), mapping)
    else:
        turns += _turns_of_history(columns, mapping)
        turns += [
            Turn("user", _question(columns, mapping)),
            Turn("assistant", _text(columns, mapping.response)),
        ]
    _check_turns(turns)
    return turns


def _value(columns: Mapping[str, Any], column: str) -> Any:
    if column not in columns:
        raise BadRowError(f"has no column {column!r}")
    return decoded_list(columns[column])


def _text(columns: Mapping[str, Any], column: str | None) -> str:
    if column is None or column not in columns:
        raise BadRowError(f"has no column {column!r}")
    value = columns[column]
    if not isinstance(value, str):
        raise BadRowError(f"{column!r} is {_kind(value)}, not text")
    return value


def _optional_text(columns: Mapping[str, Any], column: str | None) -> str:
    if column is None or columns.get(column) is None:
        return ""
    return _text(columns, column)


def _question(columns: Mapping[str, Any], mapping: ColumnMapping) -> str:
    question = _text(columns, mapping.query)
    addition = _optional_text(columns, mapping.input)
    return f"{question}\n{addition}" if addition.strip() else question


def _system_turn(columns: Mapping[str, Any], mapping: ColumnMapping) -> list[Turn]:
    system = _optional_text(columns, mapping.system)
    return [Turn("system", system)] if system.strip() else []


def _turns_of_history(columns: Mapping[str, Any], mapping: ColumnMapping) -> list[Turn]:
    if mapping.history is None or not columns.get(mapping.history):
        return []
    history = _value(columns, mapping.history)
    turns = []
    for pair in history if isinstance(history, list) else [history]:
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or not all(isinstance(text, str) for text in pair)
        ):
            raise BadRowError(f"{mapping.history!r} is not a list of [question, answer] pairs")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _turns_of_messages(messages: Any, mapping: ColumnMapping) -> list[Turn]:
    if not isinstance(messages, list):
        raise BadRowError(f"{mapping.messages!r} is {_kind(messages)}, not a list of turns")
    return [
        _turn_of_message(message, number, mapping)
        for number, message in enumerate(messages, start=1)
    ]


def _turn_of_message(message: Any, number: int, mapping: ColumnMapping) -> Turn:
    if not isinstance(message, dict):
        raise BadRowError(f"turn {number} is {_kind(message)}, not an object")
    role, content = message.get(mapping.role_key), message.get(mapping.content_key)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRowError(
            f"turn {number} has the {mapping.role_key} {role!r}; known are {', '.join(ROLES)}"
        )
    if not isinstance(content, str):
        raise BadRowError(
            f"turn {number} has {_kind(content)} as its {mapping.content_key}, not text"
        )
    # Passed over, it would teach what its author marked as not to be learned.
    if message.get("weight") not in (None, 1) or message.get("loss") not in (None, True, 1):
        raise BadRowError(f"turn {number} has a weight of its own, which is not supported")
    return Turn(ROLES[role.lower()], content)


def _check_turns(turns: Sequence[Turn]) -> None:
    """Check the order of the turns and that none is empty; raises BadRowError."""
    talk = turns[1:] if turns and turns[0].role == "system" else turns
    if not talk:
        raise BadRowError("has no question and no answer")
    first_number = len(turns) - len(talk) + 1
    for index, turn in enumerate(talk):
        number = first_number + index
        expected = "assistant" if index % 2 else "user"
        if turn.role != expected:
            raise BadRowError(
                f"turn {number} is {_article(turn.role)} turn where {_article(expected)} turn is "
                "expected; user and assistant alternate, after at most one system turn"
            )
        if not turn.content.strip():
            what = "the answer" if turn.role == "assistant" else "the question"
            raise BadRowError(f"{what} is empty (turn {number})")
    if talk[-1].role != "assistant":
        raise BadRowError("the last turn is a user's, so there is no answer to learn")
    for turn in turns:
        if _SURROGATE.search(turn.content):
            raise BadRowError(f"the {turn.role} turn is not valid Unicode")


def _kind(value: Any) -> str:
    names = {type(None): "null", str: "text", dict: "an object", list: "a list", bool: "a boolean"}
    return names.get(type(value), f"a {type(value).__name__}")


def _article(role: str) -> str:
    return f"{'an' if role == 'assistant' else 'a'} {role}"
