"""Saved models: a loaded model equals the saved one, on the parts it was trained on; otherwise there is one message."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import mllm
from mllm import saving as checkpoint
from mllm.errors import MLLMError
from mllm.testing import tiny_encoder, tiny_image, tiny_lm
from mllm.testing.lms import LM_FAMILIES

PROMPT = [["A picture of", tiny_image(1), "and", tiny_image(2)]]
Model = Callable[..., Any]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        embeds, batch = model.prepare(PROMPT)
        return torch.as_tensor(model.lm.logits(embeds, batch.mask))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def about(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "assembly.json").read_text())
    return content


def relabel(folder: Path, **fields: Any) -> None:
    (folder / "assembly.json").write_text(json.dumps({**about(folder), **fields}))


def exchange(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the saved tensors, and the checksum in assembly.json with them."""
    file = folder / about(folder)["tensors"]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    relabel(folder, sha256=hashlib.sha256(file.read_bytes()).hexdigest())


@pytest.fixture
def saved(tiny_model: Model, tmp_path: Path) -> Path:
    return Path(tiny_model(seed=3).save(tmp_path / "model"))


def test_a_loaded_model_computes_the_same_logits_as_the_saved_one(tiny_model: Model, tmp_path: Path) -> None:
    model = tiny_model({"type": "linear", "tokens": 4}, seed=3, prompt={"caption": "It shows"})
    with torch.no_grad():
        model.connector.project.weight.mul_(
            1.5
        )  # as training would, so that the seed alone does not give these weights
    loaded = mllm.load(model.save(tmp_path / "model"))
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(tiny_model({"type": "linear", "tokens": 4}, seed=3)))
    assert loaded.spec == model.spec


def test_folder_holds_the_trained_tensors_and_their_label_only(saved: Path, tiny_model: Model) -> None:
    label = about(saved)
    assert names(saved) == {"assembly.json", label["tensors"]}
    assert label["sha256"] == hashlib.sha256((saved / label["tensors"]).read_bytes()).hexdigest()
    assert label["tensors"] == f"trained-{label['sha256'][:12]}.safetensors"
    assert set(load_file(saved / label["tensors"])) == {"connector.project.weight", "connector.project.bias"}
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o644}


