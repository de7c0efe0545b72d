"""Gated cross-attention: who looks at which image, that nothing else changes, and that it travels with the states."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

import mllm
from mllm.errors import MLLMError
from mllm.export.export import export
from mllm.lms.cross_attention import append_embeddings
from mllm.lms.decoding import Decoding
from mllm.objectives.caption import Caption
from mllm.planning.check import problems
from mllm.planning.plan import plan
from mllm.prompts.batch import collate
from mllm.prompts.pieces import Target, images_of
from mllm.scorers.index import ImageIndex
from mllm.slots import Inputs
from mllm.testing import LM_FAMILIES, tiny_image

GATED: dict[str, Any] = {"type": "gated", "every": 1, "heads": 2, "head_dim": 8}
LINEAR: dict[str, Any] = {"type": "linear", "tokens": 4}
A, B, C = (tiny_image(seed) for seed in (1, 2, 3))
PROMPTS: list[list[Any]] = [["A", A], ["So: ", B, "b", C, "c d e"], ["no picture here"], [A, B, C]]
FAMILIES = ["gpt2", "gpt-neox", "opt", "bloom", "falcon", "llama", "mistral", "gemma2", "mamba"]


def assembled(encoder: str, lm: str, **options: Any) -> Any:
    """Return a model whose gates are open."""
    model = mllm.assemble(encoder, lm, LINEAR, adapters=[{**GATED, **options}])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model(tiny_parts: tuple[str, str]) -> Any:
    return assembled(*tiny_parts)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any, tiny_parts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return assembled(tiny_parts[0], LM_FAMILIES[request.param](tmp_path_factory.mktemp(request.param)))


def logits(model: Any, prompts: Any = PROMPTS) -> Any:
    embeds, batch = model.prepare(prompts)
    return model.lm.logits(embeds, batch.mask).detach()


def losses(model: Any, rows: list[list[Any]], pack: int | None = None) -> Any:
    batch = collate([model.encode(row) for row in rows], model.lm.pad, pack=pack)
    images = [image for row in rows for image in images_of(row)]
    return Caption()(Inputs(model, rows, model.features(images) if images else None, batch))


def test_an_image_takes_one_place(model, tiny_parts):
    bare = mllm.assemble(tiny_parts[0], tiny_parts[1], LINEAR)
    assert (model.tokens_per_image, bare.tokens_per_image) == (1, 4)
    assert [len(model.encode(prompt).ids) for prompt in PROMPTS] == [2, 12, 15, 3]
    with model.adapters_off():
        assert torch.equal(logits(model), logits(bare))
    for (name, mine), (_, theirs) in zip(bare.lm.state_dict().items(), model.lm.state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), name


def test_with_closed_gates_it_is_the_language_model_with_marks(tiny_parts):
    encoder, lm = tiny_parts
    model: Any = mllm.assemble(encoder, lm, LINEAR, adapters=[GATED])
    bare = mllm.assemble(encoder, lm, LINEAR)
    embeds, batch = model.prepare(PROMPTS)
    assert torch.equal(embeds.embeds[batch.visual], model.adapters[0].mark.expand(6, -1))
    assert torch.equal(model.lm.logits(embeds, batch.mask), bare.lm.logits(embeds.embeds, batch.mask))


def test_where_no_image_precedes_nothing_changes_to_the_bit(family, tiny_parts):
    bare = mllm.assemble(tiny_parts[0], family.spec.lm.model, LINEAR)
    texts = [["A text alone"], ["Short"]]
    assert torch.equal(logits(family, texts), logits(bare, texts))
    embeds, batch = family.prepare(PROMPTS)
    mine, theirs = family.lm.logits(embeds, batch.mask), bare.lm.logits(embeds.embeds, batch.mask)
    before = (batch.mask == 1) & (batch.visual.cumsum(1) == 0)
    assert torch.equal(mine[before], theirs[before])
    assert (mine - theirs)[(batch.mask == 1) & ~before].abs().amax(-1).min() > 1e-3


def test_a_batch_is_its_members_and_states_are_gone_on_from(family):
    together = logits(family)
    for row, prompt in enumerate(PROMPTS):
        alone = logits(family, [prompt])[0]
        torch.testing.assert_close(together[row, -len(alone) :], alone, atol=1e-4, rtol=1e-4)
    embeds, batch = family.prepare(PROMPTS)
    answers = family.lm.generate(batch.mask, [Decoding(max_new_tokens=5)] * len(PROMPTS), inputs_embeds=embeds)
    for row, ids in enumerate(answers):  # read at once, without states
        whole, mask = append_embeddings(embeds, row, batch.mask, family.lm.embed(torch.tensor([ids])))
        assert family.lm.logits(whole, mask)[0, -len(ids) - 1 : -1].argmax(-1).tolist() == ids
    words = [[" Now?"], [], [" Why", " Now?"], [" Where is it?"]]
    each = [[[*prompt, text] for text in own] for prompt, own in zip(PROMPTS, words, strict=True)]
    apart = [[str(family.generate([whole], max_new_tokens=5)[0]) for whole in own] for own in each]
    assert family.see_each(PROMPTS).continue_with(words, max_new_tokens=5) == apart
    later = family.see(["So"]).see([" it ", A, " is"])
    (whole,) = family.generate([["So it ", A, " is what?"]], max_new_tokens=5)
    assert later.continue_with(" what?", max_new_tokens=5) == str(whole)
    more = family.see(PROMPTS[0]).see([" and ", B, " so "])
    assert more.continue_with("it is", max_new_tokens=5) == str(
        family.generate([[*PROMPTS[0], " and ", B, " so it is"]], max_new_tokens=5)[0]
    )
    rows = [[*prompt, Target(" so it is")] for prompt in PROMPTS]
    for prompt, learnt in zip(PROMPTS, rows, strict=True):
        found, _ = family.score(prompt, ["so it is", "so be it"])
        assert found == pytest.approx(-float(losses(family, [learnt]).detach()), abs=1e-3)


def test_beams_and_contrasts_see_what_their_prompt_shows(model):
    beams = model.generate(PROMPTS, max_new_tokens=5, num_beams=3)
    assert [str(a) for a in beams] == [str(model.generate([p], max_new_tokens=5, num_beams=3)[0]) for p in PROMPTS]
    options = {"max_new_tokens": 5, "contrastive": {"alpha": 0.5}}
    answers = model.generate(PROMPTS[:2], **options)
    assert [str(a) for a in answers] == [str(model.generate([p], **options)[0]) for p in PROMPTS[:2]]
    (alone,) = model.score(PROMPTS[1], ["cat"], calibrate=1.0)
    seen, blind = (model.score(prompt, ["cat"])[0] for prompt in (PROMPTS[1], ["So: ", "b", "c d e"]))
    assert alone == pytest.approx(seen - blind, abs=1e-4)


def test_a_conversation_goes_on_and_forgets_a_picture_that_is_taken_back(model):
    options = {"max_new_tokens": 6}
    chat = model.chat()
    chat.send("What is to be seen in this picture, if anything?", images=[A], **options)
    first = chat.messages
    chat.send("And here?", images=[B], **options)
    reply = chat.send("Sure?", **options)
    assert model.chat(messages=chat.messages[:4]).send("Sure?", **options) == reply
    chat.messages = first  # the states still hold the second picture, masked
    assert chat.send("No?", **options) == model.chat(messages=first).send("No?", **options)
    assert (
        "".join(model.chat(messages=first).stream("No?", **options)).strip() == chat.messages[-1]["content"][0]["text"]
    )


def test_a_position_looks_at_the_last_image_before_it(tiny_parts):
    model = assembled(*tiny_parts, every=2)
    assert len(model.adapters[0].blocks) == 1
    seen: list[Tensor] = []
    model.lm.model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    prompt: list[Any] = ["So: ", A, "b c", B, "d e"]
    for images in ((A, B), (C, B), (A, C)):
        logits(model, [["So: ", images[0], "b c", images[1], "d e"]])
    changed = [(other - seen[0])[0].abs().amax(-1) > 1e-4 for other in seen[1:]]
    places = [place for place, visual in enumerate(model.encode(prompt).visual) if visual]
    assert changed[0].tolist() == [places[0] <= place < places[1] for place in range(len(changed[0]))]
    assert changed[1].tolist() == [place >= places[1] for place in range(len(changed[1]))]


def plain(block: Any, x: Tensor, visual: Tensor) -> Tensor:
    """Flamingo's block for one position ``(D,)`` and the image ``(Q, D_lm)`` that it looks at, from the paper."""

    def norm(layer: Any, y: Tensor) -> Tensor:
        return layer_norm(y, y.shape[-1:], layer.weight, layer.bias)

    query = block.query.weight @ norm(block.norm, x)
    keys, values = (norm(block.visual_norm, visual) @ block.key_value.weight.T).chunk(2, dim=-1)
    heads = []
    for q, k, v in zip(
        query.chunk(block.heads), keys.chunk(block.heads, -1), values.chunk(block.heads, -1), strict=True
    ):
        heads.append(torch.softmax(k @ q / math.sqrt(len(q)), 0) @ v)
    x = x + math.tanh(block.attention_gate) * (block.out.weight @ torch.cat(heads))
    first, second = block.feed_forward[1].weight, block.feed_forward[3].weight
    return x + math.tanh(block.feed_forward_gate) * (second @ gelu(first @ norm(block.feed_forward[0], x)))


