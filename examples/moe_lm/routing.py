"""The routing of a batch as a file, for `jax-fusco ledger` and `jax-fusco simulate`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


def save(path: Path, expert_ids: np.ndarray, num_experts: int, layer: int, step: int) -> None:
    """Writes `expert_ids[R, T, k]` and its facts as npz, whole or not at all, without pickle.

    Keys: `expert_ids` int32 [R, T, k], `num_experts`, and, for people, `layer` and `step`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("wb") as file:
        np.savez_compressed(
            file,
            expert_ids=expert_ids.astype(np.int32),
            num_experts=np.int64(num_experts),
            layer=np.int64(layer),
            step=np.int64(step),
        )
    os.replace(scratch, path)


def describe(expert_ids: np.ndarray) -> str:
    """Its sizes in words."""
    ranks, tokens, k = expert_ids.shape
    return f"{ranks} ranks, {tokens} tokens per rank, {k} experts per token"
