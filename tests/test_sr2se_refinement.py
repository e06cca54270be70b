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

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
from charts import VAL_SEEDS, chart, labelled_questions
from datasets import Dataset, Image
from demo import load_model
from tqdm.auto import tqdm

from evolmm_trl import RolePrompts
from evolmm_trl.sr2se import (
    AgreementLabeller,
    EarlyExitReasoner,
    GateRollouts,
    RefinementConfig,
    SubPolicies,
    SubPolicyPrompts,
    build_pairs,
    refinement,
)
from evolmm_trl.sr2se.generation import Completion, generate
from evolmm_trl.sr2se.refinement import PairMaker, is_valid, rows_and_digest, states_answer
from evolmm_trl.sr2se.rows import BadRow, Row, read_rows


ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo"
PROMPTS = SubPolicyPrompts(**json.loads((DEMO / "sr2se_prompts.json").read_text()))
ROLE_PROMPTS = RolePrompts(**json.loads((DEMO / "prompts.json").read_text()))
SIZES = {"max_perception_tokens": 24, "max_step_tokens": 24, "max_answer_tokens": 6, "batch_size": 64}


@pytest.fixture(scope="module")
def policies():
    return SubPolicies(*load_model(DEMO / "models" / "sr2se"), PROMPTS, **SIZES)


@pytest.fixture
def data(tmp_path):
    """40 labelled questions about charts, as a JSONL file beside its images."""
    return write_charts(tmp_path / "charts", 40)


def write_charts(folder: Path, n: int) -> Path:
    folder.mkdir(parents=True)
    with open(folder / "data.jsonl", "w") as file:
        for i, row in enumerate(labelled_questions(VAL_SEEDS[:n])):
            row["image"].save(folder / f"{i:03d}.png")
            file.write(
                json.dumps({"image": f"{i:03d}.png", "question": row["question"], "answer": row["answer"]}) + "\n"
            )
    return folder / "data.jsonl"


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# Algorithm 3


class Scripted(SubPolicies):
    """Policies whose looks at an image and answers are given: question -> descriptions, description -> answer."""

    def __init__(self, processor, looks: dict[str, list[str]], answers: dict[str, str]):
        super().__init__(None, processor, PROMPTS)
        self.looks, self.answers, self.refined, self.cut_off = looks, answers, [], set()

    def perceive(self, images, questions, temperature=0.0, seed=None):
        return [self._completion(self.looks[question][0], 3) for question in questions]

    def refine(self, images, questions, descriptions, temperature=0.0, seed=None):
        self.refined.append(list(zip(questions, descriptions, strict=True)))
        nexts = [self.looks[q][self.looks[q].index(d) + 1] for q, d in zip(questions, descriptions, strict=True)]
        return [self._completion(text, 5) for text in nexts]

    def _completion(self, text, tokens):
        return Completion(text, tokens, cut_off=text in self.cut_off)

    def answer_from_text(self, questions, descriptions, samples=1, temperature=0.0, seed=None):
        assert samples > 1 or temperature == 0
        return [[Completion(f"<answer>{self.answers[d]}</answer>", 1)] * samples for d in descriptions]


LOOKS = {"q0": ["r0", "-", "-"], "q1": ["w1", "r1", "-"], "q2": ["w2", "w2b", "r2"], "q3": ["w3", "w3b", "w3c"]}
ANSWERS = {look: "7" if look.startswith("r") else "17" for looks in LOOKS.values() for look in looks}


@pytest.fixture
def rows(data):
    image = str(data.parent / "000.png")
    return [Row(i, image, f"q{i}", "7") for i in range(4)]


def make(policies, rows, looks=LOOKS, answers=ANSWERS, **config):
    scripted = Scripted(policies.processor, looks, answers)
    pairs, counts, skipped, _ = PairMaker(scripted, RefinementConfig(**config))(rows, 0)
    return pairs, counts, skipped, scripted


def test_a_pair_is_the_first_valid_refinement_and_the_original_description(policies, rows):
    pairs, counts, _, scripted = make(policies, rows)
    assert [(p["question"], p["chosen"], p["rejected"], p["iteration"]) for p in pairs] == [
        ("q1", "r1", "w1", 1),
        ("q2", "r2", "w2", 2),
    ]
    assert scripted.refined == [[("q1", "w1"), ("q2", "w2"), ("q3", "w3")], [("q2", "w2b"), ("q3", "w3b")]]
    expected = {"considered": 4, "initially_right": 1, "discarded": 1, "pairs": 2}
    assert expected.items() <= counts.items()
    assert (counts["chosen_tokens"], counts["rejected_tokens"], counts["chosen_longer"]) == (10, 6, 2)


