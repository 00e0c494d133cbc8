"""The exact gain of every channel of an axis."""

import numpy as np
import pytest

from flashnorm.verify.gains import ExactGain


def test_segments_leave_other_channels_alone() -> None:
    gain = ExactGain.of(np.array([2.0, 3.0, 4.0]), 0.0, 5, segments=[(0, 1, 2), (4, 0, 1)])
    assert gain.values == [3, 4, 1, 1, 2]
    with pytest.raises(ValueError, match="do not reach"):
        ExactGain.of(np.array([2.0, 3.0]), 0.0, 5)
