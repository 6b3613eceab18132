"""Print the lowest version of each package that pyproject.toml allows, as pip constraints.

Packages that only developers use (``docs`` and ``dev``) are left out.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

DEVELOPERS_ONLY = ("docs", "dev")

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
requirements = set(project["dependencies"])
for extra, packages in project["optional-dependencies"].items():
    if extra not in DEVELOPERS_ONLY:
        requirements.update(packages)
for requirement in sorted(requirements):
    match = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
    if match:
        print(f"{match[1]}=={match[2]}")
