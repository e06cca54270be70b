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

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments
from trl import GRPOConfig

from .health.guard import CollapseGuard
from .prompts import RolePrompts


# Rollouts of a run over a stream, whose length nobody knows (EvoLMM: 6,000 solver steps).
DEFAULT_STREAM_ROLLOUTS = 6000


@dataclass
class EvoLMMConfig(GRPOConfig):
    r"""
    Configuration class for the [`EvoLMMTrainer`].

    It holds the parameters that EvoLMM adds to [`~trl.GRPOConfig`] or whose defaults it changes; all others are
    inherited. `EvoLMMConfig(output_dir=...)` is a complete configuration.

    Parameters:
        num_generations (`int`, *optional*, defaults to `5`):
            Answers N per question that are voted on and trained on (EvoLMM: 5).
        extra_votes (`int`, *optional*, defaults to `0`):
            Answers per question that count in the vote and are not trained on. Votes cost generation only.
        early_votes (`bool`, *optional*, defaults to `False`):
            Draw the extra votes in turn, and no more of them once the majority cannot change or the trainer's `vote_gate`
            is sure. The continuous rewards are then biased; the solver's discrete one is not, without a gate.
        blind_questions (`int`, *optional*, defaults to `0`):
            Questions per process and rollout that are also answered N times without the image, for the metric
            `blind_solved`.
        max_completion_length (`int`, *optional*, defaults to `128`):
            Longest answer, in tokens (EvoLMM's code: 128).
        max_question_length (`int`, *optional*, defaults to `128`):
            Longest question, in tokens (EvoLMM's code: 128).
        image_root (`str`, *optional*):
            Folder that image paths in a dataset start from and may not leave. If `None`, the working directory. Folders
            given to `load_images` are allowed without it.
        max_pixels (`int`, *optional*, defaults to `1003520`):
            Images with more pixels are made smaller (1003520 = 1280 x 28 x 28, at most 1,280 image tokens of Qwen2.5-VL).
        rollout (`str`, *optional*, defaults to `"transformers"`):
            What generates: `"transformers"`, the model that is trained, or `"vllm"`, servers that hold its frozen base and
            get the roles' adapters.
        vllm_server_urls (`list[str]`, *optional*):
            With `rollout="vllm"`: addresses of the servers, such as `["http://localhost:8000"]`.
        vllm_adapter_dir (`str`, *optional*):
            Folder for the adapters that the servers load, which they must be able to read under the same path. `None`:
            `vllm_adapters` in `output_dir`.
        vllm_request_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds that a request may take before it is sent again.
        vllm_importance_sampling_mode (`str`, *optional*, defaults to `"token_truncate"`):
            How the ratio of the trainer's probability to the server's weighs a sample; see [`~trl.GRPOConfig`].
        async_rollouts (`bool`, *optional*, defaults to `False`):
            With `rollout="vllm"`: the servers generate the next step's rollout while the trainer updates on this one's,
            which is then one step off-policy.
        prompts (`dict[str, str]` or `str`, *optional*):
            Replacements for the roles' prompts: `proposer`, `solver` (with the field `{question}`), `system`,
            `default_question`. See [`RolePrompts`]. On the command line, a JSON object.
        reward (`str`, *optional*, defaults to `"continuous"`):
            `"continuous"`: the paper's rewards, from the share of each answer and the entropy of all. `"discrete"`: the
            majority vote the paper compares with.
        solver_gamma (`float`, *optional*, defaults to `0.7`):
            Exponent of the share in the solver's reward (EvoLMM: 0.7).
        length_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the penalty on words before the answer (EvoLMM: 0.1).
        length_target (`int`, *optional*, defaults to `6`):
            Words before the answer that are free (EvoLMM: 6).
        length_cap (`float` or `None`, *optional*, defaults to `1.0`):
            Largest relative excess length that is penalised (EvoLMM's code: 1.0; its paper: `None`, no limit).
        proposer_entropy_mean (`float`, *optional*):
            Answer entropy, in nats, that is worth most to the proposer. `None`: 0.90 (EvoLMM, N = 5) times ln N / ln 5.
        proposer_entropy_std (`float`, *optional*):
            Width of that optimum, in nats. `None`: 0.35 (EvoLMM, N = 5) times ln N / ln 5.
        baseline (`str`, *optional*, defaults to `"ema"`):
            What a reward is compared with. `"ema"`: the moving average of the role's mean reward (EvoLMM). `"group"`: the
            mean over the answers to the question; for the proposer, over the questions of the rollout.
        baseline_momentum (`float`, *optional*, defaults to `0.9`):
            Share of the old moving average that is kept (EvoLMM's code: 0.9).
        diversity_weight (`float`, *optional*, defaults to `0.0`):
            Weight of a penalty in the proposer's reward for questions that are like others of the rollout (R-Zero: 1).
        blind_weight (`float`, *optional*, defaults to `0.0`):
            Weight of a penalty in the proposer's reward for questions whose majority answer is the same without the image.
            Every question is then answered N times more, without the image.
        agreement_band (`list[float]`, *optional*):
            Train the solver only on questions whose agreement is within these bounds, both included. `None`: on all.
        proposer_update_every (`int`, *optional*, defaults to `5`):
            Solver steps between two proposer steps (EvoLMM: 5).
        train_proposer (`bool`, *optional*, defaults to `True`):
            Whether the proposer is trained. A proposer that is not asks as the base model does.
        adapters (`str`, *optional*, defaults to `"separate"`):
            With `peft_config`: `"separate"` adapters for the two roles (EvoLMM), or one `"shared"` by both.
        freeze_vision_tower (`bool`, *optional*, defaults to `True`):
            Keep the vision tower (projector included) as it is: no LoRA layers in it and no training of its weights.
        shared_prefix (`bool`, *optional*, defaults to `True`):
            Compute what the answers to one question share once: the image's way through the frozen vision tower, the
            prompt's encoding for generation, and the prompt in the policy's and the reference's forward. Exact, for
            Qwen2.5-VL and Qwen3-VL; other models take the plain path. `False`: the plain path, a row per answer.
        beta (`float`, *optional*, defaults to `0.001`):
            Weight of the KL penalty against the frozen base at the start (EvoLMM's code: 1e-3). 0: no reference model.
        adaptive_kl (`bool`, *optional*, defaults to `True`):
            Whether each role's beta follows its KL.
        kl_target (`float`, *optional*, defaults to `0.02`):
            KL that beta aims at, in nats per completion token (EvoLMM's code: 0.02).
        kl_rate (`float`, *optional*, defaults to `0.1`):
            Speed of beta (EvoLMM's code: 0.10).
        beta_min (`float`, *optional*):
            Smallest beta. `None`: the role's starting beta, since the KL starts at 0 and a lower floor is reached before
            the policy has moved (EvoLMM's code: 1e-8).
        beta_max (`float`, *optional*, defaults to `100.0`):
            Largest beta (EvoLMM's code: 1e2).
        proposer_beta (`float`, *optional*), proposer_kl_target (`float`, *optional*):
            The proposer's own `beta` and `kl_target`. `None`: the same as the solver's. The paper holds the proposer more
            loosely than the solver.
        collapse_guard (`str` or `dict`, *optional*):
            Adds a [`CollapseGuard`]: its arguments, such as `{"action": "rewind", "max_kl": 0.3}`, or `"stop"` or `"rewind"`
            for that action and the default thresholds. On the command line, a JSON object or the action.
        collect_preferences (`bool`, *optional*, defaults to `False`):
            Write the solver's disagreements to `output_dir/preferences.jsonl`, as pairs for [`SRDPOTrainer`]: an answer of
            the majority and one that differs.
        preference_agreement (`float`, *optional*, defaults to `0.8`):
            Smallest share of the majority at which a disagreement is written.
        write_report (`bool`, *optional*, defaults to `True`):
            Write a page about the run to `output_dir/_report/report.html` when training ends.
        report_images (`int`, *optional*, defaults to `300`):
            Thumbnails that are kept in `output_dir/_report/images` for the page, a uniform sample of the run's images. 0:
            none. What is in `_report` is not pushed to the Hub.
        learning_rate (`float`, *optional*, defaults to `1e-6`):
            Learning rate of both roles (EvoLMM: 1e-6).
        weight_decay (`float`, *optional*, defaults to `0.01`):
            Weight decay (EvoLMM's code: 0.01).
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Largest gradient norm (EvoLMM's code: 1.0).
        per_device_train_batch_size (`int`, *optional*):
            Answers per process and micro-batch. `None`: `num_generations`, so that a micro-batch is one image.
        per_device_eval_batch_size (`int`, *optional*):
            Labelled questions per process that are answered together. `None`: `num_generations_eval`, or else
            `num_generations`.
        gradient_accumulation_steps (`int`, *optional*, defaults to `4`):
            Micro-batches per optimizer step. With the default batch size: images per process and step.
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            How the loss is averaged; see [`~trl.GRPOConfig`]. `"grpo"`: over the tokens of each completion, then over
            completions (EvoLMM). `"dapo"`: over all tokens of the step. Not `"bnpo"`.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            Only `"none"`: dividing by the standard deviation of a group turns a unanimous group into a pure length reward.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["prompts", "collapse_guard"]

    # Defaults that differ from GRPOConfig
    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate for AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay (EvoLMM's code: 0.01)."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Largest gradient norm (EvoLMM's code: 1.0)."})
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Answers per process and micro-batch. `None`: `num_generations`, so that a micro-batch is one image."
        },
    )
    per_device_eval_batch_size: int | None = field(
        default=None,
        metadata={"help": "Labelled questions per process that are answered together. `None`: `num_generations`."},
    )
    gradient_accumulation_steps: int = field(
        default=4,
        metadata={
            "help": "Micro-batches per optimizer step. With the default batch size: images per process and step."
        },
    )
    num_generations: int | None = field(
        default=5, metadata={"help": "Answers N per question that are voted on and trained on (EvoLMM: 5)."}
    )
    max_completion_length: int | None = field(default=128, metadata={"help": "Longest answer, in tokens."})
    loss_type: str = field(
        default="grpo",
        metadata={
            "help": "How the loss is averaged; see `GRPOConfig`. 'grpo': over the tokens of each completion, then over "
            "completions (EvoLMM). 'dapo': over all tokens of the step."
        },
    )
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "Only 'none': dividing by the standard deviation of a group turns an unanimous group into a pure "
            "length reward."
        },
    )
    beta: float = field(
        default=0.001,
        metadata={"help": "Weight of the KL penalty against the frozen base at the start. 0: no reference model."},
    )

    # Rollout
    extra_votes: int = field(
        default=0, metadata={"help": "Answers per question that count in the vote and are not trained on."}
    )
    early_votes: bool = field(
        default=False,
        metadata={"help": "Draw the extra votes in turn, until the majority cannot change or the vote gate is sure."},
    )
    blind_questions: int = field(
        default=0, metadata={"help": "Questions per process and rollout that are also answered without the image."}
    )
    max_question_length: int = field(default=128, metadata={"help": "Longest question, in tokens."})
    rollout: str = field(
        default="transformers",
        metadata={
            "help": "What generates: the model that is trained, or vLLM servers.",
            "choices": ["transformers", "vllm"],
        },
    )
    vllm_server_urls: list[str] | None = field(
        default=None, metadata={"help": "Addresses of the vLLM servers, such as http://localhost:8000."}
    )
    vllm_adapter_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the adapters, which the servers must be able to read under the same path. None: "
            "vllm_adapters in output_dir."
        },
    )
    vllm_request_timeout: float = field(
        default=600.0, metadata={"help": "Seconds that a request to a server may take before it is sent again."}
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={
            "help": "How the ratio of the trainer's probability to the server's weighs a sample.",
            "choices": ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
        },
    )
    async_rollouts: bool = field(
        default=False,
        metadata={"help": "Let the servers generate the next step's rollout while the trainer updates on this one's."},
    )
    image_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder that image paths in a dataset start from and may not leave. None: the working directory. "
            "Folders given to `load_images` are allowed without it."
        },
    )
    max_pixels: int | None = field(
        default=1280 * 28 * 28, metadata={"help": "Images with more pixels are made smaller. `None`: no limit."}
    )
    prompts: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "Replacements for the roles' prompts: 'proposer', 'solver' (with the field {question}), 'system', "
            "'default_question'."
        },
    )

    # Reward and baseline
    reward: str = field(
        default="continuous",
        metadata={"help": "Agreement reward.", "choices": ["continuous", "discrete"]},
    )
    solver_gamma: float = field(default=0.7, metadata={"help": "Exponent of the share in the solver's reward."})
    length_weight: float = field(default=0.1, metadata={"help": "Weight of the penalty on words before the answer."})
    length_target: int = field(default=6, metadata={"help": "Words before the answer that are free."})
    length_cap: float | None = field(
        default=1.0,
        metadata={"help": "Largest relative excess length that is penalised. `None`: no limit."},
    )
    proposer_entropy_mean: float | None = field(
        default=None,
        metadata={"help": "Answer entropy worth most to the proposer, in nats. `None`: 0.90 * ln N / ln 5."},
    )
    proposer_entropy_std: float | None = field(
        default=None, metadata={"help": "Width of that optimum, in nats. `None`: 0.35 * ln N / ln 5."}
    )
    baseline: str = field(
        default="ema",
        metadata={"help": "What a reward is compared with.", "choices": ["ema", "group"]},
    )
    baseline_momentum: float = field(default=0.9, metadata={"help": "Share of the old moving average that is kept."})
    diversity_weight: float = field(
        default=0.0, metadata={"help": "Weight of the proposer's penalty for questions like others of the rollout."}
    )
    blind_weight: float = field(
        default=0.0, metadata={"help": "Weight of the proposer's penalty for questions solved without the image."}
    )
    agreement_band: list[float] | None = field(
        default=None,
        metadata={"help": "Train the solver only on questions whose agreement is within these two bounds."},
    )

    # Roles
    proposer_update_every: int = field(default=5, metadata={"help": "Solver steps between two proposer steps."})
    train_proposer: bool = field(default=True, metadata={"help": "Whether the proposer is trained."})
    adapters: str = field(
        default="separate",
        metadata={"help": "One LoRA adapter per role, or one for both.", "choices": ["separate", "shared"]},
    )
    freeze_vision_tower: bool = field(
        default=True, metadata={"help": "Keep the vision tower, projector included, as it is."}
    )

    shared_prefix: bool = field(
        default=True, metadata={"help": "Compute once what the answers to one question share."}
    )

    # KL
    adaptive_kl: bool = field(default=True, metadata={"help": "Whether each role's beta follows its KL."})
    kl_target: float = field(default=0.02, metadata={"help": "KL that beta aims at, in nats per completion token."})
    kl_rate: float = field(default=0.1, metadata={"help": "Speed of beta."})
    beta_min: float | None = field(default=None, metadata={"help": "Smallest beta. `None`: the role's starting beta."})
    beta_max: float = field(default=100.0, metadata={"help": "Largest beta."})
    proposer_beta: float | None = field(
        default=None, metadata={"help": "The proposer's own `beta`. `None`: the same."}
    )
    proposer_kl_target: float | None = field(
        default=None, metadata={"help": "The proposer's own `kl_target`. `None`: the same."}
    )

    # Health
    collapse_guard: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "End a run that collapses: 'stop', 'rewind' to the best checkpoint, or the arguments of CollapseGuard."
        },
    )

    # Preference pairs
    collect_preferences: bool = field(
        default=False,
        metadata={"help": "Write the solver's disagreements to output_dir/preferences.jsonl, as pairs for SR-DPO."},
    )
    preference_agreement: float = field(
        default=0.8, metadata={"help": "Smallest share of the majority at which a disagreement is written."}
    )

    # Report
    write_report: bool = field(
        default=True,
        metadata={"help": "Write a page about the run to output_dir/_report/report.html when training ends."},
    )
    report_images: int = field(
        default=300,
        metadata={"help": "Thumbnails that are kept in output_dir/_report/images for the page. 0: none."},
    )

    def __post_init__(self):
        if self.per_device_train_batch_size is None:
            self.per_device_train_batch_size = self.num_generations
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.num_generations_eval or self.num_generations
        if self.bf16 is None:
            # TRL's default is bf16 everywhere, which fails on a machine without a GPU unless use_cpu is set
            self.bf16 = not self.fp16 and (torch.cuda.is_available() or torch.xpu.is_available())
        if (self.per_device_train_batch_size * self.gradient_accumulation_steps) % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size ({self.per_device_train_batch_size}) times gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}) must be a multiple of num_generations ({self.num_generations}), so "
                "that every process holds all answers to each of its questions. "
                f"Set per_device_train_batch_size={self.num_generations}, or leave it unset."
            )
        super().__post_init__()
        self._check()

    # A dataclass makes its own, which would print `hub_token`
    __repr__ = TrainingArguments.__repr__

    def __getstate__(self) -> dict:
        """What is pickled into `training_args.bin`, which is pushed to the Hub: all but the token."""
        return {**self.__dict__, "hub_token": None}

    def _check(self) -> None:
        if self.use_vllm:
            raise ValueError(
                "`use_vllm=True` is not supported: TRL pushes the weights to vLLM once per step, for one policy, so the "
                "solver would sample from the proposer's weights or the other way round. Set rollout='vllm' and "
                "`vllm_server_urls`: the servers then hold the base and both roles' adapters."
            )
        if self.num_iterations != 1 or self.steps_per_generation != self.gradient_accumulation_steps:
            raise ValueError(
                f"Got num_iterations={self.num_iterations}, steps_per_generation={self.steps_per_generation} and "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: every rollout is trained on in exactly "
                "one optimizer step. Leave `num_iterations`, `steps_per_generation` and `generation_batch_size` unset and "
                "choose the images per step with `gradient_accumulation_steps`."
            )
        if self.model_init_kwargs and "token" in self.model_init_kwargs:
            raise ValueError(
                "`model_init_kwargs` holds a token, which would be written to logs and to training_args.bin. Log in with "
                "`hf auth login`, or set the environment variable HF_TOKEN."
            )
        if self.scale_rewards != "none":
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} is not supported: dividing by the standard deviation of a group "
                "turns an unanimous group into a pure length reward. Set scale_rewards='none'."
            )
        if self.ignore_data_skip:
            raise ValueError(
                "`ignore_data_skip=True` is not supported: a resumed run would read the images of other steps. A run finds "
                "its place without reading what came before. Set `ignore_data_skip=False`."
            )
        if self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model=True` is not supported: the reference is the frozen base, which both roles' KL is measured "
                "to. To hold the policy less, set a larger `kl_target`."
            )
        if self.loss_type == "bnpo":
            raise ValueError(
                "loss_type='bnpo' is not supported: it is a mean over the tokens of a micro-batch, and would depend on how a "
                "step is cut into them. Set loss_type='dapo', the mean over all tokens of the step."
            )
        if self.entropy_coef != 0.0 or self.use_adaptive_entropy:
            raise ValueError(
                f"entropy_coef={self.entropy_coef} and use_adaptive_entropy={self.use_adaptive_entropy} are not supported: "
                "the bonus is a mean over the tokens of a micro-batch, and would depend on how a step is cut into them. To "
                "hold the entropy near the base's, raise `beta`."
            )
        for name, allowed in (
            ("reward", ("continuous", "discrete")),
            ("baseline", ("ema", "group")),
            ("adapters", ("separate", "shared")),
            ("rollout", ("transformers", "vllm")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected one of {allowed}.")
        for name, expected, holds in (
            ("extra_votes", "0 or more", self.extra_votes >= 0),
            ("blind_questions", "0 or more", self.blind_questions >= 0),
            ("diversity_weight", "0 or more", self.diversity_weight >= 0),
            ("blind_weight", "0 or more", self.blind_weight >= 0),
            ("max_question_length", "1 or more", self.max_question_length >= 1),
            ("solver_gamma", "above 0 and at most 1", 0 < self.solver_gamma <= 1),
            ("length_weight", "0 or more", self.length_weight >= 0),
            ("length_target", "1 or more", self.length_target >= 1),
            ("kl_target", "above 0", self.kl_target > 0),
            ("proposer_kl_target", "above 0", self.proposer_kl_target is None or self.proposer_kl_target > 0),
            ("kl_rate", "0 or more", self.kl_rate >= 0),
            (
                "beta_min",
                f"0 to beta_max={self.beta_max}",
                self.beta_min is None or 0 <= self.beta_min <= self.beta_max,
            ),
            ("proposer_entropy_std", "above 0", self.proposer_entropy_std is None or self.proposer_entropy_std > 0),
            ("baseline_momentum", "0 or more and below 1", 0 <= self.baseline_momentum < 1),
            ("proposer_update_every", "1 or more", self.proposer_update_every >= 1),
            ("preference_agreement", "0 to 1", 0 <= self.preference_agreement <= 1),
            ("report_images", "0 or more", self.report_images >= 0),
            ("vllm_server_timeout", "seconds above 0", 0 < self.vllm_server_timeout < math.inf),
            ("vllm_request_timeout", "seconds above 0", 0 < self.vllm_request_timeout < math.inf),
        ):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)}; expected {expected}.")
        # TRL has made None of its "auto"
        defaults = {**{field.name: field.default for field in fields(self)}, "pad_to_multiple_of": None}
        for names, unused, why in (
            (("multi_objective_aggregation",), True, "extra rewards are summed"),
            (("pad_to_multiple_of",), True, "batches are padded to their longest row"),
            (("use_transformers_continuous_batching",), True, "a rollout is one batch"),
            (
                ("epsilon", "delta", "sapo_temperature_neg", "sapo_temperature_pos"),
                True,
                "a rollout is trained on in one step, at a ratio of 1",
            ),
            (("epsilon_high",), self.loss_type != "cispo", "a rollout is trained on in one step, at a ratio of 1"),
            (
                ("off_policy_mask_threshold", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
                self.rollout != "vllm",
                "the model that is trained has drawn the samples itself",
            ),
            (
                (
                    "vllm_server_urls",
                    "vllm_adapter_dir",
                    "vllm_request_timeout",
                    "vllm_importance_sampling_mode",
                    "async_rollouts",
                ),
                self.rollout != "vllm",
                f"with rollout={self.rollout!r} no server would be asked",
            ),
            (
                (
                    "proposer_entropy_mean",
                    "proposer_entropy_std",
                    "diversity_weight",
                    "blind_weight",
                    "proposer_update_every",
                    "proposer_beta",
                    "proposer_kl_target",
                ),
                not self.train_proposer,
                "train_proposer=False",
            ),
            (
                (
                    "solver_gamma",
                    "length_weight",
                    "length_target",
                    "length_cap",
                    "proposer_entropy_mean",
                    "proposer_entropy_std",
                ),
                self.reward == "discrete",
                "reward='discrete'",
            ),
            (("baseline_momentum",), self.baseline == "group", "baseline='group'"),
            (
                ("blind_questions",),
                self.blind_weight > 0,
                f"blind_weight={self.blind_weight}, with which every question is answered without the image",
            ),
            (
                ("kl_target", "kl_rate", "beta_min", "beta_max", "proposer_kl_target"),
                not self.adaptive_kl,
                "adaptive_kl=False",
            ),
        ):
            given = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) != defaults[name]]
            if unused and given:
                raise ValueError(
                    f"{', '.join(given)} would have no effect: {why}. Leave it unset, or set what it needs."
                )
        if self.agreement_band is not None:
            band = list(self.agreement_band)
            if len(band) != 2 or not 0 <= band[0] <= band[1] <= 1:
                raise ValueError(f"agreement_band={self.agreement_band}; expected two shares, 0 <= low <= high <= 1.")
        if self.early_votes and self.extra_votes == 0:
            raise ValueError(
                "early_votes=True, but extra_votes=0: the answers that are trained on are all drawn, and only extra votes can "
                "be spared. Set extra_votes."
            )
        if self.rollout == "vllm":
            self._check_vllm()
        most = (self.num_votes - 1) / self.num_votes
        if self.collect_preferences and self.preference_agreement > most:
            raise ValueError(
                f"preference_agreement={self.preference_agreement}, but of {self.num_votes} answers that disagree at most a "
                f"share of {most:.2f} can be the majority: no pair would ever be written. Lower it, or draw more answers."
            )
        if self.baseline == "group" and self.train_proposer and self.images_per_step < 2:
            raise ValueError(
                "baseline='group' compares the questions of a rollout with each other, but a rollout has 1 image. Raise "
                "gradient_accumulation_steps, or set baseline='ema' or train_proposer=False."
            )
        if self.proposer_beta is not None and (self.proposer_beta == 0) != (self.beta == 0):
            raise ValueError(
                f"beta={self.beta} and proposer_beta={self.proposer_beta}: either both roles have a reference model or "
                "neither has. Use a small value instead of 0."
            )
        if isinstance(self.prompts, str):
            raise ValueError(
                f'prompts={self.prompts!r}; expected a JSON object, such as \'{{"system": "Be brief."}}\'.'
            )
        RolePrompts.from_dict(self.prompts)  # fails here rather than at the first rollout
        if self.collapse_guard is not None:
            CollapseGuard.from_config(self.collapse_guard)  # the same

    def _check_vllm(self) -> None:
        """What cannot be had from a server."""
        if isinstance(self.vllm_server_urls, str) or not self.vllm_server_urls:
            raise ValueError(
                f"rollout='vllm', but vllm_server_urls={self.vllm_server_urls!r}; expected a list of addresses, such as "
                "['http://localhost:8000']."
            )
        if not self.freeze_vision_tower:
            raise ValueError(
                "rollout='vllm' with freeze_vision_tower=False is not supported: vLLM serves LoRA adapters of the language "
                "model alone, so the servers would read images with the base's tower. Set freeze_vision_tower=True."
            )
        if self.early_votes:
            raise ValueError(
                "rollout='vllm' with early_votes=True is not supported: a server draws all answers to a question in one "
                "request. Set early_votes=False."
            )
        modes = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
        if self.vllm_importance_sampling_mode not in modes:
            raise ValueError(
                f"vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r}; expected one of {modes}."
            )
        if self.async_rollouts and not self.vllm_importance_sampling_correction:
            raise ValueError(
                "async_rollouts=True, but vllm_importance_sampling_correction=False: the samples are one step off-policy, and "
                "nothing would correct it. Leave `vllm_importance_sampling_correction` on."
            )
        if self.loss_type == "vespo" and "sequence" in self.vllm_importance_sampling_mode:
            raise ValueError(
                f"loss_type='vespo' weighs whole sequences itself, but vllm_importance_sampling_mode="
                f"{self.vllm_importance_sampling_mode!r}. Set 'token_truncate' or 'token_mask'."
            )

    @property
    def images_per_process(self) -> int:
        """Images per rollout on one process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps // self.num_generations

    @property
    def images_per_step(self) -> int:
        """Images per rollout over all processes."""
        return self.images_per_process * self.world_size

    @property
    def num_votes(self) -> int:
        """Answers per question that vote."""
        return self.num_generations + self.extra_votes

    @property
    def role_prompts(self) -> RolePrompts:
        """The prompts of both roles."""
        return RolePrompts.from_dict(self.prompts)
