"""The version, alone in its file so that reading it imports nothing."""

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def package_versions() -> dict[str, str]:
    """Of what can change a number."""
    found = {"python": platform.python_version()}
    for name in ("micl-zoo", "torch", "timm", "numpy", "pillow", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
