"""Score short answers against the annotators' answers: the official VQA accuracy and its variants.

An answer scores ``min(1, matches among the other annotators / 3)``, averaged over the annotators left out in turn, of
whom there are ten (Antol et al. 2015, https://arxiv.org/abs/1505.00468). With a single reference, such as a synthetic
set's, there is nobody to leave out: accuracy is 1 if the answers are equal, else 0. With two or three references the
formula is applied as it is, and cannot reach 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from statistics import fmean

from mllm.eval.metrics.checks import check

from mllm.evaluation import Score

VERSION = "1"

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official program means "a full stop not between digits", but its look-behind is misspelt and never fails, and it
# passes a flag (32) where `sub` expects the largest number of replacements. Both are kept.
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32
_ARTICLES = frozenset(["a", "an", "the"])
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# A contraction with one apostrophe missing gets it back; "somebody'd" loses its own.
_MENDED = {form[:i] + form[i + 1 :]: form for form in _CONTRACTIONS.split() for i, c in enumerate(form) if c == "'"}
_MENDED["somebody'd"] = "somebodyd"


def _trimmed(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _unpunctuated(answer: str) -> str:
    """Delete punctuation next to a space (all of it, if a number has a comma), and replace the rest by spaces."""
    written = answer
    number = _COMMA_IN_NUMBER.search(answer) is not None
    for sign in _PUNCTUATION:
        delete = number or f"{sign} " in answer or f" {sign}" in answer
        written = written.replace(sign, "" if delete else " ")
    return _FULL_STOP.sub("", written, count=_MOST_FULL_STOPS)


def _normalised(answer: str) -> str:
    """Return the answer lower-cased, number words as digits, without punctuation and articles."""
    words = [_NUMBERS.get(word, word) for word in _unpunctuated(answer).lower().split()]
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def _split_and_normalised(answer: str) -> str:
    plain = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _normalised(_trimmed(plain))


def official(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the accuracy of the official program's newest revision, which normalises only if annotators disagree.

    So if all annotators gave the same answer, only that exact string (apart from space around it) is right.
    """
    return _score(predictions, references, _official, "vqa/official")


def normalise_both(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the accuracy by the official formula, with both sides always normalised."""

    def accuracy(prediction: str, answers: list[str]) -> float:
        return _agreement(_normalised(prediction), [_normalised(answer) for answer in answers])

    return _score(predictions, references, accuracy, "vqa/normalise-both")


def textvqa(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the accuracy by TextVQA's program (M4C's "EvalAI processor"): `normalise_both` after a simple word split.

    Commas and question marks are deleted, and "'s" is a separate word (Singh et al. 2019,
    https://arxiv.org/abs/1904.08920).
    """

    def accuracy(prediction: str, answers: list[str]) -> float:
        return _agreement(_split_and_normalised(prediction), [_split_and_normalised(answer) for answer in answers])

    return _score(predictions, references, accuracy, "vqa/textvqa")


def a_okvqa(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the accuracy by A-OKVQA's program: min(1, annotators who gave the answer / 3), with nobody left out.

    Schwenk et al. 2022, https://arxiv.org/abs/2206.01718. Here both sides are trimmed and in lower case.
    """

    def accuracy(prediction: str, answers: list[str]) -> float:
        return min(1.0, [answer.lower() for answer in answers].count(prediction.lower()) / 3)

    return _score(predictions, references, accuracy, "vqa/a-okvqa")


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the share of answers that equal a reference (lower-cased, stripped, a final full stop dropped)."""

    def accuracy(prediction: str, answers: list[str]) -> float:
        return float(_plain(prediction) in map(_plain, answers))

    return _score(predictions, references, accuracy, "vqa/exact-match")


def _score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    accuracy: Callable[[str, list[str]], float],
    name: str,
) -> Score:
    check(predictions, references)
    items = zip(predictions, references, strict=True)
    per_item = [
        accuracy(_trimmed(prediction), [_trimmed(answer) for answer in answers]) for prediction, answers in items
    ]
    return Score(fmean(per_item), per_item, name, VERSION)


def _official(prediction: str, answers: list[str]) -> float:
    if len(set(answers)) > 1:
        return _agreement(_normalised(prediction), [_normalised(answer) for answer in answers])
    return _agreement(prediction, answers)


def _agreement(prediction: str, answers: list[str]) -> float:
    """Return the mean over the annotators of min(1, matches among the others / 3); equality for a single answer."""
    matches = answers.count(prediction)
    if len(answers) == 1:
        return float(matches)
    others = (matches - (answer == prediction) for answer in answers)
    return fmean(min(1.0, num_others / 3) for num_others in others)


def _plain(answer: str) -> str:
    return answer.lower().removesuffix(".").strip()
