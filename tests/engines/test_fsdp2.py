"""FSDP2 in the Trainer: two processes give the numbers of one, and both kinds of checkpoints resume."""

import pytest
from engine_helpers import (
    APPROX,
    EVERY_SETTING,
    STATE_DICTS,
    a_run,
    asked,
    check_resumed,
    check_same_numbers,
    each,
    finished,
    resumed,
)

# One fixture starts up to four launches, each with a timeout of its own.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def fsdp2_of_one(launches, alone):
    """One process of FSDP2, for its checkpoints: the Trainer takes them in no other engine."""
    runs = [
        a_run(name, "fsdp2", 1, label=f"{name} {state_dict}", state_dict=state_dict)
        for name in alone
        for state_dict in STATE_DICTS
    ]
    return launches.together("fsdp2_of_one", "fsdp2", 1, runs)


@pytest.fixture(scope="module")
def fsdp2(request, launches, alone, fsdp2_of_one):
    runs = []
    for name in alone:
        for state_dict in STATE_DICTS:
            label = f"{name} {state_dict}"
            run = a_run(name, "fsdp2", 2, label=label, state_dict=state_dict)
            grown = resumed(run, launches.checkpoint("fsdp2_of_one", label), "grown")
            runs += [run, resumed(run, launches.checkpoint("fsdp2", label)), grown]
            if name == APPROX[0]:
                runs.append(finished(run, launches.checkpoint("fsdp2", label, 6)))
    stock = asked(request, APPROX)
    runs += [a_run(name, "fsdp2", 2, label=f"{name} Trainer", trainer="Trainer") for name in stock]
    return launches.together("fsdp2", "fsdp2", 2, runs)


@pytest.fixture(scope="module")
def fsdp2_shrunk(launches, alone, fsdp2):
    runs = []
    for name in alone:
        for state_dict in STATE_DICTS:
            label = f"{name} {state_dict}"
            run = a_run(name, "fsdp2", 1, label=label, state_dict=state_dict)
            runs.append(resumed(run, launches.checkpoint("fsdp2", label), "shrunk"))
    return launches.together("fsdp2_shrunk", "fsdp2", 1, runs)


EVERY_STATE_DICT = pytest.mark.parametrize("state_dict", STATE_DICTS)


@EVERY_SETTING
@EVERY_STATE_DICT
def test_fsdp2_equals_one_process(name, state_dict, fsdp2, alone):
    """Sharded, with gradient accumulation and unequal numbers of labels on the ranks; float32."""
    check_same_numbers(fsdp2[f"{name} {state_dict}"], alone[name])
    keys = fsdp2[f"{name} {state_dict}"]["state_keys"]
    assert keys[0] == keys[1] and all(keys[0])


@each(APPROX)
def test_fsdp2_with_the_stock_trainer(name, fsdp2):
    check_same_numbers(fsdp2[f"{name} Trainer"], fsdp2[f"{name} FULL_STATE_DICT"], tolerance=0)


@EVERY_SETTING
@EVERY_STATE_DICT
def test_fsdp2_resumes(name, state_dict, fsdp2):
    """torch steps a fresh optimizer with zero gradients, for it to have state; loading must replace all of it."""
    check_resumed(fsdp2[f"{name} {state_dict} resumed"], fsdp2[f"{name} {state_dict}"], tolerance=0)


@EVERY_SETTING
@EVERY_STATE_DICT
def test_fsdp2_resumes_on_another_number_of_processes(name, state_dict, fsdp2, fsdp2_shrunk, alone):
    check_resumed(fsdp2[f"{name} {state_dict} grown"], alone[name])
    check_resumed(fsdp2_shrunk[f"{name} {state_dict} shrunk"], alone[name])


@EVERY_STATE_DICT
def test_fsdp2_leaves_a_finished_run_as_it_is(state_dict, fsdp2):
    run = f"{APPROX[0]} {state_dict}"
    check_same_numbers(fsdp2[f"{run} finished"], fsdp2[run], tolerance=0, steps=0)
