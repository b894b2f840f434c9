"""Arguments that cannot work are refused in one message that names the argument, its value and what is allowed."""

import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from clm_helpers import QUIET, parse, run_main, write_documents, write_token_bin
from launch_helpers import NEEDS_DEEPSPEED
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_mars.clm.checks import check_arguments, set_accumulation
from hf_mars.clm.early import check_words
from hf_mars.clm.errors import UsageError
from hf_mars.clm.model import count_parameters, load_config
from hf_mars.clm.processes import check_all_are_seen
from hf_mars.clm.run import main, train_and_evaluate


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--global_batch_size 24", 3),
        ("--global_batch_size 8", 1),
        ("--global_batch_size 20", UsageError("--global_batch_size 20: must be a multiple of 8")),
        ("--global_batch_size 0", UsageError("--global_batch_size 0: must be a multiple of 8")),
        (
            "--global_batch_size 24 --gradient_accumulation_steps 2",
            UsageError("--global_batch_size 24: sets --gradient_accumulation_steps, which is given as 2"),
        ),
    ],
)
def test_the_global_batch_sets_the_accumulation(monkeypatch, options, expected):
    *_, run_args, training_args = parse("--output_dir", "x", "--per_device_train_batch_size", 4, *options.split())
    monkeypatch.setattr(type(training_args), "world_size", 2)
    monkeypatch.setattr(type(training_args), "n_gpu", 1)
    if isinstance(expected, UsageError):
        with pytest.raises(UsageError, match=str(expected)):
            set_accumulation(run_args.global_batch_size, training_args)
    else:
        set_accumulation(run_args.global_batch_size, training_args)
        assert training_args.gradient_accumulation_steps == expected


