"""A run from its command line to its results."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

from transformers import PrinterCallback, set_seed
from transformers.training_args import OptimizerNames
from transformers.utils import logging as transformers_logging

from hf_mars import MarsTrainer, MarsTrainingArguments
from hf_mars.trainer.checkpoint_saving import is_disk_full
from hf_mars.trainer.checkpoints import CheckpointError, ResumeError
from hf_mars.trainer.nodes import OtherNodeError, once_per_node
from hf_mars.trainer.signals import TrainingStopped
from hf_mars.trainer.skipping import NotFiniteError

from .adapters import find_base_model
from .arguments import DEFAULT_VOCAB_SIZE
from .blocks import TokenBlocks, TokenStream, collate_blocks
from .checks import check_arguments, check_deepspeed_agrees, set_accumulation
from .command_line import Arguments, parse_arguments
from .errors import UsageError
from .log import logger
from .metrics import ComputeLanguageModelMetrics, losses_and_tokens
from .model import choose_block_size, count_parameters, fit_vocabulary, load_config, load_model
from .output_folder import check_space, check_writable, checkpoint_to_resume, files_of_previous_run
from .processes import all_or_none, check_all_are_seen, check_same, leave_together
from .report import generate_sample, summarize
from .splits import load_blocks, load_splits
from .texts import Texts
from .tokenizer import load_tokenizer, train_tokenizer


def command(program: str) -> None:
    """Run the process's command line; a mistake in it ends the process with status 2 and one line, a full disk or
    gradients that are not finite with 1.

    Args:
        program: the name of the program in --help and in that line.
    """
    try:
        main(program=program)
    except UsageError as error:
        # From a data loader's worker it comes with that one's traceback before it.
        message = str(error).rpartition("UsageError: ")[2]
        print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not (isinstance(error, (CheckpointError, NotFiniteError)) or is_disk_full(error)):
            raise
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ResumeError) else 1)


def main(argv: list[str] | None = None, *, program: str | None = None) -> dict[str, float]:
    """Train and evaluate as a command line asks.

    Args:
        argv: the words of the command line; the process's own if None.
        program: the name of the program in --help; sys.argv's if None.

    Returns:
        The metrics of training and evaluation, as in all_results.json.

    Raises:
        UsageError: the arguments cannot work.
    """
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv, program)
    model_args, data_args, run_args, training_args = arguments
    check_all_are_seen(training_args.world_size)
    set_up_logging(training_args)
    checkpoint, stale = find_start(arguments)

    with all_or_none():
        find_base_model(model_args)
        config = load_config(model_args, data_args.block_size)
        block_size = choose_block_size(data_args.block_size, config)
        tokenizer = load_tokenizer(model_args, data_args, checkpoint)
        will_train_tokenizer = tokenizer is None and not data_args.are_tokens
        if tokenizer is not None:
            fit_vocabulary(config, tokenizer, model_args)
        trained_size = model_args.vocab_size or DEFAULT_VOCAB_SIZE if will_train_tokenizer else None
        parameters = count_parameters(config, model_args, trained_size)
        if training_args.do_train and training_args.save_strategy != "no" and not model_args.is_adapted:
            check_space(Path(str(training_args.output_dir)), parameters, model_args.dtype)
    splits = load_splits(
        model_args,
        data_args,
        training_args,
        vocab_size=config.get_text_config().vocab_size,
        has_tokenizer=tokenizer is not None,
    )
    texts = splits.get("train")
    if tokenizer is None and isinstance(texts, Texts):
        vocab_size = model_args.vocab_size or DEFAULT_VOCAB_SIZE
        tokenizer = train_tokenizer(texts, vocab_size, block_size, show_progress=not training_args.disable_tqdm)
        fit_vocabulary(config, tokenizer, model_args)
    if data_args.append_eos and tokenizer is not None and tokenizer.eos_token_id is None:
        raise UsageError("--append_eos true: the tokenizer has no end-of-text token; give another --tokenizer_name")
    train_blocks, eval_blocks = load_blocks(splits, tokenizer, block_size, data_args, training_args)

    set_seed(training_args.seed)
    model = load_model(config, model_args)
    if training_args.save_on_each_node:
        # transformers 5.23 lets the job's first process alone write weights, whomever Trainer has chosen.
        model.should_save_on_this_rank = lambda is_main_process: is_main_process  # type: ignore[method-assign]
    if training_args.should_save:
        remove(stale)

    # Losses and accuracy are summed batch by batch: neither logits nor predictions pile up.
    training_args.batch_eval_metrics = True
    trainer = MarsTrainer(
        model=model,
        args=training_args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        data_collator=collate_blocks,
        compute_metrics=ComputeLanguageModelMetrics(),
        preprocess_logits_for_metrics=losses_and_tokens,
    )
    if not trainer.is_world_process_zero():  # without progress bars, Trainer prints logs on every node
        trainer.remove_callback(PrinterCallback)
    try:
        results = train_and_evaluate(trainer, checkpoint, train_blocks, eval_blocks)
    except TrainingStopped:
        leave_together()
        raise
    if training_args.push_to_hub:
        trainer.push_to_hub(tasks="text-generation", dataset=data_args.dataset_name)

    if trainer.is_world_process_zero():
        print(f"{summarize(trainer)}; see {training_args.output_dir}")
        if run_args.sample_prompt is not None and tokenizer is not None:
            if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
                logger.warning("--sample_prompt: no sample, since no process holds the whole model")
            else:
                print(generate_sample(trainer, tokenizer, run_args.sample_prompt))
    leave_together()
    return results


def set_up_logging(training_args: MarsTrainingArguments) -> None:
    """Log to stderr: at INFO in the process that Trainer has chosen for it, else from WARNING on."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    for name in (logger.name, "hf_mars"):
        logging.getLogger(name).setLevel(logging.INFO if training_args.should_log else logging.WARNING)
    transformers_logging.set_verbosity(training_args.get_process_log_level())
    processes = "1 process" if training_args.world_size == 1 else f"{training_args.world_size} processes"
    in_one = training_args.n_gpu
    devices = f"{in_one} GPUs (DataParallel)" if in_one > 1 else training_args.device.type
    logger.info(f"{processes} on {devices}, optimizer {OptimizerNames(training_args.optim).value}")


