"""How a matrix product is cut up for a GPU: a fact of hardware, so each backend names its own."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """A program makes `rows` by `columns` elements of a product, `depth` of each sum at a time; all
    three are powers of two, from 16 on."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    """Loads in flight: each holds `depth` of the rows and the columns in shared memory."""
