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

"""Iterative perception refinement (IPR, Algorithm 3 of SR2SE): pairs of a corrected and a failed description.

    row ──► describe ──► does text alone answer rightly? ──no──► look again, at most N_max times ──► pair or nothing

Without labels the proposer asks, and the majority of N solver answers stands in for the truth.
"""

import glob
import hashlib
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from ..answers import canonical_answer
from ..data import UnreadableImageError, load_images
from ..processing import special_tokens
from ..prompts import RolePrompts, read_question
from ..rollout.generation import sample_seed
from ..voting import Vote, vote
from .early_exit import EarlyExitReasoner, GateRollouts, image_numbers, is_right
from .generation import Completion, generate, process_state
from .rows import BadRow, Row, read_rows, warn_of
from .sub_policies import SubPolicies, answer_of


logger = logging.getLogger(__name__)


@dataclass
class RefinementConfig:
    """
    How preference pairs are made.

    Args:
        max_refinements (`int`, *optional*, defaults to `2`):
            N_max (paper); 0 makes no pairs, only the rollouts for a gate.
        temperature (`float`, *optional*, defaults to `0.7`):
            Of descriptions and refinements (authors' code); 0 decodes greedily.
        validation_samples (`int`, *optional*, defaults to `1`):
            Answers from text that a description is judged by. One is decoded greedily, so that a lucky sample cannot
            make a winner; more are sampled at `temperature`.
        validation_required (`int`, *optional*, defaults to `1`):
            How many of them must be right.
        answer_leak (`str`, *optional*, defaults to `"contains"`):
            Which winners are rejected for stating the answer. `"contains"`: those in which it occurs at all.
            `"declared"`: those that give it as the answer; take it where a description cannot but contain the answer,
            as in questions about one value that is read off.
        min_agreement (`float`, *optional*, defaults to `0.8`):
            Without labels, the share of the majority among the N answers from which on it stands in for the truth, above
            0 and at most 1.
        max_rows (`int`, *optional*):
            How many rows of the source to take.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows at a time. What is done can be resumed, and is spread over processes, by such batches.
        seed (`int`, *optional*, defaults to `42`):
            Of all sampling; the pairs do not depend on the number of processes.
    """

    max_refinements: int = 2
    temperature: float = 0.7
    validation_samples: int = 1
    validation_required: int = 1
    answer_leak: str = "contains"
    min_agreement: float = 0.8
    max_rows: int | None = None
    batch_size: int = 32
    seed: int = 42

    def __post_init__(self):
        if not 1 <= self.validation_required <= self.validation_samples:
            raise ValueError(
                f"`validation_required` is {self.validation_required} of {self.validation_samples} "
                "`validation_samples`; expected at least 1 and at most all of them."
            )
        if self.validation_samples > 1 and self.temperature == 0:
            raise ValueError(
                "`validation_samples` above 1 needs a `temperature` above 0: greedy answers are all the same."
            )
        if self.answer_leak not in ("contains", "declared"):
            raise ValueError(f"`answer_leak` is {self.answer_leak!r}; expected 'contains' or 'declared'.")
        if self.max_refinements < 0:
            raise ValueError(f"`max_refinements` is {self.max_refinements}; expected 0 or more.")
        if not 0 < self.min_agreement <= 1:
            raise ValueError(
                f"`min_agreement` is {self.min_agreement}; expected a share of the answers above 0 and at most 1, such as "
                "0.8."
            )


