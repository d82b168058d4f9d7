"""What holds between answers of served graphs."""

from __future__ import annotations

from typing import Any

import numpy as np

# TensorFlow chooses the kernel of a product by the graph around it, the number of rows and the
# processor, and kernels add in different orders: a float32 product of width n differs by about
# sqrt(n) * 6e-8 of the sum of magnitudes. The models of these tests are at most 64 wide with sums
# below 8, so a logit, or a coordinate of a vector, differs by at most 8 * 6e-8 * 8 = 4e-6, and a
# probability by a quarter of that.
ROUNDING = 1e-6


def close(found: Any, expected: Any, atol: float = ROUNDING) -> None:
    """Asserts that scores are equal up to the rounding of float32 products."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