def find_start(arguments: Arguments) -> tuple[str | None, list[Path]]:
    """Check the arguments, and look at the output folder before any process writes to it.

    Returns:
        The checkpoint to go on from, or None for step 0; the files of an earlier run that are to be removed.

    Raises:
        UsageError: in every process, if the arguments cannot work in one of them.
    """
    model_args, _, run_args, training_args = arguments
    checkpoint, stale = None, []
    with all_or_none():
        check_arguments(*arguments)
        check_writable(Path(str(training_args.output_dir)))
        if run_args.global_batch_size is not None:
            set_accumulation(run_args.global_batch_size, training_args)
    if training_args.do_train:
        try:
            checkpoint = once_per_node(training_args, lambda: checkpoint_to_resume(training_args, run_args))
        except OtherNodeError as error:
            raise UsageError(str(error)) from None
        with all_or_none():
            if run_args.overwrite_output_dir:
                sources = [model_args.model_name_or_path, model_args.config_name, model_args.tokenizer_name]
                stale = files_of_previous_run(Path(str(training_args.output_dir)), sources)
    # Nodes that do not share output_dir may have different checkpoints, or none.
    name = checkpoint and Path(checkpoint).name
    check_same(name, f"the checkpoint that --resume_from_checkpoint {training_args.resume_from_checkpoint} finds")
    if checkpoint:
        logger.info(f"resuming from {checkpoint}")
    return checkpoint, stale


def remove(stale: list[Path]) -> None:
    """Delete files and folders, each with a line in the log."""
    for path in stale:
        logger.warning(f"--overwrite_output_dir: removing {path}")
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def train_and_evaluate(
    trainer: MarsTrainer,
    checkpoint: str | None,
    train_blocks: TokenBlocks | TokenStream | None,
    eval_blocks: TokenBlocks | None,
) -> dict[str, float]:
    """Train and save if there are blocks for it, then evaluate if there are; the metrics of both."""
    results: dict[str, float] = {}
    if train_blocks is not None:
        try:
            metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        except ValueError:
            check_deepspeed_agrees(trainer.args)
            raise
        trainer.save_model()
        if not trainer.is_finished:
            if isinstance(train_blocks, TokenBlocks):  # a stream has no length
                metrics["train_samples"] = len(train_blocks)
            trainer.log_metrics("train", metrics)
            trainer.save_metrics("train", metrics)
            results.update(metrics)
    if eval_blocks is not None:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(eval_blocks)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        results.update(metrics)
    if train_blocks is not None:
        trainer.save_state()
    return results
