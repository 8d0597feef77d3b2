"""Who is told what happens in a run."""

from collections.abc import Callable
from dataclasses import dataclass

from stagetune_api.progress import Progress
from stagetune_api.status import StagedFineTuneStatus


@dataclass(frozen=True, kw_only=True)
class Listeners:
    """Called by the runner, in its own thread."""

    on_status: Callable[[StagedFineTuneStatus], None] = lambda status: None
    """Called with every new status."""
    on_progress: Callable[[Progress], None] = lambda progress: None
    """Called with every line of progress of a trainer."""
    on_message: Callable[[str], None] = lambda text: None
    """Called with what the runner itself has to say."""
