"""No text lost, none in two splits, the same blocks however they are made."""

import ast
import bz2
import gzip
import itertools
import lzma
import pickle
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from clm_helpers import DOCUMENTS, ROOT, CharacterTokenizer, write_documents, write_token_bin
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mars import corpus
from hf_mars.corpus import Texts, TokenBlocks, TokenStream, UsageError, load_texts, load_token_bins, train_bpe


@pytest.fixture
def load(tmp_path):
    return lambda **options: load_texts(cache_dir=str(tmp_path / "cache"), **options)


def content(texts):
    return "".join(itertools.chain.from_iterable(texts.batches()))


def all_tokens(blocks):
    return np.concatenate([block["input_ids"].numpy() for block in blocks])


@pytest.mark.parametrize("module", ["corpus.py", "metrics.py"])
def test_does_not_import_transformers(module):
    tree = ast.parse((ROOT / "hf_mars" / module).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [
        node.module if isinstance(node, ast.ImportFrom) else alias.name for node in imports for alias in node.names
    ]
    assert names and not [name for name in names if name.startswith("transformers")]


# ---- loading and splitting ----


def test_the_packaged_novel_is_split_at_its_tail(load):
    splits = load(validation_split_percentage=5)
    novel = corpus.packaged_novel().read_text()
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
    assert len(validation) == corpus.STREAM_WINDOW * 2 // 100


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
        ({"train_file": "empty.txt"}, "--train_file .*empty.txt: cannot be read: "),
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


# ---- tokenizer ----


def test_bpe_has_the_size_asked_for_and_writes_any_text(load):
    tokenizer = train_bpe(load()["train"], 400)
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.token_to_id(corpus.END_OF_TEXT) == 0
    text = "Mr. Darcy\n\n\t naïve 日本 🙂 \x00"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_bpe_learns_the_text_and_is_the_same_again(load, tmp_path):
    path = write_documents(tmp_path / "a.txt", ["qqqq zzzz"] * 50)
    texts = load(train_file=str(path))["train"]
    tokenizers = [train_bpe(texts, 300) for _ in range(2)]
    assert "qqqq" in tokenizers[0].get_vocab()
    assert tokenizers[0].to_str() == tokenizers[1].to_str()


def test_bpe_smaller_than_the_bytes_is_refused(load):
    with pytest.raises(UsageError, match="--vocab_size 256: must be at least 257"):
        train_bpe(load()["train"], 256)


# ---- tokens and blocks ----


def make_tokens(lengths):
    """Texts of the given lengths whose tokens count up from 0, in several Arrow chunks."""
    counter = itertools.count()
    texts = [[next(counter) for _ in range(length)] for length in lengths]
    features = datasets.Features(input_ids=datasets.Sequence(datasets.Value("int32")))
    parts = [datasets.Dataset.from_dict({"input_ids": texts[i : i + 2]}, features) for i in range(0, len(texts), 2)]
    return datasets.concatenate_datasets(parts)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=9), block_size=st.integers(1, 7))
def test_blocks_are_the_tokens_in_order(lengths, block_size):
    blocks = TokenBlocks(make_tokens(lengths), block_size)
    assert blocks.total_tokens == sum(lengths)
    assert len(blocks) == sum(lengths) // block_size
    assert blocks.dropped_tokens == sum(lengths) % block_size
    for i in range(len(blocks)):
        assert blocks[i]["input_ids"].dtype == torch.int64
        assert blocks[i]["input_ids"].tolist() == list(range(i * block_size, (i + 1) * block_size))


def test_blocks_have_ends():
    blocks = TokenBlocks(make_tokens([5, 6]), 2, max_blocks=3)
    assert len(list(blocks)) == len(blocks) == 3
    for i in (3, -1):
        with pytest.raises(IndexError):
            blocks[i]


def test_selected_texts_give_their_own_tokens():
    blocks = TokenBlocks(make_tokens([2, 2, 2, 2]).select([3, 0]), 2)
    assert [block["input_ids"].tolist() for block in blocks] == [[6, 7], [0, 1]]


