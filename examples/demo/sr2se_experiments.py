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

"""
Does SR2SE work on the demo model, and what of it?

    python examples/demo/sr2se_experiments.py run       # what is not done yet
    python examples/demo/sr2se_experiments.py report    # writes docs/experiments/sr2se.md's tables and the figure

Results go to `docs/experiments/sr2se_results.jsonl`, one line per job. Each seed has charts of its own to learn from: the
same ones for pairs and gates. All are measured on the same questions, about other charts.
"""

import argparse
import itertools
import json
import random
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from charts import (
    EVOLVE_SEEDS,
    FRESH_SEEDS,
    GATE_SEEDS,
    TEST_SEEDS,
    UNSEEN_SEEDS,
    VAL_SEEDS,
    chart,
    labelled_questions,
    make_images,
    parse_question,
)
from demo import PROMPTS, demo_config, demo_lora, load_model
from evaluate import evaluate_solver
from experiments import in_place, interval
from peft import PeftModel
from transformers import PrinterCallback

from evolmm_trl import EvoLMMTrainer, RolePrompts, load_images
from evolmm_trl.answers import canonical_answer
from evolmm_trl.rewards import (
    PROPOSER_ENTROPY_MEAN,
    PROPOSER_ENTROPY_STD,
    entropy_scale,
    proposer_reward,
    solver_rewards,
)
from evolmm_trl.sr2se import (
    AgreementLabeller,
    EarlyExitReasoner,
    GateRollouts,
    GateTrainingConfig,
    RefinementConfig,
    SRDPOConfig,
    SRDPOTrainer,
    SubPolicies,
    SubPolicyPrompts,
    build_pairs,
    load_preferences,
    train_gate,
)
from evolmm_trl.sr2se.early_exit import gate_labels, image_numbers, is_right
from evolmm_trl.sr2se.stopping import expected_calibration_error, reliability
from evolmm_trl.sr2se.sub_policies import answer_of
from evolmm_trl.voting import is_settled, vote


HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BASE = HERE / "models" / "sr2se"
DOCS = ROOT / "docs" / "experiments"
RESULTS = DOCS / "sr2se_results.jsonl"
PAGE = DOCS / "sr2se.md"
WORK = ROOT / "runs" / "sr2se"  # images, rollouts and pairs between the jobs
SUB_PROMPTS = SubPolicyPrompts(**json.loads((HERE / "sr2se_prompts.json").read_text()))
SEEDS = (0, 1, 2, 3, 4)
ROWS = 400  # charts per seed to learn from
TEST = TEST_SEEDS[:400]
DEPTH = 5
GATE = {"epochs": 60}


def policies_of(model, processor) -> SubPolicies:
    return SubPolicies(
        model,
        processor,
        SUB_PROMPTS,
        max_perception_tokens=24,
        max_step_tokens=20,
        max_answer_tokens=6,
        batch_size=200,
    )


def base_policies() -> SubPolicies:
    return policies_of(*load_model(BASE))


def labelled_file(seed: int) -> Path:
    """A seed's charts as JSONL with labels."""
    file = WORK / f"charts-{seed}" / "data.jsonl"
    if not file.is_file():
        seeds = EVOLVE_SEEDS[seed * ROWS : (seed + 1) * ROWS]
        make_images(file.parent / "images", seeds)
        rows = labelled_questions(seeds)
        lines = [
            json.dumps({"image": f"images/{i:05d}.png", "question": row["question"], "answer": row["answer"]})
            for i, row in enumerate(rows)
        ]
        file.write_text("\n".join(lines) + "\n")
    return file


def drawn_chart(image_path: str):
    """The chart of an image that `labelled_file` wrote."""
    folder, name = Path(image_path).parent.parent.name, Path(image_path).stem
    return chart(EVOLVE_SEEDS[int(folder.split("-")[1]) * ROWS + int(name)])


def says_the_truth(description: str, question: str, drawn) -> bool:
    """Whether every bar the question is about is in the description with its value, and nothing else."""
    said = dict(re.findall(r"([a-z]+) (\d+)", description))
    parsed = parse_question(question)
    about = (parsed.colours if parsed else ()) or tuple(drawn.values)
    return said == {colour: str(drawn.values[colour]) for colour in about if colour in drawn.values}


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------------------------------


def measure(policies: SubPolicies, depth: int, seeds=TEST) -> dict:
    """Greedy descriptions, steps and answers after every step, on the questions about the charts of these seeds."""
    rows = labelled_questions(seeds)
    images, questions = [row["image"] for row in rows], [row["question"] for row in rows]
    truths = [row["answer"] for row in rows]
    seen = policies.perceive(images, questions)
    descriptions = [completion.text for completion in seen]
    from_text = policies.answer_from_text(questions, descriptions)
    steps, tokens = [[] for _ in rows], [completion.tokens for completion in seen]
    hidden, correct, totals = [], [], []
    for _ in range(depth):
        taken = policies.reason(questions, descriptions, steps)
        for i, completion in enumerate(taken):
            steps[i].append(completion.text)
            tokens[i] += completion.tokens
        answers = policies.answer(questions, descriptions, steps)
        hidden.append(torch.stack([completion.hidden for completion in taken]))
        correct.append([is_right(answer_of(a), truth) for a, truth in zip(answers, truths, strict=True)])
        totals.append([total + a.tokens for total, a in zip(tokens, answers, strict=True)])
    visual = [is_right(answer_of(group[0]), truth) for group, truth in zip(from_text, truths, strict=True)]
    true = [says_the_truth(d, q, chart(s)) for d, q, s in zip(descriptions, questions, seeds, strict=True)]
    return {
        "hidden": torch.stack(hidden, 1),
        "correct": torch.tensor(correct).T.contiguous(),
        "visual": torch.tensor(visual),
        "true": torch.tensor(true),
        "tokens": torch.tensor(totals).T.contiguous(),
        "image": image_numbers(images),
    }


