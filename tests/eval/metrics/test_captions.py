"""Caption metrics against the reference evaluation (its recorded output, and the program itself) and sums by hand."""

import importlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllm.errors import MLLMError
from mllm.registry import lookup

RECORDED = Path(__file__).parents[2] / "fixtures" / "ptb.jsonl"  # captions and the Java program's tokens
NAMES = [*(f"caption/bleu-{n}" for n in (1, 2, 3, 4)), "caption/rouge-l", "caption/cider-d", "caption/cider"]

COMMON = """a an the A The man woman dog dogs cat street field two Two red blue young is are on in with and of to
    holding riding standing next park ball frisbee Cannot cannot gonna wanna gimme don't can't isn't won't they're it's
    he'd I'm man's girls' James' o'clock ma'am rock'n'roll 'em 'n' '90s 'tis O'Neil Hawai'i y'all"""
RARE = """t-shirt black-and-white 2-year-old e-mail -- --- - ... .... . , ; : ! ? ?! 1/2 3/4 24/7 and/or 5 5th 3.14
    1,000 10:30 12/25/2010 555-1234 $5 5% US$5 €5 £3 20¢ ½ ⅔ 20°C x² #1 #tag @me a@b.com www.foo.com f.jpg
    http://foo.com/a?b=1 "quoted" 'quoted' “quoted” ‘quoted’ «quoted» ``x'' (x) [x] {x} <b> </b> <br/> &amp; &lt; AT&T
    R&D C++ U.S. U.S.A. e.g. a.m. p.m. Mr. Mrs. Dr. St. Jan. etc. vs. Ph.D. Inc. No. A. J.R.R. — – … é café naïve l'été
    東京 ไทย Привет العربية 😀 a😀b ♥ ™ * ** / \\ | ~ ^ + = _ a_b x/y :) ;-) :D ^_^"""
WORDS = COMMON.split()
TOKENS = [*RARE.split(), "\u00a0", "\u200b", "\u0301", "\u00ad", "\x01", "\x7f", "1\u00a01/2", "soft\u00adhyphen"]


def tokenize(caption: str) -> str:
    """The tokeniser is no part of its own: it is reached as the metrics' modules are."""
    tokens: str = importlib.import_module("mllm.eval.metrics.ptb").tokenize(caption)
    return tokens


def made_up(rng: random.Random) -> str:
    """A caption of common words and rare tokens, some of them run together."""
    pieces = []
    for _ in range(rng.choice([0, 1, 3, 6, 9, 12])):
        pieces.append(rng.choice(TOKENS) if rng.random() < 0.3 else rng.choice(WORDS))
        pieces.append(rng.choice([" "] * 8 + ["", "", "  ", " , ", "."]))
    return "".join(pieces)


def recorded() -> list[dict[str, str]]:
    return [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]


def test_tokens_equal_the_recorded_java_output() -> None:
    lines = recorded()
    assert len(lines) > 400
    different = [(line, tokenize(line["caption"])) for line in lines if tokenize(line["caption"]) != line["tokens"]]
    assert not different


def test_line_separators_are_spaces() -> None:
    for separator in "\n\v\f\r\u2028\u2029":
        assert tokenize(f"a dog{separator}runs") == "a dog runs"


@pytest.fixture(scope="module")
def reference() -> tuple[list[str], list[list[str]], dict[int, list[str]], dict[int, list[str]]]:
    """Made-up predictions and references, and their tokens by the Java program."""
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="needs pycocoevalcap")
    if shutil.which("java") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("needs Java on the path")
    rng = random.Random(20)
    references = [[made_up(rng) for _ in range(rng.randint(1, 5))] for _ in range(2800)]
    # Some agreement between the sides, or most scores would be 0.
    predictions = [made_up(rng) if rng.random() < 0.3 else rng.choice(answers) + " dog" for answers in references]

    def tokens(captions: list[list[str]]) -> dict[int, list[str]]:
        # The Java program looks into the next caption now and then: a plain one between any two keeps them apart.
        given = {i: [{"caption": text} for c in group for text in (c, "zebra")] for i, group in enumerate(captions)}
        made = tokenizer.PTBTokenizer().tokenize(given)
        assert all(set(group[1::2]) == {"zebra"} for group in made.values())
        return {i: group[::2] for i, group in made.items()}

    return predictions, references, tokens([[p] for p in predictions]), tokens(references)


def test_tokens_equal_java_on_fresh_captions(reference: Any) -> None:
    predictions, references, tokens, answers = reference
    captions = [*predictions, *(caption for group in references for caption in group)]
    expected = [line for group in (*tokens.values(), *answers.values()) for line in group]
    assert len(captions) > 10_000
    assert [tokenize(caption) for caption in captions] == expected


def test_scores_equal_the_reference_evaluation(reference: Any) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    predictions, references, tokens, answers = reference
    values, per_item = Bleu(4).compute_score(answers, tokens, verbose=0)
    expected = {f"caption/bleu-{n + 1}": (values[n], per_item[n]) for n in range(4)}
    expected["caption/rouge-l"] = Rouge().compute_score(answers, tokens)
    expected["caption/cider-d"] = Cider().compute_score(answers, tokens)
    for name, (value, items) in expected.items():
        score = lookup("metrics", name)(predictions, references)
        assert value > 0.01
        assert score.value == pytest.approx(value, abs=1e-9), name
        assert score.per_item == pytest.approx(list(items), abs=1e-9), name


