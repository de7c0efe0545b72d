"""Texts in images' places: their features are those of the bare models of transformers, and are computed once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, BertModel

import mllm
from mllm.build import build_encoder
from mllm.config.messages import checked
from mllm.config.parts import AssemblySpec
from mllm.data.items import Item
from mllm.encoders.feature_store import open_store
from mllm.errors import MLLMError
from mllm.fits.base import Material
from mllm.media.images import source_of
from mllm.media.texts import TextSource
from mllm.registry import lookup
from mllm.scorers.aligned import AlignedScorer
from mllm.testing import tiny_image

TEXTS = ["a red apple", "two dogs", "a dog on a mat"]
SHOWN = [TextSource(text) for text in TEXTS]


@pytest.fixture(scope="module")
def clip(tiny_clip, tiny_parts):
    return mllm.assemble({"type": "dual-encoder", "model": tiny_clip}, tiny_parts[1], {"type": "linear", "tokens": 2})


@pytest.fixture(scope="module")
def sentence_run(tiny_parts, tiny_bert, tmp_path_factory):
    """The folder of a saved model whose connector maps images into the space of sentences."""
    model = mllm.assemble(tiny_parts[0], {"type": "sentences", "model": tiny_bert}, {"type": "linear", "tokens": 1})
    return str(model.save(tmp_path_factory.mktemp("sentence-run")))


def encoder_of(**spec):
    return build_encoder(checked(AssemblySpec, {"encoder": spec}))


@torch.no_grad()
def clip_texts(folder: str) -> torch.Tensor:
    """What transformers alone makes of the texts."""
    bare, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding="max_length", max_length=64, return_tensors="pt")
    output = bare.get_text_features(**tokens)
    return normalize(output if isinstance(output, torch.Tensor) else output.pooler_output, dim=-1)


@torch.no_grad()
def bert_states(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers alone makes of the texts: hidden states and the attention mask."""
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    return BertModel.from_pretrained(folder).eval()(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)


def test_a_dual_encoder_gives_texts_the_features_of_its_text_tower(clip, tiny_clip):
    torch.testing.assert_close(clip.features(SHOWN)[:, 0], clip_texts(tiny_clip))
    images = [tiny_image(1), tiny_image(2)]
    mixed = [images[0], SHOWN[1], images[1], SHOWN[0]]
    expected = torch.stack([clip.features([each])[0] for each in mixed])
    torch.testing.assert_close(clip.features(mixed), expected)
    torch.testing.assert_close(open_store(clip, "off")(mixed), expected)


def test_an_answer_for_a_text_is_that_for_its_features(clip):
    with torch.no_grad():
        visual = clip.connector(clip.features(SHOWN[:1]))[0]
    torch.testing.assert_close(clip.see_images(SHOWN[:1])[0], visual)
    assert str(clip.generate([[SHOWN[0], "A"]])[0]) == str(clip.generate([[SHOWN[0], "A"], [SHOWN[1], "A"]])[0])


def test_texts_are_encoded_once_and_kept_with_the_images(clip, monkeypatch):
    store = open_store(clip, "auto")
    first = store([*SHOWN, tiny_image(1), *SHOWN])
    store.flush()
    assert torch.equal(first[:3], first[4:])
    monkeypatch.setattr(clip.encoder, "encode_texts", None)  # nothing may be computed from here on
    assert torch.equal(open_store(clip, "auto")(SHOWN[::-1]), first[:3].flip(0))


def test_a_run_with_a_sentence_encoder_has_the_vectors_of_its_scorer(sentence_run, tiny_bert):
    encoder = encoder_of(type="run", model=sentence_run)
    states, mask = bert_states(tiny_bert)
    sentences = normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    torch.testing.assert_close(encoder.encode_texts(TEXTS)[:, 0], sentences)
    images = [tiny_image(seed) for seed in range(3)]
    vectors = encoder(encoder.preprocess([encoder.open(image) for image in images]))
    torch.testing.assert_close(vectors[:, 0], AlignedScorer(model=mllm.load(sentence_run)).embed_images(images))
    assert (encoder.num_patches, encoder.dim, encoder.grid) == (1, 16, None)


