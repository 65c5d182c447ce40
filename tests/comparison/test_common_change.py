"""The common change: what all functions do alike, however few there are and however one grows."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.comparison import verdict
from profiler.comparison.verdict import (
    Change,
    Contrast,
    Costs,
    contrast,
    contrast_of_replicates,
    judge,
    judge_common,
    noise_of_history,
)

Floats = npt.NDArray[np.float64]
SAMPLES, SD, POSITIONS = 20_000, 0.05, 9
SATURATED = 0.0
"""As a load: the core is full, so that what one function takes is what the others lack."""


def costs(rng: np.random.Generator, shares: Floats) -> Costs:
    """Return a window of counted samples of functions that vary by 5 %."""
    varied = SAMPLES * shares * np.exp(rng.normal(0, SD, len(shares)))
    return Costs(rng.poisson(varied)[None].astype(float), np.array([240.0]))


class Tried:
    """Pairs of windows in which `changed` functions take `factor` as much, and the load changes."""

    def __init__(
        self, functions: int, changed: int, factor: float, load: float = 1.0, pairs: int = 40
    ) -> None:
        rng = np.random.default_rng(17)
        self.commons: list[float] = []
        self.loads: list[float] = []
        self.held = self.false = self.found = 0
        self.pairs = pairs
        for _ in range(pairs):
            shares = np.maximum(rng.dirichlet(np.full(functions, 2.0)), 0.02)
            shares /= shares.sum()
            if changed == 1:  # the one that grows from 6 to 28 %
                shares = np.append(0.94 * shares[1:] / shares[1:].sum(), 0.06)
            factors = np.ones(functions)
            factors[functions - changed :] = factor
            grown = shares * factors
            now_load = load or 1 / grown.sum()
            past = [contrast(costs(rng, shares), costs(rng, shares)) for _ in range(POSITIONS)]
            sides = costs(rng, shares), costs(rng, grown * now_load)
            self._judge(sides, past, changed, math.log(now_load))

    def _judge(
        self, sides: tuple[Costs, Costs], past: list[Contrast], changed: int, load: float
    ) -> None:
        now, noise = contrast(*sides), noise_of_history(past, POSITIONS)
        before, after = sides
        common = judge_common(now, noise)
        found = judge(now, (before.samples[0], after.samples[0]), noise).changes
        middle = len(found) - changed
        self.commons.append(now.common)
        self.loads.append(load)
        self.held += common.low <= load <= common.high
        self.false += set(found[:middle]) != {Change.UNCHANGED}
        self.found += set(found[middle:]) == {Change.MORE}

    @property
    def error(self) -> float:
        return float(np.sqrt(np.mean((np.array(self.commons) - self.loads) ** 2)))


@pytest.mark.parametrize("functions", [6, 12, 60])
def test_a_function_that_explodes_is_not_the_load(functions):
    """From 6 to 28 % of the time that was used: the load stays, and the function is found."""
    tried = Tried(functions, 1, 6.1)

    assert tried.error < 0.08
    assert tried.held >= 0.9 * tried.pairs
    assert tried.found == tried.pairs
    assert tried.false <= 0.2 * tried.pairs


@pytest.mark.parametrize("functions", [6, 12])
def test_on_a_full_core_the_others_do_less_work_but_do_not_change(functions):
    """What the function takes the others lack: their common change, which is no change of each."""
    tried = Tried(functions, 1, 6.1, SATURATED)

    assert np.mean(tried.loads) == pytest.approx(math.log(1 / 1.306), abs=0.001)
    assert tried.error < 0.08
    assert tried.held >= 0.9 * tried.pairs
    assert tried.found == tried.pairs
    assert tried.false <= 0.2 * tried.pairs


def test_more_load_on_six_functions_is_no_change_of_each():
    tried = Tried(6, 0, 1.0, load=1.3)

    assert np.mean(tried.commons) == pytest.approx(math.log(1.3), abs=0.02)
    assert tried.false <= 0.2 * tried.pairs


def test_three_of_twelve_functions_are_found_and_are_not_the_load():
    tried = Tried(12, 3, 1.5)

    assert tried.error < 0.1
    assert tried.held >= 0.9 * tried.pairs
    assert tried.found >= 0.7 * tried.pairs
    assert tried.false <= 0.25 * tried.pairs


def test_where_half_of_the_functions_change_the_common_change_is_not_certain():
    """The spread between the functions widens all intervals: no half is taken for the other."""
    tried = Tried(12, 6, 1.5)

    assert tried.false <= 0.25 * tried.pairs
    rng = np.random.default_rng(3)
    shares = np.full(12, 1 / 12)
    grown = shares * np.where(np.arange(12) < 6, 1.5, 1.0)
    past = [contrast(costs(rng, shares), costs(rng, shares)) for _ in range(POSITIONS)]
    noise = noise_of_history(past, POSITIONS)
    common = judge_common(contrast(costs(rng, shares), costs(rng, grown)), noise)
    alike = judge_common(contrast(costs(rng, shares), costs(rng, shares)), noise)
    assert common.high - common.low > 2 * (alike.high - alike.low)


def test_functions_that_may_not_count_for_the_common_change_do_not():
    before = np.full((2, 14), 3000.0)
    after = before.copy()
    after[:, :8] *= 2  # the majority
    steady = np.arange(14) >= 8
    spans = np.full(2, 60.0)
    sides = [Costs(each, spans, steady) for each in (before, after)]

    for found in (contrast(*sides), contrast_of_replicates(*sides)[0]):
        assert found.common == pytest.approx(0, abs=1e-9)
    assert contrast(Costs(before, spans), Costs(after, spans)).common == pytest.approx(
        math.log(2), abs=1e-3
    )
    few = Costs(before, spans, np.arange(14) >= 15 - verdict.MIN_COMMON)
    assert contrast(few, Costs(after, spans)).common == 0


def test_a_quarter_of_the_functions_moves_the_common_change_less_than_the_median():
    rng = np.random.default_rng(18)
    wrong = {verdict.location: 0.0, np.median: 0.0}
    for _ in range(50):
        ratios = rng.normal(0, 0.1, 60)
        ratios[:15] += math.log(1.5)
        for middle in wrong:
            wrong[middle] += float(middle(ratios)) / 50

    assert abs(wrong[verdict.location]) < 0.5 * wrong[np.median]


@given(st.lists(st.floats(-5, 5), min_size=5, max_size=40), st.floats(-3, 3))
def test_the_common_change_follows_signs_and_shifts(ratios, shift):
    values = np.array(ratios)
    middle = verdict.location(values)

    assert min(ratios) - 1e-9 <= middle <= max(ratios) + 1e-9
    assert verdict.location(-values) == pytest.approx(-middle, abs=1e-6)
    assert verdict.location(values + shift) == pytest.approx(middle + shift, abs=1e-6)


def test_a_load_that_raises_functions_unequally_changes_none():
    """It doubles, and each function costs a little more or less than twice as much."""
    rng = np.random.default_rng(19)
    shares = np.full(40, 1 / 40)
    alarms = 0
    for _ in range(40):
        past = [contrast(costs(rng, shares), costs(rng, shares)) for _ in range(POSITIONS)]
        grown = shares * 2 ** (1 + rng.normal(0, 0.15, len(shares)))
        before, after = costs(rng, shares), costs(rng, grown)
        noise = noise_of_history(past, POSITIONS)
        found = judge(contrast(before, after), (before.samples[0], after.samples[0]), noise)
        alarms += set(found.changes) != {Change.UNCHANGED}

    assert alarms <= 4
