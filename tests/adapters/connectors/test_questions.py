"""A Q-Former that reads each image's question: InstructBLIP's class with the same weights, and who is asked what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    ViTImageProcessorPil,
)

import mllm
from mllm.config.prompt import PromptSpec
from mllm.data.items import Item, pieces_of
from mllm.encoders.vision import VisionModel
from mllm.errors import MLLMError
from mllm.export.export import export
from mllm.export.stock import whole_tower
from mllm.media.images import source_of
from mllm.objectives.caption import Caption
from mllm.prompts.batch import collate
from mllm.prompts.messages import checked_messages, rendered, turns
from mllm.prompts.pieces import Given, Target
from mllm.prompts.questions import questions_of
from mllm.registry import lookup
from mllm.slots import Inputs
from mllm.testing import tiny_image
from mllm.testing.lms import spread, tiny_tokenizer

SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION: dict[str, Any] = {**SHAPE, "hidden_size": 24, "image_size": 32, "patch_size": 8}
A, B = tiny_image(1), tiny_image(2)
RED, COUNT = " is it red?", " how many dots are there?"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer with special tokens before and after every text, as BERT's."""
    folder = tmp_path_factory.mktemp("words")
    tiny_tokenizer(start=True, end=True).save_pretrained(folder)
    return str(folder)


def connector(words: str | None, **options: Any) -> dict[str, Any]:
    sizes = {"tokens": 4, "dim": 16, "layers": 2, "heads": 2}
    return {"type": "qformer", **sizes, "norm": False, "words": words, "questions": True, **options}


@pytest.fixture(scope="module")
def model(words: str, tiny_parts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """BLIP-2's vision model, a Q-Former that reads questions, and a Llama."""
    folder = tmp_path_factory.mktemp("blip2")
    text = AutoConfig.from_pretrained(tiny_parts[1], trust_remote_code=False)
    tower = Blip2ForConditionalGeneration(Blip2Config(vision_config=VISION, qformer_config=SHAPE, text_config=text))
    spread(tower, 0.2)
    tower.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    model = mllm.assemble({"model": str(folder), "select": "all"}, tiny_parts[1], connector(words))
    spread(model.connector, 0.3)
    torch.nn.init.normal_(model.connector.queries)
    return model


@pytest.fixture(scope="module")
def stock(model: Any) -> Any:
    """InstructBLIP's class with the model's weights."""
    start, pad = model.connector.words.start, model.connector.words.tokenizer.pad_token_id
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config={**SHAPE, "encoder_hidden_size": 24, "vocab_size": start + 1, "pad_token_id": pad},
        text_config=model.lm.model.config,
        num_query_tokens=4,
        image_token_index=model.lm.tokenizer.pad_token_id,
    )
    stock = InstructBlipForConditionalGeneration(config).eval()
    stock.vision_model.load_state_dict(whole_tower(model).state_dict())
    table = model.connector.words.table.state_dict()
    norm = {f"embeddings.layernorm.{n}": t for n, t in model.connector.qformer.layernorm.state_dict().items()}
    blocks = {n: t for n, t in model.connector.qformer.state_dict().items() if not n.startswith("layernorm")}
    stock.qformer.load_state_dict({**blocks, **norm, **{f"embeddings.{n}": t for n, t in table.items()}})
    stock.query_tokens.data.copy_(model.connector.queries)
    stock.language_projection.load_state_dict(model.connector.project.state_dict())
    stock.language_model.load_state_dict(model.lm.model.state_dict())
    return stock


