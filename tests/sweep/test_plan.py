"""Plans: from names, from YAML, stored, added to."""

from pathlib import Path

import pytest

from hf_mars.sweep.errors import SweepError
from hf_mars.sweep.plan import Plan, Run, Setting
from hf_mars.sweep.plan_file import make_plan, read_plan_file

YAML = """
arguments: {weight_decay: [0.01, 0.1]}
learning_rate: [1e-3, 2e-3]
optimizers:
  - {optim: adamw_torch, adam_beta2: [0.95, 0.99]}
  - optim: mars_adamw
    label: mars γ
    optim_args: {gamma: [0.025, 0.05], max_norm: none, exact: false}
  - optim: mars_m
    learning_rate: [6e-3]
    optim_args: [gamma=0.1, "gamma=0.2,max_norm=none"]
    weight_decay: [0, 0.1]
    warmup_steps: [1, 2]
"""


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(YAML)
    return path


def made(optimizers=("a", "b"), rates=(1e-3, 1e-2), command=("python", "train.py"), **options):
    options = {"seeds": 2, "final_seeds": None, **options}
    return make_plan(list(command), list(optimizers), list(rates), **options)


def setting(label, rate, **others):
    return Setting(label, (("optim", label), ("learning_rate", repr(rate)), *others.items()))


def test_a_plan_of_names_takes_turns_seed_by_seed():
    runs = [(run.setting.label, run.setting.learning_rate, run.seed) for run in made().runs()]
    one = [("a", 1e-3), ("b", 1e-3), ("a", 1e-2), ("b", 1e-2)]
    assert runs == [(*each, 1) for each in one] + [(*each, 2) for each in one]


def test_a_plan_file_multiplies_its_lists(plan_file):
    file = read_plan_file(plan_file)
    plan = make_plan(["x"], file["optimizers"], file["learning_rate"], file["arguments"], seeds=1, final_seeds=3)
    assert {label: len(grid) for label, grid in plan.optimizers.items()} == {
        "adamw_torch": 8,
        "mars γ": 8,
        "mars_m": 8,
    }
    assert plan.optimizers["adamw_torch"][1] == Setting(
        "adamw_torch",
        (("optim", "adamw_torch"), ("learning_rate", "0.002"), ("weight_decay", "0.01"), ("adam_beta2", "0.95")),
    )
    arguments = [dict(each.arguments) for each in plan.optimizers["mars γ"]]
    assert {a["optim_args"] for a in arguments} == {
        "gamma=0.025,max_norm=none,exact=false",
        "gamma=0.05,max_norm=none,exact=false",
    }
    assert {a["optim"] for a in arguments} == {"mars_adamw"}
    arguments = [dict(each.arguments) for each in plan.optimizers["mars_m"]]
    assert {a["weight_decay"] for a in arguments} == {"0", "0.1"} and {a["learning_rate"] for a in arguments} == {
        "0.006"
    }


def test_the_plan_in_the_docs(plan_file):
    text = (Path(__file__).parents[2] / "docs" / "sweep.md").read_text()
    plan_file.write_text(text.split("```yaml\n")[1].split("```")[0])
    file = read_plan_file(plan_file)
    plan = make_plan(["x"], file["optimizers"], file["learning_rate"], file["arguments"], seeds=2, final_seeds=3)
    assert [len(grid) for grid in plan.optimizers.values()] == [6, 6, 6]


def test_arguments_of_a_run():
    run = Run(setting("a", 1e-3, optim_args="gamma=0.1"), 3)
    expected = ["--optim", "a", "--learning_rate", "0.001", "--optim_args", "gamma=0.1", "--seed", "3"]
    assert run.arguments() == expected
    assert Run(run.setting, 1, timing=2, steps=30).arguments()[-2:] == ["--max_steps", "30"]


def test_unequal_budgets_are_refused_unless_wanted():
    entries = ["a", {"optim": "b", "learning_rate": [1, 2, 3]}]
    with pytest.raises(SweepError, match=r"unequal numbers of settings \(a 2, b 3\)"):
        made(entries)
    assert len(made(entries, equal_budget=False).runs()) == 10


@pytest.mark.parametrize(
    "text, message",
    [
        ("optimizers: [a]\nsteps: 3", "has 'steps', which is none of"),
        ("optimizers: a", "needs a list named optimizers"),
        ("optimizers: [a", "is not YAML"),
    ],
)
def test_bad_plan_files(plan_file, text, message):
    plan_file.write_text(text)
    with pytest.raises(SweepError, match=message):
        read_plan_file(plan_file)


@pytest.mark.parametrize(
    "entry, message",
    [
        (3, "a name, or a mapping"),
        ({"label": "a"}, "a name, or a mapping"),
        ({"optim": "a", "seed": 3}, "seed is no setting of an optimizer"),
        ({"optim": "a", "weight_decay": {"b": 1}}, "a number or a text"),
        ({"optim": "a", "learning_rate": []}, "a has no learning rate"),
        ({"optim": "a", "learning_rate": [True]}, "a learning rate is a number"),
        ({"optim": "a", "weight_decay": []}, "a: weight_decay has no value"),
    ],
    ids=str,
)
def test_bad_entries(entry, message):
    with pytest.raises(SweepError, match=message):
        made([entry])


def test_options_of_mars_are_looked_at_before_anything_runs():
    with pytest.raises(SweepError, match=r"mars_m: optim_args: 'gama'.*the nearest valid one is 'gamma'"):
        made([{"optim": "mars_m", "optim_args": {"gama": 0.05}}])


def test_stored_and_added_to(tmp_path):
    plan = made(final_seeds=3)
    plan.extensions.append({"side": "upper", "settings": {"a": setting("a", 0.1), "b": setting("b", 0.1)}})
    plan.save(tmp_path)
    stored = Plan.load(tmp_path)
    assert stored == plan
    both = made(["b", "c", "a"], [1e-2, 1e-1, 1], seeds=1, equal_budget=False).added_to(stored, {"a", "b"})
    assert list(both.optimizers) == ["a", "b", "c"]
    assert [each.learning_rate for each in both.optimizers["b"]] == [1e-3, 1e-2, 1e-1, 1]
    assert (both.seeds, both.final_seeds, both.extensions) == (2, 3, plan.extensions)
    with pytest.raises(SweepError, match=r"holds a sweep of `python train.py`"):
        made(command=["python", "other.py"]).added_to(stored, set())


def test_what_never_ran_can_be_taken_back_and_what_ran_counts():
    """A name or a value that the script refused must not stay in the folder for good."""
    stored = made(["a", "bad"])
    corrected = made(["a", "b"])
    assert list(corrected.added_to(stored, {"a"}).optimizers) == ["a", "b"]
    other = made([{"optim": "a", "gamma": 1}, "b"])
    with pytest.raises(SweepError, match=r"with those that the output_dir has already, .* unequal numbers .*a 4, b 2"):
        other.added_to(made(["a", "b"]), {"a", "b"})
    assert [dict(s.arguments).get("gamma") for s in other.added_to(stored, {"bad"}).optimizers["a"]] == ["1", "1"]