@torch.no_grad()
def test_a_block_is_its_formula(tiny_parts):
    model = assembled(*tiny_parts, every=2)
    given: list[Tensor] = []
    model.lm.model.model.layers[0].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    embeds, batch = model.prepare(PROMPTS)
    model.lm.logits(embeds, batch.mask)
    visual = iter(model.connector(model.features([image for prompt in PROMPTS for image in images_of(prompt)])))
    for row in range(len(PROMPTS)):
        last = None
        for place in range(batch.mask.shape[1]):
            last = next(visual) if batch.visual[row, place] else last
            x = embeds.embeds[row, place]
            expected = x if last is None else plain(model.adapters[0].blocks[0], x, last)
            torch.testing.assert_close(given[0][row, place], expected, atol=1e-5, rtol=1e-5)


def test_where_it_says_so_an_image_is_shown(tiny_parts, tmp_path):
    parts: dict[str, Any] = {"heads": [{"type": "retrieval", "dim": 6}], "tokens": ["[RET]"]}
    model = mllm.assemble(tiny_parts[0], tiny_parts[1], LINEAR, adapters=[GATED], **parts)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    for number in range(5):
        tiny_image(number).save(tmp_path / f"{number}.png")
    index = ImageIndex.build(model, [tmp_path / f"{number}.png" for number in range(5)])
    for prompt, answer in zip(
        PROMPTS, model.generate(PROMPTS, index=index, image_logit_bias=1e4, max_new_tokens=3), strict=True
    ):
        ((same,),) = model.retrieve([prompt], index, 1)  # the first thing it says is the token
        assert (answer.images[0].source, answer.images[0].score) == (same.source, pytest.approx(same.score, abs=1e-4))


