"""The version, alone in its file so that reading it imports nothing."""

__version__ = "0.1.0"


def package_versions(*more: str) -> dict[str, str]:
    """The versions of what can change a number, and of further packages that are installed."""
    import contextlib
    import platform
    from importlib.metadata import PackageNotFoundError, version  # 20 ms that `micl-zoo --help` does not need

    found = {"python": platform.python_version()}
    for name in ("micl-zoo", "torch", "timm", "numpy", "pillow", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    for name in more:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
