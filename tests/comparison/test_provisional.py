"""Provisional verdicts: their statistics against scipy's, and by what they promise."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.comparison import comparison, provisional, verdict
from profiler.comparison.deployments import deployments_in
from profiler.comparison.gate import Gate, verdict_of
from profiler.comparison.provisional import (
    Evidence,
    ProvisionalNoise,
    Shape,
    Stretch,
    Usual,
    variogram,
)
from profiler.comparison.rollouts import DeploymentKind
from profiler.comparison.sides import Operand
from profiler.comparison.verdict import Change, Costs, NoiseSource
from storage.objects.directory import DirectoryStore
from storage.objects.tenant import TenantStore
from storage.query.query import Query
from storage.selector import Selector
from tests.support import profiles as some
from tests.support.stores import at, directory, minutes, put
from tests.support.varying import FUNCTIONS, minute

API = Selector.parse('{service="api"}')
GATE = Gate.parse("relative>=10%,share>=0.5pp")
TARGET = Shape(120.0, 300.0)
PAST, SETTLED = 2, 3
"""Minutes before the deployment, and from its first one on until it has settled."""


@pytest.fixture(scope="module")
def scipy() -> ModuleType:
    """Import it where it is used: it takes a second, and every worker reads this file."""
    for name in ("stats", "integrate"):
        importlib.import_module(f"scipy.{name}")
    return importlib.import_module("scipy")


@given(st.floats(0.0, 400.0), st.floats(0.5, 200.0))
def test_the_logarithm_of_students_density_is_that_of_scipy(scipy, squared, df):
    (found,) = provisional.log_student(np.array([squared]), df)

    assert found == pytest.approx(scipy.stats.t.logpdf(np.sqrt(squared), df), rel=1e-9)


@pytest.mark.parametrize("shape", [(60, 60), (60, 300), (120, 900), (3600, 7200)])
def test_a_variogram_is_the_integral_of_the_noise(scipy, shape):
    """Of the covariance exp(-|lag| / 6 min), over one window, and over both."""
    length, distance = (each / 360.0 for each in shape)
    mean = functools.partial(
        scipy.integrate.dblquad, lambda a, b: np.exp(-abs(a - b)) / length**2, 0, length
    )
    within = (
        2
        * scipy.integrate.dblquad(
            lambda a, b: np.exp(a - b) / length**2, 0, length, 0, lambda b: b
        )[0]
    )
    across = mean(distance, distance + length)[0]

    assert variogram(Shape(*map(float, shape))) == pytest.approx(2 * (within - across), rel=1e-6)


def test_windows_of_a_month_have_a_variogram():
    month = 30 * 86_400.0

    assert 0 < variogram(Shape(month, month)) < 1e-3


def test_p_values_are_the_mean_over_what_the_noise_may_be(scipy):
    """The same model, written with scipy's densities and without arrays of functions."""
    now, samples, evidence = some_contrast(), some_samples(), some_evidence()
    noise = ProvisionalNoise((evidence,), TARGET, 1)
    found = noise.test(now, samples)

    variances = np.exp(np.linspace(np.log(1e-5), np.log(3.0), 40))
    freedoms, prior = [4, 6, 10, 16, 30, 100], [1, 2, 3, 3, 2, 1]
    usual = 0.10**2 * variogram(TARGET)
    weights = np.zeros((len(variances), len(freedoms)))
    p = np.zeros((*weights.shape, FUNCTIONS))
    for i, variance in enumerate(variances):
        spread = np.sqrt(evidence.counting + evidence.factor * variance)
        squares = evidence.weight * ((evidence.ratios / spread) ** 2).sum(axis=0)
        for j, freedom in enumerate(freedoms):
            densities = scipy.stats.t.logpdf(evidence.ratios, freedom, scale=spread)
            weights[i, j] = (
                np.log(prior[j])
                + scipy.stats.norm.logpdf(np.log(variance), np.log(usual), 1.1)
                + evidence.weight * densities.sum()
            )
            total = freedom + evidence.positions
            own = variance * (freedom + squares) / total
            scale = np.sqrt(now.counting + now.unequal(noise.common_variance) + own)
            df = np.minimum(total * (scale**2 / own) ** 2, 1e4)
            p[i, j] = 2 * scipy.stats.t.sf(abs(now.mean), df, scale=scale)
    posterior = np.exp(weights - weights.max())
    posterior /= posterior.sum()

    np.testing.assert_allclose(found.p, np.einsum("ij,ijf->f", posterior, p), rtol=1e-6)


