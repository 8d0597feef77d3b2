"""The decoder that a stage trains, and where its passes begin.

Whole where it has to be; from the stage's lowest layer up where the hidden states below are on the
volume.
"""

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from stagetune_api import names
from stagetune_api.stage import PlannedStage, StageConfig
from stagetune_trainer.checkpoint import Fence
from stagetune_trainer.data.batch import Batch
from stagetune_trainer.data.batches import open_split, open_training_rows
from stagetune_trainer.data.store import Split
from stagetune_trainer.decoder import Decoder
from stagetune_trainer.errors import InterruptedRunError
from stagetune_trainer.loop import StopRequest
from stagetune_trainer.methods import Method
from stagetune_trainer.metrics import ProgressLog
from stagetune_trainer.model import (
    Numerics,
    StageOutput,
    apply_chain,
    load_base,
    load_chain,
)
from stagetune_trainer.prefix.cache import CachedRows, PrefixCache
from stagetune_trainer.prefix.states import CachedStates, ComputedStates, PrefixStates
from stagetune_trainer.prefix.window import LayerWindow, WindowError
from stagetune_trainer.protect.protection import Protection
from stagetune_trainer.tail_model import drop_below, lowest_loaded


@dataclass(frozen=True, kw_only=True)
class StageModel:
    """A frozen decoder with every earlier stage's output in place."""

    decoder: Decoder
    window: LayerWindow
    prefix: PrefixStates | None
    """What the stage's passes begin with; None where they run through the whole decoder."""
    first: int
    """The lowest layer that anything of the stage trains in."""

    def read_ahead(self, batch: Batch) -> Batch:
        """Return `batch` with all that can be done for its pass beforehand, in another thread."""
        if self.prefix is not None:
            batch = self.prefix.read_ahead(batch)
        return batch.pinned() if self.decoder.device.type == "cuda" else batch

    def close(self) -> None:
        """Let go of the files on the volume."""
        if isinstance(self.prefix, CachedStates):
            self.prefix.close()

    @property
    def lowest_loaded(self) -> int:
        """The lowest layer that has weights."""
        return lowest_loaded(self.decoder)


@dataclass(frozen=True, kw_only=True)
class StageModelLoader:
    """Loads the model of one stage."""

    config: StageConfig
    stage: PlannedStage
    method: Method
    numerics: Numerics
    protection: Protection
    fence: Fence
    log: ProgressLog
    stop: StopRequest

    def load(self) -> StageModel:
        """Return the stage's model; the volume holds its cache and its references afterwards.

        Raises ArtifactError for a damaged parent or base, InterruptedRunError when asked to stop,
        FencedError, OSError.
        """
        if self.config.model_digest is None or self.config.model_directory is None:
            raise ValueError("a Train task needs a base model")
        # The chain is checked first: it is small, and what is wrong with a run is mostly there.
        outputs = load_chain(self.config.chain, self.config.model_digest)
        self.log.message(
            f"loading {self.config.model_directory} and {len(outputs)} finished stage(s)"
        )
        first = self.method.lowest_layer(self.stage)
        wants_cache = self.stage.prefix_cache is not None and self.stage.prefix_cache.used
        cache = self._cache(outputs) if first > 0 and wants_cache else None
        below = cache.highest_sound(first) if cache is not None else 0
        in_part = below > 0 and self.method.can_be_loaded_in_part and self.protection.is_complete()
        decoder = self._decoder(outputs, first=below if in_part else 0)
        window = LayerWindow(decoder)
        prefix: PrefixStates | None = None
        if cache is not None:
            prefix = self._cached(cache, window, decoder, first, below)
        if prefix is None and lowest_loaded(decoder) > 0:
            # Layers of a window refer to it and it to them: without a word they stay in memory.
            del decoder, window
            gc.collect()
            decoder = self._decoder(outputs, first=0)
            window = LayerWindow(decoder)
        if (
            prefix is None
            and self._computes_row_by_row(first)
            and _can_be_cut(decoder, window, first)
        ):
            prefix = ComputedStates(window, first, self.numerics)
        return StageModel(decoder=decoder, window=window, prefix=prefix, first=first)

    def _computes_row_by_row(self, first: int) -> bool:
        """Whether the prefix of each row is computed from that row alone: on a CPU.

        Not where processes have to make every pass together: their rows are not equally many.
        """
        engine = self.config.engine
        is_partitioned = engine is not None and engine.zero_stage == 3
        return first > 0 and self.numerics.device.type == "cpu" and not is_partitioned

    def _cached(
        self, cache: PrefixCache, window: LayerWindow, decoder: Decoder, first: int, below: int
    ) -> CachedStates | None:
        """Return the states on the volume, and give the memory below them back; None for none."""
        if below < first:
            if not _can_be_cut(decoder, window, first):
                self.log.message(
                    "no prefix cache: this family's layers hand on more than hidden states"
                )
                return None
            if not cache.obtain(window, first, below):
                return None
        cache.remove_others(first)
        drop_below(decoder, first)
        gc.collect()
        return cache.states(window, first)

    def _decoder(self, outputs: list[StageOutput], *, first: int) -> Decoder:
        config = self.config
        if config.model_digest is None or config.model_directory is None:
            raise ValueError("a Train task needs a base model")
        decoder = load_base(
            Path(config.model_directory),
            config.model_digest,
            self.numerics,
            self.method,
            first=first,
        )
        self.protection.look_at_base(decoder)
        apply_chain(decoder, outputs, self.method, first=lowest_loaded(decoder))
        decoder.model.train(False)
        return decoder

    def _cache(self, outputs: list[StageOutput]) -> PrefixCache:
        config = self.config
        rows = {
            Split.TRAIN: CachedRows(
                rows=open_split(config, Split.TRAIN),
                indices=open_training_rows(config, self.stage).all_indices(),
            )
        }
        others = {
            Split.VALIDATION: True,
            Split.GENERAL: config.evaluation.general_text is not None,
            Split.REPLAY: config.protection.replay is not None,
        }
        for split, is_seen in others.items():
            if is_seen:
                stored = open_split(config, split)
                rows[split] = CachedRows(rows=stored, indices=list(range(len(stored))))
        return PrefixCache(
            names.RunLayout(Path(config.run_directory)).cache,
            config,
            self.numerics,
            self.fence,
            self.log,
            rows=rows,
            outputs=outputs,
            before_batch=self._leave_if_asked,
        )

    def _leave_if_asked(self) -> None:
        if self.stop.requested:
            raise InterruptedRunError("no step was taken: hidden states were being computed")


def _can_be_cut(decoder: Decoder, window: LayerWindow, first: int) -> bool:
    if lowest_loaded(decoder) > 0:
        # It was, or there would be no states to begin with.
        return True
    tokens = torch.ones((1, 2), dtype=torch.int64, device=decoder.device)
    try:
        window.run(tokens, stop=first)
    except WindowError:
        return False
    return True