class AgreementLabeller:
    """
    What stands in for labels: the model as proposer asks, and as solver answers N times; see EvoLMM.

    Args:
        policies ([`SubPolicies`]):
            Gives the model, its processor and the size of batches and images.
        prompts ([`RolePrompts`], *optional*):
            The prompts of both roles.
        num_answers (`int`, *optional*, defaults to `5`):
            N, at least 2.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of questions and answers.
        max_question_tokens (`int`, *optional*, defaults to `128`), max_answer_tokens (`int`, *optional*, defaults to `128`):
            Longest completions.
    """

    def __init__(
        self,
        policies: SubPolicies,
        prompts: RolePrompts | None = None,
        num_answers: int = 5,
        temperature: float = 1.0,
        max_question_tokens: int = 128,
        max_answer_tokens: int = 128,
    ):
        if num_answers < 2:
            raise ValueError(
                f"`num_answers` is {num_answers}; expected at least 2: a single answer always agrees with itself, and would "
                "be taken for the truth."
            )
        self.policies = policies
        self.prompts = prompts or RolePrompts()
        self.num_answers = num_answers
        self.temperature = temperature
        self.max_question_tokens = max_question_tokens
        self.max_answer_tokens = max_answer_tokens

    def settings(self) -> dict:
        """What the labels depend on beside the model."""
        names = ("num_answers", "temperature", "max_question_tokens", "max_answer_tokens")
        return {"prompts": asdict(self.prompts), **{name: getattr(self, name) for name in names}}

    def ask(self, images: Sequence, seed: int) -> list[str | None]:
        """
        Asks a question about each image.

        Args:
            images (`Sequence`):
                n PIL images, or contents or paths of image files.
            seed (`int`):
                Of the questions.

        Returns:
            `list[str or None]`: n questions; `None` where the model wrote none that is well formed.
        """
        conversations = [self.prompts.proposer_messages() for _ in images]
        groups = self._generate(conversations, images, self.max_question_tokens, 1, seed)
        marks = special_tokens(self.policies.processor.tokenizer)
        read = [read_question(group[0].text, self.prompts.default_question, marks) for group in groups]
        return [question.text if question.well_formed else None for question in read]

    def vote(self, images: Sequence, questions: Sequence[str], seed: int) -> list[Vote]:
        """
        Lets N answers to each question vote.

        Args:
            images (`Sequence`), questions (`Sequence[str]`):
                n images, as in [`AgreementLabeller.ask`], and one question about each.
            seed (`int`):
                Of the answers.

        Returns:
            `list[Vote]`: n votes; a vote's `agreement` is the majority's share of the N answers, from 0 to 1.
        """
        groups = self.answer(images, questions, seed)
        return [vote([canonical_answer(answer_of(completion)) for completion in group]) for group in groups]

    def roll_out(
        self, images: Sequence, questions: Sequence[str], seed: int, truths: Sequence[str] | None = None
    ) -> GateRollouts:
        """
        What a gate on the vote learns from: the state at the end of each of the N answers, and whether the majority of
        the answers up to it is right.

        Args:
            images (`Sequence`), questions (`Sequence[str]`):
                One image per question.
            seed (`int`):
                Of the answers.
            truths (`Sequence[str]`, *optional*):
                The answers. Without them the majority of all N counts as right.

        Returns:
            [`GateRollouts`], with an answer in the place of a step.
        """
        groups = self.answer(images, questions, seed, with_hidden=True)
        read = [[canonical_answer(answer_of(completion)) for completion in group] for group in groups]
        right = [vote(answers).majority for answers in read] if truths is None else map(canonical_answer, truths)
        correct = [
            [truth is not None and vote(answers[:k]).majority == truth for k in range(1, self.num_answers + 1)]
            for answers, truth in zip(read, right, strict=True)
        ]
        hidden = [torch.stack([completion.hidden for completion in group]) for group in groups]
        visual = torch.zeros(len(groups), dtype=torch.bool)
        image = image_numbers([self.policies.image(image) for image in images])
        return GateRollouts(torch.stack(hidden), torch.tensor(correct), visual, image)

    def answer(
        self, images: Sequence, questions: Sequence[str], seed: int, with_hidden: bool = False
    ) -> list[list[Completion]]:
        """
        Answers each question N times.

        Args:
            images (`Sequence`), questions (`Sequence[str]`):
                n images, as in [`AgreementLabeller.ask`], and one question about each.
            seed (`int`):
                Of the answers.
            with_hidden (`bool`, *optional*, defaults to `False`):
                Whether each completion gets its `hidden`, the state at its end, of shape `(hidden_size,)`.

        Returns:
            `list[list[Completion]]`: for each of the n questions N completions, each at most `max_answer_tokens` long.
        """
        conversations = [self.prompts.solver_messages(self.policies.clean(question)) for question in questions]
        return self._generate(conversations, images, self.max_answer_tokens, self.num_answers, seed, with_hidden)

    def _generate(self, conversations, images, max_new_tokens, samples, seed, with_hidden=False):
        return generate(
            self.policies.model,
            self.policies.processor,
            conversations,
            [self.policies.image(image) for image in images],
            max_new_tokens=max_new_tokens,
            samples=samples,
            temperature=self.temperature,
            seed=seed,
            batch_size=self.policies.batch_size,
            with_hidden=with_hidden,
        )


