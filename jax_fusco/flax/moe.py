"""MoE: the Flax NNX block."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float

from jax_fusco import checks
from jax_fusco.choice import Implementation, checked_names
from jax_fusco.flax.experts import ACTIVATIONS
from jax_fusco.flax.layer import LayerConfig, moe_layer
from jax_fusco.flax.metrics import MoEMetrics
from jax_fusco.flax.router import BalanceBias, Router, SoftmaxRouter, check_router
from jax_fusco.flax.sharding import Entries, Layout, axis_names, resolve, run_sharded
from jax_fusco.mesh import AxisName
from jax_fusco.plan import whole
from jax_fusco.topology import Topology

default_kernel_init = nnx.initializers.lecun_normal()
default_bias_init = nnx.initializers.zeros_init()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _apply(
    config: LayerConfig,
    layout: Layout,
    param_entries: tuple[tuple[str, Entries], ...],
    params: dict[str, jax.Array],
    x: jax.Array,
    mask: jax.Array | None,
) -> tuple[jax.Array, MoEMetrics]:
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
    run: Any = functools.partial(moe_layer, config, layout.local)
    if layout.opened:
        run = functools.partial(run_sharded, run, layout, dict(param_entries))
    (y, ids), metrics = run(params, x, mask)
    return y, dataclasses.replace(metrics, expert_ids=ids)


class MoE(nnx.Module):
    """A layer of E feed-forward experts, of which a router picks k for each token.

    It runs on the mesh it is given, on the ambient mesh (`jax.set_mesh`), on the manual axes of an
    enclosing `jax.shard_map`, or on one device if there is none of these. Tokens are sharded over
    `token_axes`, experts over `axis_name`, the experts' hidden features over `model_axis`.

    Example::

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jax_fusco.flax import MoE
        >>> moe = MoE(16, 32, num_experts=8, top_k=2, rngs=nnx.Rngs(0))
        >>> y, metrics = moe(jnp.ones((4, 10, 16)))
        >>> y.shape, metrics.tokens_per_expert.shape
        ((4, 10, 16), (8,))

    Attributes (E experts, d features, h hidden features, p projections: 2 if the activation gates,
    else 1; H = num_shared_experts * h):
      router_kernel: `nnx.Param` [d, E]; router_bias: [E] or None.
      balance_bias: `BalanceBias` [E], float32, or None.
      wi_kernel: `nnx.Param` [E, d, p, h], gate before up; wi_bias: [E, p, h] or None.
      wo_kernel: `nnx.Param` [E, h, d]; wo_bias: [E, d] or None.
      shared_wi_kernel, shared_wo_kernel: `nnx.Param` [d, p, H] and [H, d], or None.

    Args:
      features: d, the last dimension of input and output.
      hidden_features: h, the hidden features of one expert.
      num_experts: E, a multiple of the ranks of `axis_name`.
      top_k: k, experts for each token.
      axis_name: mesh axis of the experts, a tuple of them, or None (every rank holds all experts).
      router: a `Router`; by default softmax over all experts, the chosen ones renormalised.
      activation: one of "swiglu", "geglu", "clamped_swiglu" (gpt-oss), "silu", "gelu", "relu".
      use_bias: whether the experts have biases.
      num_shared_experts: experts that see every token, computed as one of that many times h.
      capacity_factor: rows of a rank's receive buffer relative to a balanced load; assignments that
        find no room are dropped and counted. None: room for everything, R times the memory.
      alignment: each expert's rows are padded to a multiple of it.
      dtype: the dtype of the computation (default: inferred from input and parameters). The router
        computes in float32 always.
      param_dtype: the dtype of the parameters.
      kernel_init: initializer of every kernel, called for one [in, out] matrix at a time.
      bias_init: initializer of the biases of router and experts.
      mesh: the mesh to run on; None: the ambient one, at each call.
      token_axes: mesh axes that tokens are sharded over; None: all but `model_axis`.
      model_axis: mesh axis that hidden features are sharded over, or None.
      implementation: of the shuffle, as in `jax_fusco.make_plan`.
      topology: of the ranks of `axis_name`, as in `jax_fusco.make_plan`.
      rows: what travels, as in `jax_fusco.make_plan`: a row for each "assignment", or fewer, one
        for each "token" and rank, which grouped matmuls then read through an index. None: "token"
        on CPU devices where a token is expected on fewer ranks than half of `top_k`.
      report_expert_ids: whether `MoEMetrics` holds the experts of each token.
      rngs: rng key.

    Raises:
      TypeError, ValueError: an argument's type or value, named in the message.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        num_experts: int,
        top_k: int,
        axis_name: AxisName = "expert",
        router: Router = SoftmaxRouter(),  # noqa: B008 (frozen)
        activation: str = "swiglu",
        use_bias: bool = False,
        num_shared_experts: int = 0,
        capacity_factor: float | None = 1.5,
        alignment: int = 1,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        mesh: Mesh | None = None,
        token_axes: str | tuple[str, ...] | None = None,
        model_axis: str | None = None,
        implementation: Implementation = None,
        topology: Topology | None = None,
        rows: Literal["assignment", "token"] | None = None,
        report_expert_ids: bool = False,
        rngs: nnx.Rngs,
    ):
        self.features = whole("features", features, 1)
        self.hidden_features = whole("hidden_features", hidden_features, 1)
        self.num_experts = whole("num_experts", num_experts, 1)
        self.top_k = whole("top_k", top_k, 1)
        self.num_shared_experts = whole("num_shared_experts", num_shared_experts, 0)
        self.alignment = whole("alignment", alignment, 1)
        check_router(router)
        router.check(num_experts, top_k)
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation: got {activation!r}, need one of {known}")
        named = {"axis_name": axis_name, "token_axes": token_axes, "model_axis": model_axis}
        for name, value in named.items():
            if value is not None:
                checks.axes(name, value)
        if capacity_factor is not None:
            checks.above_zero("capacity_factor", capacity_factor)
        for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
            if value is not None:
                checks.floating(name, checks.dtype_of(name, value))
        if mesh is not None and not isinstance(mesh, Mesh | AbstractMesh):
            raise TypeError(f"mesh: got {mesh!r}, need a jax.sharding.Mesh or None")
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs: got {rngs!r}, need a flax.nnx.Rngs")
        self.axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
        self.router = router
        self.activation = activation
        self.use_bias = use_bias
        self.capacity_factor = capacity_factor
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.mesh = mesh
        self.token_axes = tuple(token_axes) if isinstance(token_axes, list) else token_axes
        self.model_axis = model_axis
        self.implementation = (
            tuple(implementation) if isinstance(implementation, list) else implementation
        )
        if topology is not None and topology.axis_name != axis_names(axis_name):
            raise ValueError(
                f"axis_name: got {axis_name!r}, need {topology.axis_name} for this topology"
            )
        if rows not in (None, "assignment", "token"):
            raise ValueError(f"rows: got {rows!r}, need 'assignment', 'token', or None")
        checked_names(implementation)
        self.topology = topology
        self.rows: Literal["assignment", "token"] | None = rows
        self.report_expert_ids = report_expert_ids
        self._create_params(kernel_init, bias_init, rngs)

    def _param_entries(self) -> dict[str, Entries]:
        """How each parameter is sharded, one entry for each of its dimensions."""
        expert = self.axis_name
        model = self.model_axis
        return {
            "router_kernel": (None, None),
            "router_bias": (None,),
            "balance_bias": (None,),
            "wi_kernel": (expert, None, None, model),
            "wi_bias": (expert, None, model),
            "wo_kernel": (expert, model, None),
            "wo_bias": (expert, None),
            "shared_wi_kernel": (None, None, model),
            "shared_wo_kernel": (model, None),
        }

    def _create_params(
        self, kernel_init: Initializer, bias_init: Initializer, rngs: nnx.Rngs
    ) -> None:
        num_experts, features, hidden = self.num_experts, self.features, self.hidden_features
        dtype, projections = self.param_dtype, ACTIVATIONS[self.activation][0]

        def kernels(count: int, *shape: int) -> jax.Array:
            """[count, in, out], each matrix drawn by itself so that its fans are right."""
            keys = jax.random.split(rngs.params(), count)
            return jax.vmap(lambda key: kernel_init(key, shape, dtype))(keys)

        def inner(count: int, hidden: int) -> jax.Array:
            """[count, features, projections, hidden]."""
            each = kernels(count * projections, features, hidden)
            return jnp.moveaxis(each.reshape(count, projections, features, hidden), 1, 2)

        def biases(*shape: int) -> jax.Array:
            return bias_init(rngs.params(), shape, dtype)

        values: dict[str, jax.Array | None] = dict.fromkeys(self._param_entries())
        values["router_kernel"] = kernels(1, features, num_experts)[0]
        values["wi_kernel"] = inner(num_experts, hidden)
        values["wo_kernel"] = kernels(num_experts, hidden, features)
        if self.router.use_bias:
            values["router_bias"] = biases(num_experts)
        if self.router.use_balance_bias:
            values["balance_bias"] = jnp.zeros(num_experts, jnp.float32)
        if self.use_bias:
            values["wi_bias"] = biases(num_experts, projections, hidden)
            values["wo_bias"] = biases(num_experts, features)
        if self.num_shared_experts:
            shared = self.num_shared_experts * hidden
            values["shared_wi_kernel"] = inner(1, shared)[0]
            values["shared_wo_kernel"] = kernels(1, shared, features)[0]
        metadata = self._sharding_metadata()
        for name, value in values.items():
            if value is None:
                setattr(self, name, nnx.data(None))
                continue
            kind = BalanceBias if name == "balance_bias" else nnx.Param
            entries = self._param_entries()[name]
            setattr(self, name, kind(value, out_sharding=entries, **metadata))

    def params(self) -> dict[str, jax.Array]:
        """The parameters there are, and the balance bias, by attribute name."""
        names = self._param_entries()
        return {name: v[...] for name in names if (v := getattr(self, name)) is not None}

    def _sharding_metadata(self) -> dict[str, Any]:
        """Shard parameters as they are made where the mesh is known, else only name the axes."""
        if self.mesh is not None:
            self._layout()  # checks
            return {"mesh": self.mesh}
        ambient = jax.sharding.get_abstract_mesh()
        named = {name for entry in (self.axis_name, self.model_axis) for name in axis_names(entry)}
        one_kind = ambient.are_all_axes_auto or ambient.are_all_axes_explicit
        known = not ambient.empty and one_kind and named <= set(ambient.axis_names)
        if known:
            self._layout()  # checks
        return {} if known else {"eager_sharding": False}

    def _layout(self) -> Layout:
        layout = resolve(self.mesh, self.axis_name, self.token_axes, self.model_axis)
        local = layout.local
        if self.num_experts % (ranks := layout.size(local.expert)):
            raise ValueError(
                f"num_experts: got {self.num_experts}, need a multiple of the number of ranks "
                f"({ranks})"
            )
        if self.hidden_features % (shards := layout.size(local.model)):
            raise ValueError(
                f"hidden_features: got {self.hidden_features}, need a multiple of the size of "
                f"model_axis ({shards})"
            )
        return layout

    def __call__(
        self, x: Float[Array, "*batch d"], token_mask: Bool[Array, "*batch"] | None = None
    ) -> tuple[Float[Array, "*batch d"], MoEMetrics]:
        """Sends each token through its experts.

        Args:
          x: tokens, [..., features].
          token_mask: False for tokens that go nowhere, come back as zeros and count in no metric.

        Returns:
          (y, metrics): y like `x`, in the dtype of the computation; `MoEMetrics` over the mesh.

        Raises:
          TypeError, ValueError: an argument's type or shape, named in the message.
        """
        x = jnp.asarray(x)
        if not x.ndim or x.shape[-1] != self.features:
            raise ValueError(f"x: got shape {x.shape}, need [..., {self.features}]")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x: got dtype {x.dtype}, need a floating dtype")
        if token_mask is not None:
            token_mask = jnp.asarray(token_mask)
            if token_mask.dtype != jnp.bool_:
                raise TypeError(f"token_mask: got dtype {token_mask.dtype}, need bool")
            if token_mask.shape != x.shape[:-1]:
                raise ValueError(f"token_mask: got shape {token_mask.shape}, need {x.shape[:-1]}")
        layout = self._layout()
        params = self.params()
        config = LayerConfig(
            num_experts=self.num_experts,
            top_k=self.top_k,
            router=self.router,
            activation=self.activation,
            capacity_factor=self.capacity_factor,
            alignment=self.alignment,
            implementation=self.implementation,
            topology=self.topology,
            rows=self.rows,
            report_expert_ids=self.report_expert_ids,
            dtype=jnp.dtype(self.dtype or jnp.result_type(x, params["wi_kernel"])),
        )
        entries = tuple(self._param_entries().items())
        return _apply(config, layout, entries, params, x, token_mask)
