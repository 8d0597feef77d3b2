"""What the watches cannot say: which objects went away while nobody watched.

After a break that is too long for the server's memory a watch begins with a new list. It brings
what there is and never says what is missing since, and a Job that was deleted meanwhile would be
waited for without end. So what the store knows is held against the server's own list after every
such gap, and now and then.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from stagetune_operator.cluster import Cluster
from stagetune_operator.errors import ClusterError, DeniedError
from stagetune_operator.keys import RunKey
from stagetune_operator.resources import Collection
from stagetune_operator.store import Store

INTERVAL_SECONDS = 600.0
RETRY_SECONDS = 15.0

logger = logging.getLogger(__name__)


class Sweeper:
    """Forgets what is no longer there."""

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        namespaces: Sequence[str],
        on_missing: Callable[[RunKey], None],
    ) -> None:
        """`namespaces` are those that are watched, none for all.

        `on_missing(key)` is told of the runs that something was missing of, or that were missing.
        """
        self._cluster = cluster
        self._store = store
        self._namespaces = namespaces
        self._on_missing = on_missing
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
                logger.warning("objects that are gone could not be looked for: %s", error)
                seconds = RETRY_SECONDS

    async def sweep(self) -> None:
        """Sweep once; raises ClusterError and has then forgotten what it had found out."""
        uids: dict[Collection, Callable[[str | None], set[str]]] = {
            Collection.RUNS: self._store.run_uids,
            Collection.JOBS: self._store.job_uids,
            Collection.PODS: self._store.pod_uids,
        }
        for where, known_uids in uids.items():
            for namespace in self._namespaces or (None,):
                # In this order: what is heard of during the list is not in it, and is there.
                known = known_uids(namespace)
                try:
                    gone = known - await self._cluster.list_uids(where, namespace)
                except DeniedError as error:
                    # In one namespace; the others are swept.
                    logger.warning("%s are not swept: %s", where.path(namespace), error)
                    continue
                for key in self._store.forget(gone):
                    self._on_missing(key)
