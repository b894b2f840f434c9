"""docs/distributed.md: every cell of its table is backed by tests that exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCUMENT = (TESTS.parent / "docs" / "distributed.md").read_text()
CLAIMS = {"tested", "refused", "not tested"}


def rows():
    table = DOCUMENT.split("\n| engine |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table]


def functions_of(file):
    return {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", rows(), ids=lambda row: ", ".join(row[:3]))
def test_every_claim_names_its_tests(row):
    *_, names = row
    claims = row[3:7]
    assert len(row) == 8 and set(claims) <= CLAIMS
    tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", names)
    assert len(tests) == names.count("::") and bool(tests) == (set(claims) != {"not tested"})
    for file, test in tests:
        assert test in functions_of(file)


def test_there_is_a_table():
    engines = {row[0].split(",")[0] for row in rows()}
    assert {"one process", "DDP", "FSDP2", "HSDP", "FSDP1", "ZeRO-1", "DataParallel", "tensor parallelism"} <= engines
