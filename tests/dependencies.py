"""The packages that an installation brings, and their licences: `python -m tests.dependencies > docs/licences.md`."""

from collections.abc import Iterator
from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "simcse-jax[search,serve]"
SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
"""SPDX's identifiers for what packages without a licence expression write. "BSD License" names no number of clauses."""
PAGE = """\
# Licences of the dependencies

simcse_jax is under Apache 2.0. This page lists every package that `pip install ".[search,serve]"` brings on Python
3.11, with the licence that the package itself names. `make audit` fails if a licence is not one of those that
`tests/test_dependencies.py` allows; `python -m tests.dependencies > docs/licences.md` writes the page. The extras for
hardware are left out: those for CUDA bring NVIDIA's libraries, under NVIDIA's own terms.

| package | licence | asked for by |
|---|---|---|
"""


def required(package: Distribution, extras: set[str]) -> Iterator[Requirement]:
    """What a package with these extras asks for on this machine."""
    for line in package.requires or []:
        requirement = Requirement(line)
        if not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield requirement


def dependencies() -> dict[str, tuple[Distribution, set[str]]]:
    """Each package that the project needs at run time, directly or not, with the packages that ask for it."""
    found: dict[str, tuple[Distribution, set[str]]] = {}
    seen, rest = set(), [("", Requirement(PROJECT))]
    while rest:
        parent, requirement = rest.pop()
        name = canonicalize_name(requirement.name)
        found.setdefault(name, (distribution(name), set()))[1].add(parent)
        if (key := (name, frozenset(requirement.extras))) not in seen:
            seen.add(key)
            rest += [(name, child) for child in required(found[name][0], requirement.extras)]
    del found[canonicalize_name(Requirement(PROJECT).name)]
    return dict(sorted(found.items()))


def licence(package: Distribution) -> str:
    """The licence expression of a package or, of one without, its classifiers, or its line on the licence."""
    expression, line = (package.metadata.get(key, "") for key in ("License-Expression", "License"))
    classes = [c for c in package.metadata.get_all("Classifier", []) if c.startswith("License ::")]
    names = [c.split(" :: ")[-1] for c in classes] or [line.strip().split("\n")[0]]
    return expression or " AND ".join(SPDX.get(name, name) for name in names)


def row(name: str, package: Distribution, parents: set[str]) -> str:
    """A line of the page's table."""
    return f"| {name} | {licence(package)} | {', '.join(sorted(parents))} |"


if __name__ == "__main__":
    print(PAGE + "\n".join(row(name, *about) for name, about in dependencies().items()))
