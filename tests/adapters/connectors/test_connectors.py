"""What every connector owes the core, each one by its registry name, and parity with the published classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

import mllm
from mllm.capabilities import RemembersTexts
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.fits.base import Material
from mllm.fits.connector import ConnectorFit
from mllm.media.images import source_of
from mllm.prompts.batch import collate
from mllm.registry import lookup, table
from mllm.testing import tiny_image
from mllm.training.calibration import calibrate

# Small sizes; a connector that is not named here is built with its own defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "mapper": {"tokens": 5, "dim": 16, "layers": 2, "heads": 2, "ffn": 32},
    "resampler": {"tokens": 4, "depth": 2, "heads": 2},
    "qformer": {"tokens": 6, "dim": 16, "layers": 2, "heads": 2},
    "temporal": {"frames": 1, "dim": 16, "heads": 2},
    "token-merge": {"merge": 3, "layers": 2, "dim": 16, "heads": 2},
}
NAMES = sorted(table("connectors"))
PICTURES = [tiny_image(seed) for seed in range(4)]


def made(name: str, **options: Any) -> Any:
    sizes = {"vis_dim": 8, "lm_dim": 12, "num_patches": 16, "grid": (4, 4)}
    return lookup("connectors", name)(**{**sizes, **OPTIONS.get(name, {}), **options})


@pytest.fixture(params=NAMES)
def model(request, tiny_parts):
    return mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": request.param, **OPTIONS.get(request.param, {})})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("patches", [{}, {"num_patches": 17, "grid": None}])
def test_features_become_the_tokens_it_promises(name, patches):
    connector = made(name, **patches)
    features = torch.randn(3, patches.get("num_patches", 16), 8)
    assert connector(features).shape == (3, connector.num_tokens, 12)


@pytest.mark.parametrize("name", NAMES)
def test_each_picture_is_mapped_on_its_own_and_makes_a_difference(name):
    connector = made(name).eval()
    features = torch.randn(3, 16, 8)
    whole = connector(features)
    alone = torch.cat([connector(row[None]) for row in features])
    torch.testing.assert_close(whole, alone)
    assert (whole[0] - whole[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_tokens_differ_from_one_another(name):
    tokens = made(name).eval()(torch.randn(1, 16, 8))[0]
    assert torch.pdist(tokens).min() > 1e-5, "tokens that start equal stay equal"


def test_it_is_built_alike_from_one_seed(tiny_parts, model):
    again = mllm.assemble(tiny_parts[0], tiny_parts[1], model.spec.connector.model_dump())
    for name, tensor in model.connector.state_dict().items():
        assert torch.equal(tensor, again.connector.state_dict()[name]), name


def test_calibrated_it_starts_at_the_scale_of_the_embeddings(model):
    features = model.features(PICTURES)
    calibrate(model, features)
    with torch.no_grad():
        spread = model.connector(features).std().item()
    assert spread == pytest.approx(model.lm.embedding_scale(), rel=0.2)


def test_only_the_connector_gets_a_gradient(model):
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    embeds, batch = model.embed(model.connector(model.features(PICTURES[:1])), _batch(model)), _batch(model)
    model.lm.logits(embeds, batch.mask).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("connector."), name
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.connector.parameters())


def _batch(model: Any) -> Any:
    return collate([model.encode([PICTURES[0], "a word"])], model.lm.pad)


def test_batch_equals_single_and_saved_equals_loaded(model, tmp_path):
    prompts = [["A", PICTURES[0]], [PICTURES[1], "b", PICTURES[2]], ["no picture"]]
    together = [str(output) for output in model.generate(prompts, max_new_tokens=6)]
    assert together == [str(model.generate([prompt], max_new_tokens=6)[0]) for prompt in prompts]
    again = mllm.load(model.save(tmp_path / "saved"))
    first, second = (m.lm.logits(*_inputs(m, prompts)) for m in (model, again))
    assert torch.equal(first, second)


def _inputs(model: Any, prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    embeds, batch = model.prepare(prompts)
    return embeds, batch.mask


def test_its_last_map_can_be_fitted(model):
    items = [
        Item(str(i), (source_of(picture),), ("red" if i % 2 else "a blue one",)) for i, picture in enumerate(PICTURES)
    ]
    targets = "texts" if isinstance(model.connector, RemembersTexts) else "caption-words"
    explained = ConnectorFit(solver="least-squares", targets=targets)(model, Material(items, model.features))
    assert 0 < explained <= 1 + 1e-9


def copy_into(target: nn.Module, source: nn.Module, rename: dict[str, str]) -> None:
    """Load ``source``'s weights into ``target``, names replaced; every tensor must find its place."""
    state = {}
    for name, tensor in source.state_dict().items():
        for old, new in rename.items():
            name = name.replace(old, new)
        state[name] = tensor
    target.load_state_dict(state)


