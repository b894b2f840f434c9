"""A byte-level BPE, trained on the texts."""

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .errors import UsageError
from .texts import STREAM_WINDOW, Texts

END_OF_TEXT = "<|endoftext|>"
LONGEST_WORD = 1000  # characters
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")
SMALLEST_VOCAB_SIZE = 257  # the 256 bytes and END_OF_TEXT


def cut_long_words(text: str) -> list[str]:
    """The text, in parts where it has runs of more than LONGEST_WORD characters without a space.

    Merging pairs in a word takes tokenizers 0.23 a time that grows as the square of its length: 25 seconds for one of
    200,000 letters. Pairs across a cut are not counted; a text without such words is left as it is.
    """
    parts, start = [], 0
    for word in _LONG_WORD.finditer(text):
        for cut in range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD):
            parts.append(text[start:cut])
            start = cut
    return [*parts, text[start:]]


def train_bpe(texts: Texts, vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
    """Train a byte-level BPE, as GPT-2's: it can write any text, and END_OF_TEXT is its token 0.

    Args:
        texts: all are used; of a stream, the first STREAM_WINDOW rows.
        vocab_size: the size to reach. The result is smaller where the text has fewer pairs to merge.

    Raises:
        UsageError: vocab_size is below SMALLEST_VOCAB_SIZE.
    """
    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise UsageError(
            f"--vocab_size {vocab_size}: must be at least {SMALLEST_VOCAB_SIZE}, for the 256 bytes and {END_OF_TEXT}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    batches = texts.batches(STREAM_WINDOW if texts.is_stream else None)
    parts = ([part for text in batch for part in cut_long_words(text)] for batch in batches)
    tokenizer.train_from_iterator(parts, trainer)
    return tokenizer
