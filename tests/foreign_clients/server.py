"""Two endpoints for client libraries, until standard input is closed: a random model, and an obedient one.

    python tests/foreign_clients/server.py        # prints {"random": URL, "obedient": URL}

`random` is a tiny model of random weights that likes `"`, `}` and the like, so that strings and objects of a
structured reply come to an end. `obedient` is the same endpoint over a stand-in for the model: it calls
the first function it is offered, and answers with text once there is a result. Under a
constraint it writes what a schema in the prompt asks for; where there is none the random model writes.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import serving
import tiny
from asked import KEY
from safetensors.torch import load_file, save_file

from finetune.generation.batch import SharedPrefix
from finetune.generation.decoder import Decoder, DecodingRow, Request
from finetune.generation.load import open_model

LIKED = {'"': 9.0, "}": 8.5, "]": 8.5, ",": 8.0}
"""What is added to the logits of these tokens, wherever they may come."""


def save_random(folder: Path) -> Path:
    """The model whose strings end: one number of its state is the same everywhere and votes for a quote."""
    tiny.save_model(folder, "glm", max_position_embeddings=65_536)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[0] = 0.0
        elif name.endswith("model.norm.weight"):
            tensor[0] = 1.0
    tensors["model.embed_tokens.weight"][:, 0] = 2 * tensors["model.embed_tokens.weight"].std()
    head = tensors["lm_head.weight"]
    head *= 0.2
    head[:, 0] = 0.0
    head[tiny.NUM_RANKS :] = 0.0  # it ends no reply of its own and calls nothing
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    for token, bonus in LIKED.items():
        head[vocabulary[token], 0] = bonus
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Obedient(Decoder):
    """Writes what a well-trained model would: the call that is asked for, or a text about its result."""

    def __init__(self, decoder: Decoder, template: Any) -> None:
        self.__dict__.update(decoder.__dict__)
        self._template = template

    def taken(self, row: DecodingRow) -> SharedPrefix:
        """Nothing was computed of what was only recited."""
        is_own = any(other is row for other in self._rows)
        return super().taken(row) if is_own else SharedPrefix.kept([], [])

    def add(
        self, requests: Sequence[Request], prefix: SharedPrefix | None = None
    ) -> list[DecodingRow]:
        """The rows; those without a constraint are written at once."""
        return [self._row(request) for request in requests]

    def _row(self, request: Request) -> DecodingRow:
        tokenizer = self._template.tokenizer
        wanted = self._wanted(request)
        said = wanted if request.constraint is not None else self._said(request, wanted)
        if said is None:
            return super().add([request])[0]
        row = DecodingRow(request)
        ids = tokenizer.plain.encode(said, add_special_tokens=False).ids
        for token in [*ids, self._template.stop_ids[0]]:
            if not row.is_done:
                row.take(token, self._template.stop_ids)
        row.is_done = True
        return row

    def _prompt(self, request: Request) -> str:
        return str(
            self._template.tokenizer.backend.decode(request.prompt, skip_special_tokens=False)
        )

    def _wanted(self, request: Request) -> str | None:
        """A reply under the schema that the prompt itself shows; None where it shows none."""
        text = self._prompt(request)
        for start in (found.start() for found in re.finditer(r"\{", text)):
            try:
                schema, _ = json.JSONDecoder().raw_decode(text, start)
            except ValueError:
                continue
            if "properties" in schema:
                return f"\n{json.dumps(_example(schema, schema), ensure_ascii=False)}"
        return None

    def _said(self, request: Request, wanted: str | None) -> str:
        text = self._prompt(request)
        offered = re.findall(r"\n## [\w.-]+\n\n(\{.*?\n\})\n", text.split("<|user|>")[0], re.S)
        role = max(("<|user|>", "<|observation|>"), key=text.rfind)
        last = text.rpartition(role)[2].removesuffix("<|assistant|>").strip()
        if not offered and wanted is not None:
            return f"\n```json{wanted}\n```"
        if not offered or role == "<|observation|>":
            return f"\nI was told: {last[:200]}"
        function = json.loads(offered[0])
        arguments = _example(function.get("parameters", {}), function.get("parameters", {}))
        return f"{function['name']}\n{json.dumps(arguments, ensure_ascii=False)}"


def _example(schema: Any, root: Any) -> Any:
    """A value that the schema takes."""
    if "$ref" in schema:
        place = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            place = place[part]
        return _example(place, root)
    if "enum" in schema:
        return schema["enum"][0]
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return _example(schema[several][0], root)
    if schema.get("type", "object") == "object":
        fields = schema.get("properties", {})
        return {name: _example(field, root) for name, field in fields.items()}
    if schema["type"] == "array":
        return [_example(schema["items"], root)]
    kinds = {"string": "上海", "integer": 3, "number": 1.5, "boolean": True}
    return kinds.get(schema["type"])


@contextmanager
def both() -> Iterator[dict[str, str]]:
    """Serves both until the block ends; their URLs."""
    with tempfile.TemporaryDirectory() as folder:
        opened = open_model(save_random(Path(folder) / "model"))
        options: dict[str, Any] = {"max_new_tokens": 200, "key": KEY}
        with (
            serving.served(opened, **options) as random,
            serving.served(opened, **options) as obedient,
        ):
            writer = obedient.engine.writers["tiny"]
            for lane in writer.lanes.values():
                lane.decoder = Obedient(lane.decoder, opened.template)
            yield {"random": random.url, "obedient": obedient.url}


if __name__ == "__main__":
    with both() as urls:
        print(json.dumps(urls), flush=True)
        sys.stdin.read()
