"""What several models have lost on the same blocks, against loops over draws; and what pairing is for."""

from __future__ import annotations

import numpy as np
import pytest

from locum.measure.loss import SUMS
from locum.measure.pairs import draw, mean_kl


def sums(lost_CJB, tokens_B, original_B):
    """[C, S, B, Y] of models that lose so many nats in each block."""
    made = np.zeros((*np.shape(lost_CJB), len(SUMS)))
    made[..., SUMS.index("nats")] = original_B + np.asarray(lost_CJB)
    made[..., SUMS.index("original_nats")] = original_B
    made[..., SUMS.index("tokens")] = tokens_B
    made[..., SUMS.index("kl")] = np.asarray(lost_CJB) / 2
    return made


@pytest.fixture
def three():
    """Three candidates, four seeds, 30 blocks of different lengths."""
    generator = np.random.default_rng(3)
    tokens_B = generator.integers(5, 60, 30)
    hard_B = generator.gamma(2.0, 40.0, 30)  # blocks differ much more than candidates
    lost_CJB = np.stack([generator.normal(mean, 2.0, (4, 30)) + 0.2 * hard_B for mean in (5.0, 7.0, 7.1)])
    return sums(lost_CJB, tokens_B, hard_B), lost_CJB, tokens_B


def test_losses_and_draws_equal_a_slow_loop(three):
    sums_CJBY, lost_CJB, tokens_B = three
    drawn = draw(sums_CJBY, seed=5, resamples=20)
    generator = np.random.default_rng(5)
    blocks = generator.multinomial(30, np.full(30, 1 / 30), size=20)
    seeds = generator.multinomial(4, np.full(4, 1 / 4), size=20)
    for c in range(3):
        assert drawn.delta_C[c] == pytest.approx(np.mean([lost_CJB[c, s].sum() / tokens_B.sum() for s in range(4)]))
        for r in range(20):
            chosen = [b for b in range(30) for _ in range(blocks[r, b])]
            with_seed = [s for s in range(4) for _ in range(seeds[r, s])]
            tokens = sum(tokens_B[b] for b in chosen)
            expected = np.mean([sum(lost_CJB[c, s, b] for b in chosen) / tokens for s in with_seed])
            assert drawn.drawn_XC[r, c] == pytest.approx(expected)
    assert mean_kl(sums_CJBY[0]) == pytest.approx(drawn.delta_C[0] / 2)


def test_a_difference_is_known_better_than_what_it_is_a_difference_of(three):
    drawn = draw(three[0])
    _, low, high = drawn.of(0)
    apart, lowest, highest = drawn.between(0, 1)
    assert apart == pytest.approx(drawn.delta_C[0] - drawn.delta_C[1]) and lowest < apart < highest < 0
    assert highest - lowest < (high - low) / 2
    assert drawn.sure(0, 1) > 0.99 and drawn.sure(1, 0) < 0.01
    assert 0.2 < drawn.sure(1, 2) < 0.95  # nearly equal: nobody can be sure


def test_the_interval_holds_what_it_promises():
    """Of 200 pairs of equal candidates, some 5 % have an interval without 0."""
    outside = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        lost = generator.normal(3.0, 1.0, (2, 1, 80))
        _, low, high = draw(sums(lost, np.full(80, 10), np.full(80, 30.0)), resamples=300).between(0, 1)
        outside += not low <= 0 <= high
    assert 2 <= outside <= 25


def test_the_order_over_seeds():
    alike = [[[1.0, 1.0]] * 3, [[2.0, 2.0]] * 3, [[3.0, 3.0]] * 3]
    assert draw(sums(alike, [1, 1], 0.0)).order_over_seeds() == pytest.approx(1.0)
    turned = [[[1.0, 1.0], [2.0, 2.0]], [[2.0, 2.0], [1.0, 1.0]]]
    assert draw(sums(turned, [1, 1], 0.0)).order_over_seeds() == pytest.approx(-1.0)
    assert draw(sums([[[1.0, 1.0]], [[2.0, 2.0]]], [1, 1], 0.0)).order_over_seeds() is None
    assert draw(sums([[[1.0, 1.0]] * 3], [1, 1], 0.0)).order_over_seeds() is None
