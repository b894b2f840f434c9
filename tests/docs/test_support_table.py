"""docs/distributed.md: every cell of its table is backed by tests that exist, and that run what it claims."""

import ast
import functools
import itertools
import re

import pytest
from helpers import NAMES
from launch_helpers import ROOT, TESTS

DOCUMENT = (ROOT / "docs" / "distributed.md").read_text()
CLAIMS = {"tested", "refused", "needs GPUs"}

# What the tests behind the tested cells of a row have in their ids: one of them each, for every variant and form.
ENGINES = {
    "one process": [""],
    "DDP, Trainer": ["::test_ddp_"],
    "DDP, loop, also with gradient_as_bucket_view": [r"-ddp\]", r"-ddp_bucket_view\]", r"-ddp_no_sync\]"],
    "FSDP2, Trainer": ["::test_fsdp2_"],
    "FSDP2, Trainer, full and sharded": ["FULL_STATE_DICT", "SHARDED_STATE_DICT"],
    "FSDP2, Trainer, CPU offload (without pinned memory)": ["-CPU offload"],
    "HSDP, Trainer (`parallelism_config`)": [r"-HSDP\]"],
    "tensor parallelism, HSDP, FSDP2 with tensor or expert parallelism, Trainer (`DistributedConfig`)": [
        "-tensor parallel",
        "-HSDP, loaded",
        "-FSDP2 and tensor parallel",
        "-expert parallel",
    ],
    "FSDP2, loop": [r"-fsdp2\]", r"-fsdp2_accelerate\]"],
    "HSDP, loop": [r"-hsdp\]"],
    "tensor parallelism, loop": [r"-tensor_parallel\]"],
    "FSDP2 with tensor parallelism, loop": [r"-fsdp2_tensor_parallel\]"],
    "every engine above, in a loop": [
        r"-ddp\]",
        r"-ddp_bucket_view\]",
        r"-ddp_no_sync\]",
        r"-fsdp2\]",
        r"-hsdp\]",
        r"-tensor_parallel\]",
        r"-fsdp2_tensor_parallel\]",
    ],
    "ZeRO-1, 2, 3": ["stage 1", "stage 2(?! offload)", "stage 3"],
    "ZeRO-2 with offload_optimizer": ["stage 2 offload"],
    "DataParallel, without GPUs": ["::test_several_gpus"],
}


def rows():
    table = DOCUMENT.split("\n| engine |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table]


def path_of(file):
    """Of a file of tests, by its name, which no other has."""
    (path,) = TESTS.rglob(file)
    return path


def functions_of(file):
    return {node.name for node in ast.parse(path_of(file).read_text()).body if isinstance(node, ast.FunctionDef)}


@functools.cache
def ids_of(*files):
    """The ids of all tests in some files, as pytest collects them."""

    class Collected:
        def pytest_collection_finish(self, session):
            self.ids = [item.nodeid for item in session.items]

    collected = Collected()
    paths = [str(path_of(file)) for file in files]
    pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *paths], plugins=[collected])
    return collected.ids


def covers(test_id, claim, optim, form, engine):
    """Whether a test is about this variant in this form; where it is said to work, with the engine."""
    if claim == "refused":
        right_kind = "refuse" in test_id
    else:
        right_kind = "refuse" not in test_id and re.search(engine, test_id)
    is_exact = re.search("(?<!bit_)exact", test_id) is not None
    return right_kind and optim in test_id and is_exact == (form == "exact")


def named_in(row):
    return re.findall(r"`(test_\w+\.py::test_\w+)`", row[-1])


@pytest.mark.parametrize("row", rows(), ids=lambda row: ", ".join(row[:3]))
def test_every_claim_is_what_its_tests_run(row):
    """By their parametrisation: each variant and form of the row has a test, and each test has one of these."""
    engine, forms, _, *claims, names = row
    assert len(row) == 8 and set(claims) <= CLAIMS
    tests = named_in(row)
    assert len(tests) == names.count("::")
    files = {test.split("::")[0] for line in rows() for test in named_in(line)}
    ids = {test_id: test_id.split("[")[0].rpartition("/")[2] for test_id in ids_of(*sorted(files))}
    used = set()
    for (optim, claim), form in itertools.product(zip(NAMES, claims, strict=True), forms.split(", ")):
        if claim == "needs GPUs":
            continue
        for part in ENGINES[engine] if claim == "tested" else [""]:
            found = {
                test for test_id, test in ids.items() if test in tests and covers(test_id, claim, optim, form, part)
            }
            assert found, (optim, form, claim, part)
            used |= found
    assert used == set(tests)


def test_there_is_a_table():
    engines = {row[0].split(",")[0] for row in rows()}
    assert {"one process", "DDP", "FSDP2", "HSDP", "FSDP1", "ZeRO-1", "DataParallel", "tensor parallelism"} <= engines


README = (ROOT / "README.md").read_text()
# A column of README's table -> how the engines in the whole table begin that it sums up.
COLUMNS = {
    "one process": "one process",
    "DDP": "DDP, Trainer",
    "FSDP2": "FSDP2, Trainer",
    "HSDP, tensor parallelism": "HSDP",
    "DeepSpeed ZeRO-1/2/3": "ZeRO-1, 2, 3",
    "FSDP1": "FSDP1, Trainer",
    "DataParallel": "DataParallel",
}


def readme_cells():
    head, _, *lines = re.search(r"((?:^\| .*one process.*$)(?:\n\|.*)+)", README, re.MULTILINE)[1].splitlines()
    names = [cell.strip() for cell in head.strip("| ").split("|")]
    for line in lines:
        what, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
        yield from ((what, name, cell) for name, cell in zip(names, cells, strict=True))


@pytest.mark.parametrize("what, column, cell", list(readme_cells()))
def test_readme_claims_what_the_whole_table_does(what, column, cell):
    claim = next(c for c in CLAIMS if cell.startswith(c))
    form = "exact" if what.startswith("exact") else "approx"
    kinds = ("resume", "all") if what == "resume" else ("numbers", "all")
    optims = [o for o in NAMES if o in what] or NAMES
    backing = [
        row
        for row in rows()
        if row[0].startswith(COLUMNS[column]) and form in row[1] and any(kind in row[2] for kind in kinds)
    ]
    if what == "resume":  # of those variants that the engine takes at all
        assert any(claim in row[3:7] for row in backing)
    else:
        claimed = [dict(zip(NAMES, row[3:7], strict=True)) for row in backing]
        assert any(all(claims[o] == claim for o in optims) for claims in claimed)
    if "1 ↔ 2" in cell:
        assert any("1 → 2" in row[2] and set(row[3:7]) == {"tested"} for row in backing)