def test_blocks_travel_to_workers_without_their_tokens(load, tmp_path):
    path = write_documents(tmp_path / "a.jsonl", ["x" * 10_000] * 20)
    blocks = TokenBlocks.from_texts(load(train_file=str(path))["train"], CharacterTokenizer(), 8, max_blocks=99)
    pickled = pickle.dumps(blocks)
    assert len(pickled) < 20_000
    copy = pickle.loads(pickled)
    assert len(copy) == 99 and torch.equal(copy[98]["input_ids"], blocks[98]["input_ids"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_packing_loses_nothing_where_batches_end(load, tmp_path, name, num_proc):
    path = write_documents(tmp_path / name)
    tokenizer = CharacterTokenizer()
    texts = load(train_file=str(path), validation_split_percentage=0)["train"]
    blocks = TokenBlocks.from_texts(texts, tokenizer, 64, num_proc=num_proc)
    begins = len(DOCUMENTS) if name == "a.jsonl" else 0  # each document begins with a token, lines do not
    whole = content(texts)
    assert blocks.total_tokens == len(whole) + begins
    tokens = all_tokens(blocks)
    assert len(tokens) + blocks.dropped_tokens == blocks.total_tokens
    assert (tokens == 0).sum() == begins
    assert whole.startswith(tokenizer.decode(tokens)) and len(tokenizer.decode(tokens)) > len(whole) - 64


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_stream_gives_the_blocks_of_the_file(load, tmp_path, name):
    path, tokenizer = write_documents(tmp_path / name), CharacterTokenizer()
    options = {"train_file": str(path), "validation_split_percentage": 0}
    stored = TokenBlocks.from_texts(load(**options)["train"], tokenizer, 64)
    stream = TokenStream(load(**options, streaming=True)["train"], tokenizer, 64)
    for _ in range(2):  # each pass starts anew
        assert np.array_equal(all_tokens(stream), all_tokens(stored))
    in_memory = TokenBlocks.from_texts(load(**options, streaming=True)["train"], tokenizer, 64, max_blocks=10)
    assert len(in_memory) == 10 and np.array_equal(all_tokens(in_memory), all_tokens(stored)[: 10 * 64])


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_end_with_one_eos_token(load, tmp_path, streaming):
    path = write_documents(tmp_path / "a.jsonl", ["ab", "c" + chr(254), "de"])  # the second ends with eos by itself
    options = {"train_file": str(path), "streaming": streaming, "validation_split_percentage": 0}
    tokens = all_tokens(TokenBlocks.from_texts(load(**options, append_eos=True)["train"], CharacterTokenizer(), 1))
    a, c, d = (1 + ord(character) for character in "acd")
    assert tokens.tolist() == [0, a, a + 1, 255, 0, c, 255, 0, d, d + 1, 255]
    assert 255 not in all_tokens(TokenBlocks.from_texts(load(**options)["train"], CharacterTokenizer(), 1))[:3]


def test_lines_of_a_text_have_no_document_ends(load, tmp_path):
    path = write_documents(tmp_path / "a.txt")
    with pytest.raises(UsageError, match="--append_eos: the lines of a txt file are one running text"):
        load(train_file=str(path), append_eos=True)


def test_many_lines_give_the_tokens_of_one_text(load, tmp_path):
    path = write_documents(tmp_path / "a.txt", [f"line {i}" for i in range(corpus.ROWS_PER_BATCH * 18 + 7)])
    texts = load(train_file=str(path), validation_split_percentage=0)["train"]
    tokens = all_tokens(TokenBlocks.from_texts(texts, CharacterTokenizer(), 1))
    assert CharacterTokenizer().decode(tokens) == path.read_text()


# ---- token files ----


def test_token_files_are_blocks_without_being_read(tmp_path):
    train = write_token_bin(tmp_path / "train.bin", range(1000))
    validation = write_token_bin(tmp_path / "val.bin", range(50, 70))
    splits = load_token_bins(str(train), str(validation), 5, vocab_size=2000)
    blocks = TokenBlocks(splits["train"], 64)
    assert all(isinstance(chunk, np.memmap) for chunk in blocks._chunks)
    assert (len(blocks), blocks.total_tokens, blocks.dropped_tokens) == (15, 1000, 40)
    assert all_tokens(blocks).tolist() == list(range(960))
    assert all_tokens(TokenBlocks(splits["validation"], 4, max_blocks=2)).tolist() == list(range(50, 58))
    pickled = pickle.dumps(blocks)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[14]["input_ids"], blocks[14]["input_ids"])


@pytest.mark.parametrize("percentage", [1, 30, 99])
def test_the_tail_of_token_files_is_held_out(tmp_path, percentage):
    for i, tokens in enumerate([range(100), range(100, 110), range(110, 200)]):
        write_token_bin(tmp_path / f"{i}.bin", tokens)
    splits = load_token_bins(str(tmp_path / "*.bin"), None, percentage, vocab_size=200)
    train, validation = (all_tokens(TokenBlocks(splits[name], 1)).tolist() for name in ("train", "validation"))
    assert train + validation == list(range(200))
    assert len(validation) == 200 * percentage // 100


def test_token_files_of_another_kind(tmp_path):
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "empty.bin").touch()
    for name, message in {
        "odd": "3 bytes are no tokens",
        "empty": "0 bytes are no tokens",
        "gone": "there is no such file",
    }.items():
        with pytest.raises(UsageError, match=rf"--train_file .*{name}.bin: {message}"):
            load_token_bins(str(tmp_path / f"{name}.bin"), None, 0, vocab_size=10)
    path = write_token_bin(tmp_path / "a.bin", [1, 2, 10])
    blocks = TokenBlocks(load_token_bins(str(path), None, 0, vocab_size=10)["train"], 1)
    assert blocks[1]["input_ids"].tolist() == [2]
    with pytest.raises(UsageError, match=r"a\.bin: holds token id 10, but the model's embedding has 10 rows"):
        blocks[2]


