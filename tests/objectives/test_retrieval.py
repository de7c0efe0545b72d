"""The retrieval head: its losses are the paper's formulas, and what trains is the head and the new row alone."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.functional import cosine_similarity, log_softmax, normalize

from mllm.build import join
from mllm.config.loading import check
from mllm.config.parts import AssemblySpec, HeadSpec
from mllm.errors import MLLMError
from mllm.objectives.caption import Caption
from mllm.objectives.retrieval import RetrievalContrast, TokenPrediction
from mllm.processes import gathered
from mllm.prompts.pieces import Target
from mllm.readout.states import captions
from mllm.slots import Inputs
from mllm.testing import tiny_image
from mllm.training.batches import inputs
from mllm.training.setup import parameter_groups

PARTS = {"heads": [{"type": "retrieval", "dim": 6}], "tokens": ["[RET]"]}
ROWS = [
    [tiny_image(0), "A picture of", Target(" a cat")],
    ["no image", Target(" at all")],
    [tiny_image(1), "A picture of", Target(" a dog"), "\n", tiny_image(2), "A picture of", Target(" two red birds")],
]


def inputs_of(model, rows=ROWS):
    rows, features, batch = inputs(model, rows, model.features)
    return Inputs(model, rows, features, batch)


def states(model, text):
    """The state at [RET] behind a text, and the logits before it, computed alone."""
    ids = torch.tensor([[*model.lm.tokenize("A picture of" + text), model.lm.new_tokens["[RET]"]]])
    output = model.lm.model(inputs_embeds=model.lm.embed(ids), output_hidden_states=True)
    return output.hidden_states[-1][0, -1], output.logits[0, -2]


def test_captions_go_with_the_image_before_them():
    assert captions(ROWS) == [(0, " a cat"), (None, " at all"), (1, " a dog"), (2, " two red birds")]


def test_losses_are_the_papers_formulas(tiny_model):
    model = tiny_model(**PARTS)
    head, given = model.heads["retrieval"], inputs_of(model)
    assert head.scale.exp().item() == pytest.approx(1 / 0.07)
    unseen, *alone = [states(model, text) for text in (" at all", " a cat", " a dog", " two red birds")]
    texts = torch.stack([state @ head.text.weight.T + head.text.bias for state, _ in alone])
    images = torch.stack([f.mean(0) @ head.image.weight.T + head.image.bias for f in given.features])
    table = cosine_similarity(texts[:, None], images[None], dim=-1) / 0.07
    expected = -(log_softmax(table, 1).diagonal().sum() + log_softmax(table, 0).diagonal().sum()) / 2
    torch.testing.assert_close(RetrievalContrast()(given), expected, atol=1e-4, rtol=1e-4)
    wanted = -sum(log_softmax(logits, -1)[model.lm.new_tokens["[RET]"]] for _, logits in [unseen, *alone])
    torch.testing.assert_close(TokenPrediction()(given), wanted, atol=1e-4, rtol=1e-4)
    assert RetrievalContrast().count(ROWS, given.batch) == 3
    assert TokenPrediction().count(ROWS, given.batch) == 4  # it looks at no image


def test_the_head_and_the_new_row_train_and_nothing_else(tiny_model):
    model = tiny_model(**PARTS)
    train = {"heads": 0.1, "tokens": 0.1}
    stage = check({"name": "x", "stages": [{"name": "s", "train": train, "steps": 1}]}, "x").stages[0]
    groups = parameter_groups(model, stage)
    given = inputs_of(model)
    (RetrievalContrast()(given) + TokenPrediction()(given)).backward()
    assert all(p.grad.abs().sum() > 0 for group in groups for p in group["params"])
    assert all(p.grad is None for n, p in model.named_parameters() if n.split(".")[0] not in train)


def gradients(model):
    given = inputs_of(model)
    model.zero_grad()
    loss = RetrievalContrast()(given) + TokenPrediction()(given)
    loss.backward()
    trained = [(name, p.grad) for part in ("heads", "tokens") for name, p in getattr(model, part).named_parameters()]
    return loss.detach(), {name: gradient.clone() for name, gradient in trained}


def test_where_nothing_before_the_token_trains_no_gradient_is_kept_for_it(tiny_model, monkeypatch):
    model = tiny_model(**PARTS).requires_grad_(False)
    model.heads.requires_grad_(True), model.tokens.requires_grad_(True)
    seen, prefill = [], model.lm.prefill

    def counted(embeds, mask):
        seen.append(embeds.shape)
        return prefill(embeds, mask)

    monkeypatch.setattr(model.lm, "prefill", counted)
    monkeypatch.setattr("mllm.readout.states.TOGETHER", 2)  # captions of about one length are read together
    assert not model.lm_trains
    loss, short = gradients(model)
    assert [shape[:2] for shape in seen] == [(4, len("A picture of two red birds") - 1)]
    model.lm.model.requires_grad_(True)  # now the whole caption's gradient is wanted
    assert model.lm_trains
    again, full = gradients(model)
    assert len(seen) == 1 and model.lm.model.get_input_embeddings().weight.grad.abs().sum() > 0
    torch.testing.assert_close(loss, again)
    torch.testing.assert_close(short, full)


def test_an_adapter_that_trains_keeps_the_whole_gradient(tiny_model):
    model = tiny_model(**PARTS, adapters=[{"type": "lora", "r": 2}]).requires_grad_(False)
    model.heads.requires_grad_(True), model.tokens.requires_grad_(True)
    assert not model.lm_trains
    model.adapters.requires_grad_(True)
    assert model.lm_trains
    gradients(model)
    assert any(p.grad.abs().sum() > 0 for p in model.adapters.parameters())


def test_captioning_is_what_it_was_without_the_head(tiny_model):
    plain, model = tiny_model(), tiny_model(**PARTS)
    with model.tokens.off():
        assert torch.equal(Caption()(inputs_of(plain)), Caption()(inputs_of(model)))


def test_a_head_brings_its_own_token(tiny_model):
    by_itself, named = tiny_model(heads=PARTS["heads"]), tiny_model(**PARTS)
    assert by_itself.lm.new_tokens == named.lm.new_tokens
    assert by_itself.trained_state().keys() == named.trained_state().keys()
    assert [*tiny_model(heads=PARTS["heads"], tokens=["[IMG]"]).lm.new_tokens] == ["[IMG]", "[RET]"]


def test_what_does_not_fit_is_said(tiny_model):
    with pytest.raises(MLLMError, match="no head that shows images"):
        TokenPrediction()(inputs_of(tiny_model(tokens=["[IMG]"])))
    with pytest.raises(MLLMError, match="No example of a batch has a caption behind an image"):
        RetrievalContrast()(inputs_of(tiny_model(**PARTS), [["no image", Target(" at all")]]))
    with pytest.raises(MLLMError, match="No example of a batch has a caption, which"):
        TokenPrediction()(inputs_of(tiny_model(**PARTS), [[tiny_image(0), "no target"]]))
    with pytest.raises(MLLMError, match="does not take these arguments"):
        tiny_model(heads=[{"type": "retrieval", "width": 6}])
    with pytest.raises(MLLMError, match="give lm and encoder"):
        join(AssemblySpec(heads=[HeadSpec(type="retrieval")]), encoder=None, lm=None)


def one_process(rank, world, place, values, found):
    distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world)
    own = [slice(0, 2), slice(2, 5)][rank]  # of two processes, one has more
    texts, images = (value[own].clone().requires_grad_() for value in values)
    every_text, start = gathered(normalize(texts, dim=-1))
    every_image, _ = gathered(normalize(images, dim=-1))
    right = torch.arange(start, start + len(texts))
    loss = torch.nn.functional.cross_entropy(normalize(texts, dim=-1) @ every_image.T, right, reduction="sum")
    loss = loss + torch.nn.functional.cross_entropy(normalize(images, dim=-1) @ every_text.T, right, reduction="sum")
    loss.backward()
    found.put((rank, loss.item(), texts.grad.tolist(), images.grad.tolist()))
    distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_processes_together_compute_what_one_does(tmp_path):
    values = torch.randn(2, 5, 4)
    context = multiprocessing.get_context("forkserver")
    found = context.Queue()
    own = [context.Process(target=one_process, args=(r, 2, tmp_path / "meet", values, found)) for r in range(2)]
    for process in own:
        process.start()
    got = sorted(found.get(timeout=100) for _ in own)
    for process in own:
        process.join()
    texts, images = (value.clone().requires_grad_() for value in values)
    table = normalize(texts, dim=-1) @ normalize(images, dim=-1).T
    whole = -(log_softmax(table, 1).diagonal().sum() + log_softmax(table, 0).diagonal().sum())
    whole.backward()
    assert sum(loss for _, loss, *_ in got) == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(torch.tensor([row for _, _, rows, _ in got for row in rows]), texts.grad)
    torch.testing.assert_close(torch.tensor([row for *_, rows in got for row in rows]), images.grad)
