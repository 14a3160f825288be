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
    "two images for one place": (
        {"messages": [CHAT[0] | {"content": "<image>Q"}, CHAT[1]], "images": ["a.png", "b.png"]},
        "images: brings 2, and there are 1 places for images",
    ),
    "an image's address": ({"messages": CHAT, "images": ["https://x/a.png"]}, "is a URL"),
    "an image in a reply": (
        {"messages": [CHAT[0], CHAT[1] | {"image": "a.png"}]}, "only users and tools show one"
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
    "KTOs other names": (PAIR | {"desirable": False}, "desirable: is false"),
    "a mark in a message": ({"messages": [CHAT[0], CHAT[1] | {"label": False}]}, "label: is false"),
    "xtuner's mask": (
        {"conversation": [{"input": Q, "output": A, "output_with_loss": False}]}, "seems to say what is learned"
    ),
    "a mask in an object": (PAIR | {"metadata": {"train": False}}, "seems to say what is learned"),
    "a mask as text": ({"messages": [CHAT[0], CHAT[1] | {"learnable": "false"}]}, "seems to say"),
    "a skipped reply": ({"messages": [CHAT[0], CHAT[1] | {"skip": True}]}, "seems to say what is learned"),
    "no loss as a number": ({"messages": [CHAT[0], CHAT[1] | {"no_loss": 1}]}, "seems to say what is learned"),
    "no loss as text": ({"messages": [CHAT[0], CHAT[1] | {"without_loss": "True"}]}, "seems to say what is learned"),
    "a sample's weight": (PAIR | {"sample_weight": 0.1}, "seems to say what is learned"),
    "a part's weight": (
        {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": A, "weight": 0}]}]},
        "parts are not trained one by one",
    ),
    "Anthropic's calls": (
        {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}]}]},
        "a part of type 'tool_use'",
    ),
    "Gemini": ({"contents": [{"role": "user", "parts": [{"text": Q}]}]}, "the layout is not known"),
    "OpenAI batches": ({"request": {"messages": CHAT[:1]}, "response": {}}, "the layout is not known"),
    "ChatML with more text": (
        {"text": f"Read.\n<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{A}<|im_end|>"},
        "stands outside of its ChatML turns",
    ),
    "ChatML with names": (
        {"text": f"<|im_start|>system name=x\n{Q}<|im_end|>\n<|im_start|>assistant\n{A}<|im_end|>"},
        "stands outside of its ChatML turns",
    ),
    "two texts of a message": ({"messages": [CHAT[0] | {"value": "other"}, CHAT[1]]}, "keep one"),
    "two roles of a message": ({"messages": [CHAT[0] | {"from": "gpt"}, CHAT[1]]}, "keep one"),
    "tools and functions": (
        {"messages": CHAT, "tools": [{"name": "f"}], "functions": [{"name": "g"}]}, "both define tools"
    ),
    "image and images": ({"messages": CHAT, "image": "a.png", "images": ["b.png"]}, "both bring one"),
    "tools of a user": ({"messages": [CHAT[0] | {"tools": [{"name": "f"}]}, CHAT[1]]}, "key 'tools'"),
    "columns of lists": ({"messages": {"role": ["user"], "content": [Q]}}, "not a list of messages"),
    "lists of strings": ({"conversation": [[Q, A]]}, "the layout is not known"),
    "several answers": ({"question": Q, "answers": [A]}, "no pair of columns"),
    "RAG with a list": ({"question": Q, "answer": A, "context": ["a", "b"]}, "context: is a list"),
    "labelled classes": ({"text": Q, "label": 1}, "the layout is not known"),
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
    "two replies": ({"instruction": Q, "output": A, "response": "B"}, "response: what 1 rows hold"),
    "an input beside a question": ({"question": Q, "answer": A, "input": "I"}, "input: what 1 rows"),
    "a passage": ({"question": Q, "answer": A, "passage": "P"}, "passage: what 1 rows hold"),
    "SWE": ({"messages": CHAT, "resolved": False}, "resolved: what 1 rows hold"),
    "a speaker's name": ({"messages": [CHAT[0] | {"name": "Tom"}, CHAT[1]]}, "name of messages"),
    "a long topic": (PAIR | {"topic": "Write about ships. " * 9}, "topic: what 1 rows hold"),
    "a part's own key": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": Q, "source": "S"}]}, CHAT[1]]},
        "source of a content part",
    ),
    "BELLE in turns": (
        {"instruction": f"Human:{Q}\nAssistant:{A}\nHuman:{Q}\nAssistant:", "input": "", "output": A},
        "spells a dialogue out",
    ),
    "ChatGLM2": (
        {"prompt": f"[Round 1]\n\n问：{Q}\n\n答：", "response": A}, "spells a dialogue out"
    ),
    "R1 distilled by hand": (PAIR | {"response": f"<thinking>x</thinking>{A}"}, "tags that no GLM"),
    "Magistral": (PAIR | {"response": f"[THINK]x[/THINK]{A}"}, "tags that no GLM"),
    "Markdown images": (PAIR | {"prompt": f"![x](images/a.png) {Q}"}, "an image's placeholder or path"),
    "HTML images": (PAIR | {"prompt": f'<img src="a.png"> {Q}'}, "an image's placeholder or path"),
    "videos in text": (PAIR | {"prompt": f"<video>{Q}"}, "an image's placeholder or path"),
    "Qwen-Agent": (
        PAIR | {"response": '✿FUNCTION✿: f\n✿ARGS✿: {"x": 1}\n✿RESULT✿'}, "a call written as text"
    ),
    "Claude's calls": (
        PAIR | {"response": '<function_calls><invoke name="f"></invoke></function_calls>'},
        "a call written as text",
    ),
    "a broken call": (PAIR | {"response": "<tool_call>f(x)</tool_call>"}, "the mark of a call"),
    "parts as text": (PAIR | {"prompt": '[{"type": "text", "text": "Q"}]'}, "content parts written"),
    "Gemma's turns": (PAIR | {"prompt": f"<start_of_turn>user\n{Q}<end_of_turn>"}, "a control token"),
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
