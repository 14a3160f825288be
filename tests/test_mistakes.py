"""The small mistakes that `scripts/evidence/mutate.py` makes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "evidence"))

import called
import mutate
from mistakes import mistakes
from mutations import Mutation
from warm_tests import exchanged

SOURCE = '''
def f(a: "x < 1", b=True):
    """No 1 < 2 here."""
    if a < len("你好") and not b:
        log(f"{a + 1}")
    swap(a, b, c=1)
    return folder / NAME if b else max(a + 1, row["x"] or row.get("y", d.z))
'''


def test_every_kind_of_mistake_is_made_where_it_stands_and_none_in_texts() -> None:
    made = mistakes(SOURCE)
    said = {(one.old, one.new) for one in made}
    assert said == {
        ("True", "False"),
        ('a < len("你好") and not b', '(a < len("你好") or not b)'),
        ('a < len("你好") and not b', '(not (a < len("你好") and not b))'),
        ('a < len("你好")', 'a <= len("你好")'),
        ('a < len("你好")', 'a > len("你好")'),
        ('a < len("你好") and not b', '(a < len("你好"))'),
        ('a < len("你好") and not b', "(not b)"),
        ("not b", "(b)"),
        ("swap(a, b, c=1)", "pass"),
        ("swap(a, b, c=1)", "swap(b, a, c=1)"),
        ('row["x"] or row.get("y", d.z)', '(row["x"] and row.get("y", d.z))'),
        ('row["x"] or row.get("y", d.z)', '(row["x"])'),
        ('row["x"] or row.get("y", d.z)', '(row.get("y", d.z))'),
        ('"x"', '"y"'),
        ('"y"', '"x"'),
        ('log(f"{a + 1}")', "pass"),
        ("b", "(not (b))"),
        ("max", "min"),
        ("a + 1", "(a - 1)"),
        ("1", "2"),
    }
    for one in made:
        changed = Mutation("f.py", one.old, one.new, one.line, one.column).applied(SOURCE)
        compile(changed, "f.py", "exec")
        assert changed != SOURCE


def test_a_text_of_a_list_must_stand_in_the_file_once() -> None:
    assert Mutation("f.py", "a < len", "a > len").applied(SOURCE) == SOURCE.replace(
        "a < len", "a > len"
    )
    with pytest.raises(SystemExit, match="2 × 'a . 1', not 1".replace(".", r"\+")):
        Mutation("f.py", "a + 1", "a").applied(SOURCE)


def test_the_tests_of_a_module_come_before_those_of_its_room_and_all_others() -> None:
    near, room, others = mutate.groups_of("finetune/serving/requests/fields.py")
    assert "tests/test_serving_chats.py" in near
    assert "tests/test_serving_engine.py" in room
    assert "tests/test_lora.py" in others
    assert mutate.groups_of("finetune/serving/requests/fields.py", near_only=True) == [near]


CODE = """
LIMIT = 3


class Box:
    size = 1

    def holds(self, count):
        def inner(number):
            return number < LIMIT
        return inner(count)


def default(count=5):
    return count
"""


def test_a_mistake_in_a_function_reaches_the_imported_one_and_one_outside_needs_an_import(
    tmp_path: Path,
) -> None:
    path = tmp_path / "boxes.py"
    module: dict[str, Any] = {}
    exec(compile(CODE, path, "exec"), module)
    box = module["Box"]()
    assert not box.holds(3)
    assert exchanged(CODE, CODE.replace("number < LIMIT", "number <= LIMIT"), path)
    assert box.holds(3)
    for old, new in (("LIMIT = 3", "LIMIT = 4"), ("size = 1", "size = 2"), ("count=5", "count=6")):
        assert not exchanged(CODE, CODE.replace(old, new), path)


def test_tests_that_only_name_a_constant_are_known_too(tmp_path: Path) -> None:
    file = tmp_path / "test_x.py"
    file.write_text("def test_a():\n    assert LIMIT == 3\n\n\n@of(LIMIT)\ndef test_b():\n    pass\n\n\ndef test_c():\n    NO_LIMIT\n")  # fmt: skip
    assert called.tests_that_name("LIMIT", file) == {"test_a", "test_b"}


CLOSED = """
def sized(limit, other):
    def fits(count):
        return count < limit and count != other
    return fits


def alone():
    return 1
"""


def test_a_function_that_is_there_already_and_looks_at_other_names_needs_an_import(
    tmp_path: Path,
) -> None:
    path = tmp_path / "sized.py"
    module: dict[str, Any] = {}
    exec(compile(CLOSED, path, "exec"), module)
    fits = module["sized"](3, 1)
    assert exchanged(CLOSED, CLOSED.replace("count < limit", "count <= limit"), path)
    assert fits(3)
    assert not exchanged(CLOSED, CLOSED.replace(" and count != other", ""), path)


def test_the_functions_around_a_line_are_named_as_python_names_them() -> None:
    inner = CODE[: CODE.index("number < LIMIT")].count("\n") + 1
    assert called.functions_at(CODE, inner) == ["Box.holds.<locals>.inner", "Box.holds"]
    assert called.functions_at(CODE, 2) == []
    assert called.name_at(CODE, 2) == "LIMIT"
    assert called.name_at(CODE, 6) == "Box"
