# Copyright 2026 The evolmm-trl authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A callback that ends a run which collapses, and says why."""

import inspect
import json
import logging
import math
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from ..state import complete_checkpoints


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alarm:
    """
    Why a [`CollapseGuard`] ended a run.

    Args:
        condition (`str`):
            `"non_finite"`, `"entropy"`, `"distinct_questions"`, `"blind_solved"`, `"kl"` or `"accuracy"`.
        first_step (`int`):
            The first optimizer step that the judged values cover: weights from before it are from before the trouble. For
            `"accuracy"` the step after the best evaluation.
        step (`int`):
            The optimizer step of the alarm.
        reason (`str`):
            The numbers.
    """

    condition: str
    first_step: int
    step: int
    reason: str


@dataclass(frozen=True)
class _Bound:
    """A metric that may not be on the wrong side of a threshold."""

    condition: str
    metric: str
    option: str
    threshold: float
    above: bool
    meaning: str

    def crossed(self, value: float) -> bool:
        return value > self.threshold if self.above else value < self.threshold


@dataclass(frozen=True)
class _Evaluation:
    step: int
    accuracy: float
    agreement: float
    standard_error: float


class CollapseGuard(TrainerCallback):
    """
    Ends a run that collapses: the reward of self-evolution is agreement, which can rise while the model gets worse.

    It judges what the trainer logs. A condition must hold for the median of the last `window` logged values of a metric, and
    at `patience` of them in a row; only a loss or gradient that is not finite ends a run at once, since no weight survives
    it (with `fp16`, whose scaler skips such steps, it must persist for `patience` rows). A value is the mean over
    `logging_steps` steps: with `logging_steps=1` every step is judged.

    All it knows is in the trainer's log, which checkpoints hold: a resumed run is judged as one that was not stopped.

    Example:

    ```python
    from evolmm_trl import CollapseGuard

    trainer.add_callback(CollapseGuard(action="rewind"))
    ```

    Args:
        action (`str`, *optional*, defaults to `"stop"`):
            `"stop"`: training ends with the weights as they are. `"rewind"`: training ends, and both roles are loaded from
            the best of this run's checkpoints from before the trouble ([`Alarm`]`.first_step`): with labelled questions that
            of the highest accuracy, without them the last.
        window (`int`, *optional*, defaults to `5`):
            Logged values whose median is judged. From 3 on, no single value ends a run.
        patience (`int`, *optional*, defaults to `3`):
            Times in a row that a median must be out of bounds.
        min_entropy (`float` or `None`, *optional*, defaults to `0.02`):
            Smallest `answer_entropy`, in nats. `None` switches a condition off, here and below.
        min_distinct_questions (`float` or `None`, *optional*, defaults to `0.2`):
            Smallest share of different ones among the last 64 questions.
        max_blind_solved (`float` or `None`, *optional*, defaults to `0.7`):
            Largest share of questions whose majority answer is the same without the image. Needs
            `EvoLMMConfig.blind_questions`.
        max_kl (`float` or `None`, *optional*, defaults to `0.15`):
            Largest KL of either role to the frozen base, in nats per completion token.
        max_accuracy_drop (`float` or `None`, *optional*, defaults to `0.02`):
            How far accuracy on `eval_dataset` may fall below the best evaluation so far while agreement there rises. A fall
            of less than two standard errors of the accuracy is never an alarm.
        evaluation_patience (`int`, *optional*, defaults to `3`):
            Evaluations in a row at which it must have fallen farther.
        accuracy (`str`, *optional*, defaults to `"eval_accuracy_greedy"`):
            The accuracy. With a `dict` of evaluation datasets it is `"eval_<name>_accuracy_greedy"`.

    Raises:
        `ValueError`: for values that make no sense, and at the start of training if nothing is logged, or with `action="rewind"` if no
            checkpoints are saved.
    """

    def __init__(
        self,
        action: str = "stop",
        *,
        window: int = 5,
        patience: int = 3,
        min_entropy: float | None = 0.02,
        min_distinct_questions: float | None = 0.2,
        max_blind_solved: float | None = 0.7,
        max_kl: float | None = 0.15,
        max_accuracy_drop: float | None = 0.02,
        evaluation_patience: int = 3,
        accuracy: str = "eval_accuracy_greedy",
    ):
        if action not in ("stop", "rewind"):
            raise ValueError(f"action={action!r}; expected 'stop' or 'rewind'.")
        for name, value in (("window", window), ("patience", patience), ("evaluation_patience", evaluation_patience)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}; expected a whole number, 1 or more.")
        for name, value in (
            ("min_entropy", min_entropy),
            ("min_distinct_questions", min_distinct_questions),
            ("max_blind_solved", max_blind_solved),
            ("max_kl", max_kl),
            ("max_accuracy_drop", max_accuracy_drop),
        ):
            if value is not None and not isinstance(value, (int, float)):
                raise ValueError(f"{name}={value!r}; expected a number, or None to switch the condition off.")
        if not isinstance(accuracy, str) or not (accuracy.startswith("eval_") and "accuracy_" in accuracy):
            raise ValueError(f"accuracy={accuracy!r}; expected the name of a logged accuracy, 'eval_accuracy_greedy'.")
        self.action = action
        self.window = window
        self.patience = patience
        self.max_kl = max_kl
        self.max_accuracy_drop = max_accuracy_drop
        self.evaluation_patience = evaluation_patience
        self.accuracy = accuracy
        self.agreement = accuracy[: accuracy.index("accuracy_")] + "agreement"
        bounds = [
            _Bound("entropy", "answer_entropy", "min_entropy", min_entropy, False, "the answers no longer differ"),
            _Bound(
                "distinct_questions",
                "distinct_questions",
                "min_distinct_questions",
                min_distinct_questions,
                False,
                "the proposer repeats itself",
            ),
            _Bound(
                "blind_solved",
                "blind_solved",
                "max_blind_solved",
                max_blind_solved,
                True,
                "the answers do not depend on the image",
            ),
            *(
                _Bound("kl", f"{role}/kl", "max_kl", max_kl, True, f"the {role} has run away from its base")
                for role in ("solver", "proposer")
            ),
        ]
        self._bounds = [bound for bound in bounds if bound.threshold is not None]
        self._start()

    @classmethod
    def from_config(cls, options: "str | dict") -> "CollapseGuard":
        """
        The guard that `EvoLMMConfig.collapse_guard` stands for.

        Args:
            options (`str` or `dict`):
                The `action`, or the arguments of a guard.

        Raises:
            `ValueError`: if they are not those of a guard.
        """
        if isinstance(options, str):
            if options not in ("stop", "rewind"):
                raise ValueError(
                    f"collapse_guard={options!r}; expected 'stop', 'rewind', or the arguments of CollapseGuard, such as "
                    "{'action': 'rewind', 'max_kl': 0.3} (on the command line as JSON)."
                )
            return cls(options)
        known = list(inspect.signature(CollapseGuard).parameters)
        unknown = sorted(set(options) - set(known)) if isinstance(options, dict) else [options]
        if unknown:
            raise ValueError(
                f"collapse_guard holds {', '.join(map(repr, unknown))}, which CollapseGuard does not know; expected of "
                f"{', '.join(known)}."
            )
        return cls(**options)

    def _start(self) -> None:
        self.alarm: Alarm | None = None
        self._non_finite_patience = 1
        self._non_finite = 0
        self._last_finite = 0  # step of the last row of finite numbers
        self._last: defaultdict[str, int] = defaultdict(int)  # step of the last row that had a metric
        self._values: defaultdict[str, deque[tuple[int, float]]] = defaultdict(
            lambda: deque(maxlen=self.window + self.patience - 1)
        )  # the first step that a value covers, and the value
        self._evaluations: list[_Evaluation] = []

    def first_alarm(self, log_history: Iterable[dict]) -> Alarm | None:
        """
        Where this guard would have ended a run that is over.

        Args:
            log_history (`Iterable[dict]`):
                The rows of `trainer.state.log_history`, which `trainer_state.json` of a checkpoint holds.

        Returns:
            [`Alarm`] or `None`
        """
        self._start()
        for row in log_history:
            alarm = self._judge(row)
            if alarm is not None:
                return alarm
        return None

    # ------------------------------------------------------------------------------------------------------------
    # Judging

    def _judge(self, row: dict) -> Alarm | None:
        """Takes in one row of the log, and says what is wrong after it."""
        step = row.get("step", 0)
        return self._not_finite(row, step) or self._out_of_bounds(row, step) or self._accuracy_lost(row, step)

    def _not_finite(self, row: dict, step: int) -> Alarm | None:
        names = (
            "loss",
            "grad_norm",
            *(f"{role}/{name}" for role in ("solver", "proposer") for name in ("kl", "grad_norm")),
        )
        given = {name: row[name] for name in names if row.get(name) is not None}
        if not given:
            return None
        bad = [name for name, value in given.items() if not math.isfinite(value)]
        if not bad:
            self._non_finite, self._last_finite = 0, step
            return None
        self._non_finite += 1
        if self._non_finite < self._non_finite_patience:
            return None
        return Alarm("non_finite", self._last_finite + 1, step, f"{bad[0]} was {given[bad[0]]} at step {step}")

    def _out_of_bounds(self, row: dict, step: int) -> Alarm | None:
        for bound in self._bounds:
            value = row.get(bound.metric)
            if value is None or not math.isfinite(value):
                continue
            values = self._values[bound.metric]
            values.append((self._last[bound.metric] + 1, value))
            self._last[bound.metric] = step
            if len(values) < values.maxlen:
                continue
            numbers = [number for _, number in values]
            medians = [median(numbers[i : i + self.window]) for i in range(self.patience)]
            if all(bound.crossed(value) for value in medians):
                first, side = values[0][0], "above" if bound.above else "below"
                return Alarm(
                    bound.condition,
                    first,
                    step,
                    f"{bound.meaning}: the median of {bound.metric} over the last {self.window} logged values was "
                    f"{medians[-1]:.3g}, {side} {bound.option}={bound.threshold:g} for {self.patience} of them in a row "
                    f"(steps {first} to {step})",
                )
        return None

    def _accuracy_lost(self, row: dict, step: int) -> Alarm | None:
        if self.max_accuracy_drop is None or self.accuracy not in row or self.agreement not in row:
            return None
        # A log without standard errors is judged by `max_accuracy_drop` alone
        error = row.get(f"{self.accuracy}_stderr", 0.0)
        self._evaluations.append(_Evaluation(step, row[self.accuracy], row[self.agreement], error))
        earlier = self._evaluations[: -self.evaluation_patience]
        if not earlier:
            return None
        best = max(earlier, key=lambda evaluation: evaluation.accuracy)
        last = self._evaluations[-self.evaluation_patience :]
        most = [max(self.max_accuracy_drop, 2 * now.standard_error) for now in last]
        for now, allowed in zip(last, most, strict=True):
            if best.accuracy - now.accuracy <= allowed or now.agreement <= best.agreement:
                return None
        return Alarm(
            "accuracy",
            best.step + 1,
            step,
            f"the answers agree on what is wrong: {self.accuracy} fell from {best.accuracy:.3f} at step {best.step} to "
            f"{last[-1].accuracy:.3f}, by more than max_accuracy_drop={self.max_accuracy_drop:g} and two standard errors "
            f"({2 * last[-1].standard_error:.3f}) at {self.evaluation_patience} evaluations in a row, while "
            f"{self.agreement} rose from {best.agreement:.3f} to {last[-1].agreement:.3f}",
        )

    # ------------------------------------------------------------------------------------------------------------
    # Acting

    def on_train_begin(self, args, state, control, **kwargs):
        if args.logging_strategy == "no":
            raise ValueError("CollapseGuard judges what is logged, but logging_strategy='no'. Set logging_strategy.")
        if self.action == "rewind" and args.save_strategy == "no":
            raise ValueError(
                "action='rewind' needs checkpoints to go back to, but save_strategy='no'. Set save_strategy."
            )
        if state.is_world_process_zero and self.max_kl is not None and args.adaptive_kl and args.beta > 0:
            for name in ("kl_target", "proposer_kl_target"):
                target = getattr(args, name)
                if target is not None and target >= self.max_kl:
                    logger.warning(
                        "CollapseGuard ends the run at a KL above max_kl=%g, and %s=%g lets it come there. Raise max_kl, or "
                        "lower %s.",
                        self.max_kl,
                        name,
                        target,
                        name,
                    )
        self._start()
        if args.fp16:
            self._non_finite_patience = self.patience
        for row in state.log_history:  # of the run that is resumed
            self._judge(row)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.alarm is not None:
            return
        self.alarm = self._judge({**(logs or {}), "step": state.global_step})
        if self.alarm is None:
            return
        control.should_training_stop = True
        checkpoint = None
        if self.action == "rewind":
            control.should_evaluate = control.should_save = False
            # One process decides: what is measured on a clock differs in the logs of the others
            found = [
                self._best_checkpoint(args.output_dir, state.log_history) if state.is_world_process_zero else None
            ]
            (checkpoint,) = broadcast_object_list(found)
            if checkpoint is not None:
                # The trainer loads it when training ends, as it does with `load_best_model_at_end`
                args.load_best_model_at_end = True
                state.best_model_checkpoint = str(checkpoint)
        if state.is_world_process_zero:
            logger.warning(self._message(checkpoint))

    def _best_checkpoint(self, output_dir: str, log_history: list[dict]) -> Path | None:
        """The best checkpoint of this run from before the trouble."""
        saved = {int(path.name.split("-")[1]): path for path in complete_checkpoints(output_dir)}
        saved = {
            step: path
            for step, path in saved.items()
            if step < self.alarm.first_step and _is_of_run(path, log_history)
        }
        measured = {}
        for step in saved:
            before = [evaluation.accuracy for evaluation in self._evaluations if evaluation.step <= step]
            if before:
                measured[step] = before[-1]
        if measured:
            return saved[max(measured, key=lambda step: (measured[step], -step))]
        return saved[max(saved)] if saved else None

    def _message(self, checkpoint: Path | None) -> str:
        message = f"CollapseGuard ended the run at step {self.alarm.step}: {self.alarm.reason}."
        if self.action == "stop":
            return (
                f"{message} The weights are those of this step; those of a checkpoint from before step "
                f"{self.alarm.first_step} are from before the trouble."
            )
        if checkpoint is None:
            return (
                f"{message} This run has no checkpoint with a logged step from before step {self.alarm.first_step}, so the "
                "weights are those of this step. Save more often."
            )
        return (
            f"{message} Both roles are loaded from {checkpoint}. To go on from there, resume from it with a lower "
            "learning_rate or a higher beta."
        )


def _is_of_run(checkpoint: Path, log_history: list[dict]) -> bool:
    """Whether the log in a checkpoint is the beginning of this one: an earlier run may have left its own in the folder."""
    saved = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["log_history"]
    # As text, in which a number that is not finite equals itself
    saved, own = (json.dumps(rows, sort_keys=True) for rows in (saved, log_history[: len(saved)]))
    return saved == own != "[]"
