"""The prefix cache: hidden states at a stage's lower border, kept on the run's volume.

Below the border nothing trains any more, so a row's states there are the same in every pass over
it. They are computed once: from the states at the border of an earlier stage, through the layers
between the two, where those are there, and from the tokens otherwise. Like every reference the
cache is verified before it is used and computed anew where anything is wrong with it.
"""

import errno
import importlib.metadata
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stagetune_api.artifact import ArtifactKind, digest_of_json
from stagetune_api.stage import StageConfig
from stagetune_trainer.checkpoint import Fence
from stagetune_trainer.data.batch import collate
from stagetune_trainer.data.store import RowReader, Split
from stagetune_trainer.metrics import ProgressLog
from stagetune_trainer.model import Numerics, StageOutput
from stagetune_trainer.prefix.states import HIDDEN, CachedStates, rows_at_once
from stagetune_trainer.prefix.window import LayerWindow
from stagetune_trainer.protect.teacher import batches_of
from stagetune_trainer.references import Reference, ReferenceFolder
from stagetune_trainer.tensor_file import RowTensors, TensorFileWriter, row_offsets

_NAME = "prefix-{}"
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
_SECONDS_BETWEEN_MESSAGES = 30.0


@dataclass(frozen=True, kw_only=True)
class CachedRows:
    """The rows of one split whose states a stage looks at."""

    rows: RowReader
    indices: list[int]

    def batches(self, size: int) -> list[tuple[int, ...]]:
        """Return the indices in groups of `size` rows of like length."""
        return batches_of(self.rows, self.indices, size)


class PrefixCache:
    """The cache of one run, as a stage finds and leaves it."""

    def __init__(
        self,
        directory: Path,
        config: StageConfig,
        numerics: Numerics,
        fence: Fence,
        log: ProgressLog,
        *,
        rows: Mapping[Split, CachedRows],
        outputs: Sequence[StageOutput],
        before_batch: Callable[[], None] = lambda: None,
    ) -> None:
        """`outputs` are those of all finished stages; `before_batch` may raise to give up."""
        self._directory = directory
        self._config = config
        self._numerics = numerics
        self._fence = fence
        self._log = log
        self._rows = rows
        self._outputs = outputs
        self._before_batch = before_batch
        self._folder = ReferenceFolder(directory, config, numerics, fence, log)
        self._at_once = rows_at_once(numerics.device, config.training.micro_batch_size)

    def highest_sound(self, first: int) -> int:
        """Return the highest border up to `first` whose states are there and sound; 0 for none."""
        borders = sorted((border for border in self._borders() if border <= first), reverse=True)
        return next((border for border in borders if self._folder.has(self._reference(border))), 0)

    def obtain(self, window: LayerWindow, first: int, below: int) -> bool:
        """Put the states at border `first` onto the volume, from those at border `below`.

        From the tokens where `below` is 0. False where the disk has no room for them and for what
        the stage saves. Raises what `before_batch` raises, FencedError, OSError.
        """
        if not self._fence.writes or not self._has_room():
            return False
        earlier = self.states(window, below) if below else None

        def write(directory: Path) -> None:
            for split, wanted in self._rows.items():
                self._compute(directory / _file(split), split, wanted, window, first, earlier)

        try:
            self._folder.obtain(self._reference(first), write)
        except OSError as error:
            if error.errno not in _FULL_DISK:
                raise
            self._log.message(
                f"no room for the hidden states below layer {first}: {error}; they are computed in "
                "every step"
            )
            return False
        finally:
            if earlier is not None:
                earlier.close()
        return True

    def remove_others(self, first: int) -> None:
        """Remove the states at every border but `first`."""
        if not self._fence.writes:
            return
        for border in self._borders():
            if border != first:
                self._fence.check()
                shutil.rmtree(self._directory / _NAME.format(border), ignore_errors=True)

    def states(self, window: LayerWindow, border: int) -> CachedStates:
        """Return the states at `border` as batches want them; where they are there."""
        directory = self._directory / _NAME.format(border)
        files = {split: RowTensors(directory / _file(split)) for split in self._rows}
        return CachedStates(window, border, files, self._numerics.device)

    @torch.no_grad()
    def _compute(
        self,
        path: Path,
        split: Split,
        wanted: CachedRows,
        window: LayerWindow,
        first: int,
        earlier: CachedStates | None,
    ) -> None:
        lengths = torch.zeros(len(wanted.rows), dtype=torch.int64)
        lengths[wanted.indices] = torch.from_numpy(wanted.rows.lengths[wanted.indices])
        offsets = row_offsets(lengths)
        writer: TensorFileWriter | None = None
        for part, states in self._batches(split, wanted, window, first, earlier):
            if writer is None:
                # Their number format is the model's own, and seen first here.
                shape = (int(offsets[-1]), states.shape[-1])
                writer = TensorFileWriter(
                    path,
                    {"offsets": (torch.int64, (len(offsets),)), HIDDEN: (states.dtype, shape)},
                )
                writer.write("offsets", 0, offsets)
            for place, row in enumerate(part):
                writer.write(HIDDEN, int(offsets[row]), states[place, : int(lengths[row])])
        if writer is not None:
            writer.close()

    def _batches(
        self,
        split: Split,
        wanted: CachedRows,
        window: LayerWindow,
        first: int,
        earlier: CachedStates | None,
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield rows and their states [B, T, hidden] at border `first`."""
        said, done = time.monotonic(), 0
        for part in wanted.batches(self._at_once):
            self._before_batch()
            if time.monotonic() - said > _SECONDS_BETWEEN_MESSAGES:
                said = time.monotonic()
                self._log.message(
                    f"hidden states below layer {first}: {done} of {len(wanted.indices)} rows "
                    f"({split.value})"
                )
            done += len(part)
            batch = collate([wanted.rows[row] for row in part], rows=part, split=split)
            tokens = batch.input_ids.to(self._numerics.device)
            with self._numerics.autocast():
                if earlier is None:
                    states = window.run(tokens, stop=first)
                else:
                    given = earlier.of(batch)
                    states = window.run(tokens, start=earlier.first, states=given, stop=first)
            yield part, states

    def _has_room(self) -> bool:
        """Whether the disk holds the states beside what the stage saves; said where it does not."""
        stage = self._config.stage
        if stage is None or stage.prefix_cache is None:
            return True
        needed = stage.prefix_cache.disk_bytes + stage.estimate.disk_bytes
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            self._log.message(
                f"no prefix cache: it and the stage's checkpoints take {needed / 2**30:.1f} GiB, "
                f"and {free / 2**30:.1f} GiB are free"
            )
        return free >= needed

    def _reference(self, border: int) -> Reference:
        settings = {
            "border": border,
            "below": [output.digest for output in self._outputs if output.lowest_layer < border],
            "method": self._config.method.model_dump(mode="json"),
            "rows": {
                split.value: digest_of_json(sorted(wanted.indices))
                for split, wanted in self._rows.items()
            },
            "device": self._numerics.device.type,
            # The layers' own code, the kernels, and what computes adapters and 4 bits.
            "packages": {name: _version(name) for name in _PACKAGES},
        }
        name, kind = _NAME.format(border), ArtifactKind.HIDDEN_STATES
        return Reference(name=name, kind=kind, settings=settings)

    def _borders(self) -> list[int]:
        prefix = _NAME.format("")
        names = [path.name.removeprefix(prefix) for path in self._directory.glob(f"{prefix}*")]
        return [int(name) for name in names if name.isdigit()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _file(split: Split) -> str:
    return f"{split.value}.safetensors"