@torch.no_grad()
@pytest.mark.parametrize("text", [RED, COUNT])
def test_visual_tokens_and_logits_are_instructblips(model: Any, stock: Any, words: str, text: str) -> None:
    bare = tiny_tokenizer(start=True, end=True)(text.strip(), return_tensors="pt")
    pixels = model.encoder.preprocess([A])
    embeds, batch = model.prepare([[A, text]])
    theirs = stock.get_image_features(pixels, bare["input_ids"], bare["attention_mask"]).pooler_output
    torch.testing.assert_close(embeds[batch.visual], theirs[0], atol=1e-5, rtol=1e-5)
    ids = batch.ids.masked_fill(batch.visual, stock.config.image_token_index)
    logits = stock(pixels, bare["input_ids"], bare["attention_mask"], input_ids=ids, attention_mask=batch.mask).logits
    torch.testing.assert_close(model.lm.logits(embeds, batch.mask), logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_of_a_batch_are_those_alone(model: Any) -> None:
    prompts = [[A, RED], [B, "!", A, COUNT], ["no image"], [A]]
    together, batch = model.prepare(prompts)
    for row, prompt in enumerate(prompts):
        alone, _ = model.prepare([prompt])
        torch.testing.assert_close(together[row][batch.mask[row].bool()], alone[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0][batch.visual[0]], together[3][batch.visual[3]], atol=1e-2)


def test_a_long_question_keeps_its_end(model: Any) -> None:
    text, bare = "a" * 20 + "bcdefgh", tiny_tokenizer(start=True, end=True)
    ids, mask = model.connector.words.tokenize_ends([text, "a"], longest=9)
    first, last = bare("")["input_ids"]
    assert ids[0].tolist() == [first, *bare("bcdefgh", add_special_tokens=False)["input_ids"], last]
    assert (ids[1][:3].tolist(), mask.sum(1).tolist()) == (bare("a")["input_ids"], [9, 3])


def test_questions_need_a_tokenizer_and_attention_to_it(words: str) -> None:
    sizes = {"vis_dim": 8, "lm_dim": 12, "num_patches": 17, "grid": None}
    for options in ({"words": None}, {"words": words, "causal": True}):
        named = {key: value for key, value in connector(**options).items() if key != "type"}
        with pytest.raises(MLLMError, match=r"connector\.questions needs a tokenizer"):
            lookup("connectors", "qformer")(**sizes, **named)


def test_every_tile_of_an_image_is_read_with_its_question(words: str, tiny_parts: tuple[str, str]) -> None:
    cut = {"model": tiny_parts[0], "select": "patches", "tiles": {"kind": "dynamic", "least": 1, "most": 2}}
    model = mllm.assemble(cut, tiny_parts[1], connector(words))
    spread(model.connector, 0.3)
    wide, alone = tiny_image(3, (80, 40)), []
    for prompt in ([wide, RED], [A, COUNT]):
        embeds, batch = model.prepare([prompt])
        alone.append(embeds[batch.visual])
    together, batch = model.prepare([[wide, RED, Given(" no."), A, COUNT]])
    assert len(alone[0]) > len(alone[1])
    torch.testing.assert_close(together[batch.visual], torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_connector_in_front_hands_the_question_on(words: str, tiny_parts: tuple[str, str]) -> None:
    plain = {key: value for key, value in connector(words).items() if key != "type"}
    noisy = {"type": "noisy", "std": 0.1, "then": {"type": "qformer", **plain}}
    model = mllm.assemble({"model": tiny_parts[0], "select": "all"}, tiny_parts[1], noisy)
    spread(model.connector, 0.3)
    (red, count), batch = model.prepare([[A, RED], [A, COUNT]])
    assert not torch.allclose(red[batch.visual[0]], count[batch.visual[1]], atol=1e-2)


def test_blip2s_class_reads_no_questions(model: Any, tmp_path: Path) -> None:
    with pytest.raises(MLLMError, match=r"connector\.questions"):
        export(model, tmp_path / "out", to="hf-blip2")


def test_a_view_encodes_its_images_once_and_connects_them_to_each_question(model: Any) -> None:
    encoded = []
    with model.encoder.register_forward_hook(lambda *_: encoded.append(1)):
        views = model.see_each([[A], [B, A]])
        answers = views.continue_with([[RED, COUNT], [COUNT]], max_new_tokens=6)
        longer = views[0].see([" a dot.", B]).continue_with(RED, max_new_tokens=6)
        assert len(encoded) == 3  # the images of each view, once
    whole = [[A, RED], [A, COUNT], [B, A, COUNT], [A, " a dot.", B, RED]]
    expected = [str(model.generate([prompt], max_new_tokens=6)[0]) for prompt in whole]
    assert [*answers[0], *answers[1], longer] == expected


@torch.no_grad()
@pytest.mark.parametrize("text", [RED, COUNT])
def test_a_view_scores_as_training_does(model: Any, text: str) -> None:
    embeds, batch = model.prepare([[A, text, Target(" yes")]])
    loss = model.lm.losses(embeds, batch.mask, batch.labels).sum()
    assert model.see([A, text]).score([" yes"]) == pytest.approx([-float(loss)], abs=1e-3)


def test_a_conversation_keeps_each_images_question(model: Any) -> None:
    chat, messages = model.chat(), []
    for text, images in [("red?", [A]), ("and these", [B, A]), ("why?", [])]:
        content = [*({"type": "image", "image": source_of(image)} for image in images), {"type": "text", "text": text}]
        messages.append({"role": "user", "content": content})
        expected = str(model.generate([turns(model, messages)], max_new_tokens=6)[0])
        assert chat.send(text, images, max_new_tokens=6) == expected
        messages.append({"role": "assistant", "content": [{"type": "text", "text": expected}]})
    content = chat.messages[0]["content"]
    chat.messages[0] = {"role": "user", "content": [content[0], {"type": "text", "text": "blue?"}]}
    fresh = model.chat(messages=chat.messages)
    assert chat.send("why?", max_new_tokens=6) == fresh.send("why?", max_new_tokens=6)


def test_only_the_question_is_learned_from_not_the_answer(model: Any) -> None:
    rows = [[A, RED, Target(" yz")]]
    model.connector.requires_grad_(True)
    try:
        features = model.image_features([A]).clone()
        batch = collate([model.encode(rows[0])], model.lm.pad)
        Caption()(Inputs(model, rows, features, batch)).backward()
        grads = model.connector.words.table.word_embeddings.weight.grad.abs().sum(1)
        tokenizer = tiny_tokenizer(start=True, end=True)
        assert set(grads.nonzero()[:, 0].tolist()) == set(tokenizer(RED.strip())["input_ids"])
    finally:
        model.connector.requires_grad_(False).zero_grad()


def test_training_caches_features_and_a_loaded_model_is_the_saved_one(
    words: str, tiny_parts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    A.save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": text, "answer": answer} for text, answer in [("red?", "no"), ("dots?", "2")]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    content: dict[str, Any] = {
        "name": "questions",
        "encoder": {"model": tiny_parts[0], "select": "all"},
        "lm": {"model": tiny_parts[1]},
        "connector": connector(words),
        "data": {"train": {"format": "table", "path": str(tmp_path / "rows.json")}},
        "cache": "on",
        "stages": [{"name": "align", "train": {"connector": 1.0e-3}, "steps": 2, "batch_size": 2}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    encoded: list[int] = []
    forward = VisionModel.forward

    def counted(encoder: VisionModel, pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return forward(encoder, pixels)

    monkeypatch.setattr(VisionModel, "forward", counted)
    run = mllm.train(str(tmp_path / "recipe.yaml"), out=tmp_path / "run")
    assert encoded == [1]  # one image, which two steps ask two questions about
    trained, start = mllm.load(run.path), mllm.assemble(content["encoder"], content["lm"], connector(words))
    trained.save(tmp_path / "saved")
    with torch.no_grad():
        embeds = [m.prepare([[A, RED]])[0] for m in (trained, mllm.load(tmp_path / "saved"), start)]
    assert torch.equal(embeds[0], embeds[1])
    assert not torch.equal(embeds[0], embeds[2])


SHOT = Item("0", (source_of(A),), ("dax",), "what is this?")
LAST = Item("1", (source_of(B),), ("blicket",), "and this?", shots=(SHOT,), induction="Answer with dax or blicket.")
PROMPT = PromptSpec(system="Be short.", template="See{images}. {prompt}", question="Q: {question} A:")


def test_a_question_is_all_text_of_its_turn_and_no_answer() -> None:
    pieces = pieces_of(LAST, PROMPT, "blicket")
    assert questions_of(pieces) == ["See. Q: what is this? A:", "See. Q: and this? A:"]
    assert questions_of(["Is ", A, " like ", B, "?"]) == ["Is  like ?"] * 2
    assert questions_of([A]) == [""]
    assert questions_of([Given("before "), "asked ", A, Target(" yes"), "unasked"]) == ["asked"]
    page = Item("2", (), (), document=("a", source_of(A), "b"))
    assert questions_of(pieces_of(page, PROMPT)) == [""]


@pytest.mark.parametrize("chat", ["plain", "own"])
def test_questions_of_conversations(tiny_parts: tuple[str, str], chat: Any) -> None:
    lm = mllm.assemble(*tiny_parts).lm
    lm.tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    messages = checked_messages(
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "red?"}]},
            {"role": "assistant", "content": "no"},
            {"role": "user", "content": [{"type": "text", "text": "and this?"}, {"type": "image", "image": B}]},
            {"role": "assistant", "content": "yes"},
        ]
    )
    prompt = PromptSpec(chat=chat, template="{images} {prompt}", question="{question}")
    for count, learn in ((4, False), (5, True)):
        asked = questions_of(rendered(messages[:count], prompt, lm, learn=learn))
        assert asked == ["red?", "and this?"]