REFUSED = {
    "--save_strategy foo": "--save_strategy.* invalid choice: 'foo'.*steps",
    "--learning_rate abc": "--learning_rate.* invalid float value: 'abc'",
    "--lora 4": "ambiguous option: --lora could match --lora_r",
    "--seed": "--seed: expected one argument",
    "--train_file two.jsonl 2.jsonl": "2.jsonl: belongs to no argument; .*pattern in quotes, .*file of arguments",
    "--max_steps 3 a.yaml": "a.yaml: belongs to no argument; .*pattern in quotes, .*file of arguments first",
    "--optim_args gamm=0.1": r"'gamm'.*nearest.*'gamma'",
    "--optim_args gamma=abc": "gamma='abc'",
    "--learning_rat_ 1": "unknown argument --learning_rat_; the nearest valid one is --learning_rate",
    "--optim mars_adam": "--optim mars_adam: .*nearest is mars_adamw. MARS's are mars_adamw, mars_lion,",
    "--optim MARS_M": "--optim MARS_M: .*nearest is mars_m. ",
    "--optim muon_mars": "--optim muon_mars: there is no such optimizer; the nearest is mars_",
    "--gamma 0.1": "unknown argument --gamma; .*--optim_args gamma=0.1$",
    "--gamm 0.1": "unknown argument --gamm; the nearest valid one is --optim_args gamma=0.1$",
    "--beta1=0.8": "unknown argument --beta1; .*--optim_args beta1=0.8$",
    "--optim_args gamma:0.1": "'gamma:0.1' is not key=value; write gamma=0.1$",
    "--optim_args exact=true --fp16": "exact=true does not work with fp16=True",
    "--fp16": r"--fp16 true: needs a GPU.*--bf16",
    "--optim adamw_torch --optim_args gamma=0.1": "'gamma=0.1' is for MARS, and optim='adamw_torch'",
    "--train_file empty.txt": "--train_file empty.txt: is empty",
    "--validation_file empty.jsonl": "--validation_file empty.jsonl: is empty",
    "--dataset_name ./nosuch": "--dataset_name ./nosuch: there is no such folder",
    "--model_name_or_path /no/such": "--model_name_or_path /no/such: there is no such folder",
    "nosuch.yaml": "nosuch.yaml: there is no such file of arguments",
    "--model_type nosuch": "--model_type nosuch: .*Allowed: .*gpt2",
    "--model_type gpt2 --config_name c": "--model_type gpt2: --config_name c",
    "--model_type gpt2 --model_name_or_path m": "--model_type gpt2: .*--model_name_or_path m",
    "--config_overrides n_layer=1 --model_name_or_path m": "--config_overrides n_layer=1: .*--model_name_or_path m",
    "--config_overrides n_layers=1": "--config_overrides n_layers=1: .*the nearest is 'n_layer'",
    "--config_overrides n_layer": "--config_overrides n_layer: 'n_layer' must be key=value",
    "--config_overrides n_layer=many": "--config_overrides n_layer=many: .*many",
    "--vocab_size 300 --model_name_or_path m": "--vocab_size 300: .*--model_name_or_path brings one",
    "--vocab_size 300 --tokenizer_name t": "--vocab_size 300: .*--tokenizer_name brings one",
    "--vocab_size 100": "--vocab_size 100: must be between 257,",
    "--model_name_or_path ./nosuch": "--model_name_or_path ./nosuch: there is no such folder",
    "--config_name ./nosuch": "--config_name ./nosuch: there is no such folder",
    "--tokenizer_name ./nosuch": "--tokenizer_name ./nosuch: there is no such folder",
    "--block_size 1": "--block_size 1: must be at least 2",
    "--block_size 64 --config_overrides n_positions=32": "--block_size 64: .* 32 positions; allowed: 2 to 32",
    "--block_size 2000 --model_type gpt2": "--block_size 2000: the model has 1024 positions",
    "--max_train_samples 0": "--max_train_samples 0: must be at least 1",
    "--max_eval_samples 0": "--max_eval_samples 0: must be at least 1",
    "--preprocessing_num_workers 0": "--preprocessing_num_workers 0: must be at least 1",
    "--validation_split_percentage 100": "--validation_split_percentage 100: must be between 0 and 99",
    "--validation_split_percentage 0 --do_train --do_eval": "--validation_split_percentage 0: leaves nothing",
    "--train_file a.doc": r"--train_file a.doc: .*\.parquet",
    "--train_file missing.txt": "--train_file missing.txt: there is no such file",
    "--train_file here.txt --dataset_name d": "--train_file here.txt: .*--dataset_name d",
    "--train_file here.txt": "--validation_split_percentage 5: 1 row",
    "--train_file two.txt": r"--block_size 128: the training text has only \d+ tokens",
    "--validation_file here.txt": "--validation_file here.txt: there is no text to train on",
    "--do_eval --validation_file two.txt": "--validation_file two.txt: is no text to train a tokenizer on",
    "--do_eval --dataset_name held_out": "--dataset_name held_out: has no train split, and a tokenizer is",
    "--dataset_name held_out --tokenizer_name tokenizer": "--dataset_name held_out: has no train split; .*--do_eval",
    "--validation_file here.txt --train_file two.txt --block_size 4": "--block_size 4: the validation text has only",
    "--streaming": "--streaming needs --max_steps, a positive number, not -1",
    "--streaming --max_steps 1 --dataloader_num_workers 2": "--dataloader_num_workers 2: .*at most 1",
    "--streaming --max_steps 1 --train_file two.txt --validation_file two.txt": "--block_size 128: .*fewer tokens",
    "--streaming --max_steps 1 --train_file two.txt": "128: .* first 500 rows, .*--validation_split_percentage 5",
    "--config_name untyped.json": "--config_name untyped.json: no model configuration there: .*model_type",
    "--dataset_name folder --validation_split_percentage 0": "--dataset_name folder: has no validation split",
    "--attn_implementation nosuch": "--attn_implementation nosuch: .*eager",
    "--text_column body --train_file two.jsonl": "--text_column body: --train_file two.jsonl has no such column",
    "--append_eos": "--append_eos: the lines of a txt file",
    "--lora_r 4": "--lora_r 4: adapts a pretrained model; give --model_name_or_path",
    "--lora_r 0": "--lora_r 0: must be at least 1",
    "--lora_r 4 --lora_dropout 1": r"--lora_dropout 1.0: must be in \[0, 1\)",
    "--lora_alpha 4": "--lora_alpha 4: needs --lora_r",
    "--lora_target_modules c_attn": "--lora_target_modules c_attn: needs --lora_r",
    "--train_file a.bin": "--train_file a.bin: there is no such file",
    "--train_file b.bin": r"--train_file .*b\.bin: 3 bytes are no tokens of 2 bytes each",
    "--train_file t.bin --block_size 4": "t.bin: holds token id 60000, but the model's embedding has 50257 rows",
    "--train_file t.bin --block_size 64": "--block_size 64: the training text has only 19 tokens",
    "--train_file t.bin --validation_file two.txt": "--validation_file two.txt: both files must hold tokens",
    "--train_file t.bin --streaming --max_steps 1": "--streaming True: token files",
    "--train_file t.bin --append_eos": "--append_eos True: the documents in token files",
    "--train_file t.bin --text_column body": "--text_column body: token files have no columns",
    "--train_file t.bin --vocab_size 300": "--vocab_size 300: no tokenizer is trained for token files",
    "--train_file t.bin --sample_prompt It": "--sample_prompt It: needs the tokenizer of the token files",
    "--train_file t.bin --validation_split_percentage 0 --do_eval": "--validation_split_percentage 0: leaves nothing",
    "--global_batch_size 12": "--global_batch_size 12: must be a multiple of 8, --per_device_train_batch_size 8 on 1",
    "--do_train false": "--do_train false --do_eval false: there is nothing to do",
    "--do_train --eval_on_start": "--eval_on_start true: needs evaluation",
    "--prediction_loss_only true": "--prediction_loss_only true: .*computed from the logits",
    "--resume_from_checkpoint true": "--resume_from_checkpoint true: there is no whole checkpoint",
    "--resume_from_checkpoint nosuch": "--resume_from_checkpoint nosuch: .*allowed: true, auto, false or the path",
    "--resume_from_checkpoint auto --overwrite_output_dir": "--resume_from_checkpoint auto: contradicts",
}


