"""What a unit's writing amounted to, and what to say when it failed."""

from dataclasses import dataclass

MEND = "mend this and run the same command again; finished units are kept"


@dataclass(frozen=True)
class WriteCounts:
    """Whole chunks written, bytes put into files (metadata and indices included, after compression), and files that
    hold them.
    """

    chunks: int
    bytes_written: int
    files: int