def test_bleu_by_hand() -> None:
    # 3 of 3 words, 2 of 2 bigrams; 3 words where the closest reference has 4.
    for order in (1, 2):
        score = lookup("metrics", f"caption/bleu-{order}")(["The cat sat."], [["the cat sat down", "a b c d e f g"]])
        assert score.value == pytest.approx(math.exp(1 - 4 / 3), abs=1e-6)
        assert score.per_item == pytest.approx([score.value])
    # The corpus value sums matches (1 + 2 of 4 words) and lengths (4 and 4) first.
    score = lookup("metrics", "caption/bleu-1")(["a x", "c d"], [["a b"], ["c d"]])
    assert score.value == pytest.approx(3 / 4)
    assert score.per_item == pytest.approx([1 / 2, 1])


def test_rouge_by_hand() -> None:
    # "a c" is common: precision 2/3, recall 2/4.
    score = lookup("metrics", "caption/rouge-l")(["a b c"], [["a c d e"]])
    assert score.value == pytest.approx((1 + 1.2**2) * (2 / 3) * (1 / 2) / (1 / 2 + 1.2**2 * (2 / 3)))


def test_cider_by_hand() -> None:
    # Two items. "a" is in both items' references and weighs 0, all else weighs log 2. Item 1: cosine 1 for n = 1 and
    # n = 2, nothing longer. Item 2: {dog} against {dog, sat}, {a dog} against {a dog, dog sat}: 1 / sqrt 2 each.
    score = lookup("metrics", "caption/cider")(["a cat", "A dog."], [["a cat"], ["a dog sat"]])
    assert score.per_item == pytest.approx([10 * 2 / 4, 10 * math.sqrt(2) / 4])
    assert score.value == pytest.approx(sum(score.per_item) / 2)


def test_cider_d_clips_and_penalises_length_and_cider_does_not() -> None:
    # "dog dog dog" for "a dog dog", of equal length: n = 1 weighs {dog: 3 log 2} against {dog: 2 log 2}, and n = 2
    # {dog dog: 2 log 2} against {a dog: log 2, dog dog: log 2}; nothing longer is common.
    predictions, references = ["dog dog dog", "a"], [["a dog dog"], ["a"]]
    plain = lookup("metrics", "caption/cider")(predictions, references)
    guarded = lookup("metrics", "caption/cider-d")(predictions, references)
    assert plain.per_item[0] == pytest.approx(10 / 4 * (1 + 1 / math.sqrt(2)))
    assert guarded.per_item[0] == pytest.approx(10 / 4 * (2 / 3 + 1 / (2 * math.sqrt(2))))
    # "dog" for "dog sat sat" is two words short: cosine 1 / sqrt 5, and exp(-2² / (2 · 6²)) on top.
    predictions, references = ["dog", "a"], [["dog sat sat"], ["a"]]
    plain = lookup("metrics", "caption/cider")(predictions, references)
    guarded = lookup("metrics", "caption/cider-d")(predictions, references)
    assert plain.per_item[0] == pytest.approx(10 / 4 / math.sqrt(5))
    assert guarded.per_item[0] == pytest.approx(plain.per_item[0] * math.exp(-4 / 72))


@pytest.mark.parametrize("name", NAMES)
def test_score_names_its_metric_and_keeps_the_order(name: str) -> None:
    metric: Callable[..., Any] = lookup("metrics", name)
    predictions, references = ["a red dog runs fast", "zebra", ""], [["A red dog runs fast."], ["a cat"], ["a bird"]]
    score = metric(predictions, references)
    assert score.name == name
    assert score.version
    best, *others = score.per_item
    assert best > max(others)
    assert metric(predictions[::-1], references[::-1]).per_item == pytest.approx(score.per_item[::-1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "nothing to score: 0 predictions"),
        (["a"], [["a"], ["b"]], "1 predictions for 2 lists of references"),
        (["a", "b"], [["a"], []], "Item 1 has no reference"),
        (["a", float("nan")], [["a"], ["b"]], r"prediction of item 1 is nan \(float\): expected a string"),
        ([None], [["a"]], r"prediction of item 0 is None \(NoneType\): expected a string"),
        (["a", "b"], [["a"], ["b", None]], r"reference of item 1 is None \(NoneType\): expected a string"),
        (["a"], ["a"], "references of item 0 are one string, 'a'"),
    ],
)
def test_what_cannot_be_scored_is_named(name: str, predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(MLLMError, match=message):
        lookup("metrics", name)(predictions, references)


@pytest.mark.slow  # METEOR's program takes half a minute to start
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the reference leaves its pipes open
def test_meteor_equals_the_reference_evaluation(reference: Any) -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    predictions = ["a dog runs on grass", "the cats are sleeping", "two men", ""]
    references = [["a dog running", "the dog runs on the lawn"], ["a cat sleeps"], ["two men"], ["nothing"]]
    value, items = Meteor().compute_score(dict(enumerate(references)), {i: [p] for i, p in enumerate(predictions)})
    score = lookup("metrics", "caption/meteor")([p.title() + "." for p in predictions], references)
    assert score.value == pytest.approx(value, abs=1e-9) and value > 0.2
    assert score.per_item == pytest.approx(items, abs=1e-9)
    assert score.per_item[2] > score.per_item[0] > 0 == score.per_item[3]
