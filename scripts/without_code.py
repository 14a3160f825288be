"""A published GLM-4 folder that opens without its own code, for vLLM and llama.cpp's converter.

Beside links to the weights it holds tokenizer.json (the merges; published folders have tokenizer.model
alone), a tokenizer_config.json and a config.json that name no code, and `vocab_size` in config.json,
which the converter reads.

    python scripts/without_code.py runs/merged runs/merged-plain
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.data.tokenizer import load_chat_tokenizer, tokenizer_file
from finetune.errors import FinetuneError
from finetune.models.load import local_folder


def write_settings(source: Path, out: Path, **changes: Any) -> None:
    """Write everything but the weights; `changes` go into config.json."""
    tokenizer = load_chat_tokenizer(source)
    shutil.copyfile(tokenizer_file(source), out / "tokenizer.json")
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template}  # fmt: skip
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | changes
    config.setdefault("vocab_size", config["padded_vocab_size"])
    for name, content in {"tokenizer_config.json": settings, "config.json": config}.items():
        content.pop("auto_map", None)
        (out / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    stops = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    (out / "generation_config.json").write_text(json.dumps(stops) + "\n")


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="in the published layout, or a hub id")
    parser.add_argument("output", type=Path, help="must not exist")
    given = parser.parse_args()
    try:
        source = local_folder(given.folder).resolve()
        if "padded_vocab_size" not in (source / "config.json").read_text(encoding="utf-8"):
            raise SystemExit(
                f"{source} is not in the published layout; finetune export makes it so"
            )
        given.output.mkdir(parents=True)
        write_settings(source, given.output)
    except (FinetuneError, OSError) as error:
        raise SystemExit(str(error)) from error
    for file in [*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json")]:
        (given.output / file.name).symlink_to(file)


if __name__ == "__main__":
    main()
