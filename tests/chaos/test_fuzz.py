"""Whatever optim_args, files of arguments, command lines and data hold: it is accepted, or refused in one sentence."""

import json
import os

import pytest
import yaml
from clm_helpers import QUIET
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_mars.clm.argument_files import arguments_of, values_of_file
from hf_mars.clm.command_line import parse_arguments
from hf_mars.clm.errors import UsageError
from hf_mars.clm.texts import load_texts
from hf_mars.clm.token_bins import TokenBins
from hf_mars.trainer.checkpoints import fault
from hf_mars.trainer.names import VARIANTS
from hf_mars.trainer.options import options_of, parse_optim_args

slow_is_fine = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
for profile, examples in (("default", 60), ("chaos", 3000)):
    settings.register_profile(profile, max_examples=examples, deadline=None, suppress_health_check=slow_is_fine)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

KEYS = sorted({key for name in VARIANTS for key in options_of(name)})
VALUES = (
    "0",
    "1",
    "-1",
    "0.5",
    "1e-3",
    "nan",
    "inf",
    "none",
    "true",
    "false",
    "bfloat16",
    "original",
    "=",
    ",",
    "1e400",
)
ENTRY = st.builds(
    "{}={}".format, st.sampled_from(KEYS) | st.text(max_size=8), st.sampled_from(VALUES) | st.text(max_size=8)
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
TREE = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
WORDS = ("--learning_rate", "--optim", "--optim_args", "--block_size", "--max_steps", "--do_train", "--save_strategy")


@given(st.sampled_from(sorted(VARIANTS)), st.lists(ENTRY, max_size=4).map(",".join) | st.text())
def test_optim_args(name, text):
    try:
        parsed = parse_optim_args(text, name)
    except ValueError as error:
        assert "optim_args" in str(error)
    else:
        assert parsed.keys() <= options_of(name).keys()


@given(TREE | st.binary(max_size=60))
def test_files_of_arguments(tmp_path, content):
    for suffix, dump in ((".json", json.dumps), (".yaml", yaml.safe_dump)):
        path = tmp_path / f"arguments{suffix}"
        path.write_bytes(content if isinstance(content, bytes) else dump(content).encode("utf-8", "replace"))
        try:
            assert all(isinstance(word, str) for word in arguments_of(values_of_file(path), ()))
        except UsageError:
            pass


@given(st.lists(st.sampled_from(WORDS) | st.sampled_from(VALUES) | st.text(max_size=6), max_size=5))
def test_command_lines(tmp_path, words):
    try:
        parse_arguments(["--output_dir", str(tmp_path), *words, *QUIET])
    except (UsageError, SystemExit) as end:
        assert not isinstance(end, SystemExit) or end.code == 0  # --help


@pytest.mark.slow
@given(st.sampled_from((".txt", ".csv", ".json", ".jsonl", ".parquet", ".bin")), st.binary(max_size=200))
@settings(max_examples=25)
def test_data_files(tmp_path, suffix, content):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    try:
        if suffix == ".bin":
            TokenBins.open(str(path), "--train_file", 300).chunks()
        else:
            list(load_texts(train_file=str(path), cache_dir=str(tmp_path / "cache"))["train"].batches())
    except UsageError as error:
        assert "\n\n" not in str(error)


@given(
    st.dictionaries(
        st.sampled_from(("trainer_state.json", "optimizer.pt", "mars_manifest.json")), st.binary(max_size=80)
    )
)
def test_checkpoints(tmp_path, files):
    for path in tmp_path.iterdir():
        path.unlink()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert fault(tmp_path)
