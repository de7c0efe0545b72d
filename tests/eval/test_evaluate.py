"""Evaluations: the images of each condition, intervals, and what a report holds."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import numpy as np
import pytest

import mllm
import mllm.data.sources
import mllm.encoders.dual_encoder
from mllm.errors import MLLMError
from mllm.testing import tiny_image


@pytest.fixture
def captions(tmp_path):
    """A folder as the suite coco-captions reads it: six images, two captions each."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for index in range(6):
        tiny_image(index).save(tmp_path / "images" / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png"})
        annotations += [{"image_id": index, "caption": f"picture {index} of {word}"} for word in ("dogs", "a cat")]
    (tmp_path / "captions_val.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path


@pytest.fixture
def model(tiny_parts):
    return mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 4})


def test_each_condition_gets_the_images_of_its_name(model, captions, monkeypatch):
    batches: list[list[list[Any]]] = []
    see_each = model.see_each

    def watched(prompts):
        batches.append(prompts)
        return see_each(prompts)

    monkeypatch.setattr(model, "see_each", watched)
    report = mllm.evaluate(model, "coco-captions", captions)
    ours, blind = batches  # the shuffled condition asks nothing new: its answers are known
    assert len(ours) == 6 and all(len([p for p in prompt if not isinstance(p, str)]) == 1 for prompt in ours)
    assert blind == [["A picture of"]]  # equal prompts are answered once
    predictions = {row["id"]: row["prediction"] for row in report.rows}
    borrowed = [row["baselines"]["shuffled"] for row in report.rows]
    assert sorted(borrowed) == sorted(predictions.values())
    assert all(row["baselines"]["shuffled"] != row["prediction"] for row in report.rows)


def test_choosing_subtracts_each_choices_mean_likelihood():
    chosen = import_module("mllm.eval.answers.choices").chosen
    # "yes" is always likely; the image decides once half of the mean is subtracted.
    scores = [{"yes": -1.0, "no": -3.0}, {"yes": -1.4, "no": -1.6}, {"yes": -0.2, "no": -4.0}]
    assert chosen(scores, 0.0) == ["yes", "yes", "yes"]
    assert chosen(scores, 0.5) == ["yes", "no", "yes"]  # means: yes -0.867, no -2.867
    uneven = [{"a": -1.0, "b": -1.2}, {"a": -1.0, "c": -1.2}]
    assert chosen(uneven, 1.0) == ["a", "a"]


def test_predictions_are_the_models_answers_and_scores_the_metrics(model, captions):
    report = mllm.evaluate(model, "coco-captions", captions)
    for row in report.rows:
        image = captions / "images" / f"{row['id']}.png"
        assert row["prediction"] == str(model.generate([[image, "A picture of"]], max_new_tokens=30)[0])
    predictions = [row["prediction"] for row in report.rows]
    references = [row["references"] for row in report.rows]
    for name in ("caption/cider-d", "caption/bleu-4", "caption/rouge-l"):
        assert report[name]["value"] == mllm.metric(name)(predictions, references).value
    again = mllm.evaluate(model, "coco-captions", captions)
    assert again.rows == report.rows and again.summary == report.summary


def test_the_files_hold_the_report(model, captions, tmp_path):
    report = mllm.evaluate(model, "coco-captions", captions, limit=4, out=tmp_path / "out", run="mine")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert (summary["n"], summary["run"], len(rows)) == (4, "mine", 4)
    assert rows == report.rows and report.page == tmp_path / "out/report.html"
    assert {"prompt", "decoding", "data", "lm"} <= summary["settings"].keys() and "torch" in summary["versions"]


def test_the_report_shows_the_words_of_each_image(tiny_parts, captions, tmp_path):
    connector = {"type": "linear", "tokens": 4, "vocabulary": {"words": ["a", "b", "c"]}}
    model = mllm.assemble(tiny_parts[0], tiny_parts[1], connector)
    report = mllm.evaluate(
        model, "coco-captions", captions, limit=3, out=tmp_path / "out", baselines=["random-connector"]
    )
    words = model.words([captions / "images" / f"{index}.png" for index in range(3)])
    for row, each in zip(report.rows, words, strict=True):
        assert set(row["words"]) <= set("abc") and set(row["words"]) == {letter for letter in each if letter != "."}
    assert '"words"' in (tmp_path / "out/report.html").read_text()
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [row["words"] for row in rows] == [row["words"] for row in report.rows]


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    interval = import_module("mllm.eval.scoring").interval
    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = interval(draw.normal(0.3, 1.0, 100), resamples=200, seed=seed)
        covered += low <= 0.3 <= high
    assert 178 <= covered <= 199  # 190 expected; the bounds allow for chance (1 in 1,000) and the bootstrap's own bias


