"""Test audio encoders: sound files that the tests write, encoded by tiny audio models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModel

import mllm
from mllm.build import encoder_of
from mllm.config.messages import checked
from mllm.config.parts import EncoderSpec
from mllm.errors import MLLMError
from mllm.media.images import source_of
from mllm.media.sounds import Sound, open_sound
from mllm.testing import AUDIO_FAMILIES, tiny_image, tiny_lm


def tone(pitch: float, rate: int = 16000, seconds: float = 0.5) -> np.ndarray[Any, Any]:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate).astype(np.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in AUDIO_FAMILIES.items()}


def built(model: str, **values: Any) -> Any:
    return encoder_of(checked(EncoderSpec, {"type": "audio", "model": model, **values}), seed=0)


def test_a_file_is_resampled_and_mixed_to_mono(tmp_path: Path) -> None:
    for suffix, rate in (("wav", 44100), ("flac", 8000), ("ogg", 48000)):
        stereo = np.stack([tone(440, rate), tone(440, rate)], axis=1)
        soundfile.write(tmp_path / f"a.{suffix}", stereo, rate)
        sound = open_sound(tmp_path / f"a.{suffix}", 16000, 1)
        assert sound.rate == 16000 and len(sound.samples) == pytest.approx(8000, abs=2)
        spectrum = np.abs(np.fft.rfft(sound.samples[:8000], 8000))
        assert spectrum.argmax() == 220, "440 Hz, in steps of 2"
    same = open_sound((tmp_path / "a.wav").read_bytes(), 44100, 1)
    assert np.abs(same.samples - tone(440, 44100)).max() < 1e-3


def test_unreadable_sounds_are_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", tone(440, seconds=2), 16000)
    (tmp_path / "text.wav").write_text("no sound")
    for piece, message in (
        (tmp_path / "long.wav", r"is 2\.00 seconds long; expected more than 0 and at most 1"),
        (tmp_path / "text.wav", "text.wav is not a readable sound"),
        (tmp_path / "none.wav", "There is no sound file"),
        (Sound(np.zeros(0, dtype=np.float32), 16000), "is 0.00 seconds long"),
        (tiny_image(), "Image is not a sound"),
    ):
        with pytest.raises(MLLMError, match=message):
            open_sound(piece, 16000, 1)


@pytest.mark.parametrize("family", AUDIO_FAMILIES)
@pytest.mark.parametrize("layer", [None, -2])
def test_features_are_those_of_the_whole_model_and_the_tower_is_truncated(
    folders: dict[str, str], family: str, layer: int | None
) -> None:
    encoder = built(folders[family], seconds=1, layer=layer)
    sounds = [Sound(tone(440), 16000), Sound(tone(300, seconds=1.0), 16000)]
    inputs = encoder.preprocess(sounds)
    features = encoder(inputs)
    whole = AutoModel.from_pretrained(folders[family]).eval()
    whole = whole.get_encoder() if family == "whisper" else whole
    options: dict[str, Any] = {}
    if family == "hubert":  # trained with attention masks: the padding is masked
        batch = encoder.processor([sound.samples for sound in sounds], sampling_rate=16000, padding="max_length",
                                 max_length=16000, return_tensors="pt")  # fmt: skip
        options["attention_mask"] = batch["attention_mask"]
    with torch.no_grad():
        output = whole(inputs, output_hidden_states=True, **options)
    assert torch.equal(features, output.last_hidden_state if layer is None else output.hidden_states[layer])
    assert features.shape == (2, encoder.num_patches, 24) and encoder.grid is None
    sizes = [sum(p.numel() for p in model.parameters()) for model in (encoder, whole)]
    assert sizes[0] < sizes[1] if layer else sizes[0] <= sizes[1]
    alone = torch.cat([encoder(encoder.preprocess([sound])) for sound in sounds])
    torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)
    pooled = built(folders[family], seconds=1, layer=layer, select="pooled")
    torch.testing.assert_close(pooled(inputs)[:, 0], features.mean(1))
    with torch.device("meta"):
        on_meta = built(folders[family], seconds=1, layer=layer)
    assert (on_meta.num_patches, on_meta.dim) == (encoder.num_patches, encoder.dim)


def test_length_defaults_to_the_models_and_unsupported_lengths_are_refused(folders: dict[str, str]) -> None:
    assert built(folders["whisper"]).seconds == 1
    assert built(folders["wav2vec2"], seconds=2).num_patches > built(folders["wav2vec2"], seconds=1).num_patches
    with pytest.raises(MLLMError, match="does not accept 2 seconds of sound"):
        built(folders["whisper"], seconds=2)
    with pytest.raises(MLLMError, match=r"encoder\.layer is 7"):
        built(folders["hubert"], layer=7)


def test_a_model_answers_about_a_sound(folders: dict[str, str], tmp_path: Path) -> None:
    model = mllm.assemble({"type": "audio", "model": folders["whisper"]}, tiny_lm(tmp_path / "lm"), "resampler")
    soundfile.write(tmp_path / "a.wav", tone(440), 16000)
    soundfile.write(tmp_path / "b.wav", tone(300, 8000), 8000)
    prompts = [[tmp_path / "a.wav", "What is heard?"], ["And here?", source_of(tmp_path / "b.wav")]]
    together = [str(answer) for answer in model.generate(prompts, max_new_tokens=4)]
    assert together == [str(model.generate([prompt], max_new_tokens=4)[0]) for prompt in prompts]