@pytest.mark.parametrize("cut", ["r1", "w1"])
def test_a_description_that_was_cut_off_makes_no_pair(policies, rows, cut):
    """SR-DPO scores the end token of both."""
    scripted = Scripted(policies.processor, LOOKS, ANSWERS)
    scripted.cut_off = {cut}
    pairs, counts, _, _ = PairMaker(scripted, RefinementConfig())(rows, 0)
    assert [pair["chosen"] for pair in pairs] == ["r2"]
    assert (counts["cut_off"], counts["pairs"], counts["discarded"], counts["initially_right"]) == (1, 1, 1, 1)


def test_pairs_left_out_for_being_cut_off_are_counted_and_said(policies, data, tmp_path, caplog):
    short = SubPolicies(policies.model, policies.processor, PROMPTS, **{**SIZES, "max_perception_tokens": 4})
    report = build_pairs(short, data, tmp_path / "pairs.jsonl", RefinementConfig(answer_leak="declared"))
    assert report["cut_off"] > 0
    for pair in read(tmp_path / "pairs.jsonl"):  # with their end tokens, which were written
        tokens = policies.processor.tokenizer([pair["chosen"], pair["rejected"]])["input_ids"]
        assert max(map(len, tokens)) < 4
    assert f"{report['cut_off']} pairs were left out, since a description was cut off" in caplog.text
    assert "max_perception_tokens=4" in caplog.text


def test_shares_and_votes_that_make_no_sense_are_refused(policies):
    for share in (80, 0, -0.5):
        with pytest.raises(ValueError, match=f"`min_agreement` is {share}; expected a share"):
            RefinementConfig(min_agreement=share)
    for answers in (1, 0):
        with pytest.raises(ValueError, match=f"`num_answers` is {answers}; expected at least 2"):
            AgreementLabeller(policies, num_answers=answers)


def test_the_gate_learns_from_the_first_descriptions_and_whether_they_suffice(policies, rows):
    scripted, asked = Scripted(policies.processor, LOOKS, ANSWERS), []
    reasoner = SimpleNamespace(roll_out=lambda *args: asked.append(args) or "rollouts")
    *_, rollouts = PairMaker(scripted, RefinementConfig(), reasoner=reasoner)(rows, 0, roll_out=True)
    assert rollouts == "rollouts"
    (images, *others), *_ = asked
    assert [image.size for image in images] == [chart(VAL_SEEDS[0]).image().size] * 4
    assert others == [[f"q{i}" for i in range(4)], ["7"] * 4, ["r0", "w1", "w2", "w3"], [True, False, False, False]]


def test_no_more_than_n_max_refinements_are_made(policies, rows):
    pairs, counts, _, scripted = make(policies, rows, max_refinements=1)
    assert [pair["question"] for pair in pairs] == ["q1"]
    assert len(scripted.refined) == 1 and counts["discarded"] == 2
    pairs, _, _, scripted = make(policies, rows, max_refinements=0)
    assert pairs == [] and scripted.refined == []


def test_answers_are_compared_as_answers(policies, rows):
    """17 contains 7; a matcher of substrings would take every description for valid."""
    _, counts, _, _ = make(policies, rows, answers={**ANSWERS, "r0": "7.0"})
    assert counts["initially_right"] == 1


def test_a_winner_that_states_the_answer_makes_no_pair(policies, rows):
    looks = {**LOOKS, "q1": ["w1", "r it is 7 tall", "-"]}
    answers = {**ANSWERS, "r it is 7 tall": "7"}
    pairs, counts, _, _ = make(policies, rows, looks, answers)
    assert [pair["question"] for pair in pairs] == ["q2"]
    assert counts["states_answer"] == 1
    pairs, *_ = make(policies, rows, looks, answers, answer_leak="declared")
    assert [pair["question"] for pair in pairs] == ["q1", "q2"]


