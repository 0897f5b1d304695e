"""The folder of the package, and that of its YAML files."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]

# An installed package contains conf/; in a checkout, conf/ lies next to the package.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
