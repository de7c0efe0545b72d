"""Every family of language models, by one path: nothing in the code knows any of them by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

import mllm
from mllm.answering.decode import answer, make_decoding
from mllm.errors import MLLMError
from mllm.lms.runners.encoder_decoder import EncoderDecoderRunner
from mllm.lms.runners.unpadded import UnpaddedRunner
from mllm.objectives.caption import Caption
from mllm.planning.check import problems
from mllm.prompts.batch import collate
from mllm.prompts.pieces import Target, images_of
from mllm.slots import Inputs
from mllm.testing import LM_FAMILIES, tiny_image
from mllm.testing.lms import LMFamily

PROMPTS: list[list[Any]] = [
    [tiny_image(1), "A cat.", tiny_image(2), "Of what is this a picture?"],
    ["Short ", tiny_image(3)],
    ["And one without a picture, of yet another length"],
]
ANSWERS = ["a dog", "b", "some birds"]


@pytest.fixture(scope="module", params=LM_FAMILIES)
def parts(request: Any, tiny_parts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return tiny_parts[0], LM_FAMILIES[request.param](folder)


@pytest.fixture(scope="module")
def model(parts: tuple[str, str]) -> Any:
    return mllm.assemble(*parts, {"type": "linear", "tokens": 4})


def loss_of(model: Any, rows: list[list[Any]]) -> tuple[Any, int]:
    """The summed loss of training examples, and how many tokens it is of."""
    images = [image for row in rows for image in images_of(row)]
    features = model.features(images) if images else None
    batch, objective = collate([model.encode(row) for row in rows], model.lm.pad), Caption()
    return objective(Inputs(model, rows, features, batch)), objective.count(rows, batch)


def losses(model: Any, prompts: list[list[Any]], answers: list[str]) -> tuple[Any, int]:
    rows = [[*prompt, Target(f" {answer}")] for prompt, answer in zip(prompts, answers, strict=True)]
    return loss_of(model, rows)


def test_loss_of_a_batch_is_the_sum_of_its_rows_and_trains_the_connector_alone(model):
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    model.zero_grad()
    together, count = losses(model, PROMPTS, ANSWERS)
    together.backward()
    alone = [losses(model, [prompt], [answer]) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    torch.testing.assert_close(together, torch.stack([loss for loss, _ in alone]).sum(), atol=1e-4, rtol=1e-5)
    assert count == sum(len(model.lm.tokenize(f" {answer}")) + 1 for answer in ANSWERS)
    reached = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"connector"}
    assert all(parameter.grad.abs().max() > 0 for parameter in model.connector.parameters())


@torch.no_grad()
def test_next_token_is_the_same_alone_and_padded(model):
    embeds, batch = model.prepare(PROMPTS)
    _, together = model.lm.prefill(embeds, batch.mask)
    for row, prompt in enumerate(PROMPTS):
        alone, one = model.prepare([prompt])
        torch.testing.assert_close(together[row], model.lm.prefill(alone, one.mask)[1][0], atol=2e-5, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1  # the input matters


def test_answers_are_the_same_alone_and_in_a_batch_seen_and_not(model):
    together = [str(output) for output in model.generate(PROMPTS, max_new_tokens=6)]
    assert together == [str(model.generate([prompt], max_new_tokens=6)[0]) for prompt in PROMPTS]
    whole = [str(model.generate([[*prompt, " Now?"]], max_new_tokens=6)[0]) for prompt in PROMPTS]
    assert model.see_each(PROMPTS).continue_with([[" Now?"]] * 3, max_new_tokens=6) == [[answer] for answer in whole]
    more = model.see(PROMPTS[1]).see([" then ", PROMPTS[0][0]])
    expected = str(model.generate([[*PROMPTS[1], " then ", PROMPTS[0][0], " Now?"]], max_new_tokens=6)[0])
    assert more.continue_with(" Now?", max_new_tokens=6) == expected
    chat = model.chat()
    replies = [chat.send("What is it?", images=[PROMPTS[0][0]], max_new_tokens=4), chat.send("Sure?", max_new_tokens=4)]
    again = model.chat(messages=chat.messages[:2])
    assert again.send("Sure?", max_new_tokens=4) == replies[1]


@pytest.mark.parametrize("parts", ["llama", "mistral", "gemma3", "mamba"], indirect=True)
def test_masked_places_between_others_count_in_no_window(model):
    texts = [["", ", why?"], [" What is it, then?"], [" ?", " of what?", "!"]]  # of several lengths, in one batch
    whole = [
        [str(model.generate([[*prompt, text]], max_new_tokens=4)[0]) for text in own]
        for prompt, own in zip(PROMPTS, texts, strict=True)
    ]
    assert model.see_each(PROMPTS).continue_with(texts, max_new_tokens=4) == whole
    later = [view.see([" and", tiny_image(4), "so"]) for view in model.see_each(PROMPTS)]
    for prompt, view in zip(PROMPTS, later, strict=True):
        (answer,) = model.generate([[*prompt, " and", tiny_image(4), "so it is"]], max_new_tokens=4)
        assert view.continue_with(" it is", max_new_tokens=4) == str(answer)
    chat = model.chat()
    chat.send("What is to be seen in this picture, if anything?", images=[tiny_image(1)], max_new_tokens=4)
    first = chat.messages
    chat.send("Sure?", max_new_tokens=4)
    chat.messages = first  # what was said since is masked
    assert chat.send("No?", max_new_tokens=4) == model.chat(messages=first).send("No?", max_new_tokens=4)


@torch.no_grad()
def test_a_score_is_the_loss_of_the_answer(model):
    for prompt in PROMPTS[:2]:
        expected = [-float(losses(model, [prompt], [answer])[0]) for answer in ANSWERS]
        assert model.score(prompt, ANSWERS) == pytest.approx(expected, abs=2e-4)


@torch.no_grad()
def test_text_alone_gives_what_the_bare_model_gives(model, parts):
    """Bit for bit: ids in, logits out; and the same greedy tokens."""
    auto: Any = AutoModelForSeq2SeqLM if isinstance(model.lm.runner, EncoderDecoderRunner) else AutoModelForCausalLM
    bare = auto.from_pretrained(parts[1]).eval()
    prompt = ["The bare model reads this"]
    ids = torch.tensor([model.lm.bos + model.lm.tokenize(prompt[0])])
    config = GenerationConfig(
        max_new_tokens=6, do_sample=False, eos_token_id=model.lm.eos, pad_token_id=model.lm.pad, use_cache=True
    )
    if isinstance(model.lm.runner, EncoderDecoderRunner):
        ids = torch.tensor([model.lm.tokenizer(prompt[0]).input_ids])
        batch = collate([model.encode([*prompt, Target(" so")])], model.lm.pad)
        labels = batch.labels[batch.labels >= 0][None]
        logits = bare(input_ids=ids, labels=labels).logits[0]
        found = model.lm.losses(model.embed(None, batch), batch.mask, batch.labels)
        assert torch.equal(found, torch.nn.functional.cross_entropy(logits, labels[0], reduction="none"))
        expected = bare.generate(ids, generation_config=config)[0, 1:]
    else:
        batch = collate([model.encode(prompt)], model.lm.pad)
        assert torch.equal(batch.ids, ids)
        assert torch.equal(model.logits(None, batch), bare(input_ids=ids).logits)
        expected = bare.generate(ids, generation_config=config)[0, ids.shape[1] :]
        states = model.lm.hidden(model.embed(None, batch), batch.mask)
        captured: list[Any] = []
        bare.get_output_embeddings().register_forward_pre_hook(lambda module, args: captured.append(args[0]))
        bare(input_ids=ids)
        assert torch.equal(states, captured[0])
    (answer,) = model.generate([prompt], max_new_tokens=6)
    assert str(answer) == model.lm.decode(model.lm.text.until_end(expected.tolist())).strip()


def test_which_way_a_model_is_run_is_found_by_a_probe(model, request):
    family = request.node.callspec.params["parts"]
    assert isinstance(model.lm.runner, UnpaddedRunner) == (
        family in {"mamba", "rwkv", "mpt"}
    )  # MPT's distances count masked places
    assert isinstance(model.lm.runner, EncoderDecoderRunner) == (family in {"t5", "mt5", "umt5", "bart"})


def test_a_conversation_is_learnt_as_its_answers_are_generated(model):
    """Each answer is conditioned on all before it."""
    turns = [PROMPTS[0][0], "Who?", Target(" a dog"), " Where?", Target(" here")]
    whole, _ = loss_of(model, [turns])
    first = losses(model, [[PROMPTS[0][0], "Who?"]], ["a dog"])[0]
    second = losses(model, [[PROMPTS[0][0], "Who? a dog Where?"]], ["here"])[0]
    torch.testing.assert_close(whole, first + second, atol=1e-4, rtol=1e-5)


def test_a_model_without_embeddings_as_input_is_refused_before_a_weight_is_loaded(tiny_parts, tmp_path):
    folder = LMFamily("cpmant", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "dim_head": 8})(
        tmp_path / "lm"
    )
    with pytest.raises(MLLMError, match="CpmAntForCausalLM takes no embeddings as input"):
        mllm.assemble(tiny_parts[0], folder)
    (tmp_path / "recipe.yaml").write_text(
        f"name: none\nencoder: {{model: {tiny_parts[0]}}}\nlm: {{model: {folder}}}\nconnector: {{type: linear}}\n"
        "stages: [{name: align, train: [connector], steps: 1}]\n"
    )
    assert any("takes no embeddings" in problem for problem in problems(str(tmp_path / "recipe.yaml")))


class Recorder(BaseStreamer):
    """Records the values that it is given."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.ended = False

    def put(self, value: Any) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended = True