def test_mlp_is_llavas_projector():
    sizes = {"vision_config": SimpleNamespace(hidden_size=8), "text_config": SimpleNamespace(hidden_size=12)}
    config: Any = SimpleNamespace(
        vision_feature_layer=-2, projector_hidden_act="gelu", multimodal_projector_bias=True, **sizes
    )
    llava = LlavaMultiModalProjector(config)
    connector = made("mlp")
    copy_into(connector, llava, {"linear_1": "body.1", "linear_2": "project"})
    features = torch.randn(2, 16, 8)
    assert torch.equal(connector(features), llava(features))


def test_pixel_shuffle_is_idefics3s():
    features = torch.randn(2, 16, 8)
    pixel_shuffle: Any = Idefics3Connector.pixel_shuffle
    expected = pixel_shuffle(None, features, scale_factor=2)
    assert torch.equal(made("linear", shuffle=2).body(features), expected)


def test_resampler_is_idefics2s():
    connector = made("resampler").eval()
    reference = Idefics2PerceiverResampler(connector.resampler.config).eval()
    reference.load_state_dict(connector.resampler.state_dict())
    features = torch.randn(2, 16, 8)
    mask = torch.ones(2, 16, dtype=torch.long)
    torch.testing.assert_close(connector(features), connector.project(reference(features, mask)))


def qformer_and_reference() -> tuple[Any, Any]:
    connector = made("qformer").eval()
    config = Blip2QFormerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, encoder_hidden_size=8
    )
    reference = Blip2QFormerModel(config).eval()
    copy_into(connector.qformer, reference, {})
    return connector, reference


def test_qformer_is_blip2s():
    connector, reference = qformer_and_reference()
    features = torch.randn(2, 16, 8)
    normed = connector.norm_features(features)
    expected = reference(query_embeds=connector.queries.expand(2, -1, -1), encoder_hidden_states=normed)
    torch.testing.assert_close(connector(features), connector.project(expected.last_hidden_state))


def test_causal_queries_see_only_those_before():
    connector = made("qformer", causal=True).eval()
    features = torch.randn(1, 16, 8)
    before = connector(features)
    with torch.no_grad():
        connector.queries[:, 3:] += torch.randn(1, 3, 16)
    after = connector(features)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert (before[:, 3] - after[:, 3]).abs().max() > 1e-4


def bert(folder: Any, **sizes: Any) -> str:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, **sizes}
    BertModel(BertConfig(vocab_size=11, **sizes)).save_pretrained(folder)
    return str(folder)


def test_qformer_starts_from_a_bert(tmp_path):
    folder = bert(tmp_path / "bert")
    state = BertModel.from_pretrained(folder).state_dict()
    own = made("qformer", init=folder).qformer.state_dict()
    for layer in (0, 1):
        for there, here in [
            ("attention.self.query", "attention.attention.query"),
            ("attention.output.dense", "attention.output.dense"),
            ("intermediate.dense", "intermediate_query.dense"),
            ("output.LayerNorm", "output_query.LayerNorm"),
        ]:
            expected = state[f"encoder.layer.{layer}.{there}.weight"]
            assert torch.equal(own[f"encoder.layer.{layer}.{here}.weight"], expected), there
    with pytest.raises(MLLMError, match="does not fit the Q-Former"):
        made("qformer", init=bert(tmp_path / "wide", hidden_size=32))


def test_token_merge_starts_from_a_bert(tmp_path):
    folder = bert(tmp_path / "bert")
    state = BertModel.from_pretrained(folder).state_dict()
    own = made("token-merge", init=folder).blocks[1].state_dict()
    assert torch.equal(own["attention.self.key.weight"], state["encoder.layer.1.attention.self.key.weight"])
    for name, init in (
        ("hidden size 32", bert(tmp_path / "wide", hidden_size=32)),
        ("1 layers", bert(tmp_path / "short", num_hidden_layers=1)),
    ):
        with pytest.raises(MLLMError, match=name):
            made("token-merge", init=init)
    with pytest.raises(MLLMError, match="nothing"):
        made("token-merge", init=str(tmp_path / "nothing"))


