"""What stands in for the writer in every process but the first."""

from collections.abc import Mapping
from typing import Any

import numpy as np


class SilentWriter:
    """Takes everything that a `RunWriter` takes, and writes nothing."""

    def __init__(self, segment: int = 0) -> None:
        self.segment = segment
        self.closed = False
        self.lost_rows = 0

    def write_metrics(self, columns: Mapping[str, np.ndarray]) -> None:
        """Take rows."""

    def scalars(self, line: Mapping[str, Any]) -> None:
        """Take a line."""

    def event(self, name: str, step: int, **fields: Any) -> None:
        """Take an event."""

    def flush(self) -> None:
        """Do nothing."""

    def begin_segment(
        self, step: int, checkpoint: str | None = None, *, parts: Mapping[str, Any] | None = None
    ) -> None:
        """Count a segment."""
        self.segment += 1

    def update_manifest(self, **fields: Any) -> None:
        """Do nothing."""

    def close(self, status: str = "finished", **fields: Any) -> None:
        """Mark the writer as closed."""
        self.closed = True