def bits(values) -> str:
    return "".join("1" if value else "0" for value in values)


def unbits(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8) - ord("0")


def base_measured(seeds=TEST) -> dict:
    """The untrained base on the questions about the charts of these seeds, measured once."""
    file = WORK / f"base-{seeds[0]}.pt"
    if not file.is_file():
        torch.save(measure(base_policies(), DEPTH, seeds), file)
    return torch.load(file, weights_only=True)


def _depths(measured: dict) -> dict:
    result = {f"depth_{k}": bits(measured["correct"][:, k - 1]) for k in range(1, DEPTH + 1)}
    result |= {f"tokens_{k}": measured["tokens"][:, k - 1].float().mean().item() for k in range(1, DEPTH + 1)}
    return result | {"from_text": bits(measured["visual"]), "true": bits(measured["true"])}


def job_base(seed: int) -> dict:
    return _depths(base_measured())


def job_pairs(seed: int) -> dict:
    """Pairs with labels, and the gate's rollouts from the same descriptions."""
    policies = base_policies()
    folder = WORK / f"labels-{seed}"
    report = build_pairs(
        policies,
        labelled_file(seed),
        folder / "pairs.jsonl",
        RefinementConfig(batch_size=200, seed=seed),
        reasoner=EarlyExitReasoner(policies, max_steps=DEPTH),
        rollout_folder=folder / "rollouts",
        rollout_rows=ROWS,
    )
    return _pair_result(report, folder / "pairs.jsonl")


def job_free(seed: int) -> dict:
    """Pairs from the images alone."""
    policies = base_policies()
    folder = WORK / f"free-{seed}"
    labeller = AgreementLabeller(policies, RolePrompts(**PROMPTS), max_question_tokens=16, max_answer_tokens=32)
    images = labelled_file(seed).parent / "images"
    config = RefinementConfig(batch_size=200, seed=seed, min_agreement=0.8)
    report = build_pairs(policies, images, folder / "pairs.jsonl", config, labeller=labeller)
    return _pair_result(report, folder / "pairs.jsonl")


def job_stand_in(seed: int) -> dict:
    """How often the majority is right on labelled questions, by agreement."""
    policies = base_policies()
    labeller = AgreementLabeller(policies, RolePrompts(**PROMPTS), max_answer_tokens=32)
    rows = labelled_questions(EVOLVE_SEEDS[seed * ROWS : (seed + 1) * ROWS])
    votes = labeller.vote([row["image"] for row in rows], [row["question"] for row in rows], seed)
    counted = {}
    for cast, row in zip(votes, rows, strict=True):
        kept, right = counted.setdefault(f"{cast.agreement:.1f}", [0, 0])
        counted[f"{cast.agreement:.1f}"] = [kept + 1, right + (cast.majority == canonical_answer(row["answer"]))]
    return {"by_agreement": counted}


def _pair_result(report: dict, file: Path) -> dict:
    pairs = [json.loads(line) for line in file.read_text().splitlines()]
    true = {
        side: [says_the_truth(p[side], p["question"], drawn_chart(p["image_path"])) for p in pairs]
        for side in ("chosen", "rejected")
    }
    grounded = [(parse_question(p["question"]), drawn_chart(p["image_path"]), p["ground_truth"]) for p in pairs]
    answers = [q is not None and canonical_answer(q.answer(c)) == canonical_answer(a) for q, c, a in grounded]
    report = {name: value for name, value in report.items() if name not in ("settings", "skipped_rows")}
    return {
        "report": report,
        "chosen_true": sum(true["chosen"]),
        "rejected_true": sum(true["rejected"]),
        "truth_right": sum(answers),
    }


# The gates that are compared: what differs from the defaults
GATES = {
    "right": ("gate on being right (Eq. 11), tau learned, a step priced at 0.1", {}),
    "fixed": ("gate on being right, tau = 0.7", {"learn_threshold": False}),
    "stop": ("gate on the worth of stopping (Eq. 18), tau learned, a step priced at 0.1", {"target": "stop"}),
    "cheap": (
        "gate on the worth of stopping, tau learned, a step priced at 0.03",
        {"target": "stop", "length_penalty": 0.03},
    ),
}
CHOSEN = "cheap"  # when the test questions were known; measured on fresh ones, too
# Those that are fitted on few and on many questions, to choose by validation charts
PRICED = {
    "cheap": GATES["cheap"],
    "cheaper": (
        "gate on the worth of stopping, tau learned, a step priced at 0.01",
        {"target": "stop", "length_penalty": 0.01},
    ),
    "brief": (
        "gate on the worth of stopping, tau learned, a step priced at 0.01, 5 epochs",
        {"target": "stop", "length_penalty": 0.01, "epochs": 5},
    ),
}
VALIDATED = "cheaper"  # most accurate on the validation charts from many questions; measured once on unseen ones


def job_gate(seed: int) -> dict:
    """Gates from the seed's rollouts, on the base's test questions, and the chosen one on fresh questions."""
    gates = _train_gates(WORK / f"labels-{seed}" / "rollouts", seed)
    fresh = base_measured(FRESH_SEEDS)
    result = _measure_gates(gates, base_measured()) | {
        "fresh": _depths(fresh) | _measure_gates(gates, fresh, [CHOSEN])
    }
    if seed == 0:
        result["generated_steps_agree"] = _generated_steps_agree(gates["stop"][0], result["stop"]["steps"])
    return result


