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

"""Questions about images, answered by a model, with the vote of several answers as its confidence."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import GenerationConfig

from .answers import canonical_answer
from .data import decode_named_image
from .processing import special_tokens
from .prompts import RolePrompts, read_answer, without_marks
from .rollout.generation import generate, generate_shared, sample_seed
from .rollout.samples import encode_prompts
from .shared_prefix import install_shared_attention, why_not_shared
from .voting import Vote, vote


MAX_QUESTION_CHARACTERS = 10_000


@dataclass(frozen=True)
class Reply:
    """
    What a model says to one question.

    Args:
        answer (`str` or `None`):
            The answer, as the first of the majority wrote it. `None` if no completion held a readable one.
        completions (`tuple[str, ...]`):
            All that was written, per sample.
        vote ([`Vote`]):
            The vote among the samples. Its `agreement` is the confidence: how sure the model is, not how often it is right.
    """

    answer: str | None
    completions: tuple[str, ...]
    vote: Vote


def ask(
    model,
    processor,
    images: Sequence,
    questions: Sequence[str],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    max_pixels: int | None = 1_003_520,
    batch_size: int = 8,
    seed: int = 0,
    prompts: RolePrompts | None = None,
) -> list[Reply]:
    """
    Asks one question about each image.

    An answer depends on its image, its question and the seed, not on what is asked beside it.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Vision-language model, such as [`load_solver`] gives. Put into eval mode.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        images (`Sequence`):
            Anything that [`~evolmm_trl.data.decode_image`] reads: images, paths, or the content of files.
        questions (`Sequence[str]`):
            One per image. Marks that the tokenizer would read as special tokens are taken out.
        samples (`int`, *optional*, defaults to `1`):
            Answers per question. One is decoded greedily; of several, sampled ones, the majority is taken.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of several samples.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Longest completion, in tokens.
        max_pixels (`int`, *optional*, defaults to `1003520`):
            Larger images are shrunk to this area.
        batch_size (`int`, *optional*, defaults to `8`):
            Questions at a time.
        seed (`int`, *optional*, defaults to `0`):
            Of sampling.
        prompts ([`RolePrompts`], *optional*):
            What the model was trained with, which [`load_prompts`] reads. If `None`, the default ones. Only the solver's
            prompt and the system message are used.

    Returns:
        `list[Reply]`: one per question, in order.

    Raises:
        `ValueError`: if there are not as many questions as images, or a question cannot be asked.
        [`~evolmm_trl.data.UnreadableImageError`]: if an image cannot be read.

    Example:

    ```python
    >>> model, processor = load_solver("Qwen/Qwen2.5-VL-7B-Instruct", "charts-evolmm", device_map="auto")
    >>> prompts = load_prompts("charts-evolmm")
    >>> (reply,) = ask(model, processor, ["chart.png"], ["Which bar is the tallest?"], samples=10, prompts=prompts)
    >>> reply.answer, reply.vote.agreement
    ('2019', 0.8)
    ```
    """
    if len(images) != len(questions):
        raise ValueError(f"Got {len(images)} images and {len(questions)} questions; expected one question per image.")
    if samples < 1 or batch_size < 1:
        raise ValueError(f"`samples` is {samples} and `batch_size` {batch_size}; expected at least 1.")
    if samples > 1 and temperature <= 0:
        raise ValueError(
            f"`temperature` is {temperature}, where all {samples} samples are the same. Pass one above 0."
        )
    prompts = prompts or RolePrompts()
    config = _generation_config(model, processor, samples, temperature, max_new_tokens)
    sample = generate
    if samples > 1 and why_not_shared(model) is None:
        install_shared_attention(model)
        sample = generate_shared
    model.eval()
    replies = []
    for start in range(0, len(questions), batch_size):
        rows = slice(start, start + batch_size)
        texts = [clean_question(question, processor) for question in questions[rows]]
        decoded = [decode_named_image(image, max_pixels) for image in images[rows]]
        encoded = encode_prompts(processor, [prompts.solver_messages(text) for text in texts], decoded)
        seeds = [_seeds(seed, samples, image, text) for image, text in zip(decoded, texts, strict=True)]
        for group in sample(model, encoded, seeds, config):
            replies.append(_reply(processor.tokenizer.batch_decode(group, skip_special_tokens=True)))
    return replies


def clean_question(question: str, processor) -> str:
    """
    A stranger's question as it is asked.

    Raises:
        `ValueError`: if it is too long, no Unicode, or empty without its marks.
    """
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise ValueError(
            f"The question has {len(question):,} characters; expected at most {MAX_QUESTION_CHARACTERS:,}."
        )
    try:
        question.encode()
    except UnicodeEncodeError:
        raise ValueError("The question holds half of a surrogate pair, which is no Unicode text.") from None
    clean = without_marks(question, special_tokens(processor.tokenizer))
    if not clean:
        raise ValueError("The question is empty.")
    return clean


def _seeds(seed: int, samples: int, image, question: str) -> list[int | None]:
    if samples == 1:
        return [None]
    digest = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
    return [sample_seed(seed, digest, question, n) for n in range(samples)]


def _reply(completions: list[str]) -> Reply:
    texts = [read_answer(completion).text for completion in completions]
    canonical = [canonical_answer(text) for text in texts]
    votes = vote(canonical)
    answer = None if votes.majority is None else texts[canonical.index(votes.majority)].strip()
    return Reply(answer, tuple(completions), votes)


def _generation_config(model, processor, samples: int, temperature: float, max_new_tokens: int) -> GenerationConfig:
    ends = model.generation_config.eos_token_id
    ends = {processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    placeholders = {getattr(model.config, name, None) for name in names} - {None, *ends}
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        **(sampling if samples > 1 else {"do_sample": False}),
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=sorted(placeholders) or None,
    )
