"""Placement: which rank holds which expert, and what another one would save."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, PyTree

from jax_fusco.mesh import AxisName
from jax_fusco.plan import experts_per_rank, whole
from jax_fusco.routing_stats import RoutingStats

if TYPE_CHECKING:
    from jax_fusco.placement_predict import Prediction

_FORMAT = "jax_fusco placement 1"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """The experts of every slot of every rank; with a leading axis where layers differ.

    A pytree of one small int32 array and static sizes, so that a jitted step takes it as an
    argument: a new placement of the same sizes compiles nothing anew, and `jax.lax.scan` over
    layers hands each layer its own. (A hashable static argument could do neither.)

    Make one with `optimize_placement`, `Placement.of_slots` or `Placement.identity`: those check.

    Attributes (R ranks of S slots, E experts, L layers):
      expert_of_slot: the expert in each slot; rank r has the slots from r * S.
      num_experts, num_ranks: E and R, static.
      ranks_per_node: consecutive ranks that form a node, static.
    """

    expert_of_slot: Int32[Array | np.ndarray, "*layers R*S"]
    num_experts: int = dataclasses.field(metadata={"static": True})
    num_ranks: int = dataclasses.field(metadata={"static": True})
    ranks_per_node: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of_slots(
        cls,
        expert_of_slot: Int[Any, "*layers R*S"],
        *,
        num_experts: int,
        num_ranks: int,
        ranks_per_node: int | None = None,
    ) -> Placement:
        """A placement from the expert of every slot.

        Args:
          expert_of_slot: R * S experts, each of the E at least once; may have a leading axis.
          num_experts: E.
          num_ranks: R.
          ranks_per_node: a divisor of R; None: one node.

        Raises:
          TypeError, ValueError: an argument's type or value, named in the message.
        """
        experts = whole("num_experts", num_experts, 1)
        ranks = whole("num_ranks", num_ranks, 1)
        experts_per_rank(experts, ranks)
        local = check_node(ranks_per_node, ranks)
        slots = np.asarray(expert_of_slot)
        if slots.dtype.kind not in "iu":
            raise TypeError(f"expert_of_slot: got dtype {slots.dtype}, need an integer dtype")
        if slots.ndim not in (1, 2) or not slots.size or slots.shape[-1] % ranks:
            raise ValueError(
                f"expert_of_slot: got shape {slots.shape}, need [slots], a multiple of the {ranks} "
                "ranks, or that for each layer"
            )
        if slots.shape[-1] < experts:
            raise ValueError(
                f"expert_of_slot: got {slots.shape[-1]} slots, need one for each of {experts} "
                "experts"
            )
        if slots.min() < 0 or slots.max() >= experts:
            odd = slots.max() if slots.max() >= experts else slots.min()
            raise ValueError(f"expert_of_slot: got expert {odd}, need 0 to {experts - 1}")
        for row in slots.reshape(-1, slots.shape[-1]):
            missing = np.setdiff1d(np.arange(experts), row)
            if len(missing):
                raise ValueError(
                    f"expert_of_slot: got no slot of expert {missing[0]}, need every expert"
                )
        return cls(slots.astype(np.int32), experts, ranks, local)

    @classmethod
    def identity(
        cls,
        num_experts: int,
        num_ranks: int,
        *,
        ranks_per_node: int | None = None,
        num_layers: int | None = None,
    ) -> Placement:
        """Expert e on rank `e // (E // R)`, as a plan has it where it is told nothing.

        Raises:
          TypeError, ValueError: an argument's type or value, named in the message.
        """
        experts = whole("num_experts", num_experts, 1)
        slots = np.arange(experts)
        if num_layers is not None:
            slots = np.tile(slots, (whole("num_layers", num_layers, 1), 1))
        return cls.of_slots(
            slots, num_experts=experts, num_ranks=num_ranks, ranks_per_node=ranks_per_node
        )

    @property
    def num_layers(self) -> int | None:
        """L, or None without a leading axis of layers."""
        return self.expert_of_slot.shape[0] if self.expert_of_slot.ndim == 2 else None

    @property
    def num_slots(self) -> int:
        """S, slots of a rank."""
        return self.expert_of_slot.shape[-1] // self.num_ranks

    @property
    def has_replicas(self) -> bool:
        """Whether there are more slots than experts."""
        return self.expert_of_slot.shape[-1] > self.num_experts

    @property
    def slot_of_expert(self) -> Int32[Array | np.ndarray, "*layers E"]:
        """The first slot of each expert, int32; of NumPy, under `jax.jit` of JAX."""
        slots = self.expert_of_slot
        xp = np if isinstance(slots, np.ndarray) else jnp
        here = slots[..., None, :] == np.arange(self.num_experts, dtype=np.int32)[:, None]
        return xp.argmax(here, axis=-1).astype(np.int32)

    @property
    def rank_of_expert(self) -> Int32[Array | np.ndarray, "*layers E"]:
        """The rank of each expert, int32; of its first slot (the primary) where it has several."""
        return self.slot_of_expert // np.int32(self.num_slots)

    @property
    def is_identity(self) -> bool:
        """Whether every expert is where it is without a placement. Outside jit."""
        slots = np.asarray(self.expert_of_slot)
        return not self.has_replicas and bool((slots == np.arange(self.num_experts)).all())

    def layer(self, index: int) -> Placement:
        """The placement of one layer.

        Raises:
          ValueError: there are no layers, or not so many.
        """
        layers = self.num_layers
        if layers is None or not 0 <= index < layers:
            raise ValueError(f"index: got {index}, need one of {layers or 'no'} layers")
        return dataclasses.replace(self, expert_of_slot=self.expert_of_slot[index])

    def predict(self, stats: RoutingStats, *, row_bytes: int = 1) -> Prediction:
        """What this placement changes, before anything moves.

        Tokens lie evenly over the ranks, and replicas are chosen as a plan does whose topology has
        the nodes of this placement. Distinct ranks and nodes are counted on the half of the sampled
        tokens that `optimize_placement` does not look at, so that they are honest for its results
        too.

        Args:
          stats: `RoutingStats` in the router's ids, of this placement's experts and layers.
          row_bytes: bytes of a token's row; 1 counts rows.

        Returns:
          A `Prediction`: `today`, `after` and the `gain`; printing it says whether to move.

        Raises:
          TypeError, ValueError: an argument's type or value, named in the message.
        """
        from jax_fusco.placement_predict import predict

        return predict(self, stats, row_bytes)

    def apply(
        self,
        model_state: PyTree,
        optimizer_state: PyTree | None = None,
        *,
        expert_axes: Mapping[str, int] | None = None,
    ) -> tuple[PyTree, PyTree | None]:
        """Moves experts to their slots: their parameters, their router columns and their moments.

        A checkpoint's content, not the model, changes: outputs and gradients stay what they are,
        and training goes on as if nothing had happened, to float tolerance. From then on the router
        speaks slots, rank r's being those from r * S: pass no placement to `make_plan`. With
        replicas the router keeps speaking of experts, only the experts' parameters move.

        A router whose choice depends on the order of experts (`SigmoidRouter` with `num_groups`)
        needs a placement that was optimized with the same `num_groups`.

        Args:
          model_state: any pytree with the parameters of `jax_fusco.flax.MoE` under their names, as
            `nnx.state(model)` gives it; stacked layers have one leading axis more. A block of
            experts is what has both a `wi_kernel` and a `wo_kernel`.
          optimizer_state: any pytree whose moments lie under the same paths, or None.
          expert_axes: for other names than `MoE`'s: the axis of the experts, counted from the end
            (-1 is the last; a router's kernel `[d, E]` has -1, a kernel `[E, d, h]` has -3).

        Returns:
          (model_state, optimizer_state), arrays with the shardings they had.

        Raises:
          ValueError: a state that does not fit, before anything is moved.
        """
        from jax_fusco.placement_state import apply

        return apply(self, model_state, optimizer_state, expert_axes)

    def sum_replicas(self, gradients: PyTree, *, axis_name: AxisName = None) -> PyTree:
        """Gives every copy of an expert the sum of the gradients of all its copies.

        What a training step with replicas does before its optimizer: copies that started alike
        then stay alike, to the bit, and train as one expert would. Only experts that have copies
        are added and exchanged. With one placement a layer, and leaves `[L, R*S, ...]`, map it:
        `jax.vmap(Placement.sum_replicas)(placement, gradients)`.

        Args:
          gradients: a pytree of arrays in the order of slots, `[R*S, ...]`, of any sharding; with
            an `axis_name` this rank's `[S, ...]`.
          axis_name: inside `jax.shard_map`, the mesh axis of the ranks, or a tuple of axes.

        Returns:
          The same pytree. Sums are made in float32 (or wider, as the leaf) and rounded once.

        Raises:
          TypeError, ValueError: an argument's type or value, named in the message.
        """
        from jax_fusco.replicas import sum_replicas

        return sum_replicas(self, gradients, axis_name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file."""
        sizes = ("num_experts", "num_ranks", "ranks_per_node")
        document = {"format": _FORMAT, **{name: getattr(self, name) for name in sizes}}
        document["expert_of_slot"] = np.asarray(self.expert_of_slot).tolist()
        with open(path, "w") as file:
            file.write(json.dumps(document) + "\n")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Placement:
        """Reads and checks what `save` wrote.

        Raises:
          ValueError: the file is missing, corrupt, or holds something else, in one sentence.
        """
        need = "need a JSON file that Placement.save wrote"
        try:
            with open(path) as file:
                document = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: got no readable placement ({reason}), {need}") from None
        names = ("num_experts", "num_ranks", "ranks_per_node", "expert_of_slot")
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise ValueError(f"{path}: got no format {_FORMAT!r}, {need}")
        if missing := [name for name in names if name not in document]:
            raise ValueError(f"{path}: got no {missing[0]}, {need}")
        sizes = {name: document[name] for name in names[:3]}
        try:
            return cls.of_slots(np.array(document["expert_of_slot"]), **sizes)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {error}") from None


def check_node(ranks_per_node: int | None, ranks: int) -> int:
    """L; one node where it is None."""
    local = ranks if ranks_per_node is None else whole("ranks_per_node", ranks_per_node, 1)
    if ranks % local:
        raise ValueError(f"ranks_per_node: got {local}, need a divisor of the {ranks} ranks")
    return local