def job_final_gate(seed: int) -> dict:
    """After SR-DPO with labels: gates fitted again, and those of before, on the final model's test questions."""
    model, processor = load_model(BASE)
    model = train_dpo(WORK / f"labels-{seed}" / "pairs.jsonl", seed, model, processor).model
    policies = policies_of(model, processor)
    folder = WORK / f"final-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    build_pairs(
        policies,
        labelled_file(seed),
        folder / "pairs.jsonl",
        RefinementConfig(batch_size=200, seed=seed, max_refinements=0, temperature=0.0),
        reasoner=EarlyExitReasoner(policies, max_steps=DEPTH),
        rollout_folder=folder / "rollouts",
        rollout_rows=ROWS,
    )
    new = _train_gates(folder / "rollouts", seed)
    old = _train_gates(WORK / f"labels-{seed}" / "rollouts", seed)
    result = {}
    for questions, seeds, names in (("test", TEST, list(GATES)), ("fresh", FRESH_SEEDS, [CHOSEN])):
        measured = measure(policies, DEPTH, seeds)
        gates = {kind: _measure_gates(kept, measured, names) for kind, kept in (("new", new), ("old", old))}
        result[questions] = _depths(measured) | gates
    return result["test"] | {"fresh": result["fresh"]}


QUESTIONS = (ROWS, len(GATE_SEEDS) // len(SEEDS))  # that the gates of PRICED are fitted on


def job_gate_questions(seed: int) -> dict:
    """Gates from few and from many questions, described greedily as in use: on validation charts, and one on unseen ones."""
    rollouts = _rollouts(base_measured(GATE_SEEDS[seed * QUESTIONS[-1] : (seed + 1) * QUESTIONS[-1]]))
    fitted = {f"questions_{n}": _fit_gates(rollouts[:n], seed, PRICED) for n in QUESTIONS}
    result = {}
    for questions, seeds, names in (("validation", VAL_SEEDS, list(PRICED)), ("unseen", UNSEEN_SEEDS, [VALIDATED])):
        measured = base_measured(seeds)
        gates = {number: _measure_gates(kept, measured, names) for number, kept in fitted.items()}
        result[questions] = _depths(measured) | gates
    return result


def _train_gates(rollout_folder: Path, seed: int) -> dict[str, tuple]:
    """By name, each gate and its settings."""
    rollouts = GateRollouts.cat([GateRollouts.load(file) for file in sorted(rollout_folder.iterdir())])
    return _fit_gates(rollouts, seed, GATES)


def _fit_gates(rollouts: GateRollouts, seed: int, gates: dict[str, tuple]) -> dict[str, tuple]:
    configs = {name: GateTrainingConfig(seed=seed, **{**GATE, **changes}) for name, (_, changes) in gates.items()}
    return {name: (train_gate(rollouts, config)[0], config) for name, config in configs.items()}


def _rollouts(measured: dict) -> GateRollouts:
    return GateRollouts(*(measured[column] for column in ("hidden", "correct", "visual", "image")))


def _measure_gates(gates: dict[str, tuple], measured: dict, names=tuple(GATES)) -> dict:
    results = {}
    for name in names:
        gate, config = gates[name]
        with torch.no_grad():
            scores = gate(measured["hidden"])
        labels = gate_labels(_rollouts(measured), config)
        stop, untaught = (_stop(scores, threshold) for threshold in (gate.threshold, config.threshold))
        results[name] = {
            "correct": bits(measured["correct"].gather(1, stop)[:, 0]),
            "steps": _steps(stop),
            "tokens": measured["tokens"].gather(1, stop).float().mean().item(),
            # At the threshold that learning started from
            "untaught": {"correct": bits(measured["correct"].gather(1, untaught)[:, 0]), "steps": _steps(untaught)},
            "threshold": gate.threshold.item(),
            "ece": expected_calibration_error(scores, labels),
            "reliability": [[round(x, 4), round(y, 4), n] for x, y, n in reliability(scores, labels)],
            "auc": _auc(scores, labels),
        }
    return results


def _stop(scores: torch.Tensor, threshold) -> torch.Tensor:
    """The step, from 0, at which reasoning stops, of shape (questions, 1)."""
    opens = scores > threshold
    opens[:, -1] = True
    return opens.int().argmax(1, keepdim=True)


def _steps(stop: torch.Tensor) -> str:
    return "".join(str(k + 1) for k in stop[:, 0].tolist())


def _generated_steps_agree(gate, steps: str) -> float:
    """On some questions, how often generation with the gate stops where one pass over all steps says."""
    rows = labelled_questions(TEST[:100])
    reasoner = EarlyExitReasoner(base_policies(), gate, DEPTH)
    made = reasoner.generate([row["image"] for row in rows], [row["question"] for row in rows])
    return float(np.mean([len(r.steps) == int(k) for r, k in zip(made, steps, strict=False)]))


def _auc(scores: torch.Tensor, correct: torch.Tensor) -> float:
    """Probability that a right answer's score is above a wrong one's."""
    order = scores.flatten().argsort().argsort().double() + 1
    right = correct.flatten()
    n, m = int(right.sum()), int((~right).sum())
    return ((order[right].sum() - n * (n + 1) / 2) / (n * m)).item()


def train_dpo(pairs: Path, seed: int, model, processor, prompts=SUB_PROMPTS, **changes):
    """SR-DPO on a file of pairs, with LoRA; a thousandth of a real model's size, and a learning rate to match."""
    folder = WORK / "dpo"
    settings = {
        "num_train_epochs": 5,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-4,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": seed,
    }
    trainer = SRDPOTrainer(
        model=model,
        args=SRDPOConfig(output_dir=str(folder), **{**settings, **changes}),
        # Pairs of descriptions name their images by absolute paths, collected ones from the file's folder
        train_dataset=load_preferences(pairs, processor, prompts, image_root=WORK if prompts is SUB_PROMPTS else None),
        processing_class=processor,
        peft_config=demo_lora(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _dpo(pairs: Path, seed: int, **changes) -> dict:
    model, processor = load_model(BASE)
    trainer = train_dpo(pairs, seed, model, processor, **changes)
    return _scores(trainer.model, processor) | {"pairs": len(trainer.train_dataset), "training": _dpo_log(trainer)}


def _scores(model, processor) -> dict:
    """What SR2SE and EvoLMM's task ask of a model, on the test questions."""
    measured = measure(policies_of(model, processor), 3)
    return {
        "depth_3": bits(measured["correct"][:, 2]),
        "from_text": bits(measured["visual"]),
        "true": bits(measured["true"]),
        "tokens_3": measured["tokens"][:, 2].float().mean().item(),
        "solver": _solver(model, processor),
    }


def _dpo_log(trainer) -> dict:
    logs = [row for row in trainer.state.log_history if "rewards/margins" in row]
    return {name: round(logs[-1][name], 4) for name in ("loss", "rewards/margins", "rewards/accuracies")}


def job_dpo(seed: int) -> dict:
    return _dpo(WORK / f"labels-{seed}" / "pairs.jsonl", seed)


def job_dpo_free(seed: int) -> dict:
    return _dpo(WORK / f"free-{seed}" / "pairs.jsonl", seed)


def job_dpo_normalized(seed: int) -> dict:
    """Length-normalised; beta larger by about the number of tokens."""
    return _dpo(WORK / f"labels-{seed}" / "pairs.jsonl", seed, length_normalization=True, beta=0.8)


def job_dpo_swapped(seed: int) -> dict:
    """Control: which of the two is the winner is decided by a coin."""
    coin = random.Random(seed)
    file = WORK / f"swapped-{seed}.jsonl"
    lines = []
    for line in (WORK / f"labels-{seed}" / "pairs.jsonl").read_text().splitlines():
        pair = json.loads(line)
        if coin.random() < 0.5:
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
        lines.append(json.dumps(pair))
    file.write_text("\n".join(lines) + "\n")
    return _dpo(file, seed)


def _solver(model, processor) -> str:
    scores = evaluate_solver(model, processor, labelled_questions(TEST), PROMPTS, samples=1)
    return bits(scores["per_question"]["greedy"])


def job_base_solver(seed: int) -> dict:
    return {"solver": _solver(*load_model(BASE))}


def _evolve(seed: int) -> Path:
    """EvoLMM on a seed's charts, which also writes its disagreements; the folder of its adapters."""
    model, processor = load_model(BASE)
    folder = WORK / f"evolmm-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    trainer = EvoLMMTrainer(
        model=model,
        args=demo_config(folder, seed=seed, max_steps=36, collect_preferences=True),
        train_dataset=load_images(labelled_file(seed).parent / "images", streaming=False),
        processing_class=processor,
        peft_config=demo_lora(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return folder


def _evolved(folder: Path):
    model, processor = load_model(BASE)
    return PeftModel.from_pretrained(model, folder).merge_and_unload().eval(), processor


def job_evolmm(seed: int) -> dict:
    """EvoLMM alone, and from its model SR-DPO on pairs without labels, or on the disagreements that it collected."""
    evolved = _evolve(seed)
    model, processor = _evolved(evolved)
    alone = _scores(model, processor)
    folder = WORK / f"evolved-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    policies = policies_of(model, processor)
    labeller = AgreementLabeller(policies, RolePrompts(**PROMPTS), max_question_tokens=16, max_answer_tokens=32)
    config = RefinementConfig(batch_size=200, seed=seed, min_agreement=0.8)
    images = labelled_file(seed).parent / "images"
    report = build_pairs(policies, images, folder / "pairs.jsonl", config, labeller=labeller)
    trainer = train_dpo(folder / "pairs.jsonl", seed, model, processor)
    both = _scores(trainer.model, processor)
    result = {"alone": alone, "both": both, **_pair_result(report, folder / "pairs.jsonl")}
    collected = [json.loads(line) for line in (evolved / "preferences.jsonl").read_text().splitlines()]
    model, processor = _evolved(evolved)
    trainer = train_dpo(evolved / "preferences.jsonl", seed, model, processor, prompts=RolePrompts(**PROMPTS))
    scores = _scores(trainer.model, processor)
    return result | {"collected": scores | {"pairs": len(collected), "training": _dpo_log(trainer)}}


VOTES, TRAINED = 9, 5  # answers in all, and those that are always drawn, since they are trained on


def job_votes(seed: int) -> dict:
    """Votes that stop when the majority is settled, or when a gate trained without labels is sure, against all votes."""
    policies = base_policies()
    policies.batch_size = 50  # times nine answers
    labeller = AgreementLabeller(policies, RolePrompts(**PROMPTS), num_answers=VOTES, max_answer_tokens=32)
    rows = labelled_questions(EVOLVE_SEEDS[seed * ROWS : (seed + 1) * ROWS])
    made = labeller.roll_out([row["image"] for row in rows], [row["question"] for row in rows], 2 * seed)
    gate, report = train_gate(made, GateTrainingConfig(seed=seed, length_penalty=0.02, **GATE))
    rows = labelled_questions(TEST)
    asked = [row["image"] for row in rows], [row["question"] for row in rows]
    groups = labeller.answer(*asked, 2 * seed + 1, with_hidden=True)
    votes = [vote([canonical_answer(answer_of(completion)) for completion in group]) for group in groups]
    truths = [canonical_answer(row["answer"]) for row in rows]
    with torch.no_grad():
        hidden = torch.stack([torch.stack([completion.hidden for completion in group]) for group in groups])
        sure = (gate(hidden) > gate.threshold).tolist()
    result = {"all": _votes_result(votes, votes, truths), "threshold": gate.threshold.item()}
    result["ece"] = report["held_out_ece"]
    for name, gated in (("settled", False), ("gate", True)):
        stopped = []
        for cast, opens in zip(votes, sure, strict=True):
            answers = cast.answers[:TRAINED]
            while len(answers) < VOTES:
                n = len(answers)
                if is_settled(vote(answers), VOTES - n) or (gated and opens[n - 1]):
                    break
                answers = cast.answers[: n + 1]
            stopped.append(vote(answers))
        result[name] = _votes_result(stopped, votes, truths)
    return result


def _rewards(cast) -> tuple[float, float]:
    """The mean reward of the trained answers, with no length penalty, and that of the question."""
    scale = entropy_scale(VOTES)
    of_proposer = proposer_reward(cast.entropy, mean=PROPOSER_ENTROPY_MEAN * scale, std=PROPOSER_ENTROPY_STD * scale)
    return float(np.mean(solver_rewards(cast, [0] * len(cast.answers))[:TRAINED])), of_proposer


def _votes_result(votes: list, all_votes: list, truths: list[str]) -> dict:
    """Per question: the majority's rightness, answers drawn, and what the rewards differ from those of all votes."""
    differences = [np.subtract(_rewards(cast), _rewards(whole)) for cast, whole in zip(votes, all_votes, strict=True)]
    return {
        "right": bits(cast.majority == truth for cast, truth in zip(votes, truths, strict=True)),
        "same": bits(cast.majority == whole.majority for cast, whole in zip(votes, all_votes, strict=True)),
        "drawn": "".join(str(len(cast.answers)) for cast in votes),
        "solver": [round(float(solver), 4) for solver, _ in differences],
        "proposer": [round(float(proposer), 4) for _, proposer in differences],
    }


JOBS = {
    "base": (job_base, (0,)),
    "pairs": (job_pairs, SEEDS),
    "gate": (job_gate, SEEDS),
    "gate_questions": (job_gate_questions, SEEDS),
    "dpo": (job_dpo, SEEDS),
    "final_gate": (job_final_gate, SEEDS),
    "free": (job_free, SEEDS),
    "dpo_free": (job_dpo_free, SEEDS),
    "stand_in": (job_stand_in, SEEDS),
    "dpo_swapped": (job_dpo_swapped, SEEDS),
    "base_solver": (job_base_solver, (0,)),
    "evolmm": (job_evolmm, SEEDS),
    "dpo_normalized": (job_dpo_normalized, SEEDS),
    "votes": (job_votes, SEEDS),
}


def read_results() -> dict[tuple[str, int], dict]:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return {(row["job"], row["seed"]): row for row in rows}


def run(only: str | None) -> None:
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    done = read_results()
    for name, (job, seeds) in JOBS.items():
        for seed in seeds:
            if (name, seed) in done or (only is not None and not re.fullmatch(only, f"{name}/{seed}")):
                continue
            started = time.process_time()
            result = {"job": name, "seed": seed, **job(seed)}
            result["cpu_seconds"] = round(time.process_time() - started, 1)
            with open(RESULTS, "a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{name}/{seed}: {result['cpu_seconds']} s", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def _difference(runs: list[str], others: list[str]) -> tuple[float, float]:
    """Mean difference of paired bits, with the half width of its 95 % interval over seeds and questions."""
    return interval(np.stack([unbits(a).astype(float) - unbits(b) for a, b in zip(runs, others, strict=True)]))


def _points(runs: list[str], others: list[str]) -> str:
    return _in_points(*_difference(runs, others))


def _in_points(mean: float, half: float) -> str:
    return f"{100 * mean:+.1f}" + ("" if np.isnan(half) else f" ± {100 * half:.1f}")


def _mean(values) -> float:
    return float(np.mean(list(values)))


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _of(results: dict, job: str) -> list[dict]:
    return [row for (name, _), row in sorted(results.items()) if name == job]


def gate_tables(results: dict) -> list[str]:
    gates, finals = _of(results, "gate"), _of(results, "final_gate")
    base = [results["base", 0]] * len(gates)
    lines = ["On the base model:", "", *_gate_table(base, [("", gates)])]
    lines += ["", "On the models after SR-DPO with labels:", "", *_gate_table(finals, _kinds(finals))]
    rows = [[title, _in_points(*_refitting(finals, name))] for name, (title, _) in GATES.items()]
    lines += [
        "",
        "There, the accuracy of a gate that is fitted again minus that of the one from before, in points:",
        "",
    ]
    lines += _table(["", "fitted again minus from before SR-DPO"], rows)
    fresh, fresh_finals = [run["fresh"] for run in gates], [run["fresh"] for run in finals]
    lines += ["", f"On {len(FRESH_SEEDS)} fresh questions, the gate that was chosen, on the base model:", ""]
    lines += _gate_table(fresh, [("", fresh)], [CHOSEN])
    lines += ["", "And on the models after SR-DPO with labels:", ""]
    lines += _gate_table(fresh_finals, _kinds(fresh_finals), [CHOSEN])
    fitted = _of(results, "gate_questions")
    for title, questions, names in (
        (
            f"From few and from many questions, on {len(VAL_SEEDS):,} validation questions, on the base model:",
            "validation",
            PRICED,
        ),
        (
            f"The most accurate of them and the same from few, on {len(UNSEEN_SEEDS)} unseen questions:",
            "unseen",
            [VALIDATED],
        ),
    ):
        runs = [run[questions] for run in fitted]
        lines += ["", title, "", *_gate_table(runs, _sizes(runs), names)]
    rows = []
    for model, runs in (("base", gates), ("after SR-DPO, fitted again", [run["new"] for run in finals])):
        for name, (title, _) in GATES.items():
            rows.append([model, title])
            for value in ("threshold", "ece", "auc"):
                rows[-1].append(" ".join(f"{run[name][value]:.2f}" for run in runs))
            rows[-1].append(_change_of_reward([run[name] for run in runs], name))
    header = ["model", "gate", "tau", "calibration error (ECE)", "AUC", "change of the reward by learning tau"]
    lines += [
        "",
        "Each gate, one number per seed, all on the test questions; ECE and AUC of all steps together. The last",
    ]
    lines[-1] += " column compares the learned tau with the one it started from:"
    lines += ["", *_table(header, rows)]
    agree = [gate["generated_steps_agree"] for gate in gates if "generated_steps_agree" in gate]
    lines += [
        "",
        f"Accuracies and tokens are read off one pass over all steps. Generation with the gate stopped at the same step on "
        f"{100 * _mean(agree):.0f} % of 100 questions.",
    ]
    return lines


def _sizes(runs: list[dict]) -> list[tuple[str, list[dict]]]:
    """The gates of PRICED, by how many questions each seed's is fitted on."""
    return [(f", fitted on {n:,} questions", [run[f"questions_{n}"] for run in runs]) for n in QUESTIONS]


def _kinds(finals: list[dict]) -> list[tuple[str, list[dict]]]:
    """The gates on models after SR-DPO, by what is said of them."""
    return [
        (", fitted again", [run["new"] for run in finals]),
        (", from before SR-DPO", [run["old"] for run in finals]),
    ]


def _change_of_reward(runs: list[dict], name: str) -> str:
    """What learning tau adds to R_HSR (Eq. 12), whose visual part does not depend on it."""
    price = GateTrainingConfig(**GATES[name][1]).length_penalty

    def reward(run: dict) -> np.ndarray:
        return unbits(run["correct"]).astype(float) - price * unbits(run["steps"])

    mean, half = interval(np.stack([reward(run) - reward(run["untaught"]) for run in runs]))
    return f"{mean:+.3f} ± {half:.3f}"


def gate_verdicts(results: dict) -> list[str]:
    """Which gates hold the accuracy of all steps at 30 % fewer tokens, in sentences."""
    gates, finals = _of(results, "gate"), _of(results, "final_gate")
    base = [results["base", 0]] * len(gates)
    kept, lost = [], []
    for where, bases, kinds in (
        ("on the base model", base, [("", gates)]),
        ("after SR-DPO", finals, _kinds(finals)),
    ):
        for suffix, runs in kinds:
            for name, (title, _) in GATES.items():
                row = _gate_row(bases, [run[name] for run in runs])
                (kept if row.holds else lost).append(f"{title}{suffix} {where}")
    lines = [
        "- **At least 30 % fewer tokens than all five steps, at an accuracy that is not measurably below theirs:** the "
        f"{'; the '.join(kept)}."
        if kept
        else "- **No gate spares 30 % of the tokens at an accuracy that is not measurably below that of all five steps.**"
    ]
    lines.append(f"  The other {len(lost)} of {len(kept) + len(lost)} gates do not manage both.")
    fresh, fresh_finals = [run["fresh"] for run in gates], [run["fresh"] for run in finals]
    said = []
    for where, bases, runs in (
        ("on the base model", fresh, fresh),
        ("after SR-DPO, fitted again,", fresh_finals, [run["new"] for run in fresh_finals]),
    ):
        row = _gate_row(bases, [run[CHOSEN] for run in runs])
        said.append(
            f"{where} it is {_in_points(row.mean, row.half)} points from all five steps at {-100 * row.saved:.0f} % fewer tokens "
            f"(accuracy {'held' if row.holds else 'not held'})"
        )
    lines.append(
        f"- **On {len(FRESH_SEEDS)} fresh questions**, since the price of 0.03 was chosen when the test questions were known: "
        f"{'; '.join(said)}. Where it is held, a loss down to the lower end of the interval is not excluded."
    )
    lines.append(_questions_verdict([run["unseen"] for run in _of(results, "gate_questions")]))
    better = [title for name, (title, _) in GATES.items() if _refitting(finals, name)[0] > _refitting(finals, name)[1]]
    lines.append(
        "- Fitting a gate again after SR-DPO makes it measurably more accurate than the one from before for "
        + (f"{len(better)} of {len(GATES)}: the {'; the '.join(better)}." if better else "none.")
    )
    return lines


def _questions_verdict(runs: list[dict]) -> str:
    """What more questions to fit the gate on that was chosen by validation do for it, in a sentence."""
    said, right = [], []
    for suffix, fitted in _sizes(runs):
        gates = [run[VALIDATED] for run in fitted]
        row = _gate_row(runs, gates)
        right.append([gate["correct"] for gate in gates])
        said.append(
            f"{suffix.removeprefix(', ')} it is {_in_points(row.mean, row.half)} points from all five steps at "
            f"{-100 * row.saved:.0f} % fewer tokens (accuracy {'held' if row.holds else 'not held'})"
        )
    few, many = right
    mean, half = _difference(many, few)
    return (
        f"- **More questions to fit the gate on {'make' if mean > half else 'do not measurably make'} it more accurate:** by "
        f"{_in_points(mean, half)} points, on the base model. This is the {PRICED[VALIDATED][0]}, as chosen on validation "
        f"charts and measured once on {len(runs[0]['depth_1'])} unseen questions: {'; '.join(said)}."
    )


def _refitting(finals: list[dict], name: str) -> tuple[float, float]:
    """After SR-DPO, the accuracy of a gate that is fitted again minus that of the one from before."""
    return _difference(*([run[kind][name]["correct"] for run in finals] for kind in ("new", "old")))


@dataclass(frozen=True)
class _GateRow:
    """A gate against all steps: difference of accuracy with its half width, tokens, and how many more they are."""

    mean: float
    half: float
    tokens: float
    saved: float  # tokens over those of all steps, minus 1

    @property
    def holds(self) -> bool:
        return self.saved <= -0.3 and self.mean + self.half >= 0


def _gate_row(bases: list[dict], runs: list[dict]) -> _GateRow:
    mean, half = _difference([run["correct"] for run in runs], [base[f"depth_{DEPTH}"] for base in bases])
    tokens = _mean(run["tokens"] for run in runs)
    return _GateRow(mean, half, tokens, tokens / _mean(base[f"tokens_{DEPTH}"] for base in bases) - 1)


def _gate_table(bases: list[dict], kinds: list[tuple[str, list[dict]]], names=tuple(GATES)) -> list[str]:
    """Fixed depths and gates on models that may differ from seed to seed."""

    def cells(runs: list[dict], steps: float) -> list[str]:
        row = _gate_row(bases, runs)
        deepest = all(run["correct"] == base[f"depth_{DEPTH}"] for run, base in zip(runs, bases, strict=True))
        return [
            _accuracy([run["correct"] for run in runs]),
            "-" if deepest else _in_points(row.mean, row.half),
            f"{steps:.2f}",
            f"{row.tokens:.1f}",
            f"{100 * row.saved:+.0f} %",
            "yes" if row.holds else "no",
        ]

    rows = []
    for k in (1, 3, DEPTH):
        runs = [{"correct": base[f"depth_{k}"], "tokens": base[f"tokens_{k}"]} for base in bases]
        rows.append([f"fixed depth {k}", *cells(runs, float(k))])
    for suffix, gates in kinds:
        for name in names:
            runs = [gate[name] for gate in gates]
            steps = _mean(unbits(run["steps"]).mean() for run in runs)
            rows.append([(GATES | PRICED)[name][0] + suffix, *cells(runs, steps)])
    header = [
        "",
        "accuracy",
        f"minus depth {DEPTH}, points",
        "steps",
        "generated tokens",
        f"tokens against depth {DEPTH}",
        "30 % fewer, accuracy held",
    ]
    return _table(header, rows)


def _accuracy(runs: list[str]) -> str:
    return f"{_mean(unbits(run).mean() for run in runs):.3f}"


def pair_tables(results: dict) -> list[str]:
    rows = []
    for job, title in (
        ("pairs", "with labels"),
        ("free", "without labels"),
        ("evolmm", "without labels, after EvoLMM"),
    ):
        runs = _of(results, job)
        if not runs:
            continue
        reports = [run["report"] for run in runs]
        pairs = sum(report["pairs"] for report in reports)
        rows.append(
            [
                title,
                str(sum(report["rows"] for report in reports)),
                str(sum(report["considered"] for report in reports)),
                str(sum(report["considered"] - report["initially_right"] for report in reports)),
                " / ".join(str(sum(r["refined_by_iteration"][i] for r in reports)) for i in ("1", "2")),
                str(sum(report["states_answer"] for report in reports)),
                str(pairs),
                f"{pairs / sum(report['rows'] for report in reports):.3f}",
                f"{sum(run['truth_right'] for run in runs) / pairs:.3f}",
                f"{sum(run['chosen_true'] for run in runs) / pairs:.3f}",
                f"{sum(run['rejected_true'] for run in runs) / pairs:.3f}",
                f"{sum(r['mean_chosen_tokens'] * r['pairs'] for r in reports) / pairs:.1f} / "
                f"{sum(r['mean_rejected_tokens'] * r['pairs'] for r in reports) / pairs:.1f}",
                f"{sum(r['chosen_longer'] * r['pairs'] for r in reports) / pairs:.2f}",
            ]
        )
    header = [
        "",
        "charts",
        "with a truth",
        "first description failed",
        "refined at 1 / 2",
        "stated the answer",
        "pairs",
    ]
    header += [
        "yield",
        "truth is right",
        "winner is true of the chart",
        "loser is",
        "tokens winner / loser",
        "winner longer",
    ]
    lines = _table(header, rows)
    counted: dict[str, list[int]] = {}
    for run in _of(results, "stand_in"):
        for agreement, (kept, right) in run["by_agreement"].items():
            before = counted.get(agreement, [0, 0])
            counted[agreement] = [before[0] + kept, before[1] + right]
    if counted:
        total = sum(kept for kept, _ in counted.values())
        rows = []
        for share in sorted(counted, reverse=True):
            above = [value for name, value in counted.items() if float(name) >= float(share)]
            kept, right = map(sum, zip(*above, strict=True))
            rows.append([f">= {share}", f"{kept / total:.3f}", f"{right / kept:.3f}"])
        lines += ["", "The majority of 5 against the labels, on the same charts:", ""]
        lines += _table(["agreement", "share of questions", "majority is right"], rows)
    return lines


def dpo_tables(results: dict) -> list[str]:
    base = results["base", 0] | {"solver": results["base_solver", 0]["solver"]}
    metrics = {
        "depth_3": "answer after 3 steps",
        "from_text": "answer from text",
        "true": "description is true",
        "solver": "solver's own answer",
    }
    rows = [["base", "", *(f"{unbits(base[name]).mean():.3f}" for name in metrics), f"{base['tokens_3']:.1f}"]]
    arms = [
        ("SR-DPO, pairs with labels", _of(results, "dpo")),
        ("SR-DPO, pairs without labels", _of(results, "dpo_free")),
        ("SR-DPO with labels, length-normalised", _of(results, "dpo_normalized")),
        ("SR-DPO with labels, winners by a coin (control)", _of(results, "dpo_swapped")),
        ("EvoLMM", [run["alone"] for run in _of(results, "evolmm")]),
        ("EvoLMM, then SR-DPO without labels", [run["both"] for run in _of(results, "evolmm")]),
        ("EvoLMM, then SR-DPO on its disagreements", [run["collected"] for run in _of(results, "evolmm")]),
    ]
    for title, runs in arms:
        cells = [title, str(len(runs))]
        for name in metrics:
            gain = _points([run[name] for run in runs], [base[name]] * len(runs))
            cells.append(f"{_mean(unbits(run[name]).mean() for run in runs):.3f} ({gain})")
        rows.append([*cells, f"{_mean(run['tokens_3'] for run in runs):.1f}"])
    lines = _table(["", "seeds", *metrics.values(), "tokens"], rows)
    evolved, free = _of(results, "evolmm"), _of(results, "dpo_free")
    rows = []
    for title, which, others in (
        ("SR-DPO without labels, minus EvoLMM alone", "both", [run["alone"] for run in evolved]),
        ("SR-DPO without labels, minus it alone", "both", free),
        ("SR-DPO on the disagreements, minus EvoLMM alone", "collected", [run["alone"] for run in evolved]),
    ):
        runs = [run[which] for run in evolved]
        points = (_points([run[name] for run in runs], [run[name] for run in others]) for name in metrics)
        rows.append([title, *points])
    lines += ["", "EvoLMM and then SR-DPO, in points, paired by seed and question:", ""]
    return lines + _table(["after EvoLMM", *metrics.values()], rows)


def exact_vote_rows() -> list[list[str]]:
    """
    What stopping settled votes does to the rewards, exactly: over all sequences of answers of which one has probability
    p and the others are all alike, or all different.
    """
    rows = []
    for p in (0.5, 0.6, 0.7, 0.8, 0.9):
        row = [f"{p:.1f}"]
        for alike in (True, False):
            drawn = solver = proposer = 0.0
            for sequence in itertools.product((True, False), repeat=VOTES):
                answers = tuple("a" if first else "b" if alike else f"b{i}" for i, first in enumerate(sequence))
                probability = np.prod([p if first else 1 - p for first in sequence])
                n = TRAINED
                while n < VOTES and not is_settled(vote(answers[:n]), VOTES - n):
                    n += 1
                stopped, whole = _rewards(vote(answers[:n])), _rewards(vote(answers))
                drawn += probability * n
                solver += probability * (stopped[0] - whole[0])
                proposer += probability * (stopped[1] - whole[1])
            row += [f"{drawn:.2f}", f"{solver:+.3f}", f"{proposer:+.3f}"]
        rows.append(row)
    return rows


def vote_tables(results: dict) -> list[str]:
    others = [f"{name}, others {kind}" for kind in ("alike", "different") for name in ("drawn", "solver", "proposer")]
    lines = [f"Exactly, for {VOTES} votes of which {TRAINED} are always drawn, by the probability of one answer:", ""]
    lines += _table(["probability", *others], exact_vote_rows())
    runs = _of(results, "votes")
    if not runs:
        return lines

    def mean_and_half(name: str, key: str) -> str:
        mean, half = interval(np.stack([np.array(run[name][key]) for run in runs]))
        return f"{mean:+.3f}" + ("" if np.isnan(half) else f" ± {half:.3f}")

    rows = []
    for name, title in (
        ("all", f"all {VOTES} answers"),
        ("settled", "until the majority is settled"),
        ("gate", "until it is settled or the gate is sure"),
    ):
        cells = [title, f"{_mean(np.mean([int(n) for n in run[name]['drawn']]) for run in runs):.2f}"]
        cells.append(_accuracy([run[name]["right"] for run in runs]))
        if name == "all":
            rows.append([*cells, "-", "-", "-", "-"])
            continue
        cells.append(_points([run[name]["right"] for run in runs], [run["all"]["right"] for run in runs]))
        cells.append(f"{_mean(unbits(run[name]['same']).mean() for run in runs):.3f}")
        rows.append([*cells, mean_and_half(name, "solver"), mean_and_half(name, "proposer")])
    header = ["votes are drawn", "answers drawn", "majority is right", "minus all, points", "same majority"]
    lines += ["", "On the base model:", ""]
    return lines + _table([*header, "solver's reward minus that of all", "proposer's"], rows)


def draw_reliability(results: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    for axis, name, label in zip(
        axes, ("right", "stop"), ("right answers", "steps after which none earns more"), strict=True
    ):
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for gate in _of(results, "gate"):
            points = np.array(gate[name]["reliability"])
            axis.plot(points[:, 0], points[:, 1], marker="o", markersize=3, label=f"seed {gate['seed']}")
        axis.set(xlabel="score of the gate", ylabel=f"share of {label}")
    axes[0].legend()
    figure.savefig(DOCS / "sr2se_reliability.png", dpi=80)
    plt.close(figure)


def report() -> None:
    """Writes the tables between the marks of docs/experiments/sr2se.md, and the reliability diagram."""
    results = read_results()
    text = PAGE.read_text()
    for mark, written in (
        ("verdicts", gate_verdicts),
        ("gate", gate_tables),
        ("pairs", pair_tables),
        ("dpo", dpo_tables),
        ("votes", vote_tables),
    ):
        text = in_place(text, mark, written(results))
    PAGE.write_text(text)
    draw_reliability(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--only", help="regular expression for job/seed")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.only)
    report()


if __name__ == "__main__":
    main()
