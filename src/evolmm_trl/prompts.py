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

"""What the two roles are asked, and how what they say is read."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import TypeVar


# The prompts follow what the paper asks of each role; the wording is this package's own.
_PROPOSER_PROMPT = (
    "You write questions about images. Look at the image and write one question that can be answered from the image "
    "alone, with a short answer: a number, a word or a short phrase. Prefer questions that need several things in the "
    "image to be read and combined, such as comparing, adding, subtracting or locating. Do not ask for an opinion, do "
    "not ask about anything that is not in the image, and do not give the answer. If the answer is a number, the "
    "question must say what is counted or measured and in which unit.\n"
    "Write the question between <question> and </question>."
)
_SOLVER_PROMPT = (
    "Answer the question using only the image. Think briefly, then write the short final answer, and nothing else, "
    "between <answer> and </answer>.\n"
    "Question: {question}"
)
_DEFAULT_QUESTION = "What is the most prominent thing in this image?"

# What the roles were asked in training, beside what was trained
PROMPTS_NAME = "evolmm_prompts.json"

_OPEN_QUESTION = re.compile(r"<question>", re.IGNORECASE)
_CLOSE_QUESTION = re.compile(r"</question>", re.IGNORECASE)
_OPEN_ANSWER = re.compile(r"<answer>", re.IGNORECASE)
_CLOSE_ANSWER = re.compile(r"</answer>", re.IGNORECASE)
_TAG = re.compile(r"</?(?:question|answer)>", re.IGNORECASE)
_CHAT_MARK = re.compile(r"<\|[^<>|]*\|>")
# Marks nested deeper than this in a question were put there on purpose.
_MAX_NESTED_MARKS = 10


_Prompts = TypeVar("_Prompts", bound="Prompts")


class Prompts:
    """Prompts by name, a dataclass of strings."""

    @classmethod
    def from_dict(cls: type[_Prompts], prompts: Mapping[str, str] | None) -> _Prompts:
        """The default prompts with those in `prompts` replaced. An unknown name raises a `ValueError`."""
        if not isinstance(prompts, (Mapping, NoneType)):
            raise ValueError(f"The prompts are a {type(prompts).__name__}, expected names with their texts.")
        prompts = dict(prompts or {})
        defaults = {field.name: field.default for field in fields(cls)}
        unknown = sorted(set(prompts) - set(defaults), key=str)
        if unknown:
            raise ValueError(f"Unknown names in `prompts`: {unknown}. Expected some of {list(defaults)}.")
        for name, text in prompts.items():
            if not isinstance(text, str) and not (text is None and defaults[name] is None):
                raise ValueError(f"The prompt {name!r} is {text!r}, expected a text.")
        return cls(**prompts)


def user_message(text: str, with_image: bool, system: str | None = None) -> list[dict]:
    """A conversation of one user message, with a place for one image in front of the text."""
    content = [{"type": "image"}] if with_image else []
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    return messages + [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


@dataclass(frozen=True)
class RolePrompts(Prompts):
    """
    The prompts of both roles.

    Args:
        proposer (`str`, *optional*):
            What the proposer is told beside the image. It must ask for the tags `<question>` and `</question>`.
        solver (`str`, *optional*):
            What the solver is told beside the image, with the field `{question}`. It must ask for the tags `<answer>`
            and `</answer>`.
        system (`str` or `None`, *optional*):
            System message of both roles. `None` leaves it to the model's chat template.
        default_question (`str`, *optional*):
            What the solver is asked when the proposer wrote nothing at all.
    """

    proposer: str = _PROPOSER_PROMPT
    solver: str = _SOLVER_PROMPT
    system: str | None = None
    default_question: str = _DEFAULT_QUESTION

    def __post_init__(self):
        if "{question}" not in self.solver:
            raise ValueError(
                f"The solver's prompt must contain the field {{question}}, where the question goes; got {self.solver!r}."
            )

    def proposer_messages(self) -> list[dict]:
        """The proposer's conversation, with a place for one image."""
        return user_message(self.proposer, True, self.system)

    def solver_messages(self, question: str, with_image: bool = True) -> list[dict]:
        """The solver's conversation about one question, with a place for one image unless it is asked blind."""
        return user_message(self.solver.replace("{question}", question), with_image, self.system)


@dataclass(frozen=True)
class Question:
    """
    A proposer's completion, read.

    Args:
        text (`str`):
            The question that the solver is asked.
        well_formed (`bool`):
            Whether the completion held exactly one complete, non-empty question. A malformed one is still answered, but
            earns the proposer nothing.
    """

    text: str
    well_formed: bool


@dataclass(frozen=True)
class Answer:
    """
    A solver's completion, read.

    Args:
        text (`str` or `None`):
            What stands between the answer tags; `None` when there is no complete pair of tags.
        words_before (`int`):
            Words before the answer tag; all words when there is none.
    """

    text: str | None
    words_before: int


def read_question(completion: str, default_question: str, special_tokens: Iterable[str] = ()) -> Question:
    """
    Reads the proposer's completion.

    The question goes into the solver's prompt, and a model wrote it, so tags and everything that the tokenizer would
    read as a special token (an end of turn, an image) is taken out of it.

    Args:
        completion (`str`):
            The decoded completion.
        default_question (`str`):
            The question to ask when nothing is left of the completion.
        special_tokens (`Iterable[str]`, *optional*):
            The tokenizer's special tokens.

    Returns:
        [`Question`]
    """
    found = _complete_questions(completion)
    text = found[0] if found else completion
    clean = without_marks(text, special_tokens)
    well_formed = len(found) == 1 and bool(clean) and clean == " ".join(text.split())
    return Question(text=clean or default_question, well_formed=well_formed)


def _complete_questions(completion: str) -> list[str]:
    # A lazy pattern would search the rest of the text again from every tag that is never closed
    texts, end = [], 0
    while (opening := _OPEN_QUESTION.search(completion, end)) is not None:
        closing = _CLOSE_QUESTION.search(completion, opening.end())
        if closing is None:
            break
        texts.append(completion[opening.end() : closing.start()])
        end = closing.end()
    return texts


def without_marks(text: str, special_tokens: Iterable[str]) -> str:
    """Takes everything out of a stranger's text that a tokenizer would read as a special token, and the roles' tags."""
    special_tokens = [token for token in special_tokens if token]
    text = " ".join(text.split())
    # Taking out one mark can join the halves of another, so go on until nothing changes
    for _ in range(_MAX_NESTED_MARKS):
        shorter = _TAG.sub(" ", _CHAT_MARK.sub(" ", text))
        for token in special_tokens:
            shorter = shorter.replace(token, " ")
        shorter = " ".join(shorter.split())
        if shorter == text:
            return text
        text = shorter
    return ""


def read_answer(completion: str) -> Answer:
    """
    Reads the solver's completion: the text of its last complete `<answer>...</answer>` and the words before it.

    Args:
        completion (`str`):
            The decoded completion.

    Returns:
        [`Answer`]
    """
    closings = list(_CLOSE_ANSWER.finditer(completion))
    openings = list(_OPEN_ANSWER.finditer(completion, 0, closings[-1].start())) if closings else []
    if not openings:
        return Answer(text=None, words_before=len(completion.split()))
    opening = openings[-1]
    closing = next(closing for closing in closings if closing.start() >= opening.end())
    return Answer(
        text=completion[opening.end() : closing.start()],
        words_before=len(completion[: opening.start()].split()),
    )
