import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest

from mllm.data.emoji.image import SIDE, Scene, kinds, render
from mllm.data.emoji.scenes import _belongs, emoji_scenes, names
from mllm.data.emoji.text import FACTS, RELATIONS, article
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.hub.embedded import locate
from mllm.media.images import ImageSource
from mllm.registry import lookup

try:
    locate("mllm/openmoji")
    INSTALLED = True
except MLLMError:
    INSTALLED = False

DIGEST = """
import hashlib, json
from mllm.data.emoji.scenes import emoji_scenes
items = emoji_scenes(split="val", task="both", size=40, seed=5)
rows = [[i.id, i.images[0].specification(), i.answers, i.question, i.kind] for i in items]
print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())
"""
PIXELS = """
import hashlib
from mllm.data.emoji.image import render
print(hashlib.sha256(b"".join(render(i.images[0]).tobytes() for i in items[:8])).hexdigest())
"""


def scene(item: Item) -> Scene:
    source = item.images[0]
    assert isinstance(source, Scene)
    return source


def codes(item: Item) -> set[int]:
    return {thing.kind.code for thing in scene(item).things}


def pairs(items: list[Item]) -> list[set[tuple[int, int]]]:
    return [set(combinations(sorted(codes(item)), 2)) for item in items]


def run(program: str, hash_seed: str) -> list[str]:
    """Run ``program`` in a new process and return the words that it prints."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.check_output([sys.executable, "-c", program], env=environment, text=True).split()


def test_every_label_of_the_facts_is_in_the_table() -> None:
    labels = frozenset[str]().union(*(kind.labels for kind in kinds()))
    assert {label for fact in FACTS for label in fact.yes | fact.unsure} <= labels


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        *[("red apple", "a"), ("unicorn", "a"), ("horse", "a"), ("one-piece swimsuit", "a")],
        *[("apple", "an"), ("umbrella", "an"), ("hourglass", "an"), ("onion", "an"), ("orange", "an")],
    ],
)
def test_articles(noun: str, expected: str) -> None:
    assert article(noun) == expected


@pytest.mark.parametrize("split", ["train", "val", "combinations", "kinds"])
@pytest.mark.parametrize("task", ["captions", "questions", "both"])
def test_item_does_not_depend_on_size(split: str, task: str) -> None:
    long = emoji_scenes(split=split, task=task, size=40, seed=3)
    assert len(long) == 40
    assert emoji_scenes(split=split, task=task, size=11, seed=3) == long[:11]
    assert emoji_scenes(split=split, task=task, size=11, seed=4) != long[:11]
    assert len({item.id for item in long}) == 40


def test_items_are_the_same_in_another_process() -> None:
    items = emoji_scenes(split="val", task="both", size=40, seed=5)
    rows = [[i.id, scene(i).specification(), i.answers, i.question, i.kind] for i in items]
    expected = [hashlib.sha256(json.dumps(rows).encode()).hexdigest()]
    program = DIGEST
    if INSTALLED:
        program += PIXELS
        expected.append(hashlib.sha256(b"".join(render(scene(i)).tobytes() for i in items[:8])).hexdigest())
    assert run(program, hash_seed="7") == expected


def test_held_out_kinds_and_pairs_are_not_in_train() -> None:
    known, unseen = names("train"), names("kinds")
    assert not set(known) & set(unseen)
    assert len(known) + len(unseen) == len(kinds())
    assert 0.06 < len(unseen) / len(kinds()) < 0.14
    train = emoji_scenes(split="train", size=6000)
    shown = {thing.kind.name for item in train for thing in scene(item).things}
    assert shown == set(known)
    assert {t.kind.name for item in emoji_scenes(split="kinds", size=500) for t in scene(item).things} == set(unseen)
    new = emoji_scenes(split="combinations", size=500)
    assert all(scene(item).things[0].kind.name in set(known) for item in new)
    together = set[tuple[int, int]]().union(*pairs(train))
    assert all(pair - together for pair in pairs(new))


def test_train_never_shows_a_pair_of_combinations_whatever_the_seed() -> None:
    new = [next(iter(p)) for p in pairs(emoji_scenes(split="combinations", size=1500, seed=8)) if len(p) == 1]
    assert len(new) > 300
    for split in ("train", "val"):
        shown = set[tuple[int, int]]().union(*pairs(emoji_scenes(split=split, size=2500, seed=9)))
        assert len(shown) > 1000
        assert not shown & set(new)


def test_a_scene_belongs_to_train_or_to_val_whatever_the_seed() -> None:
    for split, other in (("train", "val"), ("val", "train")):
        scenes = [scene(item) for item in emoji_scenes(split=split, size=500, seed=2)]
        assert len({s.specification() for s in scenes}) == 500
        for s in scenes:
            chosen = list({thing.kind for thing in s.things})
            assert _belongs(s, split, chosen)
            assert not _belongs(s, other, chosen)


def test_objects_are_inside_the_image_and_do_not_touch() -> None:
    for item in emoji_scenes(split="train", size=1500):
        things = scene(item).things
        assert 1 <= len(things) <= 4
        assert len(codes(item)) <= 3
        for thing in things:
            assert thing.size / 2 <= min(thing.x, thing.y)
            assert max(thing.x, thing.y) + thing.size / 2 <= SIDE
        for one, other in combinations(things, 2):
            assert max(abs(one.x - other.x), abs(one.y - other.y)) >= (one.size + other.size) / 2


def test_about_half_of_the_scenes_have_one_object() -> None:
    items = emoji_scenes(split="train", size=2000)
    assert 0.45 < sum(len(scene(item).things) == 1 for item in items) / 2000 < 0.55
    assert all((item.kind == "single") == (len(scene(item).things) == 1) for item in items)
    assert {len(scene(item).things) for item in emoji_scenes(split="train", size=200, max_objects=2)} == {1, 2}


def edges(item: Item, text: str) -> tuple[tuple[int, int, int, int], set[int]]:
    """Return the edges of the objects that ``text`` names, and their kinds; checks numbers and articles."""
    numbers = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
    counts = Counter(thing.kind for thing in scene(item).things)
    phrases = {}
    for kind, number in counts.items():
        for word, value in numbers.items():
            if value == number:
                phrases[f"{word} {kind.name if number == 1 else kind.plural}"] = kind
    spoken = [phrases[part] for part in split_list(text, set(phrases))]
    things = [thing for thing in scene(item).things if thing.kind in spoken]
    box = (
        min(t.x - t.size // 2 for t in things),
        min(t.y - t.size // 2 for t in things),
        max(t.x + t.size // 2 for t in things),
        max(t.y + t.size // 2 for t in things),
    )
    return box, {kind.code for kind in spoken}


def split_list(text: str, known: set[str]) -> list[str]:
    """Split "a bow and arrow, two dogs and a cat" where the parts are ``known``."""
    parts = [
        part for part in sorted(known, key=len, reverse=True) if re.search(rf"(^| ){re.escape(part)}($|,| and )", text)
    ]
    rest = text
    for part in parts:
        rest = rest.replace(part, "", 1)
    assert not re.sub(r",| and | ", "", rest), f"{text!r}: {rest!r} is not in the scene"
    return parts


def test_captions_agree_with_the_scene() -> None:
    relations = Counter[str]()
    for split in ("train", "combinations"):
        for item in emoji_scenes(split=split, size=1500):
            assert 3 <= len(item.answers) == len(set(item.answers)) <= 5
            assert any(f" {scene(item).background} background" in answer for answer in item.answers)
            for answer in item.answers:
                answer = re.sub(r" (on|in front of) an? \w+ background$", "", answer)
                word = next((word for word, text in RELATIONS.items() if f" {text} " in answer), None)
                if word is None:
                    assert edges(item, answer)[1] == codes(item)
                    continue
                (one, these), (other, those) = (edges(item, side) for side in answer.split(f" {RELATIONS[word]} "))
                assert these | those == codes(item)
                assert not these & those
                relations[word] += 1
                if word in ("left", "right"):
                    assert one[2] <= other[0] if word == "left" else one[0] >= other[2]
                else:
                    assert one[3] <= other[1] if word == "above" else one[1] >= other[3]
    assert min(relations[word] for word in RELATIONS) > 100


def test_name_task_has_one_object_and_one_caption() -> None:
    for item in emoji_scenes(split="kinds", task="name", size=100):
        (thing,) = scene(item).things
        assert item.answers in ((f"a {thing.kind.name}",), (f"an {thing.kind.name}",))
        assert item.question is None


@pytest.fixture(scope="module")
def asked() -> list[Item]:
    return emoji_scenes(split="train", task="questions", size=8000)


def test_items_of_a_scene_share_its_image(asked: list[Item]) -> None:
    by_scene = Counter(item.id.rpartition("/")[0] for item in asked[:300])
    assert set(by_scene.values()) <= {1, 2, 3}
    assert len({id(item.images[0]) for item in asked[:300]}) == len(by_scene)
    assert isinstance(asked[0].images[0], ImageSource)


def test_every_type_of_question_is_asked(asked: list[Item]) -> None:
    counts = Counter(item.kind for item in asked)
    assert set(counts) == {"what", "how many", "where", "colour", "yes/no", "knowledge"}
    assert min(counts.values()) > 200


def test_the_colour_is_asked_of_the_scenes_that_are_named() -> None:
    colours, names = (emoji_scenes(split="train", task=task, size=30) for task in ("colour", "name"))
    assert [scene(item) for item in colours] == [scene(item) for item in names]
    assert [item.answers for item in colours] == [(scene(item).background,) for item in names]
    assert {item.question for item in colours} == {"What colour is the background?"}


def test_answers_agree_with_the_scene(asked: list[Item]) -> None:
    for item in asked:
        things, question, (answer,) = scene(item).things, item.question or "", item.answers
        named = {t.kind.name for t in things} | {t.kind.plural for t in things}
        if item.kind == "how many":
            plural = question.removeprefix("How many ").removesuffix(" are there?")
            assert answer == str(sum(t.kind.plural == plural for t in things))
        elif item.kind == "colour":
            assert answer == scene(item).background
        elif item.kind == "yes/no":
            name = re.sub(r"^Is there an? |\?$", "", question)
            assert (answer == "yes") == (name in named)
        elif item.kind == "what":
            assert answer in named
            assert question == "What is in the picture?" or answer not in question
        elif item.kind == "where":
            these, those = re.sub(r"^Where (is|are) the |\?$", "", question).split(", seen from the ")
            one = [t for t in things if these in (t.kind.name, t.kind.plural)]
            other = [t for t in things if those in (t.kind.name, t.kind.plural)]
            sign = -1 if answer in ("left", "above") else 1
            for a, b in ((a, b) for a in one for b in other):
                assert sign * (a.x - b.x if answer in ("left", "right") else a.y - b.y) > 0


@pytest.mark.parametrize("kind", ["yes/no", "knowledge"])
def test_yes_and_no_are_balanced(asked: list[Item], kind: str) -> None:
    answers = [item.answers[0] for item in asked if item.kind == kind]
    assert set(answers) == {"yes", "no"}
    assert 0.45 < answers.count("yes") / len(answers) < 0.55


@pytest.mark.parametrize(
    ("name", "question", "expected"),
    [
        ("banana", "Can you eat it?", True),
        ("violin", "Can you eat it?", False),
        ("violin", "Is it a musical instrument?", True),
        ("eagle", "Can it fly?", True),
        ("penguin", "Can it fly?", False),
        ("elephant", "Can it fly?", False),
        ("chicken", "Can it fly?", None),
        ("helicopter", "Can it fly?", True),
        ("shark", "Does it live in water?", True),
        ("camera", "Does it need electricity?", True),
        ("tomato", "Is it a fruit?", None),
        ("tiger", "Is it an animal?", True),
    ],
)
def test_facts(name: str, question: str, expected: bool | None) -> None:
    kind = {kind.name: kind for kind in kinds()}[name]
    assert next(fact for fact in FACTS if fact.text == question).holds(kind) is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "trian"}, "no split 'trian'.*Did you mean 'train'"),
        ({"split": "train", "task": "caption"}, "no task 'caption'.*'captions'"),
        ({"split": "train", "size": -1}, "size -1: expected 0 or more"),
        ({"split": "train", "max_objects": 5}, "max_objects 5: expected 1 to 4"),
        ({"split": "combinations", "task": "name"}, "expected at least two"),
        ({"split": "combinations", "task": "colour"}, "expected at least two"),
        ({"split": "combinations", "max_objects": 1}, "expected at least two"),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(MLLMError, match=message):
        lookup("readers", "emoji-scenes")(**arguments)
