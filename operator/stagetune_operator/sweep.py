"""What the watches did not say: objects that went away, or changed, while nobody heard of it.

After a break that is too long for the server's memory a watch begins with a new list. It brings
what there is and never says what is missing since, and a Job that was deleted meanwhile would be
waited for without end. And an event may be lost. So what the store knows is held against the
server's own list after every such gap, and now and then.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from stagetune_api import names
from stagetune_operator.cluster import Cluster
from stagetune_operator.errors import ClusterError, DeniedError
from stagetune_operator.keys import RunKey
from stagetune_operator.resources import Collection
from stagetune_operator.store import Store
from stagetune_operator.views import Object

INTERVAL_SECONDS = 600.0
RETRY_SECONDS = 15.0

logger = logging.getLogger(__name__)


class Sweeper:
    """Has the store forget what is no longer there, and learn what it was never told."""

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        namespaces: Sequence[str],
        on_change: Callable[[RunKey], None],
    ) -> None:
        """`namespaces` are those that are watched, none for all.

        `on_change(key)` is told of the runs of which the store knows something else since.
        """
        self._cluster = cluster
        self._store = store
        self._namespaces = namespaces
        self._on_change = on_change
        self._wanted = asyncio.Event()

    def want(self) -> None:
        """Have it swept soon."""
        self._wanted.set()

    async def run(self) -> None:
        """Sweep when it is wanted and now and then, until cancelled."""
        seconds = INTERVAL_SECONDS
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), seconds)
            self._wanted.clear()
            seconds = INTERVAL_SECONDS
            try:
                await self.sweep()
            except ClusterError as error:
                logger.warning("what was not heard of could not be looked for: %s", error)
                seconds = RETRY_SECONDS

    async def sweep(self) -> None:
        """Sweep once; raises ClusterError, and what was found out until then counts."""
        versions: dict[Collection, Callable[[str | None], dict[str, int]]] = {
            Collection.RUNS: self._store.run_versions,
            Collection.JOBS: self._store.job_versions,
            Collection.PODS: self._store.pod_versions,
        }
        behind: set[RunKey] = set()
        for where, known_versions in versions.items():
            for namespace in self._namespaces or (None,):
                # In this order: what is heard of during the list is not in it, and is there.
                known = known_versions(namespace)
                try:
                    found = await self._cluster.list_versions(where, namespace)
                except DeniedError as error:
                    # In one namespace; the others are swept.
                    logger.warning("%s are not swept: %s", where.path(namespace), error)
                    continue
                for key in self._store.forget(known.keys() - found.keys()):
                    self._on_change(key)
                # Of what was just made or changed the watch may be about to tell; then the
                # look below is one too many.
                heard = known_versions(namespace)
                behind |= {
                    key
                    for uid, (key, version) in found.items()
                    if key is not None and version > heard.get(uid, 0)
                }
        for key in sorted(behind):
            await self._learn(key)

    async def _learn(self, key: RunKey) -> None:
        """Tell the store how a run and what belongs to it are now."""
        run = await self._cluster.read_run(key)
        if run is not None:
            self._store.apply_run("MODIFIED", run)
        for job in filter(_is_managed, await self._cluster.list_jobs(key)):
            self._store.apply_job("MODIFIED", job)
        for pod in filter(_is_managed, await self._cluster.list_pods(key)):
            self._store.apply_pod("MODIFIED", pod)
        self._on_change(key)


def _is_managed(item: Object) -> bool:
    """Whether the watches would bring it: somebody else's may have the run's label too."""
    return bool(item["metadata"]["labels"].get(names.LABEL_MANAGED_BY) == names.MANAGED_BY)
