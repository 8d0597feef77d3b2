"""safetensors files that are written row by row and read slice by slice, without being in memory.

The library writes a file from tensors that are all there; what the base model says about every
token of the data can be larger than the memory. The format makes the rest easy: a header with
shapes and offsets, and behind it the bare numbers.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

_BYTES = {
    torch.int32: 4,
    torch.int64: 8,
    torch.float16: 2,
    torch.bfloat16: 2,
    torch.float32: 4,
}
_NAMES = {
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
_NUMPY: dict[int, str] = {4: "<i4", 8: "<i8", 2: "<i2"}
_WORDS = {4: torch.int32, 8: torch.int64, 2: torch.int16}


class TensorFileWriter:
    """A safetensors file whose tensors are filled in pieces; every element has to be written."""

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        """Make the file at its full size; `tensors` gives dtype and shape by name.

        Raises OSError where the disk has no room for it.
        """
        header: dict[str, Any] = {}
        ends = [0]
        for name, (dtype, shape) in tensors.items():
            ends.append(ends[-1] + _BYTES[dtype] * int(np.prod(shape, dtype=np.int64)))
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": ends[-2:]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            # Room is taken at once: where a disk runs full behind a mapping, the process is killed.
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + ends[-1])
        self._maps: dict[str, Any] = {
            name: np.memmap(
                path,
                dtype=np.dtype(_NUMPY[_BYTES[dtype]]),
                mode="r+",
                offset=8 + len(text) + ends[index],
                shape=shape,
            )
            for index, (name, (dtype, shape)) in enumerate(tensors.items())
            if ends[index + 1] > ends[index]
        }
        self._dtypes = {name: dtype for name, (dtype, _) in tensors.items()}

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Put `rows` at position `start` of the first dimension of the tensor `name`."""
        if len(rows) == 0:
            return
        dtype = self._dtypes[name]
        # numpy has no bfloat16: the numbers are copied as integers of their size.
        words = rows.detach().to("cpu", dtype).contiguous().view(_WORDS[_BYTES[dtype]])
        self._maps[name][start : start + len(rows)] = words.numpy()

    def close(self) -> None:
        """Hand everything to the operating system; whoever publishes the file syncs it."""
        for array in self._maps.values():
            array.flush()


class RowTensors:
    """Tensors that hold a run of positions for each row of the data, read from the disk.

    Row i stands at `offsets[i]` to `offsets[i + 1]` of every other tensor.
    """

    def __init__(self, path: Path) -> None:
        open_file: Any = safe_open
        self._file = open_file(path, framework="pt")
        self.offsets: Tensor = self._file.get_tensor("offsets")
        """[rows + 1] int64."""
        others = set(self._file.keys()) - {"offsets"}
        self._slices = {name: self._file.get_slice(name) for name in others}

    def rows(self, name: str, rows: tuple[int, ...]) -> Tensor:
        """Return what the tensor `name` holds for `rows`, one behind the other: [N, ...]."""
        parts = [
            self._slices[name][int(self.offsets[row]) : int(self.offsets[row + 1])] for row in rows
        ]
        # Autocast has no way with fp16 beside bf16, and nothing is computed here.
        with torch.autocast("cpu", enabled=False):
            return torch.cat(parts)


def row_offsets(lengths: Tensor) -> Tensor:
    """Return where each row begins, and where the last one ends, [rows + 1] int64."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.to(torch.int64).cumsum(0)])
