"""Make a run a model of lmms-eval: ``lmms_eval --model mllm --model_args run=runs/mine --tasks ...``.

lmms-eval finds it by the entry point ``lmms_eval.models``. Questions on one image share its encoding, and requests of
any lengths are batched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from mllm.build import load
from mllm.errors import MLLMError
from mllm.media.images import ImageSource, source_of
from mllm.processes import processes, progress
from mllm.prompts.formatting import formatted
from mllm.prompts.pieces import answer_text

MANIFEST = ModelManifest(model_id="mllm", simple_class_path="mllm.eval.lmms.Mllm")

_DECODING = ("max_new_tokens", "num_beams", "temperature", "top_p", "do_sample")

_Group = tuple[tuple[str, ...], dict[int, str]]  # the keys of images, and the texts about them by request


class Mllm(lmms):  # type: ignore[misc]
    """A run, or a saved model, with the interface of lmms-eval.

    Args:
        run: its folder.
        prompt: the prompt format of a task's text, with ``{question}`` for it; None: the recipe's for questions.
        batch_size: number of texts that are answered together.
        device: None: a GPU if there is one.

    Raises:
        MLLMError: the run cannot be loaded, or an argument is unknown.
    """

    def __init__(
        self,
        run: str,
        prompt: str | None = None,
        batch_size: int | str = 16,
        device: str | None = None,
        max_batch_size: Any = None,  # lmms-eval passes it to every model
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise MLLMError(f"The model mllm takes run, prompt, batch_size, device; not {', '.join(others)}.")
        state = processes()
        self._rank, self._world_size = state.process_index, state.num_processes
        self.model = load(run, device=None if state.num_processes > 1 else device)  # the launcher gives each its own
        self.device = self.model.device
        self.batch_size = int(batch_size)
        self._prompt = prompt or self.model.spec.prompt.question

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return an answer to each request, in their order."""
        answers: dict[int, str] = {}
        sources: dict[str, ImageSource] = {}
        groups: dict[Any, dict[int, str]] = {}  # images and settings -> texts by the request's index
        for index, request in enumerate(requests):
            context, settings, visual, doc, task, split = request.args
            keys = self._images(visual(self.task_dict[task][split][doc]), sources)
            groups.setdefault((keys, _decoding(settings)), {})[index] = self._text(context)
        by_settings: dict[Any, list[_Group]] = {}
        for (keys, settings), texts in groups.items():
            by_settings.setdefault(settings, []).append((keys, texts))
        with progress() as bar:
            task = bar.add_task("answering", total=len(requests), note="")
            for settings, members in by_settings.items():
                for batch in self._batches(members):
                    answers |= self._answered(batch, sources, dict(settings))
                    bar.update(task, completed=len(answers))
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Return each continuation's mean negative log-likelihood, as in lmms-eval, and whether it is greedy."""
        results, prompt = [], self.model.spec.prompt
        for request in requests:
            context, target, visual, doc, task, split = request.args
            row = self.task_dict[task][split][doc]
            continuation = str(target if isinstance(target, str) else target(row)).strip()
            images = [source_of(image) for image in visual(row)]
            view = self.model.see(formatted(prompt, images, self._text(context)))
            length = len(self.model.lm.tokenize(answer_text(continuation)))
            greedy = view.continue_with(max_new_tokens=length, num_beams=1, do_sample=False) == continuation
            # lmms-eval 0.7 turns a plain pair into a text, which its multiple choice then cannot read.
            results.append(GenerationResult((-view.score([continuation], normalize=True)[0], greedy)))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse tasks of several rounds."""
        raise MLLMError("The model mllm does not support tasks of several rounds.")

    def _text(self, context: str) -> str:
        return self._prompt.replace("{question}", context.replace("<image>", "").strip())

    def _images(self, images: Sequence[Any], sources: dict[str, ImageSource]) -> tuple[str, ...]:
        """Return the keys of a request's images, and add the images to ``sources``."""
        keys = []
        for image in images:
            source = source_of(image)
            key = source.key()
            sources.setdefault(key, source)
            keys.append(key)
        return tuple(keys)

    def _batches(self, members: Sequence[_Group]) -> Iterator[list[_Group]]:
        batch: list[_Group] = []
        for member in sorted(members, key=lambda member: len(member[0])):
            batch.append(member)
            if sum(len(texts) for _, texts in batch) >= self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _answered(
        self, batch: Sequence[_Group], sources: dict[str, ImageSource], settings: dict[str, Any]
    ) -> dict[int, str]:
        """Return the answers to a batch by the requests' indices: texts after images, and texts without any."""
        prompt, settings = self.model.spec.prompt, {"kind": "question", **settings}
        opened = [([sources[key] for key in keys], texts) for keys, texts in batch]
        with_images = [(formatted(prompt, images), texts) for images, texts in opened if images]
        answers: dict[int, str] = {}
        if with_images:
            views = self.model.see_each([prompt for prompt, _ in with_images])
            continued = views.continue_with(
                [list(texts.values()) for _, texts in with_images], **{"kind": "question", **settings}
            )
            for (_, texts), generated in zip(with_images, continued, strict=True):
                answers |= dict(zip(texts, generated, strict=True))
        text_only = {index: text for images, texts in opened if not images for index, text in texts.items()}
        if text_only:
            prompts = [formatted(prompt, [], text) for text in text_only.values()]
            outputs = self.model.generate(prompts, **{"kind": "question", **settings})
            answers |= {index: str(output) for index, output in zip(text_only, outputs, strict=True)}
        return {index: _before(text, settings.get("stop_strings", ())) for index, text in answers.items()}


def _decoding(settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return lmms-eval's generation settings as ours; its temperature 0 means greedy decoding."""
    decoding = {name: settings[name] for name in _DECODING if settings.get(name) is not None}
    if not decoding.get("temperature"):
        for name in ("temperature", "top_p", "do_sample"):
            decoding.pop(name, None)
    until = settings.get("until")
    stops = tuple([until] if isinstance(until, str) else [stop for stop in until or () if stop])
    if stops:
        decoding["stop_strings"] = stops
    return tuple(sorted(decoding.items()))


def _before(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip()
