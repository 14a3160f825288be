"""Replies from an endpoint or vLLM: what is asked, asked again, and made of the answer."""

from __future__ import annotations

import http.client
import io
import json
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from finetune.data.chat.image import ImagePrompt
from finetune.errors import ConfigError, DataError, ModelError
from finetune.generation.backends import address, vllm
from finetune.generation.backends.address import Address
from finetune.generation.backends.choice import BackendChoice, through_vllm
from finetune.generation.backends.endpoint import EndpointGenerator
from finetune.generation.decoder import Decoding
from finetune.generation.generate import Extras, SeededSampling, Window

# --- an endpoint -------------------------------------------------------------------------------


class Line:
    """A connection that fails or answers in turn."""

    def __init__(self, *said: Any) -> None:
        self.said, self.requests, self.slept = [*said], list[Any](), list[float]()

    def open(self, request: Any, timeout: float) -> Any:
        assert timeout == address.TIMEOUT
        self.requests.append(request)
        said = self.said.pop(0)
        if isinstance(said, int):
            raise urllib.error.HTTPError("u", said, "reason", http.client.HTTPMessage(), io.BytesIO(b"why"))  # fmt: skip
        if isinstance(said, Exception):
            raise said
        return io.BytesIO(said.encode())


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Any:
    def made(*said: Any) -> Line:
        found = Line(*said)
        monkeypatch.setattr(address, "_opener", lambda: found)
        monkeypatch.setattr(address.time, "sleep", found.slept.append)
        return found

    return made


ONE = Address.of("openai:some/model@http://host:1/v1/", "--judge")


@pytest.mark.parametrize("said", [408, 409, 429, 500, 503, OSError("down"), http.client.IncompleteRead(b""), "no json"])  # fmt: skip
def test_an_endpoint_that_is_busy_or_down_is_asked_again(line: Any, said: Any) -> None:
    asked = line(said, said, said, "{}")
    assert ONE.post("completions", {"x": 1}) == {}
    assert [pause for pause in asked.slept if pause] == pytest.approx([0.2, 0.8, 3.2])
    asked = line(*[said] * 4)
    with pytest.raises(DataError, match=r"^--judge: http://host:1/v1 does not answer"):
        ONE.post("completions", {})
    assert len(asked.requests) == 4


@pytest.mark.parametrize("code", [307, 400, 401, 403, 404, 422])
def test_an_endpoint_that_refuses_is_not_asked_again(line: Any, code: int) -> None:
    asked = line(code)
    with pytest.raises(DataError, match=f"{code} reason: why"):
        ONE.post("completions", {})
    assert (len(asked.requests), sum(asked.slept)) == (1, 0)


