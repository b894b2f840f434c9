"""The numbers of a comparison, against numbers worked out by hand."""

import math

import pytest
from sweep_helpers import row

from hf_mars.sweep.compare import best_settings, edge, extended, losses_by_setting, paired, reaches
from hf_mars.sweep.curves import Point, diverged, final_loss, seconds_per_step, smoothed
from hf_mars.sweep.plan import Setting
from hf_mars.sweep.summary import compare, verdict


def setting(rate, **others):
    return Setting("a", (("optim", "a"), ("learning_rate", repr(rate)), *others.items()))


def training(*losses):
    return [Point(step, loss, step / 10) for step, loss in enumerate(losses, 1)]


def test_paired_difference():
    """Differences −0.1, −0.3, −0.2: mean −0.2, deviation 0.1, error 0.1/√3. Unpaired, it would be 0.82."""
    found = paired({1: 2.9, 2: 3.7, 3: 4.8, 4: 1.0}, {1: 3.0, 2: 4.0, 3: 5.0})
    assert found.mean == pytest.approx(-0.2) and found.error == pytest.approx(0.1 / math.sqrt(3)) and found.seeds == 3


def test_one_pair_has_no_error_and_infinite_losses_make_no_pair():
    found = paired({1: 2.0, 2: math.inf}, {1: 2.5, 2: 2.5})
    assert (found.mean, found.error, found.seeds) == (-0.5, None, 1)
    assert paired({1: math.inf}, {1: 2.0}) is None and paired({1: 1.0}, {2: 1.0}) is None


def test_where_a_curve_reaches_a_loss():
    curve = [Point(10, 5.0, 0), Point(20, 4.0, 0), Point(40, 2.0, 0)]
    assert reaches(curve, 3.0) == 30 and reaches(curve, 4.0) == 20 and reaches(curve, 6.0) == 10
    assert reaches(curve, 1.9) is None
    assert reaches([Point(10, math.nan, 0), Point(20, 1.0, 0)], 2.0) == 20


def test_smoothed_training_losses():
    """Of 20 steps the window is 2: the last value is the mean of the last tenth."""
    points = smoothed(training(*range(20, 0, -1)))
    assert [(p.step, p.loss) for p in points[:2]] == [(2, 19.5), (3, 18.5)] and points[-1].loss == 1.5


def test_rows_that_are_further_apart_than_the_window():
    assert [p.loss for p in smoothed([Point(50, 4.0, 0), Point(100, 3.0, 0)])] == [4.0, 3.0]


def test_the_final_loss_is_the_last_evaluation_or_the_last_tenth_of_training():
    log = {"training": training(5, 4, 3, 2, 1), "evaluation": []}
    assert final_loss(log) == (1, "training")
    assert final_loss({**log, "evaluation": [Point(3, 3.5, 0), Point(5, 2.5, 0)]}) == (2.5, "evaluation")


@pytest.mark.parametrize(
    "losses, evaluation, expected",
    [
        ((3, 2, 1), (2, 1), False),
        ((3, 2, 1), (1, 2), False),  # overfitted, which is no divergence
        ((3, 4, 5), (2, 1), True),
        ((3, 2, math.nan), (), True),
        ((3, 2, 1), (2, math.inf), True),
    ],
)
def test_diverged(losses, evaluation, expected):
    points = [Point(step, loss, 0) for step, loss in enumerate(evaluation, 1)]
    assert diverged({"training": training(*losses), "evaluation": points}) is expected


def test_seconds_per_step_leave_out_the_start():
    """Steps of 9 s, then 1 s, one of them 5 s: the median of the last two thirds is 1."""
    clock = [9, 18, 19, 20, 25, 26, 27, 28, 29]
    assert seconds_per_step([Point(step, 1.0, second) for step, second in enumerate(clock, 1)]) == 1


# ---- grids ----


def test_edges():
    grid = [setting(rate) for rate in (1e-4, 1e-3, 1e-2)]
    assert [edge(each, grid) for each in grid] == ["lower", None, "upper"]
    assert edge(grid[0], grid[:1]) is None


def test_only_settings_alike_but_for_the_rate_are_neighbours():
    grid = [setting(1e-3, gamma="1"), setting(1e-2, gamma="1"), setting(1e-1, gamma="2")]
    assert edge(grid[1], grid) == "upper" and edge(grid[2], grid) is None


@pytest.mark.parametrize(
    "rates, side, expected",
    [([1e-3, 3e-3, 6e-3], "upper", 1.2e-2), ([1e-3, 3e-3, 6e-3], "lower", 3.333e-4), ([1e-3], "upper", 2e-3)],
)
def test_extended_by_the_ratio_of_neighbours(rates, side, expected):
    grid = [setting(rate, gamma="1") for rate in rates]
    assert extended(grid[0], grid, side) == setting(expected, gamma="1")


