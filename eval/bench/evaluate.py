"""Time an evaluation with as many questions per image as VQAv2, next to lmms-eval's model for `transformers`' LLaVA."""

from __future__ import annotations

import io
import statistics
import tempfile
from collections.abc import Callable, Sequence
from operator import eq
from pathlib import Path
from typing import Any

from mllm.eval.answers.base import Context
from mllm.eval.answers.text import Generate
from mllm.eval.bench.generate import THINGS, TOKENS
from mllm.eval.bench.shapes import IMAGE_TOKEN, llava, noise_images
from mllm.eval.bench.table import Row, paired, ratio, report
from mllm.eval.scoring import MODEL
from mllm.eval.suite import load_suite

from mllm.assembly import Assembly
from mllm.data.items import Item, question_text
from mllm.errors import MLLMError
from mllm.media.images import ImageBytes

IMAGES = 8
EACH = (5, 6, 5, 6, 5)  # questions on an image, in turn: 5.4 on average, as in VQAv2
TARGET = 4.0
AGREE = 0.95  # of the answers: a batch is rounded differently from a single row, which decides between equal tokens


def run(*, out: Path | None = None, repeats: int = 3, progress: Callable[[str], None] = print) -> list[Row]:
    """Run the measurement, print the table, and write it to ``out``.

    Raises:
        MLLMError: lmms-eval is not installed, or the two models answer differently.
    """
    with tempfile.TemporaryDirectory() as folder:
        ours, stock = llava(Path(folder) / "encoder")
        theirs = alternative(ours, stock, Path(folder) / "stock")
        row = questions(ours, theirs, items(IMAGES), repeats=repeats, progress=progress)
    report("eval", [row], out)
    return [row]


def alternative(ours: Assembly, stock: Any, folder: Path) -> Any:
    """Return lmms-eval's model of a stock LLaVA, which is saved with its processor."""
    try:
        from lmms_eval.models.simple.llava_hf import LlavaHf
    except ImportError as error:
        raise MLLMError(
            f"`mllm bench eval` needs lmms-eval, and {error.name} is missing: "
            f"pip install 'mllm-assembly[lmms-eval]' {error.name}, in an environment like that of `make test-extras`."
        ) from None
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    vision = stock.config.vision_config
    stock.save_pretrained(folder)
    images = CLIPImageProcessorPil.from_pretrained(folder.parent / "encoder", trust_remote_code=False)
    ours.lm.tokenizer.save_pretrained(folder)
    for file in folder.glob("*token*.json"):  # the image token is one that no prompt has
        file.write_text(file.read_text().replace(IMAGE_TOKEN, "<image>"))
    tokenizer = type(ours.lm.tokenizer).from_pretrained(folder, trust_remote_code=False)
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    whole = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    place = str(ours.device)
    return LlavaHf(
        pretrained=str(folder), device=place, device_map=place, dtype="float32", batch_size=1, chat_template=whole
    )


def items(images: int) -> list[Item]:
    """Return questions on JPEG images of 640 x 480 pixels."""
    questions = []
    for number, image in enumerate(noise_images(images)):
        buffer = io.BytesIO()
        image.resize((640, 480)).save(buffer, "JPEG")
        source = ImageBytes(buffer.getvalue(), f"image {number}")
        texts = [f"Is there a {thing} in the picture?" for thing in THINGS[: EACH[number % len(EACH)]]]
        questions += [Item(f"{number}/{n}", (source,), ("yes",), text) for n, text in enumerate(texts)]
    return questions


def questions(
    ours: Assembly, theirs: Any, asked: Sequence[Item], *, repeats: int, progress: Callable[[str], None]
) -> Row:
    """Time all questions on both sides, including the decoding and preprocessing of images."""
    same = sum(map(eq, answered(ours, asked), requested(ours, theirs, asked)))
    if same < AGREE * len(asked):
        raise MLLMError(f"{same} of {len(asked)} answers are the same, so the two models' times cannot be compared.")
    progress(f"{same} of {len(asked)} answers are the same")
    a, b = paired(
        lambda: answered(ours, asked), lambda: requested(ours, theirs, asked), repeats=repeats, progress=progress
    )
    return Row(
        name=f"{len(asked)} questions on {len({item.images for item in asked})} images",
        unit="questions/s",
        ours=len(asked) / statistics.median(a),
        alternative=len(asked) / statistics.median(b),
        ratio=ratio(a, b),
        wanted=TARGET,
    )


def answered(ours: Assembly, asked: Sequence[Item]) -> list[str]:
    """Answer as `mllm eval` does."""
    suite = load_suite("vqav2", [f"decoding.max_new_tokens={TOKENS}"])
    answers: list[str] = Generate().answers(ours, asked, Context(suite))[MODEL]
    return answers


def requested(ours: Assembly, theirs: Any, asked: Sequence[Item]) -> list[str]:
    """Answer as lmms-eval does."""
    from lmms_eval.api.instance import Instance

    theirs.task_dict = {"vqa": {"val": [item.images[0] for item in asked]}}
    requests = []
    for number, item in enumerate(asked):
        text = f"<image>{question_text(item, ours.spec.prompt)}"
        arguments = (text, {"max_new_tokens": TOKENS}, lambda image: [image.open()], number, "vqa", "val")
        about: dict[str, Any] = {"task": "vqa", "doc_id": number, "repeats": 1}
        requests.append(Instance("generate_until", arguments, number, about))
    return [str(answer).strip() for answer in theirs.generate_until(requests)]
