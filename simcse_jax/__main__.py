"""`python -m simcse_jax` runs `simcse-jax`."""

from simcse_jax.cli import main

if __name__ == "__main__":
    main()
