"""The files, functions and classes that the pages name are there: `optim/exact.py: PreviousPoint.keep`."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = [path.name for folder in (ROOT, ROOT / "hf_mars") for path in folder.iterdir() if path.is_dir()]
NAMED = re.compile(rf"`((?:{'|'.join(map(re.escape, ROOMS))})/[\w/.]+\.(?:py|c|sh))(?:: ([\w.]+))?`")


def missing(path, symbol):
    """Why a file or a symbol in it is not there; None if it is."""
    file = next((folder / path for folder in (ROOT, ROOT / "hf_mars") if (folder / path).is_file()), None)
    if file is None:
        return f"no file {path}"
    body = ast.parse(file.read_text(encoding="utf-8")).body if symbol else []
    for name in symbol.split(".") if symbol else []:
        found = [node for node in body if getattr(node, "name", None) == name]
        if not found:
            return f"no {symbol} in {path}"
        body = found[0].body
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    named = NAMED.findall(page.read_text(encoding="utf-8"))
    assert [why for why in (missing(*name) for name in named) if why] == []


def test_a_stale_name_is_found():
    assert missing("optim/exact.py", "PreviousPoint.keep") is None
    assert missing("optim/exact.py", "PreviousPoint.lose") == "no PreviousPoint.lose in optim/exact.py"
    assert missing("optim/gone.py", "") == "no file optim/gone.py"
    assert len({name for page in PAGES for name in NAMED.findall(page.read_text(encoding="utf-8"))}) > 20
