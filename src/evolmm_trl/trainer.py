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

import logging
import math
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.utils import gather_object, send_to_device, set_seed
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from PIL import Image
from torch.distributed.fsdp import StateDictType
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
    TrainerCallback,
)
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_config_model_id

from .answers import canonical_answer
from .checkpoints import RoleCheckpoints
from .checks import StartChecks
from .config import DEFAULT_STREAM_ROLLOUTS, EvoLMMConfig
from .data import EndlessImages, ReadableImageStream, readable_images
from .engines import engine_optimizer, keep_saved_names, whole_weights
from .evaluation.loop import LabelledEvaluation
from .health.guard import CollapseGuard
from .health.questions import cluster_shares
from .kl import AdaptiveKL, sampled_kl
from .memory import Prompt, Sharding, describe
from .monitor import Rollout
from .processing import load_processor, special_tokens
from .prompts import Question, read_answer, read_question
from .records import RolloutRecords
from .rewards import (
    PROPOSER_ENTROPY_MEAN,
    PROPOSER_ENTROPY_STD,
    EMABaseline,
    blind_share,
    discrete_proposer_reward,
    discrete_solver_rewards,
    entropy_scale,
    penalised_proposer_reward,
    proposer_reward,
    solver_rewards,
)
from .role_adapters import (
    ADAPTER_OF,
    RoleAdapters,
    add_role_adapter,
    check_adapted_modules,
    check_quantized_modules,
    keep_adapters_precise,
    keep_gradients_on_cpu,
    role_lora_configs,
    role_optimizer,
    vision_modules,
    warn_of_half_precision,
    without_vision,
)
from .rollout.generation import end_states, generate, generate_shared, sample_seed, why_not_generated_shared
from .rollout.samples import (
    EncodedPrompt,
    ProposerCollator,
    Sample,
    collate_completions,
    collate_samples,
    encode_about,
    encode_prompts,
    split_evenly,
)
from .rollout.served import ServedRollouts
from .schedule import PROPOSER, ROLES, SOLVER, RoleSchedule, RolloutSampler, RolloutStream, as_it_is
from .shared_prefix import (
    PackedGroups,
    base_model,
    install_shared_attention,
    pack_groups,
    packed_logps,
    why_not_shared,
    with_features,
)
from .sr2se.early_exit import ConfidenceGate
from .state import check_complete, last_complete_checkpoint
from .thumbnails import image_digest
from .voting import Vote, is_settled, vote


logger = logging.getLogger(__name__)

# Losses that TRL averages over the rows of a micro-batch. The others it already normalises over the whole step
_ROW_MEAN_LOSSES = ("grpo", "dr_grpo", "sapo", "luspo")


