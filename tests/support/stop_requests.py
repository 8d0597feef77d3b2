"""Requests to stop, as a trainer's loop looks at them: one that nobody makes, and one in time."""


class NeverAsked:
    """A request to stop that nobody makes."""

    requested = False


class AfterChecks:
    """Asks to stop when it has been looked at `count` times."""

    def __init__(self, count: int) -> None:
        self._left = count

    @property
    def requested(self) -> bool:
        """True from the look after the last of them on."""
        self._left -= 1
        return self._left < 0