@pytest.mark.parametrize(
    ("description", "answer", "contains", "declared"),
    [
        ("red 5, blue 3.", "8", False, False),
        ("red 5, blue 3.", "5", True, False),
        ("red 5, blue 3.", "5.0", True, False),
        ("There are fifteen bars.", "5", False, False),
        ("There are 15 bars.", "5", False, False),
        ("A big red bar. 8.", "8", True, True),
        ("Two bars. The answer is 8 metres here.", "8", True, True),
        ("Two bars <answer>8</answer>", "9", True, True),
        ("There is no cat.", "no", False, False),
        ("There is no cat. No.", "no", True, True),
        ("A bird on a tree.", "A", False, False),
        ("A bird on a tree. Answer: A", "A", True, True),
        ("A Red  Bird, on a tree", "red bird", True, False),
        ("The bar (8) is red", "8", True, False),
        ("height=8, width:9", "8", True, False),
        ("height:8", "8", True, False),
        ("red/blue", "blue", True, False),
        ("It costs $8.", "8", True, False),
        ("It is **8** high", "8", True, False),
        ("A <answer>8", "8", True, True),
        ("a well-known bird", "known", True, False),
        # Yes, no, true and false: where a clause begins or ends
        ("Yes, the cat is there.", "yes", True, True),
        ("Two bars. So, no", "no", True, True),
        ("Therefore no.", "no", True, True),
        ("No, there is none", "no", True, True),
        ("The cat is there, yes, on the left.", "yes", True, True),
        ("It is **true**.", "true", True, True),
        ("There is no bar left of it", "no", False, False),
        ("bar B is taller", "no", False, False),
        ("A bar, which no-one sees, and no-one's bird.", "no", False, False),
        ("Yes, the cat is there.", "no", False, False),
        # An option's letter: a sentence's last word as a capital, or its first clause
        ("It is B.", "B", True, True),
        ("It is (B)", "b", True, True),
        ("B, as the red bar is taller.", "B", True, True),
        ("bar B is taller", "B", False, False),
        ("bar B is taller", "A", False, False),
        ("A is small, B is tall, and C is small.", "B", False, False),
        ("It is plan b.", "B", False, False),
        # Forms of one answer
        ("50 % of it is red", "50%", True, False),
        ("50 per cent of it is red", "50%", True, False),
        ("50% of it is red", "50 percent", True, False),
        ("50 of it are red", "50%", False, False),
        ("a dark red bar", "dark-red", True, False),
        ("a dark-red bar", "dark red", True, False),
        ("Two bars. Dark-red.", "dark red", True, True),
        ("a dark bar, a red bar", "dark-red", False, False),
    ],
)
def test_what_states_the_answer(description, answer, contains, declared):
    assert states_answer(description, answer, "contains") is contains
    assert states_answer(description, answer, "declared") is declared


def test_validation_is_greedy_or_m_of_n(policies, monkeypatch):
    asked = []

    def answer(questions, descriptions, samples, temperature, seed):
        asked.append((samples, temperature))
        texts = ["<answer>7</answer>", "<answer>8</answer>", "<answer>7</answer>"]
        return [[Completion(text, 1) for text in texts[:samples]] for _ in questions]

    monkeypatch.setattr(policies, "answer_from_text", answer)
    one = (policies, ["q"], ["d"], ["7"])
    assert is_valid(*one, RefinementConfig(), 0) == [True]
    assert is_valid(*one, RefinementConfig(validation_samples=3, validation_required=2), 0) == [True]
    assert is_valid(*one, RefinementConfig(validation_samples=3, validation_required=3), 0) == [False]
    assert asked == [(1, 0.0), (3, 0.7), (3, 0.7)]
    with pytest.raises(ValueError, match="validation_required"):
        RefinementConfig(validation_samples=2, validation_required=3)


def test_the_truth_is_in_no_prompt(policies, data, monkeypatch):
    """It judges descriptions; a model that were told it would write it into the winner."""
    asked = []

    def keep(model, processor, conversations, *args, **kwargs):
        asked.extend(conversations)
        return generate(model, processor, conversations, *args, **kwargs)

    monkeypatch.setattr("evolmm_trl.sr2se.sub_policies.generate", keep)
    rows = [replace(row, answer="xylophone") for row in itertools.islice(read_rows(data, (), data.parent), 4)]
    _, counts, *_ = PairMaker(policies, reasoner=EarlyExitReasoner(policies, max_steps=2))(rows, 0, roll_out=True)
    assert counts["discarded"] == 4 and len(asked) == 4 * (1 + 1 + 2 * 2 + 2 * 2)
    assert "xylophone" not in str(asked)


