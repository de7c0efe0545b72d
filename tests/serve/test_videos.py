"""Test that the server takes videos of different lengths, and images beside them, in one batch."""

from __future__ import annotations

import base64
import concurrent.futures
import functools
from pathlib import Path
from typing import Any

import openai
import pytest

import mllm
from mllm.prompts.messages import checked_messages, turns
from mllm.testing import tiny_image, tiny_lm, tiny_video


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_parts: Any) -> Any:
    encoder = {"type": "video", "fps": 5, "of": {"model": tiny_parts[0]}}
    lm = tiny_lm(tmp_path_factory.mktemp("lm"), context=1024)
    return mllm.assemble(encoder, lm, {"type": "linear", "tokens": 4}, device="cpu")


def video_url(folder: Path, frames: int) -> str:
    path = tiny_video(folder / f"{frames}.mp4", [tiny_image(frames + i, (64, 48)) for i in range(frames)])
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def image_url(folder: Path) -> str:
    tiny_image(3).save(folder / "image.png")
    return f"data:image/png;base64,{base64.b64encode((folder / 'image.png').read_bytes()).decode()}"


def user(**urls: str) -> dict[str, Any]:
    """Return a message with a video, an image, or both."""
    parts = [{"type": kind, kind: {"url": url}} for kind, url in urls.items()]
    return {"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]}


def client(port: int) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=30)


def test_videos_of_different_lengths_are_answered_as_one_by_one_and_counted(
    model: Any, served: Any, tmp_path: Path
) -> None:
    asks = [user(video_url=video_url(tmp_path, frames)) for frames in (2, 6, 12)]
    asks.append(user(image_url=image_url(tmp_path), video_url=video_url(tmp_path, 6)))
    with served(model) as port, client(port) as api, concurrent.futures.ThreadPoolExecutor() as pool:
        send = functools.partial(api.chat.completions.create, model="tiny", max_tokens=8)
        answers = list(pool.map(lambda ask: send(messages=[ask]), asks))
    prompts = [turns(model, checked_messages([ask])) for ask in asks]
    alone = [str(model.generate([prompt], max_new_tokens=8)[0]) for prompt in prompts]
    assert [answer.choices[0].message.content for answer in answers] == alone
    first, *others = (answer.usage.prompt_tokens for answer in answers)
    assert [count - first for count in others] == [2 * 4, 5 * 4, 3 * 4]  # 1, 3 and 6 frames, and 3 with an image


def test_what_is_no_video_is_refused(model: Any, served: Any, tmp_path: Path) -> None:
    cases = [
        (user(video_url="data:video/mp4;base64,AAAA"), "video 1, a data URL is not a readable video"),
        (user(video_url="/etc/passwd"), "does not read"),
        (user(video_url="http://127.0.0.1/a.mp4"), "does not download"),
        ({"role": "user", "content": [{"type": "video_url", "video_url": 3}]}, "a video_url where the model reads"),
    ]
    with served(model) as port, client(port) as api:
        for message, reason in cases:
            with pytest.raises(openai.BadRequestError, match=reason):
                api.chat.completions.create(model="tiny", messages=[message])


def test_frames_count_as_pixels(model: Any, served: Any, tmp_path: Path) -> None:
    """Six frames, and the one that is being decoded."""
    ask = user(video_url=video_url(tmp_path, 12))
    with served(model, pixels=7 * 64 * 48 - 1) as port, client(port) as api:
        with pytest.raises(openai.BadRequestError, match=f"have {7 * 64 * 48} pixels"):
            api.chat.completions.create(model="tiny", messages=[ask])
        assert api.chat.completions.create(model="tiny", messages=[user(image_url=image_url(tmp_path))], max_tokens=3)


def test_a_model_of_images_says_that_it_takes_no_videos(tiny_parts: Any, served: Any, tmp_path: Path) -> None:
    images = mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 4}, device="cpu")
    with served(images) as port, client(port) as api, pytest.raises(openai.BadRequestError, match="takes no videos"):
        api.chat.completions.create(model="tiny", messages=[user(video_url=video_url(tmp_path, 2))])
