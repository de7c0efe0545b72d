"""Ask a language model how likely a caption and the references tell of one picture (CLAIR).

Chan et al. 2023, https://arxiv.org/abs/2310.12971. The judge is any language model that follows instructions; values
depend on it, and the paper's judges are far larger than what runs on a laptop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from mllm.eval.metrics.checks import check

from mllm.errors import MLLMError
from mllm.evaluation import Score

VERSION = "1"

_ASK = """You compare two sets of captions. How likely is it that both describe the same image?
Candidate:
{candidate}
References:
{references}
Answer in JSON with the keys "score", a number from 0 to 100, and "reason", one sentence.
"""
_FOUND = re.compile(r'"?score"?\s*[:=]\s*"?(\d+(?:\.\d+)?)', re.IGNORECASE)


def clair(predictions: Sequence[str], references: Sequence[Sequence[str]], *, judge: Any) -> Score:
    """Return the judge's mean score, 0 to 1.

    Args:
        judge: a language model, as the registry group ``lms`` has them; it answers greedily.

    Raises:
        MLLMError: the judge gives no score to an item.
    """
    check(predictions, references)
    per_item = []
    for item, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
        listed = "\n".join(f"- {answer}" for answer in answers)
        said = _reply(judge, _ASK.format(candidate=f"- {prediction}", references=listed))
        found = _FOUND.search(said)
        if found is None or float(found[1]) > 100:
            raise MLLMError(f"CLAIR: the judge gave item {item} no score from 0 to 100. It said: {said[:80]!r}.")
        per_item.append(float(found[1]) / 100)
    return Score(fmean(per_item), per_item, "caption/clair", VERSION)


def _reply(judge: Any, text: str) -> str:
    """Return what a language model answers, in its own chat template if it has one."""
    if judge.tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": text}]
        text = judge.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([judge.tokenize(text, control=True)], device=judge.model.device)
    else:
        ids = torch.tensor([[*judge.bos, *judge.tokenize(text)]], device=judge.model.device)
    (said,) = judge.generate(torch.ones_like(ids), [{"max_new_tokens": 64}], input_ids=ids)
    return str(judge.decode(said))
