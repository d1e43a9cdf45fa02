"""The programs of examples/ do what they say."""

from __future__ import annotations

import pytest
from helpers import script


@pytest.mark.long
def test_the_reward_of_a_trainer_of_ones_own_rises() -> None:
    history = script("examples/own_trainer.py").main()
    assert len(history) == 12
    assert abs(history[0]) < 0.1
    assert history[-1] > 0.4
    assert all(late > early for early, late in zip(history, history[4:], strict=False))
