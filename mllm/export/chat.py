"""Write the chat template of an exported model: a Jinja template that formats a conversation as this model does.

`transformers` renders it from messages whose content is a text or a list of parts; ``<image>`` stands for an image.
"""

from __future__ import annotations

import json
from typing import Any

from mllm.model import Model

MARK = "7f3a9c"  # a text that no template contains

# A turn in the words of the recipe, as `mllm.prompts.messages` formats it.
PLAIN = """\
{%- if not messages or messages[0].role != "system" -%}
{{ $system }}
{%- endif -%}
{%- for message in messages -%}
{%- set parts = [{"type": "text", "text": message.content}] if message.content is string else message.content -%}
{%- set text = parts | selectattr("type", "equalto", "text") | map(attribute="text") | join(" ") | trim -%}
{%- set images = parts | rejectattr("type", "equalto", "text") | list | length -%}
{%- if message.role == "assistant" -%}
{{ " " + text + "\\n" }}
{%- elif message.role == "system" -%}
{{ text + "\\n" }}
{%- else -%}
{%- set words = $before + text + $after if text else $caption -%}
{{ $lead + $image * images + $between + words if images else $opening + words }}
{%- endif -%}
{%- endfor -%}
"""

# Before a template that takes each content as one text: texts and images in their order. Its last newline is trimmed.
JOIN_PARTS = """\
{%- set joined = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content = namespace(text="") -%}
{%- if message.content is string -%}
{%- set content.text = message.content -%}
{%- else -%}
{%- for part in message.content or [] -%}
{%- set content.text = content.text + (part.text if part.type == "text" else $image) -%}
{%- endfor -%}
{%- endif -%}
{%- set joined.messages = joined.messages + [dict(message, content=content.text)] -%}
{%- endfor -%}
{%- set messages = joined.messages %}
"""

# Before a template, where the recipe has a system prompt.
ADD_SYSTEM = """\
{%- if not messages or messages[0].role != "system" -%}
{%- set messages = [{"role": "system", "content": [{"type": "text", "text": $system}]}] + messages -%}
{%- endif -%}
"""

# Around a template that writes a start token or images itself: the tokenizer adds the one, the others have a new name.
START_RENDERING = "{%- set rendered %}\n"
END_RENDERING = "{{ '' }}{% endset -%}\n{{ $rendered }}"


def chat_template(model: Model, image: str) -> str | None:
    """Return the Jinja template of a model's conversations; None where it has none.

    Args:
        model: the model.
        image: the text for an image.
    """
    prompt, tokenizer = model.spec.prompt, model.lm.tokenizer
    if prompt.chat == "own":
        if tokenizer.chat_template is None:
            return None
        added = _filled(ADD_SYSTEM, system=prompt.system.strip()) if prompt.system else ""
        return added + _extended(tokenizer, model.lm.bos, image)
    lead, _, rest = prompt.template.partition("{images}")
    before, _, after = prompt.question.partition("{question}")
    texts = {"before": before, "after": after, "caption": prompt.caption, "lead": lead}
    texts |= {"system": prompt.system, "opening": prompt.opening}
    return _filled(PLAIN, **texts, between=rest.removesuffix("{prompt}"), image=image)


def _extended(tokenizer: Any, start: list[int], image: str) -> str:
    """Return the tokenizer's own chat template, in which images stand where the messages have them."""
    template = tokenizer.get_chat_template().removesuffix("\n")  # Jinja drops it, too, at the end of a template
    rendered = "rendered"
    if MARK in _rendered(tokenizer, MARK):
        template = _filled(JOIN_PARTS, image=image) + template
    else:
        parts = [{"type": "text", "text": MARK}, {"type": "image"}, {"type": "text", "text": MARK}]
        written = _rendered(tokenizer, parts).split(MARK)[1]
        if written != image:
            rendered += _filled(".replace($written, $image)", written=written, image=image)
    if start:
        first = "".join(tokenizer.convert_ids_to_tokens(start))
        rendered += _filled(".removeprefix($first)", first=first)
    return (
        template
        if rendered == "rendered"
        else START_RENDERING + template + END_RENDERING.replace("$rendered", rendered)
    )


def _rendered(tokenizer: Any, content: Any) -> str:
    """Return a message of the user in the tokenizer's own chat template."""
    return str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))


def _filled(template: str, **texts: str) -> str:
    """Return a template with texts as Jinja's literals."""
    for name, text in texts.items():
        template = template.replace(f"${name}", json.dumps(text, ensure_ascii=False))
    return template
