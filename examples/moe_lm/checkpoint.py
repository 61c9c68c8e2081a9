"""Checkpoints with orbax: everything that a run needs to go on as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from flax import nnx


class Checkpoints:
    """A folder of checkpoints, the newest `keep` of them.

    orbax writes each one under a temporary name and renames it when it is whole, so a run that is
    killed in the middle of a save finds the checkpoint before it untouched.
    """

    def __init__(self, folder: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: nnx.State, run: dict[str, Any]) -> None:
        """Writes `state` and the small JSON facts `run`; returns when both are on disk."""
        if step == self._manager.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(nnx.to_pure_dict(state)),
                run=ocp.args.JsonSave({"step": step, **run}),
            ),
        )

    def read_run(self) -> dict[str, Any] | None:
        """The JSON facts of the newest whole checkpoint, with its `step`; None without one."""
        if self._manager.latest_step() is None:
            return None
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        return self._manager.restore(self._manager.latest_step(), args=args)["run"]

    def restore(self, abstract_state: nnx.State) -> nnx.State:
        """The newest state, laid out as `abstract_state` says, whatever mesh it was saved from.

        The arrays are put into `abstract_state` itself, which is also what returns.
        """
        target = nnx.to_pure_dict(abstract_state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        pure = self._manager.restore(self._manager.latest_step(), args=args)["state"]
        nnx.replace_by_pure_dict(abstract_state, pure)
        return abstract_state

    def close(self) -> None:
        self._manager.close()