def test_packed_examples_do_not_look_at_each_others_images(model):
    rows = [[*PROMPTS[1], Target(" yes")], ["text alone", Target(" no")], [A, B, Target(" so")], ["x", C, Target(" y")]]
    assert model.lm.can_pack()
    with torch.no_grad():
        torch.testing.assert_close(losses(model, rows, pack=100), losses(model, rows), atol=1e-4, rtol=1e-5)


def test_saved_and_loaded_it_gives_equal_logits(model, tmp_path):
    again = mllm.load(model.save(tmp_path / "saved"))
    assert torch.equal(logits(model), logits(again))
    assert not any(name.startswith("lm.") for name in model.trained_state())


@pytest.fixture
def recipe(tmp_path: Path, tiny_parts: tuple[str, str]) -> str:
    rows = []
    for index, name in enumerate(["red", "blue"] * 8):
        picture = tiny_image(index)
        picture.paste({"red": (220, 30, 30), "blue": (40, 60, 220)}[name], (0, 0, 40, 28))
        picture.save(tmp_path / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": name})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "recipe.yaml").write_text(f"""
name: gated
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
adapters: [{{type: gated, every: 1, heads: 2, head_dim: 8}}]
data: {{train: {{format: table, path: {tmp_path}/train.json}}}}
optim: {{schedule: constant, warmup: 0}}
stages:
  - {{name: align, train: {{connector: 0.01, adapters: 0.01}}, steps: 60, batch_size: 8}}
""")
    return str(tmp_path / "recipe.yaml")


def test_it_learns_to_look_and_what_is_frozen_stays(recipe, tmp_path):
    run = mllm.train(recipe, out=tmp_path / "run")
    rows = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    frozen = json.loads((run.path / "frozen.json").read_text())["align"]
    assert frozen["before"] == frozen["after"] and set(frozen["before"]) == {"encoder", "lm"}
    model = mllm.load(run.path)
    gates = [p for name, p in model.adapters.named_parameters() if name.endswith("gate")]
    assert len(gates) == 4 and all(gate.item() != 0 for gate in gates)
    scores = torch.tensor([model.score([tmp_path / f"{n}.png", "A picture of"], ["red", "blue"]) for n in range(8)])
    margins = scores[:, 0] - scores[:, 1]
    assert margins[::2].min() > margins[1::2].max(), margins
    again = mllm.train(recipe, ["optim.checkpointing=true", "stages.0.steps=3"], out=tmp_path / "again")
    rows = [json.loads(line) for line in (again.path / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses[:3], rel=1e-5)


def test_a_plan_counts_it(recipe, tiny_parts):
    (planned,) = plan(recipe).stages
    model: Any = mllm.assemble(tiny_parts[0], tiny_parts[1], LINEAR, adapters=[GATED])
    sizes = {part.name: (part.parameters, part.trained) for part in planned.parts}
    inside = sum(parameter.numel() for parameter in model.adapters.parameters())
    block = 2 * 32 + 2 * 32 + 4 * 32 * 16 + 2 * 32 + 2 * 4 * 32 * 32 + 2  # norms, attention, feed-forward, gates
    assert sizes["adapters"] == (inside, inside) == (2 * block + 32, 2 * block + 32)
    assert planned.tokens_per_image == 1
    (without,) = plan(recipe, ["adapters=[]", "stages.0.train=[connector]", "connector.tokens=1"]).stages
    assert planned.flops.lm > without.flops.lm


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ("[{type: gated}, {type: gated, every: 2}]", "adapters: gated and gated both attend to the visual tokens"),
        ("[{type: gated}, {type: prompt}]", "adapters: prompt puts positions before the sequence"),
        ("[{type: gated, every: 0}]", "adapter gated has every=0; expected a number of at least 1"),
    ],
)
def test_what_does_not_go_together_is_said(recipe, adapters, message):
    assert [problem for problem in problems(recipe, [f"adapters={adapters}"]) if message in problem]
    with pytest.raises(MLLMError, match=message):
        mllm.train(recipe, [f"adapters={adapters}"])


def test_no_stock_class_has_it(model, tmp_path):
    with pytest.raises(MLLMError, match="The adapter 'gated' cannot be merged"):
        export(model, tmp_path / "out", to="hf-llava")
