import numpy as np
from numpy.typing import NDArray

def water_fill(counts: NDArray[np.int32], capacity: int, alignment: int) -> NDArray[np.int32]:
    """Rows kept in each cell, `[E_local, R]`, of `counts` `[E_local, R]`."""

def make_plan(
    expert_ids: NDArray[np.int32], num_experts: int, capacity: int, alignment: int
) -> dict[str, NDArray[np.int32]]:
    """The plan of R ranks from `expert_ids` `[R, T, k]`.

    Returns the results of all ranks, each with a leading dimension R, named as in
    docs/architecture.md.
    """
