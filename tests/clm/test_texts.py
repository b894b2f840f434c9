"""Every text is read, and none is lost or in two splits."""

import bz2
import gzip
import lzma
import re
from pathlib import Path

import pytest
from clm_helpers import DOCUMENTS, CharacterTokenizer, content, write_documents

from hf_mars.clm.blocks import TokenStream
from hf_mars.clm.errors import UsageError
from hf_mars.clm.texts import STREAM_WINDOW, packaged_novel


def test_the_packaged_novel_is_split_at_its_tail(load):
    splits = load(validation_split_percentage=5)
    novel = packaged_novel().read_text()
    train, validation = content(splits["train"]), content(splits["validation"])
    assert train + validation == novel
    assert 0.03 < len(validation) / len(novel) < 0.07


NAMES = ["a.txt", "a.csv", "a.json", "a.jsonl", "a.parquet", "a[1].txt"]


COMPRESSED = ["a.txt.gz", "a.jsonl.gz", "a.csv.bz2", "a.txt.xz"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", [*NAMES, *COMPRESSED])
def test_every_format_gives_every_text(load, tmp_path, name, streaming):
    path = write_documents(tmp_path / name)
    splits = load(train_file=str(path), streaming=streaming, validation_split_percentage=0)
    assert list(splits) == ["train"]
    expected = "".join(document + ("\n" if ".txt" in name else "") for document in DOCUMENTS)
    assert content(splits["train"]) == expected


def test_a_pattern_stands_for_all_its_files_in_order(load, tmp_path):
    for i in (2, 1, 3):
        (tmp_path / f"{i}.txt").write_text(f"{i}\n")
    splits = load(train_file=str(tmp_path / "*.txt"), validation_split_percentage=0)
    assert content(splits["train"]) == "1\n2\n3\n"


@pytest.mark.parametrize("streaming", [False, True])
def test_the_text_column_is_text_or_else_the_first_of_strings(load, tmp_path, streaming):
    for column in ("text", "body"):
        path = write_documents(tmp_path / f"{column}.jsonl", ["x", "y"], column)
        splits = load(train_file=str(path), streaming=streaming, validation_split_percentage=0)
        assert content(splits["train"]) == "xy"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_named_column_is_the_text(load, tmp_path, streaming):
    path = write_documents(tmp_path / "a.jsonl", ["x", "y"])
    options = {"train_file": str(path), "streaming": streaming, "validation_split_percentage": 0}
    assert content(load(**options, text_column="other")["train"]) == "nono"
    for column in ("body", "number"):
        with pytest.raises(UsageError, match=f"--text_column {column}: .* only text, other"):
            load(**options, text_column=column)


def test_words_that_pandas_takes_for_missing_stay(load, tmp_path):
    path = write_documents(tmp_path / "a.csv", ["NA", "null", "", "None"])
    assert content(load(train_file=str(path), validation_split_percentage=0)["train"]) == "NAnullNone"


def test_without_line_breaks_lines_are_joined_by_spaces(load, tmp_path):
    path = write_documents(tmp_path / "a.txt", ["one two", "three"])
    splits = load(train_file=str(path), keep_linebreaks=False, validation_split_percentage=0)
    assert content(splits["train"]) == "one two three "


@pytest.mark.parametrize("percentage", [1, 5, 50, 99])
def test_no_row_is_lost_or_in_both_splits(load, tmp_path, percentage):
    path = write_documents(tmp_path / "a.jsonl")
    splits = load(train_file=str(path), validation_split_percentage=percentage)
    train, validation = splits["train"].rows["text"][:], splits["validation"].rows["text"][:]
    assert [*train, *validation] == DOCUMENTS
    assert len(validation) == len(DOCUMENTS) * percentage // 100


def test_no_row_of_a_stream_is_lost_or_in_both_splits(load, tmp_path):
    path = write_documents(tmp_path / "a.jsonl")
    splits = load(train_file=str(path), streaming=True, validation_split_percentage=2)
    train, validation = ([row["text"] for row in splits[name].rows] for name in ("train", "validation"))
    assert [*validation, *train] == DOCUMENTS
    assert len(validation) == STREAM_WINDOW * 2 // 100


def test_own_validation_text_leaves_the_training_text_whole(load, tmp_path):
    train, validation = write_documents(tmp_path / "a.txt"), write_documents(tmp_path / "b.csv", ["held out"])
    splits = load(train_file=str(train), validation_file=str(validation))
    assert len(splits["train"].rows) == len(DOCUMENTS)
    assert content(splits["validation"]) == "held out"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_by_name(load, tmp_path, streaming):
    for split in ("train", "validation"):
        write_documents(tmp_path / f"{split}.jsonl", [split])
    splits = load(dataset_name=str(tmp_path), streaming=streaming)
    assert {name: content(texts) for name, texts in splits.items()} == {"train": "train", "validation": "validation"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_file": "missing.txt"}, "--train_file .*missing.txt: there is no such file"),
        ({"validation_file": "missing.csv"}, "--validation_file .*missing.csv: there is no such file"),
        ({"train_file": "a.doc"}, r"--train_file .*a.doc: .*\.txt, \.csv, \.json, \.jsonl, \.parquet"),
        ({"train_file": "empty.txt"}, "--train_file .*empty.txt: is empty"),
        ({"train_file": "numbers.csv"}, "numbers.csv: there is no column of strings; the columns are: a, b"),
        ({"train_file": "line.txt"}, "--validation_split_percentage 5: 1 row"),
        ({"dataset_name": "no-such-owner/no-such-data-set"}, "--dataset_name no-such-owner/no-such-data-set: "),
        (
            {"dataset_name": "scripted"},
            "--dataset_name scripted: cannot be read: Dataset scripts are no longer",
        ),
        ({"dataset_name": "tests"}, "--dataset_name tests: has no split named train or validation, only test"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_be_read(load, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "a.doc": "x",
        "empty.txt": "",
        "numbers.csv": "a,b\n1,2\n",
        "line.txt": "only one line",
        "tests/test.jsonl": '{"text": "a"}',
        "scripted/scripted.py": "import datasets\n\nclass Scripted(datasets.GeneratorBasedBuilder):\n    pass\n",
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    with pytest.raises(UsageError, match=message):
        load(**options)


LINES = "".join(f"line {i}\n" for i in range(1000)).encode()


DAMAGED = {
    "a.jsonl": (b'{"text": "a"}\n{"text', "JSON parse error"),
    "a.parquet": (b"PAR1", "Parquet file"),
    "a.txt": ("é\n".encode("latin-1") * 100, "'utf-8' codec can't decode"),
    "a.txt.gz": (gzip.compress(LINES)[:-100], "ended before the end-of-stream marker"),
    "b.txt.gz": (b"no gzip", "Not a gzipped file"),
    "c.txt.gz": (gzip.compress(LINES)[:50] + b"x" * 9999, "Error -3 while decompressing"),
    "a.txt.bz2": (bz2.compress(LINES)[:50] + b"x" * 9999, "Invalid data stream"),
    "a.txt.xz": (lzma.compress(LINES)[:50] + b"x" * 9999, "Corrupt input data"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(load, tmp_path, name, streaming):
    content, message = DAMAGED[name]
    path = tmp_path / "data" / name
    path.parent.mkdir()
    path.write_bytes(content)
    for source in ({"train_file": str(path)}, {"dataset_name": str(path.parent)}):
        ((argument, value),) = source.items()
        with pytest.raises(UsageError, match=rf"^--{argument} {value}: cannot be read: .*{message}"):
            load(**source, streaming=streaming)


def test_a_stream_may_break_off_later(load, tmp_path):
    """Its first file is good; the second is read when training gets there."""
    write_documents(tmp_path / "1.jsonl")
    (tmp_path / "2.jsonl").write_bytes(DAMAGED["a.jsonl"][0])
    pattern = str(tmp_path / "*.jsonl")
    texts = load(train_file=pattern, streaming=True, validation_split_percentage=0)["train"]
    with pytest.raises(UsageError, match=re.escape(f"--train_file {pattern}: cannot be read: ")):
        list(TokenStream(texts, CharacterTokenizer(), 64))
