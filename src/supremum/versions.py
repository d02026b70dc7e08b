"""Versions of what is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str | None:
    """The installed version of a distribution, None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
