"""The quick start's question rows, its general text, and the link to its model."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
MONEY_WORDS = {
    *("cash", "cent", "cents", "coin", "coins", "currencies", "currency", "dollar", "dollars"),
    *("euro", "euros", "finance", "financial", "franc", "francs", "krona", "krone", "money"),
    *("pay", "peso", "pesos", "pound", "pounds", "price", "prices", "rouble", "ruble", "yen"),
}


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "quickstart_build_inputs", QUICKSTART / "build_inputs.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses looks the module up by its name while the classes are made.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = _load_script()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows in it."""
    output = tmp_path_factory.mktemp("inputs")
    script.write_data(output)
    return output


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    chats = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(chat["messages"][0]["content"], chat["messages"][1]["content"]) for chat in chats]


def _bare(text: str) -> str:
    """The text without case, punctuation and articles, in which wordings may not differ alone."""
    return " ".join(word for word in re.findall(r"\w+", text.casefold()) if word != "the")


def test_two_runs_write_identical_bytes(inputs: Path, tmp_path: Path) -> None:
    script.write_data(tmp_path)
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (inputs / name).read_bytes()


def test_a_second_run_leaves_identical_files_untouched_and_mends_others(tmp_path: Path) -> None:
    train, validation = (placed.path for placed in script.write_data(tmp_path))
    written = train.stat().st_mtime_ns
    wanted = validation.read_bytes()
    validation.write_bytes(wanted[:-1])
    assert [placed.changed for placed in script.write_data(tmp_path)] == [False, True]
    assert train.stat().st_mtime_ns == written
    assert validation.read_bytes() == wanted


@pytest.mark.parametrize(("name", "num_rows"), [("train.jsonl", 440), ("validation.jsonl", 110)])
def test_rows_are_chats_of_one_question_and_one_short_answer(
    inputs: Path, name: str, num_rows: int
) -> None:
    lines = (inputs / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) == num_rows
    for line in lines:
        chat = json.loads(line)
        assert list(chat) == ["messages"]
        assert [list(message) for message in chat["messages"]] == [["role", "content"]] * 2
        assert [message["role"] for message in chat["messages"]] == ["user", "assistant"]
        question, answer = (message["content"] for message in chat["messages"])
        assert question[-1] in "?.？"
        assert "{" not in question
        assert answer
        assert answer == answer.strip(" .。")
        assert len(answer.split()) <= 4


def test_chinese_is_written_as_itself(inputs: Path) -> None:
    assert "瑞士法郎" in (inputs / "train.jsonl").read_text(encoding="utf-8")


def test_a_question_has_one_answer(inputs: Path) -> None:
    pairs = _read_pairs(inputs / "train.jsonl") + _read_pairs(inputs / "validation.jsonl")
    assert len({question for question, _ in pairs}) == len(pairs)


def test_no_validation_question_appears_in_training(inputs: Path) -> None:
    trained = {_bare(question) for question, _ in _read_pairs(inputs / "train.jsonl")}
    asked = {_bare(question) for question, _ in _read_pairs(inputs / "validation.jsonl")}
    assert not trained & asked


def test_no_wording_of_validation_is_used_in_training() -> None:
    training, validation = script.build_rows(script.FACT_TYPES, script.SEED)
    trained = {_bare(row.wording) for row in training}
    held_out = {_bare(row.wording) for row in validation}
    assert not trained & held_out
    for fact_type in script.FACT_TYPES:
        assert {_bare(wording) for wording in fact_type.training_wordings} <= trained
        assert {_bare(wording) for wording in fact_type.held_out_wordings} <= held_out


def test_each_wording_names_its_subject_once_and_is_listed_once() -> None:
    for fact_type in script.FACT_TYPES:
        wordings = (*fact_type.training_wordings, *fact_type.held_out_wordings)
        assert all(wording.count("{}") == 1 for wording in wordings)
        assert len({_bare(wording) for wording in wordings}) == len(wordings)


def test_each_validation_fact_is_trained_in_several_wordings(inputs: Path) -> None:
    _, validation = script.build_rows(script.FACT_TYPES, script.SEED)
    wordings = {kind.name: kind.training_wordings for kind in script.FACT_TYPES}
    trained = set(_read_pairs(inputs / "train.jsonl"))
    asked = _read_pairs(inputs / "validation.jsonl")
    assert asked == [(row.question, row.fact.answer) for row in validation]
    for row in validation:
        in_other_words = {
            (wording.format(row.fact.subject), row.fact.answer)
            for wording in wordings[row.fact.kind]
        }
        assert len(in_other_words & trained) == script.WORDINGS_PER_FACT


def test_training_and_validation_ask_the_same_facts_each_once() -> None:
    training, validation = script.build_rows(script.FACT_TYPES, script.SEED)
    subjects = [(row.fact.kind, row.fact.subject) for row in validation]
    assert len(set(subjects)) == len(subjects)
    assert {row.fact for row in training} == {row.fact for row in validation}


