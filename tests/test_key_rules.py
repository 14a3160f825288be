"""Keys and columns, one by one: which are read where, which seem to mask, which of two is taken."""

from __future__ import annotations

from typing import Any

import pytest
from hints import said
from row_parts import CALL, REPLY, RESULT, SYSTEM, USER, WEATHER, dialogue

from finetune.data.dialogue.columns import category, thinks
from finetune.data.dialogue.conversation import Message
from finetune.data.dialogue.formats import RowRules, detect, to_conversation
from finetune.data.dialogue.keys import check_columns, marks_of, unread_of_part

NOTHING: frozenset[str] = frozenset()

# --- keys of messages ----------------------------------------------------------------------------

ALWAYS_READ = ("metadata", "image", "images", "train", "loss", "masked", "weight", "train_detail")
READ_BY = {
    "system": ("tools",), "user": (),
    "assistant": ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "thought", "think", "cot"),
    "observation": ("tool_call_id", "name", "parameters", "observation"),
}  # fmt: skip
UNREAD_BY = {
    "system": ("reasoning_content", "name", "parameters", "observation", "notes"),
    "user": ("thinking", "name", "parameters", "observation", "notes"),
    "assistant": ("name", "parameters", "observation", "notes"),
    "observation": ("cot", "reasoning", "notes"),
}
REFUSED_BY = {
    "system": ("tool_calls", "function_call", "refusal", "audio", "videos"),
    "user": ("tools", "tool_calls", "function_call", "refusal", "audio", "videos"),
    "assistant": ("tools", "refusal", "audio", "videos"),
    "observation": ("tools", "tool_calls", "function_call", "refusal", "audio", "videos"),
}
SAYS = {"train": True, "loss": True, "masked": False, "weight": 1, "train_detail": [{"train": True}]}  # fmt: skip


@pytest.mark.parametrize("role", READ_BY)
def test_each_role_reads_its_keys_and_names_or_refuses_those_of_others(role: str) -> None:
    base = {"role": "x", "content": "y", "from": "x", "value": "y"}
    for key in (*ALWAYS_READ, *READ_BY[role]):
        assert marks_of({**base, key: SAYS.get(key, "text")}, role).unread == ()
    for key in UNREAD_BY[role]:
        assert marks_of({**base, key: "text"}, role).unread == (key,)
        for nothing in (None, "", []):
            assert marks_of({**base, key: nothing}, role).unread == ()
    for key in REFUSED_BY[role]:
        assert said(marks_of, {**base, key: "text"}, role).startswith(f"key {key!r} is not supported; ")  # fmt: skip
        assert marks_of({**base, key: None}, role).unread == ()
    both = marks_of({**base, "zebra": "a", "notes": "b"}, role)
    assert both.unread == ("notes", "zebra")


@pytest.mark.parametrize(
    "key",
    [
        "id", "idx", "index", "uuid", "message_id", "parent_id", "timestamp", "time", "date", "created_at",
        "create_time", "model", "lang", "language", "annotations", "type", "status", "tool_call_id",
    ],
)  # fmt: skip
def test_keys_that_change_nothing_are_passed_over(key: str) -> None:
    for role in READ_BY:
        assert marks_of({"role": role, "content": "x", key: "x"}, role).unread == ()
    assert dialogue({**USER, key: "x"}, {**REPLY, key: "x"}).unread == ()


@pytest.mark.parametrize(
    ("key", "meant"),
    [("trian", "train"), ("Weight", "weight"), ("tool_call", "tool_calls"), ("contents", "content"),
     ("reasoning_contents", "reasoning_content"), ("metadaten", "metadata"), ("tran", "train"), ("TRAIN", "train")],
)  # fmt: skip
def test_a_slip_in_a_key_is_told_what_it_is_meant_for(key: str, meant: str) -> None:
    reason = said(marks_of, {"role": "assistant", "content": "x", key: "y"}, "assistant")
    assert reason == f"key {key!r} is not known; did you mean {meant!r}?"
    for own in ("trn", "emotion", "speaker"):
        assert marks_of({"role": "assistant", own: "y"}, "assistant").unread == (own,)


PLAIN = [
    "compute_loss", "trained_on", "learnable", "supervise", "backprop", "use_gradient", "target", "is_target",
    "token_weight", "sample_weights", "my_LOSS",
]  # fmt: skip
HARMLESS = ["targets", "my_target", "skipping", "excludes", "weighted", "ignorance", "answer_x"]
NEGATED = [
    "my_mask", "mask_out", "ignore", "ignored", "skip", "skipped", "exclude", "excluded", "omit_loss", "without_loss",
    "disable_training", "no_loss", "not_trained", "noloss_here", "untrained", "unlearned_here", "UNTRAINED",
]  # fmt: skip
NO = [False, 0, 0.0, "false", " No ", "0", "off", 0.5, -1]
YES = [True, 1, "true", "YES", "1", "on"]


