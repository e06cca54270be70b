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

"""The tables and the figure of docs/experiments/sr2se.md, from the results of the jobs."""

import itertools
from dataclasses import dataclass

import numpy as np
from charts import FRESH_SEEDS, UNSEEN_SEEDS, VAL_SEEDS
from experiments import in_place, interval
from sr2se_jobs import (
    CHOSEN,
    DEPTH,
    DOCS,
    GATES,
    PRICED,
    QUESTIONS,
    TRAINED,
    VALIDATED,
    VOTES,
    read_results,
    trained_rewards,
    unbits,
)

from evolmm_trl.sr2se import GateTrainingConfig
from evolmm_trl.voting import is_settled, vote


PAGE = DOCS / "sr2se.md"


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
    evolved = _of(results, "final_gate_questions")
    title = f"From {QUESTIONS[-1]:,} questions, on the models after SR-DPO with labels, on the same unseen questions:"
    lines += ["", title, "", *_gate_table(evolved, _kinds(evolved), [VALIDATED])]
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
        said.append(f"{where} it is {_against_all_steps(bases, [run[CHOSEN] for run in runs])}")
    lines.append(
        f"- **On {len(FRESH_SEEDS)} fresh questions**, since the price of 0.03 was chosen when the test questions were known: "
        f"{'; '.join(said)}. Where it is held, a loss down to the lower end of the interval is not excluded."
    )
    lines.append(_questions_verdict([run["unseen"] for run in _of(results, "gate_questions")]))
    evolved = _of(results, "final_gate_questions")
    said = [
        f"{suffix.removeprefix(', ')} it is {_against_all_steps(evolved, [run[VALIDATED] for run in runs])}"
        for suffix, runs in _kinds(evolved)
    ]
    lines.append(f"  After SR-DPO, on the same questions, the same gate from {QUESTIONS[-1]:,}: {'; '.join(said)}.")
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
        right.append([gate["correct"] for gate in gates])
        said.append(f"{suffix.removeprefix(', ')} it is {_against_all_steps(runs, gates)}")
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


def _against_all_steps(bases: list[dict], runs: list[dict]) -> str:
    row = _gate_row(bases, runs)
    held = "held" if row.holds else "not held"
    fewer = f"{-100 * row.saved:.0f} % fewer tokens"
    return f"{_in_points(row.mean, row.half)} points from all five steps at {fewer} (accuracy {held})"


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
                stopped, whole = trained_rewards(vote(answers[:n])), trained_rewards(vote(answers))
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
