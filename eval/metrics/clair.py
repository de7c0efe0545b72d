"""Ask a language model how likely a caption and the references describe the same image (CLAIR).

Chan et al. 2023, https://arxiv.org/abs/2310.12971. The judge is any language model that follows instructions; values
depend on it, and the judges of the paper are far larger than what runs on a laptop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

import torch
from mllm.eval.metrics.checks import check

from mllm.errors import MLLMError
from mllm.evaluation import Score
from mllm.lms.decoding import Decoding
from mllm.lms.language_model import LanguageModel

VERSION = "1"

_ASK = """You compare two sets of captions. How likely is it that both describe the same image?
Candidate:
{candidate}
References:
{references}
Answer in JSON with the keys "score", a number from 0 to 100, and "reason", one sentence.
"""
_SCORE = re.compile(r'"?score"?\s*[:=]\s*"?(\d+(?:\.\d+)?)', re.IGNORECASE)


def clair(predictions: Sequence[str], references: Sequence[Sequence[str]], *, judge: LanguageModel) -> Score:
    """Return the judge's mean score, 0 to 1.

    Args:
        judge: a language model of the registry group ``lms``; it decodes greedily.

    Raises:
        MLLMError: the judge's answer to an item has no score.
    """
    check(predictions, references)
    per_item = []
    for item, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
        listed = "\n".join(f"- {answer}" for answer in answers)
        reply = _reply(judge, _ASK.format(candidate=f"- {prediction}", references=listed))
        match = _SCORE.search(reply)
        if match is None or float(match[1]) > 100:
            raise MLLMError(f"CLAIR: the judge gave item {item} no score from 0 to 100. Its answer: {reply[:80]!r}.")
        per_item.append(float(match[1]) / 100)
    return Score(fmean(per_item), per_item, "caption/clair", VERSION)


def _reply(judge: LanguageModel, text: str) -> str:
    """Return a language model's answer, prompted by its chat template if it has one."""
    if judge.tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": text}]
        text = judge.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([judge.tokenize(text, control=True)], device=judge.model.device)
    else:
        ids = torch.tensor([[*judge.bos, *judge.tokenize(text)]], device=judge.model.device)
    (answer,) = judge.generate(torch.ones_like(ids), [Decoding(max_new_tokens=64, shorten=True)], input_ids=ids)
    return str(judge.decode(answer))
