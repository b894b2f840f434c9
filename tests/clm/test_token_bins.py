"""Token files: memory-mapped, split at their tail, refused where they hold no tokens."""

import pickle

import numpy as np
import pytest
import torch
from clm_helpers import all_tokens, write_token_bin

from hf_mars.clm.blocks import TokenBlocks
from hf_mars.clm.errors import UsageError
from hf_mars.clm.token_bins import load_token_bins


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
