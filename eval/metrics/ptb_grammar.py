"""The rules of the PTB tokeniser: what a token looks like, and what must follow it.

Names in capitals are building blocks, as in a grammar. They describe what the Java program was observed to do, oddities
included; most of those concern rare input, but captions of the web are full of rare input.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from mllm.eval.metrics.ptb_characters import COMBINING, DIGITS, LETTERS, SYMBOLS


def _any(words: str) -> str:
    """Return a pattern for any of the words in either case; a bracketed set stays in the case given."""
    cased = re.sub(r"(\[[^]]*\])", r"(?-i:\1)", "|".join(words.split()))
    return f"(?i:{cased})"


SPLIT_WORDS = ("can not", "gon na", "got ta", "lem me", "gim me", "wan na")  # cannot, gonna, ...
SPACE_NL = r"[ \t\n\u00a0\u2000-\u200a\u3000]"
APOS = r"(?:['\u0092\u2019]|(?i:&apos;))"
APOS_LIKE = rf"(?:{APOS}|[`\u0091\u2018\u201b])"
HYPHEN = r"[-_\u058a\u2010\u2011]"
AMPERSAND = rf"(?:{_any('&amp;')}|&)"

LETTER = rf"(?:[{LETTERS}{COMBINING}\u00ad]|&[aeiouAEIOU]{_any('acute grave uml')};)"
CHARACTER = rf"(?:{LETTER}|[{DIGITS}])"
WORD_PART = rf"{LETTER}{CHARACTER}*"
WORD = rf"{WORD_PART}(?:[.!?]{WORD_PART})*"
REDUCED = rf"{APOS}(?:[msdMSD]|{_any('re ve ll')})"  # 's, 're
NOT = rf"[nN]{APOS_LIKE}[tT]"

# Words with an apostrophe that stay whole: d', 'n', 'em, c'mon, O'Neil, Hawai'i.
ELIDED = (
    rf"{APOS}[nN]{APOS}?|[lLdDjJ]{APOS}|{_any('Dunkin somethin ol')}{APOS}",
    rf"{APOS}(?:{_any('em till? cause')}|[2-9]0[sS])",
    _any("c'mon e'er s'mores ev'ry li'l nat'l nor'easter cont'd[.]") + f"|[oO]{APOS_LIKE}[oO]",
    rf"[A-HJ-XZn]{APOS_LIKE}[{LETTERS}]{{2,}}",
    rf"[{LETTERS}]+[aeiouyAEIOUY]{APOS_LIKE}[aeiouA-Z][{LETTERS}]*",
)

NUMBER = rf"(?:[{DIGITS}]*(?:[.:,\u00ad\u066b\u066c][{DIGITS}]+)+|[{DIGITS}]+)"
SLASH = r"(?:\\?/|\u2044)"
FRACTION = rf"(?:[{DIGITS}]{{1,4}}[- \u00a0])?[{DIGITS}]{{1,4}}{SLASH}[{DIGITS}]{{1,4}}"
DATE = rf"[{DIGITS}]{{1,2}}[-/][{DIGITS}]{{1,2}}[-/][{DIGITS}]{{2,4}}"
SCRIPTS = r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"
PHONE = (
    r"(?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])"
    r"[0-9]{3,4}[- \u00a0]?[0-9]{3,5}|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"
)

NAME = r"[A-Za-z][A-Za-z0-9_:.-]*"
ATTRIBUTES = rf"(?:[ ]+{NAME}(?:[ ]*=[ ]*(?:'[^\r\n']*'|\"[^\r\n\"]*\"))?)*"
TAG = rf"<(?:[!?][A-Za-z-][^>\r\n]*|{NAME}{ATTRIBUTES}[ ]*/?|/{NAME})[ ]*>"


def _site(some: str) -> str:
    """Return the pattern of a site's name, of as many parts as possible ("+") or as few ("+?")."""
    www = rf'{_any("www")}\.(?:[^ \t\n\f\r"<>|.!?(){{}},]+\.){some}[a-zA-Z]{{2,4}}'
    part = r"""[^ \t\n\f\r"`'<>|!?(){},-_$]+\."""  # ,-_ is a range: full stop, digits and capitals are in it
    return rf"(?:{www}|(?:{part}){some}{_any('com net org edu')})"


