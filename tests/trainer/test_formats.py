"""Four formats: how they are told apart, and why a row of one is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from stagetune_api.spec import ColumnsSpec, DataFormat
from stagetune_trainer.data.formats import BadRowError, read_turns
from stagetune_trainer.data.mapping import find_mapping
from stagetune_trainer.data.template import Turn
from stagetune_trainer.errors import UserError

Q, A = Turn("user", "Q"), Turn("assistant", "A")
SYSTEM = Turn("system", "S")
EARLIER = [Turn("user", "q"), Turn("assistant", "a")]


def _messages(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _share_gpt(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "data_format", "turns"),
    [
        (_messages(("user", "Q"), ("assistant", "A")), DataFormat.MESSAGES, [Q, A]),
        (
            _messages(("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "Q"))
            | {"id": 1, "prompt": "Q"},
            DataFormat.MESSAGES,
            None,
        ),
        (
            {
                "conversations": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A"},
                ]
            },
            DataFormat.MESSAGES,
            [Q, A],
        ),
        (
            {"messages": json.dumps(_messages(("user", "Q"), ("assistant", "A"))["messages"])},
            DataFormat.MESSAGES,
            [Q, A],
        ),
        (_share_gpt(("human", "Q"), ("gpt", "A")), DataFormat.SHARE_GPT, [Q, A]),
        (
            _share_gpt(("human", "Q"), ("gpt", "A")) | {"system": "S"},
            DataFormat.SHARE_GPT,
            [SYSTEM, Q, A],
        ),
        (
            _share_gpt(
                ("system", "S"), ("user", "q"), ("model", "a"), ("human", "Q"), ("GPT", "A")
            ),
            DataFormat.SHARE_GPT,
            [SYSTEM, *EARLIER, Q, A],
        ),
        ({"instruction": "Q", "input": "", "output": "A"}, DataFormat.ALPACA, [Q, A]),
        (
            {"instruction": "Q", "input": "more", "output": "A", "system": "S"},
            DataFormat.ALPACA,
            [SYSTEM, Turn("user", "Q\nmore"), A],
        ),
        (
            {"instruction": "Q", "input": None, "output": "A", "history": [["q", "a"]]},
            DataFormat.ALPACA,
            [*EARLIER, Q, A],
        ),
        ({"query": "Q", "response": "A"}, DataFormat.QUERY_RESPONSE, [Q, A]),
        (
            {"query": "Q", "response": "A", "history": '[["q", "a"]]', "system": None},
            DataFormat.QUERY_RESPONSE,
            [*EARLIER, Q, A],
        ),
        ({"question": "Q", "answer": "A"}, DataFormat.QUERY_RESPONSE, [Q, A]),
        ({"prompt": "Q", "completion": "A"}, DataFormat.QUERY_RESPONSE, [Q, A]),
        ({"input": "Q", "output": "A"}, DataFormat.QUERY_RESPONSE, [Q, A]),
    ],
)
def test_format_is_found_and_read(
    row: Mapping[str, Any], data_format: DataFormat, turns: list[Turn] | None
) -> None:
    mapping = find_mapping([row])
    assert mapping.format is data_format
    if turns is not None:
        assert read_turns(row, mapping) == turns


def test_mapping_shows_what_is_used_and_what_is_not() -> None:
    mapping = find_mapping([{"id": 1, "question": "Q", "answer": "A", "source": "x"}])
    assert mapping.model_dump(exclude_none=True) == {
        "format": "QueryResponse",
        "query": "question",
        "response": "answer",
        "unusedColumns": ["id", "source"],
    }


def test_columns_named_in_the_manifest_win() -> None:
    row = {"prompt": "x", "ask": "Q", "say": "A", "rules": "S", "answer": "x"}
    columns = ColumnsSpec(query="ask", response="say", system="rules")
    mapping = find_mapping([row], DataFormat.AUTO, columns)
    assert mapping.format is DataFormat.QUERY_RESPONSE
    assert read_turns(row, mapping) == [SYSTEM, Q, A]


def test_named_query_beats_a_column_of_messages() -> None:
    row = _messages(("user", "x"), ("assistant", "x")) | {"ask": "Q", "answer": "A"}
    mapping = find_mapping([row], DataFormat.AUTO, ColumnsSpec(query="ask"))
    assert read_turns(row, mapping) == [Q, A]


def test_named_input_makes_an_alpaca_row() -> None:
    row = {"task": "Q", "text": "more", "result": "A"}
    columns = ColumnsSpec(query="task", input="text", response="result")
    mapping = find_mapping([row], DataFormat.AUTO, columns)
    assert mapping.format is DataFormat.ALPACA
    assert read_turns(row, mapping)[0] == Turn("user", "Q\nmore")


def test_named_column_that_is_not_there_is_refused_at_its_path() -> None:
    with pytest.raises(UserError) as caught:
        find_mapping([{"question": "Q"}], DataFormat.AUTO, ColumnsSpec(query="ask", response="say"))
    assert [problem.path for problem in caught.value.problems] == [
        "spec.dataset.columns.query",
        "spec.dataset.columns.response",
    ]
    assert "question" in str(caught.value)


def test_format_that_is_wanted_is_not_replaced_by_another() -> None:
    with pytest.raises(UserError, match="do not make the format Messages"):
        find_mapping([{"question": "Q", "answer": "A"}], DataFormat.MESSAGES)


@pytest.mark.parametrize("row", [{"text": "x"}, {}, {"messages": []}, {"question": "Q"}])
def test_unknown_columns_are_shown_with_the_cure(row: Mapping[str, Any]) -> None:
    with pytest.raises(UserError, match=r"name them in spec\.dataset\.columns") as caught:
        find_mapping([row])
    assert all(column in str(caught.value) for column in row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "has no column 'messages'"),
        ({"messages": None}, "'messages' is null, not a list of turns"),
        ({"messages": "hello"}, "'messages' is text, not a list of turns"),
        ({"messages": []}, "has no question and no answer"),
        ({"messages": ["hi"]}, "turn 1 is text, not an object"),
        (_messages(("system", "S")), "has no question and no answer"),
        (_messages(("user", "Q")), "the last turn is a user's"),
        (_messages(("assistant", "A")), "turn 1 is an assistant turn where a user turn"),
        (
            _messages(("user", "Q"), ("user", "Q"), ("assistant", "A")),
            "turn 2 is a user turn where an assistant turn",
        ),
        (
            _messages(("user", "Q"), ("system", "S"), ("assistant", "A")),
            "turn 2 is a system turn where an assistant turn",
        ),
        (
            _messages(("system", "S"), ("user", "Q"), ("assistant", " \n")),
            "the answer is empty (turn 3)",
        ),
        (_messages(("user", ""), ("assistant", "A")), "the question is empty (turn 1)"),
        (_messages(("tool", "x"), ("assistant", "A")), "turn 1 has the role 'tool'; known are"),
        (_messages((None, "x"), ("assistant", "A")), "turn 1 has the role None"),
        (_messages(("user", None), ("assistant", "A")), "turn 1 has null as its content"),
        (_messages(("user", [{"type": "image"}]), ("assistant", "A")), "turn 1 has a list as its"),
        (_messages(("user", "Q"), ("assistant", 7)), "turn 2 has a int as its content, not text"),
        (_messages(("user", "Q\ud800"), ("assistant", "A")), "the user turn is not valid Unicode"),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A", "weight": 0},
                ]
            },
            "turn 2 has a weight of its own",
        ),
    ],
)
def test_bad_messages_have_a_reason(row: Mapping[str, Any], reason: str) -> None:
    mapping = find_mapping([_messages(("user", "Q"), ("assistant", "A"))])
    with pytest.raises(BadRowError) as caught:
        read_turns(row, mapping)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"query": "Q"}, "has no column 'response'"),
        ({"response": "A"}, "has no column 'query'"),
        ({"query": "Q", "response": None}, "'response' is null, not text"),
        ({"query": ["Q"], "response": "A"}, "'query' is a list, not text"),
        ({"query": "Q", "response": ""}, "the answer is empty (turn 2)"),
        ({"query": "Q", "response": "A", "system": 1}, "'system' is a int, not text"),
        ({"query": "Q", "response": "A", "history": ["x"]}, "'history' is not a list of [question"),
        ({"query": "Q", "response": "A", "history": "x"}, "'history' is not a list of [question"),
        ({"query": "Q", "response": "A", "history": [["q", ""]]}, "the answer is empty (turn 2)"),
    ],
)
def test_bad_query_response_rows_have_a_reason(row: Mapping[str, Any], reason: str) -> None:
    mapping = find_mapping([{"query": "Q", "response": "A", "system": "", "history": []}])
    with pytest.raises(BadRowError) as caught:
        read_turns(row, mapping)
    assert reason in str(caught.value)


def test_rows_of_the_documentation_are_read_as_it_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"^\| `(\w+)` \| `(\{.*\})` \|$", text, flags=re.MULTILINE)
    assert [name for name, _ in examples] == ["Messages", "ShareGPT", "Alpaca", "QueryResponse"]
    for name, row in examples:
        mapping = find_mapping([json.loads(row)])
        assert mapping.format == name
        assert len(read_turns(json.loads(row), mapping)) >= 2
