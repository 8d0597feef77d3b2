"""The elements of one long JSON list, without holding the list."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_CHUNK_CHARACTERS = 1 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class NotAListError(ValueError):
    """The file is not JSON, or holds neither a list nor an object with the list `data`."""


def iterate_json(path: Path) -> Iterator[Any]:
    """Yield the elements of the list in `path`: the whole document, or the value of its key `data`.

    Holds one element and a megabyte of text at a time. Raises NotAListError, with the character at
    which reading stopped, when it gets to what it cannot read; UnicodeDecodeError likewise.
    """
    with path.open(encoding="utf-8-sig") as file:
        text = _Text(file)
        if text.peek() == "{":
            text.seek_data()
        text.expect("[")
        if text.peek() == "]":
            text.expect("]")
            return
        while True:
            yield text.value()
            if text.expect(",]") == "]":
                return


class _Text:
    """A JSON document that is read forward, a piece at a time."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._buffer = ""
        self._position = 0
        self._dropped = 0
        self._at_end = False

    def peek(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            blank = _BLANK.match(self._buffer, self._position)
            self._position = blank.end() if blank else self._position
            if self._position < len(self._buffer) or not self._read():
                return self._buffer[self._position : self._position + 1]

    def expect(self, characters: str) -> str:
        """Pass over one of `characters` and return it."""
        found = self.peek()
        if not found or found not in characters:
            raise self._error(f"expected one of {characters!r}, found {found!r}")
        self._position += 1
        return found

    def value(self) -> Any:
        """Pass over one JSON value and return it."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                if self._read():
                    continue
                raise self._error(error.msg) from error
            # A number that ends with the buffer may go on behind it.
            if end < len(self._buffer) or not self._read():
                self._position = end
                return value

    def seek_data(self) -> None:
        """Pass over an object's beginning up to the value of its key `data`."""
        self.expect("{")
        while True:
            key = self.value()
            self.expect(":")
            if key == "data":
                return
            self.value()
            if self.expect(",}") == "}":
                raise self._error("the object has no key 'data'")

    def _read(self) -> bool:
        """Append the next piece; False at the end of the file."""
        if self._at_end:
            return False
        # At least as much as is held already: a long value is then parsed a few times, not often.
        size = max(_CHUNK_CHARACTERS, len(self._buffer) - self._position)
        piece = self._file.read(size)
        self._at_end = not piece
        self._dropped += self._position
        self._buffer = self._buffer[self._position :] + piece
        self._position = 0
        return bool(piece)

    def _error(self, what: str) -> NotAListError:
        return NotAListError(f"{what} at character {self._dropped + self._position + 1}")


def decoded_list(value: Any) -> Any:
    """Return the list that a text column (of a CSV file, say) carries as JSON; else `value`."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
