"""What is said about a scene of `mllm/emoji-scenes`: reference captions, and questions with their answers."""

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


class Question(NamedTuple):
    """One question about a scene."""

    type: str  # "what", "how many", "where", "colour", "yes/no", "knowledge"
    text: str
    answer: str


class Fact(NamedTuple):
    """A question that takes knowledge: "yes" of the labels ``yes``, not asked of ``unsure``, "no" of all others."""

    text: str
    yes: frozenset[str]
    unsure: frozenset[str]

    def holds(self, kind: Kind) -> bool | None:
        """Say whether it is so, None where opinions differ."""
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
    """Return "a" or "an", whichever goes before ``noun``."""
    if noun.startswith(SOUNDS_LIKE_VOWEL):
        return "an"
    return "an" if noun[0] in "aeiou" and not noun.startswith(SOUNDS_LIKE_CONSONANT) else "a"


def groups(scene: Scene) -> list[tuple[Thing, ...]]:
    """Return the scene's objects by kind; those of a kind follow each other in ``scene.things``."""
    return [tuple(group) for _, group in groupby(scene.things, key=lambda thing: thing.kind)]


def noun(group: Sequence[Thing]) -> str:
    """Return "dog" or "dogs"."""
    return group[0].kind.name if len(group) == 1 else group[0].kind.plural


def phrase(group: Sequence[Thing]) -> str:
    """Return "a dog" or "two dogs"."""
    return f"{article(noun(group)) if len(group) == 1 else NUMBERS[len(group)]} {noun(group)}"


def relation(these: Sequence[Thing], those: Sequence[Thing]) -> str | None:
    """Return where ``these`` are, seen from ``those``: a key of ``RELATIONS``, or None where no single word is true.

    It is "left" when every one of these lies wholly left of every one of those, and their mean places differ more
    from left to right than from top to bottom.
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
    """Compare two lists of (centre, size) on one axis: before, after, or None where they overlap."""

    def before(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> bool:
        return max(centre + size / 2 for centre, size in first) <= min(centre - size / 2 for centre, size in second)

    if before(these, those):
        return words[0]
    return words[1] if before(those, these) else None


def captions(scene: Scene, random: Random) -> tuple[str, ...]:
    """Return three to five reference captions; the first says what there is and, of several kinds, where."""
    parts = groups(scene)
    random.shuffle(parts)
    every = _join([phrase(part) for part in parts])
    background = f"{article(scene.background)} {scene.background} background"
    return (*_placed(parts)[:2], every, f"{every} on {background}", f"{every} in front of {background}")


def _placed(parts: list[tuple[Thing, ...]]) -> list[str]:
    """Return a caption for each group that has one relation to all the others together."""
    placed = []
    for part in parts:
        others = [other for other in parts if other is not part]
        where = relation(part, [thing for other in others for thing in other]) if others else None
        if where:
            placed.append(f"{phrase(part)} {RELATIONS[where]} {_join([phrase(other) for other in others])}")
    return placed


def _join(phrases: list[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def questions(scene: Scene, pool: Sequence[Kind], random: Random) -> list[Question]:
    """Return up to three questions, of different types; absent things are asked for out of ``pool``."""
    found = [
        _colour(scene, random),
        _what(scene, random),
        _how_many(scene, random),
        _where(scene, random),
        _is_there(scene, pool, random),
        _knowledge(scene, pool, random),
    ]
    asked = [question for question in found if question]
    return random.sample(asked, min(QUESTIONS_PER_SCENE, len(asked)))


def _colour(scene: Scene, random: Random) -> Question | None:
    """Ask in one scene of three only: it is the easy one, and could be asked always."""
    return Question("colour", "What colour is the background?", scene.background) if random.random() < 1 / 3 else None


def _what(scene: Scene, random: Random) -> Question | None:
    parts = groups(scene)
    if len(parts) == 1:
        return Question("what", "What is in the picture?", noun(parts[0]))
    if len(parts) > 2:
        return None  # of three kinds more than one may be the answer
    this, that = random.sample(parts, 2)
    where = relation(this, that)
    return Question("what", f"What is {RELATIONS[where]} the {noun(that)}?", noun(this)) if where else None


def _how_many(scene: Scene, random: Random) -> Question | None:
    if len(scene.things) == 1:
        return None  # else the answer is "1" most of the time
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
    """Ask for a thing that is there or, as often, for one that is not."""
    present = {thing.kind for thing in scene.things}
    named = [kind for kind in sorted(present, key=lambda kind: kind.code) if "generic" not in kind.labels]
    if not named:
        return None
    answer = random.choice(("yes", "no"))
    # A generic name ("bird") may be true of a kind that has another name ("eagle"), so it is not asked for.
    absent = [kind for kind in pool if kind not in present and "generic" not in kind.labels]
    asked = random.choice(named if answer == "yes" else absent)
    return Question("yes/no", f"Is there {article(asked.name)} {asked.name}?", answer)


def _knowledge(scene: Scene, pool: Sequence[Kind], random: Random) -> Question | None:
    """Ask a lone object a question of ``FACTS``, answered "yes" and "no" equally often.

    The "no" questions are borrowed from another kind, of which they are true: so the words of a question say
    little about its answer, and the picture is needed.
    """
    kind = scene.things[0].kind
    true = [fact for fact in FACTS if fact.holds(kind)]
    if len(scene.things) > 1 or not true:
        return None
    if random.random() < 0.5:
        return Question("knowledge", random.choice(true).text, "yes")
    borrowed: list[Fact] = []
    while not borrowed:
        other = random.choice(pool)
        borrowed = [fact for fact in FACTS if fact.holds(other) and fact.holds(kind) is False]
    return Question("knowledge", random.choice(borrowed).text, "no")
