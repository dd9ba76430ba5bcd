"""How often intervals, joint bands and verdicts hold: the table of docs/statistics.md."""

import os

import helpers_coverage as worlds
import numpy as np
import pytest

from lisa_analysis.profiles.standing import standing_of
from lisa_analysis.profiles.thresholds import THRESHOLDS
from lisa_analysis.statistics.estimate import fit_series

pytestmark = pytest.mark.benchmark

REPETITIONS = int(os.environ.get("LISA_COVERAGE_REPETITIONS", "100"))
NAMED = ("U", "U with a spike", "inverted U", "ramp", "spikes", "uneven")
# Courses slower than a fifth of the run: .90 at least, or no interval.
SLOW = {"white + slow .15, 500", "white + slow .15, 6 layers, 300", "smooth slow .15, 500"}


def _more(world):
    """A run of few layers tells less of the rates than one of 32."""
    return 1 if world.layers == worlds.LAYERS else 2


@pytest.fixture(scope="module")
def table():
    """One row per world: shown, pointwise, joint, false shapes, drift."""
    rows = {}
    print("\n| world | rows | n_eff | true | shown | pointwise | joint | shapes | drift |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for world in worlds.WORLDS:
        repetitions = REPETITIONS * (_more(world) if world.repetitions == 1 else world.repetitions)
        held = worlds.coverage(world, repetitions=repetitions)
        false = sum(held.verdicts[word] for word in NAMED) / repetitions
        true = "" if world.n_eff is None else f"{world.n_eff:.0f}"
        rows[f"{world.name}, {world.steps}"] = (held, false)
        print(
            f"| {world.name} | {world.steps} | {held.rate('n_eff'):.0f} | {true} | "
            f"{held.rate('shown'):.2f} | {held.rate('layer'):.3f} | {held.rate('joint'):.2f} | "
            f"{false:.1%} | {np.mean(held.drift):.1%} |",
            flush=True,
        )
    return rows


def test_pointwise_intervals_hold_what_they_say(table):
    for name, (held, _) in table.items():
        assert held.rate("layer") >= (0.90 if name in SLOW else 0.93), name


def test_joint_bands_hold_all_layers(table):
    # Three standard errors below .95 at this number of repetitions, never below .93 by more.
    least = 0.93 - 2 * (0.05 * 0.95 / REPETITIONS) ** 0.5
    for name, (held, _) in table.items():
        assert held.rate("joint") >= least, name


def test_what_outlasts_the_run_is_part_of_it():
    """Intervals of the estimand, and beside them of a mean that no run of this length tells."""
    print("\n| world | rows | shown | this run: pointwise | joint | everlasting: pointwise | joint "
          "| shapes | drift |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for world in worlds.OUTLASTING:
        repetitions = _more(world) * REPETITIONS
        held = worlds.coverage(world, repetitions=repetitions)
        rates = [held.rate(what) for what in ("run_layer", "run_joint", "layer", "joint")]
        named = sum(held.verdicts[word] for word in NAMED) / repetitions
        print(
            f"| {world.name} | {world.steps} | {held.rate('shown'):.2f} | "
            f"{' | '.join(f'{rate:.2f}' for rate in rates)} | {named:.1%} | "
            f"{np.mean(held.drift):.1%} |",
            flush=True,
        )
        assert rates[0] >= 0.93, world.name
        assert rates[1] >= 0.93, world.name


def test_equal_layers_are_rarely_given_a_shape(table):
    plain = {name: row for name, row in table.items() if name not in SLOW}
    false = sum(row[1] for row in plain.values())
    assert false <= 0.02 * len(plain)


# Memory 1/(1 − ρ) of a slow course over the length of the run, and its standard deviation. At .5
# the run is one piece of the course; what lasts longer is part of the run.
MEMORIES, AMPLITUDES = (0.1, 0.2, 0.33, 0.5, 0.67, 1.0, 1.67, 3.33), (0.05, 0.15, 0.6)


@pytest.mark.parametrize("layers", [8, 32])
def test_how_long_a_course_may_last(layers):
    """Both tables of docs/statistics.md on slow courses."""
    print(f"\n| {layers} layers, sd of the course | {' | '.join(map(str, MEMORIES))} |")
    # Few layers tell less of a rate: about as many intervals of each.
    repetitions = max(REPETITIONS * 64 // (5 * layers), 4)
    # Runs, not layers, are independent.
    least = 0.9 - 3 * (0.05 / repetitions) ** 0.5
    for amplitude in AMPLITUDES:
        cells = []
        for memory in MEMORIES:
            slow = worlds.own_course(amplitude, rho=1 - 1 / (300 * memory))
            held = worlds.coverage(
                worlds.World("edge", worlds.white, 300, layers=layers, slow=slow),
                repetitions=repetitions, judge=False,
            )  # fmt: skip
            text = f"{held.rate('layer'):.2f}, {held.rate('joint'):.2f}"
            if memory > 0.5:
                text = f"{held.rate('run_layer'):.2f}, {held.rate('run_joint'):.2f} · {text}"
            cells.append(f"{text} ({held.rate('shown'):.2f})")
            assert held.rate("run_layer" if memory > 0.5 else "layer") >= least, (amplitude, memory)
        print(f"| {amplitude} | {' | '.join(cells)} |", flush=True)


@pytest.mark.parametrize("layers", [12, 32])
def test_power_of_a_short_pilot(layers):
    """At ρ = 0.5 and log-sd 0.3, one layer twice the others, and layers with an interval."""
    truth = np.zeros(layers)
    truth[5] = np.log(2)
    for steps in (20, 40, 80):
        named, wrong, shown = 0, 0, []
        for repetition in range(REPETITIONS):
            rng = np.random.default_rng([repetition, layers, steps])
            logs = truth + worlds.course(0.5, sd=0.3)(rng, steps, layers)
            fit = fit_series(np.exp(logs), log=True, clusters=None, confidence=0.95, rng=rng)
            above = standing_of(fit, 0.95, THRESHOLDS).above
            named, wrong = named + int(above[5]), wrong + int(above.sum() > above[5])
            shown.append(fit.known.mean())
        print(
            f"\n{layers} layers, {steps} records: named in {named / REPETITIONS:.0%}, another one "
            f"in {wrong / REPETITIONS:.0%}, with an interval {np.mean(shown):.0%}", end=""
        )  # fmt: skip
        # Twelve layers tell less of their common memory in 20 records.
        assert named >= (0.97 if layers > 12 or steps > 20 else 0.85) * REPETITIONS
        assert np.mean(shown) >= (0.9 if steps >= 40 else 0.7)
