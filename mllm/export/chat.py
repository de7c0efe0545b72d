"""Write the chat template of an exported model: a Jinja template that formats a conversation as this model does.

`transformers` renders it from messages whose content is a text or a list of parts; ``<image>`` stands for an image.
"""

from __future__ import annotations

import json
import re
from typing import Any

from mllm.config.prompt import PromptSpec
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.prompts.chat_template import filled, uses_template
from mllm.prompts.formatting import preamble
from mllm.prompts.messages import message, text_part
from mllm.prompts.rendering import Form

# Conversations in the words of the recipe, as `mllm.prompts.messages` formats them. A turn is its leading images, which
# are counted, and what follows them.
PLAIN = """\
{{- "" if messages and messages[0].role == "system" else $system -}}
{{- $examples -}}
{%- for message in messages -%}
{%- set turn = namespace(leading=0, rest="", after_text=false) -%}
{%- set parts = [{"type": "text", "text": message.content}] if message.content is string else message.content or [] -%}
{%- for part in parts -%}
{%- if part.type == "text" -%}
{%- set turn.rest = turn.rest + (" " if turn.after_text else "") + part.text -%}
{%- elif (turn.rest if turn.leading else turn.rest | trim) == "" -%}
{%- set turn.leading = turn.leading + 1 -%}
{%- set turn.rest = "" -%}
{%- else -%}
{%- set turn.rest = turn.rest + $image -%}
{%- endif -%}
{%- set turn.after_text = part.type == "text" -%}
{%- endfor -%}
{%- set rest = turn.rest.rstrip() if turn.leading else turn.rest | trim -%}
{%- set images = $image * turn.leading -%}
{%- if message.role == "assistant" -%}
{{ (" " if rest and not images else "") + images + rest + "\\n" }}
{%- elif message.role == "system" -%}
{{ images + rest + "\\n" }}
{%- else -%}
{%- set words = $before + (rest if $image in rest else rest | trim) + $after if rest else $caption -%}
{{ ($lead + images + $between if images else $opening) + words }}
{%- endif -%}
{%- endfor -%}
"""

# Before a language model's chat template: the messages in the form that it takes. Its last newline is trimmed.
FORM_MESSAGES = """\
{%- set given = namespace(form=$without_image, messages=[]) -%}
{%- for message in messages if message.content is not string -%}
{%- for part in message.content or [] if part.type != "text" -%}
{%- set given.form = $with_image -%}
{%- endfor -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = namespace(text="", parts=[]) -%}
{%- set parts = [{"type": "text", "text": message.content}] if message.content is string else message.content or [] -%}
{%- for part in parts -%}
{%- set content.text = content.text + (part.text if part.type == "text" else $image) -%}
{%- set new = {"type": "text", "text": part.text} if part.type == "text" else {"type": "image"} -%}
{%- set content.parts = content.parts + [new] -%}
{%- endfor -%}
{%- set is_one_text = content.parts | length == 1 and content.parts[0].type == "text" -%}
{%- set as_text = given.form == "text" or (given.form == "either" and is_one_text) -%}
{%- set given.messages = given.messages + [dict(message, content=content.text if as_text else content.parts)] -%}
{%- endfor -%}
{%- set messages = given.messages %}
"""

# Before that, where the recipe has a system prompt.
ADD_SYSTEM = """\
{%- if not messages or messages[0].role != "system" -%}
{%- set messages = [{"role": "system", "content": [{"type": "text", "text": $system}]}] + messages -%}
{%- endif -%}
"""

# Around a template that writes a start token or images itself: the tokenizer adds the one, the others have a new name.
START_RENDERING = "{%- set rendered %}\n"
END_RENDERING = "{{ '' }}{% endset -%}\n{{ rendered$changes }}"


def chat_template(model: Model, image: str) -> str:
    """Return the Jinja template of a model's conversations.

    Args:
        model: the model.
        image: the text for an image.

    Raises:
        MLLMError: no Jinja template formats conversations as this model does.
    """
    prompt = model.spec.prompt
    return _extended(model, image) if uses_template(prompt, model.lm) else _plain(prompt, image)