@pytest.mark.parametrize("name", [*PLAIN, *NEGATED])
def test_a_name_that_may_mask_is_refused_where_it_says_no(name: str) -> None:
    for value in NO:
        row = {"role": "assistant", name: value}
        assert "seems to say what is learned" in said(marks_of, row, "assistant"), value
        assert "seems to say what is learned" in said(check_columns, {name: value}, NOTHING), value
    assert "seems to say" in said(check_columns, {name: [1, 0.5, True]}, NOTHING)
    assert "seems to say" in said(check_columns, {"more": {"x": {name: 0}, "y": 1}}, NOTHING)
    for value in ("a text", ["a", 1], [{"x": 1}], {"x": 0}):
        assert check_columns({name: value}, NOTHING) == (name,)


def test_a_name_that_may_mask_is_taken_where_it_says_yes_unless_it_is_negated() -> None:
    for value in YES:
        for name in PLAIN:
            assert check_columns({name: value}, NOTHING) == (name,), (name, value)
        for name in NEGATED:
            assert "seems to say" in said(check_columns, {name: value}, NOTHING), (name, value)
    for name in HARMLESS:
        assert check_columns({name: False}, NOTHING) == (name,)
    assert check_columns({"loss_mask": True}, NOTHING) == (
        "loss_mask",
    )  # of messages, and read there


UNWANTED = [
    "label", "kto_tag", "kto_label", "desirable", "is_desirable", "preferred", "is_preferred", "is_chosen", "wanted",
    "is_good",
]  # fmt: skip


@pytest.mark.parametrize("name", UNWANTED)
def test_a_reply_that_is_not_wanted_is_refused_by_any_mark(name: str) -> None:
    for value in (False, 0, "false", "False"):
        assert said(check_columns, {name: value}, NOTHING).startswith(f"{name}: is false, which")
        assert said(marks_of, {"role": "x", name: value}, "assistant").startswith(f"{name}: is fal")
    for value in (True, 1, "true", 2):
        assert check_columns({name: value}, NOTHING) == (name,)


def test_marks_are_read_with_their_kinds_and_bounds() -> None:
    def marks(**keys: Any) -> Any:
        return marks_of({"role": "assistant", "content": "x", **keys}, "assistant")

    assert marks(weight=1_000_000).weight == 1_000_000
    assert (marks(loss_weight=0).weight, marks(weight=0.0, loss_scale=None).weight) == (0.0, 0.0)
    for many in (1_000_001, -1_000_001):
        assert said(marks, weight=many) == "weight is over a million"
    assert said(marks, weight=[1]) == "weight is a list, not a number"
    assert said(marks, train=3) == "train is a number, not true or false"
    assert said(marks, loss="1") == "loss is text, not true or false"
    assert said(marks, masked={}) == "masked is an object, not true or false"
    assert marks(thought="a", cot="a", think="").reasoning == "a"
    assert marks().reasoning == ""
    assert marks(train_detail=[{"train": False}, "x"]).train is False
    for parts in ([], [{"train": 1}], [{"train": None}], "x", [{"train": True}, {}]):
        assert "train_detail trains parts" in said(marks, train_detail=parts)


@pytest.mark.parametrize(
    "key", ["type", "image", "image_url", "bytes", "path", "url", "detail", "cache_control", "annotations", "index", "id"]
)  # fmt: skip
def test_keys_of_a_content_part_that_are_read_or_change_nothing_are_not_named(key: str) -> None:
    assert unread_of_part({"type": "image", key: "x"}) == set()


@pytest.mark.parametrize(
    "key",
    ["train", "loss", "training", "trainable", "learn", "loss_mask", "masked", "weight", "loss_weight", "loss_scale", "mask", "no_loss"],
)  # fmt: skip
def test_a_content_part_is_not_trained_by_itself(key: str) -> None:
    assert f"a content part says {key!r}" in said(unread_of_part, {"type": "text", key: True})
    part = {"type": "text", "text": "A", key: True}
    assert "message 2: a content part says" in said(dialogue, USER, {"role": "assistant", "content": [part]})  # fmt: skip
    for nothing in (None, "", [], {}):
        assert unread_of_part({"type": "text", key: nothing}) == set()
    assert unread_of_part({"type": "image", "text": "x"}) == {"text of a content part"}


# --- columns -------------------------------------------------------------------------------------

PAIRS = {
    "prompt": ("response", "completion"), "content": ("summary",), "question": ("answer", "response"),
    "query": ("response", "answer"), "source": ("target",), "input": ("output", "target"), "user": ("assistant",),
}  # fmt: skip


