"""The Q-Former's text side: BLIP-2's contrast and matching with the same weights, and who sees whom in each mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, Blip2Config, Blip2ForImageTextRetrieval

from mllm.errors import MLLMError
from mllm.registry import lookup
from mllm.testing.lms import spread, tiny_tokenizer

SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
VISION: dict[str, Any] = {**SHAPE, "hidden_size": 8, "image_size": 32, "patch_size": 8}
TEXTS = ["a red house", "two"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def made(words: str | None, **options: Any) -> Any:
    sizes = {"vis_dim": 8, "lm_dim": 12, "num_patches": 17, "grid": None, "tokens": 5}
    return lookup("connectors", "qformer")(**sizes, dim=16, layers=3, heads=2, words=words, **options).eval()


@pytest.fixture
def pair(words) -> Any:
    """Our connector, and BLIP-2's class for retrieval with the same weights."""
    connector = made(words, norm=False)
    qformer = {**SHAPE, "vocab_size": connector.words.start + 1, "use_qformer_text_input": True, "pad_token_id": 257}
    config = Blip2Config(vision_config=VISION, qformer_config=qformer, num_query_tokens=5, image_text_hidden_size=6)
    reference = Blip2ForImageTextRetrieval(config).eval()
    spread(reference, 0.3)
    torch.nn.init.normal_(reference.query_tokens)
    connector.qformer.load_state_dict(reference.qformer.state_dict())
    connector.words.table.load_state_dict(reference.embeddings.state_dict())
    connector.queries.data.copy_(reference.query_tokens.data)
    pixels = torch.randn(2, 3, 32, 32)
    return connector, reference, pixels, reference.vision_model(pixels).last_hidden_state


@torch.no_grad()
def test_contrast_and_matching_are_blip2s(pair):
    connector, reference, pixels, features = pair
    ids, mask = connector.words.tokenize(TEXTS)
    assert mask.sum(1).tolist() == [11, 3]
    queries, text = connector.joint(features, ids, mask, "contrastive")
    theirs = reference(pixels, ids, mask, use_image_text_matching_head=False)
    vision = torch.nn.functional.normalize(reference.vision_projection(queries), dim=-1)
    first = torch.nn.functional.normalize(reference.text_projection(text[:, 0]), dim=-1)
    torch.testing.assert_close(vision, theirs.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first, theirs.text_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((vision @ first.T).amax(1), theirs.logits_per_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(queries, connector.body(features))  # text is not seen
    alone = connector.read(ids, mask)  # no picture is
    torch.testing.assert_close(alone[mask.bool()], text[mask.bool()], atol=1e-5, rtol=1e-5)
    queries, _ = connector.joint(features, ids, mask, "matching")
    theirs = reference(pixels, ids, mask, use_image_text_matching_head=True)
    torch.testing.assert_close(reference.itm_head(queries).mean(1), theirs.logits_per_image, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["contrastive", "matching", "generation"])
def test_who_sees_whom(pair, mode):
    connector, _, _, features = pair
    ids, mask = connector.words.tokenize(TEXTS[:1])

    def states(features: Any, ids: Any) -> Any:
        return torch.cat(connector.joint(features, ids, mask, mode), dim=1)[0]

    plain = states(features[:1], ids)
    other = ids.clone()
    other[0, 4] = 7  # the fifth word
    by_word = (states(features[:1], other) - plain).abs().amax(1) > 1e-5
    by_picture = (states(features[1:], ids) - plain).abs().amax(1) > 1e-5
    queries, text = by_word[:5], by_word[5:]
    assert queries.any() == (mode == "matching")
    assert text[4:].all()
    assert text[:4].any() == (mode != "generation")
    assert by_picture[:5].all()
    assert by_picture[5:].any() == (mode != "contrastive")


@torch.no_grad()
def test_padding_is_not_seen(pair):
    connector, _, _, features = pair
    ids, mask = connector.words.tokenize(TEXTS)
    alone = connector.words.tokenize(TEXTS[1:])
    for mode in ("contrastive", "matching", "generation"):
        queries, text = connector.joint(features, ids, mask, mode)
        one, short = connector.joint(features[1:], *alone, mode)
        torch.testing.assert_close(queries[1:], one)
        torch.testing.assert_close(text[1:, :3], short)


def test_without_words_it_offers_no_joint():
    assert not hasattr(made(None), "joint")


def test_words_are_guessed_by_the_table_itself(words):
    connector = made(words)
    assert connector.words.logits(connector.words.table.word_embeddings.weight[None, :4]).shape == (1, 4, 259)


def test_words_start_as_a_berts(words, tmp_path):
    def bert(name: str, size: int) -> str:
        BertModel(BertConfig(**SHAPE, vocab_size=size)).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    connector = made(words, init=bert("bert", 258))
    state = BertModel.from_pretrained(tmp_path / "bert").state_dict()
    table = connector.words.table
    assert torch.equal(table.word_embeddings.weight[:258], state["embeddings.word_embeddings.weight"])
    assert torch.equal(table.position_embeddings.weight, state["embeddings.position_embeddings.weight"])
    own = connector.qformer.state_dict()["encoder.layer.1.intermediate.dense.weight"]
    assert torch.equal(own, state["encoder.layer.1.intermediate.dense.weight"])
    with pytest.raises(MLLMError, match=r"connector\.words has a vocabulary of 258 tokens, and the BERT"):
        made(words, init=bert("other", 300))


@pytest.mark.parametrize("name", ["mapper", "resampler", "qformer", "token-merge"])
def test_without_a_language_model_there_is_no_map_to_it(name):
    options = {"qformer": {"dim": 16, "heads": 2, "layers": 1}, "token-merge": {"merge": 1, "layers": 2}}.get(name, {})
    options |= {"resampler": {"heads": 2}}.get(name, {})
    connector = lookup("connectors", name)(vis_dim=8, lm_dim=None, num_patches=17, grid=None, **options)
    features = torch.randn(1, 17, 8)
    assert torch.equal(connector.eval()(features), connector.body(features))
    assert not list(connector.project.parameters())


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_a_bare_map_needs_a_language_model(name):
    with pytest.raises(MLLMError, match="needs a language model's width"):
        lookup("connectors", name)(vis_dim=8, lm_dim=None, num_patches=17, grid=None)
