from collections import Counter

import numpy as np
import pytest

from mllm.data.readers.easy_vqa import easy_vqa
from mllm.errors import MLLMError
from mllm.hub.embedded import locate
from mllm.registry import lookup

try:
    locate("mllm/easy-vqa")
    INSTALLED = True
except MLLMError:
    INSTALLED = False
needs_part = pytest.mark.skipif(
    not INSTALLED, reason="mllm/easy-vqa is not installed: `mllm parts install mllm/easy-vqa`"
)


@needs_part
@pytest.mark.parametrize(("split", "num_questions", "num_images"), [("train", 38_575, 4_000), ("test", 9_673, 1_000)])
def test_counts_are_the_published_ones(split: str, num_questions: int, num_images: int) -> None:
    items = easy_vqa(split=split)
    assert len(items) == num_questions
    assert len({item.images[0] for item in items}) == num_images
    assert len({item.id for item in items}) == num_questions


@needs_part
def test_kind_is_the_type_of_the_answer() -> None:
    kinds = {item.answers[0]: item.kind for item in easy_vqa(split="test")}
    assert Counter(kinds.values()) == {"shape": 3, "colour": 8, "yes/no": 2}  # the package's thirteen answers
    listed = (locate("mllm/easy-vqa") / "data" / "answers.txt").read_text(encoding="utf-8").split()
    assert set(kinds) == set(listed)
    assert (kinds["triangle"], kinds["teal"], kinds["no"]) == ("shape", "colour", "yes/no")


@needs_part
def test_first_questions_are_about_a_blue_rectangle() -> None:
    first, second, third = easy_vqa(split="train", size=3)
    assert (first.question, first.answers) == ("what is the blue shape?", ("rectangle",))
    assert first.images == second.images == third.images
    image = first.images[0].open()
    assert (image.size, image.mode) == ((64, 64), "RGB")
    pixels = np.asarray(image).astype(int)  # (64, 64, 3)
    assert ((pixels[..., 2] > 150) & (pixels[..., :2].max(axis=-1) < 100)).sum() > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"split": "tets"}, "no split 'tets'.*'test'"), ({"split": "test", "size": -2}, "size -2")],
)
def test_invalid_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(MLLMError, match=message):
        lookup("readers", "easy-vqa")(**arguments)
