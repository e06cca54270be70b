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

"""What a proposer asks: kinds of questions, how much alike they are, and how many are new."""

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from sacrebleu.metrics import BLEU
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform


# BLEU from which two questions are alike (R-Zero's clusters: distance 1 - BLEU below 0.5)
ALIKE = 0.5
# Different questions that are compared with each other at a time, since every pair is
_MOST_COMPARED = 128

# In this order; the first that fits is the kind
_KINDS = (
    ("yes_no", r"^(is|are|was|were|do|does|did|has|have|had|can|could|will|would|should)\b(?!.*\bor\b)"),
    ("counting", r"\bhow many\b|\bnumber of\b|\bcount\b"),
    ("colour", r"\bcolou?rs?\b"),
    ("arithmetic", r"\b(sum|plus|minus|times|total|difference|average|mean|ratio|combined|altogether)\b"),
    (
        "comparison",
        r"\bthan\b|\bcompar\w+|\b(more|most|less|least|fewer|same|best|worst)\b|\b(tall|short|high|low|long|small|larg|bigg"
        r"|great|old|young|new|wid|thick|thin|near|clos|farth|furth|heavi|light|dark|bright|earli|lat|fast|slow|few|strong"
        r"|weak|cheap|hot|cold)(er|est)\b",
    ),
    (
        "value",
        r"\bhow (much|tall|high|long|far|old|big|large|wide|fast|heavy)\b|\b(value|percentage|percent|price|height|width"
        r"|amount|temperature|year|date|time)\b",
    ),
    ("position", r"^where\b|\b(left|right|above|below|behind|beside|between|next to|in front of)\b"),
    ("what", r"^(what|which|who|whose|when|why|how)\b"),
)
_PATTERNS = tuple((kind, re.compile(pattern)) for kind, pattern in _KINDS)
QUESTION_KINDS = (*(kind for kind, _ in _KINDS), "other")


def question_kind(question: str) -> str:
    """
    What kind of question this is, by its English words. The first that fits, of: `yes_no` (opens with a verb such as
    "is", offers no "or"), `counting` ("how many"), `colour`, `arithmetic` ("sum", "difference", "total"), `comparison`
    ("than", "most", "tallest"), `value` ("how tall", "percentage"), `position` ("where", "left"), `what` (opens with a
    question word), `other` (also questions in other languages).

    Args:
        question (`str`):
            The question.

    Returns:
        `str`: one of `QUESTION_KINDS`.
    """
    text = question.lower().strip()
    return next((kind for kind, pattern in _PATTERNS if pattern.search(text)), "other")


# "zh" splits Chinese characters and reads all else as the standard tokenizer does
_BLEU = BLEU(effective_order=True, tokenize="zh")


def _bleu(hypothesis: str, references: Sequence[str]) -> float:
    return min(1.0, _BLEU.sentence_score(hypothesis, references).score / 100)


def self_bleu(questions: Sequence[str], others: Sequence[str] = ()) -> float:
    """
    How much alike questions are: the mean BLEU of each, with all the others as its references (Self-BLEU; Zhu et al.
    2018, https://huggingface.co/papers/1802.01886).

    Args:
        questions (`Sequence[str]`):
            The questions that are judged.
        others (`Sequence[str]`, *optional*):
            Further references.

    Returns:
        `float`: 0 if no two share a word, 1 if each is made of pieces of the others. 0 for a single question.
    """
    everything = [*questions, *others]
    if len(everything) < 2:
        return 0.0
    return float(np.mean([_bleu(q, everything[:i] + everything[i + 1 :]) for i, q in enumerate(questions)]))


@lru_cache(maxsize=2**16)
def _likeness(a: str, b: str) -> float:
    """BLEU is not symmetric; this is."""
    return (_bleu(a, [b]) + _bleu(b, [a])) / 2


def cluster_shares(questions: Sequence[str]) -> list[float]:
    """
    For each question, the share of questions that are like it, itself included: the relative size of its cluster when
    questions are clustered by average linkage at a distance of 1 - BLEU below 0.5 (R-Zero,
    https://huggingface.co/papers/2508.05004, the repetition penalty).

    Every pair is compared, so at most 128 different questions are at a time; those beyond form clusters of their own.

    Args:
        questions (`Sequence[str]`):
            The questions of a step.

    Returns:
        `list[float]`: in (0, 1], in the order of the questions.
    """
    counts: dict[str, int] = {}
    for question in questions:
        counts[question] = counts.get(question, 0) + 1
    different = sorted(counts)  # so that the order of images and processes changes nothing
    shares = {}
    for start in range(0, len(different), _MOST_COMPARED):
        block = different[start : start + _MOST_COMPARED]
        labels = _clusters(block)
        for question, label in zip(block, labels, strict=True):
            like = sum(counts[other] for other, own in zip(block, labels, strict=True) if own == label)
            shares[question] = like / len(questions)
    return [shares[question] for question in questions]


def _clusters(different: Sequence[str]) -> list[int]:
    if len(different) < 2:
        return [1] * len(different)
    distances = np.array([[1 - _likeness(*sorted((a, b))) if a != b else 0.0 for b in different] for a in different])
    return fcluster(linkage(squareform(distances), method="average"), t=1 - ALIKE, criterion="distance").tolist()