def _plain(prompt: PromptSpec, image: str) -> str:
    """Return the template of conversations in the recipe's words, after its system prompt and its solved examples."""
    lead, _, rest = prompt.template.partition("{images}")
    before, _, after = prompt.question.partition("{question}")
    texts = {"before": before, "after": after, "caption": prompt.caption, "lead": lead}
    solved = "".join(piece for piece in preamble(prompt) if isinstance(piece, str)).removeprefix(prompt.system)
    texts |= {"system": prompt.system, "opening": prompt.opening}
    return _with_values(PLAIN, **texts, between=rest.removesuffix("{prompt}"), image=image, examples=solved)


def _extended(model: Model, image: str) -> str:
    """Return the language model's chat template, to which messages are given as this model gives them."""
    prompt, lm = model.spec.prompt, model.lm
    with_image, _, written = _sample(prompt, lm, {"type": "image", "image": object()})
    without_image, text, _ = _sample(prompt, lm)
    forms = _with_values(FORM_MESSAGES, with_image=with_image, without_image=without_image, image=image)
    changes = ""
    if with_image != "text" and (word := _image_word(written)) != image:
        changes += _with_values(".replace($word, $image)", word=word, image=image)
    if start := _start(text, lm):
        changes += _with_values(".removeprefix($start)", start=start)
    template = lm.tokenizer.get_chat_template().removesuffix("\n")  # Jinja drops it, too, at the end of a template
    if changes:
        template = START_RENDERING + template + END_RENDERING.replace("$changes", changes)
    added = _with_values(ADD_SYSTEM, system=prompt.system.strip()) if prompt.system else ""
    return _options(prompt) + added + forms + template


def _sample(prompt: PromptSpec, lm: Any, *images: dict[str, Any]) -> tuple[Form, str, set[str]]:
    """Return a conversation as the template writes it: the form in which it is given, and the texts for its images.

    Args:
        prompt: the recipe's prompt format.
        lm: the language model.
        images: parts that stand in the conversation twice.

    Raises:
        MLLMError: the template refuses the conversation.
    """
    question, answer, further = (text_part(text) for text in ("What is it?", "A house.", "And this?"))
    turns = [message("user", [*images, question]), message("assistant", [answer]), message("user", [further, *images])]
    try:
        renderer, text, parts = filled(turns, prompt, lm, generation=True)
    except MLLMError:  # some templates take one turn only
        renderer, text, parts = filled([message("user", [*images, question, *images])], prompt, lm, generation=True)
    return renderer.form, text, {text[place.start : place.end] for place in parts if place.image is not None}


def _image_word(written: set[str]) -> str:
    """Return the text that the template writes for an image and the image's tokens replace.

    Raises:
        MLLMError: it is not the same for every image.
    """
    if len(written) > 1:
        raise MLLMError(
            f"The chat template writes images in several ways ({', '.join(map(repr, sorted(written)))}), and a "
            "processor of transformers has one. Export a model that is trained with prompt.chat=plain."
        )
    return next(iter(written))


def _start(text: str, lm: Any) -> str:
    """Return what the template writes at the start and the tokenizer puts before every text, and so is left out.

    It is none where the rest would be tokenized otherwise; the processor then puts nothing before a conversation.

    Args:
        text: a conversation as the template writes it.
        lm: the language model.

    Raises:
        MLLMError: the processor would put something before every conversation.
    """
    start = "".join(lm.tokenizer.convert_ids_to_tokens(lm.bos))
    ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    if start and text.startswith(start) and lm.tokenizer(text.removeprefix(start)).input_ids == ids:
        return start
    first = lm.tokenizer.bos_token
    if start and not (first and text.startswith(first)):
        raise MLLMError(
            f"The chat template does not begin with {start!r}, which the tokenizer puts before every text, and so a "
            "processor of transformers would put it before every conversation. Export a model that is trained with "
            "prompt.chat=plain."
        )
    return ""


def _options(prompt: PromptSpec) -> str:
    """Return the start of a template, which gives it the recipe's options where it is given no others."""
    return "".join(
        _with_values(f"{{%- set {name} = {name} if {name} is defined else $value -%}}\n", value=value)
        for name, value in prompt.chat_options.items()
        if name.isidentifier()  # a template can read no other
    )


def _with_values(template: str, **values: Any) -> str:
    """Return a template with values, such as texts, as Jinja's literals, which are Python's."""
    return re.sub(r"\$(\w+)", lambda name: repr(json.loads(json.dumps(values[name[1]], default=str))), template)
