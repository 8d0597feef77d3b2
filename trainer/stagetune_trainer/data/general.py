"""Text that is not trained on, cut into rows on which forgetting is measured."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from stagetune_trainer.data.rows import Row, read_json_lines
from stagetune_trainer.data.store import StoredRow
from stagetune_trainer.data.template import IGNORED
from stagetune_trainer.sources import TEXT_SUFFIXES, Source

_TEXT_COLUMN = "text"


def list_text_files(source: Source, root: Path) -> list[Path]:
    """Return `root`, or the text files in the folder `root`; raises UserError for none."""
    candidates = [root] if root.is_file() else sorted(root.rglob("*"))
    files = [path for path in candidates if path.suffix.lower() in TEXT_SUFFIXES]
    if not files:
        raise source.error(f"{root} is or has no {', '.join(TEXT_SUFFIXES)} file")
    return files


def read_general_rows(
    source: Source,
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_tokens: int,
) -> Iterator[StoredRow]:
    """Yield passages as rows of at most `max_length` tokens, up to `max_tokens` in all.

    Every token is a label but the first of a row, which nothing predicts. A passage begins as the
    tokenizer begins any text (with its beginning-of-text token, where it has one). Raises UserError
    for a line without text, or where there is no text at all.
    """
    left = max_tokens
    found = False
    for path in files:
        for row in _read_passages(source, path):
            text = (row.columns or {}).get(_TEXT_COLUMN)
            if not isinstance(text, str):
                reason = row.reason or f"has no text in the column {_TEXT_COLUMN!r}"
                raise source.error(f"{row.file}:{row.number} {reason}; mend or remove the line")
            ids: list[int] = tokenizer(text, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            ids = ids[:left]
            for start in range(0, len(ids), max_length):
                chunk = ids[start : start + max_length]
                if len(chunk) > 1:
                    found = True
                    labels = [IGNORED, *chunk[1:]]
                    yield StoredRow(input_ids=chunk, labels=labels, file=row.file, row=row.number)
            left -= len(ids)
            if left <= 1:
                return
    if not found:
        raise source.error("holds no text; give text of at least a few sentences")


def _read_passages(source: Source, path: Path) -> Iterator[Row]:
    if path.suffix.lower() == ".jsonl":
        return read_json_lines(path, path.name)
    return _read_plain_text(source, path)


def _read_plain_text(source: Source, path: Path) -> Iterator[Row]:
    """Yield the passages of a text file, which blank lines part, with their first line's number."""
    lines: list[str] = []
    first = 1
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    first = first if lines else number
                    lines.append(line)
                elif lines:
                    yield Row(file=path.name, number=first, columns={_TEXT_COLUMN: _joined(lines)})
                    lines = []
    except UnicodeDecodeError as error:
        raise source.error(f"{path.name} is not UTF-8 ({error}); convert it") from error
    if lines:
        yield Row(file=path.name, number=first, columns={_TEXT_COLUMN: _joined(lines)})


def _joined(lines: Sequence[str]) -> str:
    return "".join(lines).strip()
