"""Print the oldest versions that pyproject.toml allows, as constraints for pip."""

import itertools
import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
for requirement in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
    if found := re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", requirement):
        print(f"{found[1]}=={found[2]}")
