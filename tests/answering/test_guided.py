"""Guided decoding against a plain loop over stock models, its arithmetic, and batches that equal single prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoProcessor, CLIPModel

from mllm.build import build
from mllm.config.base import PartSpec
from mllm.config.lm import LMSpec
from mllm.config.parts import AssemblySpec
from mllm.errors import MLLMError
from mllm.testing import tiny_image

PROMPT = "A picture of"
LENGTH = 5


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any], tiny_clip: str) -> Any:
    return tiny_model({"type": "linear", "tokens": 4}, scorer={"type": "dual-encoder", "model": tiny_clip})


@pytest.fixture(scope="module")
def clip(tiny_clip: str) -> Callable[..., torch.Tensor]:
    """Return transformers' own CLIP vectors of an image or of texts."""
    processor, stock = AutoProcessor.from_pretrained(tiny_clip), CLIPModel.from_pretrained(tiny_clip).eval()

    @torch.no_grad()
    def vectors(thing: Any) -> torch.Tensor:
        if isinstance(thing, list):
            inputs = processor(text=thing, return_tensors="pt", padding="max_length", max_length=64, truncation=True)
            return normalize(stock.text_projection(stock.text_model(**inputs).pooler_output), dim=-1)
        pixels = processor(images=[thing], return_tensors="pt")
        return normalize(stock.visual_projection(stock.vision_model(**pixels).pooler_output), dim=-1)

    return vectors


def searched(model: Any, lm: str, clip: Any, image: Any, query: torch.Tensor, *, k: int, weight: float) -> str:
    """Return the text of a plain loop: stock logits of the whole sequence, the k likeliest, CLIP's cosines."""
    stock, ids = AutoModelForCausalLM.from_pretrained(lm), list[int]()
    with torch.no_grad():
        visual = torch.empty(0, 32) if image is None else model.connector(model.features([image]))[0]
        for _ in range(LENGTH):
            text = stock.get_input_embeddings()(torch.tensor([*model.lm.tokenize(PROMPT), *ids]))
            logits = stock(inputs_embeds=torch.cat([visual, text])[None]).logits[0, -1]
            values, tokens = logits.softmax(-1).topk(k)
            texts = [model.lm.tokenizer.decode([*ids, t], skip_special_tokens=True).strip() for t in tokens.tolist()]
            similar = (clip(texts) @ query[0] / 0.05).softmax(-1)
            token = int(tokens[(values + weight * similar).argmax()])
            if token == model.lm.eos:
                break
            ids.append(token)
    return str(model.lm.decode(ids)).strip()


def test_it_is_the_search_of_a_plain_loop(model: Any, tiny_parts: tuple[str, str], clip: Any) -> None:
    answers = {}
    for number, weight in ((0, 0.5), (1, 2.0)):
        image = tiny_image(number)
        guided = {"k": 6, "weight": weight, "temperature": 0.05}
        answer = str(model.generate([[image, PROMPT]], max_new_tokens=LENGTH, guided=guided)[0])
        assert answer == searched(model, tiny_parts[1], clip, image, clip(image), k=6, weight=weight)
        answers[answer] = str(model.generate([[image, PROMPT]], max_new_tokens=LENGTH)[0])
    assert any(guided != unguided for guided, unguided in answers.items())


def test_sums_and_differences_stand_for_the_image(model: Any, tiny_parts: tuple[str, str], clip: Any) -> None:
    image, other = tiny_image(0), tiny_image(3)
    of = [{"image": "prompt"}, {"text": "night", "weight": 2}, {"image": other, "weight": -1.5}]
    query = normalize(clip(image) + 2 * clip(["night"]) - 1.5 * clip(other), dim=-1)
    guided = {"k": 6, "weight": 2.0, "temperature": 0.05, "of": of}
    answer = str(model.generate([[image, PROMPT]], max_new_tokens=LENGTH, guided=guided)[0])
    assert answer == searched(model, tiny_parts[1], clip, image, query, k=6, weight=2.0)


def test_the_bare_language_model_is_guided_by_an_image_that_it_does_not_read(
    tiny_parts: tuple[str, str], tiny_clip: str, clip: Any, model: Any
) -> None:
    scorer = PartSpec.model_validate({"type": "dual-encoder", "model": tiny_clip})
    bare, image = build(AssemblySpec(lm=LMSpec(model=tiny_parts[1]), scorer=scorer)), tiny_image(1)
    guided = {"k": 6, "weight": 2.0, "temperature": 0.05}
    answer = str(bare.generate([[image, PROMPT]], max_new_tokens=LENGTH, guided=guided)[0])
    assert answer == searched(model, tiny_parts[1], clip, None, clip(image), k=6, weight=2.0)
    with pytest.raises(MLLMError, match="no encoder and connector, so it takes no images"):
        bare.generate([[image, PROMPT]], max_new_tokens=2)
    seeds: list[dict[str, Any]] = [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    unguided = [str(bare.generate([[PROMPT]], max_new_tokens=LENGTH, **seed)[0]) for seed in seeds]
    best = unguided[int((clip(unguided) @ clip(image)[0]).argmax())]
    assert str(bare.generate([[image, PROMPT]], max_new_tokens=LENGTH, candidates=3, seed=0)[0]) == best


def test_one_token_or_no_weight_is_greedy(model: Any) -> None:
    prompts = [[tiny_image(number), PROMPT] for number in range(2)]
    greedy = [str(answer) for answer in model.generate(prompts, max_new_tokens=LENGTH)]
    for guided in ({"k": 1}, {"weight": 0.0}):
        assert [str(answer) for answer in model.generate(prompts, max_new_tokens=LENGTH, guided=guided)] == greedy


def test_a_batch_gives_what_its_members_give_alone(model: Any) -> None:
    prompts = [[tiny_image(number), text] for number, text in enumerate((PROMPT, "Red", "What is in this picture?"))]
    options: dict[str, Any] = {"max_new_tokens": LENGTH, "guided": {"k": 5}, "repetition_penalty": 1.5}
    together = [str(answer) for answer in model.generate(prompts, **options)]
    assert together == [str(model.generate([prompt], **options)[0]) for prompt in prompts]


@pytest.mark.parametrize(
    ("guided", "message"),
    [
        ({"k": 0}, "k=0; expected a number of at least 1"),
        ({"weight": -1}, "weight=-1; expected a number of at least 0"),
        ({"of": [{"text": "a", "image": "prompt"}]}, "expected mappings of image or text"),
        ({"of": [{"text": "a", "weight": "b"}]}, "expected mappings of image or text"),
        ({"of": []}, "give an image or a text"),
        ({"beta": 1}, "does not take these arguments"),
    ],
)
def test_bad_options_are_one_message(model: Any, guided: dict[str, Any], message: str) -> None:
    with pytest.raises(MLLMError) as raised:
        model.generate([[tiny_image(), PROMPT]], max_new_tokens=2, guided=guided)
    assert message in str(raised.value)


def test_without_an_image_a_scorer_or_with_beams_it_is_refused(model: Any, tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(MLLMError, match="a prompt has none"):
        model.generate([[PROMPT]], max_new_tokens=2, guided={})
    with pytest.raises(MLLMError, match="This model has no scorer"):
        tiny_model().generate([[tiny_image(), PROMPT]], max_new_tokens=2, guided={})
    with pytest.raises(MLLMError, match="guided decodes without beams"):
        model.generate([[tiny_image(), PROMPT]], max_new_tokens=2, guided={}, num_beams=2)
