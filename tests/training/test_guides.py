"""Guides: frozen models that a stage asks: aligned with, fitted to, counted and hashed, never saved with a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cosine_similarity, kl_div, mse_loss
from transformers import AutoModelForCausalLM, CLIPModel

import mllm
from mllm.build import build, guides_of
from mllm.config.base import PartSpec
from mllm.config.lm import LMSpec
from mllm.config.parts import AssemblySpec, ConnectorSpec, EncoderSpec
from mllm.errors import MLLMError
from mllm.objectives.align import Align
from mllm.objectives.kl_to_base import KLToBase
from mllm.planning.check import problems
from mllm.planning.plan import plan
from mllm.prompts.pieces import Target
from mllm.slots import Inputs
from mllm.testing import tiny_image
from mllm.training.batches import inputs
from mllm.training.loop import Loop

ROWS: list[list[Any]] = [
    [tiny_image(0), "A picture of", Target(" a cat")],
    [tiny_image(1), "A picture of", Target(" two red birds")],
]
RECIPE = """
name: guided
encoder: {{model: {encoder}}}
connector: {{type: linear, tokens: 1, width: judge}}
guides: {{judge: {{type: dual-encoder, model: {clip}}}}}
data: {{train: {{format: table, path: {data}/train.csv, unlabeled: true}}}}
optim: {{schedule: constant, warmup: 0}}
cache: "off"
stages:
  - {{name: align, train: {{connector: 0.01}}, objectives: [{{type: align}}], steps: 6, batch_size: 4,
     checkpoint_every: 2}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_parts: tuple[str, str], tiny_clip: str) -> Path:
    """A recipe that aligns a connector with a CLIP on images alone, and a run of another model."""
    folder = tmp_path_factory.mktemp("guides")
    for number in range(12):
        tiny_image(number).save(folder / f"{number}.png")
    (folder / "train.csv").write_text("image,caption\n" + "".join(f"{n}.png,noise {n}\n" for n in range(12)))
    (folder / "recipe.yaml").write_text(RECIPE.format(encoder=tiny_parts[0], clip=tiny_clip, data=folder))
    sentences(tiny_parts, seed=0).save(folder / "run")
    return folder


class Killed(BaseException):
    """The end of a process, which nothing handles."""


def sentences(tiny_parts: tuple[str, str], seed: int) -> Any:
    """Return a model whose visual tokens are in the space of a sentence encoder."""
    parts: dict[str, Any] = {"encoder": EncoderSpec(model=tiny_parts[0]), "seed": seed}
    connector = ConnectorSpec.model_validate({"type": "linear", "tokens": 4})
    return build(AssemblySpec(**parts, lm=LMSpec(type="sentences", model=tiny_parts[1]), connector=connector))


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mllm.train(str(folder / "recipe.yaml"), out=tmp_path_factory.mktemp("whole") / "run").path


def asked(model: Any, objective: Any, rows: Any = ROWS, **guides: dict[str, Any]) -> torch.Tensor:
    """Return an objective's loss with these guides."""
    model.guides = guides_of(None, {name: PartSpec.model_validate(spec) for name, spec in guides.items()})
    rows, features, batch = inputs(model, rows, model.features)
    loss: torch.Tensor = objective(Inputs(model, rows, features, batch))
    return loss


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_align_is_the_distance_to_a_runs_tokens_one_by_one(
    folder: Path, tiny_model: Callable[..., Any], distance: Any
) -> None:
    model, teacher = tiny_model({"type": "linear", "tokens": 4}, seed=3), mllm.load(folder / "run")
    images = [row[0] for row in ROWS]
    with torch.no_grad():
        ours, theirs = (one.connector(one.features(images)) for one in (model, teacher))
        loss = asked(model, Align(distance=distance), run={"type": "run", "model": str(folder / "run")})
    if distance == "mse":
        expected = sum(mse_loss(one, other) for one, other in zip(ours, theirs, strict=True))
    else:
        expected = sum((1 - cosine_similarity(a, b, dim=-1)).mean() for a, b in zip(ours, theirs, strict=True))
    torch.testing.assert_close(loss, torch.as_tensor(expected))


def test_align_compares_the_mean_token_with_one_vector_of_the_caption(
    folder: Path, tiny_model: Callable[..., Any]
) -> None:
    model, teacher = tiny_model({"type": "linear", "tokens": 4}), mllm.load(folder / "run")
    loss = asked(model, Align(reads="text"), run={"type": "run", "model": str(folder / "run")})
    with torch.no_grad():
        ours = model.connector(model.features([row[0] for row in ROWS])).mean(1)
        theirs = teacher.lm.sentences(["a cat", "two red birds"])
    torch.testing.assert_close(loss.detach(), mse_loss(ours, theirs) * 2)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.guides.open("run").parameters())


