"""The same few dialogues as other frameworks and published data sets write them, one row each.

`READ` are files that are read as meant: name, row, expected messages, and where that takes an option
of the `data` section, the rules. `NOT_READ` are files that are refused or read with a note.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from finetune.data.dialogue.formats import PLAIN, RowRules

Turn = tuple[str, ...]
Row = dict[str, Any]

ONE: list[Turn] = [("user", "Capital of Norway?"), ("assistant", "Oslo.")]
TWO: list[Turn] = [*ONE, ("user", "And of Peru?"), ("assistant", "Lima.")]
CHINESE: list[Turn] = [("user", "挪威的首都？\n请简答。"), ("assistant", "奥斯陆 😀\n\n就这样。")]
TOLD: list[Turn] = [("system", "Be brief."), *ONE]
TOLD_TWO: list[Turn] = [("system", "Be brief."), *TWO]
DIALOGUES = {"one": ONE, "two": TWO, "chinese": CHINESE, "told": TOLD, "told two": TOLD_TWO}
SINGLE = {"one": ONE, "chinese": CHINESE}
OSLO, LIMA = '{"city": "Oslo"}', '{"city": "Lima"}'
CALL: list[Turn] = [
    ("user", "Weather in Oslo?"), ("call", "weather", OSLO), ("observation", '{"t": 3}'),
    ("assistant", "3 degrees."),
]  # fmt: skip
CALLS: list[Turn] = [
    ("user", "Oslo and Lima?"), ("call", "weather", OSLO), ("call", "weather", LIMA),
    ("observation", '{"t": 3}'), ("observation", '{"t": 19}'), ("assistant", "3 and 19."),
]  # fmt: skip
WITH_CALLS = {"call": CALL, "calls": CALLS}
FUNCTION: Row = {
    "name": "weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOL = {"type": "function", "function": FUNCTION}


class Foreign(NamedTuple):
    """One file of one row."""

    name: str
    row: Row
    expected: list[Turn]
    rules: RowRules = PLAIN
    image: str | None = None


def said(turn: Turn) -> str:
    return turn[-1]


def _plain(turns: Sequence[Turn]) -> tuple[str, list[Turn]]:
    """The system text, and the other turns."""
    told = turns[0][0] == "system"
    return (turns[0][1] if told else ""), list(turns[told:])


def _pairs(turns: Sequence[Turn]) -> tuple[str, list[list[str]]]:
    system, rest = _plain(turns)
    return system, [[q[1], a[1]] for q, a in zip(rest[::2], rest[1::2], strict=True)]


def _with(row: Row, **more: Any) -> Row:
    return row | {key: value for key, value in more.items() if value}


def messages(turns: Sequence[Turn], role: str = "role", text: str = "content", **names: str) -> Any:
    return [{role: names.get(t[0], t[0]), text: t[1]} for t in turns]


def openai(turns: Sequence[Turn], *, arguments_as_text: bool = True) -> list[Row]:
    """Calls of one turn in one message, results with the ids of their calls."""
    items: list[Row] = []
    ids: list[str] = []
    for turn in turns:
        if turn[0] == "call":
            if not items or "tool_calls" not in items[-1]:
                items.append({"role": "assistant", "content": None, "tool_calls": []})
            ids.append(f"c{len(ids)}")
            arguments = turn[2] if arguments_as_text else json.loads(turn[2])
            function = {"name": turn[1], "arguments": arguments}
            items[-1]["tool_calls"].append(
                {"id": ids[-1], "type": "function", "function": function}
            )
        elif turn[0] == "observation":
            items.append({"role": "tool", "tool_call_id": ids.pop(0), "content": turn[1]})
        else:
            items.append({"role": turn[0], "content": turn[1]})
    return items


def _called(turns: Sequence[Turn], role: str, text: str, names: dict[str, str]) -> list[Row]:
    """Each call a message of its own, `{"name", "arguments"}` as its text."""
    return [
        {role: names["call"], text: f'{{"name": "{t[1]}", "arguments": {t[2]}}}'}
        if t[0] == "call"
        else {role: names.get(t[0], t[0]), text: said(t)}
        for t in turns
    ]


def _alpaca(turns: Sequence[Turn]) -> Row:
    system, pairs = _pairs(turns)
    question, answer = pairs.pop()
    return _with(
        {"instruction": question, "input": "", "output": answer}, history=pairs, system=system
    )


def _swift(turns: Sequence[Turn]) -> Row:
    system, pairs = _pairs(turns)
    question, answer = pairs.pop()
    return _with({"query": question, "response": answer}, history=pairs, system=system)


def _trl(turns: Sequence[Turn]) -> Row:
    return {"prompt": messages(turns[:-1]), "completion": messages(turns[-1:])}


def _human(turns: Sequence[Turn], names: tuple[str, str] = ("human", "assistant")) -> Row:
    system, pairs = _pairs(turns)
    items = [dict(zip(names, pair, strict=True)) for pair in pairs]
    if system:
        items[0]["system"] = system
    return {"conversation": items, "conversation_id": 7, "category": "x"}


def _chatml(turns: Sequence[Turn]) -> Row:
    return {"text": "".join(f"<|im_start|>{t[0]}\n{t[1]}<|im_end|>\n" for t in turns)}


def _moss(turns: Sequence[Turn]) -> Row:
    _, pairs = _pairs(turns)
    chat = {
        f"turn_{n}": {
            "Human": f"<|Human|>: {q}<eoh>\n", "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
            "Commands": "<|Commands|>: None<eoc>\n", "MOSS": f"<|MOSS|>: {a}<eom>\n",
        }
        for n, (q, a) in enumerate(pairs, 1)
    }  # fmt: skip
    return {"conversation_id": "1", "num_turns": len(pairs), "chat": chat}


def _glaive(turns: Sequence[Turn]) -> Row:
    system, pairs = _pairs(turns)
    chat = "".join(f"USER: {q}\n\n\nASSISTANT: {a} <|endoftext|>\n\n\n" for q, a in pairs)
    return {"system": f"SYSTEM: {system}", "chat": chat}


def _lists(turns: Sequence[Turn]) -> dict[str, Row]:
    """Rows of layouts that can hold any plain dialogue."""
    system, rest = _plain(turns)
    gpt = messages(turns, "from", "value", user="human", assistant="gpt")
    untold = messages(rest, "from", "value", user="human", assistant="gpt")
    parts = [{"role": t[0], "content": [{"type": "text", "text": t[1]}]} for t in turns]
    nulls = [m | {"name": None, "tool_calls": None, "function_call": None} for m in messages(turns)]
    weighted = [m | ({"weight": 1} if m["role"] == "assistant" else {}) for m in messages(turns)]
    return {
        "OpenAI": {"messages": messages(turns)},
        "OpenAI fine-tuning with weights": {"messages": weighted, "parallel_tool_calls": False},
        "OpenAI content parts": {"messages": parts},
        "OpenAI developer": {"messages": messages(turns, system="developer")},
        "nulls of a table": {"messages": nulls, "tools": None, "images": None},
        "ShareGPT": {"id": "a_0", "conversations": gpt},
        "LLaMA-Factory sharegpt": _with({"conversations": untold}, system=system, tools=""),
        "LLaMA-Factory alpaca": _alpaca(turns),
        "ms-swift query": _swift(turns),
        "ms-swift conversation": _human(turns),
        "Capybara": {"source": "x"} | _human(turns, ("input", "output")),
        "TRL conversational": _trl(turns),
        "axolotl chat_template": {"conversations": messages(turns)},
        "conversation of messages": {"conversation": messages(turns)},
        "capital roles": {
            "messages": messages(turns, user="User", assistant="Assistant", system="System")
        },
        "Gemini roles": {"messages": messages(turns, assistant="model")},
        "LLaMA-Factory v1": {
            "messages": [
                {"role": t[0], "content": [{"type": "text", "value": t[1]}]} for t in turns
            ]
        },
        "old ShareGPT": {
            "conversations": messages(turns, "from", "value", user="human", assistant="chatgpt")
        },
        "ChatML text": _chatml(turns),
        "no_robots": {"prompt_id": "f", "messages": messages(turns), "category": "Chat"},
        "LongWriter": {"messages": messages(turns), "type": "writing"},
    }


def _columns(question: str, answer: str) -> dict[str, Row]:
    """Rows of layouts with one question and one answer."""
    return {
        "alpaca": {"instruction": question, "input": "", "output": answer, "text": None},
        "BELLE": {"instruction": question, "input": "", "output": answer},
        "WizardLM": {"instruction": question, "output": answer, "idx": 3},
        "Dolly": {
            "instruction": question, "context": "", "response": answer, "category": "open_qa"
        },
        "Firefly": {"kind": "NLI", "input": question, "target": answer},
        "AdvertiseGen": {"content": question, "summary": answer},
        "GSM8K": {"question": question, "answer": answer},
        "ms-swift plain": {"query": question, "response": answer},
        "user and assistant": {"user": question, "assistant": answer},
        "TRL plain": {"prompt": question, "completion": answer},
        "Hugging Face pair": {"prompt": question, "response": answer},
        "translation pair": {"source": question, "target": answer},
        "COIG": {
            "instruction": question, "input": "", "output": answer, "task_type": "QA",
            "domain": "x", "metadata": None,
        },
    }  # fmt: skip


def _tools(turns: Sequence[Turn]) -> dict[str, Row]:
    text = json.dumps([FUNCTION])
    gpt = {"user": "human", "call": "function_call", "assistant": "gpt"}
    swift = {"call": "tool_call", "observation": "tool_response"}
    ours = [
        {"role": "assistant", "metadata": t[1], "content": t[2]}
        if t[0] == "call"
        else {"role": t[0], "content": t[1]}
        for t in turns
    ]
    legacy = [
        {"role": "assistant", "content": None, "function_call": {"name": t[1], "arguments": t[2]}}
        if t[0] == "call"
        else {"role": "function", "name": "weather", "content": t[1]}
        if t[0] == "observation"
        else {"role": t[0], "content": t[1]}
        for t in turns
    ]
    parsed = [
        m | ({"content": json.loads(m["content"])} if m["role"] == "tool" else {})
        for m in openai(turns, arguments_as_text=False)
    ]
    return {
        "GLM-4": {"messages": [{"role": "system", "content": "", "tools": [TOOL]}, *ours]},
        "OpenAI tools": {"messages": openai(turns), "tools": [TOOL]},
        "OpenAI tools as text": {"messages": openai(turns), "tools": json.dumps([TOOL])},
        "OpenAI functions": {"messages": legacy, "functions": [FUNCTION]},
        "TRL tools": {"messages": parsed, "tools": [TOOL]},
        "LLaMA-Factory tools": {
            "conversations": _called(turns, "from", "value", gpt), "tools": text
        },
        "ms-swift agent": {"messages": _called(turns, "role", "content", swift), "tools": text},
    }  # fmt: skip


def _written() -> Iterator[Foreign]:
    """Calls written as text, read with `calls_in_text: read`."""
    read = RowRules(calls_in_text="read")
    tag = f'<tool_call>\n{{"name": "weather", "arguments": {OSLO}}}\n</tool_call>'
    for name, call in {
        "Hermes": tag,
        "GLM-4 as text": f"weather\n{OSLO}",
        "ToolACE": '[weather(city="Oslo")]',
        "ReAct": f"Thought: look\nAction: weather\nAction Input: {OSLO}",
    }.items():
        turns = [
            ("system", f"You may call functions. <tools>{json.dumps(TOOL)}</tools>"),
            CALL[0], ("assistant", call), ("tool", "<tool_response>\n{\"t\": 3}\n</tool_response>"),
            CALL[3],
        ]  # fmt: skip
        expected = CALL if name != "ReAct" else [CALL[0], ("assistant", "look"), *CALL[1:]]
        yield Foreign(name, {"messages": messages(turns)}, expected, read)
        turns = [(t[0], t[1]) for t in turns]
        items = messages(turns, "from", "value", user="human", assistant="gpt")
        yield Foreign(f"{name} as ShareGPT", {"conversations": items}, expected, read)
    answers = json.dumps([{"name": "weather", "arguments": {"city": "Oslo"}}])
    schema = {"name": "weather", "description": "x", "parameters": {"city": {"type": "str"}}}
    row = {"id": 0, "query": CALL[0][1], "answers": answers, "tools": json.dumps([schema])}
    yield Foreign("xLAM", row, CALL[:2])
    yield Foreign("APIGen", row | {"answers": json.loads(answers), "tools": [schema]}, CALL[:2])


def _pictured() -> Iterator[Foreign]:
    ask, reply = {"role": "user", "content": "<image>\nWhich colour?"}, ("assistant", "Red.")
    answer = {"role": "assistant", "content": "Red."}
    expected: list[Turn] = [("user", "Which colour?"), reply]
    url = {"type": "image_url", "image_url": {"url": "red.png"}}
    part, text = {"type": "image"}, {"type": "text", "text": "Which colour?"}
    gpt = [
        {"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "Red."}
    ]  # fmt: skip
    behind = [{"from": "human", "value": "Which colour?\n<image>"}, gpt[1]]
    for name, row in {
        "LLaVA": {"id": "0", "image": "red.png", "conversations": gpt},
        "LLaVA behind": {"id": "0", "image": "red.png", "conversations": behind},
        "LLaMA-Factory mllm": {"messages": [ask, answer], "images": ["red.png"]},
        "LLaMA-Factory alpaca image": {
            "instruction": "<image>Which colour?", "output": "Red.", "images": ["red.png"]
        },
        "ms-swift image": {"query": "<image>Which colour?", "response": "Red.", "images": ["red.png"]},
        "MiniCPM-V": {"id": "0", "image": "red.png", "conversations": [ask, answer]},
        "OpenAI image_url": {"messages": [{"role": "user", "content": [url, text]}, answer]},
        "TRL vision": {
            "messages": [{"role": "user", "content": [part, text]}, answer], "images": ["red.png"]
        },
        "VQA": {"image": {"path": "red.png", "bytes": None}, "question": "Which colour?", "answer": "Red."},
        "the original demo": {
            "messages": [{"role": "user", "content": "Which colour?", "image": "red.png"}, answer]
        },
    }.items():  # fmt: skip
        yield Foreign(name, row, expected, image="red.png")


def _read() -> Iterator[Foreign]:
    for dialogue, turns in DIALOGUES.items():
        for name, row in _lists(turns).items():
            yield Foreign(f"{name}, {dialogue}", row, turns)
        if turns[0][0] != "system":
            yield Foreign(f"MOSS, {dialogue}", _moss(turns), turns)
        yield Foreign(f"glaive, {dialogue}", _glaive(turns), turns)
    for dialogue, turns in SINGLE.items():
        for name, row in _columns(turns[0][1], turns[1][1]).items():
            yield Foreign(f"{name}, {dialogue}", row, turns)
    for dialogue, turns in WITH_CALLS.items():
        for name, row in _tools(turns).items():
            yield Foreign(f"{name}, {dialogue}", row, turns)
    orca = {"id": "x", "system_prompt": "Be brief.", "question": ONE[0][1], "response": "Oslo."}
    yield Foreign("OpenOrca", orca, TOLD)
    about = [("user", "Which city?\nOslo is a city."), ("assistant", "Oslo.")]
    context = {"context": "Oslo is a city.", "category": "closed_qa"}
    yield Foreign(
        "Dolly context", {"instruction": "Which city?", "response": "Oslo."} | context, about
    )
    yield Foreign("QA context", {"question": "Which city?", "answer": "Oslo."} | context, about)
    below = {"instruction": "Which city?", "input": "Oslo is a city.", "output": "Oslo."}
    yield Foreign("alpaca input", below, about)
    yield from _written()
    yield from _pictured()


READ: Sequence[Foreign] = tuple(_read())
Check = Callable[[Row], None]
