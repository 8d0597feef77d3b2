"""Which stages keep the hidden states below them on the volume; a part of `plan`.

The cache changes no bit of the result on a CPU, so this is about time and disk alone. A stage
either computes the layers below it in every pass over its rows, or reads what they gave: computed
once, from the states that an earlier stage left where there are such. Since a cache also serves the
stages above, all of them are decided together, for the least time of the whole run.

How fast a device computes and a volume reads is not known before a run; the rates below are those
of slow ones of their kind.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from stagetune_api.facts import Facts
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.stage import PlannedStage, PrefixCachePlan
from stagetune_api.training_spec import PrefixCache, TrainingSpec
from stagetune_operator.estimate import Machine, element_bytes, expanded
from stagetune_operator.stage_scope import StageScope, idle_adapters

GPU_FLOPS_PER_SECOND = 50e12
"""Of bf16 matrices on a card of 24 GB, under half of what its maker says."""
CPU_FLOPS_PER_SECOND = 50e9
"""Of fp32 matrices on two cores."""
VOLUME_BYTES_PER_SECOND = 200e6
"""Of a network volume; written, hashed and read."""
_UNITS = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40}
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class StagePasses:
    """How often a stage looks at which tokens, and what it opens."""

    scope: StageScope
    training: TrainingSpec
    """With the stage's own sizes of batches."""
    rows: tuple[int, int]
    """Training rows that the stage sees, first and one behind the last, in their shuffled order."""
    epochs: float
    steps: int
    validation_interval: int


@dataclass(frozen=True, kw_only=True)
class _Prefix:
    """What lies below a stage, and what looking at it costs."""

    first: int
    """The lowest layer of the stage, in the model that it trains."""
    rows: tuple[int, int]
    distinct: float
    """Tokens that it looks at, each counted once."""
    seen: float
    """Each time that it does."""
    token_bytes: int
    layer_flops: float
    """Operations per token of one layer."""
    adapter_flops: dict[int, float]
    """Of the adapters of earlier stages, by layer."""
    flops_per_second: float
    """Of one process."""
    num_processes: int
    """Processes of a stage: all compute what lies below it, and the first alone fills a cache."""

    @property
    def size(self) -> int:
        """Bytes of all states."""
        return round(self.distinct * self.token_bytes)

    def flops(self, start: int) -> float:
        """Return the operations per token from layer `start` up to the stage."""
        adapters = sum(size for at, size in self.adapter_flops.items() if start <= at < self.first)
        return (self.first - start) * self.layer_flops + adapters

    @property
    def seconds_without(self) -> float:
        """Seconds of computing it in every pass."""
        return self.seen * self.flops(0) / (self.flops_per_second * self.num_processes)

    def seconds_with(self, start: int) -> float:
        """Return the seconds of computing it once from layer `start`, and reading it then.

        What is written is read again for its digest, and so are the states that it begins with.
        """
        moved = self.size * (3 if start else 2) + self.seen * self.token_bytes
        computed = self.distinct * self.flops(start) / self.flops_per_second
        return computed + moved / VOLUME_BYTES_PER_SECOND


def plan_prefix_caches(
    spec: StagedFineTuneSpec, facts: Facts, stages: Sequence[StagePasses], machine: Machine
) -> list[PrefixCachePlan | None]:
    """Return what is decided for each stage; None where nothing lies below it."""
    prefixes = [_prefix(spec, facts, stage, machine) for stage in stages]
    if spec.training.prefix_cache is PrefixCache.NEVER:
        never = PrefixCachePlan(used=False, reason="prefixCache is Never")
        return [None if prefix is None else never for prefix in prefixes]
    room = _room(spec)
    # The lowest layer that a stage trains; a head and embeddings count as the lowest of all, since
    # the trainer does not tell the two apart by their names.
    trained = [
        0 if stage.scope.embeddings or stage.scope.head or prefix is None else prefix.first
        for stage, prefix in zip(stages, prefixes, strict=True)
    ]
    starts = _cheapest([_within(prefix, room) for prefix in prefixes], trained)
    return [
        None if prefix is None else _decided(prefix, start, room)
        for prefix, start in zip(prefixes, starts, strict=True)
    ]


def most_cached_bytes(stages: Sequence[PlannedStage]) -> int:
    """Return the most bytes that caches take at once: two while one is carried on."""
    caches = [stage.prefix_cache for stage in stages if stage.prefix_cache is not None]
    sizes = [cache.disk_bytes for cache in caches if cache.used]
    return max(before + size for before, size in itertools.pairwise([0, *sizes, 0]))


