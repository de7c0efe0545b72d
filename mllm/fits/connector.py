"""Fit a connector in closed form: a regression from features to the language model's embeddings.

For each image, x is the mean over positions of the inputs of the connector's linear map, and y the IDF-weighted mean
embedding of its captions' tokens, the sentence vector of its captions, the embeddings of the first caption's first Q
tokens in order, one after another, the number of the first caption as a one-hot vector, or, in a row each, the
embeddings of its captions' content words (SITTA, arXiv:2307.05591). SITTA's lexical matching needs no image: x is the
dual encoder's vector of a token's string, and y the token's embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mllm.capabilities import RemembersTexts, SentenceModel
from mllm.data.items import Item, pieces_of
from mllm.encoders.texts import EncodesTexts
from mllm.errors import MLLMError
from mllm.fits.base import ClosedForm, Material
from mllm.fits.regression import Moments, NormalEquations, SeparateRegressions
from mllm.fits.targets import TARGETS, GuideTargets, Targets, WordTargets
from mllm.guides.contracts import Ask, EmbedsImages
from mllm.lms.vocabulary import lexicon
from mllm.model import Model
from mllm.registry import Count, NonNegative

SOLVERS = ("ridge", "least-squares", "procrustes")


class ConnectorFit(ClosedForm):
    """Regression of the connector's last linear map, whose output then has the scale of the embeddings.

    All visual tokens share the map, except with ``words-in-order``. The modules before it (pooling, or a body with
    random weights) do not change.

    Args:
        part: the connector's path.
        solver: see `mllm.fits.regression.NormalEquations.solve`.
        targets: ``caption-words``; ``words-in-order``: visual token q is the caption's q-th token, and a neutral word
            after its end, for a linear map that returns all visual tokens of one pooled feature vector; ``texts``: the
            scores of a memory's texts are 1 for the first caption and 0 for other captions' texts, and likewise those
            of further memories for the answers to a question each; ``content-words``: a row for each different token
            of the captions' words that are no stop words; ``sentences``, the vectors of a sentence encoder;
            ``guide``: what a guide makes of the image, which needs no captions; or ``tokens``: lexical matching, which
            needs neither images nor captions.
        stop_words: whether ``caption-words`` are English function words, too.
        standardize: as SITTA's code: features are standardized by their mean and deviation over the images, and
            embeddings by those of the language model's whole table; between these, the map has no intercept.
        strength: of the ridge penalty, as a fraction of the features' mean variance.
        chunk: images, or tokens, that are computed at once.
        guide: the name of the guide; None: the only one that embeds images.

    Raises:
        MLLMError: an unknown solver.
    """

    def __init__(
        self,
        *,
        part: str = "connector",
        solver: str = "ridge",
        targets: str = "caption-words",
        strength: NonNegative = 0.01,
        chunk: Count = 64,
        stop_words: bool = True,
        standardize: bool = False,
        guide: str | None = None,
    ) -> None:
        super().__init__(part=part, strength=strength, chunk=chunk)
        if solver not in SOLVERS:
            raise MLLMError(f"stages.fit of connector has solver {solver!r}: expected one of {', '.join(SOLVERS)}.")
        self.solver, self.targets, self.stop_words, self.standardize = solver, targets, stop_words, standardize
        self._inputs, self._guide = Moments(0), Ask((EmbedsImages,), guide)

    @property
    def reads_no_answer(self) -> bool:
        """Whether the targets are no captions."""
        return self.targets in ("guide", "tokens")

    @property
    def asks(self) -> Sequence[Ask]:
        """Return the guide whose vectors are the targets."""
        return [self._guide] if self.targets == "guide" else []

    def problems(self, model: Model) -> list[str]:
        """Return which parts the model lacks, and how a recipe gives them."""
        problems = []
        if model.connector is None or model.connector.linear() is None:
            problems.append("fits the connector, which does not end in a linear map: use another connector type.")
        elif self.targets == "words-in-order" and _shared(model):
            problems.append(
                "fits words in order, for which each visual token needs a map of its own: set encoder.select=pooled "
                "and connector={type: linear, tokens: 4}."
            )
        if model.connector is not None and isinstance(model.connector, RemembersTexts) != (self.targets == "texts"):
            problems.append("fits a memory to texts, and nothing else: set connector.type=memory and targets=texts.")
        if self.targets == "tokens" and not model.has(EncodesTexts):
            problems.append("fits tokens, and this encoder encodes no texts: set encoder.type=dual-encoder.")
        if self.targets == "guide":
            problems += self._misfits(model)
        elif self._guide.name is not None:
            problems.append("has a guide, and other targets: set stages.fit.targets=guide, or leave out the guide.")
        elif self.targets == "sentences":
            if not model.has(SentenceModel):
                problems.append("fits sentences, and the model has no sentence encoder: set lm.type=sentences.")
        elif not model.generates_text:
            problems.append("fits words, and this lm embeds whole sentences only: set stages.fit.targets=sentences.")
        if not self.stop_words and self.targets != "caption-words":
            problems.append("leaves stop words out of caption-words only: leave out stages.fit.stop_words.")
        if self.standardize and self.targets in ("sentences", "words-in-order", "texts", "guide"):
            problems.append("standardizes embeddings of words: leave out stages.fit.standardize, or fit words.")
        return problems

    def _misfits(self, model: Model) -> list[str]:
        """Return why the connector cannot be fitted to the guide."""
        width = model.guide(self._guide).dim
        if model.width == width:
            return []
        return [f"fits a guide's vectors, of width {width}, and the connector's is {model.width}: set connector.width."]

    def sums(self, model: Model) -> NormalEquations | SeparateRegressions:
        """Return empty sums."""
        inputs = _linear(model).in_features
        if self.targets == "texts":
            return SeparateRegressions(inputs, model.connector.sizes)
        tokens = model.connector.num_tokens if self.targets == "words-in-order" else 1
        return NormalEquations(inputs, tokens * int(model.width or 0))

    def rows(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs of the linear map ``(N, X)``, and target embeddings ``(N, D_lm)``."""
        self._inputs = Moments(_linear(model).in_features)
        if self.targets == "tokens":
            yield from self._tokens(model, data)
            return
        material = self._material(data)
        target = self._target(model, material)
        for items, features in data.with_features(self.chunk, material):
            inputs = model.connector.body(model.connector.cast(features), *_questions(model, items))
            yield self._row_for_each(inputs.mean(1), target(items))

    def _material(self, data: Material) -> list[Item]:
        """Return the items that are fitted on."""
        if self.targets == "guide":
            return data.shown
        return data.answered if self.targets == "texts" else data.captioned

    def _target(self, model: Model, items: Sequence[Item]) -> Targets:
        """Return the function from items to their targets."""
        if self.targets == "guide":
            return GuideTargets(model.guide(self._guide))
        if self.targets == "caption-words":
            return WordTargets(model, items, stop_words=self.stop_words)
        return TARGETS[self.targets](model, items)

    def _row_for_each(self, x: Tensor, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return a row for each target: inputs ``(I, X)``, each as often as it has targets ``(K, D_lm)``."""
        self._inputs.add(x)
        counts = torch.tensor([len(each) for each in targets], device=x.device)
        return x.repeat_interleave(counts, 0), torch.cat(list(targets))

    def solve(self, model: Model, sums: NormalEquations | SeparateRegressions) -> tuple[Tensor, Tensor]:
        """Return weights ``(X, D_lm)`` and intercept ``(D_lm,)``."""
        if not self.standardize or isinstance(sums, SeparateRegressions):
            return sums.solve(self.solver, self.strength)
        table = Moments(model.lm.dim)
        table.add(model.lm.model.get_input_embeddings().weight)
        return sums.solve(self.solver, self.strength, by=(self._inputs, table))

    def quality(self, sums: NormalEquations | SeparateRegressions, solution: tuple[Tensor, Tensor]) -> float:
        """Return the share of the targets' variance that the map explains (R^2)."""
        return sums.explained(*solution)

    def apply(self, model: Model, solution: tuple[Tensor, Tensor]) -> None:
        """Set the linear map."""
        weights, intercept = solution
        project = _linear(model)
        tokens = project.out_features // len(intercept)  # one feature vector may become several tokens
        project.weight.copy_(weights.T.repeat(tokens, 1))
        project.bias.copy_(intercept.repeat(tokens))

    def _tokens(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        words = lexicon(model.lm)
        for start in data.track(range(0, len(words), self.chunk)):
            chunk = words[start : start + self.chunk]
            features = model.encoder.encode_texts([text for _, text in chunk])  # (N, P, D_vis)
            y = model.lm.embed(torch.tensor([token for token, _ in chunk], device=model.lm.model.device))
            yield self._row_for_each(model.connector.body(model.connector.cast(features)).mean(1), y[:, None])


def _linear(model: Model) -> nn.Linear:
    linear: nn.Linear | None = model.connector.linear()
    assert linear is not None
    return linear


def _questions(model: Model, items: Sequence[Item]) -> tuple[Sequence[str], ...]:
    """Return what the connector's body takes after the features of the items' first images."""
    asked = [model.questions([pieces_of(item, model.spec.prompt)]) for item in items]
    return () if asked[0] is None else ([each[0] for each in asked if each],)


def _shared(model: Model) -> bool:
    """Whether several visual tokens share the connector's linear map."""
    width = model.width
    return bool(width) and _linear(model).out_features != model.connector.num_tokens * width