@pytest.mark.parametrize("arguments, message", REFUSED.items(), ids=REFUSED)
def test_what_cannot_work_is_refused_by_name(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("one")
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "held_out").mkdir()
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "[UNK]": 1}, "[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tokenizer")
    for name in ("two.jsonl", "folder/train.jsonl", "held_out/validation.jsonl"):
        write_documents(tmp_path / name, ["one", "two"])
    (tmp_path / "untyped.json").write_text('{"n_layer": 1}')
    (tmp_path / "b.bin").write_bytes(b"abc")
    write_token_bin(tmp_path / "t.bin", [60000] * 20)
    with pytest.raises(UsageError, match=message):
        main([*arguments.split(), "--output_dir", "out", "--use_cpu", "--cache_dir", "cache"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", ["--validation_split_percentage 0 --do_train", "--validation_file here.txt"])
def test_many_workers_may_read_a_stream_that_is_not_split(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("one")
    streaming = "--streaming --max_steps 1 --dataloader_num_workers 2 --train_file here.txt --output_dir out"
    model_args, data_args, run_args, training_args = parse(*streaming.split(), *options.split())
    check_arguments(model_args, data_args, run_args, training_args)


def test_a_tokenizer_larger_than_the_embedding_is_refused(trained, tmp_path):
    model = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(trained[0], vocab_size=200, ignore_mismatched_sizes=True).save_pretrained(
        model
    )
    with pytest.raises(
        UsageError, match=r"--tokenizer_name .* has 300 tokens, but .* 200 rows; allowed: .* at most 200"
    ):
        run_main("--output_dir", tmp_path / "out", "--model_name_or_path", model, "--tokenizer_name", trained[0])
    with pytest.raises(UsageError, match=r"--model_name_or_path .*: no tokenizer there; give --tokenizer_name"):
        run_main("--output_dir", tmp_path / "out", "--model_name_or_path", model)


@pytest.mark.parametrize(
    "arguments, way",
    [
        (
            "",
            r"validation text \(5 per cent of the rows\) has only \d+ tokens; give --block_size (\d+) or less",
        ),
        ("--train_file longer.txt", r"or (--validation_split_percentage [1-9]\d*), or"),
        ("", r"or (--validation_split_percentage 0) to train without evaluation"),
        (
            "--validation_split_percentage 70",
            r"training text has only \d+ tokens; give --block_size (\d+) or less",
        ),
    ],
)
def test_what_works_with_little_data_is_said_at_once(tmp_path, monkeypatch, arguments, way):
    """40 short rows, or 160: every way that the message names works."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "longer.txt").write_text("".join(f"row {i}\n" for i in range(160)))
    (tmp_path / "rows.txt").write_text("".join(f"row {i}\n" for i in range(40)))
    run = ["--train_file", "rows.txt", "--max_steps", "1", "--save_strategy", "no", "--cache_dir", "cache"]
    run += ["--config_overrides", "n_layer=1,n_head=2,n_embd=32", "--vocab_size", "260", *arguments.split(), *QUIET]
    with pytest.raises(UsageError) as error:
        main([*run, "--block_size", "128", "--output_dir", "a"])
    named = re.search(way, str(error.value))
    assert named, error.value
    value = named[1]
    options = ["--block_size", value] if value.isdigit() else ["--block_size", "128", *value.split()]
    results = main([*run, *options, "--output_dir", "b"])
    assert results["train_loss"] > 0 and ("eval_loss" in results) == (not value.endswith(" 0"))


def test_processes_that_see_only_themselves_are_refused(monkeypatch, tmp_path):
    """As under torchrun on a machine without a GPU, where --use_cpu is missing: two runs in one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"WORLD_SIZE=2: .*each sees only itself.* give --use_cpu"):
        check_all_are_seen(1)
    check_all_are_seen(2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_all_are_seen(1)


def test_the_sizes_that_are_printed_are_those_that_are_trained(caplog, monkeypatch):
    caplog.set_level("INFO")
    model_args, *_ = parse("--output_dir", "x", "--config_overrides", "n_layer=2,n_embd=64")
    load_config(model_args, 32)
    assert "a small GPT-2 from scratch (n_layer=2, n_head=4, n_embd=64, n_positions=32)" in caplog.text


BEST = "--load_best_model_at_end --eval_strategy steps --eval_steps 2 --save_steps 2"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--optim_args gamm=0.1", "nearest valid one is 'gamma'"),
        ("--optim mars_lion --optim_args ns_steps=5", "mars_shampoo and mars_m have it"),
        ("--optim mars_m --optim_args gamma:0.1", "write gamma=0.1"),
        ("--optim adamw_torch --optim_args anything=1", None),  # its own business
    ],
)
def test_optim_args_are_read_before_torch_is_imported(words, says):
    with pytest.raises(UsageError, match=says) if says else nullcontext():
        check_words(words.split())


LAUNCHER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def started_by_a_launcher(monkeypatch):
    """As far as DeepSpeed looks."""
    for name, value in LAUNCHER.items():
        monkeypatch.setenv(name, value)


@NEEDS_DEEPSPEED
def test_parameters_are_counted_under_zero_3():
    """There transformers shards what it makes, which a model without memory cannot be."""
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert config.is_zero3() and is_deepspeed_zero3_enabled()
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    llama = LlamaConfig(**sizes, num_attention_heads=2)
    model_args, *_ = parse("--model_type", "llama", "--output_dir", "out")
    assert count_parameters(llama, model_args, None) == LlamaForCausalLM(llama).num_parameters()
    assert is_deepspeed_zero3_enabled()


@NEEDS_DEEPSPEED
def test_deepspeed_needs_a_launcher_and_a_configuration_that_agrees(tmp_path, monkeypatch):
    """Else it looks for MPI, or the Trainer breaks off when the model is made."""
    path = tmp_path / "zero.json"
    config = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 0.5, "zero_optimization": {"stage": 2}}
    path.write_text(json.dumps(config))
    words = ["--output_dir", tmp_path / "out", "--deepspeed", path, "--use_cpu"]
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=r"zero\.json: needs a launcher, for one process too: torchrun"):
        parse(*words)
    started_by_a_launcher(monkeypatch)
    with pytest.raises(UsageError, match=r"\(ds gradient_clipping=0.5 vs hf max_grad_norm=1.0\); make them equal"):
        check_arguments(*parse(*words))
    check_arguments(*parse(*words, "--max_grad_norm", 0.5))
    path.write_text("{'zero_optimization'")
    with pytest.raises(UsageError, match=r"--deepspeed .*zero\.json: is not valid JSON: Expecting property name"):
        parse(*words)
    path.unlink()
    with pytest.raises(UsageError, match=r"--deepspeed .*zero\.json: No such file"):
        parse(*words)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize(
    ("stage", "options", "words"),
    [
        (2, "--do_eval", r"zero\.json: DeepSpeed evaluates alone under ZeRO stage 3, not 2; leave --deepspeed out"),
        (3, "--do_eval", None),
        (2, f"--save_only_model {BEST}", r"--save_only_model true --load_best_model_at_end true: .* DeepSpeed"),
        (2, BEST, None),
    ],
)
def test_what_deepspeed_cannot_do_is_said_before_anything_is_loaded(stage, options, words, tmp_path, monkeypatch):
    """transformers has a traceback for each."""
    started_by_a_launcher(monkeypatch)
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": stage}}))
    arguments = parse("--output_dir", tmp_path / "out", "--deepspeed", path, "--use_cpu", *options.split())
    with pytest.raises(UsageError, match=words) if words else nullcontext():
        check_arguments(*arguments)


@NEEDS_DEEPSPEED
def test_a_schedule_of_deepspeeds_file_has_the_arguments_warmup(tmp_path, monkeypatch):
    """The number of steps is known when training starts; transformers compares it then, with a traceback."""
    started_by_a_launcher(monkeypatch)
    schedule = {"type": "WarmupDecayLR", "params": {"total_num_steps": 7, "warmup_num_steps": "auto"}}
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 8, "scheduler": schedule, "zero_optimization": {}}))
    *_, args = parse("--output_dir", tmp_path / "out", "--deepspeed", path, "--use_cpu", "--max_steps", 5)

    def train(resume_from_checkpoint):
        args.hf_deepspeed_config.trainer_config_finalize(args, None, args.max_steps)

    trainer = SimpleNamespace(args=args, train=train)
    words = r"zero\.json: .*\(ds scheduler.params.total_num_steps=7 vs hf num_training_steps \(calculated\)=5\)"
    with pytest.raises(UsageError, match=words):
        train_and_evaluate(trainer, None, [], None)