# Rows


def test_what_is_broken_missing_or_unreadable_is_skipped_counted_and_named(policies, data, tmp_path, caplog):
    lines = data.read_text().splitlines()[:6]
    record = json.loads(lines[0])
    (data.parent / "damaged.png").write_bytes(b"no image")
    lines += ["{broken", "[1, 2]", json.dumps({**record, "image": "nowhere.png"}), "", b"\xff\xfe".decode("latin-1")]
    lines += [json.dumps({name: record[name] for name in record if name != left_out}) for left_out in record]
    lines += [json.dumps({**record, "answer": " ... "}), json.dumps({**record, "image": "damaged.png"})]
    data.write_text("\n".join(lines) + "\n", encoding="latin-1")
    with caplog.at_level(logging.WARNING):
        report = build_pairs(policies, data, tmp_path / "pairs.jsonl", RefinementConfig(batch_size=4))
    assert report["considered"] == 6 and report["rows"] == 15
    assert report["skipped"] == {
        "broken JSON": 2,
        "not a JSON object": 1,
        "missing image": 1,
        "lacks image": 1,
        "lacks question": 1,
        "lacks answer": 2,
        "unreadable image: not an image": 1,
    }
    assert sum(report["skipped"].values()) == 9
    for named in ("data.jsonl:7", "nowhere.png", "damaged.png"):
        assert named in caplog.text and any(named in row for row in report["skipped_rows"])


def test_a_missing_source_and_a_folder_with_labels_are_refused(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_rows(tmp_path / "nowhere.jsonl", (), tmp_path)
    with pytest.raises(ValueError, match="labels=False"):
        read_rows(data.parent, ("question", "answer"), tmp_path)


def test_rows_are_read_as_a_stream(data, tmp_path):
    rows = read_rows(data, ("question", "answer"), tmp_path)
    assert next(rows).index == 0
    data.write_text("")  # what was not read yet cannot have been
    assert len(list(rows)) < 40


def read_images(source, folder, image_root=None) -> tuple[list[str], list[tuple[int, str]]]:
    """The names of the images that may be read, and the index and reason of the other rows."""
    rows = list(read_rows(source, (), folder, image_root))
    good = [Path(row.image_path).name for row in rows if isinstance(row, Row)]
    return good, [(row.index, row.reason) for row in rows if isinstance(row, BadRow)]


OUTSIDE = "path outside the image root"


@pytest.fixture
def places(tmp_path):
    """A folder of images, with links out of it, beside a secret one."""
    (tmp_path / "secret").mkdir()
    chart(0).image().save(tmp_path / "secret" / "s.png")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    chart(1).image().save(folder / "sub" / "a.png")
    (folder / "link.png").symlink_to(tmp_path / "secret" / "s.png")
    (folder / "out").symlink_to(tmp_path / "secret")
    return tmp_path


def test_a_strangers_paths_lead_into_their_root_alone(places, tmp_path, monkeypatch):
    secret, folder = places / "secret" / "s.png", places / "folder"
    outside = [
        "../secret/s.png",
        "sub/../../secret/s.png",
        str(secret),
        "link.png",
        "out/s.png",
        "/etc/passwd",
        "a\0b",
    ]
    inside = ["sub/a.png", "sub/../sub/a.png", str(folder / "sub" / "a.png"), "../folder/sub/a.png"]
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps({"image": name}) + "\n" for name in [*outside, *inside]))
    reasons = [*[OUTSIDE] * 6, "missing file"]
    assert read_images(file, tmp_path) == (["a.png"] * 4, list(enumerate(reasons)))
    # A root that is given is the only one, and where relative paths start
    file.write_text("".join(json.dumps({"image": name}) + "\n" for name in ["s.png", str(secret), "sub/a.png"]))
    assert read_images(file, tmp_path, places / "secret") == (["s.png", "s.png"], [(2, "missing image")])
    file.write_text(json.dumps({"image": str(folder / "sub" / "a.png")}))
    assert read_images(file, tmp_path, places / "secret") == ([], [(0, OUTSIDE)])
    # Without one, the working directory is another
    file.write_text(json.dumps({"image": str(secret)}))
    monkeypatch.chdir(places / "secret")
    assert read_images(file, tmp_path) == (["s.png"], [])
    with pytest.raises(ValueError, match="image_root"):
        read_rows(file, (), tmp_path, places / "nowhere")


