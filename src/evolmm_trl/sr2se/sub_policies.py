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

"""One vision-language model as SR2SE's sub-policies, told apart by their prompts alone."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from ..data import decode_named_image
from ..processing import special_tokens
from ..prompts import Prompts, read_answer, user_message, without_marks
from .generation import Completion, generate


_FIELD = re.compile(r"\{(question|description|steps)\}")
# What the template of each sub-policy must contain. Those of perception and refinement come with the image, the rest on
# text alone.
_FIELDS = {
    "perception": {"question"},
    "refinement": {"question", "description"},
    "step": {"question", "description", "steps"},
    "text_answer": {"question", "description"},
    "final_answer": {"question", "description", "steps"},
}


@dataclass(frozen=True)
class SubPolicyPrompts(Prompts):
    """
    The prompts of the sub-policies. Fields in braces are filled in; `{steps}` is one step per line, or `none`.

    Args:
        perception (`str`, *optional*):
            pi_perc(I, Q), beside the image: asks for a description of what matters for `{question}`.
        refinement (`str`, *optional*):
            Refine(I, Q, c), beside the image: says that `{description}` did not lead to the right answer to `{question}`,
            and asks to look again.
        step (`str`, *optional*):
            pi_reason(c, Q, H), on text alone: asks for the next step from `{question}`, `{description}` and `{steps}`.
        text_answer (`str`, *optional*):
            pi_text(Q, c), on text alone: asks for the answer to `{question}` from `{description}` alone.
        final_answer (`str`, *optional*):
            On text alone: asks for the answer to `{question}` from `{description}` and `{steps}`. Both answers must be
            asked for between `<answer>` and `</answer>`.
        system (`str` or `None`, *optional*):
            System message of all; `None` leaves it to the model's chat template.
    """

    perception: str = (
        "Describe what in the image matters for the question: objects, attributes, numbers, text and where things are. "
        "Do not answer the question.\nQuestion: {question}"
    )
    refinement: str = (
        "Your description of the image was not enough to answer the question correctly.\n"
        "Question: {question}\nDescription: {description}\n"
        "Look at the image again. Pay attention to where things are relative to each other, and to small details that "
        "were missed or misread. Write a corrected description. Do not answer the question."
    )
    step: str = (
        "Work towards the answer to the question one short step at a time. You do not see the image, only its "
        "description.\nQuestion: {question}\nDescription: {description}\nSteps so far:\n{steps}\n"
        "Write the next step and nothing else."
    )
    text_answer: str = (
        "Answer the question from the description of the image alone. Write the short final answer, and nothing else, "
        "between <answer> and </answer>.\nQuestion: {question}\nDescription: {description}"
    )
    final_answer: str = (
        "Answer the question from the description of the image and the reasoning steps. Write the short final answer, "
        "and nothing else, between <answer> and </answer>.\n"
        "Question: {question}\nDescription: {description}\nSteps:\n{steps}"
    )
    system: str | None = None

    def __post_init__(self):
        for name, needed in _FIELDS.items():
            found = set(_FIELD.findall(getattr(self, name)))
            if found != needed:
                raise ValueError(
                    f"The prompt `{name}` has the fields {sorted(found)}; expected exactly {sorted(needed)}, in braces. "
                    f"It is {getattr(self, name)!r}."
                )

    def to_dict(self) -> dict[str, str | None]:
        """All prompts by name."""
        return asdict(self)

    def fill(self, name: str, **values: str) -> str:
        """The prompt `name` with its fields filled in, in one pass: a field's name inside a value stays as it is."""
        return _FIELD.sub(lambda match: values[match[1]], getattr(self, name))


