"""The launches of the engines, and the runs without one that they are compared with."""

import pytest
from engine_helpers import SETTINGS, Launches, asked


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    return Launches(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def alone(request, launches):
    return {name: launches.alone(name) for name in asked(request, SETTINGS)}
