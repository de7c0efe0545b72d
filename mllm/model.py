"""The assembled model: encoder, connector and language model, and how a picture goes through them.

Shapes: B batch, T text tokens, I images, P patches, Q visual tokens, D_vis, D_lm, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mllm.answering.chat import Chat
from mllm.answering.in_words import told
from mllm.answering.rerank import reranked
from mllm.answering.view import View, Views
from mllm.config.parts import FROZEN, AssemblySpec
from mllm.errors import MLLMError, near
from mllm.hub.fingerprints import tensor_hash
from mllm.lms.cross_attention import sighted
from mllm.outputs import ImagePart, Output, Text
from mllm.prompts.batch import Batch, Encoded, collate, encode
from mllm.prompts.pieces import Control, Piece, arrange, images_of, without_images
from mllm.registry import lookup, made, table
from mllm.slots import Inputs


class Assembly(nn.Module):
    """A multimodal language model joined from parts. One that is not there is None.

    Args:
        encoder: pixels to features ``(B, P, D_vis)``; frozen.
        connector: features to visual tokens ``(B, Q, D_lm)``; trained.
        lm: the language model; frozen.
        adapters: trained modules inside the language model.
        heads: by name, trained: what the language model's states become beside text.
        tokens: new tokens, whose rows are trained.
        decoder: a condition to an image; frozen.
        spec: what the parts were built from, saved with the trained tensors.
    """

    # Parts are asked for what they can do, not for their class; to a type checker they are anything.
    encoder: Any
    connector: Any
    lm: Any
    tokens: Any
    decoder: Any
    spec: Any  # an AssemblySpec; its parts may be None

    def __init__(
        self,
        *,
        encoder: nn.Module | None,
        connector: nn.Module | None,
        lm: nn.Module | None,
        adapters: Sequence[nn.Module] = (),
        heads: Mapping[str, nn.Module] | None = None,
        tokens: nn.Module | None = None,
        decoder: nn.Module | None = None,
        spec: AssemblySpec,
    ) -> None:
        super().__init__()
        self.encoder, self.connector, self.lm = encoder, connector, lm
        self.adapters = nn.ModuleList(adapters)
        self.heads = nn.ModuleDict(heads)
        self.tokens, self.decoder = tokens, decoder
        self.spec = spec
        self.calibrated = False  # whether the connector starts at the scale of the language model
        self.eval()

    @property
    def device(self) -> torch.device:
        """Return where the parts are."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Assembly:
        """Set training mode for what is trained; what is frozen stays in evaluation mode.

        So does batch normalisation in the encoder: by its statistics the pictures of a batch would touch each other,
        and how a batch is split would change what is learned.
        """
        super().train(mode)
        for name in FROZEN:
            if (part := getattr(self, name)) is not None:
                part.eval()
        for path in self.spec.trained:
            self.get_submodule(path).train(mode)
        for module in self.encoder.modules() if self.encoder is not None else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        self.adapters.train(mode)  # peft's are inside the language model
        return self

    @property
    def speaks(self) -> bool:
        """Whether there is a language model that makes text; one that only reads sentences has no tokens to answer."""
        return self.lm is not None and getattr(self.lm, "speaks", True)

    @property
    def sees_pixels(self) -> bool:
        """Whether something in the encoder trains, so that features are computed anew in every step."""
        return self.encoder is not None and any(p.requires_grad for p in self.encoder.parameters())

    @property
    def adapts(self) -> bool:
        """Whether something in the language model trains, so that gradients run through all that it reads."""
        return any(p.requires_grad for part in (self.lm, self.adapters) for p in part.parameters())

    @property
    def painter(self) -> Any:
        """The head that makes an image decoder's condition, whichever it is; None where there is none."""
        return next((head for head in self.heads.values() if hasattr(head, "condition")), None)

    @property
    def draws(self) -> bool:
        """Whether it can make images."""
        return self.painter is not None and self.decoder is not None

    @property
    def image_tokens(self) -> tuple[str, ...] | None:
        """The new tokens that stand for an image, in order; None where no head reads any."""
        if self.painter is not None:
            return tuple(self.painter.tokens)
        return next(((str(head.token),) for head in self.heads.values() if hasattr(head, "token")), None)

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Compute as if there were no adapters: text alone then gives what the bare language model gives."""
        with contextlib.ExitStack() as stack:
            for adapter in (*self.adapters, *([self.tokens] if self.tokens is not None else [])):
                stack.enter_context(cast(Any, adapter).off())
            yield

    def frozen_hash(self, part: str, without: Sequence[str] = ()) -> str:
        """Return a hash of all tensors of a part, adapters inside it left out.

        Args:
            part: its name.
            without: dotted paths of the modules that train, whose tensors are left out too.
        """
        own = {id(parameter) for parameter in self.adapters.parameters()}
        module = getattr(self, part)
        inside = {name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in own}
        inside |= {name for name in module.state_dict() if _under(f"{part}.{name}", without)}
        return tensor_hash(module, without=inside)

    @functools.cached_property
    def scorer(self) -> Any:
        """Return the recipe's scorer, loaded when it is first needed; it is no part of what is trained or saved.

        A model that has pictures and sentences in one space, a retrieval head, or contrast and matching, is its own.
        """
        if self.spec.scorer is None and hasattr(self.lm, "sentences"):
            return lookup("scorers", "aligned")(model=self)
        if self.spec.scorer is None and "retrieval" in self.heads:
            return lookup("scorers", "retrieval")(model=self)
        if self.spec.scorer is None and {"contrast", "match"} <= set(self.heads):
            return lookup("scorers", "matching")(model=self)
        if self.spec.scorer is None:
            raise MLLMError(
                "This needs a scorer: set scorer={'type': 'dual-encoder', 'model': ...} (CLIP, ...), "
                "{'type': 'aligned', 'model': RUN} with a run of emoji-scorer, or {'type': 'retrieval', 'model': RUN} "
                "with one of a retrieval head (of contrast and matching: 'matching')."
            )
        cls = lookup("scorers", self.spec.scorer.type)
        return made(cls, f"scorer {self.spec.scorer.type}", **self.spec.scorer.options()).to(self.device)

    def features(self, images: Sequence[Any]) -> Tensor:
        """Return the encoder's features ``(I, P, D_vis)`` of pictures in any accepted form."""
        pixels = self.encoder.preprocess([self.encoder.open(image) for image in images])
        with torch.no_grad():
            return self.encoder(pixels.to(self.device))

    def forward(
        self,
        rows: Sequence[Sequence[Piece]],
        features: Tensor | None,
        batch: Batch | None,
        objectives: Sequence[Any],
    ) -> list[Tensor]:
        """Return each objective's summed loss.

        Args:
            rows: training examples, as interleaved prompts.
            features: of their images in reading order, ``(I, P, D_vis)``; None where there are none. While the encoder
                trains, what it takes in instead.
            batch: the rows as ids.
            objectives: see `mllm.slots.Objective`.
        """
        if features is not None and self.sees_pixels:
            features = self.encoder(features)
        inputs = Inputs(self, rows, features, batch)
        return [objective(inputs) for objective in objectives]

    @property
    def beside(self) -> Any:
        """Return the adapter by which visual tokens stand beside the sequence, None where they stand in it."""
        return next((adapter for adapter in self.adapters if getattr(adapter, "places", 0)), None)

    @property
    def places(self) -> int:
        """Return how many places of a prompt an image takes."""
        if self.connector is None:
            return 0
        return int(self.connector.num_tokens if self.beside is None else self.beside.places)

    def embed(self, visual: Tensor | None, batch: Batch) -> Any:
        """Return embeddings ``(B, T, D_lm)``: the text's own, and visual tokens ``(I, Q, D_lm)`` at their places.

        Where these stand beside the sequence it is a `mllm.lms.cross_attention.Sighted`.
        """
        embeds = self.lm.embed(batch.ids)  # (B, T, D_lm)
        if visual is None:
            return embeds
        if self.beside is not None:
            return sighted(embeds, visual, batch, self.beside.mark)
        return embeds.masked_scatter(batch.visual.unsqueeze(-1), visual.to(embeds.dtype))

    def logits(self, visual: Tensor | None, batch: Batch, keep: Tensor | None = None) -> Tensor:
        """Return logits ``(B, K, V)`` at the positions ``keep (K,)``; None: all."""
        return self.lm.logits(self.embed(visual, batch), batch.mask, keep)

    def encode(self, pieces: Sequence[Piece], *, start: bool = True) -> Encoded:
        """Return an interleaved prompt as ids; the places of its images are counted in."""
        if not self.speaks:
            raise MLLMError(
                "This model cannot answer: it has no language model that makes text. Train a recipe with one "
                "(lm.type=transformers), or use this one as a scorer: scorer={'type': 'aligned', 'model': RUN}."
            )
        encoded = encode(pieces, lm=self.lm, num_visual=self.places, start=start)
        limit = self.lm.context
        if limit is not None and len(encoded.ids) >= limit:
            raise MLLMError(
                f"The prompt takes {len(encoded.ids)} positions ({len(images_of(pieces))} images of "
                f"{self.places} each), and the language model was made for {limit}. Shorten it."
            )
        return encoded

    def prepare(self, prompts: Sequence[Sequence[Piece]]) -> tuple[Any, Batch]:
        """Return embeddings, as of `embed`, and the padded batch of interleaved prompts."""
        return self.embedded(prompts, [self.encode(pieces) for pieces in prompts])

    @torch.no_grad()
    def embedded(self, prompts: Sequence[Sequence[Piece]], encoded: Sequence[Encoded]) -> tuple[Any, Batch]:
        """Return embeddings, as of `embed`, and the padded batch of prompts that are encoded already."""
        batch = collate(encoded, self.lm.pad).to(self.device)
        images = [image for pieces in prompts for image in images_of(pieces)]
        visual = self.connector(self.features(images)) if images else None
        return self.embed(visual, batch), batch

    def decodings(self, prompts: Sequence[Sequence[Piece]], given: Any) -> list[dict[str, Any]]:
        """Return each prompt's decoding settings: the recipe's own, what is given over them, its parts made.

        Args:
            prompts: what is answered.
            given: settings for all prompts, or a mapping for each.
        """
        rows = [given] * len(prompts) if isinstance(given, dict) else list(given)
        settings = [{**self.spec.decoding, **row} for row in rows]
        processors = [
            made(lookup("decoding", name), f"decoding {name}", self, prompts, **(settings[0][name] or {}))
            for name in table("decoding")
            if settings[0].get(name) is not None
        ]
        ours = {*table("decoding"), "candidates", "words"}
        plain = [{key: value for key, value in row.items() if key not in ours} for row in settings]
        if processors:
            plain = [{**row, "logits_processor": [*row.get("logits_processor", []), *processors]} for row in plain]
        return plain

    def generate(
        self,
        prompts: Sequence[Sequence[Piece]],
        *,
        errors: Literal["raise", "return"] = "raise",
        index: Any = None,
        images: int = 1,
        eager: float = 0.0,
        **decoding: Any,
    ) -> list[Any]:
        """Answer interleaved prompts, in one batch.

        Args:
            prompts: each a list of texts (`str`) and images (PIL image, array, `pathlib.Path`, bytes); in a prompt a
                `str` is always text.
            errors: ``return``: a prompt that cannot be read gets its `MLLMError` as its answer, the others theirs.
            index: an `mllm.scorers.index.ImageIndex`, or its file: where the model says an image's tokens, the answer
                gets an `mllm.outputs.ImagePart`. Without one, a model that has an image decoder makes the
                image; with both, its decision head says which.
            images: how many are looked up, or made, each time; the best is shown, and the others are its
                ``candidates``. 0: none are shown.
            eager: added to the logit of an image's first token: above 0 more images are shown, below 0 fewer.
            decoding: fields of `transformers.GenerationConfig` over the recipe's own (``max_new_tokens=20``), and
                ``seed``: a temperature, top-p or seed means sampling; each prompt draws from its own seed.
                ``contrastive`` (`mllm.answering.contrastive.Contrastive`) and ``candidates`` (how many answers the
                scorer chooses from) look at the image; ``words`` (`mllm.answering.in_words`) puts words in its place.

        Returns:
            One `Output` a prompt, in order. A batch gives what its members give alone.

        Raises:
            MLLMError: no prompt, an empty prompt, a bad picture, or a prompt longer than the context: the message
                names the prompt.
        """
        _check_list(prompts)
        read = [_read(self, pieces) for pieces in prompts]
        if errors == "raise":
            _raise_first(read)
        good = [prompt for prompt in read if not isinstance(prompt, MLLMError)]
        count = decoding.pop("candidates", self.spec.decoding.get("candidates", 1))
        words = decoding.pop("words", self.spec.decoding.get("words"))
        found: list[Output] = []
        if words is not None and index is not None:
            raise MLLMError("Pictures told in words and answers with images do not go together: leave one out.")
        if good and words is not None:
            found = told(self, good, words, decoding)
        elif good and images and (index is not None or self.draws or eager):
            from mllm.answering.with_images import shown

            if count > 1:
                raise MLLMError("Answers with images are not reranked: leave out 'candidates', or say images=0.")
            found = shown(self, good, self.decodings(good, decoding), index, count=images, eager=eager)
        elif good and count > 1:
            found = reranked(self, good, count, decoding)
        elif good:
            found = self.answer(good, self.decodings(good, decoding))
        answers = iter(found)
        return [prompt if isinstance(prompt, MLLMError) else next(answers) for prompt in read]

    def answer(
        self, prompts: Sequence[Sequence[Piece]], settings: Sequence[dict[str, Any]], streamer: Any = None
    ) -> list[Output]:
        """Answer prompts with settings as `decodings` returns them, a mapping for each prompt."""
        embeds, batch = self.prepare(prompts)
        rows = self.lm.generate(batch.mask, settings, streamer=streamer, inputs_embeds=embeds)
        return [Output([Text(self.lm.decode(row).strip())]) for row in rows]

    def retrieve(self, prompts: Sequence[Sequence[Piece]], index: Any, count: int = 1) -> list[list[ImagePart]]:
        """Return for each interleaved prompt the images of an index that its retrieval head finds closest.

        Args:
            prompts: as those of `generate`; what is looked for stands at the end.
            index: an `mllm.scorers.index.ImageIndex`, or its file.
            count: images for each prompt, the closest first.

        Raises:
            MLLMError: a model without a retrieval head, another model's index, or a bad prompt.
        """
        from mllm.answering.with_images import retrieve

        _check_list(prompts)
        return retrieve(self, _raise_first([_read(self, pieces) for pieces in prompts]), index, count)

    def draw(self, prompts: Sequence[Sequence[Piece]], count: int = 1, seed: int = 0) -> list[ImagePart]:
        """Return an image for each interleaved prompt, made by the image decoder.

        Args:
            prompts: as those of `generate`; what is to be drawn stands at the end.
            count: images that are made for each; the closest is returned, with the others as its ``candidates``.
            seed: of each one's first image; the next have the next seeds.

        Raises:
            MLLMError: a model that makes no images, or a bad prompt.
        """
        from mllm.answering.drawing import draw

        _check_list(prompts)
        return draw(self, _raise_first([_read(self, pieces) for pieces in prompts]), count, seed)

    def see(self, pieces: Sequence[Piece]) -> View:
        """Take in images (and text, interleaved) once, for many questions.

        Args:
            pieces: images alone are put as the recipe's ``prompt.template`` has it; with text, as they stand.

        Raises:
            MLLMError: nothing to see, or a bad picture.
        """
        return self.see_each([pieces])[0]

    def see_each(self, prompts: Sequence[Sequence[Piece]]) -> Views:
        """Take in several prompts in one batch, for many questions each; see `mllm.answering.view.Views`."""
        _check_list(prompts)
        read = _raise_first([_read(self, pieces) for pieces in prompts])
        template = self.spec.prompt.template
        return Views(self, [p if any(isinstance(x, str) for x in p) else arrange(template, p) for p in read])

    def score(
        self,
        prompt: Sequence[Piece],
        candidates: Sequence[str],
        *,
        normalize: bool = False,
        calibrate: float = 0.0,
    ) -> list[float]:
        """Return the log-likelihood of each candidate as the whole answer to a prompt (its end included).

        Args:
            prompt: interleaved texts and images; it is computed once.
            candidates: possible answers.
            normalize: divide by the number of tokens.
            calibrate: the share of each candidate's score without the images that is taken off: an answer that is
                likely whatever is seen says little (arXiv:2403.05262, post-hoc debiasing; there the share is 1).
        """
        scores = self.see(prompt).score(candidates, normalize=normalize)
        if not calibrate:
            return scores
        blind = self.see(self.blind(prompt)).score(candidates, normalize=normalize)
        return [score - calibrate * other for score, other in zip(scores, blind, strict=True)]

    def blind(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return a prompt without its images; where nothing is left, with an end token, which starts a sequence."""
        if not any(isinstance(piece, str) for piece in pieces):
            pieces = arrange(self.spec.prompt.template, pieces)
        end = Control(self.lm.tokenizer.decode([self.lm.eos]))
        return without_images(pieces) or [end]

    def chat(self, system: str | None = None, messages: Sequence[dict[str, Any]] = ()) -> Chat:
        """Start a conversation, or go on with one; see `mllm.answering.chat.Chat`."""
        return Chat(self, system, messages)

    def trained_state(self) -> dict[str, Tensor]:
        """Return the tensors of everything that is not frozen, by dotted name."""
        return {name: tensor.detach().cpu() for name, tensor in self.trained_tensors().items()}

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return the same where they are: on a device, or on none."""
        own = {id(tensor) for tensor in self.adapters.state_dict(keep_vars=True).values()}
        return {
            name: tensor
            for name, tensor in self.state_dict(keep_vars=True).items()
            if name.split(".")[0] not in FROZEN or (_under(name, self.spec.trained) and id(tensor) not in own)
        }

    def save(self, folder: str | Path) -> Path:
        """Write the trained tensors and ``assembly.json`` to a folder; `mllm.load` reads them back."""
        from mllm.saving import save

        return save(self, Path(folder))


def _under(name: str, paths: Sequence[str]) -> bool:
    """Whether a tensor's dotted name is inside one of the modules at these paths."""
    return any(f"{name}.".startswith(f"{path}.") for path in paths)


def _check_list(prompts: Sequence[Sequence[Piece]]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise MLLMError("Expected a list of prompts, each a list of texts and images: [['A picture of', image]].")


def _raise_first(read: Sequence[list[Piece] | MLLMError]) -> list[list[Piece]]:
    """Raise the first error among prompts that were read; where there are several prompts, say which it is."""
    for index, prompt in enumerate(read):
        if isinstance(prompt, MLLMError):
            raise MLLMError(f"Prompt {index}: {prompt}" if len(read) > 1 else str(prompt))
    return [prompt for prompt in read if not isinstance(prompt, MLLMError)]


def _read(model: Assembly, pieces: Any) -> list[Piece] | MLLMError:
    """Return a prompt with its images opened and its length checked, or what is wrong with it."""
    try:
        if (
            isinstance(pieces, str)
            or not isinstance(pieces, Sequence)
            or all(isinstance(piece, str) and not piece for piece in pieces)
        ):
            raise MLLMError(f"The prompt is {pieces!r}: expected a list of texts and images, not empty.")
        model.encode(pieces)
        return [piece if isinstance(piece, str | Control) else model.encoder.open(piece) for piece in pieces]
    except MLLMError as error:
        return error


def trained_module(model: Assembly, path: str) -> nn.Module:
    """Return the module that a stage's ``train`` names by a dotted path.

    Raises:
        MLLMError: there is no such module.
    """
    try:
        module = model.get_submodule(path) if path else None
    except AttributeError:
        module = None
    if module is None:
        known = [name for name, _ in model.named_modules() if name]
        raise MLLMError(f"A stage's 'train' names {path!r}, which is no part of the model. {near(path, known)}")
    return module
