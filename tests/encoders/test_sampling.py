"""Test videos of a varying number of frames: alone, in batches, beside images, in views, chat, training and caches."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import mllm
from mllm.build import encoder_of
from mllm.config.messages import checked
from mllm.config.parts import EncoderSpec
from mllm.encoders.feature_folder import features_folder
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.media.images import ImageBytes, ImageFile
from mllm.media.sampling import Sampling
from mllm.media.videos import Clip, VideoBytes, VideoFile, length_of, open_clip
from mllm.planning.data_check import inspect
from mllm.planning.plan import plan
from mllm.slots import Inputs
from mllm.testing import tiny_encoder, tiny_image, tiny_lm, tiny_video

SECONDS = [0.1, 0.5, 1.2, 3.0, 9.0]  # of the videos, at 10 frames per second
FRAMES = [1, 1, 2, 6, 8]  # that two frames per second and at most 8 give
Q = 16  # of a frame


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return videos of noise, of which the last is brighter in each frame than in the one before."""
    folder = tmp_path_factory.mktemp("videos")
    frames = [[tiny_image(100 * n + i, (64, 48)) for i in range(round(10 * s))] for n, s in enumerate(SECONDS)]
    frames[-1] = [Image.new("L", (64, 48), 2 * i) for i in range(90)]
    return [tiny_video(folder / f"{n}.mp4", clip) for n, clip in enumerate(frames)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    return tiny_encoder(folder / "encoder"), tiny_lm(folder / "lm", context=2048)


def assembled(parts: tuple[str, str], **options: Any) -> Any:
    encoder = {"type": "video", "of": {"model": parts[0]}, **options}
    model = mllm.assemble(encoder, parts[1], "linear", device="cpu")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.connector.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def model(parts: tuple[str, str]) -> Any:
    return assembled(parts, fps=2, most=8)


def greys(clip: Clip) -> list[int]:
    return [round(float(np.asarray(frame).mean())) for frame in clip.frames]


def test_frames_are_sampled_at_a_rate_within_limits(model: Any, videos: list[Path], parts: tuple[str, str]) -> None:
    assert [len(model.encoder.open(video).frames) for video in videos] == FRAMES
    assert [model.encode([video]).visual.count(True) for video in videos] == [Q * frames for frames in FRAMES]
    spread = greys(model.encoder.open(videos[-1]))
    # The middles of eight equal parts of 90 frames, of which frame i has the grey 2 * i.
    assert spread == pytest.approx([2 * (90 * (2 * i + 1) // 16) for i in range(8)], abs=4)
    assert greys(assembled(parts, fps=1).encoder.open(videos[-1])) == pytest.approx(
        [2 * (90 * (2 * i + 1) // 18) for i in range(9)], abs=4
    )


CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "at most as many frames as there are": ({"fps": 100}, [1, 5, 12, 30, 64]),
    "a least number": ({"fps": 1, "least": 4, "most": 6}, [4, 4, 4, 4, 6]),
    "a number, or all of a shorter one": ({"most": 7}, [1, 5, 7, 7, 7]),
    "whole segments": ({"frames": 3, "most": 8}, [3, 6, 6, 6, 6]),
    "a budget of tokens": ({"fps": 2, "max_tokens": 5 * Q + 3}, [1, 1, 2, 5, 5]),
    "a budget of tokens, two frames a segment": ({"fps": 2, "frames": 2, "max_tokens": 2 * Q}, [2, 2, 2, 4, 4]),
    "pooled segments keep all features": ({"frames": 2, "pool": "none", "fps": 2, "max_tokens": 99}, [2, 2, 2, 6, 6]),
}


@pytest.mark.parametrize("name", CASES)
def test_limits_of_the_number_of_frames(name: str, parts: tuple[str, str], videos: list[Path]) -> None:
    options, expected = CASES[name]
    other = assembled(parts, **options)
    clips = [other.encoder.open(video) for video in videos]
    assert [len(clip.frames) for clip in clips] == expected
    counts = [other.encode([video]).visual.count(True) for video in videos]
    assert counts == [other.encode([clip]).visual.count(True) for clip in clips], "the same before and after opening"
    assert counts == [len(other.see_images([video])) for video in videos]
    assert max(counts) <= other.tokens_per_image
    assert all(len(other.encoder.open(clip).frames) == len(clip.frames) for clip in clips)


def test_every_frame_has_the_features_of_the_image_encoder(model: Any, videos: list[Path]) -> None:
    clip = model.encoder.open(videos[3])
    frames = model.encoder.of(model.encoder.of.preprocess(list(clip.frames)))
    features = FeatureStore(model)([videos[3]])
    torch.testing.assert_close(features, frames)
    torch.testing.assert_close(model.see_images([videos[3]]), model.connector(frames).flatten(0, 1))


def test_what_reads_whole_videos_reads_the_middle(model: Any, videos: list[Path]) -> None:
    rows = [[video] for video in videos]
    features = FeatureStore(model)(videos)
    torch.testing.assert_close(Inputs(model, rows, features, None).features, model.features(videos))
    middle = [clip.frames[len(clip.frames) // 2] for clip in map(model.encoder.open, videos)]
    torch.testing.assert_close(model.features(videos), model.encoder.of(model.encoder.of.preprocess(middle)))


IMAGE = tiny_image(7, (80, 30))


@pytest.fixture(scope="module")
def prompts(videos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """Return prompts with videos of all lengths, in several forms, with images beside them, and without any."""
    IMAGE.save(path := tmp_path_factory.mktemp("image") / "image.png")
    return [
        *(["See ", video, ". It is"] for video in videos),
        ["an image ", path, " and a video ", videos[3], " show"],
        [VideoFile(videos[2]), "and", IMAGE, "are"],
        [videos[3].read_bytes(), "is"],
        [[tiny_image(seed) for seed in range(5)], "moves"],
        ["nothing at all"],
    ]


def test_a_batch_equals_its_prompts_one_by_one(model: Any, prompts: list[list[Any]]) -> None:
    alone = [str(model.generate([prompt], max_new_tokens=6)[0]) for prompt in prompts]
    assert len(set(alone)) > 3
    assert list(map(str, model.generate(prompts, max_new_tokens=6))) == alone
    shown = [prompt for prompt in prompts if len(prompt) > 1]
    views = model.see_each([prompt[:-1] for prompt in shown])
    asked = views.continue_with([[prompt[-1]] for prompt in shown], max_new_tokens=6)
    assert [answers[0] for answers in asked] == alone[: len(shown)]


@pytest.mark.parametrize("form", ["image", "path", "file", "bytes"])
def test_an_image_is_a_video_of_one_frame(form: str, model: Any, tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "image.webp", lossless=True)
    forms: dict[str, Callable[[Path], Any]] = {
        "image": lambda path: IMAGE,
        "path": lambda path: path,
        "file": ImageFile,
        "bytes": lambda path: ImageBytes(path.read_bytes(), "one"),
    }
    image = forms[form](tmp_path / "image.webp")
    assert model.encode([image]).visual.count(True) == Q
    expected = model.connector(model.encoder.of(model.encoder.of.preprocess([IMAGE])))
    torch.testing.assert_close(model.see_images([image]), expected.flatten(0, 1))


def test_a_chat_has_videos_and_images_in_any_turn(model: Any, videos: list[Path], tmp_path: Path) -> None:
    """Every answer is that of the whole conversation at once, although the KV cache of earlier turns is kept."""
    chat = model.chat()
    turns: list[tuple[str, list[Any]]] = [
        ("What?", [VideoFile(videos[3]), IMAGE]),
        ("And now?", []),
        ("And this?", [[tiny_image(seed) for seed in range(3)]]),
        ("Again?", [videos[2]]),
    ]
    for text, images in turns:
        before = list(chat.messages)
        answer = chat.send(text, images, max_new_tokens=5)
        assert answer == model.chat(messages=before).send(text, images, max_new_tokens=5)
    assert chat._cache is not None  # the first turns are in it
    with pytest.raises(MLLMError, match="list of frames"):
        chat.save(tmp_path / "chat.json")


def test_a_conversation_names_its_videos(model: Any, videos: list[Path], tmp_path: Path) -> None:
    import base64

    url = f"data:video/mp4;base64,{base64.b64encode(videos[3].read_bytes()).decode()}"
    forms: list[dict[str, Any]] = [
        {"type": "video", "video": str(videos[3])},
        {"type": "video_url", "video_url": {"url": url}},
    ]
    answers = set()
    for part in forms:
        chat = model.chat(messages=[{"role": "user", "content": [part, {"type": "text", "text": "See?"}]}])
        chat.messages.append({"role": "assistant", "content": [{"type": "text", "text": "Yes."}]})
        saved = json.loads(chat.save(tmp_path / "chat.json").read_text())
        assert saved[0]["content"][0]["type"] == part["type"]
        answers |= {m.send("What?", max_new_tokens=6) for m in (chat, model.chat(messages=saved))}
    assert len(answers) == 1
    with pytest.raises(MLLMError, match="nothing is downloaded"):
        model.chat(messages=[{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "http://x/y"}}]}])


def test_features_are_cached_by_video_and_sampling(parts: tuple[str, str], videos: list[Path], tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [
        {"frames": 1},
        {"fps": 2},
        {"fps": 1},
        {"fps": 2, "most": 5},
        {"most": 5},
        {"fps": 2, "least": 2},
        {"fps": 2, "frames": 2},
        {"fps": 2, "frames": 2, "pool": "none"},
    ]
    models = [assembled(parts, **each) for each in options]
    assert len({features_folder(model) for model in models}) == len(options)
    same = assembled(parts, fps=2, max_tokens=5 * Q)  # the limit that a budget makes is one of frames
    assert features_folder(same) == features_folder(models[3])
    store = FeatureStore(models[1], folder=tmp_path)
    computed = store(videos)
    store.flush()
    read = FeatureStore(models[1], folder=tmp_path, chunk=3)
    models[1].encoder.forward = None  # nothing is computed again
    torch.testing.assert_close(read([*videos[3:], *videos[:3]]), computed.roll(-models[1].tiles_of(videos[:3]), 0))


def test_a_fixed_number_of_frames_is_as_before(parts: tuple[str, str], videos: list[Path]) -> None:
    fixed = assembled(parts)
    assert fixed.encoder.settings() == {
        "frames": 4,
        "pool": "mean",
        "keep": 1,
        "of": ["VisionModel", fixed.encoder.of.settings()],
    }
    assert (fixed.tiling, fixed.counts, fixed.tokens_per_image) == (None, Q, Q)
    assert fixed.encode([Path("no-such-video.mp4")]).visual.count(True) == Q, "no video is looked at"
    clip = open_clip(videos[3], 4)
    frames = fixed.encoder.of(fixed.encoder.of.preprocess(list(clip.frames)))
    assert torch.equal(fixed.features([videos[3]]), frames[None].mean(1))
    with pytest.raises(MLLMError, match="not a readable video"):
        fixed.encoder.open(ImageBytes(b"\x89PNG", "no video"))


def test_saved_and_loaded_it_samples_alike(model: Any, prompts: list[list[Any]], tmp_path: Path) -> None:
    loaded = mllm.load(model.save(tmp_path / "saved"))
    assert list(map(str, loaded.generate(prompts, max_new_tokens=4))) == list(
        map(str, model.generate(prompts, max_new_tokens=4))
    )


def test_a_run_on_videos_of_all_lengths(parts: tuple[str, str], videos: list[Path], tmp_path: Path) -> None:
    """Each video is read, one that is damaged is left out, and the plan counts the most tokens."""
    (tmp_path / "bad.mp4").write_bytes(videos[0].read_bytes()[:300])
    rows = [{"image": str(video), "caption": f"video {number}"} for number, video in enumerate(videos * 3)]
    (tmp_path / "train.json").write_text(json.dumps([*rows, {"image": str(tmp_path / "bad.mp4"), "caption": "x"}]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
name: films
encoder: {{type: video, fps: 2, most: 8, of: {{model: {parts[0]}}}}}
lm: {{model: {parts[1]}}}
connector: {{type: linear}}
data:
  train: {{format: table, path: {tmp_path}/train.json, images: /}}
  group_by_length: 4
  skip: 0.2
stages:
  - {{name: align, train: {{connector: 1.0e-3}}, steps: 8, batch_size: 4}}
""")
    mllm.train(str(recipe), out=tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert any("bad.mp4" in str(line) for line in log)
    assert plan(str(recipe)).stages[0].tokens_per_image == 8 * Q
    reports, _ = inspect(str(recipe))
    assert any("bad.mp4" in problem for problem in reports[0].problems)


BAD: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "no frames": (lambda folder, video: [], "clip has no frames"),
    "no clip frames": (lambda folder, video: Clip(()), "clip has no frames"),
    "no frames in a file": (lambda folder, video: without_frames(folder / "one.avi"), r"^\S*one\.avi has no frames: "),
    "no stream": (
        lambda folder, video: without_frames(folder / "one.mp4"),
        r"^\S*one\.mp4 has no video stream, so no frames\. Give a file with a video\.$",
    ),
    "half": (lambda folder, video: written(folder, video.read_bytes()[:600]), r"one\.mp4 is not a readable video"),
    "empty": (lambda folder, video: written(folder, b""), r"one\.mp4 is not a readable video"),
    "text": (lambda folder, video: written(folder, b"words " * 99), r"one\.mp4 is not a readable video"),
    "missing": (lambda folder, video: folder / "none.mp4", r"none\.mp4"),
    "bytes": (lambda folder, video: VideoBytes(b"\0" * 99, "the clip"), "the clip is not a readable video"),
    "folder": (lambda folder, video: folder, "There is no video file"),
}


def without_frames(path: Path) -> Path:
    """Write a video's header alone: of AVI it names a stream of 0 frames, of MP4 none."""
    with av.open(str(path), "w") as container:
        container.add_stream("mpeg4", rate=10)
        container.start_encoding()
    return path


def written(folder: Path, data: bytes) -> Path:
    (folder / "one.mp4").write_bytes(data)
    return folder / "one.mp4"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_video_is_named_in_one_message(name: str, model: Any, videos: list[Path], tmp_path: Path) -> None:
    make, message = BAD[name]
    video = make(tmp_path, videos[3])
    for ask in (
        lambda: model.generate([["See ", video]]),
        lambda: model.see([video]),
        lambda: model.chat().send("What?", [video]),
    ):
        with pytest.raises(MLLMError, match=message):
            ask()


def test_whatever_is_damaged_is_one_message(videos: list[Path]) -> None:
    """A header or a packet may be anything, and so may what FFmpeg makes of it."""
    generator, sampling = random.Random(0), Sampling(2, 5.0, 2, 8)
    for number in range(120):
        data = bytearray(videos[3].read_bytes())
        data = data[: generator.randrange(len(data))] if number % 2 else data
        for _ in range(generator.randrange(1, 30)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            layout = sampling.of(bytes(data))
            assert len(sampling.open(bytes(data)).frames) == 2 * layout.tiles
        except MLLMError as error:
            assert f"the video of {len(data)} bytes" in str(error)


def test_a_file_that_is_replaced_is_read_again(model: Any, videos: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    for number in (3, 2):
        path.write_bytes(videos[number].read_bytes())
        assert model.encode([path]).visual.count(True) == Q * FRAMES[number]


def test_the_length_is_that_of_the_decoded_frames(tmp_path: Path) -> None:
    frames = [tiny_image(seed, (64, 48)) for seed in range(25)]
    for suffix in ("mp4", "mov", "mkv", "avi"):
        length = length_of(tiny_video(tmp_path / f"clip.{suffix}", frames, rate=10))
        assert (length.frames, length.side) == (25, 64 * 48), suffix
        assert length.seconds == pytest.approx(2.5), suffix


def test_a_prompt_that_passes_the_context_names_its_videos(
    parts: tuple[str, str], videos: list[Path], tmp_path: Path
) -> None:
    short = mllm.assemble(
        {"type": "video", "of": {"model": parts[0]}, "fps": 2}, tiny_lm(tmp_path / "lm", context=100), "linear"
    )
    for video in (videos[4], short.encoder.open(videos[4])):
        with pytest.raises(MLLMError, match=r"4\.mp4: 288 tokens.*context is 100 tokens.*fewer tokens"):
            short.see([video])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "least over most": ({"fps": 1, "least": 9, "most": 8}, r"encoder\.least is 9"),
    "segment over most": ({"frames": 9, "most": 8}, r"a segment has frames=9"),
    "a limit without a rate": ({"max_tokens": 100}, r"Set encoder\.fps or encoder\.most"),
    "no budget for a frame": ({"fps": 1, "max_tokens": 15}, r"encoder\.max_tokens is 15, and 1 frames take 16"),
    "no budget for the least": ({"fps": 1, "least": 3, "max_tokens": 47}, r"3 frames take 48"),
    "no rate": ({"fps": 0}, "fps"),
    "keep": ({"fps": 1, "pool": "merge", "keep": 2}, r"keep from 1 to frames=1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_contradict_each_other_are_one_message(name: str, parts: tuple[str, str]) -> None:
    options, message = WRONG[name]
    with pytest.raises(MLLMError, match=message):
        assembled(parts, **options)


def test_cross_attention_needs_one_number_of_tokens(parts: tuple[str, str]) -> None:
    encoder = {"type": "video", "of": {"model": parts[0]}, "fps": 1}
    with pytest.raises(MLLMError, match=r"gated.*number varies"):
        mllm.assemble(encoder, parts[1], "linear", adapters=[{"type": "gated"}])


def test_a_plan_needs_no_video(parts: tuple[str, str]) -> None:
    spec = checked(EncoderSpec, {"type": "video", "of": {"model": parts[0]}, "frames": 2, "most": 7})
    with torch.device("meta"):
        encoder = encoder_of(spec, seed=0)
    assert encoder.tiling is not None and [layout.tiles for layout in encoder.tiling.fullest] == [3]
