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

"""What a run left behind, read for the page: the rollout log and the trainer's history."""

import json
import re
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from ..health.questions import question_kind
from ..health.run import RECENT_QUESTIONS
from ..monitor import hash_start
from ..thumbnails import REPORT_FOLDER, read_thumbnail


LOG_NAME = "rollouts.jsonl"
STATE_NAME = "trainer_state.json"
# Longest line that is read. A record of 128-token answers has about 3,000 characters
_LONGEST_LINE = 16 * 2**20
_LAST_STEP = 10**9
# Characters that are shown; the rest is counted
_LONGEST_QUESTION = 600
_LONGEST_COMPLETION = 1000
_LONGEST_NAME = 120
# Different completions of one question that are shown, and different answers that are counted one by one
_MOST_COMPLETIONS = 32
_MOST_ANSWERS = 8

# What no reader would see, or what would change how the text around it reads: controls, direction marks and overrides,
# zero-width, blank and tag characters, fillers, lone surrogates. Joiners, and the selectors of emoji and of Mongolian, are
# part of words and emoji
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\u2800\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)


def shown(text: str, longest: int) -> str:
    """
    A text of strangers as the page shows it: cut, and with what is invisible made visible.

    Args:
        text (`str`):
            Any text.
        longest (`int`):
            Characters that are kept.

    Returns:
        `str`
    """
    cut = _INVISIBLE.sub(lambda match: f"\u27e8U+{ord(match[0]):04X}\u27e9", text[:longest])
    return cut if len(text) <= longest else f"{cut} \u2026 [{len(text) - longest:,} more characters]"


def to_json(value) -> str:
    """JSON that can stand within a `<script>` block of a page."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class Thinned:
    """
    Every 2^k-th of the texts that are added, with the smallest k that keeps them within a number of characters.

    Args:
        budget (`int`):
            Most characters.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.stride = 1
        self.added = 0
        self.items: list[tuple[int, str]] = []  # a place in the log, and the text
        self._size = 0

    def add(self, place: int, text: Callable[[], str]) -> None:
        """Adds the next text, which is made only if it is kept."""
        if self.added % self.stride == 0:
            self.items.append((place, text()))
            self._size += len(self.items[-1][1])
        self.added += 1
        while self._size > self.budget and len(self.items) > 1:
            self.stride *= 2
            self.items = self.items[::2]
            self._size = sum(len(item) for _, item in self.items)


@dataclass
class Run:
    """
    A run as the page shows it.

    Args:
        log (`Path`):
            Its rollout log.
        name (`str`):
            Its name.
        rollouts (`int`):
            Rollouts in the log.
        broken (`int`):
            Lines of the log that are no rollouts.
        cut_off (`bool`):
            Whether the log ends within a line.
        curves (`dict[str, list[tuple[int, float]]]`):
            By metric: step and value.
        rollout_steps (`array`), entropies (`array`):
            Of every rollout, in the order of the log.
        votes (`int`):
            Most answers to one question.
        trainer_steps (`int`):
            Last step of the trainer's history; 0 if there is none.
        others_histories (`int`):
            Histories in the folder, if none of them is known to be of this log.
        alarm (`str` or `None`):
            Where [`CollapseGuard`], with its default thresholds, would have ended the run, and why.
        kinds (`Counter`):
            Rollouts by kind of question.
        pictured (`Thinned`), others (`Thinned`):
            The rollouts of the gallery, in JSON: those with a picture, and those without.
        pictures (`dict[str, bytes]`):
            Thumbnails, by digest.
    """

    log: Path
    name: str
    rollouts: int = 0
    broken: int = 0
    cut_off: bool = False
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    rollout_steps: array = field(default_factory=lambda: array("q"))
    entropies: array = field(default_factory=lambda: array("d"))
    votes: int = 1
    trainer_steps: int = 0
    others_histories: int = 0
    alarm: str | None = None
    kinds: Counter = field(default_factory=Counter)
    pictured: Thinned = field(default_factory=lambda: Thinned(0))
    others: Thinned = field(default_factory=lambda: Thinned(0))
    pictures: dict[str, bytes] = field(default_factory=dict)

    def gallery(self) -> list[str]:
        """The rollouts of the gallery in the order of the steps, in JSON."""
        return [text for _, text in sorted([*self.pictured.items, *self.others.items])]