# ---- best settings ----


def test_the_best_setting_is_chosen_on_the_seeds_that_all_have():
    """On seed 1, which every setting has, b's 1e-3 wins; its own seed 2 went badly."""
    rows = [row("a", 1e-3, 1, 3.0), row("a", 1e-2, 1, 2.5), row("a", 1e-2, 2, 2.5)]
    rows += [row("b", 1e-3, 1, 2.0), row("b", 1e-3, 2, 9.0), row("b", 1e-2, 1, 2.1)]
    best = best_settings(losses_by_setting(rows))
    assert {label: each.learning_rate for label, each in best.items()} == {"a": 1e-2, "b": 1e-3}


def test_a_setting_that_failed_once_is_not_the_best():
    rows = [row("a", 1e-3, 1, 2.0), row("a", 1e-3, 2, None, status="failed")]
    assert best_settings(losses_by_setting(rows)) == {"a": None}
    rows += [row("a", 1e-2, 1, 8.0), row("a", 1e-2, 2, 8.0)]
    assert best_settings(losses_by_setting(rows))["a"].learning_rate == 1e-2


# ---- the whole comparison ----

CURVE = [(20, 5.0), (40, 4.0), (60, 3.0), (80, 2.5), (100, 2.0)]


def rows_of_two(difference):
    """Curves of b are lower than a's by `difference`; b's step takes 0.3 s, a's 0.2 s alone on the machine."""
    rows = []
    for seed in (1, 2):
        for label, lower, seconds in (("a", 0.0, 0.2), ("b", difference, 0.3)):
            curve = [(step, loss - lower + seed / 10) for step, loss in CURVE]
            rows.append(row(label, 1e-3, seed, curve[-1][1], curve=curve, jobs=2))
            rows.append(row(label, 1e-3, 1, 9.0, kind="timing", seconds_per_step=seconds))
    return rows


def test_tokens_and_seconds_to_the_baselines_loss():
    """b's mean curve, 1 below a's: 2.0 + 0.15 is passed at step 60, after 90 % of a's 20 s: 60 × 0.3 s = 18 s."""
    comparison = compare(rows_of_two(1.0), ["a", "b"])
    b = comparison.summaries[1]
    assert b.part_of_steps == pytest.approx(0.6) and b.part_of_seconds == pytest.approx(0.9)
    assert b.difference.mean == pytest.approx(-1.0) and b.difference.error == pytest.approx(0.0, abs=1e-12)
    assert (b.complete, b.diverged, b.failed, b.settings, b.state_bytes) == (2, 0, 0, 1, 800)
    assert verdict(b, comparison).startswith("b reaches a's best loss after 60 % of the steps and 90 % of the time;")


def test_a_worse_optimizer_does_not_reach_it():
    comparison = compare(rows_of_two(-0.5), ["a", "b"])
    assert comparison.summaries[1].part_of_steps is None
    assert verdict(comparison.summaries[1], comparison).startswith("b does not reach a's best loss; it ends 0.5000 (")


def test_level_within_two_standard_errors():
    rows = [row("a", 1e-3, 1, 2.0, curve=CURVE), row("a", 1e-3, 2, 2.0, curve=CURVE)]
    rows += [row("b", 1e-3, 1, 1.9, curve=CURVE), row("b", 1e-3, 2, 2.06, curve=CURVE)]
    comparison = compare(rows, ["a", "b"])
    assert "ends level with a: -0.0200 ± 0.0800 over 2 seeds" in verdict(comparison.summaries[1], comparison)


def test_few_evaluations_leave_the_comparison_of_curves_to_training_losses():
    rows = [row("a", 1e-3, 1, 2.0, curve=CURVE[-1:]), row("b", 1e-3, 1, 1.0, curve=CURVE)]
    comparison = compare(rows, ["a", "b"])
    assert comparison.curve_kind == "training" and comparison.summaries[1].part_of_steps == 1.0
    # The curves are the same; one that ends above the baseline has not reached its loss.
    rows[1] = row("b", 1e-3, 1, 2.1, curve=CURVE)
    assert compare(rows, ["a", "b"]).summaries[1].part_of_steps is None


def test_without_a_run_that_came_through():
    rows = [row("a", 1e-3, 1, 2.0, curve=CURVE), row("b", 1e-3, 1, None, status="diverged")]
    comparison = compare(rows, ["a", "b", "c"])
    assert "b has no setting that came through with every seed (1 runs diverged, 0 failed)" in verdict(
        comparison.summaries[1], comparison
    )
    assert comparison.summaries[2].best is None
    assert verdict(comparison.summaries[2], comparison) == "c has not run yet."