def test_the_model_and_the_key_go_to_the_named_address_alone(
    line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    asked = line('{"a": 1}')
    assert ONE.post("chat/completions", {"x": 1}) == {"a": 1}
    [request] = asked.requests
    assert request.full_url == "http://host:1/v1/chat/completions"
    assert json.loads(request.data) == {"model": "some/model", "x": 1}
    assert request.headers["Authorization"] == "Bearer secret"
    monkeypatch.undo()
    handlers = address._opener.__wrapped__().handlers
    assert any(isinstance(one, address._NoRedirects) for one in handlers)


def endpoint(answer: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[EndpointGenerator, list[Any]]:
    asked: list[Any] = []
    monkeypatch.setattr(Address, "post", lambda _, path, body: asked.append((path, body)) or answer)
    backend = SimpleNamespace(encode=lambda text, **_: SimpleNamespace(ids=[ord(one) for one in text]))  # fmt: skip
    template: Any = SimpleNamespace(stop_ids=(9, 10), tokenizer=SimpleNamespace(backend=backend))
    return EndpointGenerator(ONE, template, max_new_tokens=5, at_once=1), asked


@pytest.mark.parametrize(
    ("choice", "ids", "stopped"),
    [
        ({"text": "ab", "finish_reason": "stop", "token_ids": [1, 2, 9]}, (1, 2), True),
        ({"text": "ab", "finish_reason": "length", "token_ids": [1, 2]}, (1, 2), False),
        ({"text": "ab", "finish_reason": "stop"}, (97, 98), True),
        ({"text": "ab", "finish_reason": "stop", "token_ids": None}, (97, 98), True),
        ({"text": "", "finish_reason": "stop", "token_ids": [10]}, (), True),
        ({"text": "", "finish_reason": "stop", "token_ids": []}, (), True),
    ],
)  # fmt: skip
def test_an_endpoints_answer_becomes_the_replys_ids(
    monkeypatch: pytest.MonkeyPatch, choice: dict[str, Any], ids: tuple[int, ...], stopped: bool
) -> None:
    made, asked = endpoint({"choices": [choice]}, monkeypatch)
    [[reply]] = made.replies([Window([np.array([4, 5])])])
    assert (reply.index, reply.ids, reply.stopped) == (0, ids, stopped)
    path, body = asked[0]
    assert path == "completions"
    assert body == {"prompt": [4, 5], "max_tokens": 5, "temperature": 0.0, "return_token_ids": True}
    list(made.replies([Window([[4]], Extras(SeededSampling.at(0.5, 0)))]))
    assert (asked[1][1]["temperature"], asked[1][1]["seed"]) == (0.5, 0), "a seed of 0 is one"


@pytest.mark.parametrize("answer", [{}, [], {"choices": []}, {"choices": [{"text": "a"}]}, {"choices": [{}, {}]}])  # fmt: skip
def test_an_answer_that_is_no_completion_is_named(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:  # fmt: skip
    made, _ = endpoint(answer, monkeypatch)
    with pytest.raises(DataError, match="answers with no completion"):
        list(made.replies([Window([[4]])]))


def test_an_endpoint_is_shown_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = endpoint({}, monkeypatch)
    shown: Any = ImagePrompt.__new__(ImagePrompt)
    with pytest.raises(DataError, match="--judge takes no images"):
        made._reply(0, shown, Decoding(1))
    assert asked == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((text, "write openai:MODEL@URL") for text in ("m@http://h", "openai:@http://h", "openai:m", "openai:m@ftp://h", "openai:m@http://", "openai:m@http://:80", "openai:m@http://h:0", "openai:m@http://h:99999", "openai:m@http://h:x", "openai:m@http://[h", "openai:a b@http://h", "openai:m@http://h /v1")),
        ("openai:m@https://me:secret@h/v1", "holds a name or a password"), ("openai:m@https://me@h/v1", "holds a name or a password"),
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_by_its_option(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Address.of(text, "--judge")
    assert str(caught.value).startswith("--judge")
    assert "secret" not in str(caught.value)


def test_an_address_names_a_model_with_any_signs_and_a_port() -> None:
    found = Address.of("openai:org/m@v1:x@https://h:8443/v1//", "--judge")
    assert (found.model, found.url, found.option) == ("org/m@v1:x", "https://h:8443/v1", "--judge")
    assert address.TIMEOUT == 120


@pytest.mark.parametrize(
    ("choice", "how", "said"),
    [
        (BackendChoice(), {"restricted": True, "sampled": True, "needs_weights": True}, ""), (BackendChoice("vllm"), {}, ""), (BackendChoice("vllm"), {"needs_weights": True}, ""),
        (BackendChoice("vllm"), {"sampled": True}, "--backend vllm replies greedily"), (BackendChoice("vllm"), {"restricted": True}, "do not go with --backend vllm"),
        (BackendChoice(endpoint="openai:m@http://h"), {"sampled": True}, ""), (BackendChoice(endpoint="openai:m@http://h"), {"restricted": True}, "do not go with --endpoint"),
        (BackendChoice(endpoint="openai:m@http://h"), {"needs_weights": True}, "leave out --tasks, --needle and --regression-data"), (BackendChoice(endpoint="h"), {}, "--endpoint 'h': write openai:"),
    ],
)  # fmt: skip
def test_what_replies_from_elsewhere_do_not_go_with_is_named(
    choice: BackendChoice, how: dict[str, bool], said: str
) -> None:
    asked = {"restricted": False, "sampled": False, "needs_weights": False} | how
    if not said:
        choice.check(**asked)
        return
    with pytest.raises(ConfigError, match=said):
        choice.check(**asked)


@pytest.mark.parametrize(("rows", "at_once"), [("auto", 32), (7, 7)])
def test_an_endpoint_is_asked_so_many_at_once(
    rows: int | str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "context_of", lambda target, base: (target, base))
    threads: list[int] = []

    class Threads:
        def __init__(self, number: int) -> None:
            threads.append(number)

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731
        map = staticmethod(map)

    monkeypatch.setattr("finetune.generation.backends.endpoint.ThreadPoolExecutor", Threads)
    answer = {"choices": [{"text": "", "finish_reason": "stop", "token_ids": [7]}]}
    bodies: list[Any] = []
    monkeypatch.setattr(Address, "post", lambda self, path, body: bodies.append((self.model, body)) or answer)  # type: ignore[func-returns-value]  # fmt: skip
    there = BackendChoice(endpoint="openai:m@http://h/v1")
    template: Any = SimpleNamespace(stop_ids=(9,))
    found = there.at_endpoint(template, "target", base="base", rows=rows, max_new_tokens=5)
    assert (found.positions, found.rows) == (("target", "base"), at_once)
    assert found.facts() == {"dtype": "that of the endpoint"}
    [replies] = found.backend.replies([Window([[4], [5]])])
    assert threads == [at_once]
    assert [(reply.index, reply.ids) for reply in replies] == [(0, (7,)), (1, (7,))]
    assert [(name, body["prompt"], body["max_tokens"]) for name, body in bodies] == [("m", [4], 5), ("m", [5], 5)]  # fmt: skip


def test_an_endpoint_is_asked_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--judge is asked by one process: leave torchrun out"):
        endpoint({}, monkeypatch)


# --- vLLM --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "allowed"),
    [(1, 8), (8, 8), (9, 16), (64, 64), (65, 128), (257, 320), (512, 512), (513, None), (None, None)],
)  # fmt: skip
def test_vllm_is_told_the_least_rank_that_holds_an_adapter(
    monkeypatch: pytest.MonkeyPatch, rank: int | None, allowed: int | None
) -> None:
    monkeypatch.setattr(vllm, "adapter_config", lambda _: {"peft_type": "LORA", "r": rank})
    monkeypatch.setattr(vllm, "read_lora", lambda _: None)
    if allowed is None:
        with pytest.raises(ModelError, match=f"of rank {rank}, which vLLM does not open"):
            vllm._rank(Path("a"))
        return
    assert vllm._rank(Path("a")) == allowed


def test_vllms_ids_lose_their_stop_and_only_that() -> None:
    stop, cut = (SimpleNamespace(finish_reason=reason, token_ids=[4, 5, 9]) for reason in ("stop", "length"))  # fmt: skip
    assert vllm._reply(3, stop).ids == (4, 5)
    assert vllm._reply(3, cut).ids == (4, 5, 9)
    assert (vllm._reply(3, stop).stopped, vllm._reply(3, cut).stopped) == (True, False)


@pytest.mark.parametrize(
    ("saved", "native", "found"),
    [("auto", True, "bfloat16"), ("auto", False, "float32"), ("float16", True, "float16"), ("float32", False, "float32")],
)  # fmt: skip
def test_vllm_computes_in_the_number_format_that_we_would_take(
    monkeypatch: pytest.MonkeyPatch, saved: str, native: bool, found: str
) -> None:
    from finetune.distributed import device

    monkeypatch.setattr(device, "has_native_bf16", lambda: native)
    monkeypatch.setattr(vllm, "settings_of", lambda _: SimpleNamespace(dtype=saved))
    assert vllm.number_format("m") == found


def test_by_whom_replies_are_made_is_said_where_it_is_not_us() -> None:
    assert BackendChoice().words == ""
    assert BackendChoice("vllm").words == "by vllm"
    assert BackendChoice("vllm", "openai:m@http://x").words == "by openai:m@http://x"


class Llm:
    """vLLM, as far as it is told things."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.lora = SimpleNamespace(request=SimpleNamespace(LoRARequest=lambda *words: words))
        self.LLM, self.SamplingParams = self.opened, self.sampling

    def opened(self, **options: Any) -> Any:
        self.told.append(options)
        return SimpleNamespace(generate=self.generate, llm_engine=SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.told.append("ended"))))  # fmt: skip

    def sampling(self, **options: Any) -> Any:
        self.told.append(options)
        return "sampling"

    def generate(self, asked: Any, sampling: str, **how: Any) -> Any:
        self.told.append((asked, sampling, how))
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[4], finish_reason="length")]) for _ in asked]  # fmt: skip


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Llm:
    made = Llm()
    monkeypatch.setattr(vllm, "_import_vllm", lambda: made)
    monkeypatch.setattr(vllm, "_free_device", lambda: made.told.append("freed"))
    monkeypatch.setattr(vllm, "model_base", lambda target, base: SimpleNamespace(path=f"{target} on {base}", revision="r"))  # fmt: skip
    monkeypatch.setattr(vllm, "is_adapter", lambda target: "adapter" in target)
    monkeypatch.setattr(vllm, "_rank", lambda _: 16)
    monkeypatch.setattr(vllm, "number_format", lambda target: f"format of {target}")
    return made


@pytest.mark.parametrize("adapted", [False, True])
def test_vllm_is_told_all_that_decides_a_reply(adapted: bool, llm: Llm) -> None:
    template: Any = SimpleNamespace(stop_ids=(9, 10))
    target = "adapter" if adapted else "whole"
    made = vllm.VllmGenerator(target, template, base="b", max_length=99, max_new_tokens=5)
    lora = {"enable_lora": True, "max_lora_rank": 16} if adapted else {}
    freed, opened, sampling = llm.told
    assert freed == "freed", "vLLM looks at what is free"
    assert opened == {
        "model": f"{target} on b", "revision": "r", "dtype": f"format of {target}", "max_model_len": 99,
        "skip_tokenizer_init": True, "trust_remote_code": False, **lora,
    }  # fmt: skip
    assert sampling == {"temperature": 0, "max_tokens": 5, "stop_token_ids": [9, 10], "detokenize": False}  # fmt: skip
    llm.told.clear()
    [first, second] = made.replies([Window([np.array([4, 5])]), Window([[6], [7]])])
    assert [reply.index for reply in [*first, *second]] == [0, 0, 1]
    request = ("adapter", 1, str(Path("adapter").resolve())) if adapted else None
    assert llm.told[0] == ([{"prompt_token_ids": [4, 5]}], "sampling", {"use_tqdm": False, "lora_request": request})  # fmt: skip
    shown: Any = ImagePrompt.__new__(ImagePrompt)
    with pytest.raises(DataError, match="images go with --backend transformers"):
        list(made.replies([Window([[1], shown])]))
    made.close()
    assert llm.told[-1] == "ended"


def test_a_vllm_has_room_for_the_longest_prompt_and_ends_with_its_block(
    llm: Llm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "context_of", lambda target, base: 77)
    asked: list[Any] = []
    template: Any = SimpleNamespace(stop_ids=(9,))
    for given, longest in (([3, 20, 5], 25), ([], 6)):
        llm.told.clear()

        def lengths(room: Any, given: list[int] = given) -> list[int]:
            asked.append(room)
            return given

        with through_vllm(template, "whole", lengths, base="b", rows=4, max_new_tokens=5) as found:
            assert (found.positions, found.rows) == (77, 4)
            assert found.facts() == {"dtype": "torch.format of whole"}
            assert llm.told[1]["max_model_len"] == longest
            assert llm.told[2]["max_tokens"] == 5
            assert "ended" not in llm.told
        assert llm.told[-1] == "ended"
    assert asked == [77, 77]


def test_a_fault_inside_of_vllm_is_no_missing_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "vllm":
                raise ModuleNotFoundError("No module named 'its_part'", name="its_part")

    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="its_part"):
        vllm._import_vllm()


def test_memory_is_free_before_vllm_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.distributed import device

    done: list[str] = []
    monkeypatch.setattr(vllm.gc, "collect", lambda: done.append("collected"))
    monkeypatch.setattr(device, "give_back_unused", lambda: done.append("given back"))
    vllm._free_device()
    assert done == ["collected", "given back"]


@pytest.mark.parametrize(("here", "values", "found"), [(True, {"max_position_embeddings": 8}, 8), (False, {"seq_length": 9}, 9), (True, {}, None), (True, {"seq_length": "9"}, None)])  # fmt: skip
def test_the_room_of_a_model_is_read_from_its_config_alone(
    here: bool, values: dict[str, Any], found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "model_base", lambda target, base: SimpleNamespace(path=f"{target} {base}", revision="r"))  # fmt: skip
    asked: list[Any] = []
    monkeypatch.setattr(vllm, "local_folder", lambda path, revision, files: asked.append((path, revision, files)) or Path("f"))  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr(vllm, "is_folder", lambda path: here)
    monkeypatch.setattr(vllm, "read_model_config", lambda folder: values if here else pytest.fail("whole"))  # fmt: skip
    monkeypatch.setattr(vllm, "read_json", lambda path: values if path == Path("f/config.json") else pytest.fail("part"))  # fmt: skip
    assert vllm.context_of("m", "b") == found
    assert asked == [("m b", "r", vllm.TOKENIZER_FILES)]
