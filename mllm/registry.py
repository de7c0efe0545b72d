"""Find a part by its exact name: one table of built-in parts, joined by other packages' entry points.

Values are lazy ``"module:attribute"`` strings, so listing names imports nothing. A package adds parts of its own with
entry points in the same groups (``mllm.connectors``, ...), and they are found by the same lookup.
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from mllm.errors import MLLMError, near

BUILT_IN: dict[str, dict[str, str]] = {
    "encoders": {
        "transformers": "mllm.encoders.vision:VisionModel",
        "timm": "mllm.encoders.timm_model:TimmModel",
        "open-clip": "mllm.encoders.open_clip_model:OpenClipModel",
        "fuse": "mllm.encoders.fuse:Fuse",
        "features": "mllm.encoders.stored:StoredFeatures",
        "dual-encoder": "mllm.encoders.joint:JointSpace",
        "video": "mllm.encoders.video:Video",
        "audio": "mllm.encoders.audio:AudioModel",
    },
    "lms": {"transformers": "mllm.lm:LanguageModel", "sentences": "mllm.lms.sentences:SentenceEncoder"},
    "connectors": {
        "linear": "mllm.adapters.connectors.linear:Linear",
        "mlp": "mllm.adapters.connectors.mlp:MLP",
        "mapper": "mllm.adapters.connectors.mapper:Mapper",
        "resampler": "mllm.adapters.connectors.resampler:Resampler",
        "qformer": "mllm.adapters.connectors.qformer:QFormer",
        "temporal": "mllm.adapters.connectors.temporal:Temporal",
        "token-merge": "mllm.adapters.connectors.token_merge:TokenMerge",
    },
    "adapters": {
        "lora": "mllm.adapters.language.lora:LoRA",
        "bottleneck": "mllm.adapters.language.bottleneck:Bottleneck",
        "prompt": "mllm.adapters.language.prompt:PromptTuning",
        "prefix": "mllm.adapters.language.prefix:PrefixTuning",
        "gated": "mllm.adapters.language.gated:Gated",
    },
    "heads": {
        "contrast": "mllm.adapters.heads.pairs:Contrast",
        "match": "mllm.adapters.heads.pairs:Match",
        "retrieval": "mllm.adapters.heads.retrieval:Retrieval",
        "generation": "mllm.adapters.heads.generation:Generation",
        "affine": "mllm.adapters.heads.generation:Affine",
        "bridge": "mllm.adapters.heads.generation:Bridge",
        "aligner": "mllm.adapters.heads.generation:Aligner",
        "pixels": "mllm.adapters.heads.pixels:Pixels",
        "decision": "mllm.adapters.heads.decision:Decision",
    },
    "image_decoders": {
        "diffusers": "mllm.image_decoders.diffusion:DiffusionPipeline",
        "trained": "mllm.image_decoders.trained:Trained",
    },
    "scorers": {
        "dual-encoder": "mllm.scorer:DualEncoder",
        "aligned": "mllm.aligned:Aligned",
        "retrieval": "mllm.answering.finder:Finder",
        "matching": "mllm.answering.matcher:Matcher",
    },
    "objectives": {
        "caption": "mllm.objectives.caption:Caption",
        "contrastive": "mllm.objectives.pairs:Contrastive",
        "patch-contrastive": "mllm.objectives.pairs:PatchContrastive",
        "itc": "mllm.objectives.pairs:ImageTextContrast",
        "itm": "mllm.objectives.pairs:ImageTextMatching",
        "itg": "mllm.objectives.pairs:ImageTextGeneration",
        "retrieval": "mllm.objectives.retrieval:Contrast",
        "token-prediction": "mllm.objectives.retrieval:TokenPrediction",
        "silence": "mllm.objectives.silence:Silence",
        "distillation": "mllm.objectives.distillation:Distillation",
        "score-distillation": "mllm.objectives.distillation:ScoreDistillation",
        "decision": "mllm.objectives.decision:Decision",
    },
    "fits": {
        "connector": "mllm.fits.connector:Connector",
        "retrieval": "mllm.fits.retrieval:Retrieval",
        "affine": "mllm.fits.conditions:Conditions",
        "pixels": "mllm.fits.pictures:Pictures",
        "decision": "mllm.fits.decision:Decision",
    },
    "readers": {
        "emoji-scenes": "mllm.data.emoji_scenes:emoji_scenes",
        "easy-vqa": "mllm.data.easy_vqa:easy_vqa",
        "coco-captions": "mllm.data.captions:coco_captions",
        "karpathy": "mllm.data.captions:karpathy",
        "textcaps": "mllm.data.captions:textcaps",
        "caption-lines": "mllm.data.captions:caption_lines",
        "caption-folder": "mllm.data.captions:caption_folder",
        "vqa": "mllm.data.questions:vqa",
        "vizwiz": "mllm.data.questions:vizwiz",
        "aokvqa": "mllm.data.questions:aokvqa",
        "gqa": "mllm.data.questions:gqa",
        "textvqa": "mllm.data.questions:textvqa",
        "scienceqa": "mllm.data.questions:scienceqa",
        "pope": "mllm.data.questions:pope",
        "snli-ve": "mllm.data.questions:snli_ve",
        "open-ended-mini-imagenet": "mllm.data.questions:open_ended_mini_imagenet",
        "winoground": "mllm.data.matching:winoground",
        "sugarcrepe": "mllm.data.matching:sugarcrepe",
        "classes": "mllm.data.matching:classes",
        "karpathy-retrieval": "mllm.data.matching:karpathy_retrieval",
        "vist": "mllm.data.stories:vist",
        "visdial": "mllm.data.stories:visdial",
        "emoji-retrieval": "mllm.data.emoji_retrieval:emoji_retrieval",
        "llava": "mllm.data.conversations:llava",
        "messages": "mllm.data.conversations:messages",
        "decisions": "mllm.data.decisions:decisions",
        "mmc4": "mllm.data.documents:mmc4",
        "obelics": "mllm.data.documents:obelics",
        "webdataset": "mllm.data.tars:webdataset",
        "table": "mllm.data.tables:table",
        "parquet": "mllm.data.tables:parquet",
        "saved-dataset": "mllm.data.tables:saved_dataset",
    },
    "decoding": {"contrastive": "mllm.answering.contrastive:Contrastive"},
    "suites": {},
    "metrics": {
        "caption/mentioned": "mllm.eval.metrics.mentioned:mentioned",
        "caption/bleu-1": "mllm.eval.metrics.bleu:bleu_1",
        "caption/bleu-2": "mllm.eval.metrics.bleu:bleu_2",
        "caption/bleu-3": "mllm.eval.metrics.bleu:bleu_3",
        "caption/bleu-4": "mllm.eval.metrics.bleu:bleu_4",
        "caption/rouge-l": "mllm.eval.metrics.rouge:rouge_l",
        "caption/cider-d": "mllm.eval.metrics.cider:cider_d",
        "caption/meteor": "mllm.eval.metrics.java:meteor",
        "caption/spice": "mllm.eval.metrics.java:spice",
        "caption/cider": "mllm.eval.metrics.cider:cider",
        "caption/clipscore": "mllm.eval.metrics.similarity:clipscore",
        "caption/refclipscore": "mllm.eval.metrics.similarity:refclipscore",
        "caption/chair-i": "mllm.eval.metrics.chair:per_object",
        "caption/chair-s": "mllm.eval.metrics.chair:per_caption",
        "caption/clair": "mllm.eval.metrics.clair:clair",
        "vqa/official": "mllm.eval.metrics.vqa:official",
        "vqa/normalise-both": "mllm.eval.metrics.vqa:normalise_both",
        "vqa/textvqa": "mllm.eval.metrics.vqa:textvqa",
        "vqa/a-okvqa": "mllm.eval.metrics.vqa:a_okvqa",
        "vqa/exact-match": "mllm.eval.metrics.vqa:exact_match",
        "vqa/anls": "mllm.eval.metrics.answers:anls",
        "vqa/relaxed": "mllm.eval.metrics.answers:relaxed",
        "match/text": "mllm.eval.metrics.matched:text",
        "match/image": "mllm.eval.metrics.matched:image",
        "match/group": "mllm.eval.metrics.matched:group",
        "pope/accuracy": "mllm.eval.metrics.yes_no:accuracy",
        "pope/f1": "mllm.eval.metrics.yes_no:f1",
        "pope/yes-rate": "mllm.eval.metrics.yes_no:yes_rate",
        "generation/clip-similarity": "mllm.eval.metrics.generation:clip_similarity",
        "generation/emoji": "mllm.eval.metrics.judged:emoji",
        "generation/fid": "mllm.eval.metrics.generation:fid",
        "generation/lpips": "mllm.eval.metrics.generation:lpips",
        "decision/f1": "mllm.eval.metrics.decided:f1",
        "retrieval/r@1": "mllm.eval.metrics.ranking:recall_1",
        "retrieval/r@5": "mllm.eval.metrics.ranking:recall_5",
        "retrieval/r@10": "mllm.eval.metrics.ranking:recall_10",
        "retrieval/median-rank": "mllm.eval.metrics.ranking:median_rank",
        "retrieval/mrr": "mllm.eval.metrics.ranking:mrr",
        "retrieval/ndcg": "mllm.eval.metrics.ranking:ndcg",
        "retrieval/ndcg-relevant": "mllm.eval.metrics.ranking:ndcg_relevant",
        "retrieval/map": "mllm.eval.metrics.ranking:mean_average_precision",
    },
}


@cache
def table(group: str) -> dict[str, str]:
    """Return name -> ``"module:attribute"`` of one group, entry points of installed packages included.

    Raises:
        MLLMError: two packages claim one name.
    """
    found = dict(BUILT_IN[group])
    for point in entry_points(group=f"mllm.{group}"):
        if found.get(point.name, point.value) != point.value:
            raise MLLMError(
                f"Two parts are called {point.name!r} in mllm.{group}: {found[point.name]} and {point.value}. "
                "Uninstall one of the packages, or rename its entry point."
            )
        found[point.name] = point.value
    return found


def lookup(group: str, name: str) -> Any:
    """Import and return the part ``name`` of ``group`` (``"connectors"``, ``"metrics"``, ...).

    Raises:
        MLLMError: no part has that name (the near matches are listed), or another package's part cannot be imported.
    """
    known = table(group)
    if name not in known:
        raise MLLMError(f"No part called {name!r} in mllm.{group}. {near(name, known)}")
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if known[name] == BUILT_IN[group].get(name):
            raise
        raise MLLMError(
            f"The part {name!r} of mllm.{group} is {known[name]} of another package, and cannot be imported: "
            f"{error}. Mend or uninstall that package."
        ) from error


def made(cls: Any, label: str, *inside: Any, **options: Any) -> Any:
    """Build a part; an argument it does not take is the user's error.

    Raises:
        MLLMError: an argument that is not known (the near matches are listed), or one that is missing.
    """
    signature = inspect.signature(cls)
    try:
        signature.bind(*inside, **options)
    except TypeError as error:
        unknown = [name for name in options if name not in signature.parameters]
        known = [name for name in signature.parameters if name not in (*options, "seed")]
        help_ = f" {near(unknown[0], known)}" if unknown and known else ""
        raise MLLMError(f"The {label} does not take these arguments: {error}.{help_}") from None
    return cls(*inside, **options)