PATH = r'[^ \t\n\f\r"<>|()]+[^ \t\n\f\r"<>|.!?(){},-]'
URL = PATH.replace("()]+", "(){}]+")
MAIL_PART = r'[^ \t\n\f\r"<>|(){}.\u00a0]+'
MAIL = rf'(?:<|(?i:&lt;))?[a-zA-Z0-9][^ \t\n\f\r"<>|(){{}}\u00a0]*@(?:{MAIL_PART}\.)*{MAIL_PART}(?:>|(?i:&gt;))?'
FILE_TYPES = """bat bmp c class cgi cpp dll docx? exe gif gz h html? jar java jpe?g mov mp3 pdf php pl png ppt ps py sql
    tar txt wav x xml zip"""

# Compounds: x-ray, AT&T, and/or, non-U.S., 1,000-mile.
ELISION = rf"(?:[dDoOlL]{APOS_LIKE}[{LETTERS}{DIGITS}])?"
JOINED = rf"{ELISION}[{LETTERS}{DIGITS}]+(?:{HYPHEN}{ELISION}[{LETTERS}{DIGITS}]+)*"
CAPITALS = rf"[A-Z]+(?:(?:\+|{AMPERSAND})[A-Z]+)+"
HALF = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
SLASHED = rf"{HALF}(?:\\?/{HALF}){{1,2}}"
ACRONYM = rf"{_any('Canada Sino Korean EU Japan non')}-{_any('U[.]S')}|{_any('U[.]S[.]-U[.]K U[.]S[.]-U[.]S[.]S[.]R')}"
HYPHENATED = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:(?:[A-Za-z](?:\.[A-Za-z])+|{ACRONYM})\.|[A-Za-z0-9\u00ad]+))+"

# Abbreviations that keep their full stop; after those of the second list the token ends even if a letter follows.
ABBREVIATIONS = """Mr Mrs Ms Drs? Profs? Sens? Reps? Attys? Lt Col Gen Messrs Govs? Adm Rev Maj Sgt Cpl Pvt Capt Ste?
    Ave Pres Lieut Hon Brig Co?mdr Pfc Spc Supts? Det Mme Mlle Msgr Insp Asst Assoc Sfc Adj Adv Ens Alex Wm Jos Cf Cie
    Dept Elec Natl Invt M[ft]g Ft Mt Ph Treas Vs"""
ABBREVIATIONS_ANYWHERE = """Jr Sr Bros (?:Ed|Ph)[.]D Blvd Rd Esq Bldg Rt Sq Al Est Etc Ext Seq Tel
    Ala Ariz [A]z [A]rk Calif Colo Conn Ct Dak [D]el Fla Ga [I]ll Ind Kans? Ky [L]a [M]ass Md Mich Minn [M]iss Mo Mont
    Neb Nev Okla [O]re [P]a Penn Tenn [T]ex Va Vt [W]ash Wisc? Wyo
    Inc Cos? Corp P[p]?t[ye]s? Ltd Plc Bancorp Bhd Assn Univ Intl Sys
    Mon Tues? Wed Thu Thurs Fri Jan Feb Mar Apr Jun Jul Aug Sept? Oct Nov Dec"""
# Words that begin a sentence: a single letter before them loses its full stop.
STARTERS = """[A] [A]bout [A]ccording [A]dditionally [A]fter [A]n [A]s [A]t [B]ut [E]arlier [H]e [H]er [H]ere [H]owever
    [I]f [I]n [I]t [L]ast [M]any [M]ore [M]r[.] [M]s[.] [N]ow [O]nce [O]ne [O]ther [O]ur [S]he [S]ince [S]o [S]ome
    [S]uch [T]hat [T]he [T]heir [T]hen [T]here [T]hese [T]hey [T]his [W]e [W]hen [W]hile [W]hat [Y]et [Y]ou"""
BEFORE_NUMBERS = "art ca figs? nos? op ph? pp prop"

SMILEY = r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]"
FACE = r"""[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)"""
FIXED = rf"(?i:C\.D\.s|pro-|anti-|S{AMPERSAND}(?:P-500|Ls)|Cap{APOS}n|c{APOS}est|C\+\+|[CF]#|-[LR][RCS]B-)"
ENTITY = rf"&(?:{_any('HT TL UR LR QC QL QR odq cdq')}|#[0-9]+);"
DOTS = r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[\u0085\u2026]"
QUOTE = rf"''|[`\u2018-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{{1,2}}|{APOS}|\"|{_any('&quot;')}"
DASH = rf"{_any('&MD; &mdash; &ndash;')}|[\u0096\u0097\u2013\u2014\u2015]"
SIGN = (
    rf"{_any('&lt; &gt; &nbsp;')}|[<>{{}}()\[\]=+%&~^|/\\,;:.${SYMBOLS}"
    r"\u0080\u00a2-\u00a4\u00bc-\u00be\u2044\u20a0\u20ac\u2153\u2154]"
)
REPEATED = r"-+|[?!]+|\*+|(?:\\\*){1,3}|@+|#+|_+|<<|>>"

