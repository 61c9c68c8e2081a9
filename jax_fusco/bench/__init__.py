"""Benchmarks of the shuffles, against what JAX users write today and against the machine's own
limit.

Run `python -m jax_fusco.bench --help`, or `jax-fusco bench --help`.
"""
