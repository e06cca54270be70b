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

"""What is compared: one training run each, on the same model, images, number of answers and token counts."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_meter import OTHER, Meter, Reading
from bench_models import SIZES, SPECIAL_TOKENS, make_images, make_lora, make_model, make_processor
from peft import get_peft_model
from transformers import DefaultFlowCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from evolmm_trl import EvoLMMConfig, EvoLMMTrainer
from evolmm_trl.prompts import RolePrompts
from evolmm_trl.schedule import PROPOSER


PROPOSE, SOLVE, REFERENCE, UPDATE = "propose", "solve", "reference", "update"
PROPOSER_REFERENCE, PROPOSER_UPDATE = "proposer_reference", "proposer_update"
TRAINED = ((UPDATE, REFERENCE), (PROPOSER_UPDATE, PROPOSER_REFERENCE))


@dataclass(frozen=True)
class Setting:
    """
    One configuration that is measured.

    Args:
        model (`str`):
            A name in `SIZES`.
        height (`int`), width (`int`):
            Pixels of an image.
        answers (`int`):
            Answers N per question.
        images (`int`):
            Images per optimizer step, where there are steps of several.
        completion (`int`):
            Tokens of every question and every answer.
        groups (`int`, *optional*, defaults to `1`):
            Of these images, those in a micro-batch.
        proposer_update_every (`int`, *optional*, defaults to `5`):
            Solver steps between two proposer steps.
        device (`str`, *optional*, defaults to `"cpu"`), dtype (`str`, *optional*, defaults to `"float32"`):
            Where and in what precision.
        checkpointing (`bool`, *optional*, defaults to `False`):
            Gradient checkpointing.
    """

    model: str
    height: int
    width: int
    answers: int
    images: int
    completion: int
    groups: int = 1
    proposer_update_every: int = 5
    device: str = "cpu"
    dtype: str = "float32"
    checkpointing: bool = False


class Contender:
    """
    A training run that can be repeated: `run` trains on `images` images, and the meter reads it.

    Args:
        setting ([`Setting`]):
            What is measured.
        images (`int`):
            Images per repetition.
    """

    stages: tuple[str, ...]  # that a repetition must have spent time in, beside `OTHER`
    checks_first_steps = False  # a first repetition does work that the others do not

    def __init__(self, setting: Setting, images: int):
        self.setting = setting
        self.images = images
        self.meter = Meter(setting.device)
        self.size = SIZES[setting.model]
        self.processor = make_processor(self.size.vocab)
        self.dataset = make_images(images, setting.height, setting.width)
        self.prompts = RolePrompts()
        # No end token, and nothing else that is not a word, is ever sampled: all completions have all their tokens
        self.suppressed = list(range(len(SPECIAL_TOKENS)))
        self.question = " ".join(f"w{i}" for i in range(setting.completion))

    def base(self):
        return make_model(self.size, self.setting.device, getattr(torch, self.setting.dtype))

    def read(self, counting: bool = False) -> Reading:
        """One repetition; `counting` takes everything but meaningful seconds."""
        with self.meter.counting(self.model.get_base_model()) if counting else contextlib.nullcontext():
            self.run()
        missing = [stage for stage in self.stages if self.meter.reading.seconds[stage] == 0.0]
        if missing:
            raise RuntimeError(f"{type(self).__name__} spent no time in {missing}: the stages are not what they were.")
        for update, reference in TRAINED:
            tokens = self.meter.reading.tokens
            if counting and tokens[update] != tokens[reference]:
                raise RuntimeError(
                    f"{type(self).__name__} read {tokens[update]} tokens in {update} and {tokens[reference]} in "
                    f"{reference}; expected as many: some check of a first step is still running."
                )
        return self.meter.reading

    def prompt_lengths(self) -> dict[str, int]:
        """Tokens of the two roles' prompts."""
        image = self.dataset[0]["image"]
        messages = {PROPOSE: self.prompts.proposer_messages(), SOLVE: self.prompts.solver_messages(self.question)}
        return {stage: self.encode(m, image)["input_ids"].size(1) for stage, m in messages.items()}

    def encode(self, messages: list[dict], image) -> dict[str, torch.Tensor]:
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.processor(text=[text], images=[[image]], return_tensors="pt").to(self.setting.device)

    def state_bytes(self) -> int:
        """Bytes of the weights, of which there is one copy, and of the optimizer's state."""
        held = [*self.model.parameters(), *self.model.buffers()]
        optimizer = self.optimizer if isinstance(self, Sequential) else self.trainer.optimizer
        held += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        return sum(tensor.untyped_storage().nbytes() for tensor in {x.data_ptr(): x for x in held}.values())

    def trainer_options(self) -> dict:
        """What both trainers are given."""
        s = self.setting
        return {
            "num_generations": s.answers,
            "per_device_train_batch_size": s.answers * s.groups,
            "gradient_accumulation_steps": s.images // s.groups,
            "max_completion_length": s.completion,
            "generation_kwargs": {"suppress_tokens": self.suppressed},
            "gradient_checkpointing": s.checkpointing,
            "beta": 0.001,
            "learning_rate": 1e-6,
            "bf16": s.dtype == "bfloat16",
            "use_cpu": s.device == "cpu",
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }


