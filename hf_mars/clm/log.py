"""The log of the command. Its modules share one logger: to a reader of the log they are one program."""

import logging

logger = logging.getLogger("run_clm")
