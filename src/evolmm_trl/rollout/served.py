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
Rollouts from vLLM servers: which adapters they hold, what they are asked, and whether their log-probs are the trainer's.

A step begins by giving the servers the adapter that the step before has moved. Then every image goes its own way: the
proposer's request, and the solver's as soon as that question is there. With `async_rollouts` the images of the next step are
sent off before the update of this one.
"""

import atexit
import copy
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch.func import functional_call
from transformers import GenerationConfig, PreTrainedModel

from ..role_adapters import ADAPTER_OF, role_adapter_state, save_role_adapter
from ..schedule import PROPOSER, ROLES, SOLVER
from ..shared_prefix import FAMILIES, base_model
from ..thumbnails import image_digest
from .generation import sample_seed, why_not_generated_shared
from .importance import SamplingDifference, importance_ratio, log_ratio
from .samples import EncodedPrompt, collate_prompts, continued, encode_prompts
from .vllm_server import VLLMCompletion, VLLMError, VLLMRequest, VLLMServers, image_url, seen_image


logger = logging.getLogger(__name__)

# Largest mean difference between the log-probs of a server and of the trainer for the same tokens: nats per token, and a share
# of what the adapter changes, of which half precision rounds a part. docs/vllm.md has what rounding makes, and what another
# model, image, prompt or adapter does
_TOLERANCE = {"full": (1e-3, 0.0), "half": (5e-2, 0.1)}
# Of the comparison of log-probs
_CHECKED_SAMPLES, _CHECKED_TOKENS = 4, 32
# Mean change of log-probs, in nats per token, that the random adapter of the comparison makes at least
_PROBE_CHANGE = 0.5
# Images of a process that are written about at a time
_IMAGES_AT_A_TIME = 64


@dataclass(frozen=True)
class Written:
    """
    What both roles wrote about an image.

    Args:
        question ([`VLLMCompletion`]):
            The proposer's completion.
        answers (`list[VLLMCompletion]`):
            The solver's.
    """

    question: VLLMCompletion
    answers: list[VLLMCompletion]

    def state_dict(self) -> list:
        """As JSON can hold it."""
        return [[completion.ids, completion.logps] for completion in (self.question, *self.answers)]

    @classmethod
    def from_state_dict(cls, state: list) -> "Written":
        question, *answers = (VLLMCompletion(*completion) for completion in state)
        return cls(question, answers)


@dataclass(frozen=True)
class _InFlight:
    """The rollout that will be trained on at a step: per image the digest of its pixels, and a future."""

    step: int
    digests: list[str]
    images: "list[Future[Written]]"
    from_checkpoint: bool = False

    def wait(self) -> list[Written]:
        try:
            return [image.result() for image in self.images]
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        for image in self.images:
            image.cancel()


class ServedRollouts:
    """How [`EvoLMMTrainer`] generates with `rollout="vllm"`."""

    def _set_up_servers(self, model_id: str) -> None:
        """Connects to the servers, if there are to be any, and says what they cannot do before training starts."""
        self.servers: VLLMServers | None = None
        self._in_flight: _InFlight | None = None
        self._next_batches: tuple | None = None
        self._weighed: dict | None = None  # the batch of the current loss
        if self.args.rollout != "vllm":
            return
        reason = why_not_served(self.model, self._generation_config(SOLVER))
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            reason = "FSDP 1 does not gather an adapter alone. Use FSDP 2, as in accelerate_configs/fsdp2.yaml"
        if reason is not None:
            raise ValueError(f"rollout='vllm' is not possible here: {reason}.")
        self.use_vllm = True  # for TRL's loss, which then multiplies by `importance_sampling_ratio`
        self._sampling_difference = SamplingDifference()
        self._writers = ThreadPoolExecutor(_IMAGES_AT_A_TIME, thread_name_prefix="rollout")
        # Of their own, since tokenizers may not be used by two threads at a time
        self._writers_processor, self._encoding = copy.deepcopy(self.processing_class), threading.Lock()
        self._served_model = model_id
        self._connect()

    def _connect(self) -> None:
        """Makes a client of the servers, which hold no adapters of it yet."""
        args = self.args
        self.servers = VLLMServers(
            args.vllm_server_urls,
            self.model.config.image_token_id,
            args.vllm_adapter_dir or Path(args.output_dir) / "vllm_adapters",
            owner=str(Path(args.output_dir).absolute()),
            start_timeout=args.vllm_server_timeout,
            request_timeout=args.vllm_request_timeout,
        )
        atexit.register(self.servers.close)
        self._moved = set(self._served_roles)
        self._unchecked = set(self._served_roles)
        self._on_main_process(partial(self.servers.start, self._served_model))

    def _leave_servers(self) -> None:
        """
        Gives up what the servers are asked, at once. When the program ends, Python waits for threads before anything else,
        and those that ask a server that is gone would hold it for `vllm_server_timeout`.
        """
        if self.servers is not None:
            self.servers.close()

    def _on_main_process(self, action: Callable[[], object]) -> None:
        """Does something on the main process alone. If it fails there, all processes fail, of which the others would wait."""
        error, text = None, [None]
        if self.accelerator.is_main_process:
            try:
                action()
            except (VLLMError, OSError, SafetensorError, ValueError) as raised:
                error, text = raised, [f"{type(raised).__name__}: {raised}"]
        broadcast_object_list(text)
        if error is not None:
            raise error
        if text[0] is not None:
            raise VLLMError(f"The main process, which gives the servers their adapters, has failed with {text[0]}")

    @property
    def _served_roles(self) -> tuple[str, ...]:
        """The roles that have an adapter of their own on the servers."""
        return ROLES if self.roles.separate else (SOLVER,)

    # ------------------------------------------------------------------------------------------------------------
    # Adapters

    def _set_moved(self, *roles: str) -> None:
        """The servers' adapters of these roles are no longer the trainer's."""
        if self.servers is not None:
            self._moved.update(role if self.roles.separate else SOLVER for role in roles)

    def _update_servers(self) -> None:
        """
        Gives the servers the adapters that have moved. On all processes together: each gathers, and the main one saves and
        talks to the servers. What was in flight is waited for, since a step's rollout is of one policy.
        """
        if self.servers.closed:  # with a run that failed
            self._drop_rollout()
        if self._in_flight is not None:
            self._in_flight.wait()
        if not self._moved:
            return
        roles = [role for role in self._served_roles if role in self._moved]
        new = [role for role in roles if role in self._unchecked]
        for role in new:
            self._check_servers(role)
        with self._timed("swap"):
            for role in roles:
                self._swap(role, role_adapter_state(self.model, role))
        self._moved.clear()
        for role in new:
            self._compare(role)
            self._unchecked.discard(role)

    def _swap(self, role: str, state: dict[str, torch.Tensor]) -> None:
        """Gives all servers these weights as a role's adapter."""
        self.accelerator.wait_for_everyone()  # no process has a request in flight
        self._on_main_process(lambda: self.servers.swap(role, partial(save_role_adapter, self.model, role, state)))
        adapters = [self.servers.adapters]
        broadcast_object_list(adapters)
        self.servers.adapters = adapters[0]

    def _check_servers(self, role: str) -> None:
        """
        Fails if the servers' log-probs are not the trainer's, under a role's adapter as it is, and under one of random
        weights in its place. A new adapter has no effect, and a step of training a small one: that a server leaves an adapter
        out, or scales it otherwise, is seen with the second alone.
        """
        state = role_adapter_state(self.model, role)
        self._swap(role, state)
        written = self._compare(role)
        probe = self._probe(role, state, written)
        self._swap(role, probe)
        self._compare(role, probe)

    def _compare(
        self, adapter: str, probe: Mapping[str, torch.Tensor] | None = None
    ) -> list[tuple[str, EncodedPrompt, list[list[int]]]]:
        """
        Fails if a server's log-probs about the first image are not the trainer's, under the adapter of a role, with the weights
        `probe` if there are any. Returns the roles that it serves, with their prompts and what the first server wrote.
        """
        image = next(iter(self._images))["image"]
        absolute, relative = _TOLERANCE["half" if self._is_half() else "full"]
        compared = []
        for role in (adapter,) if self.roles.separate else ROLES:
            messages = (
                self.prompts.proposer_messages()
                if role == PROPOSER
                else self.prompts.solver_messages(self.prompts.default_question)
            )
            (prompt,) = encode_prompts(self.processing_class, [messages], [image], **self.chat_template_kwargs)
            config = self._comparison_config(role)
            seeds = [sample_seed(self.args.seed, "check", role) + i for i in range(_CHECKED_SAMPLES)]
            request = self._request(role, prompt, self._image_url(prompt), seeds, config)
            futures = [self.servers.submit(request, url) for url in self.servers.urls]
            for url, completions in zip(self.servers.urls, [future.result() for future in futures], strict=True):
                ids = [completion.ids for completion in completions]
                theirs = torch.tensor([logp for completion in completions for logp in completion.logps])
                with self._sampling() as model:
                    own = self._own_logps(model, role, prompt, ids, probe)
                    without = self._own_logps(model, None, prompt, ids)
                difference = (own - theirs).abs()
                bound = absolute + relative * (own - without).abs().mean().item()
                if not difference.mean().item() <= bound:  # or is nan
                    raise ValueError(
                        f"The log-probs of the vLLM server at {url} are not the trainer's: for the {role}'s prompt and the first "
                        f"image, under {'its adapter' if probe is None else 'an adapter of random weights'}, they differ by "
                        f"{difference.mean().item():.2g} nats per token, at most by {difference.max().item():.2g}, over "
                        f"{len(theirs)} tokens that the server sampled; at most {bound:.2g} on average is rounding in this "
                        f"precision. From the trainer's without any adapter they differ by "
                        f"{(without - theirs).abs().mean().item():.2g}. The server's prompt has the same token ids. Likely causes: other weights than the trained model's base (checkpoint, "
                        "revision, quantization, or --dtype), another image processor, a server without --logprobs-mode "
                        "processed_logprobs, or an adapter that it leaves out or scales otherwise. See docs/vllm.md."
                    )
                if url == self.servers.urls[0]:
                    compared.append((role, prompt, ids))
        return compared

    def _comparison_config(self, role: str) -> GenerationConfig:
        """All tokens are compared, those that top-p and its like would leave out too."""
        config = self._generation_config(role)
        config.top_p, config.top_k, config.min_p, config.repetition_penalty = 1.0, 0, None, 1.0
        config.max_new_tokens = min(config.max_new_tokens, _CHECKED_TOKENS)
        return config

    def _own_logps(
        self,
        model: PeftModel,
        role: str | None,
        prompt: EncodedPrompt,
        completions: Sequence[Sequence[int]],
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        The trainer's log-probs of the completions of a prompt, one behind the other, on the CPU, by the model that `_sampling`
        gives; of a role's adapter, with these weights in place of its own if there are any, or of none.
        """
        config = self._comparison_config(role or SOLVER)
        held = {}
        if weights is not None:
            marker = f".{ADAPTER_OF[role if self.roles.separate else SOLVER]}."
            names = [name for name, _ in model.named_parameters() if marker in name]
            held = {name: weights[name.replace(marker, ".")].to(model.device) for name in names}
        with self.roles.using(role):
            own = [
                processed_logps(model, prompt, ids, config, self._tokenizer.pad_token_id, held) for ids in completions
            ]
        return torch.cat(own).cpu()

    def _probe(self, adapter: str, state: dict[str, torch.Tensor], written: list[tuple]) -> dict[str, torch.Tensor]:
        """
        Random weights of a role's adapter that change the log-probs of what was written by `_PROBE_CHANGE` nats per token or
        more, in the trainer, against the model without an adapter.
        """
        seed = sample_seed(self.args.seed, "probe", adapter)
        found = [(0.0, 0.0)]  # size of the weights and change of the log-probs
        with self._sampling() as model:  # with forwards on all processes, since ZeRO-3 has them meet in the first ones
            without = [self._own_logps(model, None, prompt, ids) for _, prompt, ids in written]
            for exponent in range(-12, 13):
                probe = random_adapter(state, 2.0**exponent, seed)
                own = [self._own_logps(model, role, prompt, ids, probe) for role, prompt, ids in written]
                changes = [(a - b).abs().mean().item() for a, b in zip(own, without, strict=True)]
                found = [(2.0**exponent, min(changes))]
                if min(changes) >= _PROBE_CHANGE:
                    break
        broadcast_object_list(found)  # one size on all processes, whatever their rounding
        size, change = found[0]
        if not change >= _PROBE_CHANGE:
            raise RuntimeError(
                f"Random weights of the {adapter}'s adapter change the log-probs of the trainer's own model by {change:.2g} "
                f"nats per token, however large they are; expected {_PROBE_CHANGE:g} or more. Its LoRA layers have no effect: "
                "check `lora_alpha` and `target_modules` of the `peft_config`."
            )
        return random_adapter(state, size, seed)

    def _is_half(self) -> bool:
        """Whether the model computes in half precision, or with weights that are rounded to 4 or 8 bits."""
        base = base_model(self.model)
        quantized = getattr(base, "is_quantized", False)
        return quantized or self.accelerator.mixed_precision != "no" or base.dtype != torch.float32

    # ------------------------------------------------------------------------------------------------------------
    # Rollouts

    def _image_url(self, prompt: EncodedPrompt) -> str:
        """The image of a prompt, as the processor has made it."""
        return image_url(seen_image(prompt.image_inputs, self.processing_class.image_processor))

    def _request(
        self,
        role: str,
        prompt: EncodedPrompt,
        image: str,
        seeds: Sequence[int | None],
        config: GenerationConfig | None = None,
    ) -> VLLMRequest:
        return VLLMRequest(
            role=role if self.roles.separate else SOLVER,
            prompt_ids=prompt.input_ids.tolist(),
            image=image,
            samples=len(seeds),
            seed=seeds[0],
            config=self._generation_config(role) if config is None else config,
        )

    def _send_rollout(self, step: int, rows: list[dict]) -> None:
        """Sends off the images that step `step` will train on."""
        questions = self._seeds(PROPOSER, rows, 1, step)
        answers = self._seeds(SOLVER, rows, self.args.num_votes, step)
        self._in_flight = _InFlight(
            step,
            [image_digest(row["image"]) for row in rows],
            [self._writers.submit(self._write, *image) for image in zip(rows, questions, answers, strict=True)],
        )

    def _write(self, row: dict, question_seeds: list[int], answer_seeds: list[int]) -> Written:
        """One image: the proposer's question, and at once the solver's answers to it. In a thread of its own."""
        image = self._image_url(row["prompt"])
        (question,) = self.servers.submit(self._request(PROPOSER, row["prompt"], image, question_seeds)).result()
        _, questions = self._read_questions([question.ids])
        with self._encoding:
            (prompt,) = self._answer_prompts([row], [row["prompt"]], questions, self._writers_processor)
        return Written(question, self.servers.submit(self._request(SOLVER, prompt, image, answer_seeds)).result())

    def _served_rollout(self, rows: list[dict]) -> list[Written]:
        """What the servers wrote about the images of this step; with `async_rollouts`, the step before has asked for it."""
        step = self.state.global_step
        if self._in_flight is not None and self._in_flight.from_checkpoint:
            self._drop_rollout_of_others(rows)
        if self._in_flight is None:
            self._update_servers()
            self._send_rollout(step, rows)
        if self._in_flight.step != step or len(self._in_flight.images) != len(rows):
            raise RuntimeError(
                f"The rollout in flight is step {self._in_flight.step}'s, of {len(self._in_flight.images)} images, and this "
                f"is step {step} with {len(rows)} images."
            )
        with self._timed("rollout"):
            written = self._in_flight.wait()
        self._in_flight = None
        return written

    def _send_next_rollout(self) -> None:
        """With `async_rollouts`: sends off the next step's images, under the adapters as they are before this update."""
        step = self.state.global_step + 1
        batches = self._next_batches
        if not self.args.async_rollouts or batches is None or step >= self.state.max_steps:
            return
        if self.schedule.role(step) == SOLVER:
            self._update_servers()
            self._send_rollout(step, batches[0][0])

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the parent; with `async_rollouts` one step ahead, to the end of the epoch."""
        if not self.args.async_rollouts:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches, self._next_batches = self._next_batches, None
        if batches is None:
            batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        following = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._next_batches = following if following[0] else None
        return batches

    def _drop_rollout(self) -> None:
        """Forgets what an earlier call of `train` has left, and what the servers hold."""
        if self._in_flight is not None:
            self._in_flight.cancel()
            wait(self._in_flight.images)
        self._in_flight = self._next_batches = None
        if self.servers is not None and self.servers.closed:
            self._connect()
        self._set_moved(*ROLES)

    def _drop_rollout_of_others(self, rows: list[dict]) -> None:
        """
        Forgets the rollout that a checkpoint held, on all processes, if it is not of these images, or not of as many answers as
        are asked for now.
        """
        rollout = self._in_flight
        reason = None
        answers = {len(written.answers) for written in rollout.wait()}
        if rollout.digests != [image_digest(row["image"]) for row in rows]:
            reason = "it is about other images"
        elif answers != {self.args.num_votes}:
            reason = f"it has {min(answers)} answers per question, and this run asks for {self.args.num_votes}"
        reasons = [reason for reason in gather_object([reason]) if reason is not None]
        if reasons:
            self._in_flight = None
            if self.accelerator.is_main_process:
                logger.warning(
                    "The rollout that the checkpoint holds for step %d is not trained on: %s. The servers are asked again.",
                    rollout.step + 1,
                    reasons[0],
                )

    def _rollout_state(self) -> dict | None:
        """The rollout in flight, to its end, as JSON can hold it."""
        rollout = self._in_flight
        if rollout is None:
            return None
        images = [written.state_dict() for written in rollout.wait()]
        return {"step": rollout.step, "digests": rollout.digests, "images": images}

    def _load_rollout_state(self, state: dict) -> None:
        images: list[Future[Written]] = []
        for written in state["images"]:
            images.append(Future())
            images[-1].set_result(Written.from_state_dict(written))
        self._in_flight = _InFlight(state["step"], state["digests"], images, from_checkpoint=True)

    def _answers_by_servers(
        self, prompts: Sequence[EncodedPrompt], seeds: Sequence[Sequence[int | None]]
    ) -> list[list[list[int]]]:
        """The solver's completions, one per seed of each prompt; greedy where the seed is `None`."""
        self._update_servers()
        asked = []
        for prompt, group in zip(prompts, seeds, strict=True):
            url = self._image_url(prompt)
            greedy = [
                self.servers.submit(self._request(SOLVER, prompt, url, [None])) for seed in group if seed is None
            ]
            drawn = [seed for seed in group if seed is not None]
            sampled = self.servers.submit(self._request(SOLVER, prompt, url, drawn)) if drawn else None
            asked.append((greedy, sampled))
        answers = []
        for group, (greedy, sampled) in zip(seeds, asked, strict=True):
            at_once = iter(completion for future in greedy for completion in future.result())
            others = iter(sampled.result() if sampled is not None else ())
            answers.append([next(at_once if seed is None else others).ids for seed in group])
        return answers

    # ------------------------------------------------------------------------------------------------------------
    # Importance sampling

    def _weigh(self, logps: torch.Tensor) -> None:
        """Puts the weights into the batch whose loss is being computed, from the log-probs of its forward."""
        batch, self._weighed = self._weighed, None
        mask = batch["completion_mask"]
        sampling_logps = batch.get("sampling_per_token_logps", torch.full_like(logps, torch.nan))
        difference = log_ratio(logps.detach(), sampling_logps, mask)
        ratio = None
        if self.vllm_importance_sampling_correction:
            bounds = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
            ratio = importance_ratio(difference, self.vllm_importance_sampling_mode, *bounds)
            batch["importance_sampling_ratio"] = ratio
        self._sampling_difference.add(difference, ratio, mask)

    def _log_sampling_difference(self) -> None:
        metrics = self._sampling_difference.metrics(self.accelerator)
        for name, value in metrics.items():
            self._log_train(name, value)
        if metrics.get("sampling/importance_sampling_ratio/max") == 0.0:
            logger.warning(
                "All %d samples of step %d are left out: the weights of %s, of what the trainer's model makes likelier or "
                "less likely than the server's did, are outside the bounds %s and %s. The log-probs differ by %.2g nats per "
                "token on average.",
                self._step_rows,
                self.state.global_step + 1,
                self.vllm_importance_sampling_mode,
                self.vllm_importance_sampling_clip_min,
                self.vllm_importance_sampling_clip_max,
                metrics["sampling/sampling_logp_difference/mean"],
            )
            self._step_advantages = 0  # so that no gradient is expected


def why_not_served(model: PreTrainedModel | PeftModel, config: GenerationConfig) -> str | None:
    """
    Why vLLM servers cannot sample from a model, or `None` if they can.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The trainer's model.
        config ([`~transformers.GenerationConfig`]):
            How it is sampled from.

    Returns:
        `str` or `None`
    """
    if not isinstance(model, PeftModel):
        return (
            "without `peft_config` all weights are trained, and servers are given adapters alone. Pass a `LoraConfig`"
        )
    base = base_model(model)
    if base.config.model_type not in FAMILIES:
        return f"it is verified for {' and '.join(FAMILIES)}, and this model is a {base.config.model_type}"
    for role in model.peft_config.values():
        for name in ("rank_pattern", "alpha_pattern", "target_parameters"):
            if getattr(role, name, None):
                return f"vLLM does not follow `{name}` of a `LoraConfig`. Leave it unset"
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            if isinstance(module.get_base_layer(), torch.nn.Embedding):
                return f"vLLM takes no adapter of the embeddings ({name}). Leave them out of `target_modules`"
            if not name.startswith("model.language_model."):
                return (
                    f"vLLM takes adapters of the language model alone, and {name} has one. Add it to `exclude_modules`"
                )
    return why_not_generated_shared(config)


@torch.no_grad()
def processed_logps(
    model: PreTrainedModel,
    prompt: EncodedPrompt,
    ids: Sequence[int],
    config: GenerationConfig,
    pad_token_id: int,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Log-probs of a completion under the distribution it is drawn from: at the temperature, and without the suppressed tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Unwrapped model in eval mode, with the role's adapter active.
        prompt ([`EncodedPrompt`]):
            Prompt with its pixels.
        ids (`Sequence[int]`):
            Token ids of the completion.
        config ([`~transformers.GenerationConfig`]):
            `temperature` and `suppress_tokens`.
        pad_token_id (`int`):
            Padding token.
        weights (`Mapping[str, torch.Tensor]`, *optional*):
            Parameters that take the place of the model's in this forward, by name. The model keeps its own.

    Returns:
        `torch.Tensor` of shape `(completion length,)`, float32
    """
    row = continued(prompt, ids[:-1])
    batch = {name: tensor.to(model.device) for name, tensor in collate_prompts([row], pad_token_id).items()}
    arguments = {**batch, "use_cache": False, "logits_to_keep": len(ids)}
    logits = functional_call(model, dict(weights or {}), kwargs=arguments).logits[0].float()
    if config.suppress_tokens:
        logits[:, config.suppress_tokens] = -torch.inf
    logps = (logits / (config.temperature or 1.0)).log_softmax(-1)
    return logps.gather(1, torch.tensor(ids, device=logps.device)[:, None])[:, 0]


def random_adapter(state: Mapping[str, torch.Tensor], size: float, seed: int) -> dict[str, torch.Tensor]:
    """
    Random weights of a LoRA adapter.

    Args:
        state (`Mapping[str, torch.Tensor]`):
            An adapter's weights: `lora_A` of shape (rank, inputs) and `lora_B` (outputs, rank).
        size (`float`):
            Standard deviation of what the adapter makes of inputs of variance 1, before it is scaled.
        seed (`int`):
            Seed.

    Returns:
        `dict[str, torch.Tensor]`: tensors of the same names and shapes, of numbers that bfloat16 holds, so that a server that
        rounds adapters changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(tensor.shape, generator=generator)
            * (size if "lora_B" in name else 1.0)
            / tensor.size(1) ** 0.5
        )
        .bfloat16()
        .to(tensor.dtype)
        for name, tensor in sorted(state.items())
    }
