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
What a user does with the Hub, in a process of its own, for `test_hub.py`:

    python hub_user.py push FOLDER       # trains and pushes, from FOLDER/base
    python hub_user.py pull FOLDER       # on another machine: loads, resumes, merges

What happened is written to FOLDER/push.json or FOLDER/pull.json. Tokens come from the environment, as MY_TOKEN: a name
that no library reads.
"""

import json
import os
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tiny_trainer import TalkingTrainer, config, image_dataset, lora, noise_images
from transformers import AutoModelForImageTextToText, TrainerCallback

from evolmm_trl import RolePrompts, load_processor, load_prompts, load_solver, merge_solver


TOKEN = os.environ["MY_TOKEN"]
STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
HUB = {"push_to_hub": True, "hub_token": TOKEN, "hub_always_push": True}


class Interrupt(TrainerCallback):
    """Stops a run at its second step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def make(folder, base, callbacks=None, **options) -> TalkingTrainer:
    return TalkingTrainer(
        model=base,
        args=config(folder, **{**STEPS, **options}),
        train_dataset=image_dataset(),
        peft_config=lora(),
        callbacks=callbacks,
    )


def logits(model, processor) -> torch.Tensor:
    text = processor.apply_chat_template(
        RolePrompts().solver_messages("What is 2?"), add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text], images=noise_images(1), return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def error_of(function, *args, **kwargs) -> str | None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def push(folder: Path) -> dict:
    base = str(folder / "base")
    whole = make(folder / "whole", base, **HUB, hub_strategy="every_save", report_to="tensorboard")
    print(whole.args, repr(whole.args))
    whole.train()
    whole.push_to_hub()

    interrupted = [Interrupt()]
    last = make(folder / "last", base, interrupted, **HUB, hub_strategy="checkpoint", hub_private_repo=True)
    last.train()
    several = make(folder / "all", base, interrupted, **HUB, hub_strategy="all_checkpoints", save_steps=1)
    several.train()
    refused = make(folder / "refused", base, **HUB, hub_strategy="every_save", max_steps=2)
    refused.train()
    return {"refused_ended_at": refused.state.global_step, "whole": whole.hub_model_id}


def pull(folder: Path) -> dict:
    whole, base = str(folder / "whole"), str(folder / "base")
    model, processor = load_solver(base, whole, dtype=torch.float32)
    expected = logits(model, processor)
    untrained = logits(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), processor)
    seen = {"solver_is_trained": difference(expected, untrained)}

    seen["private_without_token"] = error_of(load_solver, base, "alice/last")
    seen["private_with_another_token"] = error_of(load_solver, base, "alice/last", token="hf_of_bob_0123456789")
    seen["nowhere"] = error_of(load_solver, base, "runs/of/nobody")
    for name, adapter in {"ours": "alice/whole", "authors": "lab/authors", "private": "alice/last"}.items():
        model, processor = load_solver("alice/base", adapter, dtype=torch.float32, token=TOKEN)
        seen[name] = difference(logits(model, processor), expected)
    saved = load_prompts(whole)
    seen["prompts"] = saved is not None and load_prompts("alice/last", token=TOKEN) == saved
    seen["prompts_of_authors"] = load_prompts("lab/authors", token=TOKEN)
    seen["prompts_of_nobody"] = error_of(load_prompts, "runs/of-nobody")
    seen["base_of_nobody"] = error_of(load_solver, "runs/of-nobody")
    seen["processor"] = type(processor).__name__

    merge_solver("alice/base", "alice/whole", str(folder / "merged"), token=TOKEN)
    merged = AutoModelForImageTextToText.from_pretrained(folder / "merged", dtype=torch.float32)
    seen["merged"] = difference(logits(merged, load_processor(folder / "merged")), expected)

    for name, checkpoint in (("last", f"{folder}/last-resumed/last-checkpoint"), ("all", True)):
        output_dir = snapshot_download(f"alice/{name}", local_dir=folder / f"{name}-resumed", token=TOKEN)
        resumed = make(output_dir, base)
        resumed.train(resume_from_checkpoint=checkpoint)
        resumed.save_model()

    seen["pickle"] = error_of(load_solver, base, "evil/pickle")
    seen["other_base"] = error_of(load_solver, base, "evil/other-base")
    seen["code_of_model"] = error_of(load_solver, "evil/code", whole)
    seen["code_of_processor"] = error_of(load_processor, "evil/code")
    cut_off = {"endpoint": "http://127.0.0.1:9"}
    for name, options in {"offline": {"local_files_only": True}, "cut_off": cut_off}.items():
        # Known to lack the file; known to have it, which was not downloaded; loaded from a listing alone; never seen
        for adapter in ("lab/authors", "alice/whole", "evil/other-base", "runs/of-nobody"):
            cache = {"cache_dir": folder / "cache"} if adapter == "alice/whole" else {}
            if cache:
                load_solver(base, adapter, **cache)
            seen[f"prompts_{name}_{adapter}"] = error_of(load_prompts, adapter, **cache, **options)
    seen["paths"] = error_of(load_solver, base, "evil/paths")
    seen["paths_of_all"] = error_of(snapshot_download, "evil/paths", local_dir=folder / "deep" / "er" / "evil")
    return seen


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    result = {"push": push, "pull": pull}[what](where)
    (where / f"{what}.json").write_text(json.dumps(result))
