"""A run as a model of lmms-eval: ``lmms_eval --model mllm --model_args run=runs/mine --tasks ...``.

lmms-eval finds it by the entry point ``lmms_eval.models``. Questions on one image are answered together, the image seen
once; requests are batched, whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from mllm.build import load
from mllm.errors import MLLMError
from mllm.media.images import ImageSource, source_of
from mllm.processes import processes, progress
from mllm.prompts.pieces import answer_text, arrange

MANIFEST = ModelManifest(model_id="mllm", simple_class_path="mllm.eval.lmms.Mllm")

_PASSED_ON = ("max_new_tokens", "num_beams", "temperature", "top_p", "do_sample")


class Mllm(lmms):  # type: ignore[misc]
    """A run, or a saved model, as lmms-eval asks it.

    Args:
        run: its folder.
        prompt: how a task's text is put, with ``{question}`` for it; None: as the recipe puts questions.
        batch_size: texts that are answered together.
        device: None: a GPU where there is one.

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
        self.device = state.device if state.num_processes > 1 else torch.device(device or state.device)
        self.model = load(run).to(self.device)
        self.batch_size = int(batch_size)
        self._prompt = prompt or self.model.spec.prompt.question

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return an answer to each request, in their order."""
        answers: dict[int, str] = {}
        sources: dict[str, ImageSource] = {}
        groups: dict[Any, dict[int, str]] = {}  # images and settings -> texts by place
        for place, request in enumerate(requests):
            context, settings, visual, doc, task, split = request.args
            keys = self._images(visual(self.task_dict[task][split][doc]), sources)
            groups.setdefault((keys, _decoding(settings)), {})[place] = self._text(context)
        by_settings: dict[Any, list[tuple[tuple[str, ...], dict[int, str]]]] = {}
        for (keys, settings), texts in groups.items():
            by_settings.setdefault(settings, []).append((keys, texts))
        with progress() as bar:
            task = bar.add_task("answering", total=len(requests), note="")
            for settings, members in by_settings.items():
                for batch in self._batches(members):
                    answers |= self._answered(batch, sources, dict(settings))
                    bar.update(task, completed=len(answers))
        return [answers[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Return each continuation's mean negative log-likelihood, as lmms-eval has it, and whether it is greedy."""
        found, template = [], self.model.spec.prompt.template
        for request in requests:
            context, target, visual, doc, task, split = request.args
            row = self.task_dict[task][split][doc]
            said = str(target if isinstance(target, str) else target(row)).strip()
            images = [source_of(image) for image in visual(row)]
            view = self.model.see(arrange(template, images, self._text(context)))
            length = len(self.model.lm.tokenize(answer_text(said)))
            greedy = view.continue_with(max_new_tokens=length) == said
            # lmms-eval 0.7 turns a bare pair into a text, which its own choosing then cannot read.
            found.append(GenerationResult((-view.score([said], normalize=True)[0], greedy)))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse tasks of several rounds."""
        raise MLLMError("Tasks of several rounds are not answered by the model mllm.")

    def _text(self, context: str) -> str:
        return self._prompt.replace("{question}", context.replace("<image>", "").strip())

    def _images(self, images: Sequence[Any], sources: dict[str, ImageSource]) -> tuple[str, ...]:
        """Return the keys of a request's images; the images themselves go into ``sources``."""
        keys = []
        for image in images:
            source = source_of(image)
            key = source.key()
            sources.setdefault(key, source)
            keys.append(key)
        return tuple(keys)

    def _batches(self, members: Sequence[tuple[tuple[str, ...], dict[int, str]]]) -> Any:
        batch: list[tuple[tuple[str, ...], dict[int, str]]] = []
        for member in sorted(members, key=lambda member: len(member[0])):
            batch.append(member)
            if sum(len(texts) for _, texts in batch) >= self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _answered(
        self, batch: Sequence[Any], sources: dict[str, ImageSource], settings: dict[str, Any]
    ) -> dict[int, str]:
        template = self.model.spec.prompt.template
        seen = [([sources[key] for key in keys], texts) for keys, texts in batch]
        sighted = [(arrange(template, images), texts) for images, texts in seen if images]
        found: dict[int, str] = {}
        if sighted:
            views = self.model.see_each([prompt for prompt, _ in sighted])
            answers = views.continue_with([list(texts.values()) for _, texts in sighted], **settings)
            for (_, texts), own in zip(sighted, answers, strict=True):
                found |= dict(zip(texts, own, strict=True))
        blind = {place: text for images, texts in seen if not images for place, text in texts.items()}
        if blind:
            outputs = self.model.generate([arrange(template, [], text) for text in blind.values()], **settings)
            found |= {place: str(output) for place, output in zip(blind, outputs, strict=True)}
        return {place: _before(text, settings.get("stop_strings", ())) for place, text in found.items()}


def _decoding(settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return lmms-eval's settings as ours; what it means by temperature 0 is greedy decoding."""
    wanted = {name: settings[name] for name in _PASSED_ON if settings.get(name) is not None}
    if not wanted.get("temperature"):
        for name in ("temperature", "top_p", "do_sample"):
            wanted.pop(name, None)
    until = settings.get("until")
    stops = tuple([until] if isinstance(until, str) else [stop for stop in until or () if stop])
    if stops:
        wanted["stop_strings"] = stops
    return tuple(sorted(wanted.items()))


def _before(text: str, stops: Sequence[str]) -> str:
    """Return what was said before the first stop."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip()