def some_samples() -> tuple[np.ndarray, np.ndarray]:
    return np.full(FUNCTIONS, 900.0), np.linspace(700.0, 1500.0, FUNCTIONS)


def some_contrast() -> verdict.Contrast:
    before, after = (Costs(each[None], np.full(1, 120.0)) for each in some_samples())
    return verdict.contrast(before, after)


def some_evidence() -> Evidence:
    rng = np.random.default_rng(3)
    ratios = rng.normal(0, 0.1, (3, FUNCTIONS))
    return Evidence(ratios, np.zeros(3), np.full((3, FUNCTIONS), 1 / 300), 0.4, 0.6)


def stretch(rng: np.random.Generator, parts: int, hosts: int, sd: float) -> Stretch:
    """Return minutes in which functions vary, each by itself."""
    rates = 600 * np.exp(rng.normal(0, sd, (parts, hosts, FUNCTIONS)))
    return Stretch(rng.poisson(rates).astype(float), np.full((parts, hosts), 60.0), 60.0)


def test_what_varies_more_has_wider_intervals():
    rng = np.random.default_rng(4)
    now, samples = some_contrast(), some_samples()
    reaches = []
    for sd in (0.02, 0.1, 0.4):
        evidence = provisional.of_stretch(stretch(rng, 12, 1, sd), TARGET)
        reaches.append(ProvisionalNoise(tuple(evidence), TARGET, 1).test(now, samples).reach.mean())

    assert reaches == sorted(reaches)
    assert reaches[2] > 3 * reaches[0]


def test_a_function_that_varies_more_than_others_has_a_wider_interval():
    rng = np.random.default_rng(5)
    minutes_of = stretch(rng, 30, 1, 0.05)
    minutes_of.samples[:, :, 0] *= np.exp(rng.normal(0, 0.5, (30, 1)))
    noise = ProvisionalNoise(tuple(provisional.of_stretch(minutes_of, TARGET)), TARGET, 1)
    reach = noise.test(some_contrast(), some_samples()).reach

    assert reach[0] > 2 * np.median(reach[1:])


@pytest.mark.parametrize("hosts", [2, 3, 7])
def test_hosts_tell_the_noise_but_not_the_change(hosts):
    """They are one fewer, of the variance that the mean has, whatever all of them did."""
    rng = np.random.default_rng(6)
    sums = []
    for _ in range(200):
        rates = np.full((2, hosts, FUNCTIONS), 900.0)
        rates[1, :, 0] *= 5
        sides = (Costs(rng.poisson(each).astype(float), np.full(hosts, 60.0)) for each in rates)
        now = verdict.contrast(*sides)
        (evidence,) = provisional.of_hosts(now)
        assert evidence.ratios.shape == (hosts - 1, FUNCTIONS)
        sums.append((evidence.ratios**2).mean(axis=0) / now.counting)

    expected = np.mean(sums, axis=0)
    assert expected[1:].mean() == pytest.approx(1.0, abs=0.15)
    assert expected[0] < 3  # the change is 1,000 times as large


def test_hosts_alone_leave_a_verdict_provisional():
    """Fewer than eight say too little of the time between both windows."""
    sides = (Costs(np.full((7, FUNCTIONS), 900.0), np.full(7, 60.0)) for _ in range(2))
    noise = ProvisionalNoise(tuple(provisional.of_hosts(verdict.contrast(*sides))), TARGET, 7)

    assert noise.positions == 6
    assert (noise.source, noise.is_provisional) == (NoiseSource.WITHIN, True)


def test_a_part_alone_says_nothing():
    rng = np.random.default_rng(7)

    assert provisional.of_stretch(stretch(rng, 1, 2, 0.1), TARGET) == []
    noise = ProvisionalNoise((), TARGET, 1)
    assert (noise.source, noise.is_provisional) == (NoiseSource.PRIOR, True)


@given(st.integers(2, 30), st.integers(1, 10), st.integers(1, 30))
def test_any_stretch_has_windows_within_it(parts, length, distance):
    target = Shape(60.0 * length, 60.0 * max(length, distance))
    (evidence,) = provisional.of_stretch(
        Stretch(np.full((parts, 1, 3), 50.0), np.full((parts, 1), 60.0), 60.0), target
    )

    assert 0 < evidence.factor < 2
    assert 1 <= evidence.positions <= parts
    assert np.allclose(evidence.ratios, 0)


