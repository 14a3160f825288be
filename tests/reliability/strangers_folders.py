"""Folders of strangers: adapters, models and links, opened by every command that opens them.

Whatever is wrong, the command ends with exit code 2 or 3 and one message in words, within seconds,
and leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability.frame import Case
from tests.reliability.places import command, glm_folder, trained

CATASTROPHE = "(([a-z0-9._]*)*)*!"
Change = Callable[[Path], None]


def config(file: str, **changes: Any) -> Change:
    """Other values in a JSON file of the folder."""

    def change(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(values | changes))

    return change


def adapter_config(**changes: Any) -> Change:
    """Other values in adapter_config.json."""
    return config("adapter_config.json", **changes)


def tensors(file: str, change: Callable[[dict[str, Any], str], Any]) -> Change:
    """Another tensor in the middle of a file."""

    def changed(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(folder / file)
        change(found, sorted(found)[len(found) // 2])
        save_file(found, folder / file, metadata={"format": "pt"})

    return changed


def _renamed(found: dict[str, Any], name: str, new: str) -> None:
    found[new] = found.pop(name)


def _spoilt(found: dict[str, Any], name: str, value: float) -> None:
    found[name].view(-1)[0] = value


def _cast(found: dict[str, Any], name: str, dtype: str) -> None:
    import torch

    found[name] = (100 * found[name]).to(getattr(torch, dtype))


TENSORS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "one missing": lambda found, name: found.pop(name),
    "one twice as large": lambda found, name: found.update({name: found[name].repeat(2, 2)}),
    "one more": lambda found, name: found.update({f"{name}.more": found[name].clone()}),
    "one misnamed": lambda found, name: _renamed(found, name, name.replace("layers", "blocks")),
    "one NaN": lambda found, name: _spoilt(found, name, float("nan")),
    "one infinite": lambda found, name: _spoilt(found, name, float("inf")),
    "one of int8": lambda found, name: _cast(found, name, "int8"),
    "one of float8": lambda found, name: _cast(found, name, "float8_e4m3fn"),
}
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
ADAPTERS: dict[str, Change] = {
    **{f"tensors, {what}": tensors(WEIGHTS, change) for what, change in TENSORS.items()},
    "tensors, none has the prefix of PEFT": tensors(
        WEIGHTS, lambda found, _: [_renamed(found, n, n.removeprefix(PREFIX)) for n in list(found)]
    ),
    "tensors, none at all": tensors(WEIGHTS, lambda found, _: found.clear()),
    "DoRA without lengths": adapter_config(use_dora=True),
    "alpha NaN": adapter_config(lora_alpha=float("nan")),
    "rank -1": adapter_config(r=-1),
    "rank 10^9": adapter_config(r=10**9),
    "rank of a text": adapter_config(r="8"),
    "corda": adapter_config(init_lora_weights="corda"),
    "modules_to_save": adapter_config(modules_to_save=["lm_head"]),
    "trainable_token_indices": adapter_config(trainable_token_indices=[1]),
    "target_parameters": adapter_config(target_parameters=["mlp.experts"]),
    "layers_pattern": adapter_config(layers_pattern="layers", layers_to_transform=[0]),
    "megatron": adapter_config(megatron_config={"a": 1}, megatron_core="os"),
    "megatron_core": adapter_config(megatron_core="os"),
    "layer_replication": adapter_config(layer_replication=[[0, 1]] * 200_000),
    "a setting of the future": adapter_config(use_everything=True),
    "a regex without end, target_modules": adapter_config(target_modules=CATASTROPHE),
    "a regex without end, rank_pattern": adapter_config(rank_pattern={CATASTROPHE: 4}),
    "a regex without end, alpha_pattern": adapter_config(alpha_pattern={CATASTROPHE: 4}),
    "targets that are not in the file": adapter_config(target_modules=["q_proj", "lm_head"]),
    "targets that are nowhere": adapter_config(target_modules=["x"]),
    "100,000 targets": adapter_config(target_modules=[f"layer_{n}" for n in range(100_000)]),
    "100,000 ranks": adapter_config(rank_pattern={f"layer_{n}": 4 for n in range(100_000)}),
    "layers of a regex": adapter_config(layers_to_transform=[0]),
    "settings of a start that are none": adapter_config(eva_config=7, target_modules=["x"]),
    "fewer targets than the file": adapter_config(target_modules=["q_proj"]),
    "a config of 200,000 brackets": lambda folder: _write(
        folder / "adapter_config.json", '{"a":' * 200_000 + "1" + "}" * 200_000
    ),
}
MODELS: dict[str, Change] = {
    **{
        f"weights, {what}": tensors("model.safetensors", change)
        for what, change in TENSORS.items()
    },
    "10^9 layers": config("config.json", num_hidden_layers=10**9),
    "heads of 10^6": config("config.json", head_dim=10**6),
    "a vocabulary of 10^12": config("config.json", vocab_size=10**12),
    "rms_norm_eps of a text": config("config.json", rms_norm_eps="x"),
    "an unknown rope": config("config.json", rope_parameters={"rope_type": "odd", "rope_theta": 1.0}),
    "use_cache of a text": config("config.json", use_cache="no"),
    "tie_word_embeddings of a text": config("config.json", tie_word_embeddings="x"),
    "10^9 labels": config("config.json", num_labels=10**9),
    "a model_type of a list": config("config.json", model_type=[]),
    "a family of images without its tokens": config("config.json", model_type="glm4v"),
    "no layers": config("config.json", num_hidden_layers=0),
    "half a head": config("config.json", num_attention_heads=0.5),
    "a config of 200,000 brackets": lambda folder: _write(
        folder / "config.json", '{"a":' * 200_000 + "1" + "}" * 200_000
    ),
}  # fmt: skip
ODD: dict[str, Callable[[Path], None]] = {
    "a pipe": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link out": lambda path: path.symlink_to("/etc/hostname"),
    "a link to nothing": lambda path: path.symlink_to("gone"),
    "a loop": lambda path: path.symlink_to(path.name),
    "a socket": lambda path: _bind(path),
}


def cases() -> Iterator[Case]:
    """Every adapter with every command, every model with two of them, every odd file."""
    glm_folder()  # once, before the cases fork
    trained("lora")
    import finetune.evaluation.evaluate
    import finetune.export.merge
    import finetune.generation.generate
    import finetune.methods.lora
    import finetune.models.load  # noqa: F401

    for what, change in ADAPTERS.items():
        for name in ("predict", "evaluate", "merge"):
            yield Case(f"adapters: {what}, {name}", partial(adapter, change, name))
    for what, change in MODELS.items():
        for name in ("predict", "evaluate"):
            yield Case(f"models: {what}, {name}", partial(model, change, name))
    for what, odd in ODD.items():
        for file in ("adapter_config.json", WEIGHTS, "finetune.json"):
            yield Case(f"links: {what} as {file}", partial(odd_file, odd, file, in_adapter=True))
        for file in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
            yield Case(f"links: {what} as {file}", partial(odd_file, odd, file, in_adapter=False))
    for location in ("the file", "its folder"):
        yield Case(f"links: an image, {location} leads out", partial(image_link, location))


def image_link(location: str, folder: Path) -> None:
    """A row's image that is a link, or lies in one, out of the data's folder."""
    from PIL import Image

    (folder / "private").mkdir()
    (folder / "data").mkdir()
    Image.new("RGB", (2, 2)).save(folder / "private/x.png")
    if location == "the file":
        (folder / "data/x.png").symlink_to("../private/x.png")
    else:
        (folder / "data/in").symlink_to("../private")
    image = "x.png" if location == "the file" else "in/x.png"
    messages = [
        {"role": "user", "content": "Q", "image": image},
        {"role": "assistant", "content": "A"},
    ]
    rows = _write(folder / "data/rows.jsonl", json.dumps({"messages": messages}) + "\n")
    code, said = command("data", "check", rows)
    assert (code, "a link that leads out of" in said) == (2, True), said[-2000:]


def adapter(change: Change, name: str, folder: Path) -> None:
    """Without our record and manifest, as an adapter of PEFT comes."""
    copy = _adapter(folder)
    change(copy)
    _refused(name, copy, folder)


def model(change: Change, name: str, folder: Path) -> None:
    """A base on its own."""
    copy = shutil.copytree(glm_folder(), folder / "model")
    change(copy)
    _refused(name, copy, folder)


def odd_file(odd: Callable[[Path], None], file: str, folder: Path, *, in_adapter: bool) -> None:
    """A file of the folder that is none, or that lies elsewhere."""
    copy = _adapter(folder) if in_adapter else shutil.copytree(glm_folder(), folder / "model")
    (copy / file).unlink(missing_ok=True)
    odd(copy / file)
    _refused("predict", copy, folder)


def _adapter(folder: Path) -> Path:
    copy = Path(shutil.copytree(trained("lora") / "checkpoint-2", folder / "adapter"))
    for file in ("finetune.json", "manifest.json", "config.yaml"):
        (copy / file).unlink()
    return copy


def _refused(name: str, target: Path, folder: Path) -> None:
    """One message, exit code 2 or 3, and no output."""
    ask = _write(folder / "ask.jsonl", '{"prompt": "the quick", "response": "dog"}\n')
    words: dict[str, list[Any]] = {
        "predict": ["--data", ask, "--output", folder / "out", "--max-new-tokens", 1],
        "evaluate": ["--data", ask, "--output", folder / "out", "--max-new-tokens", 1],
        "merge": ["--output", folder / "out"],
    }
    code, said = command(name, target, *words[name])
    assert code in (2, 3), (code, said[-2000:])
    assert "Traceback" not in said, said[-2000:]
    assert said.count("error: ") == 1, said[-2000:]
    assert len(said) < 4000, said[:200]
    assert not (folder / "out").exists()


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(path.parent)
        bound.bind(path.name)  # a whole path may be too long
        os.chdir(here)
