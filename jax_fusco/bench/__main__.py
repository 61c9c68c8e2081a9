"""`python -m jax_fusco.bench`."""

from jax_fusco.cli import bench

if __name__ == "__main__":
    bench(prog_name="python -m jax_fusco.bench")
