"""Tokens per second of data preparation, from rows of text to blocks: hf_mars.clm beside the official example's way.

    python benchmarks/data_preparation.py --tokenizer_name gpt2 --train_file my.jsonl --num_workers 2

The official run_clm.py of Transformers tokenises in one `datasets` map of batches of 1,000 texts, and in a second one
joins the texts of each batch and cuts them into blocks; the rest of each batch, less than a block, is dropped.
Without --train_file the text is the packaged novel, each paragraph a document, repeated; without --tokenizer_name a
BPE is trained on it. The ways take turns, each with an empty cache; the table has medians.
"""

import argparse
import itertools
import re
import statistics
import tempfile
import time

import datasets
import tokenizers
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_mars.clm.blocks import TokenBlocks
from hf_mars.clm.bpe import train_bpe
from hf_mars.clm.texts import Texts, load_texts, packaged_novel


def official(rows, tokenizer, block_size, num_workers):
    """(blocks, tokens): what the example's two maps leave, and what the first one made."""

    def tokenize_function(batch):
        return tokenizer(batch["text"])

    def group_texts(batch):
        joined = {name: list(itertools.chain(*lists)) for name, lists in batch.items()}
        length = len(joined["input_ids"]) // block_size * block_size
        grouped = {
            name: [tokens[start : start + block_size] for start in range(0, length, block_size)]
            for name, tokens in joined.items()
        }
        return {**grouped, "labels": grouped["input_ids"].copy()}

    tokenized = rows.map(tokenize_function, batched=True, num_proc=num_workers, remove_columns=["text"])
    blocks = tokenized.map(group_texts, batched=True, num_proc=num_workers)
    return len(blocks), lambda: sum(len(ids) for ids in tokenized["input_ids"])


def ours(texts, tokenizer, block_size, num_workers):
    blocks = TokenBlocks.from_texts(texts, tokenizer, block_size, num_proc=num_workers)
    return len(blocks), lambda: blocks.total_tokens


def load(arguments, cache_dir):
    if arguments.train_file:
        return load_texts(train_file=arguments.train_file, validation_split_percentage=0, cache_dir=cache_dir)["train"]
    paragraphs = re.split(r"\n\n+", packaged_novel().read_text(encoding="utf-8"))
    # From a file, as in a real run: tokens of a data set in memory would stay in memory.
    path = f"{cache_dir}/novel.parquet"
    datasets.Dataset.from_dict({"text": paragraphs * arguments.repeat}).to_parquet(path)
    return load_texts(train_file=path, validation_split_percentage=0, cache_dir=cache_dir)["train"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train_file", help="as in run_clm.py")
    parser.add_argument("--tokenizer_name", help="a folder or a name on the Hub")
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--num_workers", type=int, help="processes that tokenise")
    parser.add_argument("--repeat", type=int, default=10, help="how often the novel is taken")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    seconds = {"official grouping": [], "hf_mars.clm": []}
    results = {}
    for _ in range(arguments.rounds):
        for name, seconds_of_name in seconds.items():
            with tempfile.TemporaryDirectory() as cache_dir:
                texts = load(arguments, cache_dir)
                if arguments.tokenizer_name:
                    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name)
                else:
                    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(Texts(texts.rows), 8192))
                start = time.perf_counter()
                if name == "hf_mars.clm":
                    blocks, count = ours(texts, tokenizer, arguments.block_size, arguments.num_workers)
                else:
                    blocks, count = official(texts.rows, tokenizer, arguments.block_size, arguments.num_workers)
                seconds_of_name.append(time.perf_counter() - start)
                tokens = count()
                results[name] = (tokens, tokens - blocks * arguments.block_size)
    print(
        f"datasets {datasets.__version__}, tokenizers {tokenizers.__version__}, "
        f"transformers {transformers.__version__}, "
        f"num_workers {arguments.num_workers}, block_size {arguments.block_size}, {len(texts.rows):,} rows"
    )
    print("\n| | tokens | seconds | tokens/s | tokens dropped |\n| --- | --- | --- | --- | --- |")
    for name, (tokens, dropped) in results.items():
        median = statistics.median(seconds[name])
        print(f"| {name} | {tokens:,} | {median:.1f} | {tokens / median:,.0f} | {dropped:,} |")


if __name__ == "__main__":
    main()
