"""A program: two steps of every file in configs/ on tiny models; prints what went wrong as JSON.

Only the model, the data and the number of steps are other than in the file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts/bench"), str(ROOT / "tests")]

import cells  # noqa: E402
import pictures  # noqa: E402
import runs  # noqa: E402
import tiny  # noqa: E402

FAMILIES = {
    "lora_hf": "glm",
    "lora_0414": "glm4",
    "quickstart": "glm",
    "lora_flash": "glm4_moe_lite",
}
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def stop_at_once(model: Path) -> None:
    """Let the model answer nothing but a stop, so that 512 new tokens cost one forward pass."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    (head,) = (tensors[name] for name in tensors if "output_layer" in name or "lm_head" in name)
    head *= 1e-3
    row = head[tiny.EOS_IDS[1]] * 1e3
    head[tiny.EOS_IDS[1]], head[tiny.EOS_IDS[2]] = row, -row  # one of the two is positive
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def main(folder: Path) -> None:
    """Run them with `folder` as the working directory."""
    from finetune.config.load import load_config

    os.chdir(folder)
    data = runs.write_dialogues(folder / "train.jsonl", 20)
    question = {"messages": [{"role": r, "content": "order"} for r in ("user", "assistant")]}
    validation = folder / "dev.jsonl"
    validation.write_text(json.dumps(question) + "\n", encoding="utf-8")
    models = {
        family: tiny.save_model(folder / family, family, **positions)
        for family, positions in (
            ("chatglm", {"seq_length": 131072}),
            ("glm", {"max_position_embeddings": 131072}),
            ("glm4", {"max_position_embeddings": 131072}),
            ("glm4_moe_lite", {"max_position_embeddings": 131072}),
        )
    }
    models["glm4v"] = pictures.save_model(folder / "glm4v", seq_length=8192)
    pictured = pictures.write_dialogues(folder / "pictured", 20)
    for model in models.values():
        stop_at_once(model)
    cells.warm_up(models["chatglm"])
    problems = {}
    for path in CONFIGS:
        shows = path.stem.startswith("glm4v")
        model = models["glm4v" if shows else FAMILIES.get(path.stem, "chatglm")]
        files = (pictured, pictured) if shows else (data, validation)
        overrides = [
            f"model.path={model}", f"data.train={files[0]}", f"data.validation={files[1]}",
            "training.max_steps=2", "training.num_epochs=null", "evaluation.every_steps=2",
        ]  # fmt: skip
        config = load_config(path, overrides)
        problem = cells.run(cells.Cell(path.stem, config.model_dump()), folder)
        saved = Path(config.training.output_dir, "checkpoint-2/manifest.json").is_file()
        if problem or not saved:
            problems[path.name] = problem or "no checkpoint was written"
    print(json.dumps({"ran": [path.name for path in CONFIGS], "problems": problems}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
