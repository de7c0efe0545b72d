"""Split captions into words as the COCO caption scores do: Penn Treebank tokens, lower-cased, without punctuation.

The published scores are computed on the output of Stanford CoreNLP 3.4.1's ``PTBTokenizer -preserveLines -lowerCase``,
from which the evaluation code then drops a fixed list of punctuation. This module computes the same without Java. Its
rules were found by observing that program; the tests compare against its recorded output and, where Java is there,
against the program itself.

At each place every rule tries its longest match, what must follow the token included. The longest wins, and of equally
long ones the first. Where no rule matches, the character is dropped.

What differs: a caption is read as if it stood alone. The Java program reads all captions as one text, in which a few
constructions (``no.`` before a number, say) reach into the next line, and in which a vertical tab, form feed, carriage
return, U+2028 or U+2029 begins a new line, so that every later caption is given its neighbour's words. Here these are
spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from mllm.eval.metrics.ptb_grammar import RULES, SPLIT_WORDS

VERSION = "1"

_TOKEN = re.compile("".join(f"(?=(({token})(?:{context}))?)" for token, context in RULES))
_ENDS = range(1, 2 * len(RULES), 2)  # the groups of whole matches; each is followed by the group of its token
_PLAIN = re.compile("([A-Za-z]+)[ \n]")  # most of a caption; here the rules cannot but agree
_SPLIT = {"".join(pair.split()): pair for pair in SPLIT_WORDS}
_NEW_LINES = str.maketrans("\n\v\f\r\u2028\u2029", "      ")

# How a token is written, where that is not as it stands. Punctuation that the evaluation code drops becomes nothing.
_DROPPED = re.compile(r"['`\"\u0091-\u0094\u2018\u2019\u201b-\u201d\u2039\u203a\xab\xbb]+|&quot;|-{1,4}|[-.?!,:;\xad]|\.[. \xa0]+"
    r"|[\x85\u2026\x96\x97\u2013-\u2015]|&(?:md|mdash|ndash);|[(){}]|-[lr][rc]b-")
_RENAMED = {
    "[": "-lsb-", "]": "-rsb-", "&lt;": "<", "&gt;": ">", "\x80": "$", "¤": "$", "₠": "$", "€": "$", "£": "#", "¢": "cents",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
}
_CURLY = re.compile("([\u0092\u2019]|&apos;)(?:[msd]|re|ve|ll)|n.+t")


def _written(token: str) -> str:
    """Return how a token is written: "" if it is dropped."""
    token = token.lower()
    if token.isalnum():
        return _RENAMED.get(token, token)
    if token in _RENAMED:
        return _RENAMED[token]
    if _DROPPED.fullmatch(token):
        return ""
    if not (token[0] == "<" and token[-1] == ">"):
        token = token.replace("(", "-lrb-").replace(")", "-rrb-")
    return token.replace(" ", "\xa0").replace("\xad", "").replace("&amp;", "&")


def _tokens(text: str) -> Iterator[str]:
    """Yield the tokens of a text that ends in a line feed, as they are written."""
    place = 0
    while place < len(text):
        if plain := _PLAIN.match(text, place):
            word = plain[1].lower()
            yield _SPLIT.get(word, word)
            place = plain.end()
            continue
        match = _TOKEN.match(text, place)
        assert match is not None
        best = max(_ENDS, key=match.end)
        if match.end(best) <= place:
            place += 1
            continue
        yield _written(match[best + 1])
        place = match.end(best + 1)


@lru_cache(maxsize=2**18)
def tokenize(caption: str) -> str:
    """Return the caption's tokens joined by spaces; a few tokens (fractions, telephone numbers) hold no-break spaces."""
    return " ".join(filter(None, _tokens(caption.translate(_NEW_LINES) + "\n")))
