"""Versions of the packages that ranks compute and talk with; all ranks must have the same."""

from __future__ import annotations

import sys
from collections.abc import Iterable

BENEATH = ("mpi4py", "numpy")
"""The packages beneath every framework."""


def versions(names: Iterable[str]) -> dict[str, object]:
    """The versions of packages that this process has loaded, by what an error calls them.

    Not of what is merely installed: another one's Keras is no business of a job that trains
    without it.
    """
    return {
        f"the version of {name}": getattr(sys.modules.get(name), "__version__", None)
        for name in names
    }
