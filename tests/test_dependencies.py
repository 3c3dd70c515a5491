"""The packages that the project brings: their licences, and their known vulnerabilities."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dependencies import dependencies, licence

pytestmark = pytest.mark.release
ALLOWED = {
    *("0BSD", "AFL-2.1", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "CNRI-Python", "ISC"),
    *("MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib"),
}
"""Licences that let a user of ours keep their own code as it is, MPL-2.0 as long as its files are not changed."""


def test_every_licence_is_allowed() -> None:
    licences = {name: licence(package) for name, (package, _) in dependencies().items()}
    others = {name: text for name, text in licences.items() if not {*re.split(" AND | OR ", text)} <= ALLOWED}
    assert not others, "look at the licence, and add it to ALLOWED or go without the package"


def test_the_page_has_what_we_ask_for() -> None:
    """Of packages that others bring it may have more or fewer than today."""
    page = (Path(__file__).parents[1] / "docs" / "licences.md").read_text("utf-8")
    direct = [(name, package) for name, (package, parents) in dependencies().items() if "simcse-jax" in parents]
    missing = [name for name, package in direct if f"\n| {name} | {licence(package)} |" not in page]
    assert not missing, "run python -m tests.dependencies > docs/licences.md"


def test_no_dependency_has_a_known_vulnerability(tmp_path: Path) -> None:
    pytest.importorskip("pip_audit", reason="pip-audit is not installed: make audit")
    packages = dependencies()
    pinned = tmp_path / "requirements.txt"
    pinned.write_text("".join(f"{name}=={package.version}\n" for name, (package, _) in packages.items()))
    audit = ["pip_audit", "--requirement", str(pinned), "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run([sys.executable, "-m", *audit], capture_output=True, text=True)
    report = json.loads(done.stdout)["dependencies"] if done.stdout else []
    audited = [entry for entry in report if "vulns" in entry]
    if not audited:
        reason = report[0]["skip_reason"] if report else done.stderr.strip().split("\n")[-1]
        pytest.skip(f"nothing was audited, because PyPI's advisories cannot be read from here: {reason}")
    assert [entry["name"] for entry in report if entry not in audited] == [], "not audited"
    assert [entry for entry in audited if entry["vulns"]] == []
