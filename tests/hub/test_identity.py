"""Two folders are one model exactly if `transformers` computes the same with them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from torch import Tensor

import mllm
from mllm.encoders.dual_encoder import JointSpace
from mllm.encoders.fuse import Fuse
from mllm.encoders.vision import VisionModel
from mllm.errors import MLLMError
from mllm.hub import fingerprints, identity
from mllm.lms.language_model import LanguageModel
from mllm.lms.sentences import SentenceEncoder
from mllm.testing import ENCODER_FAMILIES, LM_FAMILIES, tiny_image

Edit = Callable[[dict[str, Any]], dict[str, Any]]
IDS = torch.arange(3, 60)[None] % 31
WORDS = "Some Words, 1234 numbers;  and<x> ÄÖ"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves a tiny model of a family once, and returns its folder."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            build = LM_FAMILIES.get(family) or ENCODER_FAMILIES[family]
            folders[family] = Path(build(tmp_path_factory.mktemp(family)))
        return folders[family]

    return folder


def edited(folder: Path, place: Path, file: str, edit: Edit) -> Path:
    """Return a copy of a folder with an edited JSON file."""
    shutil.copytree(folder, place)
    content = json.loads((place / file).read_text())
    (place / file).write_text(json.dumps(edit(content)))
    return place


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits)


def features(folder: Path) -> Tensor:
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(images=[tiny_image(1)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return torch.as_tensor(transformers.AutoModel.from_pretrained(folder).eval()(pixels).last_hidden_state)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rms_norm_eps": 0.1}),
        ("llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
        ("llama", {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}}),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}),
        ("mistral", {"sliding_window": 2}),
        ("gemma2", {"query_pre_attn_scalar": 64}),
        ("gemma2", {"final_logit_softcapping": 1.0}),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("granite", {"logits_scaling": 4.0}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt-neox", {"use_parallel_residual": False}),
        ("opt", {"activation_function": "gelu"}),
        ("smollm3", {"no_rope_layers": [0, 1]}),
    ],
)
def test_a_language_model_that_computes_otherwise_is_another(family, values, saved, tmp_path):
    other = edited(saved(family), tmp_path / "other", "config.json", lambda config: {**config, **values})
    assert not torch.equal(logits(other), logits(saved(family)))
    one, two = (LanguageModel(model=str(folder)).fingerprint for folder in (saved(family), other))
    assert list(identity.differing(one, two)) == ["configuration"]


@pytest.mark.parametrize(
    ("family", "file", "values"),
    [
        ("vit", "config.json", {"hidden_act": "quick_gelu"}),
        ("vit", "config.json", {"layer_norm_eps": 0.1}),
        ("vit", "config.json", {"num_attention_heads": 4}),
        ("clip", "config.json", {"hidden_act": "gelu"}),
        ("dinov2", "config.json", {"layer_norm_eps": 0.1}),
        ("swin", "config.json", {"hidden_act": "relu"}),
        ("mobilenet-v2", "config.json", {"layer_norm_eps": 0.5}),
        ("mobilenet-v2", "config.json", {"tf_padding": False}),
        ("vit", "preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3]}),
        ("vit", "preprocessor_config.json", {"image_std": [0.1, 0.2, 0.3]}),
        ("vit", "preprocessor_config.json", {"resample": 0}),
        ("vit", "preprocessor_config.json", {"do_normalize": False}),
        ("vit", "preprocessor_config.json", {"rescale_factor": 0.5}),
        ("clip", "preprocessor_config.json", {"do_center_crop": False, "size": {"height": 32, "width": 32}}),
        ("clip", "preprocessor_config.json", {"size": {"shortest_edge": 40}}),
    ],
)
def test_an_encoder_that_computes_otherwise_is_another(family, file, values, saved, tmp_path):
    other = edited(saved(family), tmp_path / "other", file, lambda config: {**config, **values})
    assert not torch.equal(features(other), features(saved(family)))
    one, two = (VisionModel(model=str(folder)).fingerprint for folder in (saved(family), other))
    aspect = "configuration" if file == "config.json" else "preprocessing"
    assert list(identity.differing(one, two)) == [aspect]


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "_name_or_path": "somebody/else", "transformers_version": "4.1.0", "architectures": ["Other"]}


def _without_defaults(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("hidden_act", "attention_dropout")}


def _for_training(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "attention_dropout": 0.5, "initializer_range": 0.5, "use_cache": False}


def _old_names(config: dict[str, Any]) -> dict[str, Any]:
    """The form in which transformers 4 wrote a configuration."""
    config = dict(reversed(config.items()))
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters", None)
    return config if rope is None else {**config, "rope_theta": int(rope["rope_theta"]), "rope_scaling": None}


@pytest.mark.parametrize("edit", [_renamed, _without_defaults, _for_training, _old_names])
def test_other_bookkeeping_is_the_same_model(edit, saved, tmp_path):
    lm = edited(saved("llama"), tmp_path / "lm", "config.json", edit)
    assert torch.equal(logits(lm), logits(saved("llama")))
    assert LanguageModel(model=str(lm)).fingerprint == LanguageModel(model=str(saved("llama"))).fingerprint
    encoder = edited(saved("vit"), tmp_path / "encoder", "config.json", edit)
    assert torch.equal(features(encoder), features(saved("vit")))
    assert VisionModel(model=str(encoder)).fingerprint == VisionModel(model=str(saved("vit"))).fingerprint


@pytest.mark.parametrize("family", ["llama", "gemma3", "t5", "bloom", "rwkv"])
def test_a_language_model_that_is_saved_again_is_the_same(family, saved, tmp_path):
    folder = saved(family)
    auto = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    auto.from_pretrained(folder).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    one, two = (LanguageModel(model=str(place)).fingerprint for place in (folder, tmp_path))
    assert one == two


@pytest.mark.parametrize("family", list(ENCODER_FAMILIES))
def test_an_encoder_that_is_saved_again_is_the_same(family, saved, tmp_path):
    folder = saved(family)
    transformers.AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    VisionModel(model=str(folder)).processor.save_pretrained(tmp_path)
    one, two = (VisionModel(model=str(place)).fingerprint for place in (folder, tmp_path))
    assert one == two


def _lowercase(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def _replace(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("numbers", "n")


def _digits(tokenizer: Any) -> None:
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)


def _added(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("<x>", special=False)])


def _merges(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    vocabulary["nu"] = vocabulary.pop("!")
    tokenizer._tokenizer.model = models.BPE(vocab=vocabulary, merges=[("n", "u")])


def _order(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    vocabulary["n"], vocabulary["o"] = vocabulary["o"], vocabulary["n"]
    tokenizer._tokenizer.model = models.BPE(vocab=vocabulary, merges=[])


@pytest.mark.parametrize("change", [_lowercase, _replace, _digits, _added, _merges, _order])
@pytest.mark.parametrize("kind", [LanguageModel, SentenceEncoder])
def test_a_tokenizer_with_other_ids_is_another_language_model(change, kind, tiny_parts, tmp_path):
    shutil.copytree(tiny_parts[1], tmp_path / "lm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "lm")
    ids = tokenizer(WORDS).input_ids
    change(tokenizer)
    tokenizer.save_pretrained(tmp_path / "lm")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "lm")(WORDS).input_ids != ids
    one, two = (kind(model=str(folder)).fingerprint for folder in (tiny_parts[1], tmp_path / "lm"))
    assert list(identity.differing(one, two)) == ["tokenizer"]


def test_how_a_tokenizer_pads_and_truncates_is_bookkeeping(saved, tmp_path):
    shutil.copytree(saved("qwen2"), tmp_path / "lm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "lm", padding_side="left", model_max_length=64)
    tokenizer([WORDS, "x"], padding=True, truncation=True, max_length=9)  # which the tokenizer saves
    tokenizer.save_pretrained(tmp_path / "lm")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "lm")
    assert again(WORDS).input_ids == transformers.AutoTokenizer.from_pretrained(saved("qwen2"))(WORDS).input_ids
    one, two = (LanguageModel(model=str(folder)).fingerprint for folder in (saved("qwen2"), tmp_path / "lm"))
    assert one == two


def test_quantization_and_precision_are_not_part_of_the_model(saved):
    lm = str(saved("llama"))
    assert LanguageModel(model=lm, dtype="bfloat16").fingerprint == LanguageModel(model=lm).fingerprint
    assert LanguageModel(model=lm, init="random").fingerprint != LanguageModel(model=lm).fingerprint


def test_encoders_of_several_models_are_known_by_all_of_them(saved, tiny_clip, tmp_path):
    def change(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "hidden_act": "relu"}

    plain = VisionModel(model=str(saved("vit")))
    other = VisionModel(model=str(edited(saved("vit"), tmp_path / "vit", "config.json", change)))
    of = [[plain, plain], [plain, other], [other, plain]]
    prints = [Fuse(of=members, fuse="width").fingerprint for members in of]
    assert len(set(prints)) == 3 and len({identity.weights_of(fingerprint) for fingerprint in prints}) == 1

    def relu(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "vision_config": {**config["vision_config"], "hidden_act": "relu"}}

    clip = edited(Path(tiny_clip), tmp_path / "clip", "config.json", relu)
    one, two = JointSpace(model=tiny_clip), JointSpace(model=str(clip))
    pixels = one.preprocess([tiny_image(1)])
    assert not torch.equal(one(pixels), two(pixels))
    assert list(identity.differing(one.fingerprint, two.fingerprint)) == ["configuration"]


def test_a_template_matters_to_a_model_whose_prompts_are_written_in_it(saved, tiny_parts, tmp_path):
    def with_template(name: str, words: str) -> str:
        folder = shutil.copytree(saved("qwen2"), tmp_path / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = (
            f"{{% for message in messages %}}{words}{{{{ message.content }}}}<|end|>{{% endfor %}}"
        )
        tokenizer.save_pretrained(folder)
        return str(folder)

    one, two = with_template("one", "user:"), with_template("two", "ask:")
    for chat in ("plain", "own"):
        run = mllm.assemble(tiny_parts[0], one, prompt={"chat": chat}).save(tmp_path / chat)
        content = json.loads((Path(run) / "assembly.json").read_text())
        content["spec"]["lm"]["model"] = two
        (Path(run) / "assembly.json").write_text(json.dumps(content))
    mllm.load(tmp_path / "plain")
    with pytest.raises(MLLMError, match=r"another lm: its chat template is .*weights are equal.*Restore the original"):
        mllm.load(tmp_path / "own")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return the list of the hashed files, large ones and settled ones from now on."""
    hashed: list[str] = []
    digest = hashlib.file_digest

    def counted(stream: Any, name: str) -> Any:
        hashed.append(stream.name)
        return digest(stream, name)

    monkeypatch.setattr("mllm.hub.fingerprints.hashlib.file_digest", counted)
    monkeypatch.setattr(fingerprints, "LARGE", 100)
    monkeypatch.setattr(fingerprints, "SETTLED", -1)
    monkeypatch.setattr(fingerprints, "_hashes", {})
    yield hashed