@pytest.mark.parametrize(("asked", "answered"), [(q, a) for q, all_of in PAIRS.items() for a in all_of])  # fmt: skip
def test_every_known_pair_of_columns_is_read(asked: str, answered: str) -> None:
    row = {"id": 1, answered: "A", asked: "Q"}
    assert detect([row]) == "pairs"
    found = to_conversation(row)
    assert [m.content for m in found.messages] == ["Q", "A"]
    assert found.unread == ()
    assert len(to_conversation({asked: "Q"}, purpose="predict").messages) == 1
    assert "no pair of columns" in said(to_conversation, {asked: "Q"})


def test_of_several_pairs_the_first_that_is_whole_is_read() -> None:
    both = {"question": "Q", "response": "no", "answer": "A", "query": "no"}
    assert [m.content for m in to_conversation(both).messages] == ["Q", "A"]
    asked_twice = {"query": "Q", "answer": "no", "response": "A"}
    assert [m.content for m in to_conversation(asked_twice).messages] == ["Q", "A"]
    half = {"prompt": "no", "query": "Q", "answer": "A"}
    assert [m.content for m in to_conversation(half).messages] == ["Q", "A"]
    assert to_conversation(half, purpose="predict").messages[0].content == "Q"
    asked = to_conversation({"prompt": "P", "query": "Q"}, purpose="predict")
    assert asked.messages == (Message("user", "P"),)
    assert asked.unread == ("query",)
    named = to_conversation({"q": "Q", "prompt": "no", "response": "no"}, columns=("q", "a"), purpose="predict")  # fmt: skip
    assert named.messages == (Message("user", "Q"),)
    whole = to_conversation({"a": "A", "q": "Q", "x": 1, "prompt": "P"}, columns=("q", "a"))
    assert (whole.messages[1].content, whole.unread) == ("A", ("x", "prompt"))
    reason = said(to_conversation, {"q": "Q", "x": 1}, columns=("q", "a"))
    assert reason == "the row has no pair of columns q/a; its columns are 'q', 'x'"
    null = said(to_conversation, {"q": "Q", "a": None}, columns=("q", "a"))
    assert null == "a: is empty; no reply to train"


@pytest.mark.parametrize("column", ["output", "response", "answer", "completion", "target"])
def test_the_reply_to_an_instruction_has_five_names(column: str) -> None:
    row = {"instruction": "I", "output": "", column: "A"}
    assert to_conversation(row).messages[1].content == "A"
    later = {"response": "R", "target": "T", "answer": "W", "completion": "C"} | {column: "A"}
    order = ["output", "response", "answer", "completion", "target"]
    found = to_conversation({"instruction": "I", **later})
    first = min(later, key=order.index)
    assert found.messages[1].content == later[first]
    assert set(found.unread) == set(later) - {first}


@pytest.mark.parametrize("column", ["system", "system_prompt", "meta_instruction"])
def test_a_system_text_has_three_columns_in_every_layout(column: str) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [USER, REPLY]}, {"prompt": "Q", "response": "A"}, {"instruction": "Q", "output": "A"},
        {"prompt": [USER], "response": [REPLY]},
    ]  # fmt: skip
    for row in rows:
        found = to_conversation({**row, column: "S"})
        assert [m.content for m in found.messages] == ["S", "Q", "A"]
        assert (found.messages[0].role, found.unread) == ("system", ())
        other = "system_prompt" if column == "system" else "system"
        assert "both are a system message; keep one" in said(to_conversation, {**row, column: "S", other: "S"})  # fmt: skip
        assert len(to_conversation({**row, column: ""}).messages) == 2
        assert said(to_conversation, {**row, column: 3}) == f"{column}: is a number, not text"


def test_two_lists_of_messages_have_nothing_beside_them() -> None:
    lists = {"prompt": [USER], "response": [REPLY]}
    for beside in ({"history": [["a", "b"]]}, {"context": "C"}):
        (name,) = beside
        reason = said(to_conversation, {**lists, **beside})
        assert reason.startswith(f"{name}: stands beside a list of messages")
    assert to_conversation({**lists, "history": [], "context": ""}).messages
    assert said(to_conversation, {"prompt": [USER], "response": {"a": 1}}) == (
        "response: is an object, not text or messages"
    )
    assert len(to_conversation({"prompt": [USER], "response": None}, purpose="predict").messages) == 1  # fmt: skip
    with_tools = to_conversation({**lists, "tools": [WEATHER], "prompt": [SYSTEM, USER]})
    assert (len(with_tools.tools), with_tools.messages[0].role) == (1, "system")
    calls = {"prompt": [USER, CALL, RESULT, REPLY, USER], "response": [REPLY]}
    assert [m.train for m in to_conversation(calls).messages] == [None, False, None, False, None, None]  # fmt: skip


