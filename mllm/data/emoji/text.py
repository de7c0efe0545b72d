"""Write the texts about a scene of `mllm/emoji-scenes`: reference captions, and questions with their answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from random import Random
from typing import NamedTuple

from mllm.data.emoji.image import Kind, Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four")
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
SOUNDS_LIKE_CONSONANT = ("one-", "unicorn")
SOUNDS_LIKE_VOWEL = ("hourglass",)
QUESTIONS_PER_SCENE = 3
COLOUR = "What colour is the background?"


class Question(NamedTuple):
    """A question about a scene, with its answer."""

    type: str  # "what", "how many", "where", "colour", "yes/no", "knowledge"
    text: str
    answer: str


class Fact(NamedTuple):
    """A knowledge question: "yes" for kinds with a label in ``yes``, not asked for ``unsure``, "no" for all others."""

    text: str
    yes: frozenset[str]
    unsure: frozenset[str]

    def holds(self, kind: Kind) -> bool | None:
        """Return the answer for a kind; None if it is debatable."""
        if kind.labels & self.yes:
            return True
        return None if kind.labels & self.unsure else False


def _fact(text: str, yes: str, unsure: str) -> Fact:
    return Fact(text, frozenset(yes.split()), frozenset(unsure.split()))


FACTS = (
    _fact("Is it an animal?", "animal", "nature object toy food"),
    _fact("Can you eat it?", "fruit vegetable food", "animal drink plant nature"),
    _fact("Is it a fruit?", "fruit", "vegetable plant nature food"),
    _fact("Is it something to drink?", "drink", "fruit food household nature"),
    _fact("Is it a plant?", "plant", "fruit vegetable food nature"),
    _fact("Is it a vehicle?", "vehicle", "sport toy object"),
    _fact("Can you wear it?", "clothing", "sport device household object toy"),
    _fact("Is it a tool?", "tool", "household writing device object sport instrument"),
    _fact("Is it a building?", "building", "object toy nature"),
    _fact("Is it a musical instrument?", "instrument", "device household toy object"),
    _fact("Is it used in sport?", "sport", "clothing vehicle device tool toy animal object building nature household"),
    _fact("Is it a piece of furniture?", "furniture", "household object device"),
    _fact(
        "Does it need electricity?", "device", "vehicle tool instrument household toy object building sport furniture"
    ),
    _fact("Is it used for reading or writing?", "writing", "device household tool object"),
    _fact("Can it fly?", "flies", "maybe-flies toy nature object sport"),
    _fact("Does it live in water?", "water", "maybe-water nature food vehicle plant"),
)


def article(noun: str) -> str:
    """Return the indefinite article of ``noun``, "a" or "an"."""
    if noun.startswith(SOUNDS_LIKE_VOWEL):
        return "an"
    return "an" if noun[0] in "aeiou" and not noun.startswith(SOUNDS_LIKE_CONSONANT) else "a"


def groups(scene: Scene) -> list[tuple[Thing, ...]]:
    """Return the scene's objects grouped by kind; objects of a kind are consecutive in ``scene.things``."""
    return [tuple(group) for _, group in groupby(scene.things, key=lambda thing: thing.kind)]


def noun(group: Sequence[Thing]) -> str:
    """Return the singular or plural noun of a group: "dog" or "dogs"."""
    return group[0].kind.name if len(group) == 1 else group[0].kind.plural


def phrase(group: Sequence[Thing]) -> str:
    """Return the noun phrase of a group: "a dog" or "two dogs"."""
    return f"{article(noun(group)) if len(group) == 1 else NUMBERS[len(group)]} {noun(group)}"


