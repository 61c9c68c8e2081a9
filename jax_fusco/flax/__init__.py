"""Mixture-of-Experts for Flax NNX: the block, its routers, and converters of its parameters."""

from jax_fusco.flax.convert import LAYOUTS, assign_params, load_params, store_params
from jax_fusco.flax.limited import RankLimitedRouter
from jax_fusco.flax.metrics import MoEMetrics
from jax_fusco.flax.moe import MoE
from jax_fusco.flax.router import (
    BalanceBias,
    Router,
    Routing,
    SigmoidRouter,
    SoftmaxRouter,
    TopKSoftmaxRouter,
    update_balance_bias,
)

__all__ = [
    "LAYOUTS",
    "BalanceBias",
    "MoE",
    "MoEMetrics",
    "RankLimitedRouter",
    "Router",
    "Routing",
    "SigmoidRouter",
    "SoftmaxRouter",
    "TopKSoftmaxRouter",
    "assign_params",
    "load_params",
    "store_params",
    "update_balance_bias",
]
