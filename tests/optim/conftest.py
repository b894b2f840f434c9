"""The executions of a step that the kernels' tests are about."""

import pytest
import torch
from kernel_helpers import EXECUTIONS


@pytest.fixture
def execution(request):
    """The one that a test's parameter names, "cpu, 3 threads" with so many."""
    name, _, threads = request.param.partition(", ")
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(int(threads.split()[0]))
    yield EXECUTIONS[name]
    torch.set_num_threads(before)


@pytest.fixture
def calls(execution, monkeypatch):
    """The batches that the execution took."""
    taken = []
    step = execution.module.step

    def counting(batches, *rest):
        taken.extend(batches)
        step(batches, *rest)

    monkeypatch.setattr(execution.module, "step", counting)
    return taken
