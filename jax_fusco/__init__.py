"""Fused Mixture-of-Experts shuffles for JAX."""

from importlib.metadata import PackageNotFoundError, version

from jax_fusco.api import REMAT_SAVE_NAMES, combine, dispatch, make_plan, ragged_all_to_all
from jax_fusco.ffi import register
from jax_fusco.grouped_matmul import grouped_matmul
from jax_fusco.ledger import Ledger, ledger
from jax_fusco.placement import Placement
from jax_fusco.placement_optimize import optimize_placement
from jax_fusco.plan import Plan, capacity
from jax_fusco.pruning import limit_ranks, router_similarity
from jax_fusco.routing_stats import RoutingStats
from jax_fusco.token_plan import TokenPlan
from jax_fusco.topology import Topology

try:
    __version__ = version("jax-fusco")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "REMAT_SAVE_NAMES",
    "Ledger",
    "Placement",
    "Plan",
    "RoutingStats",
    "TokenPlan",
    "Topology",
    "capacity",
    "combine",
    "dispatch",
    "grouped_matmul",
    "ledger",
    "limit_ranks",
    "make_plan",
    "optimize_placement",
    "ragged_all_to_all",
    "register",
    "router_similarity",
]
