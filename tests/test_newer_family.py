"""GLM-4.1V through transformers' own model and Pillow: the same YAML with another model.path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pictures
import pytest
import runs
import torch
import transformers
from closeness import SMOOTH_STEPS, assert_trained_alike
from PIL import Image
from safetensors.torch import load_file

from finetune.data.chat import glm41v_image
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation, Message, ShownImage
from finetune.errors import ModelError
from finetune.export.merge import merge
from finetune.generation.generate import generate
from finetune.generation.load import open_model
from finetune.generation.predict import PredictOptions, predict
from finetune.models.load import load_model

METHODS = {
    "lora": {"kind": "lora", "rank": 4, "dropout": 0.0},
    "ptuning_v2": {"kind": "ptuning_v2", "num_virtual_tokens": 4},
    "full": {"kind": "full"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("newer")
    pictures.save_grid_model(root / "model")
    pictures.write_dialogues(root, 12)
    Image.new("RGB", (90, 200), "green").save(root / "images/green.png")
    Image.new("RGB", (300, 60), "red").save(root / "images/red.png")
    return root


def settings(folder: Path, run_dir: Path, method: str, **changes: Any) -> dict[str, Any]:
    data = folder / "rows.jsonl"
    options = {
        "model__freeze": ["vision"], "data__validation": str(data), "training__max_steps": 2,
        "evaluation__max_samples": 4,
    } | changes  # fmt: skip
    return runs.config(folder / "model", data, run_dir, **options) | {"method": METHODS[method]}


def asking(image: str | None) -> Conversation:
    return Conversation(
        (Message("user", "what is this", images=(ShownImage(image),) if image else ()),),
        location="here",
    )


def test_a_prompt_is_what_transformers_own_pieces_make(folder: Path) -> None:
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    template = ChatTemplate(load_chat_tokenizer(folder / "model"))
    path = str(folder / "images/green.png")
    prompt = template.prompt(asking(path), 1)
    processor = Glm4vImageProcessorPil.from_pretrained(folder / "model")
    theirs = processor(images=[Image.open(path).convert("RGB")], return_tensors="np")
    number = int(theirs["image_grid_thw"].prod() // 4)
    text = (
        "[gMASK]<sop><|user|>\n<|begin_of_image|>" + "<|image|>" * number + "<|end_of_image|>"
        "what is this<|assistant|>\n"
    )
    assert prompt == template.tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert number > 4
    for name, array in prompt.arrays().items():  # type: ignore[attr-defined]
        assert (array == theirs[name]).all()
    assert template.decode(prompt).count("<|image|>") == 1


def test_logits_are_transformers_own(folder: Path) -> None:
    opened = open_model(folder / "model")
    prompt = opened.template.prompt(asking(str(folder / "images/red.png")), 1)
    shown = {name: torch.from_numpy(value) for name, value in prompt.arrays().items()}  # type: ignore[attr-defined]
    ids = torch.tensor([prompt])
    own = transformers.Glm4vForConditionalGeneration.from_pretrained(folder / "model").eval()
    kinds = (ids == own.config.image_token_id).int()
    with torch.no_grad():
        theirs = own(input_ids=ids, **shown, mm_token_type_ids=kinds).logits
        ours = opened.model(input_ids=ids, **shown).logits
        blind = opened.model(input_ids=ids, **shown | {"pixel_values": 0 * shown["pixel_values"]})
    assert torch.equal(ours, theirs)
    assert float((blind.logits - ours)[0, -1].abs().max()) > 1e-3


def test_batches_with_and_without_images_are_answered_like_their_rows(folder: Path) -> None:
    opened = open_model(folder / "model")
    images = ["red", None, "green", "blue", None]
    prompts = [
        opened.template.prompt(asking(name and str(folder / f"images/{name}.png")), 1)
        for name in images
    ]

    def replies(batch: list[Any], size: int) -> list[Any]:
        found = generate(opened.model, opened.template, batch, max_new_tokens=6, batch_size=size)
        return [reply.ids for reply in found]

    together = replies(prompts, 5)
    assert together == [replies([prompt], 1)[0] for prompt in prompts]
    assert together[0] != together[2]
    ids = torch.tensor([prompts[0]])
    shown = {name: torch.from_numpy(value) for name, value in prompts[0].arrays().items()}  # type: ignore[attr-defined]
    plain = opened.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **shown, use_cache=False,
        max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert plain[0, ids.shape[1] :].tolist()[: len(together[0])] == list(together[0])


@pytest.mark.parametrize("method", METHODS)
def test_the_same_yaml_trains_it(folder: Path, tmp_path: Path, method: str) -> None:
    done = runs.run_here(
        settings(
            folder, tmp_path / "run", method, training__activation_checkpointing=method == "full"
        )
    )
    losses = runs.history(tmp_path / "run")
    assert len(losses) == 2
    checkpoint = Path(done["checkpoint"])
    if method == "full":
        before = load_file(folder / "model/model.safetensors")
        after = load_file(checkpoint / "model.safetensors")
        assert after.keys() == before.keys()
        still = {key for key in before if torch.equal(before[key], after[key])}
        assert still == {key for key in before if ".visual." in key}
        assert (checkpoint / "preprocessor_config.json").is_file()
    if method != "lora":
        return
    keys = load_file(checkpoint / "adapter_model.safetensors")
    assert all(".language_model.layers." in key for key in keys)
    merge(checkpoint, tmp_path / "merged")
    said = []
    for number, target in enumerate((str(checkpoint), str(tmp_path / "merged"))):
        out = tmp_path / f"{number}.jsonl"
        predict(target, [str(folder / "rows.jsonl")], out, options=PredictOptions(6, 5))
        said.append(out.read_text(encoding="utf-8"))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("method", "freeze", "sharding"),
    [
        ("full", [], None),
        ("full", [], {"zero_stage": 3}),
        ("ptuning_v2", ["vision"], {"zero_stage": 3}),
    ],
)
def test_two_processes_with_and_without_images_learn_like_one(
    folder: Path, tmp_path: Path, method: str, freeze: list[str], sharding: dict[str, int] | None
) -> None:
    data = str(pictures.write_dialogues(tmp_path / "pair", 2))
    changes = {
        "model__freeze": freeze, "training__max_steps": 3, "training__learning_rate": 1e-3,
        "data__train": data, "data__validation": data, **SMOOTH_STEPS,
    }  # fmt: skip
    runs.run_here(settings(folder, tmp_path / "one", method, **changes, training__batch_size=2))
    shared = settings(folder, tmp_path / "two", method, **changes, training__batch_size=1)
    if sharding:
        shared["deepspeed"] = sharding
    two = runs.run_command(shared, tmp_path, processes=2)
    assert two.returncode == 0, two.stderr[-2000:]
    assert_trained_alike(tmp_path / "two", tmp_path / "one")
    said = [(tmp_path / run / "predictions-3.jsonl").read_text() for run in ("two", "one")]
    assert said[0] == said[1]


def test_packed_rows_are_trained(folder: Path, tmp_path: Path) -> None:
    runs.run_here(settings(folder, tmp_path / "run", "lora", data__packing=True))
    assert len(runs.history(tmp_path / "run")) >= 1


def test_a_version_of_transformers_that_needs_torchvision_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "transformers.models.glm4v.image_processing_pil_glm4v"
    monkeypatch.setitem(sys.modules, name, None)
    glm41v_image._processor.cache_clear()
    with pytest.raises(ModelError, match=r"cannot prepare images.*or torchvision"):
        ChatTemplate(load_chat_tokenizer(folder / "model"))
    monkeypatch.undo()
    ChatTemplate(load_chat_tokenizer(folder / "model"))


def test_a_folder_without_its_preprocessor_says_so(folder: Path, tmp_path: Path) -> None:
    pictures.save_grid_model(tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"no preprocessor_config\.json"):
        ChatTemplate(load_chat_tokenizer(tmp_path / "model"))


def test_image_tokens_without_pixels_are_an_error(folder: Path) -> None:
    model = load_model(folder / "model")
    with pytest.raises(ValueError, match="no pixel_values"):
        model(input_ids=torch.tensor([[1, pictures.BOI, model.config.image_token_id, 5]]))
    embeds = model.get_input_embeddings()(torch.tensor([[1, 5]]))
    shown = {"pixel_values": torch.zeros(4, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 2, 2]])}  # fmt: skip
    with pytest.raises(ValueError, match="do not match, tokens: 0, features: 1"):
        model(inputs_embeds=embeds, **shown)
