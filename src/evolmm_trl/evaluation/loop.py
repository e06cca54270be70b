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

"""The evaluation loop of the trainer: the solver on labelled questions."""

import logging
import math
from collections.abc import Iterator
from itertools import islice

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from ..data import readable_images
from ..prompts import without_marks
from ..rollout.generation import sample_seed
from ..rollout.samples import encode_prompts
from . import Scores, score_answers


logger = logging.getLogger(__name__)

_FILLER = "is_filler"


class LabelledEvaluation:
    """What [`EvoLMMTrainer`] does with an `eval_dataset`: it takes the place of GRPOTrainer's evaluation."""

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Yields lists of this process's labelled rows."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            if self.eval_dataset is None:
                raise ValueError(
                    "Evaluation needs an `eval_dataset` with the columns 'image', 'question' and 'answer'."
                )
            eval_dataset = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
        columns = getattr(eval_dataset, "column_names", None)
        if columns is not None and not {"image", "question", "answer"} <= set(columns):
            raise ValueError(
                f"`eval_dataset` has the columns {sorted(columns)}; expected 'image', 'question' and 'answer'."
            )
        readable = readable_images(eval_dataset, max_pixels=self.args.max_pixels, image_root=self.args.image_root)
        return DataLoader(
            _Share(readable, self.accelerator.process_index, self.accelerator.num_processes),
            batch_size=self.args.eval_batch_size,
            collate_fn=list,
        )

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """
        Accuracy of the solver on labelled questions: greedy (with its standard error), sampled (mean over N), and of the
        majority of N; with the agreement, entropy and unreadable share of the sampled answers.
        """
        self.model.eval()  # and stays so: GRPOTrainer's log tells the metrics of evaluation from those of training by it
        n = self.num_generations_eval
        scores: list[Scores] = []
        self.callback_handler.eval_dataloader = dataloader  # the bar's length
        for rows in dataloader:
            questions = [without_marks(str(row["question"]), self._special_tokens) for row in rows]
            prompts = encode_prompts(
                self.processing_class,
                [self.prompts.solver_messages(question) for question in questions],
                [row["image"] for row in rows],
                **self.chat_template_kwargs,
            )
            seeds = [
                [None, *(sample_seed(self.args.seed, "eval", row["image_id"], row["question"], i) for i in range(n))]
                for row in rows
            ]
            ids = self._answer(prompts, seeds)
            for row, group in zip(rows, ids, strict=True):
                greedy, *sampled = self._decode(group)
                if not row[_FILLER]:
                    scores.append(score_answers(str(row["answer"]), greedy, sampled))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        scores = gather_object(scores)
        if not scores:
            raise ValueError("`eval_dataset` has no rows; leave it out or add labelled questions.")
        metrics = Scores.mean(scores)
        accuracy = metrics["accuracy_greedy"]
        metrics["accuracy_greedy_stderr"] = (accuracy * (1 - accuracy) / len(scores)) ** 0.5
        warning = Scores.vote_warning(scores, n) if self.state.global_step == 0 else None
        if warning is not None and self.accelerator.is_main_process:
            logger.warning(warning)
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(scores),
        )


class _Share(torch.utils.data.IterableDataset):
    """
    This process's share of the rows: every `world_size`-th. All processes have as many, since they generate together
    where the model is sharded: those that would have one fewer get another's, marked as a filler.
    """

    def __init__(self, rows, rank: int, world_size: int):
        self.rows = rows
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.world_size)

    def __iter__(self) -> Iterator[dict]:
        if hasattr(self.rows, "__len__"):
            # Images of other processes are not read
            for first in range(0, len(self.rows), self.world_size):
                own = first + self.rank
                filler = own >= len(self.rows)
                yield {**self.rows[first if filler else own], _FILLER: filler}
            return
        rows = iter(self.rows)
        while block := list(islice(rows, self.world_size)):
            filler = self.rank >= len(block)
            yield {**block[0 if filler else self.rank], _FILLER: filler}
