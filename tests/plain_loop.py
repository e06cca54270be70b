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

"""EvoLMM in plain PyTorch: the paper's equations and the design's conventions, without TRL or this package."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field

import torch


@dataclass
class Sample:
    prompt_ids: list[int]
    token_types: list[int]
    images: dict[str, torch.Tensor]
    completion_ids: list[int]
    text: str
    extra_reward: float = 0.0


@dataclass
class Settings:
    steps: int = 12
    trained: int = 3  # answers per question that are trained on; the others only vote
    proposer_every: int = 5
    lr: float = 1e-2
    eps: float = 1e-4
    linear_lr: bool = True
    temperature: float = 1.0
    reward: str = "continuous"
    baseline: str = "ema"
    token_mean: bool = False  # over all tokens of the step; else over each sample's tokens, then over samples
    beta: dict[str, float] = field(default_factory=lambda: {"solver": 1e-3, "proposer": 1e-3})
    beta_min: dict[str, float] = field(default_factory=lambda: {"solver": 1e-3, "proposer": 1e-3})
    kl_target: float = 0.02
    adapters: dict[str, str | None] = field(default_factory=lambda: {"solver": "default", "proposer": "proposer"})


def rewards(question: Sample, answers: list[Sample], s: Settings) -> tuple[list[float], float]:
    """Of the trained answers, and of the question."""
    found = [re.findall("<answer>([^<]*)</answer>", a.text) for a in answers]
    said = [f[-1] if f else None for f in found]
    words = [len(a.text.rpartition("<answer>")[0].split()) for a in answers]
    n = len(said)
    counts = Counter(a for a in said if a is not None)
    p = [counts[a] / n if a is not None else 0.0 for a in said]
    most = max(counts.values(), default=0)
    if s.reward == "discrete":
        majority = counts.most_common(1)[0][0] if counts else None
        solver = [float(a is not None and a == majority) for a in said]
        proposer = float(1 < most < n)
    else:
        solver = [p_i**0.7 * (1 - 0.1 * min(1.0, max(0.0, (w - 6) / 6))) for p_i, w in zip(p, words, strict=True)]
        unreadable = n - sum(counts.values())
        entropy = -sum(c / n * math.log(c / n) for c in list(counts.values()) + [1] * unreadable)
        scale = math.log(n) / math.log(5)
        proposer = math.exp(-((entropy - 0.90 * scale) ** 2) / (2 * (0.35 * scale) ** 2))
    asked = re.findall("<question>(.*?)</question>", question.text)
    solver = [r + a.extra_reward for r, a in zip(solver[: s.trained], answers, strict=False)]
    return solver, proposer if len(asked) == 1 and asked[0] else 0.0


def log_probs(model, sample: Sample, temperature: float) -> torch.Tensor:
    """Of the completion's tokens, one row without padding, with the image."""
    ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
    types = torch.tensor([sample.token_types + [0] * len(sample.completion_ids)])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **sample.images).logits
    logits = logits[0, len(sample.prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.completion_ids)[:, None])[:, 0]


def train(model, reference, rollouts: list[list[tuple[Sample, list[Sample]]]], s: Settings) -> list[dict]:
    """
    Trains `model` in place on one rollout (of a question and its answers per image) per solver step. `reference` is a
    frozen model, or `None` for `model` without its adapters.
    """
    optimizers, parameters = {}, {}
    for adapter in set(s.adapters.values()):
        if adapter is not None:
            model.set_adapter(adapter)
        parameters[adapter] = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters[adapter] if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in parameters[adapter] if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizers[adapter] = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.999), eps=s.eps)

    beta, baseline, waiting, history = dict(s.beta), {}, [], []
    rollouts = iter(rollouts)
    for step in range(s.steps):
        role = "proposer" if step % (s.proposer_every + 1) == s.proposer_every else "solver"
        if role == "solver":
            rollout = next(rollouts)
            pairs = [rewards(question, answers, s) for question, answers in rollout]
            everything = {"solver": [r for solver, _ in pairs for r in solver], "proposer": [r for _, r in pairs]}
            mean = {r: sum(values) / len(values) for r, values in everything.items()}
            baseline = baseline or dict(mean)
            batch = []
            for (question, answers), (solver, proposer) in zip(rollout, pairs, strict=True):
                group = {"solver": sum(solver) / len(solver), "proposer": mean["proposer"]}
                b = baseline if s.baseline == "ema" else group
                batch += [(a, r - b["solver"]) for a, r in zip(answers, solver, strict=False)]
                waiting.append((question, proposer - b["proposer"]))
            used, baseline = baseline, {r: 0.9 * baseline[r] + 0.1 * mean[r] for r in mean}
        else:
            batch, waiting = waiting, []

        adapter = s.adapters[role]
        if adapter is not None:
            model.set_adapter(adapter)
        tokens = sum(len(sample.completion_ids) for sample, _ in batch)
        kl_sum = 0.0
        for sample, advantage in batch:
            with torch.no_grad():
                if reference is None:
                    with model.disable_adapter():
                        base = log_probs(model, sample, s.temperature)
                    model.set_adapter(adapter)
                else:
                    base = log_probs(reference, sample, s.temperature)
            policy = log_probs(model, sample, s.temperature)
            # The ratio is 1; its gradient makes that of the estimate the gradient of the KL, in expectation over tokens
            kl = ((base - policy).exp() - (base - policy) - 1) * (policy - policy.detach()).exp()
            kl_sum += kl.sum().item()
            loss = -advantage * policy + beta[role] * kl
            (loss.sum() / tokens if s.token_mean else loss.mean() / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(parameters[adapter], 1.0)
        for group in optimizers[adapter].param_groups:
            group["lr"] = s.lr * (s.steps - step) / s.steps if s.linear_lr else s.lr
        optimizers[adapter].step()
        model.zero_grad()
        history.append({"role": role, "kl": kl_sum / tokens, "beta": beta[role], "baseline": used[role]})
        moved = beta[role] * math.exp(0.10 * (kl_sum / tokens - s.kl_target) / s.kl_target)
        beta[role] = min(max(moved, s.beta_min[role]), 100.0)
    return history