@pytest.mark.parametrize("layers", [1, 2])
def test_without_merging_and_with_positions_it_is_the_bert_it_starts_from(tmp_path, layers):
    folder = bert(tmp_path / "bert")
    connector, features = (
        made("token-merge", init=folder, positions=True, merge=0, layers=layers).eval(),
        torch.randn(2, 16, 8),
    )
    reference = BertModel.from_pretrained(folder, num_hidden_layers=layers).eval()
    expected = reference(inputs_embeds=connector.enter(features)).last_hidden_state
    torch.testing.assert_close(connector.body(features), expected)
    with pytest.raises(MLLMError, match="BERT has 12 positions, for 16 features"):
        made("token-merge", init=bert(tmp_path / "near", max_position_embeddings=12), positions=True)


def test_merging_joins_the_most_similar_pair_and_keeps_the_mean():
    merged = lookup("connectors", "token-merge").__init__.__globals__["merged"]
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.2]]])
    sizes = torch.tensor([[[1.0], [1.0], [3.0], [1.0]]])
    joined, counts = merged(tokens, sizes, tokens, 1)
    # The third token (3 patches) is closest to the second (1 patch): their mean over four patches takes its place.
    torch.testing.assert_close(joined[0], torch.tensor([[1.0, 0.0], [0.075, 1.0], [-1.0, 0.2]]))
    assert counts.flatten().tolist() == [1, 4, 1]
    torch.testing.assert_close((joined * counts).sum(1), (tokens * sizes).sum(1))


def test_more_tokens_than_there_are_cannot_be_merged():
    with pytest.raises(MLLMError, match="more than half of its tokens"):
        made("token-merge", merge=7)
    with pytest.raises(MLLMError, match=r"shuffle is 3, and a grid of 4 x 4 patches cannot be divided"):
        made("mlp", shuffle=3)


@pytest.mark.parametrize(
    ("name", "options", "weights", "tokens"),
    [
        # MAPL (arXiv:2210.07179): CLIP ViT-L/14 to GPT-J
        ("mapper", {"vis_dim": 1024, "lm_dim": 4096, "num_patches": 257, "grid": None}, 3_431_680, 32),
        # VisCPM's two layers
        ("mlp", {"vis_dim": 1024, "lm_dim": 4096, "num_patches": 64, "grid": None}, 20_979_712, 64),
    ],
)
def test_published_sizes(name, options, weights, tokens):
    with torch.device("meta"):
        connector = lookup("connectors", name)(**options)
    assert sum(parameter.numel() for parameter in connector.parameters()) == weights
    assert connector.num_tokens == tokens


@pytest.mark.parametrize("attention", ["joint", "cross"])
@torch.no_grad()
def test_a_mapper_knows_places_by_its_positions_and_sizes_without_its_norm(attention):
    features = torch.randn(2, 16, 8)
    plain, positions, norm = (
        made("mapper", attention=attention, **options).eval() for options in ({}, {"positions": True}, {"norm": True})
    )
    assert torch.allclose(plain(features), plain(features.flip(1)), atol=1e-5)  # the order of patches changes nothing
    assert not torch.allclose(positions(features), positions(features.flip(1)), atol=1e-5)
    assert torch.allclose(norm(features), norm(5 * features), atol=1e-3)
    assert not torch.allclose(plain(features), plain(5 * features), atol=1e-3)
    assert torch.allclose(plain(features)[1:], plain(features[1:]), atol=1e-5)
    with pytest.raises(MLLMError, match="joint or cross"):
        made("mapper", attention="both")


@torch.no_grad()
def test_cross_attention_is_torchs_decoder_of_the_queries():
    connector = made("mapper", attention="cross", positions=True).eval()
    layer = torch.nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    decoder = torch.nn.TransformerDecoder(layer, 2, torch.nn.LayerNorm(16)).eval()
    decoder.load_state_dict(connector.encoder.state_dict())
    features = torch.randn(1, 16, 8)
    states = decoder(connector.queries[None], connector.enter(features) + connector.positions)
    torch.testing.assert_close(connector(features), connector.project(states))


def test_published_tokens_of_simvlg_and_blip2():
    sizes = {"vis_dim": 1408, "lm_dim": 2560, "num_patches": 257, "grid": None}
    with torch.device("meta"):
        assert lookup("connectors", "token-merge")(**sizes).num_tokens == 29
        qformer = lookup("connectors", "qformer")(**sizes)
    assert qformer.num_tokens == 32
    assert sum(parameter.numel() for parameter in qformer.project.parameters()) == 1_968_640