def test_any_other_run_has_its_visual_tokens(clip, tiny_clip, tmp_path):
    encoder = encoder_of(type="run", model=str(clip.save(tmp_path / "run")))
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_texts(TEXTS), clip.connector(clip_texts(tiny_clip)[:, None]))
    torch.testing.assert_close(encoder(encoder.preprocess([tiny_image()])), clip.see_images([tiny_image()]))
    assert (encoder.num_patches, encoder.dim) == (2, clip.lm.dim)
    assert encoder.fingerprint == mllm.load(tmp_path / "run").fingerprint


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_a_text_tower_gives_the_states_of_the_bare_model(tiny_bert, pool):
    encoder = encoder_of(type="text", model=tiny_bert, pool=pool)
    states, mask = bert_states(tiny_bert)
    expected = states[:, 0] if pool == "first" else (states * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(encoder.encode_texts(TEXTS)[:, 0], expected)
    with pytest.raises(MLLMError, match="encodes texts alone"):
        encoder.open(tiny_image())


def test_a_text_tower_masks_words_while_it_trains(tiny_bert):
    encoder, tokenizer = encoder_of(type="text", model=tiny_bert, mask=0.25), AutoTokenizer.from_pretrained(tiny_bert)
    ids = encoder.preprocess([TextSource("x" * 60)] * 200)
    with torch.no_grad():
        assert torch.equal(encoder(ids[:2]), encoder(ids[:2]))
    encoder.train()
    read = []
    encoder.model.register_forward_pre_hook(
        lambda _, args, options: read.append(options["input_ids"]), with_kwargs=True
    )
    encoder(ids)
    encoder(ids)
    masked = read[0] == tokenizer.mask_token_id
    letters = ids == tokenizer.convert_tokens_to_ids("x")
    assert float(masked[letters].float().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(read[0][~masked], ids[~masked]) and not masked[~letters].any()
    assert not torch.equal(read[0], read[1]), "drawn anew each time"


def test_imagined_features_are_a_ridge_from_texts_to_images(tiny_parts, tiny_bert):
    of = [{"model": tiny_parts[0], "select": "pooled"}, {"type": "text", "model": tiny_bert}]
    model = mllm.assemble({"type": "imagined", "of": of}, tiny_parts[1], "linear")
    items = [Item(str(n), (source_of(tiny_image(n)),), (f"{n * n} dogs",)) for n in range(12)]
    fit = lookup("fits", "imagined")(part="encoder.project", strength=0.05)
    fit(model, Material(items, features=open_store(model, "off").whole))
    x = encoder_of(**of[1]).encode_texts([item.answers[0] for item in items])[:, 0].double().detach().numpy()
    y = model.features([item.images[0] for item in items])[:, 0].double().numpy()
    centered, penalty = x - x.mean(0), 0.05 * np.mean(np.var(x, axis=0)) * len(x)
    weights = np.linalg.solve(centered.T @ centered + penalty * np.eye(x.shape[1]), centered.T @ (y - y.mean(0)))
    imagined = model.features([TextSource("a cat")])[:, 0].numpy()
    cat = encoder_of(**of[1]).encode_texts(["a cat"])[:, 0].double().detach().numpy()
    np.testing.assert_allclose(imagined, (cat - x.mean(0)) @ weights + y.mean(0), rtol=1e-3, atol=1e-4)


def test_an_encoder_of_images_refuses_a_text(tiny_model):
    with pytest.raises(MLLMError, match="'a red apple' stands in an image's place"):
        tiny_model().generate([[SHOWN[0], "A picture of"]])


@pytest.mark.parametrize("of", [["image"], ["image", "image"], ["text", "text", "text"]])
def test_imagined_takes_an_image_encoder_and_one_of_texts(tiny_parts, tiny_bert, of):
    kinds = {"image": {"model": tiny_parts[0]}, "text": {"type": "text", "model": tiny_bert}}
    with pytest.raises(MLLMError, match=r"encoder\.of has to name two encoders"):
        encoder_of(type="imagined", of=[kinds[kind] for kind in of])
