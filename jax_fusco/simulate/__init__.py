"""A model of shuffles on clusters: latencies, bandwidths, and links shared max-min fairly.

`jax-fusco simulate` fits the model's constants to published times and asks it what other plans
would take, from 8 to 16384 GPUs. Nothing here has run on a cluster.
"""
