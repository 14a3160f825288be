"""Replies under a schema: what is promised of their form holds, whatever the model would rather write."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import openai
import pytest
import serving
from rows import TOOL

from finetune.data.dialogue.conversation import Message
from finetune.distributed.map_batches import evaluating
from finetune.errors import ConfigError, DataError
from finetune.evaluation.evaluate import Options, evaluate
from finetune.generation.decoder import Decoding, Request, write_replies
from finetune.generation.load import OpenedModel, open_model
from finetune.generation.predict import PredictOptions, predict
from finetune.generation.structured import Structure, Structures, read_form

pytest.importorskip("llguidance")

HELLO = [{"role": "user", "content": "hello"}]
PERSON = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "old": {"type": "boolean"}},
    "required": ["kind", "old"],
    "additionalProperties": False,
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {
    "type": "object", "properties": {"zone": {"enum": ["utc", "local"]}},
    "required": ["zone"], "additionalProperties": False}}}  # fmt: skip
SWITCH = {"type": "function", "function": {"name": "switch", "parameters": {
    "type": "object", "properties": {"on": {"type": "boolean"}},
    "required": ["on"], "additionalProperties": False}}}  # fmt: skip
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (CLOCK, SWITCH)}


@pytest.fixture(scope="module", params=["glm", "chatglm"])
def opened(tmp_path_factory: pytest.TempPathFactory, request: Any) -> OpenedModel:
    folder = tmp_path_factory.mktemp("base") / "talkative"
    return open_model(serving.save_talkative(folder, request.param))


@pytest.fixture(scope="module")
def server(opened: OpenedModel) -> Iterator[serving.Served]:
    with serving.served(opened) as running:
        yield running


def schema_of(schema: Any, **more: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_reply_is_json_under_its_schema(
    server: serving.Served, stream: bool, temperature: float
) -> None:
    for seed in range(4 if temperature else 1):
        made: Any = server.client.chat.completions.create(
            model="tiny", messages=HELLO, response_format=schema_of(PERSON), max_tokens=80,
            temperature=temperature, seed=seed, stream=stream,
        )  # fmt: skip
        if stream:
            chunks = [chunk.choices[0] for chunk in made]
            text, reason = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
        else:
            text, reason = made.choices[0].message.content, made.choices[0].finish_reason
        jsonschema.validate(json.loads(text), PERSON)
        assert reason == "stop"


def test_an_object_of_any_kind_begins_as_one(server: serving.Served) -> None:
    made = server.client.chat.completions.create(
        model="tiny", messages=HELLO, response_format={"type": "json_object"}, max_tokens=12
    )
    assert (made.choices[0].message.content or "").startswith("{")


def call_of(server: serving.Served, **how: Any) -> Any:
    made = server.client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[CLOCK, SWITCH], max_tokens=80, **how
    )
    return made.choices[0]


def test_a_call_that_is_required_comes_with_arguments_of_its_function(
    server: serving.Served,
) -> None:
    for seed in range(4):
        choice = call_of(server, tool_choice="required", temperature=1.5, seed=seed)
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        for one in choice.message.tool_calls:
            jsonschema.validate(json.loads(one.function.arguments), SCHEMAS[one.function.name])
    one = call_of(server, tool_choice="required", parallel_tool_calls=False)
    assert len(one.message.tool_calls) == 1


@pytest.mark.parametrize("name", ["clock", "switch"])
def test_a_function_that_is_named_is_the_one_that_is_called(
    server: serving.Served, name: str
) -> None:
    choice = call_of(server, tool_choice={"type": "function", "function": {"name": name}})
    assert {one.function.name for one in choice.message.tool_calls} == {name}


def test_a_schema_beside_tools_leaves_the_model_the_choice(opened: OpenedModel) -> None:
    grammar = Structures(opened.template).grammar(Structure(PERSON, [CLOCK]))
    assert grammar.startswith("start: text | call\n")


def test_openais_parser_reads_the_reply(server: serving.Served) -> None:
    from pydantic import BaseModel

    class Answer(BaseModel):
        right: bool

    parsed = server.client.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Answer, max_tokens=40
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)


NAMED = {"properties": {"a": {"type": "boolean"}}}
AB = {"properties": {"b": {"type": "null"}}}
OTHERS = '{"z": 1}'


@pytest.mark.parametrize(
    ("schema", "others"),
    [
        ({"type": "object"}, True),
        ({"type": "object", **NAMED}, False),
        ({"type": "object", **NAMED, "additionalProperties": True}, True),
        ({"type": "object", **NAMED, "patternProperties": {"^z$": {}}}, True),
        ({"anyOf": [{"type": "object", **NAMED}, {"type": "null"}]}, False),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "object", **NAMED}}}, False),
        ({"type": "object", "allOf": [NAMED, AB]}, True),
        ({"type": "object", **NAMED, "anyOf": [AB, {"required": ["z"]}]}, True),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_object_with_named_properties_has_no_others_unless_the_schema_speaks_of_others(
    opened: OpenedModel, schema: Any, others: bool
) -> None:
    jsonschema.validate(json.loads(OTHERS), schema)
    plain = opened.template.tokenizer.plain

    def taken(reply: str) -> bool:
        matcher = Structures(opened.template).constraint(Structure(schema))._matcher
        ids = plain.encode(f"\n{reply}", add_special_tokens=False).ids
        return all(matcher.consume_token(i) for i in ids) and matcher.is_accepting()

    assert taken(OTHERS) == others
    if "anyOf" not in schema:
        assert taken('{"a": true}')


NO_SCHEMAS: list[tuple[Any, str]] = [
    ({"type": "frobnicate"}, "Invalid type"),
    ({"type": "object", "properties": []}, "must be an object"),
    ({"type": "string", "pattern": "(?=x)y"}, "look-ahead"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no reply can satisfy it"),
    ({"$ref": "http://example.com/x"}, "cannot be compiled"),
    ({"enum": [f"value {n}" for n in range(50_000)]}, "more than 262,144 characters"),
    (
        {"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(3000)}},
        "cannot be compiled",
    ),
    ({"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {"type": "integer"}}} for j in range(3)]}
                for i in range(10)]}, "cannot be compiled"),
    ({"type": "integer", "minimum": 10**40}, "too large to be enforced"),
    ({"items": [{"anyOf": [{"exclusiveMaximum": -1e19}]}]}, "too large to be enforced"),
    ({"type": "integer", "multipleOf": 999_983}, "too large to be enforced"),
    ({"type": "number", "multipleOf": 0.1234567}, "too large to be enforced"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "reason"), NO_SCHEMAS, ids=lambda value: str(value)[:30])
def test_a_schema_that_cannot_be_compiled_is_refused_at_once(
    server: serving.Served, schema: Any, reason: str
) -> None:
    begun = time.process_time()
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        server.client.chat.completions.create(
            model="tiny", messages=HELLO, response_format=schema_of(schema)
        )
    assert time.process_time() - begun < 3  # a second, and the rest of this process
    assert caught.value.param == "response_format"


def test_keywords_that_cannot_be_enforced_are_refused_only_when_that_is_asked_for(
    server: serving.Served,
) -> None:
    schema = PERSON | {"not": {"type": "string"}}

    def create(**more: Any) -> Any:
        return server.client.chat.completions.create(
            model="tiny", messages=HELLO, response_format=schema_of(schema, **more), max_tokens=80
        )

    jsonschema.validate(json.loads(create().choices[0].message.content), PERSON)
    with pytest.raises(openai.BadRequestError, match="not"):
        create(strict=True)


def test_constrained_and_free_replies_stand_side_by_side(opened: OpenedModel) -> None:
    structures = Structures(opened.template)
    prompt = serving.prompt_of(opened.template, Message("user", "hello"))

    def row(free: bool) -> Request:
        constraint = None if free else structures.constraint(Structure(PERSON))
        return Request(prompt, Decoding(60), constraint=constraint)

    with evaluating(opened.model):
        stop_ids = opened.template.stop_ids
        [alone] = write_replies(opened.model, stop_ids, [row(True)], slots=1)
        mixed = write_replies(opened.model, stop_ids, [row(False), row(True), row(False)], slots=3)
    assert mixed[1].ids == alone.ids
    for one in (mixed[0], mixed[2]):
        text = opened.template.parse(one.ids).content
        jsonschema.validate(json.loads(text), PERSON)


def test_a_name_in_any_script_and_a_tool_without_parameters_can_be_called(
    opened: OpenedModel,
) -> None:
    structures = Structures(opened.template)
    tools = [
        {"type": "function", "function": {"name": '天气"\\', "parameters": None}},
        {"type": "python"},
        TOOL,
    ]
    structures.constraint(Structure(None, tools, many_calls=True))
    with pytest.raises(DataError, match="compiled"):
        structures.constraint(Structure({"type": "nothing"}))


def test_predict_and_evaluate_write_what_is_asked_for(opened: OpenedModel, tmp_path: Path) -> None:
    data = tmp_path / "in.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "{}"}],
         **({"tools": [CLOCK, SWITCH]} if n % 2 else {})}
        for n in range(4)
    ]  # fmt: skip
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(PERSON))
    form = read_form(schema, must_call=True)
    predict(opened.base, [str(data)], tmp_path / "out.jsonl", options=PredictOptions(60, form=form))
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for number, row in enumerate(written):
        if number % 2:
            for one in row["tool_calls"]:
                function = one["function"]
                jsonschema.validate(json.loads(function["arguments"]), SCHEMAS[function["name"]])
        else:
            jsonschema.validate(json.loads(row["messages"][-1]["content"]), PERSON)
    options = Options(form=form)
    changes = {"max_new_tokens": 60}
    found = evaluate(opened.base, [str(data)], output=tmp_path / "scores", changes=changes, options=options)  # fmt: skip
    [scored] = (tmp_path / "scores" / "predictions").glob("*.jsonl")
    replies = [json.loads(line)["prediction"] for line in scored.read_text().splitlines()]
    assert [json.loads(text) for text in replies[::2]] == [
        json.loads(row["messages"][-1]["content"]) for row in written[::2]
    ]
    assert "JSON under schema" in json.dumps(found)
    with pytest.raises(ConfigError, match="backend transformers"):
        predict(opened.base, [str(data)], tmp_path / "out.jsonl", options=PredictOptions(backend="vllm", form=form))  # fmt: skip
    schema.write_text('{"type": "nothing"}')
    with pytest.raises(ConfigError, match=r"is no JSON Schema: \$.type: 'nothing'"):
        read_form(schema, must_call=False)
    schema.write_text('{"type": "string", "pattern": "(?=a)b"}')
    with pytest.raises(ConfigError, match="--json-schema: the schema cannot be compiled"):
        predict(opened.base, [str(data)], tmp_path / "x.jsonl", options=PredictOptions(form=read_form(schema, must_call=False)))  # fmt: skip
    schema.write_text("[1]")
    with pytest.raises(ConfigError, match="is a list, not a schema"):
        read_form(schema, must_call=False)


@pytest.mark.parametrize(
    ("reply", "allowed"),
    [
        ('hm\n{"kind"</think>\n{"kind": "cat", "old": true}', True),
        ('</think>{"kind": "dog", "old": false}', True),
        ('hm</think>\nclock\n{"zone": "utc"}', True),
        ('hm</think>\n{"kind": "cow", "old": true}', False),
        ('hm</think>\nswitch\n{"on": true}', False),
        ('{"kind": "cat", "old": true}', False),
    ],
)
def test_a_thought_comes_before_the_structure(
    opened: OpenedModel, reply: str, allowed: bool
) -> None:
    tokenizer = opened.template.tokenizer
    template: Any = SimpleNamespace(
        tokenizer=tokenizer,
        stop_ids=opened.template.stop_ids,
        layout=SimpleNamespace(thinking=True),
    )
    constraint = Structures(template).constraint(Structure(PERSON, [CLOCK]))
    matcher = constraint._matcher
    ids = tokenizer.plain.encode(reply, add_special_tokens=False).ids
    taken = all(matcher.consume_token(i) for i in ids)
    assert (taken and matcher.is_accepting()) == allowed