def _cheapest(prefixes: Sequence[_Prefix | None], trained: Sequence[int]) -> list[int | None]:
    """Return the layer that each stage's cache begins at, None for no cache, for the least time.

    `trained` is the lowest layer that each stage trains: what lies below a border must not have
    changed since a cache was filled there.

    Stage by stage, the least time is kept for each stage whose cache may be the newest one.
    """
    # By the newest cache's stage: seconds so far, and where each cache so far begins.
    best: dict[int | None, tuple[float, tuple[int | None, ...]]] = {None: (0.0, ())}
    for index, prefix in enumerate(prefixes):
        after: dict[int | None, tuple[float, tuple[int | None, ...]]] = {}
        for newest, (seconds, starts) in best.items():
            without = 0.0 if prefix is None else prefix.seconds_without
            after[newest] = (seconds + without, (*starts, None))
        if prefix is not None:
            choices = []
            for newest, (seconds, starts) in best.items():
                start = 0
                if newest is not None:
                    start = _start(prefix, prefixes[newest], min(trained[newest:index]))
                choices.append((seconds + prefix.seconds_with(start), (*starts, start)))
            after[index] = min(choices, key=lambda choice: choice[0])
        best = after
    return list(min(best.values(), key=lambda choice: choice[0])[1])


def _start(prefix: _Prefix, before: _Prefix | None, lowest_trained: int) -> int:
    """Return the layer at which the states of `prefix` begin, given the newest cache.

    `lowest_trained` is the lowest layer that was trained since that one was filled.
    """
    if before is None or before.rows != prefix.rows:
        return 0
    return before.first if before.first <= min(prefix.first, lowest_trained) else 0


def _within(prefix: _Prefix | None, room: float | None) -> _Prefix | None:
    """Return `prefix` as one that is never worth a cache where the volume has no room for two."""
    if prefix is None or room is None or 2 * prefix.size <= room:
        return prefix
    return None


def _decided(prefix: _Prefix, start: int | None, room: float | None) -> PrefixCachePlan:
    if start is not None:
        saved = 1 - prefix.seconds_with(start) / prefix.seconds_without
        reason = f"saves {saved:.0%} of the time below layer {prefix.first}"
        if saved <= 0:
            reason = f"carries the states below layer {prefix.first} on to later stages"
        return PrefixCachePlan(
            used=True,
            reason=reason,
            begins_at=start,
            disk_bytes=prefix.size,
            flops=round(prefix.distinct * prefix.flops(start)),
        )
    if _within(prefix, room) is None:
        size = prefix.size / _GIB
        return PrefixCachePlan(
            used=False,
            reason=f"the states of two borders, {size:.1f} GiB each, are more than half of the "
            "volume; raise spec.storage.size",
        )
    return PrefixCachePlan(
        used=False,
        reason=f"a token is seen {prefix.seen / prefix.distinct:.1f} times; keeping its states "
        f"would take longer than computing {prefix.first} layers",
    )


def _prefix(
    spec: StagedFineTuneSpec, facts: Facts, stage: StagePasses, machine: Machine
) -> _Prefix | None:
    facts, scope = expanded(facts, spec.method, stage.scope)
    if scope.layers.first == 0:
        return None
    model = facts.model
    row_tokens = facts.data.train_tokens / facts.data.train_rows
    matrices = 2 * sum(inputs * outputs for inputs, outputs in model.layer.linear_shapes.values())
    attention = 4 * model.num_attention_heads * model.head_dim * row_tokens
    adapters = idle_adapters(model, spec.method, scope).items()
    distinct, seen = _tokens(spec, facts, stage)
    return _Prefix(
        first=scope.layers.first,
        rows=stage.rows,
        distinct=distinct,
        seen=seen,
        token_bytes=model.hidden_size * element_bytes(stage.training, machine),
        layer_flops=matrices + attention,
        adapter_flops={layer: 2.0 * parameters for layer, parameters in adapters},
        flops_per_second=GPU_FLOPS_PER_SECOND if machine.is_gpu else CPU_FLOPS_PER_SECOND,
        num_processes=machine.engine.num_processes if machine.engine is not None else 1,
    )


def _tokens(spec: StagedFineTuneSpec, facts: Facts, stage: StagePasses) -> tuple[float, float]:
    """Return how many tokens the stage looks at, each counted once, and each time it does.

    The validation set is looked at before the first step, at each interval, at the end and by the
    meter of forgetting; general text once.
    """
    data = facts.data
    row_tokens = data.train_tokens / data.train_rows
    start, end = stage.rows
    own = (end - start) * row_tokens
    validation = data.validation_rows * row_tokens
    validations = 2 + -(-stage.steps // stage.validation_interval)
    distinct, seen = own + validation, own * stage.epochs + validation * validations
    general = spec.evaluation.general_text
    if general is not None:
        distinct, seen = distinct + general.max_tokens, seen + general.max_tokens
    replay = spec.protection.replay if spec.protection else None
    if replay is not None:
        mean = data.replay_tokens / data.replay_rows if data.replay_rows else data.max_row_tokens
        distinct += data.replay_tokens or data.max_row_tokens
        seen += stage.steps * replay.rows_per_step(stage.training.batch_size) * mean
    return distinct, seen


def _room(spec: StagedFineTuneSpec) -> float | None:
    """Return the bytes on the volume that caches may have; None where its size is not known."""
    if spec.storage is None or spec.storage.size is None:
        return None
    number, unit = spec.storage.size[:-2], spec.storage.size[-2:]
    return int(number) * float(2 ** _UNITS[unit]) / 2