def test_bad_requests_are_one_message(model, captions):
    with pytest.raises(MLLMError, match="Did you mean 'coco-captions'"):
        mllm.evaluate(model, "coco-caption", captions)
    with pytest.raises(MLLMError, match="needs --data"):
        mllm.evaluate(model, "coco-captions")
    with pytest.raises(MLLMError, match="blnd"):
        mllm.evaluate(model, "coco-captions", captions, baselines=["blnd"])
    (captions / "images/3.png").unlink()
    with pytest.raises(MLLMError, match=r"1 of 6 images are missing.*3\.png"):
        mllm.evaluate(model, "coco-captions", captions)


@pytest.mark.installed
@pytest.mark.parametrize("name", import_module("mllm.eval.suite").suite_names())
def test_every_suite_reads_its_data_and_its_metrics_exist(name):
    suite = import_module("mllm.eval.suite").load_suite(name)
    assert all(mllm.metric(metric) for metric in suite.metrics)
    if not suite.folder:
        items = mllm.data.sources.read(suite.data)
        assert items and all(item.answers for item in items)
        assert suite.answer != "choose" or all(item.answers[0] in item.choices for item in items)


def test_mentioned_counts_whole_words():
    score = mllm.metric("caption/mentioned")(
        ["A Dog and two cats.", "a hotdog", "nothing"], [["dog", "cats", "horse"], ["dog"], ["t-rex"]]
    )
    assert score.per_item == [pytest.approx(2 / 3), 0.0, 0.0]