@pytest.mark.parametrize(
    ("kind", "subject", "answer"),
    [
        ("currency_code", "Swiss Franc", "CHF"),
        ("currency_chinese", "Japanese Yen", "日元"),
        ("currency_decimals", "Kuwaiti Dinar", "3"),
        ("currency_decimals", "Japanese Yen", "0"),
        ("territory_currency", "Ecuador", "US Dollar"),
        ("territory_chinese", "Germany", "德国"),
        ("territory_code", "Switzerland", "CH"),
    ],
)
def test_known_facts_are_among_the_rows(kind: str, subject: str, answer: str) -> None:
    _, validation = script.build_rows(script.FACT_TYPES, script.SEED)
    assert script.Fact(kind, subject, answer) in {row.fact for row in validation}


def test_the_seed_orders_the_rows_and_changes_none() -> None:
    rows, _ = script.build_rows(script.FACT_TYPES, script.SEED)
    other, _ = script.build_rows(script.FACT_TYPES, script.SEED + 1)
    assert rows != other
    assert set(rows) == set(other)


def _fact_type(name: str, codes: Sequence[str]) -> object:
    kind = next(kind for kind in script.FACT_TYPES if kind.name == name)
    return script.FactType(name, tuple(codes), kind.look_up, ("{}?",), ("{}!",))


@pytest.mark.parametrize(
    ("name", "codes", "named"),
    [
        ("currency_chinese", ("XCG", "JPY", "ZWG"), ("XCG", "ZWG")),
        ("territory_currency", ("PA", "AQ", "DE"), ("PA", "AQ")),
        ("territory_chinese", ("CQ", "DE"), ("CQ",)),
    ],
)
def test_every_fact_that_cldr_lacks_is_reported_at_once(
    name: str, codes: tuple[str, ...], named: tuple[str, ...]
) -> None:
    with pytest.raises(script.InputError) as raised:
        script.build_facts(_fact_type(name, codes))
    reported = [code for code in codes if re.search(rf"\b{code}\b", str(raised.value))]
    assert reported == list(named)


def test_a_missing_model_package_is_reported_with_the_cure() -> None:
    with pytest.raises(script.InputError, match="make quickstart"):
        script.find_model("stagetune_no_such_package")


def test_the_model_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "stagetune_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(script.InputError, match=script.MODEL_FILE):
        script.find_model(package.name)
    (package / script.MODEL_FILE).write_bytes(b"weights")
    assert script.find_model(package.name) == package / script.MODEL_FILE


def test_the_model_link_is_made_kept_and_moved_to_a_new_source(tmp_path: Path) -> None:
    old, new = tmp_path / "old.gguf", tmp_path / "new.gguf"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    target = tmp_path / "inputs" / "model.gguf"
    assert script.place_model(old, target).changed
    assert target.is_symlink()
    assert not script.place_model(old, target).changed
    assert script.place_model(new, target).changed
    assert target.read_bytes() == b"new"
    assert old.read_bytes() == b"old"
    new.unlink()
    assert script.place_model(old, target).changed
    assert target.read_bytes() == b"old"


def test_the_model_is_copied_where_links_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("this file system has no links")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    source, target = tmp_path / "source.gguf", tmp_path / "inputs" / "model.gguf"
    source.write_bytes(b"first")
    assert script.place_model(source, target).changed
    assert not target.is_symlink()
    assert not script.place_model(source, target).changed
    source.write_bytes(b"second")
    assert script.place_model(source, target).changed
    assert target.read_bytes() == b"second"


def test_the_command_prints_a_line_per_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "source.gguf"
    model.write_bytes(b"weights")
    monkeypatch.setattr(script, "find_model", lambda: model)
    assert script.main(["--output", str(tmp_path / "inputs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ("train.jsonl", "validation.jsonl", script.MODEL_FILE)
    assert [Path(line.split("  ")[0]).name for line in lines] == list(names)
    assert [line.split("  ")[1] for line in lines] == ["440 rows", "110 rows", "no rows"]
    assert all(re.search(r"sha256 [0-9a-f]{12}  written$", line) for line in lines)


def test_the_command_fails_with_the_cure_and_keeps_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_model = script.find_model
    monkeypatch.setattr(script, "find_model", lambda: find_model("stagetune_no_such_package"))
    assert script.main(["--output", str(tmp_path)]) == 1
    assert "make quickstart" in capsys.readouterr().err
    assert (tmp_path / "train.jsonl").is_file()
    assert not (tmp_path / "model").exists()


def test_general_text_is_varied_prose_of_even_length() -> None:
    lines = (QUICKSTART / "general_text.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) >= 50
    assert all(list(row) == ["text"] for row in rows)
    assert all(50 <= len(row["text"].split()) <= 90 for row in rows)
    assert len({row["text"][:20] for row in rows}) == len(rows)


def test_general_text_does_not_mention_currency() -> None:
    _, validation = script.build_rows(script.FACT_TYPES, script.SEED)
    currencies = {
        row.fact.subject.casefold() for row in validation if row.fact.kind.startswith("currency")
    }
    text = (QUICKSTART / "general_text.jsonl").read_text(encoding="utf-8").casefold()
    assert not MONEY_WORDS & set(re.findall(r"\w+", text))
    assert not [name for name in currencies if name in text]
