"""The site has all that the code has, its links lead somewhere, and it needs no network."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doc_blocks import ROOT

from docs.generator.__main__ import pages, write
from docs.generator.links import linked
from docs.generator.markdown import cell, plain
from docs.generator.methods import FAMILIES, entries
from launch.methods import PACKAGES, methods

FETCHED = re.compile(r"""<(?:script|link|img|iframe)[^>]*?(?:src|href)=["']?(?:https?:)?//""")


@pytest.fixture(scope="module")
def found():
    return pages()


def test_every_method_is_on_a_page(found):
    """What `palmette methods` lists and what a package exports, each with its sentence, source and arguments."""
    on_pages = {entry.name: entry for entry in entries(ROOT)}
    assert {method.name for method in methods()} <= set(on_pages)
    for package in PACKAGES:
        exported = vars(__import__(package))
        classes = [n for n, v in exported.items() if isinstance(v, type) and v.__module__.split(".")[0] == package]
        assert {f"{package}.{name}" for name in classes if exported[name].__doc__} <= set(on_pages)
    for method in methods():
        page, _, anchor = on_pages[method.name].place.partition("#")
        text = found[page].split(f"{{ #{anchor} }}")[1].split("\n## ")[0]
        assert f"**Source:** {plain(method.source)}" in text, method.name
    for family in FAMILIES:
        assert any(entry.family is family for entry in on_pages.values()), f"{family.page} is empty"


def test_a_method_reads_as_its_docstring(found):
    """Call, sentence, formula as it stands, arguments, source, what differs, the configs that use it."""
    text = found["methods/objectives.md"].split("{ #objectives-maskedlm }")[1].split("\n## ")[0]
    for part in (
        "objectives.MaskedLM(\n    select=RandomTokens(),\n    replace=Replace(),\n    penalty=TokenLoss(),\n)\n```",
        "\nPredict the tokens that a selection hides.\n",
        "``` { .text .formula }\nloss = -sum_i w_i log p(x_i | x~) / sum_i w_i,  (i, w) from `select`, x~ from `replace`.\n```",
        "| `select, replace, penalty` | as in `Masking`. |",
        '**Source:** "BERT", Devlin et al., 2019.',
        "**Differs:** no next-sentence prediction.",
        "[masked_lm](../configs.md#masked_lm)",
    ):
        assert part in text


def test_every_config_and_command_is_there(found):
    for path in sorted((ROOT / "configs").rglob("*.gin")):
        assert f"`{path.relative_to(ROOT).as_posix()}`" in found["configs.md"], path
    for verb in ("train", "checkpoints verify", "pod create", "data show"):
        assert f"\n## palmette {verb}\n" in found["commands.md"]
    assert "| `--patience` | Seconds after which a silent host is gone. | `30.0` |" in found["commands.md"]


def test_links_are_the_sites():
    places = {"models.Trunk": "methods/families.md#models-trunk"}
    to = lambda page, text: linked(page, text, places, ROOT)
    assert to("index.md", "[a](docs/masks.md#x), [b](benchmarks/RESULTS.md)") == "[a](masks.md#x), [b](results.md)"
    assert to("pods.md", "[a](../launch/tpu_vm/example.toml)") == "`launch/tpu_vm/example.toml`"
    assert to("pods.md", "`models.Trunk`") == "[`models.Trunk`](methods/families.md#models-trunk)"
    assert to("methods/norms.md", "`models.Trunk`") == "[`models.Trunk`](families.md#models-trunk)"
    assert to("plan.md", "see docs/pods.md.") == "see [pods](pods.md)."
    assert to("plan.md", "configs/bert.gin") == "[configs/bert.gin](configs.md#bert)"
    code = "```gin\n`models.Trunk` configs/bert.gin docs/pods.md\n```"
    assert to("plan.md", code) == code
    with pytest.raises(ValueError, match=r"index.md: a link to nothing/here.md"):
        to("index.md", "[a](nothing/here.md)")


def test_plain_text_stays_what_it_is():
    assert plain("x_i * y <- `a_b` [c]") == r"x\_i \* y &lt;- `a_b` \[c\]"
    assert cell("|x|\nand `a|b`") == r"\|x\| and `a\|b`"


def built(folder: Path) -> subprocess.CompletedProcess:
    """A strict build of a folder's pages."""
    shutil.copy(ROOT / "mkdocs.yml", folder)
    program = Path(sys.executable).with_name("zensical")
    return subprocess.run([program, "build", "--strict", "--clean"], cwd=folder, capture_output=True, text=True)


def test_the_site_is_built_strictly_and_fetches_nothing(tmp_path):
    """Every page is in the navigation, every link and anchor is there, and no page asks another host for anything."""
    write(tmp_path / "build" / "docs")
    done = built(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]))
    made = {path.relative_to(tmp_path / "build/docs").as_posix() for path in (tmp_path / "build/docs").rglob("*.md")}
    assert listed == made
    for name in made:
        page = tmp_path / "site" / Path(name).with_suffix(".html")
        assert not FETCHED.search(page.read_text()), name
    page = tmp_path / "build/docs/plan.md"
    page.write_text(page.read_text() + "\n[nowhere](pods.md#nothing)\n")
    assert built(tmp_path).returncode != 0
