"""Comparison of a result on the simulated device with that on the CPU."""

import pytest
import torch


def alike(found, expected, tolerance=1e-4):
    """Assert that two nests are equal; floats to a relative tolerance, as the device's kernels add in another order."""
    if isinstance(expected, torch.Tensor):
        assert found.shape == expected.shape
        torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            alike(found[key], value, tolerance)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for own, other in zip(found, expected, strict=True):
            alike(own, other, tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=1e-6, nan_ok=True)
    else:
        assert found == expected
