"""Print a chat template that takes OpenAI's messages and tools, made of the checkpoint's own.

A GLM-4 template wants tool definitions on the system message, a call as `metadata` with text, and
results from the role `observation`. OpenAI-compatible servers (vLLM, llama.cpp) hand it `tools`,
`tool_calls` and the role `tool`. This puts a translation in front and leaves the template alone.

    python scripts/openai_template.py runs/merged > runs/merged.openai.jinja
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.data.template import ChatTemplate
from finetune.data.tokenizer import load_chat_tokenizer
from finetune.errors import FinetuneError

TOOLS_FIRST = """\
{%- if tools -%}
    {%- set glm.messages = [{'role': 'system', 'content': '', 'tools': tools}] -%}
{%- endif -%}
"""
TRANSLATION = """\
{#- OpenAI's messages and tools become GLM-4's; below is the checkpoint's own template, unchanged. -#}
{%- set glm = namespace(messages=[]) -%}
TOOLS
{%- for message in messages -%}
    {%- set said = namespace(image='', text='') -%}
    {%- if message['content'] is string -%}
        {%- set said.text = message['content'] -%}
    {%- elif message['content'] -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {%- set said.text = said.text ~ part['text'] -%}
            {%- else -%}
                {%- set said.image = '<|begin_of_image|><|endoftext|><|end_of_image|>' -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set role = 'observation' if message['role'] == 'tool' else message['role'] -%}
    {%- if said.image ~ said.text -%}
        {%- set glm.messages = glm.messages + [{'role': role, 'content': said.image ~ said.text}] -%}
    {%- endif -%}
    {%- if message['tool_calls'] -%}
        {%- for call in message['tool_calls'] -%}
            {%- set given = call['function']['arguments'] -%}
            {%- set text = given if given is string else given | tojson -%}
            {%- set glm.messages = glm.messages + [{'role': 'assistant', 'metadata': call['function']['name'], 'content': text}] -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = glm.messages -%}
"""


def openai_template(folder: str | Path) -> str:
    """The template of the checkpoint in `folder`, with the translation before it."""
    template = ChatTemplate(load_chat_tokenizer(folder))
    # GLM-4-0414 takes `tools` itself; the earlier ones have them on the system message.
    tools = "" if template.layout.tools == "argument" else TOOLS_FIRST
    return TRANSLATION.replace("TOOLS\n", tools) + template.tokenizer.chat_template


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a model folder or hub id, or an adapter's base")
    try:
        print(openai_template(parser.parse_args().folder), end="")
    except FinetuneError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