def test_swapping_the_sides_mirrors_the_verdict():
    rng = np.random.default_rng(8)
    evidence = tuple(provisional.of_stretch(stretch(rng, 6, 1, 0.1), TARGET))
    noise = ProvisionalNoise(evidence, TARGET, 1)
    before, after = some_samples()
    sides = [Costs(each[None], np.full(1, 120.0)) for each in (before, after)]
    there = verdict.judge(verdict.contrast(*sides), (before, after), noise)
    back = verdict.judge(verdict.contrast(*sides[::-1]), (after, before), noise)

    np.testing.assert_allclose(there.p, back.p)
    np.testing.assert_allclose(there.low, -back.high)
    mirrored = {Change.MORE: Change.LESS, Change.LESS: Change.MORE}
    assert [mirrored.get(each, each) for each in there.changes] == back.changes


def test_more_load_changes_nothing():
    """All functions alike; and a service that ran for half of the time."""
    rng = np.random.default_rng(9)
    noise = ProvisionalNoise(
        tuple(provisional.of_stretch(stretch(rng, 6, 1, 0.1), TARGET)), TARGET, 1
    )
    before = some_samples()[0]
    for factor, present_s in ((3.0, 120.0), (0.5, 60.0)):
        sides = (
            Costs(before[None], np.full(1, 120.0)),
            Costs(factor * before[None], np.full(1, present_s)),
        )
        found = verdict.judge(verdict.contrast(*sides), (before, factor * before), noise)
        assert set(found.changes) == {Change.UNCHANGED}
        np.testing.assert_allclose(found.ratios, 0, atol=1e-3)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    """One host, for two minutes in a first version."""
    rng = np.random.default_rng(10)
    return directory(tmp_path / "store", *(minute(rng, n, 0, "1", {}) for n in range(PAST)))


class Judged(NamedTuple):
    compared: comparison.Comparison
    word: str
    length_ns: int


def follow(store: DirectoryStore, cache: Path, until: int, factor: float) -> list[Judged | None]:
    """Return the deployment's verdict after each minute of a second version."""
    rng = np.random.default_rng(11)
    tenant = TenantStore(store)
    found: list[Judged | None] = []
    for number in range(PAST, until):
        put(store, minute(rng, number, 0, "2", {3: factor}))
        query = Query(tenant, cache)
        listed = deployments_in(tenant, query, minutes(0, number + 1), API)
        match = listed.matches[0] if listed.matches else None
        if match is None or match.before is None or match.after is None:
            found.append(None)
            continue
        compared = comparison.of_store(query, match.before, match.after, listed.all_ns)
        start_ns, end_ns = match.after.window
        found.append(Judged(compared, verdict_of(compared, GATE).word, end_ns - start_ns))
    return found


def test_two_minutes_of_past_are_enough_and_a_verdict_never_recedes(store, tmp_path):
    """It comes with the first minute after the deployment has settled, and becomes final."""
    found = follow(store, tmp_path / "cache", 50, 2.0)
    judged = [each for each in found if each]

    assert found.index(judged[0]) <= SETTLED
    assert None not in found[found.index(judged[0]) :]
    assert {each.word for each in judged} == {"regression"}
    assert NoiseSource.NONE not in {each.compared.source for each in judged}
    lengths = [each.length_ns for each in judged]
    assert lengths == sorted(lengths)
    provisional_ones = [each.compared.is_provisional for each in judged]
    assert provisional_ones == sorted(provisional_ones, reverse=True)
    assert provisional_ones[0]
    assert not provisional_ones[-1]
    for each in judged:
        named = {f.frame.function: f.change for f in comparison.changed(each.compared.functions)}
        assert named == {"function_3": Change.MORE}


def test_a_version_that_changes_nothing_raises_no_alarm(store, tmp_path):
    judged = [each for each in follow(store, tmp_path / "cache", 12, 1.0) if each]

    assert judged
    assert {each.word for each in judged} == {"unchanged"}


