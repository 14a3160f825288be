"""Calls that must not be in the product, found in its syntax trees; the one home of that list."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from tests.reliability.frame import ROOT, Case

SOURCES = [ROOT / "finetune.py", *sorted((ROOT / "finetune").rglob("*.py"))]
Rule = Callable[[str, dict[str | None, ast.expr]], bool]
"""Whether a call, by its dotted name and keywords, is banned."""


def _is(*names: str) -> Rule:
    return lambda name, _: name in names or name.rpartition(".")[2] in {n for n in names if "." not in n}  # fmt: skip


def _named(*names: str) -> Rule:
    return lambda name, _: name in names


def _with(keyword: str) -> Rule:
    def rule(_: str, keywords: dict[str | None, ast.expr]) -> bool:
        value = keywords.get(keyword)
        return isinstance(value, ast.Constant) and bool(value.value)

    return rule


def _without_true(function: str, keyword: str) -> Rule:
    def rule(name: str, keywords: dict[str | None, ast.expr]) -> bool:
        value = keywords.get(keyword)
        return name == function and not (isinstance(value, ast.Constant) and value.value is True)

    return rule


# Rule -> the calls that it bans, and a call that shows that it does.
RULES: dict[str, tuple[Rule, str]] = {
    "shell=True": (_with("shell"), "subprocess.run(command, shell=True)"),
    "a shell": (_named("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "commands.getoutput"), "os.system(x)"),
    "eval and exec": (_named("eval", "exec", "compile", "builtins.eval", "builtins.exec"), "eval(x)"),
    "pickle": (_is("pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "pandas.read_pickle", "read_pickle"), "pickle.loads(x)"),
    "marshal and shelve": (_named("marshal.load", "marshal.loads", "shelve.open"), "shelve.open(x)"),
    "unsafe YAML": (_named("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"), "yaml.load(x)"),
    "torch.load without weights_only": (_without_true("torch.load", "weights_only"), "torch.load(x, weights_only=False)"),
    "numpy with pickles": (_with("allow_pickle"), "np.load(x, allow_pickle=True)"),
    "trust_remote_code": (_with("trust_remote_code"), "load(x, trust_remote_code=True)"),
    "a name that others may take": (_named("tempfile.mktemp", "os.tempnam"), "tempfile.mktemp()"),
    "archives unpacked as they say": (_is("extractall", "unpack_archive"), "archive.extractall()"),
    "addresses opened": (_is("urlopen", "urlretrieve", "build_opener", "requests.get", "requests.post", "httpx.get", "httpx.post"), "urllib.request.urlopen(x)"),
    "certificates not checked": (_named("ssl._create_unverified_context", "ssl.CERT_NONE"), "ssl._create_unverified_context()"),
    "XML": (_named("xml.etree.ElementTree.parse", "ElementTree.parse", "ElementTree.fromstring", "lxml.etree.parse"), "ElementTree.parse(x)"),
}  # fmt: skip


MEANT = {("addresses opened", "finetune/generation/backends/address.py")}
"""What is done on purpose: `--judge` asks the endpoint that the command line names."""


@dataclass(frozen=True)
class Call:
    """A call in a source."""

    location: str
    name: str
    keywords: dict[str | None, ast.expr]


def calls(source: str, file: str) -> Iterator[Call]:
    """All calls of a source, by `file:line`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            yield Call(f"{file}:{node.lineno}", ast.unparse(node.func), keywords)


@cache
def of_the_product() -> list[Call]:
    """All calls of the product."""
    return [
        call
        for path in SOURCES
        for call in calls(path.read_text("utf-8"), path.relative_to(ROOT).as_posix())
    ]


def broken(name: str) -> list[str]:
    """Places of the product at which a rule is broken."""
    rule, _ = RULES[name]
    found = [call.location for call in of_the_product() if rule(call.name, call.keywords)]
    return [place for place in found if (name, place.rpartition(":")[0]) not in MEANT]


def holds(name: str, folder: Path) -> None:
    """The rule finds the call that shows it, and none in the product."""
    rule, sample = RULES[name]
    assert [rule(call.name, call.keywords) for call in calls(sample, "")].count(True) == 1
    assert broken(name) == []


def cases() -> Iterator[Case]:
    """Every rule."""
    of_the_product()
    for name in RULES:
        yield Case(f"code: {name}", partial(holds, name))
