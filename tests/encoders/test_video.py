"""Test video encoders: video files that the tests write, read as frames, encoded and pooled."""

from __future__ import annotations

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
from mllm.encoders.video import merged, slopes
from mllm.errors import MLLMError
from mllm.media.images import ImageFile, source_of
from mllm.media.videos import Clip, frame_indices, open_clip
from mllm.registry import lookup
from mllm.testing import tiny_encoder, tiny_image, tiny_lm


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a video of twelve frames, each of another grey level: 0, 20, 40, ..."""
    return film(tmp_path_factory.mktemp("clip") / "clip.mp4", [Image.new("L", (64, 48), 20 * i) for i in range(12)])


@pytest.fixture(scope="module")
def image_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


def film(path: Path, frames: list[Image.Image]) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())
    return path


def built(of: str, **values: Any) -> Any:
    return encoder_of(checked(EncoderSpec, {"type": "video", "of": {"model": of}, **values}), seed=0)


def greys(clip: Clip) -> list[float]:
    return [float(np.asarray(frame).mean()) for frame in clip.frames]


def test_frames_are_evenly_spaced() -> None:
    assert frame_indices(12, 4) == [1, 4, 7, 10]
    assert frame_indices(3, 3) == [0, 1, 2]
    assert frame_indices(2, 4) == [0, 0, 1, 1]
    assert frame_indices(100, 1) == [50]


@pytest.mark.parametrize("form", [Path, str, lambda p: p.read_bytes(), ImageFile, source_of])
def test_a_file_is_read_in_every_form(clip: Path, form: Any) -> None:
    assert greys(open_clip(form(clip), 4)) == pytest.approx([20.0, 80, 140, 200], abs=4)


def test_a_list_of_images_is_a_clip() -> None:
    images = [tiny_image(seed) for seed in range(3)]
    assert open_clip(images, 3).frames == tuple(images)
    assert len(open_clip(Clip((images[0],)), 4).frames) == 4
    assert Clip((images[0],)).key() != Clip((images[1],)).key()


def test_unreadable_videos_are_refused(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = tmp_path / "half.mp4"
    half.write_bytes(clip.read_bytes()[:600])
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{clip}\n#EXT-X-ENDLIST\n")
    for piece, message in (
        (half, "half.mp4 is not a readable video"),
        (playlist, "is not a readable video"),
        (tmp_path / "none.mp4", "There is no video file"),
        (b"nothing", "the video of 7 bytes is not a readable video"),
        (tiny_image(), "Image is not a video, and this encoder takes videos. Give a path or bytes"),
        (Clip(()), "no frames"),
    ):
        with pytest.raises(MLLMError, match=message):
            open_clip(piece, 2)
    monkeypatch.setattr("mllm.media.videos.MAX_FRAMES", 10)
    with pytest.raises(MLLMError, match="more than 10 frames"):
        open_clip(clip, 2)
    monkeypatch.setattr("mllm.media.videos.MAX_BYTES", 10)
    with pytest.raises(MLLMError, match="at most 10 are read"):
        open_clip(clip, 2)


@pytest.mark.parametrize(
    ("pool", "patches", "grid"),
    [("mean", 16, (4, 4)), ("slope", 16, (4, 4)), ("none", 48, (12, 4)), ("merge", 32, (8, 4))],
)
def test_frames_go_through_the_image_encoder(image_encoder: str, pool: str, patches: int, grid: Any) -> None:
    video = built(image_encoder, frames=3, pool=pool, keep=2 if pool == "merge" else 1)
    clips = [Clip(tuple(tiny_image(3 * n + seed) for seed in range(3))) for n in range(2)]
    assert (video.num_patches, video.grid, video.dim) == (patches, grid, 24)
    features = video(video.preprocess(clips))
    per_frame = torch.stack([video.of(video.of.preprocess(clip.frames)) for clip in clips])  # (B, T, P, D_vis)
    expected = {
        "mean": per_frame.mean(1),
        "slope": torch.tensor(np.polyfit([-1, 0, 1], per_frame.detach().transpose(0, 1).flatten(1), 1)[0]),
        "none": per_frame.flatten(1, 2),
        "merge": merged(per_frame, 2).flatten(1, 2),
    }[pool]
    torch.testing.assert_close(features, expected.view_as(features).to(features.dtype), atol=1e-5, rtol=1e-4)
    assert features.shape == (2, patches, 24)


def test_slopes_say_what_comes_and_what_goes() -> None:
    one, other = torch.eye(2)
    frames = torch.stack([one, one, other, other])[None, :, None]  # (1, 4, 1, 2)
    assert torch.equal(slopes(frames), -slopes(frames.flip(1))) and slopes(frames)[0, 0].tolist()[0] < 0
    assert not slopes(frames[:, :1]).any() and slopes(frames[:, :1].expand(-1, 5, -1, -1)).abs().max() < 1e-6


def test_merging_averages_the_most_similar_frames_and_keeps_the_order() -> None:
    a, b, c = torch.eye(3)
    frames = torch.stack([a, b, b + 0.1 * c, c])[None, :, None]  # (1, 4, 1, 3)
    result = merged(frames, 3)[0, :, 0]
    torch.testing.assert_close(result, torch.stack([a, b + 0.05 * c, c]))
    features = torch.randn(2, 5, 4, 3)
    torch.testing.assert_close(merged(features, 1)[:, 0], features.mean(1))
    assert torch.equal(merged(features, 5), features)


def test_a_temporal_transformer_is_a_connector(image_encoder: str) -> None:
    sizes = {"vis_dim": 8, "lm_dim": 12, "num_patches": 64, "grid": (16, 4)}
    connector = lookup("connectors", "temporal")(**sizes, dim=16, heads=2, then={"type": "mlp", "tokens": 4}).eval()
    features = torch.randn(2, 64, 8)
    assert connector(features).shape == (2, 4, 12) and connector.num_tokens == 4
    backwards = features.unflatten(1, (4, 16)).flip(1).flatten(1, 2)
    assert (connector(features) - connector(backwards)).abs().max() > 1e-4, "the order of the frames matters"
    with pytest.raises(MLLMError, match=r"connector\.frames is 3"):
        lookup("connectors", "temporal")(**sizes, frames=3)


def test_a_model_answers_about_a_file_alike_in_a_batch_and_alone(
    clip: Path, image_encoder: str, tmp_path: Path
) -> None:
    encoder = {"type": "video", "of": {"model": image_encoder}, "frames": 2, "pool": "none"}
    connector = {"type": "temporal", "frames": 2, "dim": 16, "heads": 2}
    model = mllm.assemble(encoder, tiny_lm(tmp_path / "lm"), connector)
    other = film(tmp_path / "other.avi", [tiny_image(seed, (64, 48)) for seed in range(5)])
    prompts = [[clip, "What happens?"], ["Then", source_of(other)]]
    together = [str(answer) for answer in model.generate(prompts, max_new_tokens=4)]
    assert together == [str(model.generate([prompt], max_new_tokens=4)[0]) for prompt in prompts]
    saved = mllm.load(model.save(tmp_path / "saved"))
    assert [str(answer) for answer in saved.generate(prompts, max_new_tokens=4)] == together


def test_wrong_settings_are_refused_on_the_meta_device(image_encoder: str) -> None:
    with torch.device("meta"):
        assert built(image_encoder, frames=3, pool="none").num_patches == 48
        with pytest.raises(MLLMError, match="pool mean, slope, none or merge"):
            built(image_encoder, pool="max")
        with pytest.raises(MLLMError, match=r"encoder\.keep is 5.*keep from 1 to frames=4"):
            built(image_encoder, pool="merge", keep=5)