def test_a_run_is_loaded_by_its_folder(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    saved.rename(run / "model")
    assert torch.equal(logits(mllm.load(run)), logits(mllm.load(str(run / "model"))))
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(MLLMError, match=r"There is no model in .*: no assembly.json, there or in its folder model"):
            mllm.load(folder)


def test_saving_again_replaces_the_model_and_leaves_no_stale_file(saved: Path, tiny_model: Model) -> None:
    former = names(saved)
    model = tiny_model(seed=4)
    model.save(saved)
    assert torch.equal(logits(mllm.load(saved)), logits(model))
    assert names(saved) == {"assembly.json", about(saved)["tensors"]} != former
    model.save(saved)  # the same content under the same name
    assert torch.equal(logits(mllm.load(saved)), logits(model))


@pytest.mark.parametrize("part", ["encoder", "lm"])
def test_other_parts_are_refused_with_both_fingerprints(saved: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "other"  # of the same shape: only the fingerprint differs
    other = tiny_encoder(folder, seed=9) if part == "encoder" else tiny_lm(folder, seed=9)
    label = about(saved)
    label["spec"][part]["model"] = other
    relabel(saved, **label)
    weights = hashlib.sha256((Path(other) / "model.safetensors").read_bytes()).digest()
    here, there = hashlib.sha256(weights).hexdigest()[:16], label["fingerprints"][part][:16]
    with pytest.raises(MLLMError, match=f"trained on another {part}.*{there}.*{here}.*Restore the original {part}"):
        mllm.load(saved)


def test_fingerprints_of_an_earlier_version_are_compared_by_weights_and_warn_once(
    saved: Path, tiny_parts: tuple[str, str], tmp_path: Path
) -> None:
    files = [(Path(part) / "model.safetensors").read_bytes() for part in tiny_parts]
    weights = [hashlib.sha256(hashlib.sha256(file).digest()).hexdigest() for file in files]
    complete = about(saved)["fingerprints"]
    relabel(saved, fingerprints=dict(zip(("encoder", "lm"), weights, strict=True)))
    with pytest.warns(UserWarning, match=f"{saved} has the fingerprints of an earlier version"):
        model = mllm.load(saved)
    mllm.load(saved)  # a second warning would be an error here
    assert about(Path(model.save(tmp_path / "again")))["fingerprints"] == complete
    relabel(saved, fingerprints={"encoder": weights[0], "lm": weights[0]})
    with pytest.raises(MLLMError, match="trained on another lm: its fingerprint is"):
        mllm.load(saved)


def test_a_label_without_fingerprints_is_refused(saved: Path) -> None:
    relabel(saved, fingerprints={})
    with pytest.raises(MLLMError, match="trained on another encoder: its fingerprint is none"):
        mllm.load(saved)


@pytest.mark.parametrize(
    ("change", "odd"),
    [
        (lambda tensors: tensors.pop("connector.project.bias"), "connector.project.bias"),
        (lambda tensors: tensors.update({"connector.extra": torch.zeros(1)}), "connector.extra"),
        (lambda tensors: tensors.update({"connector.project.bias": torch.zeros(31)}), "connector.project.bias"),
        (lambda tensors: tensors.update({"lm.model.lm_head.weight": torch.zeros(1)}), "lm.model.lm_head.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved: Path, change: Callable[[Any], object], odd: str) -> None:
    exchange(saved, lambda tensors: None)
    mllm.load(saved)  # so the change causes the error below
    exchange(saved, change)
    with pytest.raises(MLLMError, match=f"missing, unknown or of another shape are {odd}"):
        mllm.load(saved)


def test_tensors_that_were_exchanged_cut_short_or_lost_are_refused(
    saved: Path, tiny_model: Model, tmp_path: Path
) -> None:
    file = saved / about(saved)["tensors"]
    whole = file.read_bytes()
    other = Path(tiny_model(seed=4).save(tmp_path / "other"))
    for content in ((other / about(other)["tensors"]).read_bytes(), whole[:-1], b""):
        file.write_bytes(content)
        with pytest.raises(MLLMError, match=r"does not have the checksum in assembly.json"):
            mllm.load(saved)
    file.unlink()
    with pytest.raises(MLLMError, match=r"trained-.*safetensors cannot be read: No such file"):
        mllm.load(saved)


def test_another_versions_format_names_that_version(saved: Path) -> None:
    relabel(saved, format=99, version="7.0", spec="who knows")
    with pytest.raises(MLLMError, match=r"is of format 99, and .* reads format 1. It was written by mllm 7.0"):
        mllm.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "assembly.json"),
        ("{}", "is of format None"),
        ({"tensors": "../../secret.safetensors"}, "tensors: '../../secret.safetensors'"),
        ({"spec": {"lm": {}}}, "spec.lm.model: missing"),
        ({"sha256": None}, "sha256: None"),
    ],
)
def test_damaged_labels_are_explained(saved: Path, change: Any, message: str) -> None:
    if isinstance(change, str):
        (saved / "assembly.json").write_text(change)
    else:
        relabel(saved, **change)
    with pytest.raises(MLLMError, match=message):
        mllm.load(saved)


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_tensors(state: Any, path: Path) -> None:
    path.write_bytes(b"half")
    raise SafetensorError("No space left on device")


def full_label(self: Path, text: str, *_: Any, **__: Any) -> None:
    self.write_bytes(text.encode()[:10])
    full()


@pytest.mark.parametrize("write", ["tensors", "label", "move"])
@pytest.mark.parametrize("before", [True, False])
def test_full_disk_is_one_message_and_the_former_model_stays(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str, before: bool
) -> None:
    folder, former, new = tmp_path / "model", tiny_model(seed=3), tiny_model(seed=4)
    if before:
        former.save(folder)
    held = names(folder) if before else set()
    with monkeypatch.context() as patch:
        if write == "tensors":
            patch.setattr(checkpoint, "save_file", full_tensors)
        elif write == "label":
            patch.setattr(Path, "write_text", full_label)
        else:
            patch.setattr(os, "replace", full)
        with pytest.raises(MLLMError, match=r"could not be saved in .*No space left.*Free some space"):
            new.save(folder)
    assert names(folder) == held
    if before:
        assert torch.equal(logits(mllm.load(folder)), logits(former))
    assert torch.equal(logits(mllm.load(new.save(folder))), logits(new))


def test_a_kill_between_the_two_writes_leaves_the_former_model(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, former = Path(tiny_model(seed=3).save(tmp_path / "model")), tiny_model(seed=3)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", killed)
        patch.setattr(checkpoint, "_remove_stale", lambda folder: None)  # a killed process removes nothing
        with pytest.raises(KeyboardInterrupt):
            tiny_model(seed=4).save(folder)
    assert len(names(folder)) == 3, "the new tensors are there, unnamed by the label"
    assert torch.equal(logits(mllm.load(folder)), logits(former))
    former.save(folder)
    assert len(names(folder)) == 2


def test_a_folder_that_cannot_be_written_is_one_message(tiny_model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MLLMError, match=r"could not be saved in .*file"):
        tiny_model().save(tmp_path / "file")


@pytest.mark.parametrize("paths", [["lm"], ["lm.model.lm_head"], ["lm.model.transformer.wte", "connector"]])
def test_tied_weights_that_train_are_saved_once_and_stay_tied(
    paths: list[str], tmp_path: Path, tiny_parts: tuple[str, str]
) -> None:
    lm = LM_FAMILIES["gpt2"](tmp_path / "lm")
    tiny_image().save(tmp_path / "0.png")
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "0.png", "caption": "a dog"}]))
    recipe = {
        "name": "tied",
        "encoder": {"model": tiny_parts[0]},
        "lm": {"model": lm},
        "connector": {"type": "linear"},
        "data": {"train": {"format": "table", "path": str(tmp_path / "rows.json")}},
        "stages": [{"name": "a", "train": dict.fromkeys(paths, 0.01), "steps": 2, "batch_size": 1}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run = mllm.train(str(tmp_path / "recipe.yaml"), out=tmp_path / "run")
    model = mllm.load(run.path)
    embeddings, output = model.lm.model.get_input_embeddings(), model.lm.model.get_output_embeddings()
    assert embeddings.weight is output.weight
    assert not torch.equal(embeddings.weight, type(model.lm)(model=lm).model.get_input_embeddings().weight)
    (file,) = (tmp_path / "run" / "model").glob("trained-*.safetensors")
    saved = [name for name, tensor in load_file(file).items() if tensor.shape == output.weight.shape]
    assert len(saved) == 1
    torch.testing.assert_close(load_file(file)[saved[0]], output.weight, atol=0, rtol=0)
