"""Are prompts with images what the family's own processor makes? Ids and pixels, byte for byte.

Dialogues are drawn at random: one to four turns, up to three images among the words of a question, of sizes from
12 to 700 pixels, with and without alpha, grey, with palettes, turned by EXIF. Each is laid out here and by
transformers' `Glm4vProcessor` or `Glm46VProcessor` with the checkpoint's template and its Pillow image processor.
Their video processor needs torchvision and is left out. Half a minute of one CPU core for 200.

    python scripts/evidence/image_prompts.py FOLDER [--family glm4v|glm46v|glm_ocr|glm4v_moe] [--count 200] [--seed 0]

FOLDER is a GLM-4.1V, GLM-4.6V-Flash or GLM-OCR checkpoint (tokenizer, template, config.json,
preprocessor_config.json; no weights are read); without one a tiny one of the family is made there. Exit code 1 if any differs.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "这是什么",
    " what is this",
    "\n",
    "  ",
    "红色的 ",
    "😀",
    "1, 2, 3",
    "\n\n比较一下：",
    "e\u0301",
    "。",
]
MODES = ("RGB", "RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "turned")


def picture(draw: random.Random, folder: Path, number: int) -> str:
    """An image file of some size and mode."""
    size = (draw.randint(12, 700), draw.randint(12, 700))
    mode = draw.choice(MODES)
    values = np.random.default_rng(draw.randrange(1 << 30)).integers(0, 256, (*size[::-1], 4))
    image = Image.fromarray(values.astype(np.uint8), "RGBA")
    if mode == "CMYK":
        path = folder / f"{number}.jpg"
        image.convert("RGB").convert("CMYK").save(path)
    elif mode == "turned":
        path, exif = folder / f"{number}.jpg", Image.Exif()
        exif[0x0112] = draw.randint(2, 8)
        image.convert("RGB").save(path, exif=exif)
    else:
        path = folder / f"{number}.png"
        if mode == "P":
            image.convert("RGB").convert("P").save(path, transparency=draw.randrange(256))
        else:
            image.convert(mode).save(path)
    return str(path)


def text(draw: random.Random, most: int) -> str:
    """Some words."""
    return "".join(draw.choices(WORDS, k=draw.randint(1, most)))


def dialogues(count: int, seed: int, folder: Path) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """Each as our conversation and as the processor takes it."""
    from finetune.data.chat.template_check import parts_of
    from finetune.data.dialogue.conversation import Conversation, Message, ShownImage

    draw = random.Random(seed)
    for number in range(count):
        ours = [Message("system", text(draw, 3))] if draw.random() < 0.3 else []
        for turn in range(draw.randint(1, 4)):
            question = text(draw, 6)
            places = sorted(draw.choices(range(len(question) + 1), k=draw.randint(0, 3)))
            shown = tuple(
                ShownImage(picture(draw, folder, 1000 * number + 10 * turn + n), at)
                for n, at in enumerate(places)
            )
            ours.append(Message("user", question, images=shown))
            ours.append(Message("assistant", text(draw, 4)))
        ours = ours[:-1]
        theirs = [
            {"role": m.role, "content": parts_of(m) if m.role == "user" else m.content}
            for m in ours
        ]
        yield Conversation(tuple(ours), location=str(number)), theirs


def own_processor(folder: Path) -> Any:
    """The family's processor without its video processor."""
    import transformers
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind = transformers.AutoConfig.from_pretrained(folder).model_type
    older = kind in ("glm4v", "glm4v_moe")
    made = transformers.Glm4vProcessor if older else transformers.Glm46VProcessor

    class ForImages(made):  # type: ignore[valid-type, misc]
        """Checks no video processor."""

        def check_argument_for_proper_class(self, name: str, value: Any) -> Any:
            """Return the value's class."""
            return type(value)

    images = Glm4vImageProcessorPil.from_pretrained(folder)
    return ForImages(images, tokenizer, None, chat_template=tokenizer.chat_template)


def theirs_of(processor: Any, messages: list[dict[str, Any]]) -> Any:
    """What the processor makes of a dialogue: its own template, then text and images together."""
    written = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    parts = [part for m in messages for part in m["content"] if isinstance(part, dict)]
    paths = [part["path"] for part in parts if "path" in part]
    images = [ImageOps.exif_transpose(Image.open(path)) for path in paths]
    return processor(
        text=[written], images=images or None, add_special_tokens=False, return_tensors="np"
    )


def differences(folder: Path, work: Path, count: int, seed: int) -> list[str]:
    """Which of `count` dialogues differ, and in what."""
    from finetune.data.chat.template import ChatTemplate
    from finetune.data.chat.tokenizer import load_chat_tokenizer

    template, processor = ChatTemplate(load_chat_tokenizer(folder)), own_processor(folder)
    work.mkdir(parents=True, exist_ok=True)
    found = []
    for number, (conversation, messages) in enumerate(dialogues(count, seed, work)):
        prompt: Any = template.prompt(conversation, len(conversation.messages))
        theirs = theirs_of(processor, messages)
        if list(prompt) != theirs["input_ids"][0].tolist():
            found.append(f"{number}: ids")
        for name, array in (prompt.arrays() if conversation.images else {}).items():
            same = array.dtype == theirs[name].dtype and array.tobytes() == theirs[name].tobytes()
            found += [] if same else [f"{number}: {name}"]
    return found


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", default="glm4v")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if not (given.folder / "config.json").is_file():
        import pictures

        pictures.save_grid_model(given.folder, given.family)
    found = differences(given.folder, given.folder / "pictures", given.count, given.seed)
    print(f"{given.count} dialogues, {len(found)} differences", *found[:20], sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