def test_earlier_turns_are_pairs_messages_or_json_of_them() -> None:
    row = {"prompt": "Q", "response": "A"}
    for history in ([["a", "b"]], '[["a", "b"]]', [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]):  # fmt: skip
        found = to_conversation({**row, "history": history})
        assert [(m.role, m.content) for m in found.messages[:2]] == [("user", "a"), ("assistant", "b")]  # fmt: skip
    for nothing in (None, [], "", "[]"):
        assert len(to_conversation({**row, "history": nothing}).messages) == 2
    for wrong, reason in (
        ([["a", "b"], ["a"]], "history: turn 2 is not a pair of texts"),
        ([["a", "b"], ["a", 3]], "history: turn 2 is not a pair of texts"),
        ([["a", "b"], {"role": "user", "content": "a"}], "history: turn 2 is not a pair of texts"),
        ({"a": 1}, "history: is an object, not a list of pairs"),
        ("{", "the JSON is cut off at column 2"),
    ):
        assert said(to_conversation, {**row, "history": wrong}).startswith(reason)
    numbered = {"prompt": "Q", "response": "A\0", "history": [["a", "b"]], "system": "S"}
    assert said(to_conversation, numbered).startswith("message 5: ")
    assert said(to_conversation, {**numbered, "prompt": "\0"}).startswith("message 4: ")


def test_what_a_row_is_an_example_of_is_the_first_short_line_that_says_so() -> None:
    order = ["category", "task_type", "task_name", "task", "domain", "topic", "subject"]
    for place, name in enumerate(order):
        assert category({name: f" {name} "}) == name
        assert category({one: one for one in reversed(order[place:])}) == name
        assert to_conversation({"prompt": "Q", "response": "A", name: "x"}).category == "x"
    assert category({"category": "x" * 64}) == "x" * 64
    assert category({"category": "x" * 65, "task": "y"}) == "y"
    assert category({"category": "a\nb", "task": 3, "domain": "", "topic": "t"}) == "t"
    assert category({"kind": "x"}) == ""


def test_what_a_row_tells_the_template_is_thinking_alone() -> None:
    assert thinks({"chat_template_kwargs": {"enable_thinking": True, "x": None}}) == (True, ())
    found = thinks({"chat_template_kwargs": {"a": 1, "enable_thinking": None, "b": 0}})
    assert found == (None, ("chat_template_kwargs.a", "chat_template_kwargs.b"))
    assert thinks({}) == (None, ())
    told = {"prompt": "Q", "response": "A", "chat_template_kwargs": {"x": 1}, "y": 2}
    assert to_conversation(told).unread == ("y", "chat_template_kwargs.x")
    assert said(thinks, {"chat_template_kwargs": []}).endswith(": is a list, not an object")
    for wrong in (1, "true", []):
        reason = said(thinks, {"chat_template_kwargs": {"enable_thinking": wrong}})
        assert reason.endswith("not true or false")


def test_columns_are_named_in_their_order_and_the_worst_is_said_first() -> None:
    row = {"zebra": 1, "id": "x" * 101, "notes": "x", "read": 1}
    assert check_columns(row, frozenset({"read"})) == ("zebra", "notes", "id")
    worst = {"metadata": {"train": False}, "rejected": "x"}
    assert said(check_columns, worst, NOTHING).startswith("rejected: preference data")
    for nothing in (None, "", [], {}):
        assert check_columns({"rejected": nothing, "loss": nothing}, NOTHING) == ()


@pytest.mark.parametrize("meant", ["messages", "conversations", "tools", "system", "images", "history"])  # fmt: skip
def test_a_slip_in_a_column_whose_loss_would_matter_is_told(meant: str) -> None:
    slip = meant[:-2] + meant[-1] if meant != "tools" else "tool"
    assert said(check_columns, {slip: "x"}, NOTHING) == (
        f"column {slip!r} is not known; did you mean {meant!r}? If it is meant: data.ignore_columns: [{slip}]"
    )
    assert check_columns({slip: "x", meant: "y"}, frozenset({meant})) == (slip,)
    upper = meant.upper()
    assert f"did you mean {meant!r}" in said(check_columns, {upper: "x", meant: None}, NOTHING)


def test_columns_that_are_meant_to_stay_unread_are_gone_from_rows_and_messages() -> None:
    row = {"messages": [{**USER, "x": 1}, {**REPLY, "loss_x": False}], "y": "z", "x": 2, "functions": [{**WEATHER, "x": 1}]}  # fmt: skip
    rules = RowRules(ignore_columns=("x", "loss_x", "y"))
    found = to_conversation(row, rules=rules)
    assert (found.unread, len(found.messages)) == ((), 2)
    assert found.tools[0]["function"]["x"] == 1
    assert to_conversation(row, rules=RowRules(ignore_columns=("loss_x",))).unread == ("y", "x", "x of messages")  # fmt: skip
