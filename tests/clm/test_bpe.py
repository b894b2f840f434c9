"""The tokenizer that is trained on the texts."""

import random
import time

import datasets
import pytest
from clm_helpers import write_documents

from hf_mars.clm.bpe import END_OF_TEXT, LONGEST_WORD, cut_long_words, train_bpe
from hf_mars.clm.errors import UsageError
from hf_mars.clm.texts import Texts


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


def test_words_without_end_are_cut_for_training_alone():
    """Nothing is lost of them, and a text without such words stays one string."""
    words = ["a" * 900, "b" * 2500, "c" * LONGEST_WORD, "d" * (LONGEST_WORD + 1)]
    parts = cut_long_words(" ".join(words))
    assert "".join(parts) == " ".join(words)
    assert max(len(word) for part in parts for word in part.split()) == LONGEST_WORD and len(parts) == 4
    assert cut_long_words(" ".join(words[:1] * 100)) == [" ".join(words[:1] * 100)]


def test_the_time_for_a_long_word_grows_with_its_length():
    """Eight times the letters took 64 times as long: five seconds for 100,000."""
    letters = "".join(random.Random(0).choices("abcdefgh", k=160_000))
    seconds = []
    for length in (20_000, 160_000):
        texts = Texts(datasets.Dataset.from_dict({"text": [letters[:length]]}))
        start = time.process_time()
        train_bpe(texts, 1000)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 20 * seconds[0]
