"""Files of other frameworks that cannot be read as they are: what is said of each."""

from __future__ import annotations

from typing import Any

from foreign_rows import CALL, ONE, TWO, messages, openai

Q, A = ONE[0][1], ONE[1][1]
CHAT = messages(ONE)
PAIR = {"prompt": Q, "response": A}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DPO columns": ({"prompt": Q, "chosen": A, "rejected": "No."}, "preference data"),
    "DPO conversational": ({"chosen": CHAT, "rejected": CHAT}, "the layout is not known"),
    "HH-RLHF": ({"chosen": "Human: hi", "rejected": "Human: hi"}, "the layout is not known"),
    "LLaMA-Factory ranking": (
        {"instruction": Q, "input": "", "chosen": A, "rejected": "No."}, "chosen: preference data"
    ),
    "ms-swift RLHF": ({"messages": CHAT, "rejected_response": "No."}, "rejected_response"),
    "LLaMA-Factory KTO": ({"messages": CHAT, "label": False}, "label: is false"),
    "TRL KTO": ({"prompt": Q, "completion": A, "label": False}, "label: is false"),
    "LLaMA-Factory kto_tag": ({"instruction": Q, "output": A, "kto_tag": False}, "kto_tag: is false"),
    "UltraFeedback": ({"instruction": Q, "completions": [{"response": A}]}, "output: is missing"),
    "LIMA": ({"conversations": [Q, A], "source": "x"}, "is text, not an object"),
    "UltraChat strings": ({"id": "0", "data": [Q, A]}, "the layout is not known"),
    "Baize": ({"topic": "x", "input": f"[|Human|] {Q} [|AI|] {A}"}, "no pair of columns"),
    "SQuAD": (
        {"question": Q, "context": "x", "answers": {"text": ["Oslo"]}}, "no pair of columns"
    ),
    "s1K": ({"question": Q, "solution": A, "thinking_trajectories": ["x"]}, "no pair of columns"),
    "Magicoder": ({"problem": Q, "solution": A}, "the layout is not known"),
    "XSum": ({"document": Q, "summary": A, "id": "1"}, "the layout is not known"),
    "CNN/DailyMail": ({"article": Q, "highlights": A}, "the layout is not known"),
    "WMT": ({"translation": {"en": Q, "zh": A}}, "the layout is not known"),
    "SST-2": ({"sentence": Q, "label": 1, "idx": 0}, "the layout is not known"),
    "labelled text": ({"text": Q, "label_text": "good"}, "the layout is not known"),
    "axolotl input_output": (
        {"segments": [{"label": True, "text": Q}]}, "the layout is not known"
    ),
    "OASST tree": ({"prompt": {"text": Q, "replies": []}}, "no pair of columns"),
    "mask by axolotl": ({"messages": [CHAT[0], CHAT[1] | {"mask": 0}]}, "key 'mask'"),
    "masks that disagree": (
        {"messages": [CHAT[0], CHAT[1] | {"train": True, "loss": False}]}, "contradict each other"
    ),
    "train_detail in parts": (
        {
            "messages": [
                CHAT[0], CHAT[1] | {"train_detail": [{"train": True}, {"train": False}]}
            ]
        },
        "trains parts of a reply",
    ),
    "a slip in a key": ({"messages": [CHAT[0], CHAT[1] | {"trian": False}]}, "did you mean 'train'"),
    "a slip in a column": (PAIR | {"tool": [{"name": "f"}]}, "did you mean 'tools'"),
    "two system texts": (PAIR | {"system": "a", "system_prompt": "b"}, "keep one"),
    "documents": (PAIR | {"documents": [{"text": "x"}]}, "GLM-4 has no place for documents"),
    "videos": ({"messages": CHAT, "videos": ["a.mp4"]}, "videos"),
    "audio": ({"messages": CHAT, "audios": ["a.wav"]}, "audios"),
    "two images": ({"messages": CHAT, "images": ["a.png", "b.png"]}, "takes one image"),
    "an image's address": ({"messages": CHAT, "images": ["https://x/a.png"]}, "is a URL"),
    "an image in a reply": (
        {"messages": [CHAT[0], CHAT[1] | {"image": "a.png"}]}, "only users show one"
    ),
    "a part without its image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT[1]]},
        "has a part of type 'image'",
    ),
    "two questions": ({"messages": [CHAT[0], *CHAT]}, "message 2 is 'user' but message 1 is too"),
    "an assistant that opens": ({"messages": [CHAT[1], *CHAT]}, "a dialogue begins with 'user'"),
    "a system text in the middle": (
        {"messages": [*CHAT, {"role": "system", "content": "x"}, *CHAT]}, "only at the start"
    ),
    "a call without its result": (
        {"messages": [*openai(CALL)[:2], *CHAT]}, "has no result"
    ),
    "an unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot'"),
    "a null reply": (
        {"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "content is null"
    ),
    "an empty reply": ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, "is empty"),
    "no reply": ({"messages": CHAT[:1]}, "the last message must be a reply"),
    "messages as text": ({"messages": "Human: hi"}, "not JSON at column 1"),
    "everything masked": ({"messages": [CHAT[0], CHAT[1] | {"loss": False}]}, "nothing to learn"),
    "MOSS with commands": (
        {"chat": {"turn_1": {"Human": Q, "Commands": "Search(x)", "MOSS": A}}}, "MOSS's own tools"
    ),
}  # fmt: skip
"""Name -> (row, part of the reason)."""

NOTED: dict[str, tuple[dict[str, Any], str]] = {
    "UltraChat 200k": ({"prompt": Q, "messages": messages(TWO)}, "prompt: what 1 rows hold"),
    "NuminaMath": ({"problem": Q, "solution": A, "messages": CHAT}, "problem: what 1 rows hold"),
    "Magpie": (
        {"uuid": "1", "conversations": CHAT, "instruction": Q, "response": A}, "instruction: what"
    ),
    "MetaMathQA": (
        {"type": "x", "query": Q, "original_question": "Z", "response": A}, "original_question"
    ),
    "a rationale": (PAIR | {"rationale": "Because."}, "rationale: what 1 rows hold"),
    "a chain of thought in a column": ({"question": Q, "cot": "So.", "answer": A}, "cot: what"),
    "a message's own key": (
        {"messages": [CHAT[0], CHAT[1] | {"explanation": "x"}]}, "explanation of messages"
    ),
    "Guanaco": ({"text": f"### Human: {Q}### Assistant: {A}"}, "spells a dialogue out"),
    "Llama 2 text": ({"text": f"<s>[INST] {Q} [/INST] {A} </s>"}, "spells a dialogue out"),
    "an alpaca prompt as text": (
        {"text": f"### Instruction:\n{Q}\n\n### Response:\n{A}"}, "spells a dialogue out"
    ),
    "Qwen-VL": (
        {
            "conversations": [
                {"from": "human", "value": f"Picture 1: <img>a.png</img>\n{Q}"},
                {"from": "gpt", "value": A},
            ]
        },
        "an image's placeholder",
    ),
    "an image that is lost": (
        {"messages": [{"role": "user", "content": f"<image>{Q}"}, CHAT[1]], "images": []},
        "an image's placeholder",
    ),
    "a tagged call": (
        {
            "messages": [
                CHAT[0],
                {"role": "assistant", "content": '<tool_call>{"name": "f", "arguments": {}}'},
            ]
        },
        "a call written as text",
    ),
}  # fmt: skip
"""Name -> (row, part of the note)."""
