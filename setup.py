"""The packages of a distribution; all else about it stands in pyproject.toml.

setuptools finds them. The configs lie beside the package, for users to read, and are installed as a part of it, which
`packages.find` in pyproject.toml cannot say.
"""

from setuptools import find_packages, setup

CONFIGS = [f"simcse_jax.{name}" for name in find_packages(include=["configs", "configs.*"])]

setup(
    packages=find_packages(include=["simcse_jax", "simcse_jax.*"]) + CONFIGS,
    package_dir={name: name.removeprefix("simcse_jax.").replace(".", "/") for name in CONFIGS},
)
