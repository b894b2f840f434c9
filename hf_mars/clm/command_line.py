"""From the words of the command line to arguments."""

from dataclasses import fields
from pathlib import Path
from typing import NoReturn, TypeAlias

from transformers import HfArgumentParser

from hf_mars import MarsTrainingArguments

from .argument_files import arguments_of, values_of_file
from .arguments import DataTrainingArguments, ModelArguments, RunArguments
from .early import ARGUMENT_FILES, check_words, unknown_argument, words_given
from .errors import UsageError

DESCRIPTION = (
    "Train a causal language model with MARS: from scratch or from a pretrained model, on the Hub's data or local "
    "files. Does both training and evaluation unless do_train or do_eval is given."
)

Arguments: TypeAlias = tuple[ModelArguments, DataTrainingArguments, RunArguments, MarsTrainingArguments]


class ArgumentParser(HfArgumentParser):
    """Raises UsageError where argparse would print all arguments and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_arguments(argv: list[str], program: str | None = None) -> Arguments:
    """The arguments that the words of a command line stand for.

    A first word that ends in .json, .yaml or .yml is a file of arguments; those on the command line come on top,
    and files of text or tokens there take the place of a data set in the file.
    Training and evaluation are both on unless do_train or do_eval says otherwise.

    Args:
        program: the name of the program in the text of --help; sys.argv's if None.

    Raises:
        UsageError: an unknown argument, a value that is refused, or a package that is missing for it.
    """
    parser = ArgumentParser(
        (ModelArguments, DataTrainingArguments, RunArguments, MarsTrainingArguments),  # type: ignore[arg-type]
        prog=program,
        description=DESCRIPTION,
    )
    # None tells "not given" from "false", which TrainingArguments cannot. A job has one log, not one per node.
    parser.set_defaults(do_train=None, do_eval=None, log_on_each_node=False)
    check_words(argv)
    words = argv
    if argv and argv[0].endswith(ARGUMENT_FILES):
        values, argv = values_of_file(Path(argv[0])), argv[1:]
        if any(argument.startswith(("--train_file", "--validation_file")) for argument in argv):
            for name in ("dataset_name", "dataset_config_name"):
                values.pop(name, None)
        of_many_values = {action.dest for action in parser._actions if action.nargs == "+"}
        argv = arguments_of(values, of_many_values) + argv
    for word in argv:
        if word.startswith("--") and word.endswith("=--"):  # argparse drops the value and goes on
            raise UsageError(f"{word}: is no value; leave {word[:-3]} out for the default")
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    except OverflowError as error:  # transformers makes integers of them
        raise UsageError(f"--logging_steps, --eval_steps, --save_steps: must not be infinite ({error})") from error
    if unknown and not unknown[0].startswith("-"):
        raise UsageError(
            f"{unknown[0]}: belongs to no argument; put a pattern in quotes, and a file of arguments first of all"
        )
    if unknown:
        names = {f.name for arguments in parsed for f in fields(arguments) if f.init}
        key, _, value = unknown[0].lstrip("-").partition("=")
        raise unknown_argument(key.replace("-", "_"), value or None, names)
    model_args, data_args, run_args, training_args = parsed
    # A resumed run takes what was written, though it be transformers' default: see hf_mars.trainer.resuming.
    training_args.given_fields = tuple(name for name, _ in words_given(words))
    if training_args.do_train is None and training_args.do_eval is None:
        training_args.do_train = True
        # Without a text for it there is no evaluation; whether a data set has one shows later.
        has_text = data_args.validation_split_percentage > 0 or data_args.validation_file or data_args.dataset_name
        training_args.do_eval = bool(has_text)
    training_args.do_train = bool(training_args.do_train)
    training_args.do_eval = bool(training_args.do_eval) or training_args.eval_strategy != "no"
    return model_args, data_args, run_args, training_args
