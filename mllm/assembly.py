"""The assembled model with its verbs: generate, see, score, chat, retrieve, draw, save."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mllm.answering import generate as generating
from mllm.answering.chat import Chat
from mllm.answering.drawing import draw
from mllm.answering.view import View, Views
from mllm.answering.with_images import retrieve
from mllm.model import Model
from mllm.outputs import ImagePart
from mllm.prompts.pieces import Piece, arrange
from mllm.saving import save


class Assembly(Model):
    """A multimodal language model joined from parts, and what it can do; `mllm.assemble` and `mllm.load` build it."""

    def generate(
        self,
        prompts: Sequence[Sequence[Piece]],
        *,
        errors: Literal["raise", "return"] = "raise",
        index: Any = None,
        images: int = 1,
        image_logit_bias: float = 0.0,
        **decoding: Any,
    ) -> list[Any]:
        """Answer interleaved prompts, in one batch.

        Args:
            prompts: each a list of texts (`str`) and images (PIL image, array, `pathlib.Path`, bytes); in a prompt a
                `str` is always text.
            errors: ``return``: a prompt that cannot be read gets its `MLLMError` as its answer, the others theirs.
            index: an `mllm.scorers.index.ImageIndex`, or its file: where the model generates an image's tokens, the
                answer gets an `mllm.outputs.ImagePart`. Without one, a model that has an image decoder makes the
                image; with both, its decision head says which.
            images: how many are looked up, or made, each time; the best is shown, and the others are its
                ``candidates``. 0: none are shown.
            image_logit_bias: added to the logit of an image's first token: above 0 more images are shown, below 0
                fewer.
            decoding: fields of `transformers.GenerationConfig` over the recipe's (``max_new_tokens=20``), and those of
                `mllm.lms.decoding.Decoding`: with a temperature, top-p or ``seed`` tokens are sampled, each prompt from
                its seed; ``contrastive`` (`mllm.answering.contrastive.Contrastive`) subtracts image-free logits;
                of ``candidates`` answers the scorer selects the closest to the image; ``nearest_words``
                (`mllm.answering.in_words`) replaces visual tokens by their nearest vocabulary tokens.

        Returns:
            One `Output` a prompt, in order. A batch gives what its members give alone.

        Raises:
            MLLMError: no prompt, an empty prompt, a bad image, or a prompt longer than the context: the message
                names the prompt.
        """
        return generating.generate(
            self, prompts, decoding, errors=errors, index=index, images=images, image_logit_bias=image_logit_bias
        )

    def retrieve(self, prompts: Sequence[Sequence[Piece]], index: Any, count: int = 1) -> list[list[ImagePart]]:
        """Return for each interleaved prompt the images of an index that its retrieval head finds closest.

        Args:
            prompts: as those of `generate`; what is looked for stands at the end.
            index: an `mllm.scorers.index.ImageIndex`, or its file.
            count: images for each prompt, the closest first.

        Raises:
            MLLMError: a model without a retrieval head, another model's index, or a bad prompt.
        """
        return retrieve(self, generating.read(self, prompts), index, count)

    def draw(self, prompts: Sequence[Sequence[Piece]], count: int = 1, seed: int = 0) -> list[ImagePart]:
        """Return an image for each interleaved prompt, made by the image decoder.

        Args:
            prompts: as those of `generate`; what is to be drawn stands at the end.
            count: images that are made for each; the closest is returned, with the others as its ``candidates``.
            seed: of each one's first image; the next have the next seeds.

        Raises:
            MLLMError: a model that makes no images, or a bad prompt.
        """
        return draw(self, generating.read(self, prompts), count, seed)

    def see(self, pieces: Sequence[Piece]) -> View:
        """Encode images (and text, interleaved) once, for many questions.

        Args:
            pieces: images alone are put as the recipe's ``prompt.template`` has it; with text, as they stand.

        Raises:
            MLLMError: nothing to see, or a bad image.
        """
        return self.see_each([pieces])[0]

    def see_each(self, prompts: Sequence[Sequence[Piece]]) -> Views:
        """Encode several prompts in one batch, for many questions each; see `mllm.answering.view.Views`."""
        template = self.spec.prompt.template
        read = generating.read(self, prompts)
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
            calibrate: the share of each candidate's score without the images that is subtracted: an answer that is
                likely whatever the image says little (arXiv:2403.05262, post-hoc debiasing; there the share is 1).
        """
        scores = self.see(prompt).score(candidates, normalize=normalize)
        if not calibrate:
            return scores
        blind = self.see(self.blind(prompt)).score(candidates, normalize=normalize)
        return [score - calibrate * other for score, other in zip(scores, blind, strict=True)]

    def chat(self, system: str | None = None, messages: Sequence[dict[str, Any]] = ()) -> Chat:
        """Start a conversation, or continue one; see `mllm.answering.chat.Chat`."""
        return Chat(self, system, messages)

    def save(self, folder: str | Path) -> Path:
        """Write the trained tensors and ``assembly.json`` to a folder; `mllm.load` reads them back."""
        return save(self, Path(folder))