SIGNS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
SIGNS |= {"\x80": "$", "¤": "$", "₠": "$", "€": "$", "£": "#", "¢": "cents"}
SIGNS |= {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
SIGNS |= {"&lt;": "<", "&gt;": ">", "&amp;": "&", "&nbsp;": ""}
QUOTES = str.maketrans(
    dict.fromkeys("\u0091‘‛‹", "`")
    | dict.fromkeys("\u0092’›", "'")
    | dict.fromkeys("\u0093“«", "``")
    | dict.fromkeys("\u0094”»", "''")
)


def _word(token: str) -> str:
    return re.sub("(?i)&amp;", "&", token.replace("\u00ad", ""))


def _sign(token: str) -> str:
    return SIGNS.get(token.lower(), token)


def _quote(token: str) -> str:
    return token.replace("&apos;", "'").replace("&quot;", "''").translate(QUOTES)


def _spaced(token: str) -> str:
    return token.replace(" ", "\u00a0")


def _bracketed(token: str) -> str:
    return _spaced(token).replace("(", "-lrb-").replace(")", "-rrb-")


def _dropped(token: str) -> str:
    return ""


class Rule(NamedTuple):
    """One kind of token: its pattern, that of what must follow it, and how it is written (before lower-casing)."""

    token: str
    context: str = ""
    write: Callable[[str], str] = str


# In order of precedence, which decides between matches of one length.
RULES = (
    *(Rule(_any(first), _any(last)) for first, last in map(str.split, SPLIT_WORDS)),
    Rule("'[tT]", _any("is was")),
    Rule(TAG, write=_spaced),
    Rule(DASH, write=_dropped),
    Rule(AMPERSAND, write=_sign),
    Rule(ENTITY),
    Rule(WORD, REDUCED, _word),
    Rule(r"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", NOT, _word),
    Rule(WORD, write=_word),
    *map(Rule, ELIDED),
    Rule(f"[yY]{APOS}", f"[{LETTERS}]"),
    Rule(rf"{_any('https?')}://{URL}"),
    Rule(f"{_site('+')}(?:/{PATH})?"),
    Rule(f"{_site('+?')}/{PATH}"),  # the longest path may follow a shorter name
    Rule(MAIL),
    Rule(rf"@[A-Za-z_][A-Za-z_0-9]*|#{LETTER}+"),
    Rule(REDUCED, "[^A-Za-z]", _quote),
    Rule(NOT, "[^A-Za-z]", _quote),
    Rule(DATE),
    Rule(rf"[-+]?{NUMBER}", write=_word),
    Rule(SCRIPTS),
    Rule(FRACTION, write=_spaced),
    Rule(FIXED, write=_word),
    Rule(SLASHED),
    Rule(r"[A-Z]+\$"),
    Rule(SMILEY, "[^A-Za-z0-9]", _bracketed),
    Rule(FACE, write=_bracketed),
    Rule(REPEATED),
    Rule(DOTS, write=_dropped),
    Rule(rf"{_any(ABBREVIATIONS_ANYWHERE)}\.", r"[\s\S]{2}"),
    Rule(HYPHENATED, write=_word),
    Rule(CAPITALS, write=_word),
    Rule(JOINED, write=_word),
    Rule(rf"{APOS}[0-9][0-9]", SPACE_NL),
    Rule(rf"(?:{WORD}|{JOINED}|{HYPHENATED})\.", r"[,;:\u3001]", _word),
    Rule("[A-Za-z]", rf"\.{SPACE_NL}+(?:{_any(STARTERS)}|{TAG}){SPACE_NL}"),
    Rule(rf"(?:{_any(ABBREVIATIONS_ANYWHERE)}|{_any(ABBREVIATIONS)}|[A-Za-z](?:\.[A-Za-z])*|{ACRONYM})\."),
    Rule(rf"{_any(BEFORE_NUMBERS)}\.", f"{SPACE_NL}?[{DIGITS}]"),
    Rule(rf"(?:{CHARACTER}+\.)+{_any(FILE_TYPES)}", f"{SPACE_NL}|[.?!,]"),
    Rule(PHONE, write=_bracketed),
    Rule(QUOTE, write=_quote),
    Rule("'", r"[A-Za-z][^ \t\n]"),  # an opening quotation mark
    Rule(REDUCED, write=_quote),
    Rule(ACRONYM, SPACE_NL),
    Rule(SIGN, write=_sign),
)
