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

"""The tables of the experiments are what their results give, and their intervals hold the truth as often as they say."""

import shutil

import experiments
import numpy as np
import pytest
import sr2se_jobs
import sr2se_tables
from scipy.special import ndtr


QUESTION, SHIFT, LUCK = 1.0, 0.4, 0.5  # standard deviations of ease, of what training does to a question, of an answer


def differences(rng, seeds: int, questions: int, of_seed: float) -> tuple[np.ndarray, float]:
    """Right answers of trained models minus those of the models they started from, and the true mean of it."""
    ease, shift = rng.normal(0, QUESTION, questions), rng.normal(0, SHIFT, questions)
    before = ease + rng.normal(0, LUCK, (seeds, questions)) + 0.45 > 0
    skill = 0.55 + shift + rng.normal(0, of_seed, (seeds, 1))
    after = ease + skill + rng.normal(0, LUCK, (seeds, questions)) > 0
    spread = np.hypot(QUESTION, LUCK)
    truth = ndtr(0.55 / np.sqrt(spread**2 + SHIFT**2 + of_seed**2)) - ndtr(0.45 / spread)
    return after.astype(float) - before, truth


@pytest.mark.parametrize("of_seed", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("questions", [400, 2_000])
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_holds_the_truth_in_93_to_97_percent_of_1000_simulations(seeds, questions, of_seed):
    assert 930 <= times_held(seeds, questions, of_seed) <= 970


@pytest.mark.parametrize("seeds", [3, 5])
def test_where_no_seed_is_better_than_another_it_is_hardly_wider(seeds):
    assert 930 <= times_held(seeds, 2_000, of_seed=0.0) <= 980


def times_held(seeds: int, questions: int, of_seed: float) -> int:
    """Of 1,000 simulations, in how many the interval holds the truth."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(1_000):
        sample, truth = differences(rng, seeds, questions, of_seed)
        mean, half = experiments.interval(sample)
        held += abs(mean - truth) <= half
    return held


def test_seeds_that_are_all_alike_leave_the_interval_of_the_questions():
    one = np.random.default_rng(0).integers(-1, 2, 400).astype(float)
    mean, half = experiments.interval(np.tile(one, (5, 1)))
    assert mean == pytest.approx(one.mean())
    assert half == pytest.approx(1.96 * one.std(ddof=1) / 20, rel=1e-3)


def test_one_seed_has_no_interval():
    assert np.isnan(experiments.interval(np.ones((1, 400)))[1])


def test_the_committed_tables_are_what_the_committed_results_give(tmp_path, monkeypatch):
    tables, readme = experiments.DOCS / "tables.md", experiments.README
    monkeypatch.setattr(experiments, "README", shutil.copy(readme, tmp_path / "README.md"))
    monkeypatch.setattr(experiments, "DOCS", tmp_path)
    experiments.report()
    assert (tmp_path / "tables.md").read_text() == tables.read_text()
    assert (tmp_path / "README.md").read_text() == readme.read_text()


def test_the_committed_page_on_sr2se_is_what_the_committed_results_give(tmp_path, monkeypatch):
    page = sr2se_tables.PAGE
    monkeypatch.setattr(sr2se_tables, "PAGE", shutil.copy(page, tmp_path / "sr2se.md"))
    monkeypatch.setattr(sr2se_tables, "DOCS", tmp_path)
    sr2se_tables.report()
    assert (tmp_path / "sr2se.md").read_text() == page.read_text()


def runs(accuracy: float, tokens: float, seed: int) -> list[dict]:
    generator = np.random.default_rng(seed)
    drawn = [generator.random(400) < accuracy for _ in range(5)]
    return [{"correct": sr2se_jobs.bits(right), "tokens": tokens} for right in drawn]


@pytest.mark.parametrize(
    ("accuracy", "tokens", "holds"), [(0.5, 69, True), (0.5, 71, False), (0.48, 60, True), (0.4, 60, False)]
)
def test_a_gate_holds_where_it_spares_30_percent_and_is_not_measurably_below(accuracy, tokens, holds):
    bases = [{"depth_5": run["correct"], "tokens_5": 100.0} for run in runs(0.5, 100, seed=0)]
    assert sr2se_tables._gate_row(bases, runs(accuracy, tokens, seed=1)).holds is holds


@pytest.mark.parametrize("arm", ["continuous", "no_pixels"])
def test_the_control_without_pixels_shows_its_update_no_image(arm, tmp_path):
    _, trainer_class, changes = experiments.ARMS[arm]
    seen = []

    class Watched(trainer_class):
        def _draw(self, rows):
            drawn = super()._draw(rows)
            assert all("pixel_values" in image.answer_prompt.image_inputs for image in drawn)  # rollouts see it
            return drawn

        def _completion_logps(self, model, batch):  # the reference's forward
            seen.append(_has_image(batch["model_inputs"]))
            return super()._completion_logps(model, batch)

        def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
            seen.append(_has_image(self._model_inputs))
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    model, processor = experiments.load_model(experiments.HERE / "models" / "room")
    images = experiments.make_images(tmp_path / "images", experiments.EVOLVE_SEEDS[:8])
    settings = {
        **changes,
        "max_steps": 1,
        "per_device_train_batch_size": 10,
        "write_report": False,
        "report_images": 0,
    }
    Watched(
        model=model,
        args=experiments.demo_config(tmp_path / "run", **settings),
        train_dataset=experiments.load_images(images, streaming=False),
        processing_class=processor,
        peft_config=experiments.demo_lora(),
    ).train()
    assert len(seen) >= 2 and set(seen) == {arm != "no_pixels"}


def _has_image(inputs) -> bool:
    images = inputs if isinstance(inputs, dict) else inputs.images
    return any(images.get(name) is not None for name in ("pixel_values", "image_grid_thw", "mm_encoder_outputs"))
