"""Chat templates of the common styles, written for these tests, and a tiny tokenizer that carries one."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.data.tokenizer import Tokenizer, train_tokenizer

SPECIAL = (
    "</s>",
    "<s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# ChatML with the answers marked, and the line break behind the stop token outside.
CHATML_MARKED = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{% else %}
{{ message['content'] + '<|im_end|>' }}
{%- endif %}
{{ '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES: Mapping[str, str] = {
    "chatml": CHATML,
    "chatml-marked": CHATML_MARKED,
    # Qwen2's: a system turn of its own where there is none.
    "qwen2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim %}"
    "{% set content = content + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "zephyr": "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    # SmolLM2's: a system turn of its own in front.
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    # No blank around what is said (Mistral v0.3), and bos once.
    "mistral-tight": "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' + message['content'] | trim + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}",
    "mistral": "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] ~ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}",
}

# Real habits of templates that make a conversation in one piece another than turn by turn.
NOT_TURN_BY_TURN: Mapping[str, str] = {
    # Mistral's newer ones: the system prompt stands in the last question.
    "system in the last question": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{% for message in rest %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' }}{% if loop.index0 >= loop.length - 2 %}"
    "{{ (system if system is defined else 'Be good.') ~ '\\n\\n' }}"
    "{% endif %}{{ message['content'] + '[/INST]' }}{% else %}{{ message['content'] ~ eos_token }}{% endif %}{% endfor %}",
    # Qwen3's: earlier answers lose their reasoning.
    "reasoning left out later": CHATML.replace(
        "message['content']",
        "(message['content'] if loop.index0 >= loop.length - 1 else message['content'].split('.')[0])",
    ),
}

# What the four silent failures look like.
STOP_OUTSIDE = CHATML_MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")
SHIFTED = (
    CHATML_MARKED.replace("{{ '<|im_start|>' + message['role'] + '\\n' }}", "")
    .replace("{% generation %}{{", "{% generation %}{{ '<|im_start|>assistant\\n' +")
    .replace("{% else %}\n{{", "{% else %}\n{{ '<|im_start|>' + message['role'] + '\\n' +")
)
NO_PROMPT = CHATML.partition("{% if add_generation_prompt %}")[0]
NOT_PRESERVING = CHATML.replace(
    "message['content']", "(message['content'] if loop.last or message['role'] == 'user' else message['content'][:5])"
)

SOME_TEXT = [
    "hello world, this is what a user says to an assistant",
    "the system\n\nsays  this: it is so  ",
    "naïve 猫 🙂 caf\n\n\n",
]


@functools.cache
def plain_tokenizer() -> Tokenizer:
    return train_tokenizer(SOME_TEXT * 3, 330, SPECIAL)


def save_tokenizer(folder: Path, template: str | None, **config: Any) -> Path:
    """A folder with the tiny tokenizer, bos <s>, eos </s>, and a chat template."""
    folder.mkdir(exist_ok=True)
    contents = plain_tokenizer().contents
    options = json.loads(contents["tokenizer_config.json"]) | {"bos_token": "<s>"} | config
    (folder / "tokenizer.json").write_bytes(contents["tokenizer.json"])
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def with_template(template: str | None, **config: Any) -> Tokenizer:
    contents = dict(plain_tokenizer().contents)
    options = json.loads(contents["tokenizer_config.json"]) | {"bos_token": "<s>"} | config
    contents["tokenizer_config.json"] = json.dumps(options).encode()
    if template is not None:
        contents["chat_template.jinja"] = template.encode()
    return Tokenizer.from_contents(contents, "test")


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn."""
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
