"""Canaries: pickles and hooks in every file that is opened. A canary that is run leaves a file behind."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability.frame import Case
from tests.reliability.places import (
    command,
    dialogues_file,
    glm_folder,
    trained,
)

Plant = Callable[[Path, Path], None]
"""Puts a canary into a folder; the second path is the file that it would leave."""
Use = Callable[[Path, Path], tuple[int, str]]
"""Opens the first folder, writing into the second: exit code and what was said."""

IGNORED, REFUSED, NOT_RESUMED = (0,), (2,), (3,)


class _Canary:
    def __init__(self, left: Path) -> None:
        self._left = left

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self._left)!r}, 'w')",)


def raw(left: Path) -> bytes:
    """A plain pickle."""
    return pickle.dumps({"state": _Canary(left)})


def zipped(left: Path) -> bytes:
    """As torch.save writes it, with a tensor beside the canary."""
    import io

    import torch

    sink = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "state": _Canary(left)}, sink)
    return sink.getvalue()


def code(left: Path) -> str:
    """A Python module."""
    return f"open({str(left)!r}, 'w')\n\nclass Canary:\n    pass\n"


def survives(base: Path, plant: Plant, use: Use, codes: tuple[int, ...], folder: Path) -> None:
    """The canary is not run; the command ends with one of the codes, without a traceback."""
    target, left = folder / base.name, folder / "LEFT"
    shutil.copytree(base, target)
    plant(target, left)
    ended, said = use(target, folder)
    assert not left.exists(), "the canary was run"
    assert "Traceback" not in said, said[-3500:]
    assert ended in codes, (ended, said[-800:])


# --- what is done with a folder --------------------------------------------------------------------


def predict(target: Path, folder: Path) -> tuple[int, str]:
    """`finetune predict` with a model or an adapter."""
    (folder / "ask.jsonl").write_text('{"prompt": "the quick"}\n')
    out = folder / "out.jsonl"
    return command("predict", target, "--data", folder / "ask.jsonl", "--output", out, "--max-new-tokens", 1)  # fmt: skip


def train(target: Path, folder: Path, **changes: Any) -> tuple[int, str]:
    """`finetune train` on a model."""
    import runs

    options = {"training__max_steps": 1, **changes}
    settings = runs.config(target, dialogues_file(), folder / "run", **options)
    (folder / "x.yaml").write_text(json.dumps(settings))
    return command("train", folder / "x.yaml")


def merge(target: Path, folder: Path) -> tuple[int, str]:
    """`finetune merge` of an adapter or a checkpoint."""
    return command("merge", target, "--output", folder / "merged")


def export(target: Path, folder: Path) -> tuple[int, str]:
    """`finetune export` of a model or an adapter."""
    return command("export", target, "--layout", "published", "--output", folder / "exported")


def resume(name: str, target: Path, folder: Path, *words: str) -> tuple[int, str]:
    """`finetune train` again, on the run directory `target`, for one more step."""
    settings = json.loads(trained(name).with_suffix(".yaml").read_text())
    settings["training"] |= {"output_dir": str(target), "max_steps": 3}
    (folder / "x.yaml").write_text(json.dumps(settings))
    return command("train", folder / "x.yaml", *words)


# --- pickles -------------------------------------------------------------------------------------


def beside(name: str) -> Plant:
    """A pickle that nobody asked for."""

    def plant(target: Path, left: Path) -> None:
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(raw(left) if name.endswith((".pkl", ".npy")) else zipped(left))

    return plant


def instead(gone: str, name: str) -> Plant:
    """A pickle in the place of a file."""

    def plant(target: Path, left: Path) -> None:
        for file in target.glob(gone):
            file.unlink()
        (target / name).write_bytes(zipped(left))

    return plant


def in_checkpoint(name: str, *, sealed: bool) -> Plant:
    """A pickle in the newest checkpoint of a run, which its manifest may confirm."""

    def plant(target: Path, left: Path) -> None:
        from finetune.storage.manifest import seal

        saved = target / "checkpoint-2"
        found = sorted(saved.glob(name)) or [saved / name]
        found[0].write_bytes(zipped(left))
        if sealed:
            seal(saved)

    return plant


def _index_of_pickles(target: Path, left: Path) -> None:
    """Sharded pickles with their index, and an index of safetensors that names one."""
    (target / "model.safetensors").unlink()
    (target / "pytorch_model-00001-of-00001.bin").write_bytes(zipped(left))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


BESIDE_MODEL = (
    "pytorch_model.bin", "model.pt", "model.pth", "consolidated.00.pth", "optimizer.pt", "scheduler.pt",
    "rng_state.pth", "training_args.bin", "adapter_model.bin", "tokenizer.pkl", "vocab.npy", ".metadata",
    "__0_0.distcp", "added_tokens.pkl", "global_step1/mp_rank_00_model_states.pt",
)  # fmt: skip
IN_RUN = (
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json",
    "run.json", "training_args.bin", "pytorch_model.bin", "adapter_model.bin", ".metadata", "scaler.pt",
)  # fmt: skip
IN_ZERO_RUN = (
    "global_step2/*model_states.pt", "global_step2/*optim_states.pt", "latest", "rng_state.pth", "scheduler.pt",
    "zero_to_fp32.py",
)  # fmt: skip
# What a resumed run has no use for, so that a folder that its own manifest confirms is resumed.
UNUSED = (
    "training_args.bin",
    "pytorch_model.bin",
    "adapter_model.bin",
    ".metadata",
    "zero_to_fp32.py",
)


def pickles() -> Iterator[Case]:
    """Every sink, by every command that opens the folder."""
    model, run, adapter = glm_folder(), trained("lora"), trained("lora") / "checkpoint-2"
    zero = trained("zero", deepspeed={"zero_stage": 2})

    def case(name: str, base: Path, plant: Plant, use: Use, codes: tuple[int, ...]) -> Case:
        return Case(f"pickles: {name}", partial(survives, base, plant, use, codes))

    for name in BESIDE_MODEL:
        yield case(f"{name} beside a model", model, beside(name), predict, IGNORED)
    for use in (predict, train, export):
        what = use.__name__
        instead_of = instead("model.safetensors", "pytorch_model.bin")
        yield case(f"pytorch_model.bin alone, {what}", model, instead_of, use, REFUSED)
        yield case(f"an index of pickles, {what}", model, _index_of_pickles, use, REFUSED)
        for file in ("model.safetensors", "tokenizer.json", "config.json"):
            yield case(f"{file} is one, {what}", model, instead(file, file), use, REFUSED)
    model_of = instead("tokenizer.json", "tokenizer.model")
    yield case("tokenizer.model is one", model, model_of, predict, REFUSED)
    for use in (predict, merge, export):
        what = use.__name__
        plant = _unsealed(instead("adapter_model.safetensors", "adapter_model.bin"))
        yield case(f"adapter_model.bin alone, {what}", adapter, plant, use, (2, 3))
        plant = _unsealed(beside("adapter_model.bin"))
        yield case(f"adapter_model.bin beside, {what}", adapter, plant, use, (0, 2))
        plant = _unsealed(instead("adapter_config.json", "adapter_config.json"))
        yield case(f"adapter_config.json is one, {what}", adapter, plant, use, (2, 3))
    for name in IN_RUN:
        codes = IGNORED if name in UNUSED else NOT_RESUMED
        plant = in_checkpoint(name, sealed=True)
        yield case(f"{name} of a run, confirmed", run, plant, partial(resume, "lora"), codes)
        plant = in_checkpoint(name, sealed=False)
        yield case(f"{name} of a run", run, plant, partial(resume, "lora"), IGNORED)
    for name in IN_ZERO_RUN:
        codes = IGNORED if name in UNUSED else NOT_RESUMED
        plant = in_checkpoint(name, sealed=True)
        yield case(f"DeepSpeed's {name}, confirmed", zero, plant, partial(resume, "zero"), codes)
        plant = in_checkpoint(name, sealed=False)
        yield case(f"DeepSpeed's {name}", zero, plant, partial(resume, "zero"), IGNORED)
    for name in ("examples.arrow", "manifest.json"):
        yield Case(f"pickles: {name} of the token cache", partial(_token_cache, name))


def _unsealed(plant: Plant) -> Plant:
    """The folder as another program wrote it: without our manifest."""

    def planted(target: Path, left: Path) -> None:
        (target / "manifest.json").unlink()
        plant(target, left)

    return planted


def _token_cache(name: str, folder: Path) -> None:
    """Prepared data that somebody has replaced is prepared again, or refused."""
    left = folder / "LEFT"
    changes = {"data__cache_dir": str(folder / "cache")}
    assert train(glm_folder(), folder, **changes)[0] == 0
    (file,) = (folder / "cache").rglob(name)
    file.write_bytes(raw(left))
    shutil.rmtree(folder / "run")
    ended, said = train(glm_folder(), folder, **changes)
    assert not left.exists()
    assert ended == 0, said
    assert "is damaged" in said


# --- hooks ---------------------------------------------------------------------------------------


def edited(name: str, **keys: Any) -> Plant:
    """A JSON file with more keys, and modules of the names that they may ask for."""

    def plant(target: Path, left: Path) -> None:
        path = target / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | keys))
        for module in ("canary", "modeling_canary", "generate", "tokenization_canary"):
            (target / f"{module}.py").write_text(code(left))
        for package in ("custom_generate", "canary_package"):
            (target / package).mkdir()
            (target / package / "generate.py").write_text(code(left))
            (target / package / "__init__.py").write_text(code(left))
        if (target / "manifest.json").exists():
            (target / "manifest.json").unlink()

    return plant


AUTO_MAP = {
    "AutoConfig": "canary.Canary",
    "AutoModel": "modeling_canary.Canary",
    "AutoModelForCausalLM": "modeling_canary.Canary",
    "AutoTokenizer": ["tokenization_canary.Canary", "tokenization_canary.Canary"],
}
MODEL_HOOKS: dict[str, tuple[Plant, tuple[int, ...]]] = {
    "auto_map of the config": (edited("config.json", auto_map=AUTO_MAP), IGNORED),
    "auto_map of another's repository": (edited("config.json", auto_map={"AutoConfig": "o/r--canary.Canary"}), IGNORED),
    "trust_remote_code in the config": (edited("config.json", auto_map=AUTO_MAP, trust_remote_code=True), IGNORED),
    "an unknown model_type with auto_map": (edited("config.json", model_type="canary", auto_map=AUTO_MAP), REFUSED),
    "_attn_implementation_internal, a kernel": (edited("config.json", _attn_implementation_internal="o/kernel"), (0, 2)),
    "attn_implementation, a kernel": (edited("config.json", attn_implementation="o/kernel:Canary"), (0, 2)),
    "_attn_implementation, a module": (edited("config.json", _attn_implementation="canary"), (0, 2)),
    "_experts_implementation_internal": (edited("config.json", _experts_implementation_internal="o/kernel"), (0, 2)),
    "quantization_config": (edited("config.json", quantization_config={"quant_method": "canary"}), REFUSED),
    "architectures": (edited("config.json", architectures=["canary.Canary"]), (0, 2)),
    "auto_map of the tokenizer": (edited("tokenizer_config.json", auto_map=AUTO_MAP), IGNORED),
    "tokenizer_class": (edited("tokenizer_config.json", tokenizer_class="canary.Canary"), IGNORED),
    "custom_generate": (edited("generation_config.json", custom_generate="custom_generate"), (0, 2)),
    "a processor's auto_map": (edited("processor_config.json", auto_map={"AutoProcessor": "canary.Canary"}), IGNORED),
    "an image processor's auto_map": (edited("preprocessor_config.json", auto_map={"AutoImageProcessor": "canary.Canary"}), IGNORED),
}  # fmt: skip
ADAPTER_HOOKS: dict[str, tuple[Plant, tuple[int, ...]]] = {
    "auto_mapping": (edited("adapter_config.json", auto_mapping={"base_model_class": "Canary", "parent_library": "canary"}), (0, 2)),
    "auto_map": (edited("adapter_config.json", auto_map=AUTO_MAP), (0, 2)),
    "custom peft_type": (edited("adapter_config.json", peft_type="canary.Canary"), REFUSED),
    "a megatron core": (edited("adapter_config.json", megatron_config={}, megatron_core="canary"), (0, 2)),
    "runtime_config": (edited("adapter_config.json", runtime_config={"canary": "canary"}), (0, 2)),
    "base_model_name_or_path is a URL": (edited("adapter_config.json", base_model_name_or_path="https://example.org/o/r"), REFUSED),
    "base_model_name_or_path is a hub id": (edited("adapter_config.json", base_model_name_or_path="owner/gone"), REFUSED),
}  # fmt: skip


def hooks() -> Iterator[Case]:
    """Every key by which a folder may ask for code, by every command that opens it."""
    model, adapter = glm_folder(), trained("lora") / "checkpoint-2"
    for use in (predict, train):
        for name, (plant, codes) in MODEL_HOOKS.items():
            run = partial(_in_its_own_folder, model, plant, use, codes)
            yield Case(f"hooks: {name}, {use.__name__}", run)
    for use in (predict, merge):
        for name, (plant, codes) in ADAPTER_HOOKS.items():
            run = partial(_in_its_own_folder, adapter, plant, use, codes)
            yield Case(f"hooks: {name} of an adapter, {use.__name__}", run)
    published = {"predict": predict, "train": train}
    for name, use in published.items():
        run = partial(_published, use)
        yield Case(f"hooks: code of the published layout, {name}", run)


def _in_its_own_folder(
    base: Path, plant: Plant, use: Use, codes: tuple[int, ...], folder: Path
) -> None:
    """With the planted folder on Python's path, where a name alone would find the module."""
    import sys

    sys.path.insert(0, str(folder / base.name))
    survives(base, plant, use, codes, folder)


def _published(use: Use, folder: Path) -> None:
    """A chatglm folder whose auto_map names code that is there: ours is used."""
    import tiny

    model = tiny.save_model(folder / "base" / "published", "chatglm", tiktoken=True)
    for name in ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py"):
        (model / name).write_text(code(folder / "LEFT"))
    survives(model, lambda target, left: None, use, IGNORED, folder)


def cases() -> Iterator[Case]:
    """Both."""
    yield Case("pickles: the canaries themselves", canaries_sing)
    yield from pickles()
    yield from hooks()


def canaries_sing(folder: Path) -> None:
    """What opens pickles and runs modules does leave the file: the cases above can fail."""
    import torch

    left = folder / "LEFT"
    for sing in (
        lambda: pickle.loads(raw(left)),
        lambda: torch.load(_written(folder / "x.pt", zipped(left)), weights_only=False),
        lambda: exec(code(left), {}),
    ):
        sing()
        left.unlink()


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