def test_a_killed_evaluation_continues_and_ends_with_the_same_files(model, captions, tmp_path, monkeypatch):
    options: dict[str, Any] = {
        "overrides": ["batch_size=2"],
        "baselines": ["blind", "shuffled", "mean-image", "random-connector"],
    }
    mllm.evaluate(model, "coco-captions", captions, out=tmp_path / "whole", **options)
    see_each, asked = model.see_each, []

    def killed(prompts):
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return see_each(prompts)

    with monkeypatch.context() as patch:
        patch.setattr(model, "see_each", killed)
        with pytest.raises(KeyboardInterrupt):
            mllm.evaluate(model, "coco-captions", captions, out=tmp_path / "cut", **options)
        journal = tmp_path / "cut" / "answers.0.partial.jsonl"
        assert not (tmp_path / "cut" / "report.html").exists()
        journal.write_text(journal.read_text() + '["model/2", ["half a li')  # the kill fell into a write
        with pytest.raises(MLLMError, match="is of another evaluation"):
            mllm.evaluate(model, "coco-captions", captions, limit=5, out=tmp_path / "cut", **options)
        asked.append(0)
        mllm.evaluate(model, "coco-captions", captions, out=tmp_path / "cut", **options)
    assert asked[4:] == [2, 1, 1]  # the model's third batch, then blind and mean-image: one prompt each
    for name in ("summary.json", "predictions.jsonl", "report.html"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not journal.exists()


def test_the_further_baselines_have_the_images_of_their_names(model, captions):
    baselines = import_module("mllm.eval.baselines")
    suite = import_module("mllm.eval.suite")
    config = suite.load_suite("coco-captions")
    items = suite.read_items(config, captions)
    conditions = baselines.conditions(model, items, ["mean-image", "random-connector"])
    (mean,) = conditions["mean-image"].items[0].images
    expected = np.mean([np.asarray(i.images[0].open().resize((224, 224)), dtype=float) for i in items], axis=0)
    assert np.abs(np.asarray(mean.open()) - expected).max() <= 0.5
    other = conditions["random-connector"].model
    assert other.lm is model.lm and other.encoder is model.encoder
    mine, theirs = (m.connector(m.features(items[0].images)) for m in (model, other))
    assert not np.allclose(mine.detach().numpy(), theirs.detach().numpy())
    assert float(theirs.detach().std()) == pytest.approx(model.lm.embedding_scale(), rel=0.2)


def test_what_cannot_be_believed_is_not_scored(model, captions, monkeypatch, tmp_path):
    content = json.loads((captions / "captions_val.json").read_text())
    suite = "name: mine\nabout: x\ndata: {format: coco-captions}\nmetrics: [caption/rouge-l]\n"
    suite += "folder: {annotations: captions_val.json, images: images}\n"
    (tmp_path / "mine.yaml").write_text(suite)
    assert mllm.evaluate(model, str(tmp_path / "mine.yaml"), captions, limit=2).summary["suite"] == "mine"
    with pytest.raises(MLLMError, match="cannot be read"):
        mllm.evaluate(model, str(tmp_path / "none.yaml"), captions)
    (captions / "captions_val.json").write_text(json.dumps(content)[:-9])
    with pytest.raises(MLLMError, match=r"captions_val\.json is not JSON"):
        mllm.evaluate(model, str(tmp_path / "mine.yaml"), captions)
    crepe = tmp_path / "crepe"
    write_crepe(crepe)
    monkeypatch.setattr(mllm.answering.view.View, "score", lambda view, choices: [float("nan")] * len(choices))
    with pytest.raises(MLLMError, match=r"'swap_att/0'.*not finite"):
        mllm.evaluate(model, "sugarcrepe", crepe)


def write_crepe(folder):
    """SugarCrepe's layout, of two items."""
    for name in ("data", "val2017"):
        (folder / name).mkdir(parents=True)
    for index in range(2):
        tiny_image(index).save(folder / "val2017" / f"{index}.png")
    pairs = {str(i): {"filename": f"{i}.png", "caption": f"red {i}", "negative_caption": f"blue {i}"} for i in range(2)}
    (folder / "data/swap_att.json").write_text(json.dumps(pairs))


def write_winoground(folder):
    (folder / "images").mkdir(parents=True)
    lines = []
    for index in range(3):
        for side in (0, 1):
            tiny_image(10 * index + side).save(folder / "images" / f"ex_{index}_img_{side}.png")
        row = {"id": index, "image_0": f"ex_{index}_img_0", "image_1": f"ex_{index}_img_1"}
        lines.append(json.dumps(row | {"caption_0": f"some {index} on it", "caption_1": f"it on {index} some"}))
    (folder / "examples.jsonl").write_text("\n".join(lines))


def test_winoground_compares_the_likelihoods_of_all_pairs(model, tmp_path):
    write_winoground(tmp_path)
    report = mllm.evaluate(model, "winoground", tmp_path)
    for index, row in enumerate(report.rows):
        captions = [f"some {index} on it", f"it on {index} some"]
        a, b = (
            model.score([tmp_path / "images" / f"ex_{index}_img_{side}.png", "A picture of"], captions)
            for side in (0, 1)
        )
        text, image = a[0] > a[1] and b[1] > b[0], a[0] > b[0] and b[1] > a[1]
        expected = {"match/text": text, "match/image": image, "match/group": text and image}
        assert row["scores"] == {name: float(passed) for name, passed in expected.items()}
    blind = [entry["baselines"]["blind"]["value"] for entry in report.summary["metrics"]]
    assert blind == [0.0, 0.0, 0.0]  # without the images nothing is preferred
    matched, item = import_module("mllm.eval.answers.choices").matched, import_module("mllm.data.items").Item
    pair = item("w", (), ("text",), choices=("x", "y"))
    assert matched(pair, [{"x": -1.0, "y": -2.0}, {"x": -5.0, "y": -4.0}]) == "text"
    assert matched(pair, [{"x": -1.0, "y": -2.0}, {"x": -3.0, "y": -1.0}]) == "text image group"
    assert matched(pair, [{"x": -3.0, "y": -2.0}, {"x": -4.0, "y": -1.0}]) == "image"


def test_examples_come_before_an_item_and_are_encoded_once(model, captions):
    options = ["shots.count=2", "batch_size=4"]
    inline = mllm.evaluate(model, "coco-captions", captions, overrides=[*options, "batch_size=1"], limit=3)
    suite, shots = import_module("mllm.eval.suite"), import_module("mllm.eval.shots")
    config = suite.load_suite("coco-captions", options)
    items = suite.read_items(config, captions)
    for row, item in zip(inline.rows, shots.with_shots(items[:3], items, config.shots, model), strict=True):
        assert len({item.id, *(shot.id for shot in item.shots)}) == 3  # never the item itself
        prompt = [p for shot in item.shots for p in (shot.images[0], f"A picture of {shot.answers[0]}\n")]
        expected = model.generate([[*prompt, item.images[0], "A picture of"]], max_new_tokens=30)[0]
        assert row["prediction"] == str(expected)
        blind = "".join(f"A picture of {shot.answers[0]}\n" for shot in item.shots)
        assert row["baselines"]["blind"] == str(model.generate([[f"{blind}A picture of"]], max_new_tokens=30)[0])
    # Fixed examples are encoded once for a whole batch; the answers are those to the whole prompt.
    config = suite.load_suite("coco-captions", [*options, "shots.select=fixed", "shots.seed=1"])
    fixed = shots.with_shots(items[:1], items[2:], config.shots, model)[0].shots
    (captions / "three.json").write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": f"{i}.png"} for i in range(2)],
                "annotations": [{"image_id": i, "caption": "x"} for i in range(2)],
            }
        )
    )
    keep = json.loads((captions / "captions_val.json").read_text())
    keep = {"images": keep["images"][2:], "annotations": keep["annotations"][4:]}
    (captions / "pool.json").write_text(json.dumps(keep))
    report = mllm.evaluate(
        model,
        "coco-captions",
        captions,
        overrides=[
            "folder.annotations=three.json",
            "shots={count: 2, select: fixed, seed: 1, data: {format: coco-captions}, "
            "folder: {annotations: pool.json, images: images}}",
        ],
    )
    prompt = [p for shot in fixed for p in (shot.images[0], f"A picture of {shot.answers[0]}\n")]
    for index, row in enumerate(report.rows):
        whole = [*prompt, captions / "images" / f"{index}.png", "A picture of"]
        assert row["prediction"] == str(model.generate([whole], max_new_tokens=30)[0])
    with pytest.raises(MLLMError, match="Fixed shots"):
        mllm.evaluate(model, "coco-captions", captions, overrides=["shots={count: 1, select: fixed}"])
    with pytest.raises(MLLMError, match="needs 7 examples, and there are 5"):
        mllm.evaluate(model, "coco-captions", captions, overrides=["shots.count=7"])


