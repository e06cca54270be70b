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

"""Make the demo's base model for SR2SE: the base `room`, taught to describe, to look again and to reason on text.

    python examples/demo/make_sr2se_model.py --output examples/demo/models/sr2se

About eight minutes on one idle CPU core. What it is taught decides what can be shown with it:

- A first description misses small bars (values up to 3) three times in four: they are 0, or not there. A second look
  never misses any. So refinement has something to find, and a description without misses is within the model's reach.
- Reasoning and answering see the description alone, and are right about it. A missed bar makes the answer wrong.
- A question takes 1 to 3 steps. Once the result stands there, every further step repeats it. The final answer is taught
  after complete steps alone.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from charts import Chart, Question, sample_question
from demo import load_model
from make_demo_model import BASES, WarmStartData, sample_example, warm_start


HERE = Path(__file__).parent
SR2SE_PROMPTS = json.loads((HERE / "sr2se_prompts.json").read_text())
SMALL = 3  # a bar of at most this value can be missed
MISSED = 0.75  # share of small bars that a first description misses
MAX_STEPS = 5
STEPS = 1250
SHARES = {"perception": 0.2, "refinement": 0.1, "step": 0.3, "text_answer": 0.1, "final_answer": 0.15, "before": 0.15}


def describe(question: Question, chart: Chart, missed: float, rng: random.Random) -> tuple[str, dict[str, int]]:
    """A description of the bars that `question` is about, in random order, and what it says: colour -> value."""
    named = bool(question.colours)
    colours = list(question.colours or chart.values)
    rng.shuffle(colours)
    parts, seen = [], {}
    for colour in colours:
        value = chart.values[colour]
        if value <= SMALL and rng.random() < missed:
            if named:
                parts.append(f"{colour} 0")
                seen[colour] = 0
        else:
            parts.append(f"{colour} {value}")
            seen[colour] = value
    return (", ".join(parts) or "nothing") + ".", seen


def reasoning(question: Question, seen: dict[str, int]) -> tuple[list[str], str]:
    """The steps from what was seen to the answer, and the answer."""
    if not seen:
        return ["nothing is 0."], "0"
    steps = [", ".join(f"{colour} is {value}" for colour, value in seen.items()) + "."]
    colours, values = list(seen), list(seen.values())
    if question.kind == "value":
        return steps, str(values[0])
    if question.kind == "tallest":
        tallest = max(seen, key=seen.get)
        return [*steps, f"{tallest} is the tallest."], tallest
    if question.kind == "difference":
        difference = abs(values[0] - values[1])
        return [*steps, f"{colours[0]} and {colours[1]} differ by {difference}."], str(difference)
    for i in range(1, len(seen)):
        before = colours[0] if i == 1 else ""
        steps.append(f"{before} plus {colours[i]} is {sum(values[: i + 1])}.".strip())
    return steps, str(sum(values))


def step_at(steps: list[str], answer: str, k: int) -> str:
    """Step `k`, from 0; once the steps are complete, the result again."""
    return steps[k] if k < len(steps) else f"that is {answer}."


def sample_target(task: str, chart: Chart, rng: random.Random) -> tuple[str, str]:
    """A prompt and its target."""
    if task == "before":
        return sample_example(chart, BASES["room"], rng)
    question = sample_question(chart, rng)
    description, seen = describe(question, chart, MISSED, rng)
    steps, answer = reasoning(question, seen)
    given = {"question": question.text, "description": description}
    tagged = f"<answer>{answer}</answer>"
    if task == "perception":
        target = description
    elif task == "refinement":
        target, _ = describe(question, chart, 0.0, rng)
    elif task == "text_answer":
        target = tagged
    else:
        k = rng.choice((0, 0, 1, 1, 2, 2, 3, 4)) if task == "step" else rng.randint(len(steps), MAX_STEPS)
        given["steps"] = "\n".join(step_at(steps, answer, i) for i in range(k)) or "none"
        target = step_at(steps, answer, k) if task == "step" else tagged
    return SR2SE_PROMPTS[task].format(**given), target


class Sr2seData(WarmStartData):
    """Batches of all tasks; those on text alone have no image."""

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        examples, pixels = [], []
        for _ in range(size):
            index = self.rng.randrange(len(self.charts))
            task = self.rng.choices(list(SHARES), list(SHARES.values()))[0]
            prompt, target = sample_target(task, self.charts[index], self.rng)
            if task in ("step", "text_answer", "final_answer"):
                content = [{"type": "text", "text": prompt}]
                text = self.processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
                prompt_ids = self.processor.tokenizer(text)["input_ids"]
            else:
                prompt_ids = self.prompt_ids(prompt)
                pixels.append(self.pixels[index])
            examples.append((prompt_ids, target))
        return self.collated(examples, pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--save_every", type=int, help="save to OUTPUT-STEP as well, to choose the number of steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, processor = load_model(HERE / "models" / "room")

    def save(step: int) -> None:
        if args.save_every and step % args.save_every == 0:
            model.save_pretrained(f"{args.output}-{step}")
            processor.save_pretrained(f"{args.output}-{step}")

    warm_start(model, Sr2seData(processor, BASES["room"]), args.steps, save)
    model.eval().save_pretrained(args.output)
    processor.save_pretrained(args.output)
    record = {"from": "room", "steps": args.steps, "missed": MISSED, "small": SMALL, "shares": SHARES}
    (args.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
