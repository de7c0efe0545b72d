"""Sets that models are pretrained on, in the form in which their authors publish them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mllm.config.data import DataSpec
from mllm.data.items import Item
from mllm.data.sources import read
from mllm.errors import MLLMError
from mllm.testing import tiny_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(
        ("0a1.jpg", "000000000042.jpg", "VG_100K/1.jpg", "VG_100K_2/7.jpg", "Foo_(bar).jpg", "b.png", "img/42953.png")
    ):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        tiny_image(number).save(tmp_path / "images" / name)
    return tmp_path


def items(folder: Path, **options: Any) -> list[Item]:
    return list(read(DataSpec.model_validate({"images": str(folder / "images"), **options})))


def shown(item: Item, folder: Path) -> str:
    (image,) = item.images
    return str(Path(str(image.path)).relative_to(folder / "images"))  # type: ignore[attr-defined]


def test_localized_narratives_of_several_annotators_and_files(folder: Path) -> None:
    rows = [
        {"dataset_id": "open_images", "image_id": "0a1", "annotator_id": 1, "caption": "In this image a dog."},
        {"dataset_id": "open_images", "image_id": "0a1", "annotator_id": 2, "caption": "A dog sits.", "traces": [[]]},
    ]
    (folder / "sets").mkdir()
    for number, row in enumerate(rows):
        (folder / f"sets/narratives-0000{number}-of-00002.jsonl").write_text(json.dumps(row) + "\n")
    (item,) = items(folder, format="localized-narratives", path=str(folder / "sets"))
    assert item.answers == ("In this image a dog.", "A dog sits.") and item.question is None
    assert shown(item, folder) == "0a1.jpg"
    (folder / "coco.jsonl").write_text(json.dumps({"dataset_id": "mscoco_val2017", "image_id": "42", "caption": "x"}))
    (item,) = items(folder, format="localized-narratives", path=str(folder / "coco.jsonl"), name="{:0>12}.jpg")
    assert shown(item, folder) == "000000000042.jpg"


def test_visual_genomes_regions_have_their_images_in_two_folders(folder: Path) -> None:
    def region(number: int, phrase: str) -> dict[str, Any]:
        return {"region_id": number, "image_id": 1, "phrase": phrase, "x": 0, "y": 0, "width": 4, "height": 4}

    rows = [
        {"id": 1, "regions": [region(1, "a red car "), region(2, "the sky"), region(3, "a red car")]},
        {"id": 7, "regions": [region(4, "a man")]},
    ]
    (folder / "region_descriptions.json").write_text(json.dumps(rows))
    first, second = items(folder, format="visual-genome-regions", annotations=str(folder / "region_descriptions.json"))
    assert (first.id, first.answers, second.answers) == ("1", ("a red car", "the sky"), ("a man",))
    assert [shown(item, folder) for item in (first, second)] == ["VG_100K/1.jpg", "VG_100K_2/7.jpg"]


def test_wit_has_languages_columns_and_names_from_addresses(folder: Path) -> None:
    columns = ["language", "page_url", "image_url", "caption_reference_description", "caption_alt_text_description"]
    rows = [
        ["en", "p", "https://upload.wikimedia.org/wikipedia/commons/1/1a/Foo_%28bar%29.jpg", "A foo", ""],
        ["de", "p", "https://upload.wikimedia.org/wikipedia/commons/1/1a/Foo_%28bar%29.jpg", "Ein Foo", ""],
        ["en", "p", "https://upload.wikimedia.org/wikipedia/commons/2/2b/b.png", "", "An alternative"],
    ]
    (folder / "wit").mkdir()
    text = "\n".join(["\t".join(columns), *map("\t".join, rows)])
    (folder / "wit/wit_v1.train.all-00000-of-00010.tsv.gz").write_bytes(gzip.compress(text.encode()))
    source = {"format": "wit", "path": str(folder / "wit")}
    (item,) = items(folder, **source)
    assert item.answers == ("A foo", "Ein Foo") and shown(item, folder) == "Foo_(bar).jpg"
    (item,) = items(folder, **source, languages=["de"])
    assert item.answers == ("Ein Foo",)
    both = items(folder, **source, languages=["en"], captions=[columns[3], columns[4]])
    assert [item.answers for item in both] == [("A foo",), ("An alternative",)]
    with pytest.raises(MLLMError, match=r"row 1 has an unexpected form.*caption_title.*columns language"):
        items(folder, **source, captions=["caption_title"])


def test_hateful_memes_are_questions_with_yes_or_no(folder: Path) -> None:
    row = {"id": 42953, "img": "img/42953.png", "label": 0, "text": "its their character not their color"}
    (folder / "train.jsonl").write_text(json.dumps(row))
    (item,) = items(folder, format="hateful-memes", annotations=str(folder / "train.jsonl"))
    assert (item.id, item.answers, item.choices) == ("42953", ("no",), ("no", "yes"))
    assert item.question == 'The meme says "its their character not their color". Is it hateful?'
    assert shown(item, folder) == "img/42953.png"
    del row["label"]  # the test split
    (folder / "test.jsonl").write_text(json.dumps({**row, "label": 1}) + "\n" + json.dumps({**row, "id": 2}))
    options = {"format": "hateful-memes", "annotations": str(folder / "test.jsonl"), "question": "Hateful: {text}?"}
    first, second = items(folder, **options)
    assert (first.answers, second.answers) == (("yes",), ())
    assert second.question == "Hateful: its their character not their color?"
