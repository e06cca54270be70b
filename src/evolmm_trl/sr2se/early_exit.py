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

"""Hierarchical self-rewarding with early exit (HSR-EE): a gate that knows when the steps so far suffice.

rollouts (all K steps, an answer after each) ──► train_gate: BCE on the gate, REINFORCE on tau ──► EarlyExitReasoner
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from ..answers import canonical_answer
from ..thumbnails import image_digest
from .stopping import expected_calibration_error, hsr_rewards, stop_labels
from .sub_policies import SubPolicies, SubPolicyPrompts, answer_of


logger = logging.getLogger(__name__)

_WEIGHTS, _CONFIG = "gate.safetensors", "gate_config.json"
_COLUMNS = ("hidden", "correct", "visual", "image")  # of GateRollouts


class ConfidenceGate(nn.Module):
    """
    The probability that the steps so far lead to the right answer (Eq. 10), `sigmoid(g_phi(h_k))`, and the threshold tau
    above which reasoning stops. Both are trained, saved and loaded together.

    Args:
        hidden_size (`int`):
            Size of the model's hidden states.
        gate_size (`int`, *optional*, defaults to `256`):
            Hidden units of g_phi, an MLP with one hidden layer and ReLU (authors' code).
        dropout (`float`, *optional*, defaults to `0.1`):
            Dropout behind the ReLU (authors' code).
        threshold (`float`, *optional*, defaults to `0.7`):
            Initial tau (paper).
    """

    def __init__(self, hidden_size: int, gate_size: int = 256, dropout: float = 0.1, threshold: float = 0.7):
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"`threshold` is {threshold}; expected a probability strictly between 0 and 1.")
        self.sizes = {"hidden_size": hidden_size, "gate_size": gate_size, "dropout": dropout}
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, gate_size), nn.ReLU(), nn.Dropout(dropout), nn.Linear(gate_size, 1)
        )
        self.threshold_logit = nn.Parameter(torch.tensor(threshold).logit())

    @property
    def threshold(self) -> torch.Tensor:
        """tau, a scalar in (0, 1)."""
        return self.threshold_logit.sigmoid()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        g_phi, the scores before the sigmoid.

        Args:
            hidden (`torch.Tensor`):
                Shape `(..., hidden_size)`, float32: hidden states.

        Returns:
            `torch.Tensor`: shape `(...)`, log-odds.
        """
        return self.mlp(hidden).squeeze(-1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        Scores hidden states (Eq. 10).

        Args:
            hidden (`torch.Tensor`):
                Shape `(..., hidden_size)`, float32: hidden states.

        Returns:
            `torch.Tensor`: shape `(...)`, probabilities in (0, 1).
        """
        return self.logits(hidden).sigmoid()

    def save_pretrained(self, folder: str | Path, **settings) -> None:
        """
        Writes the gate and its threshold as safetensors, and its sizes as JSON.

        Args:
            folder (`str` or `Path`):
                Where to; made if it is not there.
            **settings:
                Further values for the JSON file, such as `max_steps`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), str(folder / _WEIGHTS))
        (folder / _CONFIG).write_text(json.dumps({**self.sizes, **settings}, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ConfidenceGate":
        """
        Reads what [`ConfidenceGate.save_pretrained`] wrote.

        Args:
            folder (`str` or `Path`):
                Where the gate is.

        Returns:
            [`ConfidenceGate`], in eval mode.

        Raises:
            `FileNotFoundError`: if there is no gate in `folder`.
        """
        config = _read_config(folder)
        gate = cls(config["hidden_size"], config["gate_size"], config["dropout"])
        gate.load_state_dict(load_file(str(Path(folder) / _WEIGHTS)))
        return gate.eval()

    def check_fits(self, model) -> None:
        """
        Checks that the gate can read a model's hidden states.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                The model.

        Raises:
            `ValueError`: if its hidden states have another size than those the gate was made for.
        """
        hidden_size = model.config.get_text_config().hidden_size
        if hidden_size != self.sizes["hidden_size"]:
            raise ValueError(
                f"The gate was made for hidden states of size {self.sizes['hidden_size']}, but the model's have size "
                f"{hidden_size}. Train a gate for this model."
            )


def _read_config(folder: str | Path) -> dict:
    file = Path(folder) / _CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"There is no gate in {str(folder)!r}: it has no {_CONFIG}.")
    return json.loads(file.read_text())


@dataclass(frozen=True)
class GateRollouts:
    """
    What a gate learns from: n questions reasoned on for all K steps, with an answer after each.

    Args:
        hidden (`torch.Tensor`):
            Shape `(n, K, hidden_size)`, float32: the hidden state at the end of each step.
        correct (`torch.Tensor`):
            Shape `(n, K)`, bool: whether the answer from the description and steps 1..k is right.
        visual (`torch.Tensor`):
            Shape `(n,)`, bool: whether the answer from the description alone is right.
        image (`torch.Tensor`):
            Shape `(n,)`, int64: a number that the questions about one image share, see `image_numbers`. They are held
            out together.
    """

    hidden: torch.Tensor
    correct: torch.Tensor
    visual: torch.Tensor
    image: torch.Tensor

    def __len__(self) -> int:
        return len(self.visual)

    def __getitem__(self, rows) -> "GateRollouts":
        return GateRollouts(*(getattr(self, name)[rows] for name in _COLUMNS))

    @classmethod
    def cat(cls, parts: Sequence["GateRollouts"]) -> "GateRollouts":
        """All of `parts`, one after the other."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in _COLUMNS))

    def save(self, file: str | Path) -> None:
        """Writes a safetensors file."""
        save_file({name: getattr(self, name) for name in _COLUMNS}, str(file))

    @classmethod
    def load(cls, file: str | Path) -> "GateRollouts":
        """Reads what [`GateRollouts.save`] wrote. Raises a `ValueError` if the file holds something else."""
        tensors = load_file(str(file))
        if set(tensors) != set(_COLUMNS):
            raise ValueError(
                f"{file} holds {sorted(tensors)}; expected the rollouts of a gate, {sorted(_COLUMNS)}. Make them again."
            )
        return cls(**tensors)


def image_numbers(images: Sequence[Image.Image]) -> torch.Tensor:
    """
    Numbers by which to tell images apart: equal for the same pixels, wherever the image came from.

    Args:
        images (`Sequence[PIL.Image.Image]`):
            n images.

    Returns:
        `torch.Tensor`: shape `(n,)`, int64.
    """
    digests = [bytes.fromhex(image_digest(image))[:8] for image in images]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.int64)


@dataclass
class GateTrainingConfig:
    """
    How a gate and its threshold are trained.

    Args:
        gate_size (`int`, *optional*, defaults to `256`), dropout (`float`, *optional*, defaults to `0.1`):
            See [`ConfidenceGate`].
        target (`str`, *optional*, defaults to `"right"`):
            What the gate's score is the probability of. `"right"`: that steps 1..k lead to the right answer (Eq. 11).
            `"stop"`: that no later step earns more (Eq. 18), so that a question without hope is left at once, where
            `"right"` never opens for it.
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Of Adam, for the gate (authors' code).
        epochs (`int`, *optional*, defaults to `5`):
            Passes over the rollouts, for the gate and then for tau (authors' code).
        batch_size (`int`, *optional*, defaults to `64`):
            Questions per step.
        threshold (`float`, *optional*, defaults to `0.7`):
            Initial tau (paper).
        threshold_learning_rate (`float`, *optional*, defaults to `0.02`):
            Of Adam, for the logit of tau. A step moves it by about as much, and there are few steps: at the 1e-3 of the
            authors' code tau stays where it starts.
        learn_threshold (`bool`, *optional*, defaults to `True`):
            Whether tau is learned at all.
        exit_temperature (`float`, *optional*, defaults to `0.1`):
            T of the exit probability `sigmoid((score - tau) / T)` that tau is learned with.
        draws (`int`, *optional*, defaults to `8`):
            Stopping depths sampled per question and step of tau.
        length_penalty (`float`, *optional*, defaults to `0.1`):
            lambda, the price of a reasoning step in the reward (authors' code).
        held_out (`float`, *optional*, defaults to `0.2`):
            Share of the images on whose questions the gate is not trained; tau is learned on them, and calibration
            measured.
        seed (`int`, *optional*, defaults to `42`):
            Of initialisation, order, dropout and draws.
    """

    gate_size: int = 256
    dropout: float = 0.1
    target: str = "right"
    learning_rate: float = 1e-3
    epochs: int = 5
    batch_size: int = 64
    threshold: float = 0.7
    threshold_learning_rate: float = 0.02
    learn_threshold: bool = True
    exit_temperature: float = 0.1
    draws: int = 8
    length_penalty: float = 0.1
    held_out: float = 0.2
    seed: int = 42

    def __post_init__(self):
        if self.draws < 2:
            raise ValueError(f"`draws` is {self.draws}; expected at least 2: a depth is judged against the others.")
        if self.target not in ("right", "stop"):
            raise ValueError(f"`target` is {self.target!r}; expected 'right' or 'stop'.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"`held_out` is {self.held_out}; expected a share strictly between 0 and 1.")


def gate_labels(rollouts: GateRollouts, config: GateTrainingConfig) -> torch.Tensor:
    """What the score of every step should be, of shape `(n, K)`, bool; see `target`."""
    if config.target == "right":
        return rollouts.correct
    return stop_labels(hsr_rewards(rollouts.visual, rollouts.correct, config.length_penalty))


def gate_loss(gate: ConfidenceGate, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of every step's score with its label (Eq. 11); `hidden` `(n, K, size)`, `labels` `(n, K)`."""
    return F.binary_cross_entropy_with_logits(gate.logits(hidden), labels.float())


def exit_log_probs(scores: torch.Tensor, threshold: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    Log-probabilities of stopping after each step when the hard test `score > tau` is softened to an exit probability
    `e_k = sigmoid((score_k - tau) / temperature)`: `log pi(k) = sum_(j<k) log(1 - e_j) + log e_k`. After the last step
    reasoning stops anyway, so that `log e_K` is left out and the probabilities sum to 1.

    Args:
        scores (`torch.Tensor`):
            Shape `(n, K)`.
        threshold (`torch.Tensor`):
            tau, a scalar.
        temperature (`float`):
            T.

    Returns:
        `torch.Tensor`: shape `(n, K)`.
    """
    z = (scores - threshold) / temperature
    stay = F.logsigmoid(-z[:, :-1]).cumsum(1)
    before = torch.cat([torch.zeros_like(z[:, :1]), stay], dim=1)
    leave = torch.cat([F.logsigmoid(z[:, :-1]), torch.zeros_like(z[:, :1])], dim=1)
    return before + leave


def threshold_loss(
    scores: torch.Tensor,
    rewards: torch.Tensor,
    threshold: torch.Tensor,
    temperature: float,
    draws: int,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    REINFORCE for tau: `-(R_HSR - b) * log pi(k)`, over several stopping depths k drawn for the same question. The
    baseline b of a draw is the mean reward of the question's other draws, so that the gradient is unbiased.

    Args:
        scores (`torch.Tensor`), rewards (`torch.Tensor`):
            Shape `(n, K)`: the gate's scores, through which no gradient flows, and R_HSR of stopping after each step.
        threshold (`torch.Tensor`):
            tau, a scalar.
        temperature (`float`):
            See [`exit_log_probs`].
        draws (`int`):
            Depths drawn per question, at least 2.
        generator (`torch.Generator`, *optional*):
            Draws them.

    Returns:
        `torch.Tensor`: a scalar.
    """
    log_probs = exit_log_probs(scores.detach(), threshold, temperature)
    depths = torch.multinomial(log_probs.detach().exp(), draws, replacement=True, generator=generator)
    drawn = rewards.gather(1, depths)
    baseline = (drawn.sum(1, keepdim=True) - drawn) / (draws - 1)
    return -((drawn - baseline) * log_probs.gather(1, depths)).mean()


def train_gate(rollouts: GateRollouts, config: GateTrainingConfig | None = None) -> tuple[ConfidenceGate, dict]:
    """
    Trains a gate by Eq. 11 and then its threshold by REINFORCE on Eq. 12, on questions about images that the gate was not
    trained on.

    Args:
        rollouts ([`GateRollouts`]):
            As [`EarlyExitReasoner.roll_out`] makes them.
        config ([`GateTrainingConfig`], *optional*):
            The settings.

    Returns:
        `tuple[ConfidenceGate, dict]`: the gate in eval mode, and a report: the loss of each epoch, tau after each epoch,
        the gate's accuracy and expected calibration error on the held-out questions, and their mean reward at the hard
        threshold before and after tau was learned.

    Raises:
        `ValueError`: if there are too few images to hold some out, or all answers are right, or all are wrong.
    """
    config = config or GateTrainingConfig()
    places: dict[int, int] = {}  # of images, in the order in which they come first
    image = torch.tensor([places.setdefault(number, len(places)) for number in rollouts.image.tolist()])
    held_out = round(config.held_out * len(places))
    if held_out < 1 or held_out == len(places):
        raise ValueError(
            f"There are rollouts of {len(rollouts)} questions about {len(places)} images, too few to hold out a share of "
            f"{config.held_out}. Roll out questions about more images."
        )
    if rollouts.correct.all() or not rollouts.correct.any():
        kind = "right" if rollouts.correct.all() else "wrong"
        raise ValueError(
            f"All {rollouts.correct.numel()} answers of the gate's rollouts are {kind}: there is nothing to tell apart. "
            "Use questions of which some are answered rightly and some wrongly, or check how answers are read."
        )
    generator = torch.Generator().manual_seed(config.seed)
    rank = torch.randperm(len(places), generator=generator).argsort()[image]
    order = rank.argsort(stable=True)
    is_held = (rank < held_out)[order]
    held, train = rollouts[order[is_held]], rollouts[order[~is_held]]
    labels = gate_labels(train, config)
    report = {"questions": len(rollouts), "held_out": len(held), "loss": [], "threshold": []}

    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        gate = ConfidenceGate(rollouts.hidden.shape[-1], config.gate_size, config.dropout, config.threshold)
        optimizer = torch.optim.Adam(gate.mlp.parameters(), lr=config.learning_rate)
        gate.train()
        for _ in range(config.epochs):
            losses = []
            for rows in torch.randperm(len(train), generator=generator).split(config.batch_size):
                loss = gate_loss(gate, train.hidden[rows], labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item() * len(rows))
            report["loss"].append(sum(losses) / len(train))
    gate.eval()

    with torch.no_grad():
        scores = gate(held.hidden)
    rewards = hsr_rewards(held.visual, held.correct, config.length_penalty)
    held_labels = gate_labels(held, config)
    report["held_out_accuracy"] = ((scores > 0.5) == held_labels).float().mean().item()
    report["held_out_ece"] = expected_calibration_error(scores, held_labels)
    report["reward_before"] = _hard_reward(scores, rewards, gate.threshold.item())
    if config.learn_threshold:
        optimizer = torch.optim.Adam([gate.threshold_logit], lr=config.threshold_learning_rate)
        for _ in range(config.epochs):
            for rows in torch.randperm(len(held), generator=generator).split(config.batch_size):
                loss = threshold_loss(
                    scores[rows], rewards[rows], gate.threshold, config.exit_temperature, config.draws, generator
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            report["threshold"].append(gate.threshold.item())
    report["reward_after"] = _hard_reward(scores, rewards, gate.threshold.item())
    return gate, report


def _hard_reward(scores: torch.Tensor, rewards: torch.Tensor, threshold: float) -> float:
    """Mean reward when reasoning stops at the first score above the threshold, or after the last step."""
    opens = scores > threshold
    opens[:, -1] = True
    return rewards.gather(1, opens.int().argmax(1, keepdim=True)).mean().item()


@dataclass(frozen=True)
class Reasoning:
    """
    How one question was answered.

    Args:
        question (`str`), description (`str`), steps (`tuple[str, ...]`):
            What was asked, seen and thought.
        scores (`tuple[float, ...]`):
            The gate's score of each step; empty without a gate.
        exited_early (`bool`):
            Whether the gate stopped the reasoning.
        answer (`str` or `None`):
            The final answer; `None` if it could not be read.
        tokens (`int`):
            Tokens generated for all of this, end tokens included.
    """

    question: str
    description: str
    steps: tuple[str, ...]
    scores: tuple[float, ...]
    exited_early: bool
    answer: str | None
    tokens: int


class EarlyExitReasoner:
    """
    Algorithm 1 of SR2SE: describes the image, reasons step by step on text, and stops when the gate is sure.

    Args:
        policies ([`SubPolicies`]):
            The model's sub-policies.
        gate ([`ConfidenceGate`], *optional*):
            Without a gate all steps are taken.
        max_steps (`int`, *optional*, defaults to `5`):
            K, the most steps (authors' code; the paper has no limit).

    Example:

    ```python
    >>> reasoner = EarlyExitReasoner.from_pretrained("charts-sr2se/gate", model, processor)
    >>> reasoner.generate("chart.png", "Which bar is the tallest?").answer
    'red'
    ```
    """

    def __init__(self, policies: SubPolicies, gate: ConfidenceGate | None = None, max_steps: int = 5):
        if max_steps < 1:
            raise ValueError(f"`max_steps` is {max_steps}; expected at least 1.")
        self.policies = policies
        self.gate = gate.eval() if gate is not None else None
        self.max_steps = max_steps
        if gate is not None:
            gate.check_fits(policies.model)

    @torch.no_grad()
    def generate(self, images, questions: str | Sequence[str]) -> "Reasoning | list[Reasoning]":
        """
        Answers one question about one image, or many questions, one per image. A question at which the gate has opened
        takes no part in further steps.

        Args:
            images:
                A PIL image, the content or path of an image file; or a sequence of them.
            questions (`str` or `Sequence[str]`):
                The question, or one per image.

        Returns:
            [`Reasoning`], or a list of them in the order of the questions.
        """
        if isinstance(questions, str):
            return self.generate([images], [questions])[0]
        seen = self.policies.perceive(images, questions)
        descriptions = [completion.text for completion in seen]
        tokens = [completion.tokens for completion in seen]
        steps: list[list[str]] = [[] for _ in questions]
        scores: list[list[float]] = [[] for _ in questions]
        exited = [False] * len(questions)
        active = list(range(len(questions)))
        for k in range(1, self.max_steps + 1):
            taken = self.policies.reason(*_of(active, questions, descriptions, steps))
            for i, completion in zip(active, taken, strict=True):
                steps[i].append(completion.text)
                tokens[i] += completion.tokens
                if self.gate is not None:
                    score = self.gate(completion.hidden)
                    scores[i].append(score.item())
                    exited[i] = k < self.max_steps and bool(score > self.gate.threshold)
            active = [i for i in active if not exited[i]]
            if not active:
                break
        answers = self.policies.answer(questions, descriptions, steps)
        return [
            Reasoning(
                question=questions[i],
                description=descriptions[i],
                steps=tuple(steps[i]),
                scores=tuple(scores[i]),
                exited_early=exited[i],
                answer=answer_of(answers[i]),
                tokens=tokens[i] + answers[i].tokens,
            )
            for i in range(len(questions))
        ]

    def roll_out(
        self,
        images: Sequence,
        questions: Sequence[str],
        truths: Sequence[str],
        descriptions: Sequence[str],
        visual: Sequence[bool],
    ) -> GateRollouts:
        """
        Takes all K steps from given descriptions and answers after each, to train a gate on.

        Args:
            images (`Sequence`):
                One per question; see [`EarlyExitReasoner.generate`]. Only which questions share one matters.
            questions (`Sequence[str]`), truths (`Sequence[str]`):
                The questions and their answers, compared by [`canonical_answer`].
            descriptions (`Sequence[str]`):
                What perception saw.
            visual (`Sequence[bool]`):
                Whether the answer from the description alone is right.

        Returns:
            [`GateRollouts`]
        """
        steps: list[list[str]] = [[] for _ in questions]
        hidden, correct = [], []
        for _ in range(self.max_steps):
            taken = self.policies.reason(questions, descriptions, steps)
            for so_far, completion in zip(steps, taken, strict=True):
                so_far.append(completion.text)
            answers = self.policies.answer(questions, descriptions, steps)
            hidden.append(torch.stack([completion.hidden for completion in taken]))
            correct.append([is_right(answer_of(a), truth) for a, truth in zip(answers, truths, strict=True)])
        return GateRollouts(
            torch.stack(hidden, 1),
            torch.tensor(correct).T.contiguous(),
            torch.tensor(visual),
            image_numbers([self.policies.image(image) for image in images]),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """
        Writes the gate with its threshold, the number of steps and the prompts, as safetensors and JSON.

        Args:
            folder (`str` or `Path`):
                Where to; made if it is not there.
        """
        self.gate.save_pretrained(folder, max_steps=self.max_steps, prompts=self.policies.prompts.to_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path, model, processor, **kwargs) -> "EarlyExitReasoner":
        """
        Reads what [`EarlyExitReasoner.save_pretrained`] wrote. The prompts are those the gate was trained with.

        Args:
            folder (`str` or `Path`):
                Where the gate is.
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                The model that the gate was trained on.
            processor ([`~transformers.ProcessorMixin`]):
                Its processor.
            **kwargs:
                For [`SubPolicies`], such as `batch_size`.

        Returns:
            [`EarlyExitReasoner`]

        Raises:
            `FileNotFoundError`: if there is no gate in `folder`.
            `ValueError`: if the gate was made for hidden states of another size than the model's.
        """
        config = _read_config(folder)
        policies = SubPolicies(model, processor, SubPolicyPrompts.from_dict(config["prompts"]), **kwargs)
        return cls(policies, ConfidenceGate.from_pretrained(folder), config["max_steps"])


def is_right(answer: str | None, truth: str) -> bool:
    """Whether an answer is the truth, both in canonical form; an unreadable answer is wrong."""
    canonical = canonical_answer(answer)
    return canonical is not None and canonical == canonical_answer(truth)


def _of(rows: Sequence[int], *columns: Sequence) -> list[list]:
    return [[column[row] for row in rows] for column in columns]