def test_similar_examples_are_those_of_the_most_similar_images(model, tmp_path):
    item, source = import_module("mllm.data.items").Item, import_module("mllm.media.images").source_of
    shots, suite = import_module("mllm.eval.shots"), import_module("mllm.eval.suite")
    pool = [item(str(i), (source_of_file(tmp_path, i),), ("x",)) for i in range(5)]
    array = np.asarray(tiny_image(3)).copy()
    array[0, 0] = 0  # an image that is almost the fourth
    asked = item("asked", (source(array),), ("x",))
    config = suite.Shots.model_validate({"count": 2, "select": "similar"})
    (item_with_shots,) = shots.with_shots([asked], pool, config, model)
    assert item_with_shots.shots[-1].id == "3" and item_with_shots.shots[0].id != "3"


def source_of_file(folder, index):
    tiny_image(index).save(folder / f"{index}.png")
    return import_module("mllm.media.images").source_of(folder / f"{index}.png")


@pytest.mark.parametrize("find", ["text", "image"])
def test_retrieval_ranks_by_the_scorer(model, tiny_clip, tmp_path, find):
    images = []
    for index in range(4):
        tiny_image(index).save(tmp_path / f"{index}.png")
        row = {"filename": f"{index}.png", "imgid": index, "split": "test" if index < 3 else "train"}
        images.append(row | {"sentences": [{"raw": f"{word} {index}"} for word in ("a", "the")]})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    report = mllm.evaluate(
        model, f"coco-{find}-retrieval", tmp_path, overrides=[f"scorer={{type: dual-encoder, model: {tiny_clip}}}"]
    )
    texts = [f"{word} {index}" for index in range(3) for word in ("a", "the")]
    closeness = mllm.encoders.dual_encoder.DualEncoder(model=tiny_clip).image_text(
        [tmp_path / f"{i}.png" for i in range(3)], texts
    )
    table = closeness if find == "text" else closeness.T
    assert [row["prediction"] for row in report.rows] == [
        " ".join(map(str, line.argsort(descending=True).tolist())) for line in table
    ]
    expected = [["0", "1"], ["2", "3"], ["4", "5"]] if find == "text" else [["0"], ["0"], ["1"], ["1"], ["2"], ["2"]]
    assert [row["references"] for row in report.rows] == expected
    with pytest.raises(MLLMError, match="has the baselines shuffled, and no 'blind'"):
        mllm.evaluate(model, f"coco-{find}-retrieval", tmp_path, baselines=["blind"])


def test_several_processes_leave_the_files_of_one(model, captions, start, tmp_path):
    model.save(tmp_path / "model")
    command = ["eval", tmp_path / "model", "batch_size=2", "--suite", "coco-captions"]
    command += ["--data", captions, "--baselines", "all", "--out"]
    for count, name in ((1, "one"), (2, "two")):
        output = start(*command, tmp_path / name, count=count).finish()
        assert output.count("Report: ") == 1  # two that know nothing of each other would say it twice
    for name in ("summary.json", "predictions.jsonl", "report.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert not list((tmp_path / "two").glob("*.partial.jsonl"))
