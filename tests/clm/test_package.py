"""The package as a whole: what it imports, and the tests that its documentation names."""

import ast
import re

import pytest
from launch_helpers import ROOT

import hf_mars.clm

MODULES = sorted((ROOT / "hf_mars" / "clm").glob("*.py"))


def imports(path):
    """The modules that a file imports when it is run, by the names in its import statements."""
    tree = ast.parse(path.read_text())
    conditions = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    for_types_alone = [node for node in conditions if ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {id(child) for node in for_types_alone for child in ast.walk(node)}
    names = []
    for node in ast.walk(tree):
        if id(node) not in skipped and isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
        elif id(node) not in skipped and isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


@pytest.mark.parametrize("module", ["files", "texts", "token_bins", "bpe", "blocks", "metrics"])
def test_does_not_import_transformers(module):
    names = imports(ROOT / "hf_mars" / "clm" / f"{module}.py")
    assert names and not [name for name in names if name.startswith("transformers")]


def test_each_module_imports_only_those_above_it():
    """In the order of the list in the package's docstring, which names every module."""
    lines = re.findall(r"^    ([a-z_]+(?:, [a-z_]+)*)  ", hf_mars.clm.__doc__, re.MULTILINE)
    order = [name for line in lines for name in line.split(", ")]
    assert sorted(order) == [path.stem for path in MODULES if not path.stem.startswith("__")]
    for i, name in enumerate(order):
        own = {module[1:] for module in imports(ROOT / "hf_mars" / "clm" / f"{name}.py") if module.startswith(".")}
        assert own <= set(order[:i]), name


def test_every_complaint_in_the_docs_names_a_test_that_exists():
    table = (ROOT / "docs" / "run_clm.md").read_text().split("## What users of the official script")[1]
    rows = [line for line in table.split("\n## ")[0].splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 15
    files = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    for row in rows:
        tests = re.findall(r"`(test_\w+)\.py::(test_\w+)`", row)
        assert tests, row
        for module, name in tests:
            assert re.search(rf"^def {name}\(", files[module].read_text(), re.MULTILINE), row
