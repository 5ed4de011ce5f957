"""Tests that need a newer library than the oldest that layershed takes; docs/compatibility.md names the same limits."""

from importlib.metadata import version

import pytest
from packaging.version import Version

EXACT_RESUME_REFUSES = "lightning < 2.5.3: its loops do not say where they resume, so ExactResume refuses it"


def older(package, than):
    """Whether a package is of an older version."""
    return Version(version(package)) < Version(than)


def needs(package, oldest, reason):
    """A mark: skipped with an older version of a package, and why.

    Args:
        package: The package.
        oldest: The first version with which the test passes.
        reason: What older versions do.
    """
    return pytest.mark.skipif(older(package, oldest), reason=f"{package} < {oldest}: {reason}")
