"""Distributions: each compared with scipy's."""

import importlib
from types import ModuleType

import numpy as np
import pytest

from profiler.comparison import distributions

RNG = np.random.default_rng(1)


@pytest.fixture(scope="module")
def stats() -> ModuleType:
    """Import scipy.stats where it is used: it takes a second, and every worker reads this file."""
    return importlib.import_module("scipy.stats")


@pytest.fixture(scope="module")
def special() -> ModuleType:
    """Import it likewise."""
    return importlib.import_module("scipy.special")


def test_p_values_are_those_of_scipy(stats):
    t = RNG.normal(0, 30, 400)
    df = RNG.uniform(0.5, 3000, 400)
    expected = 2 * stats.t.sf(np.abs(t), df)
    is_there = expected > 1e-280

    np.testing.assert_allclose(
        distributions.student_p(t, df)[is_there], expected[is_there], rtol=1e-9
    )
    assert distributions.student_p(np.zeros(1), np.ones(1)) == 1


@pytest.mark.parametrize("p", [0.5, 0.05, 0.001, 1e-6])
def test_quantiles_are_those_of_scipy(stats, p):
    df = [0.7, 1.0, 2, 6, 40, 1e5]
    found = [distributions.student_quantile(p, each) for each in df]

    np.testing.assert_allclose(found, stats.t.isf(p / 2, df), rtol=1e-9)


def test_a_quantile_takes_a_few_steps_at_any_df(monkeypatch):
    """Also where rounding keeps the p-value from being met to the last digit."""
    calls = []
    student_p = distributions.student_p
    monkeypatch.setattr(
        distributions, "student_p", lambda *given: calls.append(given) or student_p(*given)
    )
    for df in (1, 8, 300, 1e5, 1e6, 1e8):
        calls.clear()
        distributions.student_quantile(0.05, df)
        assert len(calls) < 20


@pytest.mark.parametrize(("hits", "tries"), [(0, 20), (1, 20), (7, 9), (9, 9), (50, 1000)])
def test_intervals_of_rates_are_those_of_scipy(stats, hits, tries):
    expected = stats.binomtest(hits, tries).proportion_ci(0.95, method="exact")

    assert distributions.rate_interval(hits, tries, 0.05) == pytest.approx(
        tuple(expected), abs=1e-9
    )


def test_derivatives_of_log_gamma_are_those_of_scipy(special):
    x = np.concatenate([RNG.uniform(0.01, 60, 400), [1e4]])

    np.testing.assert_allclose(distributions.digamma(x), special.digamma(x), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(distributions.trigamma(x), special.polygamma(1, x), rtol=1e-9)
    for y in (1e-8, 1e-3, 0.3, 5, 1e4, 1e9):
        back = special.polygamma(1, distributions.inverse_trigamma(y))
        assert back == pytest.approx(y, rel=1e-6)
