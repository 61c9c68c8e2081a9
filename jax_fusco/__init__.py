"""Fused Mixture-of-Experts shuffles for JAX."""

from importlib.metadata import PackageNotFoundError, version

from jax_fusco.api import REMAT_SAVE_NAMES, combine, dispatch, make_plan, ragged_all_to_all
from jax_fusco.ffi import register
from jax_fusco.ledger import Ledger, ledger
from jax_fusco.plan import Plan, capacity
from jax_fusco.topology import Topology

try:
    __version__ = version("jax-fusco")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "REMAT_SAVE_NAMES",
    "Ledger",
    "Plan",
    "Topology",
    "capacity",
    "combine",
    "dispatch",
    "ledger",
    "make_plan",
    "ragged_all_to_all",
    "register",
]
