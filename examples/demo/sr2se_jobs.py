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

"""What is measured about SR2SE on the demo model: the jobs of `sr2se_experiments.py`."""

import json
import random
import re
import shutil
import time
from collections.abc import Sequence
from functools import cache
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


@cache
def labelled_pairs(seed: int) -> tuple[Path, Path, dict]:
    """A seed's pairs with labels, the gate's rollouts from the same descriptions, and the report, made once."""
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
    return folder / "pairs.jsonl", folder / "rollouts", report


def job_pairs(seed: int) -> dict:
    pairs, _, report = labelled_pairs(seed)
    return _pair_result(report, pairs)


@cache
def free_pairs(seed: int) -> tuple[Path, dict]:
    """A seed's pairs from the images alone, and the report, made once."""
    policies = base_policies()
    folder = WORK / f"free-{seed}"
    labeller = AgreementLabeller(policies, RolePrompts(**PROMPTS), max_question_tokens=16, max_answer_tokens=32)
    images = labelled_file(seed).parent / "images"
    config = RefinementConfig(batch_size=200, seed=seed, min_agreement=0.8)
    return folder / "pairs.jsonl", build_pairs(policies, images, folder / "pairs.jsonl", config, labeller=labeller)


def job_free(seed: int) -> dict:
    pairs, report = free_pairs(seed)
    return _pair_result(report, pairs)


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
    gates = _train_gates(labelled_pairs(seed)[1], seed)
    fresh = base_measured(FRESH_SEEDS)
    result = _measure_gates(gates, base_measured()) | {
        "fresh": _depths(fresh) | _measure_gates(gates, fresh, [CHOSEN])
    }
    if seed == 0:
        result["generated_steps_agree"] = _generated_steps_agree(gates["stop"][0], result["stop"]["steps"])
    return result


def final_policies(seed: int) -> SubPolicies:
    """The model after SR-DPO with labels."""
    model, processor = load_model(BASE)
    return policies_of(train_dpo(labelled_pairs(seed)[0], seed, model, processor).model, processor)


def job_final_gate(seed: int) -> dict:
    """After SR-DPO with labels: gates fitted again, and those of before, on the final model's test questions."""
    policies = final_policies(seed)
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
    old = _train_gates(labelled_pairs(seed)[1], seed)
    result = {}
    for questions, seeds, names in (("test", TEST, list(GATES)), ("fresh", FRESH_SEEDS, [CHOSEN])):
        measured = measure(policies, DEPTH, seeds)
        gates = {kind: _measure_gates(kept, measured, names) for kind, kept in (("new", new), ("old", old))}
        result[questions] = _depths(measured) | gates
    return result["test"] | {"fresh": result["fresh"]}


QUESTIONS = (ROWS, len(GATE_SEEDS) // len(SEEDS))  # that the gates of PRICED are fitted on


def job_gate_questions(seed: int) -> dict:
    """Gates from few and from many questions, described greedily as in use: on validation charts, and one on unseen ones."""
    rollouts = _rollouts(base_measured(_gate_seeds(seed)))
    fitted = {f"questions_{n}": _fit_gates(rollouts[:n], seed, PRICED) for n in QUESTIONS}
    result = {}
    for questions, seeds, names in (("validation", VAL_SEEDS, list(PRICED)), ("unseen", UNSEEN_SEEDS, [VALIDATED])):
        measured = base_measured(seeds)
        gates = {number: _measure_gates(kept, measured, names) for number, kept in fitted.items()}
        result[questions] = _depths(measured) | gates
    return result


def job_final_gate_questions(seed: int) -> dict:
    """After SR-DPO with labels: the gate of VALIDATED from many questions, fitted again and that of before, on unseen ones."""
    policies = final_policies(seed)
    measured = {"new": measure(policies, DEPTH, _gate_seeds(seed)), "old": base_measured(_gate_seeds(seed))}
    unseen = measure(policies, DEPTH, UNSEEN_SEEDS)
    chosen = {VALIDATED: PRICED[VALIDATED]}
    fitted = {kind: _fit_gates(_rollouts(made), seed, chosen) for kind, made in measured.items()}
    return _depths(unseen) | {kind: _measure_gates(gates, unseen, [VALIDATED]) for kind, gates in fitted.items()}


def _gate_seeds(seed: int) -> Sequence[int]:
    return GATE_SEEDS[seed * QUESTIONS[-1] : (seed + 1) * QUESTIONS[-1]]


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
    return _dpo(labelled_pairs(seed)[0], seed)


def job_dpo_free(seed: int) -> dict:
    return _dpo(free_pairs(seed)[0], seed)


def job_dpo_normalized(seed: int) -> dict:
    """Length-normalised; beta larger by about the number of tokens."""
    return _dpo(labelled_pairs(seed)[0], seed, length_normalization=True, beta=0.8)


def job_dpo_swapped(seed: int) -> dict:
    """Control: which of the two is the winner is decided by a coin."""
    coin = random.Random(seed)
    file = WORK / f"swapped-{seed}.jsonl"
    lines = []
    for line in labelled_pairs(seed)[0].read_text().splitlines():
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


def trained_rewards(cast) -> tuple[float, float]:
    """The mean reward of the trained answers, with no length penalty, and that of the question."""
    scale = entropy_scale(VOTES)
    of_proposer = proposer_reward(cast.entropy, mean=PROPOSER_ENTROPY_MEAN * scale, std=PROPOSER_ENTROPY_STD * scale)
    return float(np.mean(solver_rewards(cast, [0] * len(cast.answers))[:TRAINED])), of_proposer


def _votes_result(votes: list, all_votes: list, truths: list[str]) -> dict:
    """Per question: the majority's rightness, answers drawn, and what the rewards differ from those of all votes."""
    differences = [
        np.subtract(trained_rewards(cast), trained_rewards(whole))
        for cast, whole in zip(votes, all_votes, strict=True)
    ]
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
    "final_gate_questions": (job_final_gate_questions, SEEDS),
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
