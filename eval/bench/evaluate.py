"""Evaluating: questions shaped as VQAv2's, beside lmms-eval's own model for `transformers`' LLaVA class."""

from __future__ import annotations

import io
import statistics
import tempfile
from collections.abc import Callable, Sequence
from operator import eq
from pathlib import Path
from typing import Any

from mllm.eval.answers.text import Answering
from mllm.eval.baselines import Condition
from mllm.eval.bench.generate import THINGS, TOKENS
from mllm.eval.bench.shapes import IMAGE_TOKEN, llava, pictures
from mllm.eval.bench.table import Row, paired, ratio, report
from mllm.eval.journal import Journal
from mllm.eval.suite import load_suite

from mllm.assembly import Assembly
from mllm.data.items import Item, question_text
from mllm.errors import MLLMError
from mllm.media.images import ImageBytes
from mllm.processes import progress as bars

IMAGES = 8
EACH = (5, 6, 5, 6, 5)  # questions on an image, in turn: 5.4 on average, as in VQAv2
WANTED = 4.0
AGREE = 0.95  # of the answers: a batch rounds otherwise than a single row, which decides where two words are level


def run(*, out: Path | None = None, repeats: int = 3, progress: Callable[[str], None] = print) -> list[Row]:
    """Measure, print the table, and write it to ``out``.

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
    """Return lmms-eval's model of a stock LLaVA, saved as its class and processor are."""
    try:
        from lmms_eval.models.simple.llava_hf import LlavaHf
    except ImportError as error:
        raise MLLMError(
            f"`mllm bench eval` runs beside lmms-eval, and {error.name} is missing: "
            f"pip install 'mllm-assembly[lmms-eval]' {error.name}, in an environment as `make test-extras` makes it."
        ) from None
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    vision = stock.config.vision_config
    stock.save_pretrained(folder)
    images = CLIPImageProcessorPil.from_pretrained(folder.parent / "encoder")
    ours.lm.tokenizer.save_pretrained(folder)
    for file in folder.glob("*token*.json"):  # a token that no prompt has is the one of an image
        file.write_text(file.read_text().replace(IMAGE_TOKEN, "<image>"))
    tokenizer = type(ours.lm.tokenizer).from_pretrained(folder)
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    whole = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return LlavaHf(
        pretrained=str(folder), device="cpu", device_map="cpu", dtype="float32", batch_size=1, chat_template=whole
    )


def items(images: int) -> list[Item]:
    """Return questions on pictures of 640 x 480 pixels, JPEG."""
    found = []
    for number, picture in enumerate(pictures(images)):
        buffer = io.BytesIO()
        picture.resize((640, 480)).save(buffer, "JPEG")
        source = ImageBytes(buffer.getvalue(), f"picture {number}")
        asked = [f"Is there a {thing} in the picture?" for thing in THINGS[: EACH[number % len(EACH)]]]
        found += [Item(f"{number}/{n}", (source,), ("yes",), text) for n, text in enumerate(asked)]
    return found


def questions(
    ours: Assembly, theirs: Any, asked: Sequence[Item], *, repeats: int, progress: Callable[[str], None]
) -> Row:
    """Time all questions on both sides, the pictures' decoding and preparation included."""
    same = sum(map(eq, answered(ours, asked), requested(ours, theirs, asked)))
    if same < AGREE * len(asked):
        raise MLLMError(f"{same} of {len(asked)} answers are the same, so the two models' times compare nothing.")
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
        wanted=WANTED,
    )


def answered(ours: Assembly, asked: Sequence[Item]) -> list[str]:
    """Answer as `mllm eval` does."""
    config = load_suite("vqav2", [f"decoding.max_new_tokens={TOKENS}"])
    condition = Condition(ours, lambda index: asked[index].images)
    with bars() as bar:
        return Answering(config, asked, Journal(None, {})).answers(condition, "model", bar)


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
