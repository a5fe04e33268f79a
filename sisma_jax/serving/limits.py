"""What a server accepts: numbers that bound memory, compute and time of a request."""

import dataclasses

MAX_LIST_PIXELS = 1 << 20
"""Pixels of a mask that is a nested list in JSON."""
MAX_FIELDS = 32
"""Fields of a request."""
MAX_TEXT = 4096
"""Bytes of a text part, and characters of a query."""
MAX_SEEDS_TEXT = 4096


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of requests.

    Attributes:
      max_batch: images per batch; a power of two.
      max_queue: images that wait.
      max_steps: solver steps of a request.
      max_samples: images of a request.
      body_bytes: bytes of a request's body.
      buffered_bytes: bytes of the bodies of all requests together.
      mask_pixels: pixels of a mask.
      photo_pixels: pixels of a photograph; twice as many for all images of an edit together.
      timeout_secs: from the arrival of a request to its result.
      body_secs: for the arrival of a body, and for that of the headers.
      shutdown_secs: for accepted requests after SIGTERM.
      connections: open connections.
    """

    max_batch: int = 8
    max_queue: int = 64
    max_steps: int = 100
    max_samples: int = 16
    body_bytes: int = 32 << 20
    buffered_bytes: int = 256 << 20
    mask_pixels: int = 1 << 24
    photo_pixels: int = 25_000_000
    timeout_secs: float = 60.0
    body_secs: float = 20.0
    shutdown_secs: float = 30.0
    connections: int = 512
