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

"""What a step's rollouts say beside those before them: new questions, their kinds, and the drift of the answers' length."""

import base64
import hashlib
from collections import deque
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from ..voting import vote
from .questions import QUESTION_KINDS, question_kind, self_bleu


# Questions among which different ones, and those solved blind, are counted, whatever the images per step
RECENT_QUESTIONS = 64
# Questions of a step whose likeness to others is measured: BLEU takes milliseconds a pair
_MOST_JUDGED = 8
# As few as a share is given of
_FEWEST_BLIND = 8
# Rollouts whose mean answer length later ones are compared with
_FIRST_ROLLOUTS = 10


class RunHealth:
    """
    Follows the rollouts of a run, step by step. The same on every process, since each sees the records of all.
    """

    def __init__(self):
        self._recent: deque[str] = deque(maxlen=RECENT_QUESTIONS)
        self._asked: set[int] = set()  # digests of all questions of the run
        self._solved_blind: deque[bool] = deque(maxlen=RECENT_QUESTIONS)
        self._first_tokens: list[float] = []  # mean answer length of the first rollouts

    def observe(self, records: Sequence[dict]) -> dict[str, float]:
        """
        Takes in the rollouts of one step.

        Args:
            records (`Sequence[dict]`):
                [`~evolmm_trl.monitor.Rollout.record`] of every image of the step, over all processes.

        Returns:
            `dict[str, float]`: of the last 64 questions of the run, the share of different ones (`distinct_questions`); of
            the step's, the share that was never asked before in the run (`novel_questions`) and the share of each kind
            (`question_kinds/...`); of 8 of the step's, evenly spread over it, the Self-BLEU, each with the other 7 and the
            64 before the step as references (`question_self_bleu`); the mean length of the answers in tokens, and as a
            multiple of that of the run's first 10 rollouts (`answer_tokens`, `answer_length_drift`). Of the last 64
            questions that were also asked without the image, once there are 8, the share whose majority was then the
            same (`blind_solved`).
        """
        questions = [record["question"] for record in records]
        judged = min(_MOST_JUDGED, len(questions))
        sample = [questions[i * len(questions) // judged] for i in range(judged)]
        metrics = {"question_self_bleu": self_bleu(sample, self._recent)}
        new = {_digest(question) for question in questions} - self._asked
        self._asked |= new
        self._recent.extend(questions)
        metrics["distinct_questions"] = len(set(self._recent)) / len(self._recent)
        metrics["novel_questions"] = len(new) / len(questions)
        kinds = [question_kind(question) for question in questions]
        metrics |= {f"question_kinds/{kind}": kinds.count(kind) / len(kinds) for kind in QUESTION_KINDS}
        for record in records:
            if record["blind_answers"] is not None:
                blind = vote(record["blind_answers"]).majority
                self._solved_blind.append(blind is not None and blind == record["majority"])
        if len(self._solved_blind) >= _FEWEST_BLIND:
            metrics["blind_solved"] = fmean(self._solved_blind)
        tokens = fmean(answer["tokens"] for record in records for answer in record["answers"])
        if len(self._first_tokens) < _FIRST_ROLLOUTS:
            self._first_tokens.append(tokens)
        metrics["answer_tokens"] = tokens
        metrics["answer_length_drift"] = tokens / fmean(self._first_tokens)
        return metrics

    def state_dict(self) -> dict:
        digests = np.array(sorted(self._asked), dtype="<u8").tobytes()
        return {
            "recent_questions": list(self._recent),
            "questions_asked": base64.b64encode(digests).decode("ascii"),
            "solved_blind": list(self._solved_blind),
            "first_answer_tokens": self._first_tokens,
        }

    def load_state_dict(self, state: dict) -> None:
        self._recent = deque(state["recent_questions"], maxlen=RECENT_QUESTIONS)
        digests = base64.b64decode(state["questions_asked"], validate=True)
        self._asked = set(np.frombuffer(digests, dtype="<u8").tolist())
        self._solved_blind = deque(state["solved_blind"], maxlen=RECENT_QUESTIONS)
        self._first_tokens = list(state["first_answer_tokens"])


def _digest(question: str) -> int:
    return int.from_bytes(hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
