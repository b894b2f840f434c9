"""The tokenizer that is trained on the texts."""

import pytest
from clm_helpers import write_documents

from hf_mars.clm.bpe import END_OF_TEXT, train_bpe
from hf_mars.clm.errors import UsageError


def test_bpe_has_the_size_asked_for_and_writes_any_text(load):
    tokenizer = train_bpe(load()["train"], 400)
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
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