# ---------------------------------------------------------------------------------------------------------------------
# One batch
# ---------------------------------------------------------------------------------------------------------------------


def is_valid(
    policies: SubPolicies,
    questions: Sequence[str],
    descriptions: Sequence[str],
    truths: Sequence[str],
    config: RefinementConfig,
    seed: int,
) -> list[bool]:
    """
    Whether each description suffices: Valid(c) = 1[pi_text(Q, c) = a_gt] (Eq. 26), answered greedily, or by
    `validation_required` of `validation_samples` answers. Answers are compared in canonical form.
    """
    samples = config.validation_samples
    groups = policies.answer_from_text(
        questions, descriptions, samples=samples, temperature=config.temperature if samples > 1 else 0.0, seed=seed
    )
    return [
        sum(is_right(answer_of(completion), truth) for completion in group) >= config.validation_required
        for group, truth in zip(groups, truths, strict=True)
    ]


_SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+|\n+")
_CLAUSE_END = re.compile(r",(?!\d)")
_ANSWER_WORD = re.compile(r"\banswer\b", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+(?:[.,'][^\W_]+)*")
_HYPHENATED = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")  # "no-one" is not "no"
_HYPHEN = re.compile(r"(?<=[^\W\d_])[-\u2010\u2011](?=[^\W\d_])")
# To contain one of these words says nothing: "no", "A bird".
_COMMON = {"yes", "no", "true", "false"}


def states_answer(description: str, answer: str, rule: str = "contains") -> bool:
    """
    Whether a description gives the answer away. Dark-red is dark red, and 50 % is 50% and 50 percent.

    Args:
        description (`str`), answer (`str`):
            The description and the true answer.
        rule (`str`, *optional*, defaults to `"contains"`):
            `"declared"`: it has an answer tag, or a sentence is the answer, or has it behind the word "answer". Yes, no,
            true and false are also declared where a clause begins or ends with them, an option's letter where it is a
            sentence's first clause or, as a capital, its last word.
            `"contains"`: also if the answer occurs anywhere, as whole words and in canonical form. Option letters, yes,
            no, true and false must be declared in either case.
    """
    if _ANSWER_TAG.search(description):
        return True
    truth = canonical_answer(_HYPHEN.sub(" ", answer))
    weak = truth in _COMMON or re.fullmatch(r"[a-z]", truth)
    longest = len(answer.split()) + 2  # "50 per cent" is 50%
    for sentence in _SENTENCE_END.split(description):
        if weak and _declares(truth, sentence):
            return True
        sentence = _HYPHEN.sub(" ", sentence)
        if canonical_answer(sentence) == truth:
            return True
        word = _ANSWER_WORD.search(sentence)
        if word and _occurs(truth, sentence[word.end() :], longest):
            return True
    return rule == "contains" and not weak and _occurs(truth, _HYPHEN.sub(" ", description), longest)


def _declares(truth: str, sentence: str) -> bool:
    """Whether a sentence says yes, no, true or false, or names an option: "No, it is not", "It is B"."""
    clauses = [_HYPHENATED.findall(clause) for clause in _CLAUSE_END.split(sentence)]
    clauses = [words for words in clauses if words]
    if not clauses:
        return False
    if truth in _COMMON:
        return any(truth in (words[0].lower(), words[-1].lower()) for words in clauses)
    return clauses[-1][-1] == truth.upper() or [word.lower() for word in clauses[0]] == [truth]


def _occurs(truth: str, text: str, longest: int) -> bool:
    # Words between spaces, and what punctuation joins taken apart: "height=8", "red/blue"
    return any(
        canonical_answer(" ".join(words[start : start + size])) == truth
        for words in (text.split(), _WORD.findall(text))
        for size in range(1, longest + 1)
        for start in range(len(words) - size + 1)
    )


@dataclass(frozen=True)
class _Sample:
    """A row with a question and what counts as the truth."""

    row: Row
    image: object
    question: str
    truth: str


class PairMaker:
    """
    Algorithm 3 for batches of rows.

    Args:
        policies ([`SubPolicies`]):
            The model's sub-policies.
        config ([`RefinementConfig`], *optional*):
            The settings.
        labeller ([`AgreementLabeller`], *optional*):
            Asks and votes in the place of labels; with it the rows' answers are only compared with.
        reasoner ([`EarlyExitReasoner`], *optional*):
            Reasons on from the same descriptions, for rollouts to train its gate on.
    """

    def __init__(
        self,
        policies: SubPolicies,
        config: RefinementConfig | None = None,
        labeller: AgreementLabeller | None = None,
        reasoner: EarlyExitReasoner | None = None,
    ):
        self.policies = policies
        self.config = config or RefinementConfig()
        self.labeller = labeller
        self.reasoner = reasoner

    def __call__(self, rows: Iterable[Row | BadRow], batch: int, roll_out: bool = False):
        """
        The pairs of one batch.

        Args:
            rows (`Iterable[Row or BadRow]`):
                The rows.
            batch (`int`):
                The batch's number, for its seeds.
            roll_out (`bool`, *optional*, defaults to `False`):
                Whether to make the gate's rollouts as well.

        Returns:
            `tuple[list[dict], Counter, list[BadRow], GateRollouts or None]`: records of `index` and the pair, what was
            counted, the rows that were skipped, and the rollouts.
        """
        counts, skipped = Counter(), []
        samples = self._samples(rows, batch, counts, skipped)
        if not samples:
            return [], counts, skipped, None
        images = [sample.image for sample in samples]
        questions = [sample.question for sample in samples]
        truths = [sample.truth for sample in samples]
        config = self.config

        first = self.policies.perceive(images, questions, config.temperature, self._seed("perceive", batch))
        valid = self._valid(samples, first, batch, 0)
        counts["considered"] += len(samples)
        counts["initially_right"] += sum(valid)
        rollouts = None
        if roll_out:
            rollouts = self.reasoner.roll_out(images, questions, truths, [c.text for c in first], valid)

        pairs = []
        latest = list(first)
        active = [i for i in range(len(samples)) if not valid[i]]
        for iteration in range(1, config.max_refinements + 1):
            if not active:
                break
            refined = self.policies.refine(
                [images[i] for i in active],
                [questions[i] for i in active],
                [latest[i].text for i in active],
                config.temperature,
                self._seed("refine", batch, iteration),
            )
            for i, completion in zip(active, refined, strict=True):
                latest[i] = completion
            valid = self._valid([samples[i] for i in active], refined, batch, iteration)
            winners = [i for i, ok in zip(active, valid, strict=True) if ok]
            active = [i for i in active if i not in set(winners)]
            for i in winners:
                counts[f"refined_at_{iteration}"] += 1
                if states_answer(latest[i].text, truths[i], config.answer_leak):
                    counts["states_answer"] += 1
                    continue
                if first[i].cut_off or latest[i].cut_off:  # SR-DPO would score an end that was not written
                    counts["cut_off"] += 1
                    continue
                # The loser is always the first description.
                counts["pairs"] += 1
                counts["chosen_tokens"] += latest[i].tokens
                counts["rejected_tokens"] += first[i].tokens
                counts["chosen_longer"] += latest[i].tokens > first[i].tokens
                counts["rejected_longer"] += latest[i].tokens < first[i].tokens
                pairs.append(
                    {
                        "index": samples[i].row.index,
                        "image_path": samples[i].row.image_path,
                        "question": questions[i],
                        "ground_truth": truths[i],
                        "chosen": latest[i].text,
                        "rejected": first[i].text,
                        "iteration": iteration,
                    }
                )
        counts["discarded"] += len(active)
        return pairs, counts, skipped, rollouts

    def _samples(self, rows, batch, counts, skipped) -> list[_Sample]:
        samples = []
        for row in rows:
            counts["rows"] += 1
            if isinstance(row, Row):
                try:
                    samples.append(_Sample(row, self.policies.image(row.image_path), row.question, row.answer))
                    continue
                except UnreadableImageError as error:
                    row = BadRow(row.index, row.image_path, f"unreadable image: {error.reason}")
            skipped.append(row)
        return samples if self.labeller is None else self._label(samples, batch, counts)

    def _label(self, samples: list[_Sample], batch: int, counts: Counter) -> list[_Sample]:
        """The samples for which the majority agrees, with its answer as the truth."""
        to_ask = [i for i, sample in enumerate(samples) if sample.question is None]
        asked = dict.fromkeys(range(len(samples)))
        if to_ask:
            questions = self.labeller.ask([samples[i].image for i in to_ask], self._seed("ask", batch))
            asked.update(zip(to_ask, questions, strict=True))
        counts["asked"] += len(to_ask)
        samples = [
            _Sample(sample.row, sample.image, sample.question or asked[i], sample.truth)
            for i, sample in enumerate(samples)
            if sample.question or asked[i]
        ]
        counts["no_question"] += len(asked) - len(samples)
        if not samples:
            return []
        votes = self.labeller.vote(
            [sample.image for sample in samples], [sample.question for sample in samples], self._seed("vote", batch)
        )
        kept = []
        for sample, counted in zip(samples, votes, strict=True):
            if counted.majority is None or counted.agreement < self.config.min_agreement:
                counts["below_agreement"] += 1
                continue
            if sample.truth is not None and sample.row.question is not None:
                counts["stand_ins_checked"] += 1
                counts["stand_ins_right"] += counted.majority == canonical_answer(sample.truth)
            kept.append(_Sample(sample.row, sample.image, sample.question, counted.majority))
        return kept

    def _valid(self, samples, completions, batch, iteration) -> list[bool]:
        return is_valid(
            self.policies,
            [sample.question for sample in samples],
            [completion.text for completion in completions],
            [sample.truth for sample in samples],
            self.config,
            self._seed("validate", batch, iteration),
        )

    def _seed(self, *key: str | int) -> int:
        return sample_seed(repr((self.config.seed, *key)))


# ---------------------------------------------------------------------------------------------------------------------
# A whole source: resumable, streaming, spread over processes
# ---------------------------------------------------------------------------------------------------------------------


def build_pairs(
    policies: SubPolicies,
    source: "str | Path | Dataset | IterableDataset",
    output: str | Path,
    config: RefinementConfig | None = None,
    labeller: AgreementLabeller | None = None,
    reasoner: EarlyExitReasoner | None = None,
    rollout_folder: str | Path | None = None,
    rollout_rows: int = 5000,
    image_root: str | Path | None = None,
) -> dict:
    """
    Writes the preference pairs of a source, one JSON object per line with `image_path`, `question`, `ground_truth`,
    `chosen`, `rejected` and `iteration`, and a report beside them.

    Started under `torchrun` or `accelerate launch`, the processes share the work; the pairs are the same for any number
    of them. A run that was stopped goes on where it was: the same call does not repeat finished batches, and returns at
    once if all is done. With other settings, other weights or another source it is an error: a file is known by its
    place and content, a folder by its place and the names and sizes of its images, a dataset by its fingerprint. A stream
    is not known.

    Args:
        policies ([`SubPolicies`]):
            The model's sub-policies.
        source (`str`, `Path`, [`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            JSONL with `image`, `question` and `answer`, a folder of images, or a dataset; see [`read_rows`]. Read as a
            stream.
        output (`str` or `Path`):
            The JSONL file to write; its report is `<output>.report.json`. Images of a dataset that are no files are
            written to the folder `images` beside it.
        config ([`RefinementConfig`], *optional*):
            The settings.
        labeller ([`AgreementLabeller`], *optional*):
            Pass one to do without labels. A row's own question is used, and its own answer compared with.
        reasoner ([`EarlyExitReasoner`], *optional*), rollout_folder (`str` or `Path`, *optional*):
            Pass both to reason on from the same descriptions and to write what a gate is trained on.
        rollout_rows (`int`, *optional*, defaults to `5000`):
            How many of the first rows are reasoned on.
        image_root (`str` or `Path`, *optional*):
            Folder that image paths in rows start from and may not leave; see [`read_rows`].

    Returns:
        `dict`: the report. `pair_yield` is pairs per usable row, `recovered` pairs per row whose first description
        failed.

    Raises:
        `ValueError`: if `output` is the source, or was begun with other settings, or the folder of rollouts holds those of
        another run.
    """
    config = config or RefinementConfig()
    output = Path(output)
    if isinstance(source, (str, Path)) and output.exists() and output.samefile(source):
        raise ValueError(f"`output` is {str(output)!r}, the source itself, whose rows the pairs would replace.")
    state = process_state()
    report_file = output.with_name(output.name + ".report.json")
    rows_in_all, content = rows_and_digest(source)
    settings = {
        "config": asdict(config),
        "policies": policies.settings(),
        "weights": _weights_digest(policies.model),
        "labeller": labeller.settings() if labeller else None,
        "rollout_rows": rollout_rows if reasoner else 0,
        "rollout_steps": reasoner.max_steps if reasoner else 0,
        "source": absolute(source) if isinstance(source, (str, Path)) else "dataset",
        "source_content": content,
        "image_root": None if image_root is None else absolute(image_root),
    }
    if report_file.is_file() and output.is_file():
        report = json.loads(report_file.read_text())
        _check_settings(report["settings"], settings, report_file, output)
        return report
    output.parent.mkdir(parents=True, exist_ok=True)
    _check_parts(output, state.num_processes, rollout_folder)
    state.wait_for_everyone()

    needed = () if labeller else ("question", "answer")
    rows = read_rows(source, needed, output.parent / "images", image_root)
    if config.max_rows is not None:
        rows = itertools.takewhile(lambda row: row.index < config.max_rows, rows)
    maker = PairMaker(policies, config, labeller, reasoner)
    part = _Part(output, state.process_index, state.num_processes, settings)
    total = min((n for n in (rows_in_all, config.max_rows) if n is not None), default=None)
    name = "pairs" if config.max_refinements else "rollouts"
    bar = tqdm(desc=name, unit="row", total=total, disable=not state.is_main_process)
    with part.open():
        for batch, group in _batches(rows, config.batch_size):
            if batch % state.num_processes != state.process_index or batch < part.next_batch:
                bar.update(len(group))
                continue
            roll_out = reasoner is not None and batch * config.batch_size < rollout_rows
            pairs, counts, skipped, rollouts = maker(group, batch, roll_out)
            if rollouts is not None:
                Path(rollout_folder).mkdir(parents=True, exist_ok=True)
                rollouts.save(Path(rollout_folder) / f"{batch:08d}.safetensors")
            part.finish(batch, pairs, counts, skipped)
            if config.max_refinements:
                bar.set_postfix(pairs=part.counts["pairs"], refresh=False)
            bar.update(len(group))
    bar.close()
    state.wait_for_everyone()
    if state.is_main_process:
        _merge(output, report_file, state.num_processes, settings)
    state.wait_for_everyone()
    return json.loads(report_file.read_text())


def absolute(path: str | Path) -> str:
    """One spelling for each place. A link to a file is another place: the file's images start from where the link is."""
    path = Path(path)
    return str(path.resolve() if path.is_dir() else path.parent.resolve() / path.name)


def rows_and_digest(source: "str | Path | Dataset | IterableDataset") -> tuple[int | None, str | None]:
    """How many rows a source has, and what tells whether it is still the same; `None` for a stream."""
    if isinstance(source, Dataset):
        return len(source), source._fingerprint
    if isinstance(source, IterableDataset) or not Path(source).exists():
        return None, None
    digest = hashlib.blake2b(digest_size=16)
    if Path(source).is_dir():
        names = load_images(source, streaming=False)["image_id"]
        for name in names:
            file = Path(source) / name
            size = file.stat().st_size if file.exists() else None  # a link to nowhere
            digest.update(f"{name}\0{size}\0".encode())
        return len(names), digest.hexdigest()
    lines = 0
    with open(source, "rb") as file:
        for line in file:
            lines += bool(line.strip())
            digest.update(line)
    return lines, digest.hexdigest()


def _weights_digest(model) -> str:
    """Tells whether a model is still the same, by its parameters' names and some of the values of each."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        some = values[:: max(1, len(values) // 64)].contiguous().cpu()
        digest.update(name.encode() + some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _batches(rows: Iterator[Row | BadRow], size: int) -> Iterator[tuple[int, list[Row | BadRow]]]:
    """Rows by the number of their batch, which depends on their place in the source alone."""
    number, group = 0, []
    for row in rows:
        if row.index // size != number:
            if group:
                yield number, group
            number, group = row.index // size, []
        group.append(row)
    if group:
        yield number, group


class OtherSettings(ValueError):
    """Pairs were begun with other settings: those named in `changed`."""

    def __init__(self, file: Path, output: Path, changed: list[str]):
        super().__init__(
            f"{file} was made with other settings ({', '.join(changed)}). Use the same ones to go on, or choose another "
            f"output, or remove {output}*, {output.with_name(output.stem)}.part-* and the folder of rollouts, if there is one."
        )
        self.changed = changed


class _Part:
    """One process's pairs so far. The state names how much of the file is valid, and is replaced as a whole."""

    def __init__(self, output: Path, rank: int, processes: int, settings: dict):
        self.file = _part_file(output, rank, processes)
        self.state_file = self.file.with_suffix(".state.json")
        self.settings = settings
        self.next_batch, self.bytes, self.counts, self.skipped = 0, 0, Counter(), []
        if self.state_file.is_file():
            state = json.loads(self.state_file.read_text())
            _check_settings(state["settings"], settings, self.state_file, output)
            self.next_batch, self.bytes = state["next_batch"], state["bytes"]
            self.counts, self.skipped = Counter(state["counts"]), state["skipped"]

    @contextmanager
    def open(self):
        with open(self.file, "ab") as self.handle:
            self.handle.truncate(self.bytes)
            self.save()
            yield

    def finish(self, batch: int, pairs: list[dict], counts: Counter, skipped: list[BadRow]) -> None:
        for bad in skipped:
            warn_of(bad, len(self.skipped))
            self.skipped.append([bad.index, bad.where, bad.reason])
        self.counts.update(counts)
        for pair in pairs:
            self.handle.write(json.dumps(pair, ensure_ascii=False).encode() + b"\n")
        self.handle.flush()
        os.fsync(self.handle.fileno())
        self.next_batch, self.bytes = batch + 1, self.handle.tell()
        self.save()

    def save(self) -> None:
        names = ("settings", "next_batch", "bytes", "counts", "skipped")
        write_json(self.state_file, {name: getattr(self, name) for name in names})


def _part_file(output: Path, rank: int, processes: int) -> Path:
    return output.with_name(f"{output.stem}.part-{rank}-of-{processes}.jsonl")


def _check_parts(output: Path, processes: int, rollout_folder: str | Path | None) -> None:
    begun = list(output.parent.glob(f"{glob.escape(output.stem)}.part-*-of-*.jsonl"))
    for file in begun:
        if not file.stem.endswith(f"-of-{processes}"):
            raise ValueError(
                f"{file} was begun by another number of processes than the {processes} of this run. Go on with as many, "
                f"or remove {output.stem}.part-* to begin anew."
            )
    if not begun and rollout_folder is not None and any(Path(rollout_folder).glob("*.safetensors")):
        raise ValueError(
            f"{rollout_folder} holds the rollouts of another run, which a gate would be trained on with those of this one. "
            "Remove it, or choose another folder."
        )


def _check_settings(before: dict, now: dict, file: Path, output: Path) -> None:
    changed = [name for name in now if before.get(name) != json.loads(json.dumps(now[name]))]
    if changed:
        raise OtherSettings(file, output, changed)


def _merge(output: Path, report_file: Path, processes: int, settings: dict) -> None:
    """One file in the order of the source, and the report."""
    parts = [_Part(output, rank, processes, settings) for rank in range(processes)]
    pairs = [json.loads(line) for part in parts for line in part.file.read_bytes()[: part.bytes].splitlines()]
    temporary = output.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for pair in sorted(pairs, key=lambda pair: pair.pop("index")):
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
    os.replace(temporary, output)
    counts = sum((part.counts for part in parts), Counter())
    skipped = sorted(bad for part in parts for bad in part.skipped)
    if counts["cut_off"]:
        logger.warning(
            "%d pairs were left out, since a description was cut off at max_perception_tokens=%d. Raise it to have them.",
            counts["cut_off"],
            settings["policies"]["max_perception_tokens"],
        )
    write_json(report_file, _report(counts, skipped, settings))
    for part in parts:
        part.file.unlink()
        part.state_file.unlink()


def _report(counts: Counter, skipped: list, settings: dict) -> dict:
    def share(part: str, whole: float) -> float | None:
        return counts[part] / whole if whole else None

    usable = counts["rows"] - len(skipped)
    names = ("rows", "considered", "initially_right", "discarded", "states_answer", "cut_off", "pairs")
    report = {name: counts[name] for name in names}
    report |= {
        "skipped": dict(Counter(reason for _, _, reason in skipped)),
        "skipped_rows": [f"{where}: {reason}" for _, where, reason in skipped[:100]],
        "refined_by_iteration": {
            str(i): counts[f"refined_at_{i}"] for i in range(1, settings["config"]["max_refinements"] + 1)
        },
        "pair_yield": share("pairs", usable),
        "recovered": share("pairs", counts["considered"] - counts["initially_right"]),
        "mean_chosen_tokens": share("chosen_tokens", counts["pairs"]),
        "mean_rejected_tokens": share("rejected_tokens", counts["pairs"]),
        "chosen_longer": share("chosen_longer", counts["pairs"]),
        "rejected_longer": share("rejected_longer", counts["pairs"]),
    }
    if settings["labeller"] is not None:
        names = ("asked", "no_question", "below_agreement", "stand_ins_checked", "stand_ins_right")
        report |= {name: counts[name] for name in names}
        report["stand_in_accuracy"] = share("stand_ins_right", counts["stand_ins_checked"])
    return {**report, "settings": settings}


def write_json(file: Path, content: dict) -> None:
    """Writes a file whole or not at all, however the process ends."""
    temporary = file.with_suffix(file.suffix + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)