class SubPolicies:
    """
    SR2SE's sub-policies over one model (section "HSR-EE" of the paper). Every method takes many questions at once.

    Whatever a question or a model's text holds that the tokenizer would read as a special token is taken out before it
    becomes part of a prompt.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A vision-language model.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        prompts ([`SubPolicyPrompts`], *optional*):
            The prompts.
        max_perception_tokens (`int`, *optional*, defaults to `256`), max_step_tokens (`int`, *optional*, defaults to `256`), max_answer_tokens (`int`, *optional*, defaults to `128`):
            Longest completions (authors' code).
        max_pixels (`int` or `None`, *optional*, defaults to `1003520`):
            Images with more pixels are made smaller.
        batch_size (`int`, *optional*, defaults to `8`):
            Prompts per call of `model.generate`.

    Example:

    ```python
    >>> policies = SubPolicies(model, load_processor("Qwen/Qwen2.5-VL-7B-Instruct"))
    >>> description = policies.perceive(["chart.png"], ["Which bar is the tallest?"])[0].text
    ```
    """

    def __init__(
        self,
        model,
        processor,
        prompts: SubPolicyPrompts | None = None,
        max_perception_tokens: int = 256,
        max_step_tokens: int = 256,
        max_answer_tokens: int = 128,
        max_pixels: int | None = 1_003_520,
        batch_size: int = 8,
    ):
        self.model = model
        self.processor = processor
        self.prompts = prompts or SubPolicyPrompts()
        self.max_perception_tokens = max_perception_tokens
        self.max_step_tokens = max_step_tokens
        self.max_answer_tokens = max_answer_tokens
        self.max_pixels = max_pixels
        self.batch_size = batch_size

    def settings(self) -> dict:
        """What completions depend on beside the model, as JSON holds it."""
        names = ("max_perception_tokens", "max_step_tokens", "max_answer_tokens", "max_pixels")
        return {"prompts": self.prompts.to_dict(), **{name: getattr(self, name) for name in names}}

    def image(self, image: "Image.Image | bytes | str | Path | dict") -> Image.Image:
        """One image, decoded. Raises [`~evolmm_trl.data.UnreadableImageError`] if it cannot be."""
        return decode_named_image(image, self.max_pixels)

    def clean(self, text: str) -> str:
        """A stranger's text without special tokens and answer tags, on one line."""
        return without_marks(text, special_tokens(self.processor.tokenizer))

    def perceive(
        self, images: Sequence, questions: Sequence[str], temperature: float = 0.0, seed: int | None = None
    ) -> list[Completion]:
        """
        Describes each image for its question: pi_perc(I, Q).

        Args:
            images (`Sequence`):
                n PIL images, or contents or paths of image files.
            questions (`Sequence[str]`):
                One per image.
            temperature (`float`, *optional*, defaults to `0.0`):
                0 decodes greedily.
            seed (`int`, *optional*):
                Of the sampling. Without it the global generators are used.

        Returns:
            `list[Completion]`: n descriptions of at most `max_perception_tokens` tokens.

        Raises:
            [`~evolmm_trl.data.UnreadableImageError`]: if an image cannot be decoded.
        """
        return self._complete(
            [perception_conversation(self.prompts, question, self.processor) for question in questions],
            self.max_perception_tokens,
            images,
            temperature=temperature,
            seed=seed,
        )

    def refine(
        self,
        images: Sequence,
        questions: Sequence[str],
        descriptions: Sequence[str],
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Completion]:
        """
        Looks at each image again: Refine(I, Q, c).

        Args:
            images (`Sequence`), questions (`Sequence[str]`):
                n images and one question about each; see [`SubPolicies.perceive`].
            descriptions (`Sequence[str]`):
                n descriptions so far.
            temperature (`float`, *optional*, defaults to `0.0`), seed (`int`, *optional*):
                As in [`SubPolicies.perceive`].

        Returns:
            `list[Completion]`: n descriptions of at most `max_perception_tokens` tokens.
        """
        return self._complete(
            self._fill("refinement", questions, descriptions, with_image=True),
            self.max_perception_tokens,
            images,
            temperature=temperature,
            seed=seed,
        )

    def reason(
        self, questions: Sequence[str], descriptions: Sequence[str], steps: Sequence[Sequence[str]]
    ) -> list[Completion]:
        """
        Takes the next reasoning step of each question, greedily: pi_reason(c, Q, H).

        Args:
            questions (`Sequence[str]`), descriptions (`Sequence[str]`):
                n questions and the descriptions of their images.
            steps (`Sequence[Sequence[str]]`):
                For each of the n questions, the steps so far; their number may differ.

        Returns:
            `list[Completion]`: n steps of at most `max_step_tokens` tokens, each with its `hidden`, the state at its end,
            float32 of shape `(hidden_size,)`.
        """
        return self._complete(
            self._fill("step", questions, descriptions, steps), self.max_step_tokens, with_hidden=True
        )

    def answer_from_text(
        self,
        questions: Sequence[str],
        descriptions: Sequence[str],
        samples: int = 1,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[list[Completion]]:
        """
        Answers each question from its description alone: pi_text(Q, c).

        Args:
            questions (`Sequence[str]`), descriptions (`Sequence[str]`):
                n questions and the descriptions of their images.
            samples (`int`, *optional*, defaults to `1`):
                Answers to each.
            temperature (`float`, *optional*, defaults to `0.0`), seed (`int`, *optional*):
                As in [`SubPolicies.perceive`].

        Returns:
            `list[list[Completion]]`: for each of the n questions `samples` answers of at most `max_answer_tokens` tokens.
        """
        return self._complete_all(
            self._fill("text_answer", questions, descriptions),
            self.max_answer_tokens,
            samples=samples,
            temperature=temperature,
            seed=seed,
        )

    def answer(
        self, questions: Sequence[str], descriptions: Sequence[str], steps: Sequence[Sequence[str]]
    ) -> list[Completion]:
        """
        Answers each question from its description and reasoning steps, greedily.

        Args:
            questions (`Sequence[str]`), descriptions (`Sequence[str]`), steps (`Sequence[Sequence[str]]`):
                As in [`SubPolicies.reason`].

        Returns:
            `list[Completion]`: n answers of at most `max_answer_tokens` tokens.
        """
        return self._complete(self._fill("final_answer", questions, descriptions, steps), self.max_answer_tokens)

    def _fill(self, name, questions, descriptions, steps=None, with_image=False) -> list[list[dict]]:
        conversations = []
        for i, (question, description) in enumerate(zip(questions, descriptions, strict=True)):
            values = {"question": self.clean(question), "description": self.clean(description)}
            if steps is not None:
                values["steps"] = "\n".join(map(self.clean, steps[i])) or "none"
            conversations.append(user_message(self.prompts.fill(name, **values), with_image, self.prompts.system))
        return conversations

    def _complete(self, conversations, max_new_tokens, images=None, **kwargs) -> list[Completion]:
        return [group[0] for group in self._complete_all(conversations, max_new_tokens, images, **kwargs)]

    def _complete_all(self, conversations, max_new_tokens, images=None, **kwargs) -> list[list[Completion]]:
        return generate(
            self.model,
            self.processor,
            conversations,
            None if images is None else [self.image(image) for image in images],
            max_new_tokens=max_new_tokens,
            batch_size=self.batch_size,
            **kwargs,
        )


def perception_conversation(prompts: SubPolicyPrompts, question: str, processor) -> list[dict]:
    """The conversation of pi_perc(I, Q); SR-DPO trains on the same one."""
    question = without_marks(question, special_tokens(processor.tokenizer))
    return user_message(prompts.fill("perception", question=question), True, prompts.system)


def answer_of(completion: Completion) -> str | None:
    """What stands between the completion's answer tags, or `None`."""
    return read_answer(completion.text).text