class EvoLMMTrainer(StartChecks, LabelledEvaluation, RoleCheckpoints, RolloutRecords, ServedRollouts, GRPOTrainer):
    """
    Trains a vision-language model on images alone, by the method of [EvoLMM](https://huggingface.co/papers/2511.16672).

    The model plays two roles. The proposer asks a question about each image, the solver answers it N times, and how far
    the answers agree is the only reward. Each optimizer step trains one role with the KL-penalised policy gradient of
    [`~trl.GRPOTrainer`], whose loss, reference model, logging and checkpoints are inherited; what is new is where
    prompts, rewards and advantages come from, and that a rollout's samples go to the roles' steps.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from evolmm_trl import EvoLMMConfig, EvoLMMTrainer

    trainer = EvoLMMTrainer(
        model="Qwen/Qwen2.5-VL-7B-Instruct",
        args=EvoLMMConfig(output_dir="charts-evolmm"),
        train_dataset=load_dataset("imagefolder", data_dir="images/train", split="train", streaming=True),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Vision-language model: an id, a path or a loaded model. A `PeftModel` has the adapter `"default"` (the
            solver's) and, with `adapters="separate"`, `"proposer"`, and is trained further.
        args ([`EvoLMMConfig`], *optional*):
            Configuration. If `None`, the default one.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Images, in a column `image` (PIL images, bytes or paths). A column `image_id`, if there is one, names them in
            the log. Nothing else is needed or looked at, but for what extra `reward_funcs` ask for.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Labelled questions, in columns `image`, `question` and `answer`. They are never trained on.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            The model's processor. If `None`, it is loaded with the model's id.
        reward_funcs (`Callable`, `str`, [`~transformers.PreTrainedModel`] or `list` of them, *optional*):
            Extra rewards for the solver, with the signature of [`~trl.GRPOTrainer`], added to the agreement reward with
            `args.reward_weights`.
        callbacks (`list[TrainerCallback]`, *optional*):
            Callbacks.
        optimizers (`tuple[torch.optim.Optimizer or None, torch.optim.lr_scheduler.LambdaLR or None]`, *optional*):
            Optimizer and scheduler. With separate adapters the optimizer must be `None`: choose it with `args.optim`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model given by id or path. The LM head and the vision tower are left out unless its
            `llm_int8_skip_modules` says what to leave out.
        peft_config ([`~peft.LoraConfig`] or `dict[str, LoraConfig]`, *optional*):
            LoRA configuration of both roles, or one per role under `"solver"` and `"proposer"`. If `None`, all weights
            are trained by both roles.
        vote_gate ([`~evolmm_trl.sr2se.ConfidenceGate`], *optional*):
            With `args.early_votes`: a gate trained on [`~evolmm_trl.sr2se.AgreementLabeller.roll_out`]. No more votes are
            drawn where its score of the last answer is above its threshold.

    Raises:
        `ValueError`: if the model has no vision tower, the dataset no images, or the settings do not fit each other.
    """

    _tag_names = ["trl", "evolmm", "evolmm-trl"]
    _name = "EvoLMM"
    _paper = {
        "title": "EvoLMM: Self-Evolving Large Multimodal Models with Continuous Rewards",
        "id": "2511.16672",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{thawakar2025evolmm,
                title        = {{EvoLMM: Self-Evolving Large Multimodal Models with Continuous Rewards}},
                author       = {Omkar Thawakar and Shravan Venkatraman and Ritesh Thawkar and Abdelrahman Shaker and Hisham Cholakkal and Rao Muhammad Anwer and Salman Khan and Fahad Khan},
                year         = 2025,
                eprint       = {arXiv:2511.16672},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: EvoLMMConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: "Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None" = None,
        processing_class: ProcessorMixin | None = None,
        reward_funcs: Callable | list | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: LoraConfig | dict[str, LoraConfig] | None = None,
        vote_gate: ConfidenceGate | None = None,
    ):
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = EvoLMMConfig(output_dir=f"{model_id.split('/')[-1]}-EvoLMM")
        if not isinstance(args, EvoLMMConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; expected an `EvoLMMConfig`.")
        if train_dataset is None:
            raise ValueError("`train_dataset` is missing; pass a dataset with a column 'image'.")
        if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
            schedule = RoleSchedule(args.proposer_update_every, args.train_proposer)
            args.max_steps = schedule.steps_for_rollouts(DEFAULT_STREAM_ROLLOUTS)
            logger.warning(
                "The length of a stream is not known, so `max_steps` is set to %d, which makes %d rollouts.",
                args.max_steps,
                DEFAULT_STREAM_ROLLOUTS,
            )
        self._check_optimizer_argument(optimizers[0], model, peft_config, args)
        revision = (args.model_init_kwargs or {}).get("revision")
        vision = vision_modules(model, args.trust_remote_code, revision)
        if quantization_config is not None:
            quantization_config = without_vision(quantization_config, vision)
        lora_configs = None
        if peft_config is not None:
            lora_configs = role_lora_configs(peft_config, args.adapters, vision if args.freeze_vision_tower else ())
        if processing_class is None:
            processing_class = load_processor(model_id, revision=revision, trust_remote_code=args.trust_remote_code)
        if not hasattr(processing_class, "image_processor"):
            raise ValueError(
                f"`processing_class` is a {type(processing_class).__name__}, which cannot read images. Pass the model's "
                "processor, or leave it unset."
            )
        processing_class.tokenizer.padding_side = "left"
        # A template that cannot lay out the messages says so here, before the model is loaded
        processing_class.apply_chat_template(
            args.role_prompts.proposer_messages(), tokenize=False, **(args.chat_template_kwargs or {})
        )

        guard = [] if args.collapse_guard is None else [CollapseGuard.from_config(args.collapse_guard)]
        # TRL sets it to 0 for a stream, whose rows it repeats. Here a worker reads whole rollouts, see `RolloutStream`
        workers, args.dataloader_num_workers = args.dataloader_num_workers, 0
        super().__init__(
            model=model,
            # TRL asks for at least one; without any, agreement is the only reward
            reward_funcs=reward_funcs or _agreement_only,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), *guard],
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=lora_configs[SOLVER] if lora_configs else None,
        )
        args.dataloader_num_workers = workers

        skips = args.agreement_band is not None or args.mask_truncated_completions
        if optimizers[0] is not None and self.is_deepspeed_enabled and skips:
            raise ValueError(
                "`optimizers` holds an optimizer, which DeepSpeed would step where no sample of a step is trained on, with "
                "agreement_band or mask_truncated_completions. Choose the optimizer with `args.optim`."
            )
        if not reward_funcs:
            self.reward_funcs, self.reward_func_names, self.reward_processing_classes = [], [], []
        self._set_up_roles(lora_configs, vision)
        self._set_up_sharing(vision)
        self._set_up_servers(model_id)
        if vote_gate is not None:
            if not args.early_votes:
                raise ValueError(
                    "`vote_gate` is given, but early_votes=False: it would never be asked. Set early_votes."
                )
            vote_gate.check_fits(self.model)
        self.vote_gate = vote_gate
        # Read once here, so that a missing column or an empty dataset is said now and not after the model is sharded
        self._images = readable_images(train_dataset, max_pixels=args.max_pixels, image_root=args.image_root)

        self.prompts = args.role_prompts
        self._special_tokens = special_tokens(self._tokenizer)
        self.schedule = RoleSchedule(args.proposer_update_every, args.train_proposer)
        self._begin_run()
        self._model_inputs = None  # of the current forward, for `_get_per_token_logps_and_entropies`
        self._first_batch_checked: set[str] = set()
        self._first_step_checked: set[str] = set()
        if eval_dataset is not None:
            # The untrained model's scores: what later ones are compared with, and whether the vote is ahead of greedy
            args.eval_on_start = True
        if self.accelerator.is_main_process:
            print(self._describe(vision))

    # ------------------------------------------------------------------------------------------------------------
    # Setting up

    def _set_up_roles(self, lora_configs: dict[str, LoraConfig] | None, vision: list[str]) -> None:
        """One adapter per role on the PEFT model that TRL made, or all weights but the vision tower's."""
        model = self.model
        separate = self.args.adapters == "separate"
        check_quantized_modules(model)
        keep_gradients_on_cpu(model)
        keep_saved_names(model)
        if isinstance(model, PeftModel):
            if "ref" in model.peft_config:
                # TRL's copy of a pretrained adapter; the reference here is the base
                model.delete_adapter("ref")
            keep_adapters_precise(model)
            if lora_configs is not None and separate:
                # TRL has just seeded the processes differently; adapters must start equal on all of them
                set_seed(self.args.seed + 1)
                add_role_adapter(model, lora_configs[PROPOSER])
                set_seed(self.args.seed, device_specific=True)
            expected = set(ADAPTER_OF.values()) if separate else {ADAPTER_OF[SOLVER]}
            if set(model.peft_config) != expected:
                raise ValueError(
                    f"The `PeftModel` has the adapters {sorted(model.peft_config)}, but adapters={self.args.adapters!r} "
                    f"needs exactly {sorted(expected)}. Load both roles, or pass the base model with `peft_config`."
                )
            check_adapted_modules(model, vision, self.args.freeze_vision_tower)
        elif self.args.freeze_vision_tower:
            for name in vision:
                model.get_submodule(name).requires_grad_(False)
        self.roles = RoleAdapters(model)
        warn_of_half_precision(self)

    def _set_up_sharing(self, vision: list[str]) -> None:
        """What is computed once for all samples of a group, and for both roles."""
        self._share_prefix = self._share_features = self._share_prefill = False
        self._sharing_verified = False
        if not self.args.shared_prefix:
            return
        reason = why_not_shared(self.model)
        if reason is not None:
            logger.warning(
                "The prompt is computed once per answer rather than once per question: %s. Set `shared_prefix=False` to "
                "silence this.",
                reason,
            )
            return
        models = (
            [self.model] if self.ref_model is None else [self.model, self.accelerator.unwrap_model(self.ref_model)]
        )
        for model in models:
            install_shared_attention(model)
        self._share_prefix = True
        seeing = [base_model(self.model).get_submodule(name) for name in vision]
        self._share_features = not any(p.requires_grad for module in seeing for p in module.parameters())
        reason = why_not_generated_shared(self.generation_config)
        if reason is None:
            self._share_prefill = True
        else:
            logger.warning("Generation encodes the prompt once per answer rather than once per question: %s.", reason)

    def _describe(self, vision: list[str]) -> str:
        """What is trained, what is frozen, and the memory for images of `max_pixels` or else of the first one's size."""
        args = self.args
        if args.max_pixels is None:
            image = next(iter(self._images))["image"]
        else:
            side = math.isqrt(args.max_pixels)
            image = Image.new("RGB", (side, side))
        messages = self.prompts.solver_messages("")
        (prompt,) = encode_prompts(self.processing_class, [messages], [image], **self.chat_template_kwargs)
        tokens = prompt.input_ids.numel()
        grid = prompt.image_inputs.get("image_grid_thw")
        return describe(
            self.roles,
            vision,
            args,
            Prompt(tokens + args.max_question_length, tokens if grid is None else int(grid.prod())),
            Sharding.of(self.accelerator),
            self._share_prefix,
            None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model),
        )

    def _begin_run(self) -> None:
        """The state of a run at its start. That of a checkpoint is loaded later."""
        self.kl = {role: self._adaptive_kl(role) for role in ROLES}
        self.baselines = {role: EMABaseline(self.args.baseline_momentum) for role in ROLES}
        self._set_up_records()
        self._pending_questions: list[Sample] = []  # asked since the proposer's last step
        self._step = 0  # TRL's count of micro-batches
        self._micro_batches: list[list[_Part]] = []  # of the current optimizer step
        self._step_seconds: defaultdict[str, float] = defaultdict(float)  # of the current optimizer step, by stage
        self._metrics["train"].clear()

    def _adaptive_kl(self, role: str) -> AdaptiveKL:
        args = self.args
        own = role == PROPOSER
        beta = args.proposer_beta if own and args.proposer_beta is not None else args.beta
        target = args.proposer_kl_target if own and args.proposer_kl_target is not None else args.kl_target
        return AdaptiveKL(
            beta=beta,
            target=target,
            rate=args.kl_rate if args.adaptive_kl else 0.0,
            min_beta=min(beta, args.beta_max) if args.beta_min is None else args.beta_min,
            max_beta=args.beta_max,
        )

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ["image"]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Makes the optimizer that `args.optim` names, with parameter groups by role, of which one is stepped at a time."""
        model = self.model if model is None else model
        if self.optimizer is None:
            optimizer_class, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, model
            )
            decayed = set(self.get_decay_parameter_names(model))
            groups = defaultdict(list)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups[self.roles.role_of(name), name in decayed].append(parameter)
            params = [
                {"params": group, "role": role, "weight_decay": self.args.weight_decay if decay else 0.0}
                for (role, decay), group in groups.items()
            ]
            self.optimizer_cls_and_kwargs = (
                role_optimizer(engine_optimizer(optimizer_class, self.accelerator), self.roles),
                {**kwargs, "params": params},
            )
        super().create_optimizer(model)
        self._check_optimizer()
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """
        Yields, per micro-batch, a list of image rows: this process's images of a rollout at the first micro-batch of a
        solver step, and nothing otherwise. GRPOTrainer's loader yields every row N times per micro-batch instead.
        """
        position = {
            "schedule": self.schedule,
            "images_per_process": self.args.images_per_process,
            "micro_batches": self.args.gradient_accumulation_steps,
            "rank": self.accelerator.process_index,
            "world_size": self.accelerator.num_processes,
        }
        workers = self.args.dataloader_num_workers
        # Images are preprocessed here, in the loader's workers
        collator = ProposerCollator(
            self.processing_class, self.prompts.proposer_messages(), **self.chat_template_kwargs
        )
        order = {"seed": self.args.seed, "shuffle": bool(self.args.shuffle_dataset)}
        if isinstance(self._images, ReadableImageStream):
            if workers > 1:
                logger.warning("A stream is read by one worker, not %d, to keep its order.", workers)
            images = EndlessImages(self._images, **order)
            self._image_order = RolloutStream(images, collate_fn=collator, num_workers=min(workers, 1), **position)
            return _RolloutLoader(self._image_order, batch_size=None, collate_fn=as_it_is)
        self._image_order = RolloutSampler(len(self._images), **order, **position)
        return _RolloutLoader(self._images, batch_sampler=self._image_order, num_workers=workers, collate_fn=collator)

    # ------------------------------------------------------------------------------------------------------------
    # One optimizer step: propose, solve, vote, reward, role batch, loss

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        Trains as the parent does, and leaves the model as the solver whichever role was trained last. Each call is a run:
        without a checkpoint it goes on from the weights alone, and renames the rollout log of the run before.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Folder of a checkpoint. `True`: the last one in `args.output_dir` that was written to its end; if there is
                none, training starts from the beginning.
        """
        self._begin_run()  # whatever an earlier call has left, be it in the middle of a step
        self._drop_rollout()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                logger.warning(
                    "%s has no complete checkpoint: training starts from the beginning.", self.args.output_dir
                )
        elif resume_from_checkpoint:
            check_complete(resume_from_checkpoint)
        sharded = (
            self.is_fsdp_enabled
            and self.accelerator.state.fsdp_plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
        )
        if resume_from_checkpoint and (self.is_deepspeed_enabled or sharded) and self.accelerator.is_main_process:
            logger.warning(
                "Checkpoints of DeepSpeed and sharded ones of FSDP are read as pickles, which can run code. Resume only from "
                "one that you wrote."
            )
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            self._leave_servers()
            raise
        finally:
            self.roles.activate(SOLVER)
        if self.args.write_report and self.accelerator.is_main_process:
            self._write_report()
        return result

    def _run_epoch(self, *args, **kwargs):
        """As the parent, which trains one step too many when a run that has come to its end is resumed."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch):
        """One micro-batch of one role's step. `inputs` are the image rows of the step's rollout, or nothing."""
        micro_batches = self.args.gradient_accumulation_steps
        if self._step % micro_batches == 0:
            self._begin_step(inputs)
        # Stays until after the backward, which may recompute the forward, and within which DeepSpeed makes its step: no role
        # where there is no question within the agreement band, or no completion that ended, lest momentum move anything
        self.roles.activate(self.role if self._step_tokens else None)
        reference = self._step_seconds["reference"]
        with self._timed("update"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_seconds["update"] -= self._step_seconds["reference"] - reference
        if self._step % micro_batches == 0:  # the parent has counted this micro-batch
            self._end_step()
        return loss

    def _begin_step(self, rows: list[dict]) -> None:
        self.roles.check()
        self.role = self.schedule.role(self.state.global_step)
        if self.role == SOLVER:
            samples = self._roll_out(rows)
        else:
            samples, self._pending_questions = self._pending_questions, []
            self._send_next_rollout()
        self._set_step_samples(samples)

    def _roll_out(self, rows: list[dict]) -> list[Sample]:
        """Images to the solver's samples; the questions wait for the proposer's step."""
        drawn = self._draw(rows)
        questions = [image.question for image in drawn]
        answers = [[read_answer(text) for text in image.completions] for image in drawn]
        votes = [vote([canonical_answer(answer.text) for answer in group]) for group in answers]

        solver, proposer = self._rewards(questions, answers, votes)
        proposer = self._penalised(proposer, questions, votes, [image.blind_answers for image in drawn])
        solver = self._add_reward_funcs(solver, rows, drawn)
        trained = [_within(v.agreement, self.args.agreement_band) for v in votes]
        solver_advantages = self._advantages(SOLVER, solver, trained)
        (proposer_advantages,) = self._advantages(PROPOSER, [proposer], [True])

        step = self.state.global_step
        rollouts = [
            Rollout(
                image_id=str(rows[i]["image_id"]),
                question_completion=image.question_text,
                question=image.question,
                completions=image.completions,
                answers=answers[i],
                tokens=[len(ids) for ids in image.answer_ids],
                vote=votes[i],
                blind_answers=image.blind_answers,
                solver_rewards=solver[i],
                solver_advantages=solver_advantages[i],
                proposer_reward=proposer[i],
                proposer_advantage=proposer_advantages[i],
                solver_step=step + 1 if trained[i] else None,
                proposer_step=self._proposer_step(step),
                image_digest=image_digest(rows[i]["image"]),
            )
            for i, image in enumerate(drawn)
        ]
        self._record(rollouts, rows)
        if self.args.train_proposer:
            self._pending_questions += self._question_samples(drawn, proposer_advantages)
        samples = self._answer_samples(drawn, solver_advantages)
        self._spare_sample = samples[0][0]
        return [sample for group, chosen in zip(samples, trained, strict=True) if chosen for sample in group]

    def _draw(self, rows: list[dict]) -> "list[_Drawn]":
        """A question about each image and the answers to it, by the servers or by the model that is trained."""
        question_logps = answer_logps = [None] * len(rows)
        if self.servers is None:
            with self._sampling() as model:
                with self._timed("propose"):
                    question_prompts = self._question_prompts(model, rows)
                    question_ids, question_texts, questions = self._propose(model, rows, question_prompts)
                with self._timed("solve"):
                    answer_prompts, answer_ids, completions = self._solve(model, rows, question_prompts, questions)
                blind = self._solve_blind(model, rows, questions)
        else:
            written = self._served_rollout(rows)
            self._send_next_rollout()
            question_ids = [image.question.ids for image in written]
            question_logps = [image.question.logps for image in written]
            question_texts, questions = self._read_questions(question_ids)
            with self._sampling() as model:
                question_prompts = self._question_prompts(model, rows)
                blind = self._solve_blind(model, rows, questions)  # here, since a server is asked about images alone
            answer_prompts = self._answer_prompts(rows, question_prompts, questions, self.processing_class)
            answer_ids = [[answer.ids for answer in image.answers] for image in written]
            answer_logps = [[answer.logps for answer in image.answers] for image in written]
            completions = [self._decode(group) for group in answer_ids]
        asked = (question_prompts, question_ids, question_logps, question_texts, questions)
        answered = (answer_prompts, answer_ids, answer_logps, completions, blind)
        return [_Drawn(*image) for image in zip(*asked, *answered, strict=True)]

    def _question_samples(self, drawn: "list[_Drawn]", advantages: list[float]) -> list[Sample]:
        """The proposer's samples, a question per image."""
        return [
            Sample(
                image.question_prompt.without_pixels() if self._sharing_verified else image.question_prompt,
                torch.tensor(image.question_ids),
                advantage,
                None if image.question_logps is None else torch.tensor(image.question_logps),
            )
            for image, advantage in zip(drawn, advantages, strict=True)
        ]

    def _answer_samples(self, drawn: "list[_Drawn]", advantages: list[list[float]]) -> list[list[Sample]]:
        """The solver's samples, N per image; answers that vote alone are left out."""
        return [
            [
                Sample(
                    image.answer_prompt,
                    torch.tensor(image.answer_ids[n]),
                    advantage,
                    None if image.answer_logps is None else torch.tensor(image.answer_logps[n]),
                )
                for n, advantage in enumerate(group)
            ]
            for image, group in zip(drawn, advantages, strict=True)
        ]

    def _question_prompts(self, model, rows: list[dict]) -> list[EncodedPrompt]:
        """The proposer's prompts, with what a frozen vision tower makes of their images."""
        prompts = [row["prompt"] for row in rows]
        return with_features(model, prompts) if self._share_features else prompts

    def _answer_prompts(self, rows, question_prompts, questions, processor: ProcessorMixin) -> list[EncodedPrompt]:
        """The solver's prompts for questions about images that are encoded already."""
        conversations = [self.prompts.solver_messages(question.text) for question in questions]
        images = [row["image"] for row in rows]
        return encode_about(processor, conversations, question_prompts, images, **self.chat_template_kwargs)

    def _propose(
        self, model, rows: list[dict], prompts: list[EncodedPrompt]
    ) -> tuple[list[list[int]], list[str], list[Question]]:
        """One question per image."""
        ids = [group[0] for group in self._generate_role(model, PROPOSER, prompts, self._seeds(PROPOSER, rows, 1))]
        return ids, *self._read_questions(ids)

    def _read_questions(self, ids: list[list[int]]) -> tuple[list[str], list[Question]]:
        """What the proposer's completions say, and the questions in them."""
        texts = self._decode(ids)
        return texts, [read_question(text, self.prompts.default_question, self._special_tokens) for text in texts]

    def _solve(
        self, model, rows: list[dict], question_prompts: list[EncodedPrompt], questions: list[Question]
    ) -> tuple[list[EncodedPrompt], list[list[list[int]]], list[list[str]]]:
        """N answers, and the extra votes, per question."""
        prompts = self._answer_prompts(rows, question_prompts, questions, self.processing_class)
        seeds = self._seeds(SOLVER, rows, self.args.num_votes)
        if self.args.early_votes:
            ids = self._vote_in_turn(model, prompts, seeds)
        else:
            ids = self._generate_role(model, SOLVER, prompts, seeds)
        return prompts, ids, [self._decode(group) for group in ids]

    def _solve_blind(self, model, rows: list[dict], questions: list[Question]) -> list[list[str | None] | None]:
        """
        The canonical answers of the solver to the first `blind_questions` questions, or to all of them where they count
        in the proposer's reward, in a conversation without the image; `None` for the others.
        """
        count = len(rows) if self.args.blind_weight else min(self.args.blind_questions, len(rows))
        blind: list[list[str | None] | None] = [None] * len(rows)
        if count == 0:
            return blind
        conversations = [
            self.prompts.solver_messages(question.text, with_image=False) for question in questions[:count]
        ]
        prompts = encode_prompts(self.processing_class, conversations, None, **self.chat_template_kwargs)
        seeds = self._seeds("blind", rows, self.args.num_generations)[:count]
        with self._timed("solve_blind"):
            ids = self._generate_role(model, SOLVER, prompts, seeds)
        blind[:count] = [self._canonical(group) for group in ids]
        return blind

    def _vote_in_turn(self, model, prompts: list[EncodedPrompt], seeds: list[list[int]]) -> list[list[list[int]]]:
        """The trained answers, and extra votes one by one while the majority can change and the gate is not sure."""
        n = self.args.num_generations
        ids = self._generate_role(model, SOLVER, prompts, [group[:n] for group in seeds])
        active = list(range(len(prompts)))
        for drawn in range(n, self.args.num_votes):
            votes = [vote(self._canonical(ids[i])) for i in active]
            remaining = self.args.num_votes - drawn
            active = [i for i, cast in zip(active, votes, strict=True) if not is_settled(cast, remaining)]
            if self.vote_gate is not None and active:
                with self.roles.using(SOLVER):
                    asked, last = [prompts[i] for i in active], [ids[i][-1] for i in active]
                    scores = self.vote_gate(end_states(model, asked, last, self._tokenizer.pad_token_id))
                sure = (scores > self.vote_gate.threshold).tolist()
                active = [i for i, enough in zip(active, sure, strict=True) if not enough]
            if not active:
                break
            further = self._generate_role(
                model, SOLVER, [prompts[i] for i in active], [[seeds[i][drawn]] for i in active]
            )
            for i, (completion,) in zip(active, further, strict=True):
                ids[i].append(completion)
        return ids

    def _rewards(
        self, questions: list[Question], answers: list[list], votes: list[Vote]
    ) -> tuple[list[list[float]], list[float]]:
        """The solver's rewards, of the N trained answers of each question, and the proposer's, one per question."""
        args = self.args
        n = args.num_generations
        if args.reward == "discrete":
            solver = [discrete_solver_rewards(v)[:n] for v in votes]
            proposer = [discrete_proposer_reward(v) for v in votes]
        else:
            solver = [
                solver_rewards(
                    v,
                    [answer.words_before for answer in group],
                    gamma=args.solver_gamma,
                    length_weight=args.length_weight,
                    length_target=args.length_target,
                    length_cap=args.length_cap,
                )[:n]
                for v, group in zip(votes, answers, strict=True)
            ]
            scale = entropy_scale(args.num_votes)
            mean, std = args.proposer_entropy_mean, args.proposer_entropy_std
            mean = PROPOSER_ENTROPY_MEAN * scale if mean is None else mean
            std = PROPOSER_ENTROPY_STD * scale if std is None else std
            proposer = [proposer_reward(v.entropy, mean=mean, std=std) for v in votes]
        # A malformed question is answered, so that the solver loses nothing, but earns its proposer nothing
        proposer = [r if q.well_formed else 0.0 for r, q in zip(proposer, questions, strict=True)]
        return solver, proposer

    def _penalised(
        self,
        rewards: list[float],
        questions: list[Question],
        votes: list[Vote],
        blind: list[list[str | None] | None],
    ) -> list[float]:
        """The proposer's rewards less what repeated questions, and those solved without the image, cost."""
        args = self.args
        repeated = [0.0] * len(rewards)
        if args.diversity_weight:
            shares = cluster_shares(gather_object([question.text for question in questions]))
            self._log_train("question_cluster_share", sum(shares) / len(shares))
            first = self.accelerator.process_index * len(rewards)
            repeated = shares[first : first + len(rewards)]
        return [
            penalised_proposer_reward(
                reward,
                cluster_share=share,
                blind_share=blind_share(cast, answers) if args.blind_weight else 0.0,
                diversity_weight=args.diversity_weight,
                blind_weight=args.blind_weight,
            )
            for reward, share, cast, answers in zip(rewards, repeated, votes, blind, strict=True)
        ]

    def _add_reward_funcs(
        self, solver: list[list[float]], rows: list[dict], drawn: "list[_Drawn]"
    ) -> list[list[float]]:
        """Adds the user's `reward_funcs`, called as GRPOTrainer calls them, to the agreement rewards."""
        if not self.reward_funcs:
            return solver
        n = self.args.num_generations
        inputs = [
            {**row, "question": image.question.text} for row, image in zip(rows, drawn, strict=True) for _ in range(n)
        ]
        prompts = [self.prompts.solver_messages(row["question"]) for row in inputs]
        texts = [[{"role": "assistant", "content": text}] for image in drawn for text in image.completions[:n]]
        ids = [completion for image in drawn for completion in image.answer_ids[:n]]
        per_func = self._calculate_rewards(inputs, prompts, texts, ids)  # (rows of all processes, functions)
        for name, column in zip(self.reward_func_names, per_func.T, strict=True):
            self._log_train(f"rewards/{name}/mean", column.nanmean().item())
        local = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        extra = (per_func * self.reward_weights.to(per_func.device)).nansum(dim=1)[local].view(-1, n).tolist()
        return [[a + b for a, b in zip(*groups, strict=True)] for groups in zip(solver, extra, strict=True)]

    def _advantages(self, role: str, groups: list[list[float]], trained: list[bool]) -> list[list[float]]:
        """
        Rewards minus baseline. The moving average is fixed for the whole rollout, over the groups of all processes that are
        trained on, and moves once after it.
        """
        rewards = torch.tensor(groups, device=self.accelerator.device)
        counted = rewards[torch.tensor(trained, device=rewards.device)]
        sums = torch.stack([counted.sum(), torch.ones_like(counted).sum()])
        total, count = self.accelerator.gather(sums[None]).sum(dim=0).tolist()
        mean = total / count if count else None
        if self.args.baseline == "group" and role == SOLVER:
            baseline = rewards.mean(dim=1, keepdim=True)
        elif self.args.baseline == "group":
            baseline = mean  # the questions of a rollout are the proposer's group
        elif count:
            baseline = self.baselines[role].start(mean)
            self.baselines[role].update(mean)
        else:
            baseline = self.baselines[role].value or 0.0  # of what is recorded alone
        if count:
            self._log_train(f"{role}/baseline", mean if self.args.baseline == "group" else baseline)
        return (rewards - baseline).tolist()

    def _set_step_samples(self, samples: list[Sample]) -> None:
        """The role batch: all samples of the step, over its micro-batches and their parts."""
        tokens = [sample.completion_ids.numel() if self._counts(sample) else 0 for sample in samples]
        advantages = sum(sample.advantage != 0 for sample, count in zip(samples, tokens, strict=True) if count)
        everywhere = gather_object([(tokens, advantages)])
        self._step_rows = sum(len(tokens) for tokens, _ in everywhere)
        self._step_tokens = sum(sum(tokens) for tokens, _ in everywhere)
        self._step_advantages = sum(advantages for _, advantages in everywhere)
        # TRL's metrics, each part's by its share of the step's tokens
        self._step_metrics: defaultdict[str, float] = defaultdict(float)
        if samples:
            self._spare_sample = samples[0]

        # Every process must run the same forwards, of as many rows, since TRL gathers metrics by row: those that a process
        # has fewer of than another are filled up with rows that do not count
        most = max(len(tokens) for tokens, _ in everywhere)

        def parts(rows: list) -> list[list[list]]:
            rows = [*rows, *[None] * (most - len(rows))]
            most_rows = self.args.per_device_train_batch_size
            groups = most_rows // self.args.num_generations
            # A group is whole where the batch size has room for one. The proposer has a prompt per row: as many of them at a
            # time as the solver has, lest it need more memory
            group_size = self.args.num_generations if self.role == SOLVER and groups else 1
            if groups or self.role == PROPOSER:
                most_rows = max(1, groups) * group_size
            micro_batches = split_evenly(rows, self.args.gradient_accumulation_steps, group_size)
            return [[m[i : i + most_rows] for i in range(0, len(m), most_rows)] or [[None]] for m in micro_batches]

        counts = [parts(tokens) for tokens, _ in everywhere]
        self._micro_batches = [
            [
                _Part(part, sum(count or 0 for process in counts for count in process[i][j]))
                for j, part in enumerate(micro_batch)
            ]
            for i, micro_batch in enumerate(parts(samples))
        ]

    def _counts(self, sample: Sample) -> bool:
        """Whether a sample's tokens are trained on: with `mask_truncated_completions`, only if it has ended."""
        return not self.mask_truncated_completions or sample.completion_ids[-1].item() in self.eos_token_ids

    def _prepare_inputs(self, inputs) -> "list[_Part]":
        """The parts of the current micro-batch."""
        return self._micro_batches[self._step % self.args.gradient_accumulation_steps]

    def _batch(self, part: "_Part") -> dict:
        """The tensors that TRL's loss reads, with the reference's log-probs."""
        counts = [sample is not None and self._counts(sample) for sample in part.samples]
        samples = [self._spare_sample if sample is None else sample for sample in part.samples]
        if self.role not in self._first_batch_checked and part.tokens:
            self._check_first_batch(samples, counts)
            self._first_batch_checked.add(self.role)
        batch = self._collate(samples, counts, shared=self._share_prefix)
        if self.kl[self.role].beta != 0.0:
            with self._timed("reference"), torch.no_grad():
                batch["ref_per_token_logps"] = self._reference_logps(batch)
        return batch

    def _unpenalised_kl(self, batch: dict, reference: torch.Tensor) -> float:
        """The KL to the frozen base of the forward just made, where no penalty needs it."""
        mask = batch["completion_mask"]
        kl = torch.stack([(sampled_kl(self._last_logps, reference) * mask).sum(), mask.sum()])
        total, tokens = self.accelerator.gather(kl[None]).sum(0).tolist()
        return total / max(tokens, 1.0)

    def _collate(self, samples: list[Sample], counts: list[bool], shared: bool) -> dict:
        pad_token_id = self._tokenizer.pad_token_id
        if shared:
            batch = collate_completions(samples, pad_token_id)
            # TRL joins prompts and completions, and only the completions are read
            batch["prompt_ids"] = batch["prompt_mask"] = batch["completion_ids"][:, :0]
            batch["model_inputs"] = pack_groups(self.model, samples, counts)
        else:
            batch = collate_samples(samples, pad_token_id)
        batch["completion_mask"] *= torch.tensor(counts)[:, None]
        batch["num_items_in_batch"] = torch.tensor(self._step_tokens)
        return self._to_device(batch)

    def _reference_logps(self, batch: dict) -> torch.Tensor:
        """Log-probs of the frozen base: the model without any role's adapter, or TRL's reference model."""
        frozen_base = self.roles.reference() if self.ref_model is None else nullcontext()
        with frozen_base:
            return self._completion_logps(self.model if self.ref_model is None else self.ref_model, batch)

    def _completion_logps(self, model, batch: dict) -> torch.Tensor:
        """Log-probs of the completion tokens, of shape (rows, C)."""
        self._model_inputs = batch["model_inputs"]
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
        )[0]

    def _get_per_token_logps_and_entropies(self, model, *args, compute_entropy=False, **kwargs):
        """TRL's forward, a row per sample, or that of the packed groups."""
        inputs, self._model_inputs = self._model_inputs, None
        if isinstance(inputs, PackedGroups):
            with self.accelerator.autocast():
                logps, entropies = packed_logps(model, inputs, compute_entropy)
            outputs = (logps, entropies, None)
        else:
            # TRL hands on the image tensors of some families alone. Bound here, every family's reach the model
            model = partial(model, **inputs)
            outputs = super()._get_per_token_logps_and_entropies(
                model, *args, compute_entropy=compute_entropy, **kwargs
            )
        self._last_logps = outputs[0].detach()
        if self._weighed is not None:
            self._weigh(self._last_logps)
        return outputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch. All of its parts but the last go backward here, so that one is held at a time."""
        *parts, last = inputs
        loss = torch.zeros((), device=self.accelerator.device)
        for part in parts:
            with self._accumulating(model):
                part_loss = self._part_loss(model, part)
                options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
                self.accelerator.backward(part_loss, **options)
            loss += part_loss.detach()
        return loss + self._part_loss(model, last)

    @contextmanager
    def _accumulating(self, model) -> Iterator[None]:
        """A backward within, whose gradients are not yet exchanged between processes nor stepped on."""
        if not self.accelerator.sync_gradients:
            yield  # so it is already, for the whole micro-batch
            return
        state = self.accelerator.gradient_state
        state._set_sync_gradients(False)
        try:
            with nullcontext() if self.is_deepspeed_enabled else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(True)

    def _part_loss(self, model, part: "_Part") -> torch.Tensor:
        """TRL's loss with the active role's beta, as the mean over all samples of the step."""
        batch = self._batch(part)
        self.beta = self.kl[self.role].beta
        reference = None
        free = self.ref_model is None and isinstance(self.model, PeftModel)
        if self.beta == 0.0 and free and "kl" not in self._step_metrics and part.tokens:
            # Nothing holds the policy, and how far it has gone is seen on the step's first part, at little cost
            with self._timed("reference"), torch.no_grad():
                reference = self._reference_logps(batch)
        train_metrics, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        self._model_inputs = batch.pop("model_inputs")
        self._weighed = batch if self.servers is not None else None
        try:
            loss = super().compute_loss(model, batch)
        finally:
            part_metrics, self._metrics["train"] = self._metrics["train"], train_metrics
        if part.tokens == 0:
            return loss
        for name, (value,) in part_metrics.items():
            self._step_metrics[name] += value * part.tokens / self._step_tokens
        if reference is not None:
            self._step_metrics["kl"] = self._unpenalised_kl(batch, reference)
        if self.loss_type in _ROW_MEAN_LOSSES:
            micro_batches = self.args.gradient_accumulation_steps * self.accelerator.num_processes
            loss = loss * (len(part.samples) * micro_batches / self._step_rows)
        return loss

    def _end_step(self) -> None:
        for name, seconds in self._step_seconds.items():
            self._log_train(f"time/{name}", seconds)
        self._step_seconds.clear()
        if self.servers is not None:
            self._log_sampling_difference()
        if self._step_tokens == 0:
            self.optimizer.zero_grad(set_to_none=True)  # for an optimizer of the user's, which knows no roles
            return
        self._set_moved(self.role)
        self._log_train(f"{self.role}/beta", self.kl[self.role].beta)
        for name, value in self._step_metrics.items():
            self._log_train(f"{self.role}/{name}", value)
        if self.beta != 0.0:
            self.kl[self.role].update(self._step_metrics["kl"])

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        value = float(grad_norm)
        self._log_train(f"{self.role}/grad_norm", value)
        self._log_train(f"{self.role}/learning_rate", self._get_learning_rate())
        if self.role not in self._first_step_checked and self._step_advantages:
            self._check_first_gradient(value)
            self._first_step_checked.add(self.role)
        return grad_norm

    # ------------------------------------------------------------------------------------------------------------
    # Generation

    def _decode(self, ids: list[list[int]]) -> list[str]:
        return self._tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _canonical(self, ids: list[list[int]]) -> list[str | None]:
        """The canonical answers in completions."""
        return [canonical_answer(read_answer(text).text) for text in self._decode(ids)]

    def _seeds(self, role: str, rows: list[dict], samples: int, step: int | None = None) -> list[list[int]]:
        """One seed per image and sample of a step, the same however the images are spread over processes."""
        first = self.accelerator.process_index * len(rows)  # the rows' place in the rollout of all processes
        key = (self.args.seed, self.state.global_step if step is None else step, role)
        return [
            [sample_seed(*key, first + i, row["image_id"], n) for n in range(samples)] for i, row in enumerate(rows)
        ]

    def _generation_config(self, role: str) -> GenerationConfig:
        config = GenerationConfig.from_dict(self.generation_config.to_dict())
        config.max_new_tokens = self.args.max_question_length if role == PROPOSER else self.args.max_completion_length
        # A sampled placeholder has no image behind it, and the next forward fails on it
        model_config = self.model.config
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        placeholders = {getattr(model_config, name, None) for name in names} - {None, *self.eos_token_ids}
        config.suppress_tokens = sorted(placeholders | set(config.suppress_tokens or []))
        return config

    @contextmanager
    def _sampling(self) -> Iterator[PreTrainedModel | PeftModel]:
        """The unwrapped model to sample from."""
        training = self.model.training
        self.model.eval()  # without dropout: the policy that is sampled is the one that is trained
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=True,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            whole_weights(self.model),
            self.compute_loss_context_manager(),
        ):
            yield model
        self.model.train(training)

    def _generate_role(
        self, model, role: str, prompts: Sequence[EncodedPrompt], seeds: Sequence[Sequence[int | None]]
    ) -> list[list[list[int]]]:
        """One completion by one role per seed of each prompt; greedy where the seed is `None`."""
        with self.roles.using(role):
            sample = generate_shared if self._share_prefill else generate
            return sample(model, prompts, seeds, self._generation_config(role))

    def _answer(
        self, prompts: Sequence[EncodedPrompt], seeds: Sequence[Sequence[int | None]]
    ) -> list[list[list[int]]]:
        """The solver's completions for labelled questions."""
        if self.servers is not None:
            return self._answers_by_servers(prompts, seeds)
        with self._sampling() as model:
            return self._generate_role(model, SOLVER, prompts, seeds)

    def _to_device(self, batch: dict) -> dict:
        return send_to_device(batch, self.accelerator.device)

    # ------------------------------------------------------------------------------------------------------------
    # Records

    def _proposer_step(self, step: int) -> int | None:
        """The optimizer step, counted from 1, that will train on questions asked at `step`; `None` if the run ends first."""
        next_step = self.schedule.next_proposer_step(step)
        return next_step + 1 if next_step is not None and next_step < self.state.max_steps else None

    def _log_train(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        self._step_seconds[name] += time.perf_counter() - start


@dataclass(frozen=True)
class _Drawn:
    """
    What was drawn for an image.

    Args:
        question_prompt, answer_prompt ([`EncodedPrompt`]):
            What the two roles were shown.
        question_ids (`list[int]`), answer_ids (`list[list[int]]`):
            Token ids of the question's completion and of each answer's.
        question_logps (`list[float]` or `None`), answer_logps (`list[list[float]]` or `None`):
            Log-probs under which a server drew them.
        question_text (`str`), question ([`Question`]):
            The proposer's completion, and the question in it.
        completions (`list[str]`):
            The solver's completions.
        blind_answers (`list[str or None]` or `None`):
            Canonical answers without the image, where they were asked for.
    """

    question_prompt: EncodedPrompt
    question_ids: list[int]
    question_logps: list[float] | None
    question_text: str
    question: Question
    answer_prompt: EncodedPrompt
    answer_ids: list[list[int]]
    answer_logps: list[list[float]] | None
    completions: list[str]
    blind_answers: list[str | None] | None


@dataclass(frozen=True)
class _Part:
    """
    Rows of a micro-batch that are computed at a time.

    Args:
        samples (`list[Sample or None]`):
            This process's rows; `None` where another process has one more.
        tokens (`int`):
            Completion tokens that count, over all processes.
    """

    samples: list[Sample | None]
    tokens: int


class _RolloutLoader(DataLoader):
    """A `DataLoader` that tells its batch sampler the epoch, as transformers asks of a loader."""

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.batch_sampler, RolloutSampler):
            self.batch_sampler.set_epoch(epoch)


def _agreement_only(**kwargs):
    raise AssertionError("the agreement reward is not a reward function")


def _within(agreement: float, band: tuple[float, float] | None) -> bool:
    return band is None or band[0] <= agreement <= band[1]