def read_run(
    path: str | Path, name: str, text_budget: int, picture_budget: int, history: list[dict] | None = None
) -> Run:
    """
    Reads a run's rollout log, line by line, and the trainer's history.

    Args:
        path (`str` or `Path`):
            Folder of a run, or its rollout log.
        name (`str`):
            What the page calls it.
        text_budget (`int`):
            Most characters of JSON for the gallery.
        picture_budget (`int`):
            Most bytes of thumbnails.
        history (`list[dict]`, *optional*):
            The trainer's `state.log_history`. By default that of the newest `trainer_state.json` that is of this log.

    Returns:
        [`Run`]

    Raises:
        `FileNotFoundError`: if there is no rollout log.
        `ValueError`: if it holds no rollouts.
    """
    path = Path(path)
    log = path / LOG_NAME if path.is_dir() else path
    if not log.is_file():
        raise FileNotFoundError(
            f"{log} does not exist; expected the output_dir of a training run, in which the trainer writes {LOG_NAME}."
        )
    run = Run(log=log, name=shown(name, _LONGEST_NAME))
    run.pictured, run.others = Thinned(text_budget * 2 // 3), Thinned(text_budget // 3)
    missing: set[str] = set()
    steps: dict[int, _Sums] = defaultdict(_Sums)
    recent: deque[str] = deque(maxlen=RECENT_QUESTIONS)
    for rollout in _rollouts(log, run):
        run.rollouts += 1
        recent.append(rollout.question)
        steps[rollout.step].add(rollout, len(set(recent)) / len(recent))
        run.rollout_steps.append(rollout.step)
        run.entropies.append(rollout.entropy)
        run.votes = max(run.votes, len(rollout.answers))
        run.kinds[rollout.kind] += 1
        digest = rollout.digest
        if digest is not None and digest not in run.pictures and digest not in missing:
            picture = read_thumbnail(log.parent, digest)
            if picture is None or picture_budget < len(picture):
                missing.add(digest)
            else:
                picture_budget -= len(picture)
                run.pictures[digest] = picture
        sample = run.pictured if digest in run.pictures else run.others
        sample.add(run.rollouts, partial(_shown_json, rollout, digest in run.pictures))
    if not run.rollouts:
        raise ValueError(f"{log} holds no rollouts ({run.broken} lines could not be read).")
    for step in sorted(steps):
        for metric, value in steps[step].means().items():
            run.curves.setdefault(metric, []).append((step, value))
    _add_history(run, _history(run) if history is None else history)
    return run


@dataclass(frozen=True)
class _Rollout:
    """A line of the log that was checked."""

    step: int
    digest: str | None
    image_id: str
    question: str
    well_formed: bool
    written: str
    majority: str | None
    agreement: float
    entropy: float
    proposer_reward: float
    blind_answers: list[str | None] | None
    answers: list[tuple[str | None, str, float | None, float]]  # canonical, completion, reward, words before

    @staticmethod
    def read(record: dict) -> "_Rollout":
        if not record["answers"]:
            raise ValueError("no answers")
        return _Rollout(
            step=int(_number(record["step"], 0, _LAST_STEP)),
            digest=_text(record["image_digest"]) if record.get("image_digest") is not None else None,
            image_id=_text(record["image_id"]),
            question=_text(record["question"]),
            well_formed=bool(record["question_well_formed"]),
            written=_text(record["question_completion"]),
            majority=None if record["majority"] is None else _text(record["majority"]),
            agreement=_number(record["agreement"], 0, 1),
            entropy=_number(record["entropy"], 0, 20),
            proposer_reward=_number(record["proposer_reward"], -1e6, 1e6),
            blind_answers=_blind(record.get("blind_answers")),
            answers=[
                (
                    None if answer["canonical"] is None else _text(answer["canonical"]),
                    _text(answer["completion"]),
                    None if answer["reward"] is None else _number(answer["reward"], -1e6, 1e6),
                    _number(answer["words_before_answer"], 0, 1e9),
                )
                for answer in record["answers"]
            ],
        )

    @property
    def kind(self) -> str:
        return question_kind(self.question[:_LONGEST_QUESTION]).replace("_", " ")

    def as_shown(self, pictured: bool) -> list:
        """What the page's script reads, in its order."""
        groups = Counter(
            (
                None if canonical is None else shown(canonical, _LONGEST_NAME),
                shown(completion, _LONGEST_COMPLETION),
                None if reward is None else round(reward, 3),
            )
            for canonical, completion, reward, _ in self.answers
        )
        return [
            self.step,
            self.digest if pictured else None,
            shown(self.image_id, _LONGEST_NAME),
            shown(self.question, _LONGEST_QUESTION),
            None if self.well_formed else shown(self.written, _LONGEST_QUESTION),
            self.kind,
            round(self.agreement, 3),
            round(self.entropy, 3),
            round(self.proposer_reward, 3),
            None if self.majority is None else shown(self.majority, _LONGEST_NAME),
            [[*group, count] for group, count in groups.most_common(_MOST_COMPLETIONS)],
            len(self.answers),
            None if self.blind_answers is None else self._shown_blind(),
            *self._shown_votes(),
        ]

    def _shown_votes(self) -> tuple[list[list], int]:
        """The most frequent answers with their count and their lowest and highest reward, the unreadable ones last; and how
        many other answers there are."""
        rewards: dict[str | None, list[float | None]] = defaultdict(list)
        for canonical, _, reward, _ in self.answers:
            rewards[canonical].append(reward)
        unreadable = rewards.pop(None, None)
        ranked = sorted(rewards, key=lambda answer: (-len(rewards[answer]), answer != self.majority))
        votes = [(shown(answer, _LONGEST_NAME), rewards[answer]) for answer in ranked[:_MOST_ANSWERS]]
        if unreadable is not None:
            votes.append((None, unreadable))
        return [[answer, len(given), *_range(given)] for answer, given in votes], len(ranked[_MOST_ANSWERS:])

    def _shown_blind(self) -> list:
        """The most frequent answer without the image, how often it was given, and of how many."""
        (answer, count), *_ = Counter(self.blind_answers).most_common(1)
        return [None if answer is None else shown(answer, _LONGEST_NAME), count, len(self.blind_answers)]


class _Sums:
    """The sums of one step, whose means are the metrics that the trainer logs under the same names."""

    def __init__(self):
        self._of_rollouts = Counter()
        self._of_answers = Counter()
        self._rollouts = self._answers = self._rewarded = 0
        self._rewards = self._distinct = 0.0

    def add(self, rollout: _Rollout, distinct: float) -> None:
        self._rollouts += 1
        self._of_rollouts["proposer/reward"] += rollout.proposer_reward
        self._of_rollouts["agreement"] += rollout.agreement
        self._of_rollouts["answer_entropy"] += rollout.entropy
        self._of_rollouts["unanimous"] += rollout.agreement == 1.0
        self._of_rollouts["malformed_questions"] += not rollout.well_formed
        self._distinct = distinct  # after the last rollout of the step
        for canonical, _, reward, words in rollout.answers:
            self._answers += 1
            self._of_answers["unreadable"] += canonical is None
            self._of_answers["words_before_answer"] += words
            if reward is not None:
                self._rewarded += 1
                self._rewards += reward

    def means(self) -> dict[str, float]:
        means = {name: total / self._rollouts for name, total in self._of_rollouts.items()}
        means |= {name: total / self._answers for name, total in self._of_answers.items()}
        means["distinct_questions"] = self._distinct
        if self._rewarded:
            means["solver/reward"] = self._rewards / self._rewarded
        return means


def _range(rewards: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The lowest and the highest of those that are rewards."""
    known = [round(reward, 3) for reward in rewards if reward is not None]
    return (min(known), max(known)) if known else (None, None)


def _shown_json(rollout: _Rollout, pictured: bool) -> str:
    return to_json(rollout.as_shown(pictured))


def _rollouts(log: Path, run: Run) -> Iterator[_Rollout]:
    """The rollouts of a log, whatever else it holds; counts what is none."""
    # No bar for what takes no time
    bar = tqdm(total=log.stat().st_size, unit="B", unit_scale=True, desc=log.name, delay=2, leave=False)
    with open(log, "rb") as file, bar:
        while line := file.readline(_LONGEST_LINE):
            bar.update(len(line))
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                run.broken += 1
                while line and not line.endswith(b"\n"):
                    line = file.readline(_LONGEST_LINE)
                    bar.update(len(line))
                continue
            if not line.strip():
                continue
            try:
                rollout = _Rollout.read(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                if line.endswith(b"\n"):
                    run.broken += 1
                else:
                    run.cut_off = True
            else:
                yield rollout


def _number(value, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{value!r} is not a number from {low} to {high}")
    return value


def _text(value) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in place of a text")
    return value


def _blind(answers) -> list[str | None] | None:
    """The answers without the image, if the question was asked without it."""
    return None if not answers else [None if answer is None else _text(answer) for answer in answers]


def _history(run: Run) -> list[dict]:
    """The trainer's longest history that is of a run's log. Its folder may hold those of other runs."""
    from ..state import STATE_NAME as OUR_STATE_NAME  # which imports torch

    best, rows, found = -1, [], 0
    folder = run.log.parent
    for file in [folder / REPORT_FOLDER / STATE_NAME, *folder.glob(f"checkpoint-*/{STATE_NAME}")]:
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            step = _number(state["global_step"], 0, _LAST_STEP)
            history = state["log_history"]
            if not isinstance(history, list):
                raise TypeError("no history")
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # half-written, or none: the page says how far the history reaches
        found += 1
        if step > best and _is_of_log(file.with_name(OUR_STATE_NAME), run.log):
            best, rows = step, history
    run.others_histories = found if best < 0 else 0
    return rows


def _is_of_log(file: Path, log: Path) -> bool:
    """Whether what was written with a state is the beginning of this log."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        length = _number(state["rollout_log_bytes"], 1, log.stat().st_size)
        return hash_start(log, length).hexdigest() == state["rollout_log_digest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _add_history(run: Run, history: Sequence[dict]) -> None:
    """Adds the metrics that only the trainer knows, and what a guard says of them."""
    known = set(run.curves)
    rows = [
        {name: value for name, value in row.items() if isinstance(value, float) or _is_step(value)}
        for row in history
        if isinstance(row, dict) and _is_step(row.get("step"))
    ]
    for row in rows:
        run.trainer_steps = max(run.trainer_steps, row["step"])
        for metric, value in row.items():
            if metric not in known and -1e300 < value < 1e300:
                run.curves.setdefault(metric, []).append((row["step"], float(value)))
    run.alarm = _alarm(rows)


def _alarm(rows: Sequence[dict[str, float]]) -> str | None:
    """Where a guard with its default thresholds would have ended the run."""
    if not rows:
        return None
    from ..health.guard import CollapseGuard  # which imports transformers

    guard = CollapseGuard()
    alarm = guard.first_alarm(
        {name: value for name, value in row.items() if name != guard.accuracy or guard.agreement in row}
        for row in rows
    )
    return None if alarm is None else f"step {alarm.step:,}: {alarm.reason}"


def _is_step(value) -> bool:
    return isinstance(value, int) and 0 <= value <= _LAST_STEP
