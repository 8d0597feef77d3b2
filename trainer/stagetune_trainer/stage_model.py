"""The decoder that a stage trains, and where its passes begin.

Whole where it has to be; from the stage's lowest layer up where the hidden states below are on the
volume.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from stagetune_api import names
from stagetune_api.artifact import ArtifactError
from stagetune_api.stage import PlannedStage, StageConfig
from stagetune_trainer.base_check import check_base
from stagetune_trainer.checkpoint import Fence
from stagetune_trainer.data.batch import Batch
from stagetune_trainer.data.batches import open_split, open_training_rows
from stagetune_trainer.data.store import Split
from stagetune_trainer.decoder import Decoder
from stagetune_trainer.errors import InterruptedRunError
from stagetune_trainer.loop import StopRequest
from stagetune_trainer.memory import release_memory
from stagetune_trainer.methods import Method
from stagetune_trainer.metrics import ProgressLog
from stagetune_trainer.model import (
    Numerics,
    StageOutput,
    apply_chain,
    load_chain,
    load_verified,
)
from stagetune_trainer.prefix.cache import CachedRows, PrefixCache
from stagetune_trainer.prefix.states import CachedStates, ComputedStates, PrefixStates
from stagetune_trainer.prefix.window import LayerWindow, WindowError
from stagetune_trainer.protect.protection import Protection
from stagetune_trainer.ranks import Ranks
from stagetune_trainer.tail_model import drop_below, is_whole, lowest_loaded


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


def agree_on_border(model: StageModel, config: StageConfig, ranks: Ranks) -> None:
    """See to it that the passes of all processes begin at the same layer.

    One that could not read the prefix cache has the whole decoder, and would wait in collectives
    for passes that the others do not make. Raises ArtifactError in all of them.
    """
    own = [float(model.lowest_loaded), float(model.prefix is not None)]
    if ranks.any(own != ranks.of_first(own)):
        cache = names.RunLayout(Path(config.run_directory)).cache
        raise ArtifactError(cache, "some processes of the stage could read it and others could not")


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
        digest = self.config.model_digest
        if digest is None:
            raise ValueError("a Train task needs a base model")
        # The chain is checked first: it is small, and what is wrong with a run is mostly there.
        outputs = load_chain(self.config.chain, digest)
        self.log.message(
            f"loading {self.config.model_directory} and {len(outputs)} finished stage(s)"
        )
        check_base(self._directory, digest)
        first = self.method.lowest_layer(self.stage)
        wants_cache = self.stage.prefix_cache is not None and self.stage.prefix_cache.used
        loaded: _Loaded | None = None
        if first > 0 and wants_cache:
            cache = self._cache(outputs)
            is_filled, loaded = self._fill(cache, outputs, first)
            if is_filled:
                cache.remove_others(first)
                loaded = loaded or self._load(outputs, first)
                drop_below(loaded.decoder, first)
                release_memory()
                return loaded.with_prefix(cache.states(loaded.window, first), first)
        loaded = loaded or self._load(outputs)
        prefix = None
        if self._computes_row_by_row(first) and self._can_be_cut(loaded.window, first):
            prefix = ComputedStates(loaded.window, first, self.numerics)
        return loaded.with_prefix(prefix, first)

    def _computes_row_by_row(self, first: int) -> bool:
        """Whether the prefix of each row is computed from that row alone: on a CPU.

        Not where processes have to make every pass together: their rows are not equally many.
        """
        engine = self.config.engine
        is_partitioned = engine is not None and engine.zero_stage == 3
        return first > 0 and self.numerics.device.type == "cpu" and not is_partitioned

    def _fill(
        self, cache: PrefixCache, outputs: list[StageOutput], first: int
    ) -> tuple[bool, "_Loaded | None"]:
        """Put the states at border `first` and what the base is asked for onto the volume.

        Returns whether the states are there, and what of the model is of further use. No more is
        loaded than computes the states, unless the base has to be asked for something; so the
        layers below the stage and those above it are not in memory together.
        """
        below = cache.highest_sound(first)
        is_complete = self.protection.is_complete()
        if below == first and is_complete:
            return True, None
        in_part = self.method.can_be_loaded_in_part
        loaded = self._load(outputs, below, first) if in_part and is_complete else None
        loaded = loaded or self._load(outputs)
        is_filled = below == first
        if not is_filled and self._can_be_cut(loaded.window, first, below):
            is_filled = cache.obtain(loaded.window, first, below)
        elif not is_filled:
            self.log.message(
                "no prefix cache: this family's layers hand on more than hidden states"
            )
        # What the stage trains is loaded anew: only then the rest leaves the memory.
        is_of_use = is_whole(loaded.decoder) and not (is_filled and in_part)
        return is_filled, loaded if is_of_use else None

    def _load(
        self, outputs: list[StageOutput], first: int = 0, stop: int | None = None
    ) -> "_Loaded":
        """Return the model with all finished stages, or its layers `first` to `stop` - 1."""
        # What was loaded before is free by now, and still in memory.
        release_memory()
        in_part = self.method.can_be_loaded_in_part
        decoder = load_verified(
            self._directory,
            self.numerics,
            self.method,
            first=first if in_part else 0,
            stop=stop if in_part else None,
        )
        self.protection.look_at_base(decoder)
        apply_chain(decoder, outputs, self.method)
        decoder.model.train(False)
        return _Loaded(decoder=decoder, window=LayerWindow(decoder))

    @property
    def _directory(self) -> Path:
        if self.config.model_directory is None:
            raise ValueError("a Train task needs a base model")
        return Path(self.config.model_directory)

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

    def _can_be_cut(self, window: LayerWindow, first: int, below: int = 0) -> bool:
        """Whether passes can be cut at border `first`; at `below` they were cut before."""
        if below > 0:
            # Otherwise there would be no states to begin with.
            return True
        tokens = torch.ones((1, 2), dtype=torch.int64, device=self.numerics.device)
        try:
            window.run(tokens, stop=first)
        except WindowError:
            return False
        return True


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A decoder, whole or in part, and the only window onto it."""

    decoder: Decoder
    window: LayerWindow

    def with_prefix(self, prefix: PrefixStates | None, first: int) -> StageModel:
        """Return what a stage that trains from layer `first` up works with."""
        return StageModel(decoder=self.decoder, window=self.window, prefix=prefix, first=first)
