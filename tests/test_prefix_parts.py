"""A prefix, part by part: its units, its start, what restores it, and how it is taken off again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune import methods
from finetune.artifacts.base_record import BaseRecord
from finetune.artifacts.weights import model_fingerprint
from finetune.config.schema import PTuningV2Method
from finetune.errors import ModelError
from finetune.methods import prefix_init, ptuning_v2
from finetune.methods.ptuning_v2 import Prefix
from finetune.models.load import load_model

N = 3
IDS = torch.tensor([[10, 40, 41, 60]])


def prefixed(folder: Path, start: tuple[int, ...] = (10, 11, 12), **options: Any) -> Any:
    section = PTuningV2Method(num_virtual_tokens=N)
    return methods.attach(load_model(folder, **options), section, start_ids=start)


def test_units_are_powers_of_two_and_a_vector_of_zeros_has_the_unit_one() -> None:
    start = torch.zeros(2, 1, 3, 4)
    start[0, 0, 0] = 3.0
    start[1, 0, 1] = 0.01
    prefix = Prefix(start)
    assert torch.equal(prefix(), start)
    units = prefix.unit.flatten()
    assert torch.equal(torch.frexp(units).mantissa, torch.full((6,), 0.5))
    assert units.tolist() == [4.0, 1.0, 1.0, 1.0, 2.0**-7, 1.0]
    assert bool(prefix.key_value.isfinite().all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefix_is_trained_in_float32_whatever_the_model_computes_in(
    dtype: str, tiny_glm: Path
) -> None:
    model = prefixed(tiny_glm, dtype=dtype)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    assert all(state.dtype is torch.float32 for state in prefix_init.activations(load_model(tiny_glm, dtype=dtype), [1]))  # fmt: skip


@pytest.mark.parametrize("start", [(), (10, 11), (10, 11, 12, 13)])
def test_a_text_of_another_length_is_no_start(start: tuple[int, ...], tiny_glm: Path) -> None:
    torch.manual_seed(1)
    noise = prefixed(tiny_glm, ())
    torch.manual_seed(1)
    model = prefixed(tiny_glm, start)
    first, second = (next(m for m in one.modules() if isinstance(m, Prefix)) for one in (model, noise))  # fmt: skip
    assert torch.equal(first(), second())


def test_the_units_of_a_checkpoint_are_those_of_the_run_that_goes_on(
    tiny_glm: Path, tmp_path: Path
) -> None:
    model = prefixed(tiny_glm)
    methods.save(model, tmp_path, base=BaseRecord(str(tiny_glm), None, "x"))
    other = prefixed(tiny_glm, (200, 201, 202))
    methods.restore(other, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    (tmp_path / "prefix_units.safetensors").unlink(missing_ok=True)
    units = [path for path in tmp_path.iterdir() if "unit" in path.name]
    assert units == []
    methods.restore(other, tmp_path)  # of PEFT: in units of one
    first, second = (next(m for m in one.modules() if isinstance(m, Prefix)) for one in (model, other))  # fmt: skip
    assert torch.equal(first(), second())
    assert set(second.unit.flatten().tolist()) == {1.0}


def test_a_base_without_its_prefix_is_the_base_again(tiny_glm: Path, tmp_path: Path) -> None:
    base = load_model(tiny_glm)
    with torch.no_grad():
        plain = base(IDS).logits
        model = prefixed(tiny_glm)
        methods.save(model, tmp_path, base=BaseRecord(str(tiny_glm), None, model_fingerprint(tiny_glm)))  # fmt: skip
        opened = ptuning_v2.load_adapter(load_model(tiny_glm), tmp_path)
        assert not torch.allclose(opened(IDS).logits, plain)
        assert not any(weight.requires_grad for weight in opened.parameters())
        bare = ptuning_v2.detach(opened)
        assert torch.equal(bare(IDS).logits, plain)
        # Twice on and off: positions move once for each prefix that is there.
        assert torch.equal(ptuning_v2.detach(ptuning_v2.load_adapter(bare, tmp_path))(IDS).logits, plain)  # fmt: skip
    assert not ptuning_v2.is_attached(bare)
    assert bare.config._attn_implementation == base.config._attn_implementation


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_number_of_a_prefix_that_is_not_finite_is_found(
    value: float, tiny_glm: Path, tmp_path: Path
) -> None:
    methods.save(prefixed(tiny_glm), tmp_path, base=BaseRecord(str(tiny_glm), None, model_fingerprint(tiny_glm)))  # fmt: skip
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[-1, -1] = value
    save_file(weights, file)
    with pytest.raises(ModelError, match="numbers that are not finite"):
        ptuning_v2.load_adapter(load_model(tiny_glm), tmp_path)


@pytest.mark.parametrize("said", [N - 1, N + 1])
def test_a_config_of_another_number_of_tokens_is_refused(
    said: int, tiny_glm: Path, tmp_path: Path
) -> None:
    methods.save(prefixed(tiny_glm), tmp_path, base=BaseRecord(str(tiny_glm), None, model_fingerprint(tiny_glm)))  # fmt: skip
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_virtual_tokens": said}))
    with pytest.raises(ModelError, match=f"says num_virtual_tokens {said}, and there are {N}"):
        ptuning_v2.load_adapter(load_model(tiny_glm), tmp_path)


def test_weights_that_are_dealt_out_are_let_go_after_a_pass_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import deepspeed

    held: list[str] = []

    class Gathered:
        def __init__(self, parts: Any) -> None: ...

        def __enter__(self) -> None:
            held.append("taken")

        def __exit__(self, *_: object) -> None:
            held.append("let go")

    class Broken(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("broken")

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", Gathered)
    layer = Broken(2, 2)
    layer.weight.ds_id = 0  # type: ignore[attr-defined]

    def run() -> None:
        with prefix_init._gathered(layer):
            layer(torch.ones(1, 2))

    with pytest.raises(ValueError, match="broken"):
        run()
    assert held == ["taken", "let go"]
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_weights_that_are_whole_need_no_gathering(tiny_glm: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(prefix_init, "_whole_while_it_runs", lambda *_: 1 / 0)
    assert len(prefix_init.activations(load_model(tiny_glm), [1, 2])) == 2


def test_the_prefix_of_a_cache_is_as_narrow_as_the_model(tiny_glm: Path) -> None:
    from finetune.methods.adapter_rows import prefix_of

    states = prefix_of(prefixed(tiny_glm, dtype="bfloat16"))
    assert [tuple(one.shape) for pair in states for one in pair] == [(1, 2, N, 8)] * 4
    assert {one.dtype for pair in states for one in pair} == {torch.bfloat16}
    assert prefix_of(load_model(tiny_glm)) == []


def test_noise_is_as_large_as_it_is_said_to_be_and_a_prefix_is_all_that_learns(tiny_glm: Path) -> None:  # fmt: skip
    torch.manual_seed(0)
    model = methods.attach(load_model(tiny_glm), PTuningV2Method(num_virtual_tokens=200))
    prefixes = [m for m in model.modules() if isinstance(m, ptuning_v2.Prefix)]
    assert float(torch.cat([p().flatten() for p in prefixes]).detach().std()) == pytest.approx(0.2, rel=0.05)  # fmt: skip
    assert {name.rpartition(".prefix.")[2] for name, w in model.named_parameters() if w.requires_grad} == {"key_value"}  # fmt: skip


@pytest.mark.parametrize(("asked", "hidden"), [(None, 16), (7, 7)])
def test_an_encoder_is_as_wide_as_it_is_asked_to_be_and_starts_from_no_text(
    asked: int | None, hidden: int, tiny_glm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_init, "activations", lambda *_: 1 / 0)
    section = PTuningV2Method(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=asked)  # fmt: skip
    model: Any = ptuning_v2.attach(load_model(tiny_glm), section, start_ids=[1, 2, 3])
    assert model.prefix_encoder.transform.out_features == hidden
    assert model.prefix_encoder.embedding.weight.shape == (3, 16)
    bare = ptuning_v2.detach(model)
    assert not hasattr(bare, "prefix_encoder")
    assert not hasattr(bare, "_without_prefix")
    assert not ptuning_v2.is_attached(bare)


def test_the_saved_config_has_the_sizes_that_peft_asks_for(tiny_glm: Path, tmp_path: Path) -> None:
    import json

    from finetune.artifacts.base_record import BaseRecord

    section = PTuningV2Method(num_virtual_tokens=3, prefix_projection=True)
    model = methods.attach(load_model(tiny_glm), section)
    methods.save(model, tmp_path, base=BaseRecord(str(tiny_glm), None, "x"))
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    asked = {name: said[name] for name in ("num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads", "prefix_projection")}  # fmt: skip
    assert asked == {"num_virtual_tokens": 3, "num_layers": 2, "token_dim": 16, "num_attention_heads": 2, "prefix_projection": False}  # fmt: skip
    assert (tmp_path / "prefix_encoder.safetensors").is_file()
    assert not (tmp_path / "prefix_units.safetensors").exists()
    plain = methods.attach(load_model(tiny_glm), PTuningV2Method(num_virtual_tokens=3))
    with pytest.raises(
        ModelError, match="another prefix than this run attaches; use the num_virtual"
    ):
        methods.restore(plain, tmp_path)


def test_a_model_that_sees_gives_the_text_that_a_prefix_starts_from(tmp_path: Path) -> None:
    model = load_model(pictures.save_grid_model(tmp_path / "model"))
    model.model.forward = lambda *_, **__: 1 / 0  # type: ignore[method-assign]
    states = prefix_init.activations(model, [10, 40, 41])
    assert [tuple(one.shape) for one in states] == [(2, 2, 3, 8)] * 2
    assert not any(state.requires_grad for state in states)


def test_a_prefix_of_another_base_is_told_by_its_width(tiny_glm: Path, tmp_path: Path) -> None:
    methods.save(prefixed(tiny_glm), tmp_path, base=BaseRecord(str(tiny_glm), None, model_fingerprint(tiny_glm)))  # fmt: skip
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor[:, :-8].contiguous() for name, tensor in load_file(file).items()}, file)
    with pytest.raises(
        ModelError, match="holds 56 numbers per virtual token, but this base takes 64"
    ):
        ptuning_v2.load_adapter(load_model(tiny_glm), tmp_path)


@pytest.mark.parametrize("pattern", ["nothing", r"model\.rotary_emb|model\.norm"])
def test_a_prefix_wants_one_rotation_to_move(pattern: str, tiny_glm: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from dataclasses import replace

    from finetune.models.families import FAMILIES

    odd = replace(FAMILIES["glm"], rotary=pattern)
    monkeypatch.setattr(ptuning_v2, "family_of", lambda _: odd)
    with pytest.raises(ModelError, match="expected one rotary embedding in the model, found"):
        ptuning_v2.attach(load_model(tiny_glm), PTuningV2Method(num_virtual_tokens=N))


@pytest.mark.parametrize(
    "held",
    [
        {"other": torch.zeros(3, 64)}, {"prompt_embeddings": torch.zeros(3, 64), "more": torch.zeros(1)},
        {"prompt_embeddings": torch.zeros(3, 64, dtype=torch.int32)}, {"prompt_embeddings": torch.zeros(3, 8, 8)},
    ],
)  # fmt: skip
def test_what_is_no_prefix_is_not_opened_as_one(held: Any, tiny_glm: Path, tmp_path: Path) -> None:
    methods.save(prefixed(tiny_glm), tmp_path, base=BaseRecord(str(tiny_glm), None, model_fingerprint(tiny_glm)))  # fmt: skip
    save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="holds no saved prefix"):
        ptuning_v2.load_adapter(load_model(tiny_glm), tmp_path)


@pytest.mark.parametrize("part", [None, 0, 1])
def test_a_prefix_is_as_narrow_as_the_keys_and_each_part_has_that_of_its_heads(part: int | None) -> None:  # fmt: skip
    from finetune.models.sequence_parallel import Split

    module, seen = nn.Module(), list[Any]()
    module.prefix = Prefix(torch.arange(2 * 2 * N * 4.0).view(2, 2, N, 4))
    attend = ptuning_v2._with_prefix(lambda *given, **_: seen.append(given))
    split = None if part is None else Split(2, part, lambda sent: sent)
    heads = 2 if split is None else 1
    states = torch.zeros(3, heads, 5, 4, dtype=torch.bfloat16)
    attend(module, states, states, states, None, split=split)
    _, _, keys, values, mask = seen[0]
    assert mask is None
    whole = module.prefix().bfloat16()
    own = whole if part is None else whole[:, part : part + 1]
    for found, expected in ((keys, own[0]), (values, own[1])):
        assert found.dtype is torch.bfloat16
        assert torch.equal(found[:, :, :N], expected.expand(3, -1, -1, -1))
        assert not found[:, :, N:].any()


def test_positions_move_behind_the_prefix_and_what_is_turned_stays(tiny_glm: Path) -> None:
    model = prefixed(tiny_glm)
    seen: list[Any] = []
    model.model.rotary_emb.register_forward_pre_hook(lambda _, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True)  # fmt: skip
    hidden: list[Any] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with torch.no_grad():
        model(IDS)
    rows, places = seen[0][0], next(t for t in seen[0][1:] if isinstance(t, torch.Tensor))
    assert torch.equal(rows, hidden[0])
    assert places.tolist() == [[N, N + 1, N + 2, N + 3]]


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_lies_where_its_model_lies(projection: bool, tiny_glm: Path) -> None:
    from finetune.models.load import shape_of

    with torch.device("meta"):
        model: Any = shape_of(tiny_glm)
    section = PTuningV2Method(num_virtual_tokens=N, prefix_projection=projection)
    ptuning_v2.attach(model, section)
    assert all(weight.is_meta for weight in model.parameters())


def test_what_is_saved_is_float32_and_heads_may_be_wider_together_than_the_model(
    tiny_glm: Path, tmp_path: Path
) -> None:
    model = prefixed(tiny_glm)
    narrow = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    base = BaseRecord(str(tiny_glm), None, model_fingerprint(tiny_glm))
    ptuning_v2.save(model, tmp_path, base=base, state_dict=narrow)
    for file in tmp_path.glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    other = methods.attach(load_model(tiny_glm), PTuningV2Method(num_virtual_tokens=N + 1))
    with pytest.raises(
        ModelError, match=r"size mismatch for .*Use the num_virtual_tokens it was saved"
    ):
        methods.restore(other, tmp_path)
    wide = load_model(pictures.save_grid_model(tmp_path / "wide", "glm_ocr"))
    assert ptuning_v2._key_value_shape(wide) == (2, 16)


def test_a_mask_is_open_for_the_prefix_in_either_form() -> None:
    seen = ptuning_v2._open_left(torch.zeros(1, 1, 2, 3, dtype=torch.bool), 2)
    assert seen.int().tolist() == [[[[1, 1, 0, 0, 0]] * 2]]
    added = ptuning_v2._open_left(torch.full((1, 1, 2, 3), -9.0), 2)
    assert added.tolist() == [[[[0.0, 0.0, -9.0, -9.0, -9.0]] * 2]]
