"""Which column of the data is what: found from the first rows and from the manifest.

Comes after `rows` and before `formats`. It is decided once for all rows and shown in the report.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field

from stagetune_api.base import ApiModel
from stagetune_api.problems import Problem, ProblemReason
from stagetune_api.spec import ColumnsSpec, DataFormat
from stagetune_trainer.data.json_stream import decoded_list
from stagetune_trainer.errors import UserError

MESSAGES_COLUMNS = ("messages", "conversations", "conversation")
SYSTEM_COLUMNS = ("system", "system_prompt")
INSTRUCTION_COLUMNS = ("instruction",)
INPUT_COLUMNS = ("input",)
HISTORY_COLUMNS = ("history",)
QUERY_COLUMNS = ("query", "question", "prompt", "instruction", "problem", "input")
RESPONSE_COLUMNS = ("response", "answer", "completion", "output", "solution", "target")
# Where an answer stands in an Alpaca row; `response` and the others occur in its descendants.
OUTPUT_COLUMNS = ("output", *(name for name in RESPONSE_COLUMNS if name != "output"))

_PATH = "spec.dataset.format"


class ColumnMapping(ApiModel):
    """Which column of the data is what."""

    format: DataFormat
    """format of the rows."""
    messages: str | None = None
    """messages is the column with the list of turns."""
    role_key: str | None = None
    """roleKey is the key of a turn's role."""
    content_key: str | None = None
    """contentKey is the key of a turn's text."""
    system: str | None = None
    """system is the column with the system prompt."""
    query: str | None = None
    """query is the column with the question or instruction."""
    input: str | None = None
    """input is the column that follows the instruction."""
    response: str | None = None
    """response is the column with the answer."""
    history: str | None = None
    """history is the column with earlier question-answer pairs."""
    unused_columns: list[str] = Field(default_factory=list)
    """unusedColumns of the first rows that nothing is made of."""

    @property
    def columns(self) -> set[str]:
        """Columns that something is made of."""
        named = (
            self.messages,
            self.system,
            self.query,
            self.input,
            self.response,
            self.history,
        )
        return {column for column in named if column is not None}


def find_mapping(
    rows: Sequence[Mapping[str, Any]],
    wanted: DataFormat = DataFormat.AUTO,
    overrides: ColumnsSpec | None = None,
) -> ColumnMapping:
    """Return the format of `rows`, the first of the data, and which column is what.

    Raises UserError at spec.dataset where the format that is wanted, or any format, cannot be made
    of the columns that are there.
    """
    present = list(dict.fromkeys(column for row in rows for column in row))
    named = overrides or ColumnsSpec()
    _check_overrides(present, named)
    makers = {
        DataFormat.MESSAGES: _messages_mapping,
        DataFormat.SHARE_GPT: _share_gpt_mapping,
        DataFormat.ALPACA: _alpaca_mapping,
        DataFormat.QUERY_RESPONSE: _query_response_mapping,
    }
    candidates = list(makers) if wanted is DataFormat.AUTO else [wanted]
    for candidate in candidates:
        mapping = makers[candidate](rows, present, named)
        if mapping is not None:
            unused = [column for column in present if column not in mapping.columns]
            return mapping.model_copy(update={"unused_columns": unused})
    what = "any known format" if wanted is DataFormat.AUTO else f"the format {wanted}"
    raise UserError.at(
        _PATH,
        f"the columns {', '.join(present) or '(none)'} do not make {what}; name them in "
        "spec.dataset.columns or rename them (docs/data.md shows the four formats)",
    )


def _check_overrides(present: Sequence[str], named: ColumnsSpec) -> None:
    problems = [
        Problem(
            path=f"spec.dataset.columns.{field}",
            reason=ProblemReason.NOT_FOUND,
            message=f"the first rows have no column {column!r}, only {', '.join(present)}",
        )
        for field, column in named.model_dump(exclude_none=True, by_alias=True).items()
        if column not in present
    ]
    if problems:
        raise UserError(problems)


def _first(present: Iterable[str], named: str | None, usual: Iterable[str]) -> str | None:
    """Return the column that the manifest names, or the first usual one that is there."""
    if named is not None:
        return named
    there = set(present)
    return next((column for column in usual if column in there), None)


def _turn_lists(
    rows: Sequence[Mapping[str, Any]], present: Sequence[str], named: ColumnsSpec
) -> tuple[str, set[str]] | None:
    """Return the column with lists of turns and the keys of the first turn in it."""
    if named.messages is None and (named.query or named.response):
        return None
    column = _first(present, named.messages, MESSAGES_COLUMNS)
    if column is None:
        return None
    for row in rows:
        value = decoded_list(row.get(column))
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return column, set(value[0])
    return None


def _messages_mapping(
    rows: Sequence[Mapping[str, Any]], present: Sequence[str], named: ColumnsSpec
) -> ColumnMapping | None:
    return _turns_mapping(DataFormat.MESSAGES, ("role", "content"), rows, present, named)


def _share_gpt_mapping(
    rows: Sequence[Mapping[str, Any]], present: Sequence[str], named: ColumnsSpec
) -> ColumnMapping | None:
    return _turns_mapping(DataFormat.SHARE_GPT, ("from", "value"), rows, present, named)


def _turns_mapping(
    data_format: DataFormat,
    keys: tuple[str, str],
    rows: Sequence[Mapping[str, Any]],
    present: Sequence[str],
    named: ColumnsSpec,
) -> ColumnMapping | None:
    found = _turn_lists(rows, present, named)
    if found is None or not set(keys) <= found[1]:
        return None
    return ColumnMapping(
        format=data_format,
        messages=found[0],
        role_key=keys[0],
        content_key=keys[1],
        system=_first(present, named.system, SYSTEM_COLUMNS),
    )


def _alpaca_mapping(
    rows: Sequence[Mapping[str, Any]], present: Sequence[str], named: ColumnsSpec
) -> ColumnMapping | None:
    query = _first(present, named.query, INSTRUCTION_COLUMNS)
    response = _first(present, named.response, OUTPUT_COLUMNS)
    if query is None or response is None or (named.query is not None and named.input is None):
        return None
    return ColumnMapping(
        format=DataFormat.ALPACA,
        system=_first(present, named.system, SYSTEM_COLUMNS),
        query=query,
        input=_first(present, named.input, INPUT_COLUMNS),
        response=response,
        history=_first(present, named.history, HISTORY_COLUMNS),
    )


def _query_response_mapping(
    rows: Sequence[Mapping[str, Any]], present: Sequence[str], named: ColumnsSpec
) -> ColumnMapping | None:
    response = _first(present, named.response, RESPONSE_COLUMNS)
    others = [column for column in QUERY_COLUMNS if column != response]
    query = _first(present, named.query, others)
    if query is None or response is None:
        return None
    return ColumnMapping(
        format=DataFormat.QUERY_RESPONSE,
        system=_first(present, named.system, SYSTEM_COLUMNS),
        query=query,
        response=response,
        history=_first(present, named.history, HISTORY_COLUMNS),
    )
