"""`python -m simcse_jax` runs `simcse-jax`."""

from simcse_jax.cli import program

if __name__ == "__main__":
    program()
