"""Test the stream of examples: determined by the seed, skippable, shared by processes, and never splitting an image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllm.config import loading as recipe
from mllm.config.data import Data, DataSpec
from mllm.config.prompt import PromptSpec
from mllm.data.items import Item, pieces_of
from mllm.data.lazy import Lazy
from mllm.data.sources import Source, fingerprint, read, read_all
from mllm.data.stream import Stream
from mllm.errors import MLLMError
from mllm.media.images import ImageFile
from mllm.prompts.batch import IGNORED, collate
from mllm.prompts.pieces import Target, images_of
from mllm.testing import tiny_image


class Counted(Lazy):
    """Lazy items that record which of them were read."""

    def __init__(self, size: int, shards: int = 1) -> None:
        self.asked = list[int]()
        each = size // shards
        ranges = [range(start, start + each) for start in range(0, size, each)]
        super().__init__(size, self._read, fingerprint=lambda: "", shards=ranges)

    def _read(self, index: int) -> Item:
        self.asked.append(index)
        return item(index)


def item(index: int) -> Item:
    words = " ".join(["word"] * (index % 7))
    return Item(str(index), (ImageFile(Path(f"{index}.png")),), (f"{index} {words}", f"no {index} {words}"))


def sources(**keys: Any) -> list[Source]:
    first = Source(
        DataSpec.model_validate({"format": "one", "weight": 2, **keys}), [item(index) for index in range(30)]
    )
    return [first, Source(DataSpec(format="two"), Counted(24, shards=6))]


def stream(model: Any, mixture: list[Source], **data: Any) -> Stream:
    options = {"lm": model.lm, "num_visual": 4, "data": Data.model_validate(data)}
    return Stream(mixture, PromptSpec(), seed=3, **options)


SETTINGS = [({}, {}), ({"shots": 2}, {}), ({"concatenate": 0.5}, {"group_by_length": 3}), ({}, {"max_length": 40})]


@pytest.mark.parametrize(("keys", "data"), SETTINGS)
def test_skipping_does_not_change_later_examples(tiny_model: Callable[..., Any], keys: Any, data: Any):
    model = tiny_model()
    whole = stream(model, sources(**keys), **data)
    batches = [whole.take(4) for _ in range(30)]
    for done in (1, 5, 17):
        mixture = sources(**keys)
        resumed = stream(model, mixture, **data)
        resumed.skip(done, 4)
        assert isinstance(mixture[1].items, Counted)
        assert len(mixture[1].items.asked) <= (12 if data.get("group_by_length") else 0)
        assert [resumed.take(4) for _ in range(3)] == batches[done : done + 3]
    shared = [stream(model, sources(**keys), **data) for _ in range(2)]
    for batch in batches[:8]:
        parts = [one.take(4, rank=rank, world=2) for rank, one in enumerate(shared)]
        assert [parts[index % 2][index // 2] for index in range(4)] == batch


def test_a_process_reads_only_its_part() -> None:
    items = Counted(24)
    Stream([Source(DataSpec(format="x"), items)], PromptSpec(), seed=0).take(12, rank=1, world=3)
    assert len(items.asked) == 4


def test_all_sharded_items_come_a_few_shards_at_a_time() -> None:
    items = Counted(40, shards=10)
    epochs = Stream([Source(DataSpec(format="x"), items)], PromptSpec(), seed=0)
    epochs.take(40)
    assert sorted(items.asked) == list(range(40))
    assert [len({index // 4 for index in items.asked[start : start + 16]}) for start in (0, 16)] == [4, 4]
    first, items.asked = items.asked, []
    epochs.take(40)
    assert sorted(items.asked) == list(range(40)) and items.asked != first


def test_lengths_within_a_batch_are_similar_and_no_example_is_lost(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model({"type": "linear", "tokens": 4})
    mixture = [Source(DataSpec(format="x"), [item(index) for index in range(32)])]

    def spread(**data: Any) -> tuple[int, list[str]]:
        one = stream(model, mixture, **data)
        batches = [one.take(4) for _ in range(8)]
        lengths = [[len(model.encode(pieces).ids) for pieces in batch] for batch in batches]
        names = sorted(str(image.path) for batch in batches for pieces in batch for image in images_of(pieces))
        return sum(max(row) - min(row) for row in lengths), names

    (loose, every), (tight, same) = spread(), spread(group_by_length=8)
    assert every == same and tight < loose / 4


def test_a_fraction_is_the_same_for_a_seed_and_part_of_a_larger_one(tmp_path: Path) -> None:
    tiny_image().save(tmp_path / "0.png")
    rows = [{"image": "0.png", "question": f"{index}?", "answer": "x"} for index in range(200)]
    (tmp_path / "t.json").write_text(json.dumps(rows))

    def ids(fraction: float, seed: int = 0) -> set[str]:
        spec = DataSpec.model_validate({"format": "table", "path": str(tmp_path / "t.json"), "fraction": fraction})
        return {one.id for one in read(spec, seed=seed)}

    assert [len(ids(fraction)) for fraction in (0.01, 0.013, 0.1, 1)] == [2, 3, 20, 200]
    assert ids(0.01) < ids(0.1) == ids(0.1) != ids(0.1, seed=1)


def test_pairs_are_concatenated(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model({"type": "linear", "tokens": 4})
    mixture = [Source(DataSpec(format="x", concatenate=0.5), [item(index) for index in range(30)])]
    rows = stream(model, mixture).take(300)
    double = [pieces for pieces in rows if len(images_of(pieces)) == 2]
    assert abs(len(double) - 150) < 4 * 75**0.5 and all(len(images_of(pieces)) <= 2 for pieces in rows)
    for pieces in double[:20]:
        first, prompt, target, gap, second, again, last = pieces
        assert first != second and (prompt, gap, again) == ("A picture of", "\n", "A picture of")
        labels = [label for label in model.encode(pieces).labels if label != IGNORED]
        eos = [model.lm.eos]
        assert labels == [*model.lm.tokenize(target.text), *eos, *model.lm.tokenize(last.text), *eos]


def test_shots_are_not_targets(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    for pieces in stream(model, [Source(DataSpec(format="x", shots=2), [item(i) for i in range(5)])]).take(40):
        assert len({*images_of(pieces)}) == 3
        assert [type(piece) for piece in pieces if not isinstance(piece, str | ImageFile)] == [Target]
        assert pieces[-1] == Target(f" {pieces[-1].text.strip()}") and pieces[2].endswith("\n")


def test_items_that_cannot_be_combined_are_refused() -> None:
    talk = Item("a", (), (), messages=({"role": "user", "content": []},))
    with pytest.raises(MLLMError, match="either 'shots' or 'concatenate'"):
        recipe.load("limber-cpu", {"data.val": [{"format": "easy-vqa", "shots": 1, "concatenate": 0.1}]})
    spec = DataSpec(format="table", shots=3)
    for items, message in (
        ([talk] * 4, "is a conversation or a document"),
        ([item(1)] * 4, "only 0 examples show another image"),
    ):
        (only,) = Stream([Source(spec, items)], PromptSpec(), seed=0).take(1)
        with pytest.raises(MLLMError, match=rf"table, item \d: .*{message}"):
            only[0].open()


def test_too_few_items_for_shots_are_refused_before_training(tmp_path: Path) -> None:
    tiny_image().save(tmp_path / "0.png")
    (tmp_path / "t.json").write_text(json.dumps([{"image": "0.png", "caption": "x"}]))
    spec = DataSpec.model_validate({"format": "table", "path": str(tmp_path / "t.json"), "shots": 1})
    with pytest.raises(MLLMError, match="has 1 items; shots and concatenate need 2"):
        read_all([spec])


DOCUMENT = Item(
    "page",
    (),
    (),
    document=("It starts", ImageFile(Path("0.png")), "goes on and on", ImageFile(Path("1.png")), "and ends here"),
)


def test_all_texts_of_a_document_are_targets_with_one_end(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model({"type": "linear", "tokens": 4})
    encoded = model.encode(pieces_of(DOCUMENT, PromptSpec()))
    lm = model.lm
    texts = [lm.tokenize(text) for text in ("It starts", "goes on and on", "and ends here")]
    assert encoded.ids == [*texts[0], *[lm.pad] * 4, *texts[1], *[lm.pad] * 4, *texts[2], lm.eos]
    nothing = [IGNORED] * 4
    # The first token has no context to be predicted from, and no end is a target where an image follows.
    assert encoded.labels == [IGNORED, *texts[0][1:], *nothing, *texts[1], *nothing, *texts[2], lm.eos]
    open_end = Item("page", (), (), document=DOCUMENT.document[:4])
    assert pieces_of(open_end, PromptSpec())[-1] == Target("goes on and on", ends=False)


@pytest.mark.parametrize("limit", range(8, 44))
def test_long_examples_lose_text_but_never_a_part_of_an_image(tiny_model: Callable[..., Any], limit: int) -> None:
    model = tiny_model({"type": "linear", "tokens": 4})
    whole = model.encode(pieces_of(DOCUMENT, PromptSpec()))
    mixture = [Source(DataSpec(format="x"), [DOCUMENT])]
    (pieces,) = stream(model, mixture, max_length=limit, truncate="text").take(1)
    encoded = model.encode(pieces)
    assert len(encoded.ids) <= limit and sum(encoded.visual) == 4 * len(images_of(pieces))
    assert encoded.ids == whole.ids[: len(encoded.ids)] and encoded.labels == whole.labels[: len(encoded.ids)]
    batch = collate([encoded], model.lm.pad)
    assert bool((batch.labels >= 0).any())
    (dropped,) = stream(model, mixture, max_length=limit).take(1)
    if limit < len(whole.ids):
        with pytest.raises(MLLMError, match=rf"x, item 0: {len(whole.ids)} tokens, and data.max_length is {limit}"):
            dropped[0].open()
    else:
        assert dropped == pieces_of(DOCUMENT, PromptSpec())


def test_a_fingerprint_depends_on_content_and_not_on_paths(tmp_path: Path) -> None:
    def fingerprint_of(folder: str, seed: int, caption: str) -> list[dict[str, Any]]:
        path = tmp_path / folder
        path.mkdir()
        tiny_image(seed).save(path / "0.png")
        (path / "t.json").write_text(json.dumps([{"image": "0.png", "caption": caption}]))
        return fingerprint(read_all([DataSpec.model_validate({"format": "table", "path": str(path / "t.json")})]))

    first = fingerprint_of("a", 0, "x")
    assert first == fingerprint_of("b", 0, "x") and first[0]["items"] == 1
    assert first != fingerprint_of("c", 1, "x") and first != fingerprint_of("d", 0, "y")


def test_a_source_has_words_of_its_own(tiny_model: Callable[..., Any]):
    first, second = sources(prompt={"caption": "", "template": "{images} is {prompt}"})
    shown = stream(tiny_model(), [first, second]).take(40)
    texts = {tuple(piece for piece in pieces if isinstance(piece, str)) for pieces in shown}
    assert texts == {(" is ",), ("A picture of",)}


def test_words_that_are_no_prompt_format_are_refused_when_the_recipe_is_read() -> None:
    with pytest.raises(MLLMError, match=r"(?s)data.*words"):
        recipe.load("mapl", {"data.train.prompt": {"words": ""}})
    with pytest.raises(MLLMError, match="question"):
        recipe.load("mapl", {"data.train.prompt": {"question": "no field"}})


def test_a_caption_is_split_at_a_random_word(tiny_model: Callable[..., Any]):
    item = Item("a", (ImageFile(Path("a.png")),), ("one two three four",))
    spec = DataSpec(format="x", caption_split="random", prompt={"caption": ""})
    rows = Stream([Source(spec, [item])], PromptSpec(), seed=0).take(200)
    splits = Counter(("".join(p for p in row if isinstance(p, str)), row[-1]) for row in rows)
    words = ["one", "two", "three", "four"]
    wanted = {
        ("".join(f" {word}" for word in words[:place]), Target(" " + " ".join(words[place:]))) for place in range(4)
    }
    assert splits.keys() == wanted and min(splits.values()) > 25
    question = Item("q", item.images, ("one two",), question="which?")
    assert all(
        row[-1] == Target(" one two") for row in Stream([Source(spec, [question])], PromptSpec(), seed=0).take(9)
    )


@pytest.mark.parametrize("limit", [1, 3, 8, 100])
def test_an_answer_has_a_limit_of_its_own(tiny_model: Callable[..., Any], limit: int):
    model, caption = tiny_model(), "a long caption of some words"
    mixture = [Source(DataSpec(format="x"), [Item("a", (ImageFile(Path("a.png")),), (caption,))])]
    (pieces,) = stream(model, mixture, answer_length=limit).take(1)
    target, words = pieces[-1], caption.split()
    heads = [" " + " ".join(words[:number]) for number in range(1, 7)]
    whole = [head for head in heads if len(model.lm.tokenize(head)) <= limit]
    assert target.text == whole[-1] if whole else heads[0].startswith(target.text)
    assert 0 < len(model.lm.tokenize(target.text)) <= limit
    assert target.ends == (target.text == f" {caption}")
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == "A picture of"


def test_a_limit_of_answers_needs_a_language_model() -> None:
    with pytest.raises(MLLMError, match="answer_length"):
        Stream(sources(), PromptSpec(), seed=0, data=Data(answer_length=4))
