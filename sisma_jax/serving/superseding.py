"""Newer requests supersede older ones with the same X-Stream-Id."""

from collections.abc import Callable

from sisma_jax.serving.batching import Job
from sisma_jax.serving.problems import Problem


class Ticket:
    """A request with a stream id.

    Attributes:
      stream_id: of the request; "" if it has none.
      job: its images, once they are in the queue.
      is_superseded: whether a newer request has come.
    """

    def __init__(self, stream_id: str):
        self.stream_id = stream_id
        self.job: Job | None = None
        self.is_superseded = False

    def supersede(self) -> None:
        """Stops the request."""
        self.is_superseded = True
        if self.job is not None:
            self.job.cancel(_problem())

    def check(self) -> None:
        """Raises Problem (409) if a newer request has come."""
        if self.is_superseded:
            raise _problem()


class Superseding:
    """The newest request of each stream id."""

    def __init__(self, on_supersede: Callable[[], None]):
        self._newest: dict[str, Ticket] = {}
        self._on_supersede = on_supersede

    def enter(self, stream_id: str) -> Ticket:
        """Returns the ticket of a request, which supersedes the request before it.

        Args:
          stream_id: of the request; "" if it has none.
        """
        ticket = Ticket(stream_id)
        if stream_id:
            if older := self._newest.get(stream_id):
                older.supersede()
                self._on_supersede()
            self._newest[stream_id] = ticket
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Forgets the ticket of a request that has ended."""
        if self._newest.get(ticket.stream_id) is ticket:
            del self._newest[ticket.stream_id]


def _problem() -> Problem:
    return Problem(409, "a newer request with the same X-Stream-Id superseded this one.")
