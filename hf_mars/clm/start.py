"""The command: its mistakes first, as far as they show at once, then everything that takes seconds to import."""

import sys

from .early import check_words
from .errors import UsageError


def command(program: str) -> None:
    """Run the process's command line; a mistake in it ends the process with status 2 and one line.

    Args:
        program: the name of the program in --help and in that line.
    """
    try:
        check_words(sys.argv[1:])
    except UsageError as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    from .run import command as run_command

    run_command(program)
