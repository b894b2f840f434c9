"""The runs that were made: trials of an optuna study, and results.jsonl, which is made of them."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

from .errors import SweepError
from .plan import Run, replace_text

RESULTS = "results.jsonl"


class Store:
    """Every run is a trial of `study.db`; its row, as in results.jsonl, is an attribute of the trial.

    Args:
        folder: the sweep's output folder, which nobody else writes to.

    Raises:
        SweepError: optuna is not installed.
    """

    def __init__(self, folder: Path):
        try:
            import optuna
        except ImportError:
            raise SweepError("the sweep needs optuna: pip install 'hf_mars[sweep]'") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._folder = folder
        self._lock = threading.Lock()
        self._failed = optuna.trial.TrialState.FAIL
        self._distributions = {
            "learning_rate": optuna.distributions.FloatDistribution(1e-30, 1e30, log=True),
            "seed": optuna.distributions.IntDistribution(1, 2**31),
        }
        self._study = optuna.create_study(
            storage=f"sqlite:///{(folder / 'study.db').resolve()}",
            sampler=optuna.samplers.RandomSampler(),
            study_name="sweep",
            load_if_exists=True,
        )
        states = optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False, states=(states.WAITING, states.RUNNING)):
            if trial.state == states.WAITING:  # a sweep that was killed had asked for it and not begun
                self._study.tell(self._study.ask(self._distributions), state=self._failed)
            else:
                self._study.tell(trial.number, state=self._failed)
        trials = self._study.get_trials(deepcopy=False)
        self._rows = {
            trial.user_attrs["key"]: trial.user_attrs["row"] for trial in trials if "row" in trial.user_attrs
        }
        self._export()

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Key of a run -> its row: of runs that ended, of several attempts the last."""
        with self._lock:
            return dict(self._rows)

    def begin(self, run: Run) -> Any:
        """A trial of the run, to be given to `end` or `give_up`."""
        params = {"learning_rate": run.setting.learning_rate, "seed": run.seed}
        with self._lock:
            self._study.enqueue_trial(params, user_attrs={"key": run.key, "optimizer": run.setting.label})
            return self._study.ask(self._distributions)

    def end(self, trial: Any, row: dict[str, Any]) -> None:
        """Keep the row of a run that ended, well or not."""
        with self._lock:
            trial.set_user_attr("row", row)
            if row["status"] == "failed":
                self._study.tell(trial, state=self._failed)
            else:
                self._study.tell(trial, math.inf if row["final_loss"] is None else row["final_loss"])
            self._rows[trial.user_attrs["key"]] = row
            self._export()

    def give_up(self, trial: Any) -> None:
        """The run was broken off: it has no row, and will start anew."""
        with self._lock:
            self._study.tell(trial, state=self._failed)

    def forget_failed(self) -> None:
        """Let failed runs be made again."""
        with self._lock:
            self._rows = {key: row for key, row in self._rows.items() if row["status"] != "failed"}

    def _export(self) -> None:
        replace_text(self._folder / RESULTS, "".join(json.dumps(row) + "\n" for row in self._rows.values()))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The rows of results.jsonl.

    Raises:
        SweepError: the folder holds none.
    """
    try:
        lines = (folder / RESULTS).read_text().splitlines()
    except OSError:
        raise SweepError(f"{folder} holds no sweep: it has no {RESULTS}") from None
    return [json.loads(line) for line in lines]