def test_a_datasets_paths_lead_into_its_root_alone(places, tmp_path, monkeypatch):
    names = [str(places / "secret" / "s.png"), "sub/a.png", "link.png"]
    dataset = Dataset.from_dict({"image": names})
    assert read_images(dataset, tmp_path, places / "folder") == (["a.png"], [(0, OUTSIDE), (2, OUTSIDE)])
    monkeypatch.chdir(places / "folder")
    assert read_images(dataset, tmp_path) == (["a.png"], [(0, OUTSIDE), (2, OUTSIDE)])
    # Content that comes along is the image, whatever file of that name there is on this machine
    content = (places / "folder" / "sub" / "a.png").read_bytes()
    rows = [{"image": {"bytes": content, "path": str(places / "secret" / "s.png")}}]
    (row,) = read_rows(Dataset.from_list(rows), (), tmp_path / "written")
    assert Path(row.image_path).parent == tmp_path / "written"
    assert PIL.Image.open(row.image_path).tobytes() == chart(1).image().tobytes()


def test_a_folders_files_may_be_links_to_elsewhere(places, tmp_path):
    """The user has named the folder, and a link in it keeps its name in pairs."""
    assert read_images(places / "folder", tmp_path) == (["link.png", "a.png"], [])


def test_a_dataset_is_read_as_a_file_is(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = list(read_rows(data, ("question", "answer"), tmp_path))
    dataset = Dataset.from_list([{**row, "image": str(data.parent / row["image"])} for row in read(data)])
    for variant in (dataset, dataset.cast_column("image", Image()), dataset.to_iterable_dataset()):
        assert list(read_rows(variant, ("question", "answer"), tmp_path)) == expected


def test_images_that_are_no_files_are_written_to_some(tmp_path):
    dataset = Dataset.from_list([{"image": chart(0).image(), "question": "q", "answer": 5}, {"image": None}])
    row, bad = read_rows(dataset, ("question", "answer"), tmp_path / "images")
    assert row == Row(0, row.image_path, "q", "5") and Path(row.image_path).parent == tmp_path / "images"
    assert PIL.Image.open(row.image_path).tobytes() == chart(0).image().tobytes()
    assert bad == BadRow(1, "row 1", "lacks image")


def test_images_of_one_dataset_do_not_overwrite_those_of_another(tmp_path):
    rows = []
    for number in (0, 1):
        dataset = Dataset.from_list([{"image": chart(number).image(), "question": "q", "answer": 5}] * 2)
        rows.append(list(read_rows(dataset, (), tmp_path / "images")))
    for number, both in enumerate(rows):
        for row in both:
            assert PIL.Image.open(row.image_path).tobytes() == chart(number).image().tobytes()
    assert len(list((tmp_path / "images").iterdir())) == 2


# A whole source


def test_pairs_and_report_of_a_real_model(policies, data, tmp_path):
    output = tmp_path / "out" / "pairs.jsonl"
    report = build_pairs(policies, data, output, RefinementConfig(batch_size=16))
    pairs = read(output)
    fields = ["image_path", "question", "ground_truth", "chosen", "rejected", "iteration"]
    assert pairs and all(list(pair) == fields for pair in pairs)
    assert all(Path(pair["image_path"]).is_file() and pair["iteration"] in (1, 2) for pair in pairs)
    left_out = report["states_answer"] + report["cut_off"]
    assert len(pairs) == report["pairs"] == sum(report["refined_by_iteration"].values()) - left_out
    assert report["considered"] == 40
    assert report["initially_right"] + report["pairs"] + left_out + report["discarded"] == 40
    assert report["pair_yield"] == report["pairs"] / 40
    assert report["recovered"] == report["pairs"] / (40 - report["initially_right"])
    assert report["mean_chosen_tokens"] > 0
    for pair in pairs:
        row = [pair["question"]], [pair["chosen"]], [pair["ground_truth"]]
        assert is_valid(policies, *row, RefinementConfig(), 0) == [True]
        assert is_valid(policies, row[0], [pair["rejected"]], row[2], RefinementConfig(), 0) == [False]
        assert not states_answer(pair["chosen"], pair["ground_truth"])
    assert not list(output.parent.glob("*part*"))


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_pairs(policies, data, tmp_path, monkeypatch):
    config = RefinementConfig(batch_size=8)
    whole, stopped = tmp_path / "a" / "pairs.jsonl", tmp_path / "b" / "pairs.jsonl"
    build_pairs(policies, data, whole, config)
    original, calls = PairMaker.__call__, []

    def stop(self, rows, batch, roll_out=False):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, rows, batch, roll_out)

    monkeypatch.setattr(PairMaker, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        build_pairs(policies, data, stopped, config)
    assert not stopped.exists()
    with open(stopped.with_name("pairs.part-0-of-1.jsonl"), "ab") as file:
        file.write(b'{"half a pa')  # killed while it wrote
    build_pairs(policies, data, stopped, config)
    assert calls == [0, 1, 2, 2, 3, 4]
    assert stopped.read_bytes() == whole.read_bytes()
    report = json.loads(whole.with_name("pairs.jsonl.report.json").read_text())
    assert json.loads(stopped.with_name("pairs.jsonl.report.json").read_text()) == report
    calls.clear()
    assert build_pairs(policies, data, stopped, config) == report
    assert calls == []


def test_other_settings_than_those_begun_with_are_refused(policies, data, tmp_path, monkeypatch):
    output, config = tmp_path / "pairs.jsonl", RefinementConfig(max_rows=4)
    report = build_pairs(policies, data, output, config)
    with pytest.raises(
        ValueError,
        match=r"other settings \(config\).* remove .*/pairs\.jsonl\*, .*/pairs\.part-\* and the folder of rollouts",
    ):
        build_pairs(policies, data, output, RefinementConfig(max_rows=5))
    with monkeypatch.context() as patch:
        patch.setattr(policies, "max_perception_tokens", 9)
        with pytest.raises(ValueError, match=r"other settings \(policies\)"):
            build_pairs(policies, data, output, config)
        patch.undo()
        patch.setattr(policies, "batch_size", 3)  # what fits into memory is no matter of the outcome
        assert build_pairs(policies, data, output, config) == report
    weight = policies.model.get_input_embeddings().weight
    kept = weight[0].clone()
    try:
        weight.data[0] += 1e-3
        with pytest.raises(ValueError, match=r"other settings \(weights\)"):
            build_pairs(policies, data, output, config)
    finally:
        weight.data[0] = kept
    with open(data, "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"other settings \(source_content\)"):
        build_pairs(policies, data, output, config)


def test_a_source_by_another_spelling_of_its_path_is_the_same(policies, data, tmp_path, monkeypatch):
    output, config = tmp_path / "pairs.jsonl", RefinementConfig(max_rows=2)
    report = build_pairs(policies, data, output, config, image_root=data.parent)
    monkeypatch.chdir(tmp_path)
    assert build_pairs(policies, "charts/data.jsonl", output, config, image_root="charts") == report
    (tmp_path / "data.jsonl").symlink_to(data)  # image paths start from where the link is
    with pytest.raises(ValueError, match=r"other settings \(source\)"):
        build_pairs(policies, "data.jsonl", output, config, image_root="charts")


def test_a_folder_or_dataset_that_has_changed_is_refused(policies, data, tmp_path):
    config, labeller = RefinementConfig(max_rows=2, max_refinements=0), AgreementLabeller(policies, ROLE_PROMPTS)
    lines = [{**row, "image": str(data.parent / row["image"])} for row in read(data)[:3]]
    dataset = Dataset.from_list(lines)
    rooted = {"image_root": data.parent}
    report = build_pairs(policies, dataset, tmp_path / "dataset.jsonl", config, **rooted)
    assert build_pairs(policies, Dataset.from_list(lines), tmp_path / "dataset.jsonl", config, **rooted) == report
    with pytest.raises(ValueError, match=r"other settings \(source_content\)"):
        build_pairs(policies, dataset.select([2, 1, 0]), tmp_path / "dataset.jsonl", config, **rooted)

    report = build_pairs(policies, data.parent, tmp_path / "folder.jsonl", config, labeller=labeller)
    (data.parent / "gone.png").symlink_to(tmp_path / "nowhere")  # an image, too, if one that cannot be read
    (data.parent / "gone.png").unlink()
    assert build_pairs(policies, data.parent, tmp_path / "folder.jsonl", config, labeller=labeller) == report
    for change in (
        lambda: shutil.copy(data.parent / "000.png", data.parent / "000a.png"),
        lambda: (data.parent / "000a.png").write_bytes(b"of another size"),
        lambda: (data.parent / "001.png").unlink(),
    ):
        known = rows_and_digest(data.parent)
        change()
        assert rows_and_digest(data.parent) != known
        with pytest.raises(ValueError, match=r"other settings \(source_content\)"):
            build_pairs(policies, data.parent, tmp_path / "folder.jsonl", config, labeller=labeller)


def test_a_file_added_in_the_middle_of_a_run_is_noticed_when_it_goes_on(policies, data, tmp_path, monkeypatch):
    config, labeller = RefinementConfig(batch_size=1), AgreementLabeller(policies, ROLE_PROMPTS)
    done = []

    def stop(self, rows, batch, roll_out=False):
        if done:
            raise KeyboardInterrupt
        done.append(batch)
        return [], Counter(rows=1), [], None

    monkeypatch.setattr(PairMaker, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        build_pairs(policies, data.parent, tmp_path / "out" / "pairs.jsonl", config, labeller=labeller)
    shutil.copy(data.parent / "000.png", data.parent / "00.png")  # the first from now on
    with pytest.raises(ValueError, match=r"pairs.part-0-of-1.state.json .* other settings \(source_content\)"):
        build_pairs(policies, data.parent, tmp_path / "out" / "pairs.jsonl", config, labeller=labeller)


def test_pairs_do_not_replace_the_rows_that_they_are_made_of(policies, data, tmp_path):
    before = data.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(data)
    for output in (data, tmp_path / "link.jsonl", data.parent / ".." / "charts" / "data.jsonl"):
        with pytest.raises(ValueError, match="the source itself"):
            build_pairs(policies, data, output, RefinementConfig(max_rows=1))
    assert data.read_bytes() == before


@pytest.mark.parametrize(("looks", "name"), [(2, "pairs"), (0, "rollouts")])
def test_the_bar_counts_rows_that_are_done(policies, data, tmp_path, monkeypatch, looks, name):
    bars, seen = [], []

    class Bar(tqdm):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            bars.append(self)

    def make(self, rows, batch, roll_out=False):
        seen.append(bars[0].n)
        return [], Counter(rows=len(rows)), [], None

    monkeypatch.setattr(refinement, "tqdm", Bar)
    monkeypatch.setattr(PairMaker, "__call__", make)
    config = RefinementConfig(max_rows=10, batch_size=4, max_refinements=looks)
    build_pairs(policies, data, tmp_path / "pairs.jsonl", config)
    assert seen == [0, 4, 8] and bars[0].n == 10
    assert (bars[0].desc, bars[0].postfix) == (name, "pairs=0" if looks else None)


def test_a_report_without_its_pairs_counts_for_nothing(policies, data, tmp_path):
    config = RefinementConfig(max_rows=4)
    report = build_pairs(policies, data, tmp_path / "pairs.jsonl", config)
    (tmp_path / "pairs.jsonl").unlink()
    assert build_pairs(policies, data, tmp_path / "pairs.jsonl", config) == report
    assert (tmp_path / "pairs.jsonl").is_file()


def test_the_pairs_of_another_process_count_are_not_mixed_in(policies, data, tmp_path):
    (tmp_path / "pairs.part-0-of-2.jsonl").write_text("")
    with pytest.raises(ValueError, match="begun by another number of processes than the 1"):
        build_pairs(policies, data, tmp_path / "pairs.jsonl", RefinementConfig(max_rows=4))


_PROCESS = """
import sys
from test_sr2se_refinement import *
policies = SubPolicies(*load_model(DEMO / "models" / "sr2se"), PROMPTS, **SIZES)
build_pairs(policies, sys.argv[1], sys.argv[2], RefinementConfig(batch_size=8))
from accelerate import PartialState
state = PartialState()
Path(f"{sys.argv[2]}.process-{state.process_index}").write_text(str(state.num_processes))
state.destroy_process_group()  # left alone, gloo's threads now and then abort a process that has ended
"""


def test_two_processes_share_the_work_and_write_the_same_pairs(policies, data, tmp_path):
    build_pairs(policies, data, tmp_path / "one" / "pairs.jsonl", RefinementConfig(batch_size=8))
    script = tmp_path / "process.py"
    script.write_text(_PROCESS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(script), str(data)]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), str(DEMO), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(tmp_path / "two" / "pairs.jsonl")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    # a file of each process: lines that two processes print to one pipe may be mixed
    assert [(tmp_path / "two" / f"pairs.jsonl.process-{index}").read_text() for index in (0, 1)] == ["2", "2"]
    for name in ("pairs.jsonl", "pairs.jsonl.report.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_gate_rollouts_come_from_the_descriptions_of_the_pairs(policies, data, tmp_path):
    reasoner = EarlyExitReasoner(policies, max_steps=2)
    report = build_pairs(
        policies,
        data,
        tmp_path / "pairs.jsonl",
        RefinementConfig(batch_size=8, max_refinements=0),
        reasoner=reasoner,
        rollout_folder=tmp_path / "rollouts",
        rollout_rows=16,
    )
    files = sorted((tmp_path / "rollouts").iterdir())
    rollouts = GateRollouts.cat([GateRollouts.load(file) for file in files])
    assert len(files) == 2 and rollouts.hidden.shape[:2] == (16, 2) and len(rollouts.image.unique()) == 16
    assert report["pairs"] == 0 and 0 < rollouts.visual.sum() <= report["initially_right"]
    # Those of another run would be trained on as well
    with pytest.raises(ValueError, match="holds the rollouts of another run"):
        build_pairs(policies, data, tmp_path / "b.jsonl", reasoner=reasoner, rollout_folder=tmp_path / "rollouts")


# Without labels


def test_a_folder_of_images_yields_pairs(policies, data, tmp_path):
    labeller = AgreementLabeller(policies, ROLE_PROMPTS, max_question_tokens=16, max_answer_tokens=32)
    config = RefinementConfig(min_agreement=0.6, batch_size=16)
    report = build_pairs(policies, data.parent, tmp_path / "out" / "pairs.jsonl", config, labeller=labeller)
    pairs = read(tmp_path / "out" / "pairs.jsonl")
    assert report["asked"] == 40 and report["stand_in_accuracy"] is None
    assert report["considered"] + report["below_agreement"] + report["no_question"] == 40
    assert pairs and len(pairs) == report["pairs"]
    assert all(pair["question"] and pair["ground_truth"] for pair in pairs)


def test_labels_are_compared_with_the_stand_ins_and_never_used(policies, data, tmp_path):
    labeller = AgreementLabeller(policies, ROLE_PROMPTS, max_question_tokens=16, max_answer_tokens=32)
    lines = read(data)
    wrong = data.with_name("wrong.jsonl")
    wrong.write_text("".join(json.dumps({**line, "answer": "none of it"}) + "\n" for line in lines))
    config = RefinementConfig(min_agreement=0.6, batch_size=16)
    reports = {
        name: build_pairs(policies, file, tmp_path / name / "pairs.jsonl", config, labeller=labeller)
        for name, file in (("true", data), ("wrong", wrong))
    }
    assert (tmp_path / "true" / "pairs.jsonl").read_bytes() == (tmp_path / "wrong" / "pairs.jsonl").read_bytes()
    assert reports["wrong"]["stand_in_accuracy"] == 0
    assert reports["true"]["stand_in_accuracy"] > 0.5
    assert reports["true"]["stand_ins_checked"] + reports["true"]["below_agreement"] == 40
    assert reports["true"]["asked"] == 0


def test_only_a_majority_that_agrees_enough_stands_in(policies, data):
    labeller = AgreementLabeller(policies, ROLE_PROMPTS, max_answer_tokens=32)
    rows = list(read_rows(data, ("question",), data.parent))
    kept = []
    for share in (0.2, 0.8, 1.0):
        _, counts, _, _ = PairMaker(policies, RefinementConfig(min_agreement=share, max_refinements=0), labeller)(
            rows, 0
        )
        kept.append(counts["considered"])
    assert 40 >= kept[0] > kept[1] > kept[2] > 0