def test_the_verdict_of_a_canary_does_not_recede_when_it_is_known_to_be_one(tmp_path):
    """For half an hour it is a rollout that may have more hosts."""
    rng = np.random.default_rng(15)
    store, kinds = directory(tmp_path / "store"), []
    for number in range(44):
        is_new = number >= PAST
        put(store, minute(rng, number, 0, "2" if is_new else "1", {3: 2.0} if is_new else {}))
        put(store, minute(rng, number, 1, "1", {}))
        if number < PAST + SETTLED or number % 6:
            continue
        tenant = TenantStore(store)
        query = Query(tenant, tmp_path / "cache")
        listed = deployments_in(tenant, query, minutes(0, number + 1), API)
        (deployment,), (match,) = listed.deployments, listed.matches
        assert match.before
        assert match.after
        found = comparison.of_store(query, match.before, match.after, listed.all_ns)
        named = {f.frame.function: f.change for f in comparison.changed(found.functions)}
        assert named["function_3"] == Change.MORE, (number, found.warnings)
        kinds.append(deployment.kind)

    assert (kinds[0], kinds[-1]) == (DeploymentKind.ROLLOUT, DeploymentKind.CANARY)


def test_a_provisional_verdict_fails_a_pipeline_but_a_strict_one(store, tmp_path):
    judged = [each for each in follow(store, tmp_path / "cache", 7, 3.0) if each]
    compared = judged[-1].compared

    assert verdict_of(compared, GATE) == ("regression", 1, True)
    assert verdict_of(compared, GATE, is_strict=True) == ("regression", 3, True)


def test_what_is_usual_is_what_other_services_do():
    rng = np.random.default_rng(12)
    experience = Usual.of_experience(TARGET)
    quiet, noisy = (
        Usual.of_services([stretch(rng, 20, 1, sd) for _ in range(6)], TARGET) for sd in (0.03, 0.3)
    )

    assert Usual.of_services([], TARGET) == pytest.approx(experience)
    assert quiet.mean < experience.mean < noisy.mean
    assert max(quiet.sd, noisy.sd) < experience.sd
    assert quiet.services == noisy.services == 6


def test_services_that_are_hardly_sampled_say_nothing():
    rng = np.random.default_rng(13)
    rare = Stretch(rng.poisson(2.0, (20, 1, FUNCTIONS)).astype(float), np.full((20, 1), 60.0), 60.0)

    assert Usual.of_services([rare], TARGET) == pytest.approx(Usual.of_experience(TARGET))


def test_without_any_past_other_services_of_the_host_decide_how_certain_a_change_is(tmp_path):
    reaches = []
    for sd in (0.02, 1.0):
        compared = beside_others(tmp_path / str(sd), sd)
        (function,) = (f for f in compared.functions if f.frame.function == "function_3")
        assert (compared.source, compared.is_provisional) == (NoiseSource.FLEET, True)
        assert compared.positions == len(OTHERS)
        reaches.append(function.relative[2] - function.relative[1])

    assert reaches[1] > 1.5 * reaches[0]


def test_other_hosts_and_versions_that_end_are_no_neighbours(tmp_path):
    compared = beside_others(tmp_path, 0.02, host="web-1", version=lambda _: "1")
    changing = beside_others(tmp_path / "changing", 0.02, version=str)

    assert compared.source == changing.source == NoiseSource.PRIOR


OTHERS = ("cart", "mail", "stock")


def beside_others(
    folder: Path,
    sd: float,
    host: str = "web-0",
    version: Callable[[int], str] = lambda _: "1",
) -> comparison.Comparison:
    """Compare two minutes of a service that began just before, beside others of half an hour."""
    rng = np.random.default_rng(14)
    store = directory(folder)
    for number in range(24):
        if number >= 20:
            put(store, minute(rng, number, 0, "1" if number < 21 else "2", {}))
        put(store, minute_of_others(rng, number, host, version(number), sd))
    before, after = minutes(20, 21), minutes(23, 24)
    query = Query(TenantStore(store), folder / "cache")
    return comparison.of_store(query, Operand(API, before), Operand(API, after))


def minute_of_others(rng: np.random.Generator, number: int, host: str, version: str, sd: float):
    stacks, present = [], {}
    for service in OTHERS:
        labels = {"service": service, "version": version}
        present[some.make_labels(labels)] = 60_000_000_000
        rates = 400 * np.exp(rng.normal(0, sd, 12))
        stacks += [
            ({**labels, "comm": service}, [some.named(f"{service}_{i}")], int(samples))
            for i, samples in enumerate(rng.poisson(rates))
        ]
    profile = some.build(stacks)
    accounting = dataclasses.replace(profile.accounting, services=present)
    profile = dataclasses.replace(profile, accounting=accounting)
    return at(profile, number, host, "beef".rjust(16, "0"))