def relation(these: Sequence[Thing], those: Sequence[Thing]) -> str | None:
    """Return the spatial relation of ``these`` to ``those``: a key of ``RELATIONS``, or None if none is clear.

    It is "left" if each of these is entirely left of each of those, and their mean positions differ more horizontally
    than vertically.
    """
    dx = _mean([thing.x for thing in these]) - _mean([thing.x for thing in those])
    dy = _mean([thing.y for thing in these]) - _mean([thing.y for thing in those])
    if abs(dx) > abs(dy):
        return _order([(t.x, t.size) for t in these], [(t.x, t.size) for t in those], ("left", "right"))
    if abs(dy) > abs(dx):
        return _order([(t.y, t.size) for t in these], [(t.y, t.size) for t in those], ("above", "below"))
    return None


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def _order(these: list[tuple[int, int]], those: list[tuple[int, int]], words: tuple[str, str]) -> str | None:
    """Compare two lists of (centre, size) on one axis; return the word for before or after, or None if they overlap."""

    def before(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> bool:
        return max(centre + size / 2 for centre, size in first) <= min(centre - size / 2 for centre, size in second)

    if before(these, those):
        return words[0]
    return words[1] if before(those, these) else None


def captions(scene: Scene, random: Random) -> tuple[str, ...]:
    """Return three to five reference captions; the first names the objects and, if it is clear, their relation."""
    parts = groups(scene)
    random.shuffle(parts)
    objects = _join([phrase(part) for part in parts])
    background = f"{article(scene.background)} {scene.background} background"
    return (*_relational(parts)[:2], objects, f"{objects} on {background}", f"{objects} in front of {background}")


def _relational(parts: list[tuple[Thing, ...]]) -> list[str]:
    """Return a caption for each group that has one clear relation to all other groups together."""
    sentences = []
    for part in parts:
        others = [other for other in parts if other is not part]
        where = relation(part, [thing for other in others for thing in other]) if others else None
        if where:
            sentences.append(f"{phrase(part)} {RELATIONS[where]} {_join([phrase(other) for other in others])}")
    return sentences


def _join(phrases: list[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def questions(scene: Scene, pool: Sequence[Kind], random: Random) -> list[Question]:
    """Return up to three questions of different types; questions about absent objects take them from ``pool``."""
    candidates = [
        _colour(scene, random),
        _what(scene, random),
        _how_many(scene, random),
        _where(scene, random),
        _is_there(scene, pool, random),
        _knowledge(scene, pool, random),
    ]
    possible = [question for question in candidates if question]
    return random.sample(possible, min(QUESTIONS_PER_SCENE, len(possible)))


def _colour(scene: Scene, random: Random) -> Question | None:
    """Ask about the background in a third of the scenes only: the question is easy, and always possible."""
    return Question("colour", COLOUR, scene.background) if random.random() < 1 / 3 else None


def _what(scene: Scene, random: Random) -> Question | None:
    parts = groups(scene)
    if len(parts) == 1:
        return Question("what", "What is in the picture?", noun(parts[0]))
    if len(parts) > 2:
        return None  # with three kinds, more than one answer may be right
    this, that = random.sample(parts, 2)
    where = relation(this, that)
    return Question("what", f"What is {RELATIONS[where]} the {noun(that)}?", noun(this)) if where else None


def _how_many(scene: Scene, random: Random) -> Question | None:
    if len(scene.things) == 1:
        return None  # otherwise most answers would be "1"
    part = random.choice(groups(scene))
    return Question("how many", f"How many {part[0].kind.plural} are there?", str(len(part)))


def _where(scene: Scene, random: Random) -> Question | None:
    parts = groups(scene)
    if len(parts) == 1:
        return None
    this, that = random.sample(parts, 2)
    verb = "is" if len(this) == 1 else "are"
    where = relation(this, that)
    return Question("where", f"Where {verb} the {noun(this)}, seen from the {noun(that)}?", where) if where else None


def _is_there(scene: Scene, pool: Sequence[Kind], random: Random) -> Question | None:
    """Ask for an object that is present or, equally often, for one that is absent."""
    present = {thing.kind for thing in scene.things}
    specific = [kind for kind in sorted(present, key=lambda kind: kind.code) if "generic" not in kind.labels]
    if not specific:
        return None
    answer = random.choice(("yes", "no"))
    # A generic name ("bird") may also be true of another kind ("eagle"), so it is not asked for.
    absent = [kind for kind in pool if kind not in present and "generic" not in kind.labels]
    kind = random.choice(specific if answer == "yes" else absent)
    return Question("yes/no", f"Is there {article(kind.name)} {kind.name}?", answer)


def _knowledge(scene: Scene, pool: Sequence[Kind], random: Random) -> Question | None:
    """Ask a question of ``FACTS`` about a single object, answered "yes" and "no" equally often.

    A "no" question is one that is true of another random kind, so that the question alone reveals little about its
    answer, and the image is needed.
    """
    kind = scene.things[0].kind
    true = [fact for fact in FACTS if fact.holds(kind)]
    if len(scene.things) > 1 or not true:
        return None
    if random.random() < 0.5:
        return Question("knowledge", random.choice(true).text, "yes")
    false: list[Fact] = []
    while not false:
        other = random.choice(pool)
        false = [fact for fact in FACTS if fact.holds(other) and fact.holds(kind) is False]
    return Question("knowledge", random.choice(false).text, "no")
