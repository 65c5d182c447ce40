"""The statistics of a comparison: against statsmodels', and by what they promise."""

import importlib
from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from profiler.comparison import verdict
from profiler.comparison.verdict import Change, Contrast, Costs, Noise, NoiseSource, contrast, judge

RNG = np.random.default_rng(1)


@pytest.fixture(scope="module")
def stats() -> ModuleType:
    """Import scipy.stats where it is used: it takes a second, and every worker reads this file."""
    return importlib.import_module("scipy.stats")


@pytest.fixture(scope="module")
def multitest() -> ModuleType:
    """Import it likewise."""
    return importlib.import_module("statsmodels.stats.multitest")


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=40))
@example(p=[0.0, *[1.0] * 7, 5e-324])
def test_q_values_are_those_of_statsmodels(multitest, p):
    expected = multitest.multipletests(p, method="fdr_bh")[1]

    # Subnormal numbers have too few digits for a relative error.
    np.testing.assert_allclose(verdict.adjust(np.array(p)), expected, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize(("prior_df", "scale", "df"), [(4.0, 2.0, 6.0), (30.0, 0.01, 12.0)])
def test_a_prior_is_found_again(stats, prior_df, scale, df):
    """Variances drawn as the model says: a scaled F distribution with df and prior_df."""
    drawn = scale * stats.f.rvs(df, prior_df, size=40_000, random_state=2)
    found_df, found_scale = verdict.fit_variances(drawn, df)

    assert found_df == pytest.approx(prior_df, rel=0.1)
    assert found_scale == pytest.approx(scale, rel=0.02)


def test_equal_variances_leave_nothing_to_single_functions(stats):
    drawn = stats.chi2.rvs(8, size=20_000, random_state=3) / 8
    found_df, found_scale = verdict.fit_variances(drawn, 8.0)

    assert found_df > 300
    assert found_scale == pytest.approx(1, rel=0.02)


def costs(samples, present_s=3600.0) -> Costs:
    samples = np.atleast_2d(np.asarray(samples, dtype=float))
    return Costs(samples, np.full(len(samples), present_s))


counts = st.lists(st.integers(0, 5000), min_size=12, max_size=12)


@given(counts, counts)
def test_swapping_the_sides_mirrors_everything(before, after):
    one, other = costs(before), costs(after)
    there, back = contrast(one, other), contrast(other, one)

    np.testing.assert_allclose(there.ratios, -back.ratios, atol=1e-12)
    np.testing.assert_allclose(there.counting, back.counting)
    assert there.common == pytest.approx(-back.common)


@given(counts)
def test_with_itself_nothing_has_changed(samples):
    now = contrast(costs(samples), costs(samples))
    noise = known_noise(now)
    found = judge(now, (np.array(samples), np.array(samples)), noise)

    assert set(found.changes) == {Change.UNCHANGED}
    assert (found.low <= 0).all()
    assert (found.high >= 0).all()


large_counts = st.lists(st.integers(2000, 90_000), min_size=12, max_size=12)


@given(large_counts, large_counts, st.integers(2, 50))
def test_scaling_both_sides_changes_nothing(before, after, factor):
    """Neither longer windows, of samples and presence, nor another unit of time."""
    usual = contrast(costs(before), costs(after))
    slower = contrast(costs(before, 3600.0 * factor), costs(after, 3600.0 * factor))
    longer = contrast(
        *(costs(factor * np.array(side), 3600.0 * factor) for side in (before, after))
    )

    for other in (slower, longer):
        np.testing.assert_allclose(other.ratios, usual.ratios, atol=1e-3)
        assert other.common == pytest.approx(usual.common, abs=1e-3)


def test_a_busier_service_changes_nothing_but_the_common_change():
    samples = RNG.integers(500, 5000, 40)
    now = contrast(costs(samples), costs(3 * samples))

    assert np.exp(now.common) == pytest.approx(3, rel=1e-3)
    assert np.abs(now.ratios).max() < 2e-3
    longer = contrast(costs(samples), costs(3 * samples, present_s=3 * 3600.0))
    assert longer.common == pytest.approx(0, abs=1e-3)


def test_few_functions_have_no_common_change():
    now = contrast(costs([4000, 3000, 10]), costs([8000, 6000, 20]))

    assert now.common == 0
    assert np.exp(now.ratios[0, 0]) == pytest.approx(2, rel=1e-3)


def test_hosts_where_the_service_was_not_are_left_out():
    before = Costs(np.full((3, 4), 100.0), np.array([60.0, 60, 0]))
    after = Costs(np.full((3, 4), 100.0), np.array([60.0, 0, 60]))

    assert contrast(before, after).ratios.shape == (1, 4)
    with pytest.raises(ValueError, match="no host has the service on both sides"):
        contrast(before, Costs(after.samples, np.array([0.0, 0, 60])))


def known_noise(now: Contrast, sd: float = 0.02) -> Noise:
    """A past in which all functions varied by as much, besides what counting adds."""
    variances = now.counting + sd**2
    return Noise(NoiseSource.HISTORY, 12, 12.0, variances, now.counting, sd**2)


def test_what_changed_is_named_and_nothing_else():
    before = RNG.integers(2000, 4000, 30).astype(float)
    after = before.copy()
    after[3] *= 1.5
    after[4] /= 1.5
    before[5], after[6] = 0, 0
    now = contrast(costs(before), costs(after))
    found = judge(now, (before, after), known_noise(now))

    changed = {i: change for i, change in enumerate(found.changes) if change != "unchanged"}
    assert changed == {3: Change.MORE, 4: Change.LESS, 5: Change.NEW, 6: Change.GONE}
    assert found.low[3] < np.log(1.5) < found.high[3]
    assert (found.q >= found.p - 1e-12).all()


def test_a_function_that_has_a_few_samples_is_not_called_new():
    before = np.full(30, 3000.0)
    after = before.copy()
    before[0], after[0] = 0, 9
    now = contrast(costs(before), costs(after))

    assert judge(now, (before, after), known_noise(now)).changes[0] == Change.UNCHANGED


def test_a_change_that_hardly_matters_is_none():
    """A function of one in 3,000 doubles, which is certain and makes 0.03 points."""
    before = np.full(30, 30_000.0)
    before[0] = 300
    after = before.copy()
    after[0] = 600
    now = contrast(costs(before), costs(after))
    found = judge(now, (before, after), known_noise(now))

    assert found.q[0] < verdict.LEVEL
    assert found.changes[0] == Change.UNCHANGED
    points = verdict.points_of(now.mean, before, after)
    assert points[0] == pytest.approx(300 / before.sum(), rel=0.01)


def test_what_different_hosts_always_differ_by_is_no_change():
    rng = np.random.default_rng(6)
    rates = rng.uniform(2000, 4000, 40)
    of_canary = rates * np.exp(rng.normal(0, 0.3, 40))

    def sides(factor: float = 1.0) -> tuple[Costs, Costs]:
        slower = of_canary.copy()
        slower[7] *= factor
        rest = [rng.poisson(rates * np.exp(rng.normal(0, 0.03, 40))) for _ in range(3)]
        canary = rng.poisson(slower * np.exp(rng.normal(0, 0.03, 40)))
        return costs(rest), costs(canary)

    past = [verdict.contrast_of_replicates(*sides())[0] for _ in range(9)]
    for factor, expected in ((1.0, Change.UNCHANGED), (1.5, Change.MORE)):
        pair = sides(factor)
        now, noise = verdict.against_history(verdict.contrast_of_replicates(*pair)[0], past)
        samples = pair[0].samples.sum(axis=0), pair[1].samples.sum(axis=0)
        found = judge(now, samples, noise)
        assert found.changes[7] == expected
        assert found.low[7] < np.log(factor) < found.high[7]
        assert found.changes.count(Change.UNCHANGED) >= 38


def simulate(rng, positions: int, functions: int = 60, sd: float = 0.1) -> list[Costs]:
    """Windows of one host in which nothing changes: counted samples of rates that vary."""
    rates = 40_000 / np.arange(1, functions + 1)
    varied = rates * np.exp(rng.normal(0, sd, (2 * positions, functions)))
    return [costs(rng.poisson(row)) for row in varied]


def test_unchanged_services_alarm_in_one_of_twenty_comparisons(stats):
    """The family of all functions counts: any function that is called changed is an alarm."""
    rng = np.random.default_rng(4)
    alarms = 0
    for _ in range(400):
        windows = simulate(rng, 9)
        pairs = [contrast(a, b) for a, b in zip(windows[::2], windows[1::2], strict=True)]
        sides = windows[-2].samples.sum(axis=0), windows[-1].samples.sum(axis=0)
        found = judge(pairs[-1], sides, verdict.noise_of_history(pairs[:-1], 8))
        alarms += set(found.changes) != {Change.UNCHANGED}

    assert stats.binomtest(alarms, 400, 0.05).pvalue > 1e-3