def test_a_trained_connector_comes_near_to_the_guide(whole: Path, folder: Path, tiny_clip: str) -> None:
    losses = [json.loads(line)["loss"] for line in (whole / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    recorded = json.loads((whole / "frozen.json").read_text())["align"]
    assert recorded["before"]["guides.judge"] == recorded["after"]["guides.judge"]
    recipe = mllm.load(whole).spec
    assert recipe.connector.width == CLIPModel.from_pretrained(tiny_clip).config.projection_dim == 12
    with safe_open(next((whole / "model").glob("*.safetensors")), "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"connector"}  # noqa: SIM118


def test_a_model_is_loaded_without_its_guide(folder: Path, tiny_clip: str, tmp_path: Path) -> None:
    guide = shutil.copytree(tiny_clip, tmp_path / "clip")
    run = mllm.train(str(folder / "recipe.yaml"), {"guides.judge.model": str(guide)}, out=tmp_path / "run")
    shutil.rmtree(guide)
    assert mllm.load(run.path).overview([tiny_image()]).shape == (1, 1, 12)


def test_a_killed_run_goes_on_bit_for_bit_with_the_same_guide_alone(
    whole: Path, folder: Path, tiny_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, log = str(folder / "recipe.yaml"), Loop._log

    def stopping(self: Loop, step: int, *rest: Any) -> None:
        log(self, step, *rest)
        if step == 5:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Loop, "_log", stopping)
        mllm.train(recipe, out=tmp_path / "run")
    other = CLIPModel.from_pretrained(tiny_clip)
    with torch.no_grad():
        other.visual_projection.weight.add_(0.1)
    shutil.copytree(tiny_clip, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    changed = {"guides.judge.model": str(tmp_path / "other")}
    with pytest.raises(MLLMError, match=r"guides\.judge"):
        mllm.train(recipe, changed, resume=tmp_path / "run", accept_changes=True)
    resumed = mllm.train(recipe, resume=tmp_path / "run", accept_changes=True)
    one, two = (mllm.load(path).trained_state() for path in (whole, resumed.path))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_plan_counts_the_guides_weights(folder: Path, tiny_clip: str) -> None:
    (stage,) = plan(str(folder / "recipe.yaml")).stages
    sizes = {part.name: (part.parameters, part.trained) for part in stage.parts}
    assert sizes["guides.judge"] == (sum(p.numel() for p in CLIPModel.from_pretrained(tiny_clip).parameters()), 0)
    assert stage.memory.weights > 4 * sizes["guides.judge"][0]


def test_a_connector_is_fitted_to_the_guides_vectors(folder: Path, tiny_clip: str, tmp_path: Path) -> None:
    fit = {"stages": [{"name": "fit", "fit": {"targets": "guide", "solver": "least-squares"}}]}
    data = {"data.train": {"format": "table", "path": str(folder / "train.csv"), "unlabeled": True}}
    pooled = {**fit, **data, "encoder.select": "pooled"}
    assert problems(str(folder / "recipe.yaml"), pooled) == []
    model = mllm.load(mllm.train(str(folder / "recipe.yaml"), pooled, out=tmp_path / "run").path)
    images = [folder / f"{number}.png" for number in range(12)]
    x, y = model.features(images)[:, 0], guide_vectors(tiny_clip, images)
    with_bias = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    expected = with_bias @ torch.linalg.lstsq(with_bias.double(), y.double(), driver="gelsd").solution.float()
    with torch.no_grad():
        torch.testing.assert_close(model.overview(images)[:, 0], expected, atol=1e-3, rtol=1e-3)


def guide_vectors(tiny_clip: str, images: list[Path]) -> torch.Tensor:
    """Return transformers' own embeddings of images, of length 1."""
    from transformers import AutoProcessor

    from mllm.media.images import open_image

    processor, clip = AutoProcessor.from_pretrained(tiny_clip), CLIPModel.from_pretrained(tiny_clip)
    pixels = processor(images=[open_image(path) for path in images], return_tensors="pt")
    with torch.no_grad():
        vectors = clip.visual_projection(clip.vision_model(**pixels).pooler_output)
    return torch.nn.functional.normalize(vectors, dim=-1)


def test_the_aligned_model_classifies_with_the_guides_texts(whole: Path, tiny_clip: str) -> None:
    texts = {"type": "dual-encoder", "model": tiny_clip}
    model = mllm.load(whole)
    model.guides = guides_of(PartSpec.model_validate({"type": "aligned", "texts": texts}))
    images, words = [tiny_image(0), tiny_image(1)], ["a cat", "two red birds"]
    clip = guides_of(PartSpec.model_validate(texts)).open("scorer")
    with torch.no_grad():
        expected = cosine_similarity(model.overview(images)[:, 0, None], clip.embed_texts(words)[None], dim=-1)
    torch.testing.assert_close(model.scorer.image_text(images, words), expected)


@pytest.mark.parametrize("images", [False, True])
def test_kl_to_base_is_that_of_stock_logits(
    tiny_model: Callable[..., Any], tiny_parts: tuple[str, str], images: bool
) -> None:
    model = tiny_model(adapters=[{"type": "lora", "r": 2}], tokens=["[X]"])
    with torch.no_grad():
        assert float(asked(model, KLToBase())) == pytest.approx(0, abs=1e-5)  # LoRA starts as the identity
        for name, parameter in model.adapters.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        loss = asked(model, KLToBase(images=images))
    base = AutoModelForCausalLM.from_pretrained(tiny_parts[1])
    expected = torch.tensor(0.0)
    for image, prompt, target in ROWS:
        prefix, answer = model.lm.tokenize(prompt), [*model.lm.tokenize(target.text), model.lm.eos]
        with torch.no_grad():
            q = base(torch.tensor([prefix + answer])).logits[0, len(prefix) - 1 : -1].log_softmax(-1)
            row = [image, prompt, target] if images else [prompt, target]
            embeds, batch = model.prepare([row])
            logits = model.lm.logits(embeds, batch.mask)[0, -len(answer) - 1 : -1]
        p = logits[:, : q.shape[1]].log_softmax(-1)
        expected += kl_div(q, p, reduction="sum", log_target=True)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_kl_to_base_takes_another_language_model_for_the_base(
    tiny_model: Callable[..., Any], tiny_parts: tuple[str, str]
) -> None:
    model = tiny_model(adapters=[{"type": "lora", "r": 2}])
    base = {"type": "transformers", "model": tiny_parts[1]}
    with torch.no_grad():
        assert float(asked(model, KLToBase(guide="base"), base=base)) == pytest.approx(0, abs=1e-5)


LM = "lm: {{model: {lm}}}\n"
BAD: list[tuple[dict[str, Any], str]] = [
    ({"stages.0.objectives": [{"type": "align", "guide": "jugde"}]}, "No guide is called 'jugde'"),
    ({"guides.judge": {"type": "transformers", "model": "LM"}, "connector.width": 12}, "A guide is missing: expected"),
    ({"guides.judge.model": "nowhere/clip", "connector.width": 12}, "The guide 'judge': "),
    ({"guides.judge": {"type": "run", "model": "runs/nowhere"}, "connector.width": 12}, "There is no model in runs/"),
    ({"guides.judge": {"type": "dual"}, "connector.width": 12}, "No part called 'dual' in mllm.guides, mllm.scorers"),
    ({"guides.other": {"type": "run", "model": "RUN"}}, "Several guides will do: judge, other"),
    ({"connector.width": 8}, "the guide's vectors have the width 12, and those of the model 8"),
    ({"guides.scorer": {"type": "dual-encoder", "model": "CLIP"}}, "the scorer is a guide by itself"),
    (
        {"stages.0.objectives": [{"type": "align", "reads": "text"}]},
        "unlabeled: true, and the objective 'align'",
    ),
    ({"stages.0.objectives": [{"type": "align", "distance": "l1"}]}, "expected mse or cosine"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD)
def test_what_is_wrong_is_said_before_anything_trains(
    folder: Path, tiny_parts: tuple[str, str], tiny_clip: str, tmp_path: Path, overrides: Any, message: str
) -> None:
    words = {"LM": tiny_parts[1], "CLIP": tiny_clip, "RUN": str(folder / "run")}
    text = json.dumps(overrides)
    for word, value in words.items():
        text = text.replace(f'"{word}"', json.dumps(value))
    overrides, recipe = json.loads(text), str(folder / "recipe.yaml")
    found = problems(recipe, overrides)
    assert [problem for problem in found if message in problem], found
    with pytest.raises(MLLMError) as raised:
        mllm.train(recipe, overrides, out=tmp_path / "run")
    assert message in str(raised.value)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_language_model_that_trains_is_no_base(folder: Path, tiny_parts: tuple[str, str], tmp_path: Path) -> None:
    overrides = {
        "lm": {"model": tiny_parts[1]},
        "connector": {"type": "linear", "tokens": 1},
        "data.train.unlabeled": False,
        "stages.0.train": {"lm": 1.0e-4},
        "stages.0.objectives": [{"type": "kl-to-base"}],
    }
    found = problems(str(folder / "recipe.yaml"), overrides)
    assert len(found) == 1 and "the language model trains, so it is no base" in found[0]
    with pytest.raises(MLLMError, match="the language model trains"):
        mllm.train(str(folder / "recipe.yaml"), overrides, out=tmp_path / "run")


def test_the_model_itself_is_no_guide(folder: Path, tiny_parts: tuple[str, str], tiny_clip: str) -> None:
    scorer = {"type": "aligned", "texts": {"type": "dual-encoder", "model": tiny_clip}}
    overrides = {"scorer": scorer, "stages.0.objectives": [{"type": "align", "guide": "scorer"}]}
    found = problems(str(folder / "recipe.yaml"), overrides)
    assert len(found) == 1 and "is the model itself" in found[0]


def test_a_guide_that_nothing_asks_is_not_opened(folder: Path, tmp_path: Path) -> None:
    overrides = {"guides.idle": {"type": "run", "model": "runs/nowhere"}}
    named = {**overrides, "stages.0.objectives": [{"type": "align", "guide": "judge"}], "stages.0.steps": 1}
    assert problems(str(folder / "recipe.yaml"), named) == []
    mllm.train(str(folder / "recipe.yaml"), named, out=tmp_path / "run")
