"""Benchmarks of the shuffles, against what JAX users write today and against the machine's own
limit.

All contestants run with the allocator as it comes. On Linux the environment variable
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1` gives huge pages to everything that XLA allocates, which
makes the rivals two to three times faster; set it to see everybody with it.

Run `python -m jax_fusco.bench --help`, or `jax-fusco bench --help`.
"""