class Sequential(Contender):
    """
    The procedure of EvoLMM's released code, on one image at a time: the question and then each answer generated on its
    own, then one optimizer step per answer, of one forward of the policy and one of the reference with the adapter
    disabled, with the full-vocabulary KL. As in that code the proposer is not updated, though here its adapter asks.

    Two things are better than there, so that all contenders do the same work: the update sees the image, and the logits
    are those of the completion alone.
    """

    stages = (PROPOSE, SOLVE, REFERENCE, UPDATE)

    def __init__(self, setting: Setting, folder: Path):
        super().__init__(setting, images=1)
        self.model = get_peft_model(self.base(), make_lora(self.size), autocast_adapter_dtype=False)
        self.model.add_adapter("proposer", make_lora(self.size), autocast_adapter_dtype=False)
        if setting.checkpointing:
            self.model.gradient_checkpointing_enable()
            self.model.enable_input_require_grads()
        self.model.set_adapter("default")
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, weight_decay=0.01)

    def run(self) -> None:
        self.meter.start()
        for row in self.dataset:
            with self.meter.stage(PROPOSE):
                self.model.set_adapter("proposer")
                _, question = self.generate(self.prompts.proposer_messages(), row["image"])
                question = self.processor.tokenizer.decode(question)
            with self.meter.stage(SOLVE):
                self.model.set_adapter("default")
                messages = self.prompts.solver_messages(question)
                samples = [self.generate(messages, row["image"]) for _ in range(self.setting.answers)]
            for prompt, answer in samples:
                self.train_on(prompt, answer)
        self.meter.stop()

    def generate(self, messages: list[dict], image) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        prompt = self.encode(messages, image)
        self.model.eval()
        with torch.no_grad():
            ids = self.model.generate(
                **prompt,
                do_sample=True,
                max_new_tokens=self.setting.completion,
                suppress_tokens=self.suppressed,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
        return prompt, ids[0, prompt["input_ids"].size(1) :]

    def train_on(self, prompt: dict[str, torch.Tensor], answer: torch.Tensor) -> None:
        self.model.train()
        advantage = _uneven_reward([answer.tolist()])[0] - 3.0
        with self.meter.stage(REFERENCE), torch.no_grad(), self.model.disable_adapter():
            reference = self.log_probs(prompt, answer)
        with self.meter.stage(UPDATE):
            self.meter.watch_memory()
            policy = self.log_probs(prompt, answer)
            kl = (policy.exp() * (policy - reference)).sum(-1)
            loss = (-advantage * policy.gather(1, answer[:, None])[:, 0] + 0.001 * kl).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def log_probs(self, prompt: dict[str, torch.Tensor], answer: torch.Tensor) -> torch.Tensor:
        """Of the whole vocabulary, of shape (completion, vocabulary)."""
        length = answer.numel()
        padded = {
            "input_ids": torch.cat([prompt["input_ids"], answer[None]], dim=1),
            "attention_mask": torch.nn.functional.pad(prompt["attention_mask"], (0, length), value=1),
            "mm_token_type_ids": torch.nn.functional.pad(prompt["mm_token_type_ids"], (0, length)),
        }
        logits = self.model(**{**prompt, **padded}, use_cache=False, logits_to_keep=length + 1).logits
        return logits[0, :-1].float().log_softmax(-1)


class GRPO(Contender):
    """
    TRL's own trainer doing the solver's part: one optimizer step on the answers to a fixed question about each image.
    Nobody asks a question and no proposer is trained.
    """

    stages = (SOLVE, REFERENCE, UPDATE)

    def __init__(self, setting: Setting, folder: Path):
        super().__init__(setting, images=setting.images)
        prompt = self.prompts.solver_messages(self.question)[0]["content"][1]["text"]
        rows = [[{"role": "user", "content": prompt}]] * len(self.dataset)
        self.trainer = GRPOTrainer(
            model=self.base(),
            reward_funcs=_uneven_reward,
            args=GRPOConfig(output_dir=str(folder / "grpo"), max_steps=1, loss_type="grpo", **self.trainer_options()),
            train_dataset=self.dataset.add_column("prompt", rows),
            processing_class=self.processor,
            peft_config=make_lora(self.size),
        )
        _attend(self, self.trainer)
        # All of the rollout: preprocessing, generation, rewards. Its only forward without gradients is the reference's
        self.meter.wrap(self.trainer, "_generate_and_score_completions", lambda: SOLVE)
        self.meter.wrap(
            self.trainer,
            "_get_per_token_logps_and_entropies",
            lambda: None if torch.is_grad_enabled() else REFERENCE,
        )
        self.meter.wrap(self.trainer, "training_step", lambda: UPDATE)
        compute_loss = self.trainer.compute_loss

        def watched(*args, **kwargs):
            self.meter.watch_memory()
            return compute_loss(*args, **kwargs)

        self.trainer.compute_loss = watched

    def run(self) -> None:
        self.trainer.train()


class EvoLMM(Contender):
    """
    This package's trainer over a whole period of its schedule: solver steps with new images, then the proposer's step on
    the questions asked about them.
    """

    stages = (PROPOSE, SOLVE, REFERENCE, UPDATE, PROPOSER_REFERENCE, PROPOSER_UPDATE)
    checks_first_steps = True
    options: dict = {}

    def __init__(self, setting: Setting, folder: Path):
        super().__init__(setting, images=setting.images * setting.proposer_update_every)
        # The trainer reports its trainable parameters, which is no part of the tables
        with contextlib.redirect_stdout(sys.stderr):
            self.trainer = _MeteredTrainer(
                model=self.base(),
                args=EvoLMMConfig(
                    output_dir=str(folder / "evolmm"),
                    max_steps=setting.proposer_update_every + 1,
                    proposer_update_every=setting.proposer_update_every,
                    max_question_length=setting.completion,
                    max_pixels=None,
                    **self.options,
                    **self.trainer_options(),
                ),
                train_dataset=self.dataset,
                processing_class=self.processor,
                peft_config=make_lora(self.size),
            )
        self.trainer.meter = self.meter
        _attend(self, self.trainer)

    def run(self) -> None:
        self.trainer.train()


class EvoLMMPlain(EvoLMM):
    """The same with nothing shared between the answers to a question."""

    options = {"shared_prefix": False}


CONTENDERS: dict[str, type[Contender]] = {
    "sequential": Sequential,
    "grpo": GRPO,
    "evolmm": EvoLMM,
    "evolmm_plain": EvoLMMPlain,
}


class _MeteredTrainer(EvoLMMTrainer):
    """
    The trainer, whose own timing of its stages tells the meter. A random model writes no tags, so its words are put
    between them, such that answers differ and every other question is malformed.
    """

    meter: Meter

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        stage = f"proposer_{name}" if self.schedule.role(self.state.global_step) == PROPOSER else name
        with super()._timed(name), self.meter.stage(OTHER if name == "health" else stage):
            if name == UPDATE:
                self.meter.watch_memory()
            yield

    def _decode(self, ids: list[list[int]]) -> list[str]:
        completions = []
        for text, row in zip(super()._decode(ids), ids, strict=True):
            questions = f"<question>{text}</question>" * (1 + sum(row) % 2)  # two are one too many
            completions.append(f"{questions}<answer>{sum(row) % 3}</answer>")
        return completions


class _Watch(TrainerCallback):
    """Starts the meter when training begins and stops it after the last step."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def on_train_begin(self, args, state, control, **kwargs):
        self.meter.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.meter.stop()


def _attend(contender: Contender, trainer) -> None:
    contender.trainer = trainer
    contender.model = trainer.model
    for callback in list(trainer.callback_handler.callbacks):
        if not isinstance(callback, DefaultFlowCallback):  # printing
            trainer.remove_callback(callback)
    trainer.add_callback(_Watch(contender.meter))


def _uneven_reward(completion_ids: list[list[int]], **kwargs) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]
