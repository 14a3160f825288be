"""The documentation as a site for a browser: `python scripts/docs/site.py` writes site/index.html.

Needs the extra `docs` (mkdocs-material, mkdocs-static-i18n). The pages are those of the repository: README,
docs/, data/README and the rest, laid out as mkdocs wants them, English and Chinese side by side. A link that
leads nowhere ends the build (--strict), and so does a page that would fetch anything from elsewhere.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ROOT / "site-docs"
ELSEWHERE = {  # pages that lie outside of docs/ -> their place in the site
    "README.md": "index.md", "data/README.md": "data.md", "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md",
}  # fmt: skip
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
SWITCH = re.compile(r"^\[(?:简体中文|English)\]\([^)]*\)(?: · )?(.*)\n\n?", flags=re.MULTILINE)
FETCHED = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//(?!127\.)[^\"'> ]+")  # fmt: skip


def main() -> None:
    """Lays the pages out and builds the site."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--output", type=Path, default=ROOT / "site")
    output = parser.parse_args().output
    lay_out()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(output)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    shutil.rmtree(SOURCES)
    if done.returncode:
        sys.exit(done.returncode)
    foreign = {found for page in output.rglob("*.html") for found in FETCHED.findall(page.read_text("utf-8"))}  # fmt: skip
    foreign = {found for found in foreign if 'rel="canonical"' not in found}
    if foreign:
        sys.exit("pages fetch from elsewhere: " + ", ".join(sorted(foreign)[:5]))
    print(f"{output / 'index.html'}: {len(list(output.rglob('*.html')))} pages")


def lay_out() -> None:
    """site-docs/: every page under the name that mkdocs wants, `x.md` and `x.zh.md`, links with them."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    for page in [*ROOT.glob("*.md"), *ROOT.glob("data/*.md"), *ROOT.glob("docs/**/*.md")]:
        name = page.relative_to(ROOT).as_posix()
        target = SOURCES / place(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page_text(page), encoding="utf-8")
    (SOURCES / "wrap.css").write_text(".md-typeset pre > code { white-space: pre-wrap; }\n")
    for picture in [*ROOT.glob("docs/*.png"), *ROOT.glob("docs/images/*")]:
        target = SOURCES / picture.relative_to(ROOT / "docs")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, target)


def place(name: str) -> str:
    """`docs/gpu_zh.md` -> `gpu.zh.md`, `data/README.md` -> `data.md`."""
    english = name.replace("_zh.md", ".md")
    there = ELSEWHERE.get(english, english.removeprefix("docs/"))
    return there if name == english else there.replace(".md", ".zh.md")


def page_text(page: Path) -> str:
    """A page with its links as the site has them; what has no page there is a name without a link."""
    text = SWITCH.sub(lambda match: f"{match[1]}\n\n" if match[1] else "", page.read_text("utf-8"), count=1)  # fmt: skip
    here = place(page.relative_to(ROOT).as_posix())

    def moved(match: re.Match[str]) -> str:
        there = os.path.normpath(page.parent / match[2])
        name = os.path.relpath(there, ROOT)
        if name.endswith(".md"):
            target = place(name).replace(".zh.md", ".md")
        elif name.startswith("docs/"):
            target = name.removeprefix("docs/")
        else:
            return f"]({'../' * here.count('/')}source.md)"
        return f"{match[1]}{os.path.relpath(target, Path(here).parent)}{match[3] or ''}{match[4]}"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else without_files(LINK.sub(moved, part)) for part in parts)  # fmt: skip


def without_files(text: str) -> str:
    """`[configs/x.yaml](…)`: a file of the repository stands as its name."""
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)*source\.md\)", r"`\1`", text)


if __name__ == "__main__":
    main()