def test_workers_share_out_a_stream(load, tmp_path):
    for i in range(2):
        write_documents(tmp_path / f"{i}.jsonl", [chr(ord("a") + i) * 63] * 40)
    options = {"train_file": str(tmp_path / "*.jsonl"), "validation_split_percentage": 0, "streaming": True}
    stream = TokenStream(load(**options)["train"], CharacterTokenizer(), 64, max_blocks=25)
    blocks = list(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2))
    firsts = [int(block["input_ids"][1]) for block in blocks]
    assert sorted(firsts) == [1 + ord("a")] * 13 + [1 + ord("b")] * 12


def test_tokens_are_reused_until_text_or_tokenizer_changes(load, tmp_path, monkeypatch):
    path = write_documents(tmp_path / "a.jsonl", ["abc"] * 10)
    calls = []
    tokenize = corpus.tokenize
    monkeypatch.setattr(corpus, "tokenize", lambda *args: calls.append(1) or tokenize(*args))

    def tokenized_anew(tokenizer=None, block_size=4, append_eos=False, **options):
        calls.clear()
        texts = load(train_file=str(path), validation_split_percentage=0, append_eos=append_eos)["train"]
        TokenBlocks.from_texts(texts, tokenizer or CharacterTokenizer(), block_size, **options)
        return bool(calls)

    class OtherTokenizer(CharacterTokenizer):
        pass

    assert tokenized_anew()
    assert not tokenized_anew()
    assert not tokenized_anew(block_size=8)
    assert not tokenized_anew(num_proc=2)
    assert tokenized_anew(append_eos=True)
    assert not tokenized_anew(append_eos=True)
    assert tokenized_anew(overwrite_cache=True)
    assert tokenized_anew(tokenizer=OtherTokenizer())
    write_documents(path, ["abcd"] * 10)
    assert tokenized_anew()


def test_missing_texts_count_as_empty():
    texts = Texts(datasets.Dataset.from_dict({"text": ["ab", None, "c"]}))
    assert TokenBlocks.from_texts(texts, CharacterTokenizer(), 2).total_tokens == 3 + 3


def test_labels_are_a_copy_of_the_inputs():
    batch = corpus.collate_blocks([{"input_ids": torch.tensor([1, 2])}, {"input_ids": torch.tensor([3, 4])}])
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == [[1, 2], [3, 4]]
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] == 1
