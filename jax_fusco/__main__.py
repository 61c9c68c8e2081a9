"""`python -m jax_fusco`."""

from jax_fusco.cli import main

if __name__ == "__main__":
    main(prog_name="python -m jax_fusco")
