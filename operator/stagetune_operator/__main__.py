"""`python -m stagetune_operator`: everything put together, started, and ended in order."""

import asyncio
import contextlib
import gc
import importlib.metadata
import logging
import os
import sys
from collections.abc import AsyncIterator

from aiohttp import web

from stagetune_api import names
from stagetune_operator.cluster import Cluster
from stagetune_operator.connection import ConnectionFailedError, connect, open_watch_session
from stagetune_operator.handlers import build_registry, list_taker, watch
from stagetune_operator.keys import RunKey
from stagetune_operator.logs import configure_logs
from stagetune_operator.metrics import Metrics
from stagetune_operator.progress import ProgressStore
from stagetune_operator.progress_server import ProgressEndpoint, RateLimit
from stagetune_operator.queue import RunQueue
from stagetune_operator.reconcile import Reconciler
from stagetune_operator.resources import Collection
from stagetune_operator.settings import Settings, SettingsError
from stagetune_operator.store import Store
from stagetune_operator.sweep import Sweeper
from stagetune_operator.token_reviews import TokenReviews
from stagetune_operator.watches import HealthEndpoint, Watches

LIST_PATIENCE_SECONDS = 20.0
_COLLECTOR_THRESHOLD = 10_000
"""How many more objects are made than freed before cycles are looked for; Python's own is 700."""

logger = logging.getLogger(__name__)


def main() -> int:
    """Run the operator until it is asked to end; return the process's exit code."""
    try:
        settings = Settings.from_environment(os.environ)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return names.ExitCode.INVALID
    configure_logs(settings)
    _spare_the_collector()
    try:
        asyncio.run(serve(settings))
    except ConnectionFailedError as error:
        logger.error("%s", error)
        return names.ExitCode.FAILED
    return names.ExitCode.DONE


def _spare_the_collector() -> None:
    """Have cycles looked for seldom, and never among what was imported.

    Nearly all that is allocated here is JSON, which has no cycles and goes when nobody refers to
    it. Looking through it again and again took a third of a start with a thousand runs.
    """
    gc.freeze()
    gc.set_threshold(_COLLECTOR_THRESHOLD)


async def serve(settings: Settings) -> None:
    """Serve runs until SIGTERM or SIGINT."""
    version = importlib.metadata.version("stagetune")
    logger.info("stagetune operator %s, trainer image %s", version, settings.trainer_image)
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(connect())
        metrics = Metrics(version)
        cluster = Cluster(client, metrics.count_write)
        store = Store()
        progress = ProgressStore(on_progress=lambda key: queue.add(key))
        reconciler = Reconciler(
            cluster=cluster,
            store=store,
            settings=settings,
            observer=metrics,
            progress_of=progress.of,
        )
        queue = RunQueue(
            reconciler.reconcile,
            store.keys,
            workers=settings.workers,
            resync_seconds=settings.resync_seconds,
            on_done=metrics.observe_reconcile,
        )

        def look_at(key: RunKey) -> None:
            if not store.knows(key):
                progress.forget(key)
            queue.add(key)

        sweeper = Sweeper(cluster, store, settings.namespaces, look_at)
        watches = Watches(_watched_paths(settings), on_gap=sweeper.want)
        metrics.watch_queue(lambda: queue.depth)
        metrics.watch_runs(store, progress)
        reviews = TokenReviews(cluster.review_token, names.PROGRESS_AUDIENCE)
        endpoint = ProgressEndpoint(
            reviews=reviews,
            objects=store,
            progress=progress,
            rate_limit=RateLimit(),
            on_post=metrics.count_post,
            stage_file_for=reconciler.stage_file_for,
        )

        # Ended by kopf's cleanup, before it takes everything that still runs for stuck.
        services = await stack.enter_async_context(contextlib.AsyncExitStack())
        health = HealthEndpoint(watches, cluster.is_reachable)
        services.push_async_callback(queue.stop)
        starting = asyncio.create_task(_start_queue(queue, watches), name="start of the queue")
        services.callback(starting.cancel)
        for app, port in (
            (endpoint.application(), settings.port_progress),
            (metrics.application(), settings.port_metrics),
            (health.application(), settings.port_health),
        ):
            await services.enter_async_context(_listening(app, port))
        sweeping = asyncio.create_task(sweeper.run(), name="sweeper")
        services.callback(sweeping.cancel)
        take_list = list_taker(store, look_at)
        registry = build_registry(
            store=store,
            look_at=look_at,
            open_session=lambda: open_watch_session(
                client,
                on_list=watches.note_list,
                on_watch=watches.note_watch,
                on_refusal=watches.note_refusal,
                take_list=take_list,
            ),
            close=services.aclose,
        )
        await watch(registry, settings.namespaces)
    logger.info("ended")


async def _start_queue(queue: RunQueue, watches: Watches) -> None:
    """Begin with the runs once all that there is has been listed.

    Before that a run's Jobs are not known of, and each run would be looked at once for every object
    of it, with calls to the server to find that nothing is missing.
    """
    await watches.opened(LIST_PATIENCE_SECONDS)
    queue.start()


def _watched_paths(settings: Settings) -> list[str]:
    return [
        where.path(namespace)
        for where in (Collection.RUNS, Collection.JOBS, Collection.PODS)
        for namespace in settings.namespaces or (None,)
    ]


@contextlib.asynccontextmanager
async def _listening(app: web.Application, port: int) -> AsyncIterator[None]:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, port=port).start()
        yield
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    sys.exit(main())