def test_rows_that_are_decoded_apart_are_told_together(tiny_parts, tmp_path):
    model = mllm.assemble(tiny_parts[0], LM_FAMILIES["mamba"](tmp_path / "lm"), {"type": "linear", "tokens": 4})
    streamer = Recorder()
    answers = answer(model, PROMPTS, [make_decoding(model, {"max_new_tokens": 5})] * len(PROMPTS), streamer)
    columns = torch.stack(streamer.values[1:], dim=1).tolist()
    assert streamer.ended
    assert [model.lm.decode(model.lm.text.until_end(row)).strip() for row in columns] == [str(a) for a in answers]


def test_fixed_positions_change_nothing_behind_them(model):
    lm = model.lm
    if isinstance(lm.runner, EncoderDecoderRunner):
        pytest.skip("an encoder-decoder model has no states of a sequence")
    embeds, batch = model.prepare([["A cat and a dog"], ["Some longer words that go on"]])
    last = torch.arange(-2, 0) + embeds.shape[1]
    found = []
    for fixed in (0, embeds.shape[1] - 2):
        given = embeds.clone().requires_grad_()
        states, logits = lm.read(given, batch.mask, last, fixed)
        (states.square().sum() + logits.square().sum()).backward()
        found.append((states.detach(), logits.detach(), given.grad[:, -2:]))
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)
