"""The same blocks however they are made, with every token in its place."""

import itertools
import pickle

import datasets
import numpy as np
import pytest
import torch
from clm_helpers import DOCUMENTS, CharacterTokenizer, all_tokens, content, write_documents
from datasets.fingerprint import Hasher
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_mars.clm import blocks as blocks_module
from hf_mars.clm.blocks import TokenBlocks, TokenStream, collate_blocks
from hf_mars.clm.errors import UsageError
from hf_mars.clm.texts import ROWS_PER_BATCH, Texts


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
    path = write_documents(tmp_path / "a.txt", [f"line {i}" for i in range(ROWS_PER_BATCH * 18 + 7)])
    texts = load(train_file=str(path), validation_split_percentage=0)["train"]
    tokens = all_tokens(TokenBlocks.from_texts(texts, CharacterTokenizer(), 1))
    assert CharacterTokenizer().decode(tokens) == path.read_text()


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
    tokenize = blocks_module.tokenize
    monkeypatch.setattr(blocks_module, "tokenize", lambda *args: calls.append(1) or tokenize(*args))

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


# A row of text with the fingerprint "tiny" -> the key of its tokens in the cache, computed by version 0.1.0.
CACHED = {(None, False): "add51dc6737b0d59", (None, True): "fcfb5fb061895cac", ("", False): "1a1aa7495f0ab19a"}


@pytest.mark.skipif(
    Hasher.hash(("hf_mars", None, 1)) != "1dc86a306805371d", reason="this version of datasets makes other keys"
)
@pytest.mark.parametrize("joiner, append_eos", CACHED)
def test_tokens_that_the_first_version_cached_are_found(joiner, append_eos):
    rows = datasets.Dataset.from_dict({"text": ["one two", "two"]})
    rows._fingerprint = "tiny"
    vocabulary = Tokenizer(models.WordLevel({"one": 0, "two": 1, "[UNK]": 2}, "[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="[UNK]")
    blocks = TokenBlocks.from_texts(Texts(rows, joiner=joiner, append_eos=append_eos), tokenizer, 1)
    assert blocks.tokens._fingerprint == CACHED[joiner, append_eos]


def test_missing_texts_count_as_empty():
    texts = Texts(datasets.Dataset.from_dict({"text": ["ab", None, "c"]}))
    assert TokenBlocks.from_texts(texts, CharacterTokenizer(), 2).total_tokens == 3 + 3


def test_labels_are_a_copy_of_the_inputs():
    batch = collate_blocks([{"input_ids": torch.tensor([1, 2])}, {"input_ids": torch.tensor([3, 4])}])
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == [[1, 2], [3, 4]]
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] == 1