def test_a_large_file_is_hashed_once_until_it_is_written(reads, tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 1000)
    first = fingerprints.file_hash(path)
    (tmp_path / "link").symlink_to(path)
    assert fingerprints.file_hash(tmp_path / "link") == fingerprints.file_hash(path) == first
    monkeypatch.setattr(fingerprints, "_hashes", {})  # as in another process
    assert fingerprints.file_hash(path) == first and len(reads) == 1
    times = path.stat()
    with path.open("r+b") as file:
        file.write(b"b")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as some copies do
    assert fingerprints.file_hash(path) != first and len(reads) == 2


def test_a_file_that_was_just_written_and_a_damaged_record_are_not_trusted(reads, tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 1000)
    monkeypatch.setattr(fingerprints, "SETTLED", 3600 * 10**9)
    for _ in range(2):
        first = fingerprints.file_hash(path)
    assert len(reads) == 2
    monkeypatch.setattr(fingerprints, "SETTLED", -1)
    fingerprints.file_hash(path)
    (record,) = (tmp_path / "mllm-cache" / "hashes").iterdir()
    for content in ("", "[]", "{}", '{"path": 1, "state": null}'):
        record.write_text(content)
        monkeypatch.setattr(fingerprints, "_hashes", {})
        assert fingerprints.file_hash(path) == first
    assert len(reads) == 7


def test_a_cache_that_cannot_be_written_costs_time_only(reads, tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_CACHE", "/dev/null/cache")
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 1000)
    assert fingerprints.file_hash(path) == fingerprints.file_hash(path)


def test_tokenizers_without_a_backend_are_known_by_their_vocabulary(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))

    class Plain:
        bos_token_id, eos_token_id, unk_token_id = None, 1, None
        vocab_file = str(tmp_path / "vocab.json")

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1}

    class Other(Plain):
        def get_vocab(self) -> dict[str, int]:
            return {"a": 1, "b": 0}

    assert identity.tokenization(Plain()) == identity.tokenization(Plain())
    assert identity.tokenization(Plain()) != identity.tokenization(Other())
