"""The loss is transformers' own, whatever stands between hidden states and logits, and however it is cut in chunks."""

from __future__ import annotations

import pytest
import torch

from mllm.lms import vocabulary
from mllm.lms.language_model import LanguageModel
from mllm.prompts.batch import IGNORED
from mllm.testing.lms import LM_FAMILIES

# Encoder-decoders have no such head, and those that ignore masks are not run on a padded batch.
DECODERS = [name for name in LM_FAMILIES if name not in ("t5", "mt5", "umt5", "bart", "rwkv", "mamba", "mpt")]
FEW = ("llama", "gemma2", "opt", "cohere", "granite")  # plain, soft-capped, projected, scaled up, scaled down


few = pytest.mark.parametrize("lm", FEW, indirect=True)


@pytest.fixture
def lm(request, tmp_path):
    return LanguageModel(model=LM_FAMILIES[request.param](tmp_path))


def batch(lm):
    """Two rows, one of them padded, with targets at positions of their own."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 200, (2, 9), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    labels = torch.full_like(ids, IGNORED)
    labels[0, 2:5], labels[1, 6:] = ids[0, 2:5], ids[1, 6:]
    return lm.embed(ids).detach().requires_grad_(), mask, labels


def expected(lm, embeds, mask, labels):
    """Return transformers' mean loss times the number of targets, and its gradient."""
    loss = lm.model(**lm.runner.inputs(embeds, mask), labels=labels).loss * 6
    return loss.detach(), torch.autograd.grad(loss, embeds)[0]


def check(found, embeds, wanted):
    loss, gradient = wanted
    assert found.shape == (6,)
    torch.testing.assert_close(found.sum(), loss, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), embeds)[0], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lm", DECODERS, indirect=True)
def test_the_loss_and_its_gradient_are_transformers_own(lm):
    embeds, mask, labels = batch(lm)
    assert lm.runner.separable
    check(lm.losses(embeds, mask, labels), embeds, expected(lm, embeds, mask, labels))


@few
def test_chunks_change_nothing(lm):
    embeds, mask, labels = batch(lm)
    wanted = expected(lm, embeds, mask, labels)
    shapes = []
    lm.model.get_output_embeddings().register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[:2])))
    for size in (1, 2, 4):
        output = vocabulary.run_body(lm.model, **lm.runner.inputs(embeds, mask))
        hidden = output.last_hidden_state[:, :-1][labels[:, 1:] != IGNORED]
        targets = labels[:, 1:][labels[:, 1:] != IGNORED]
        shapes.clear()
        vocabulary_size = lm.model.get_output_embeddings().weight.shape[0]
        check(
            vocabulary.losses(lm.model, hidden, targets, type(output), max_logits=size * vocabulary_size),
            embeds,
            wanted,
        )
        assert max(width for _, width in shapes) <= size


@few
def test_what_is_no_body_and_head_gets_the_models_own_logits(lm, monkeypatch):
    monkeypatch.setattr(lm.model, "get_decoder", lambda: lm.model)
    assert not vocabulary.separable(lm.model)
    monkeypatch.setattr(lm.runner, "separable", False)
    embeds, mask, labels = batch(lm)
    check(lm.losses(embeds, mask, labels), embeds, expected(lm, embeds, mask, labels))


@pytest.mark.parametrize("lm", ["gemma2"], indirect=True)
def test_what_is_hooked_onto_the_head_is_in_the_loss(lm):
    embeds, mask, labels = batch(lm)
    new = torch.randn(2, embeds.shape[-1], requires_grad=True)  # two more tokens' rows
    head = lm.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, given, out: torch.cat([out, given[0] @ new.T], -1))
    try:
        labels[0, 4] = head.weight.shape[0] + 1
        chosen = labels[:, 1:] != IGNORED
        logits = lm.logits(embeds, mask)[:, :-1][chosen]
        wanted = torch.nn.functional.cross_entropy(logits, labels[:, 1:][chosen], reduction="sum")
        found = lm.losses(embeds, mask, labels).sum()
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
        for mine, theirs in zip(
            torch.autograd.grad(found, (embeds, new)), torch.autograd.grad(wanted, (embeds, new)), strict=True
        ):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    finally:
        handle.remove()


@few
def test_no_target_is_no_loss(lm):
    embeds, mask, labels = batch(lm)
    assert lm.losses(embeds, mask, torch.full_like(labels, IGNORED)).shape == (0,)
