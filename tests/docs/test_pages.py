"""Every command, config and script of the docs does what the page says.

In the short suite scripts and configs are run, and commands that train are given `--dry-run`; those that need such a run are
parsed. The long tests run all of them, shrunk, one after the other. What is never run says why on the page.
"""

import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import PAGES, ROOT, SHOWN, Block, blocks, commands, sessions

import data
import launch.hosts
import launch.plan
from launch.cli import main
from launch.config import load
from launch.sweep.loading import Asked
from partitioning import topologies
from training.run import Run

IMPORTS = ("data", "evaluation", "models", "objectives", "optax", "partitioning", "training")
# These are as cheap as they are.
CHEAP = ("prepare", "config", "methods", "data")
# What a page's own commands do not make.
MADE = {
    "README.md": [
        "palmette prepare configs/quickstart.gin",
        "palmette train configs/quickstart.gin --out runs/quickstart",
    ],
    "generation.md": ["palmette train configs/llama.gin --out runs/llama"],
    "hosts.md": ["palmette train configs/masked_lm.gin --out runs/a"],
    "training.md": [
        "palmette prepare configs/quickstart.gin",
        "palmette train configs/quickstart.gin --out runs/quickstart",
    ],
}
# A shrunk run has two steps.
STEPS = {"400": "1", "500": "2"}
# The reasons that pages give: each is here, so that none is added unseen.
REASONS = {
    "my_mixer.py would be the reader's own file",
    "it asks for a pod again, for as long as it is taken away",
    "two slices are not here",
    "cuDNN is not here",
}


def shrunk(run: Run) -> Run:
    """The same run in two steps of eight short rows, or two steps a stage, a checkpoint each."""
    small = {"batch_size": 8, "length": 32}
    stages = [replace(stage, steps=2, **{k: v for k, v in small.items() if getattr(stage, k)}) for stage in run.stages]
    evaluators = [replace(e, most_rows=8) if hasattr(e, "most_rows") else e for e in run.evaluators]
    steps = {"stages": stages} if stages else {"steps": min(run.steps or 2, 2)}
    return replace(run, **small, **steps, evaluators=evaluators, accumulate=1, checkpoint_every=1)


@pytest.fixture
def workplace(tmp_path, monkeypatch, tmp_path_factory):
    """An empty folder with the shipped configs, the files that pages speak of, and runs that are shrunk."""
    cache = tmp_path_factory.getbasetemp() / "docs_cache"
    monkeypatch.setenv("PALMETTE_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "launch" / "tpu_vm" / "example.toml", tmp_path / "my_pod.toml")
    train, evaluate = Run.train, Run.evaluate
    monkeypatch.setattr(Run, "train", lambda run, *args, **options: train(shrunk(run), *args, **options))
    monkeypatch.setattr(Run, "evaluate", lambda run, out: evaluate(shrunk(run), out))
    # Chips and hosts that are not here: the arguments are parsed and the config is resolved.
    monkeypatch.setattr(launch.hosts, "met", lambda meeting: nullcontext())
    monkeypatch.setattr(launch.plan, "asked", described)
    for name in ("planned", "ranked"):
        monkeypatch.setattr(launch.plan, name, lambda *args, **options: None)
    files_of_pages(tmp_path)
    data.prepare("python_docs")
    return tmp_path


def described(paths, overrides, topology, slices, allow_import) -> None:
    """In the place of a plan: the topology is one, and the config resolves."""
    topologies.topology(topology, slices)
    load(paths, overrides, allow_import=allow_import)


def files_of_pages(folder: Path) -> None:
    """What pages take for granted: pairs, a tokenizer, prompts, conversations, a sweep."""
    import json

    import pyarrow as pa
    from pyarrow import parquet
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    pairs = {"question": [f"what is {i}" for i in range(20)], "passage": [f"{i} is a number" for i in range(20)]}
    parquet.write_table(pa.table(pairs), folder / "pairs.parquet")
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]"]
    tokenizer.train_from_iterator(pairs["passage"], trainers.BpeTrainer(vocab_size=300, special_tokens=specials))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "prompts.txt").write_text("Return the\nA list\n")
    chat = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "A number."}] for i in range(20)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chat))
    arms = [{"name": f"rate={rate}"} for rate in ("0.15", "0.40")]
    for i, arm in enumerate(arms):
        for seed in range(3):
            out = folder / "sweep" / "arms" / arm["name"] / str(seed)
            out.mkdir(parents=True)
            (out / "result.json").write_text(json.dumps({"figures": {"masked/bits_per_token": 3 + 0.1 * seed + i}}))
    described = {"metric": ["masked/bits_per_token", "min"], "arms": arms, "baseline": "rate=0.15"}
    (folder / "sweep" / "sweep.json").write_text(json.dumps(described))


class Page:
    """Runs a page's blocks from top to bottom; its scripts share their names."""

    def __init__(self, path: Path, capsys: Any, *, whole: bool):
        self.path, self.capsys, self.whole = path, capsys, whole
        self.names: dict[str, Any] = {}
        self.made: set[str] = set()

    def run(self) -> None:
        """All of it."""
        for line in MADE.get(self.path.name, []) if self.whole else []:
            self.command(line.split())
        for block in blocks(self.path):
            if block.word == "not run":
                assert block.words in REASONS, f"{block.place}: a reason that this test does not list"
                continue
            assert block.language in ("", "sh", "python", "gin", *SHOWN), f"{block.place}: no language that is known"
            try:
                getattr(self, block.language or "session", lambda block: None)(block)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error

    def sh(self, block: Block) -> None:
        """Commands, one after the other."""
        for words in commands(block.text):
            self.command(words)

    def session(self, block: Block) -> None:
        """Commands, and that they answer as shown."""
        for words, answer in sessions(block.text):
            self.capsys.readouterr()
            status = self.status(words[1:])
            if words[1] != "plan":
                said = self.capsys.readouterr()
                assert said.out + said.err == answer
                assert status == (2 if answer.startswith("palmette: ") else 0)

    def python(self, block: Block) -> None:
        """A script."""
        exec(compile(block.text, block.place, "exec"), self.names)

    def gin(self, block: Block) -> None:
        """A config, or a fragment behind one."""
        base, _, why = block.words.partition("; ")
        assert not why or why in REASONS
        text = block.text
        if base and not Path(base).exists():
            assert not self.whole
            assert base in self.made
            return
        if base:
            head = ["from __gin__ import dynamic_registration", *(f"import {name}" for name in IMPORTS)]
            text = "\n".join([*head, f"include '{Path(base).absolute()}'", text])
        else:
            assert "from __gin__ import" in text, f"{block.place}: a fragment says `<!-- over: CONFIG -->`"
        Path("page.gin").write_text(text)
        if "sweep.Sweep." in text:
            Asked(("page.gin",)).read()
            return

        def exercise(run):
            run.prepare()
            run.abstract()

        load(["page.gin"], exercise=None if why else exercise)

    def command(self, words: list[str]) -> None:
        """One command; what is no `palmette` is looked up."""
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        program, *rest = words
        if program == "palmette":
            assert self.status(rest) == 0, f"{' '.join(words)}: {self.capsys.readouterr().err}"
            return
        if program == "make":
            assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
                f"no such target: {rest[0]}"
            )
            return
        assert words[:2] == ["tensorboard", "--logdir"], f"{' '.join(words)}: run it, or say why not"

    def status(self, words: list[str]) -> int:
        """The exit status of a `palmette` command, shrunk."""
        verb = words[0]
        if "--out" in words:
            self.made.add(words[words.index("--out") + 1])
        if (verb == "train" and (not self.whole or "--hosts" in words)) or verb == "pod":
            words = [*words, "--dry-run"]
        elif verb == "sweep":
            # An hour, or a print of commands: its arms are planned, in the short suite its description is read.
            if not self.whole:
                Asked(tuple(word for word in words if word.endswith(".gin"))).read()
                return parsed(words)
            words = [word for word in words if word not in ("--jobs", "--dry-run")] + ["--dry-run"]
        elif verb == "train" and "--profile" in words:
            pass
        elif not self.whole and verb not in ("train", "plan", *CHEAP):
            return parsed(words)
        with pytest.raises(SystemExit) as ended:
            main([STEPS.get(word, word) if verb == "checkpoints" else word for word in words])
        return ended.value.code or 0


def parsed(words: list[str]) -> int:
    """0 where the parser takes the words; nothing is called."""
    import typer

    from launch.verbs import app

    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    command.make_context(name, list(words))
    return 0


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_is_true(path, capsys):
    Page(path, capsys, whole=False).run()


@pytest.mark.long
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_all_of_a_page_is_true(path, capsys):
    Page(path, capsys, whole=True).run()


@pytest.mark.usefixtures("workplace")
def test_the_readmes_config_and_script_are_one_run(tmp_path):
    """Both train, to the same loss."""
    first_of = {block.language: block.text for block in reversed(blocks(ROOT / "README.md"))}
    Path("first.gin").write_text(first_of["gin"])
    first = load(["first.gin"], exercise=lambda run: run.abstract()).value.train(tmp_path / "gin")
    names: dict[str, Any] = {}
    exec(first_of["python"].replace('run.train("runs/python")', 'figures = run.train("python")'), names)
    assert first["loss"] == names["figures"]["loss"]


def test_no_reason_is_left_over():
    """Each is given on a page, and none is empty."""
    found = [b for path in PAGES for b in blocks(path) if b.word in ("not run", "not built")]
    assert {b.words if b.word == "not run" else b.words.partition("; ")[2] for b in found} == REASONS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```sh\npalmette train configs/masked_lm.gin 'RandomTokens.rat = 1'\n```\n", "no argument rat"),
        ("```sh\npalmette fill runs/a --cuont 3\n```\n", "No such option"),
        ("```sh\nnpm start\n```\n", "run it, or say why not"),
        ("```python\nassert 1 == 2\n```\n", "AssertionError"),
        ("```gin\nobjectives.RandomTokens.rate = 0.1\n```\n", "a fragment says"),
        ("<!-- over: configs/masked_lm.gin -->\n```gin\nmodels.Trunk.widht = 3\n```\n", "widht"),
        ("<!-- not run: it is long -->\n```sh\nmake test\n```\n", "a reason that this test does not list"),
        ("```\n$ palmette train nothing.gin\nfine\n```\n", "AssertionError"),
        ("```bash\nls\n```\n", "no language that is known"),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_a_page_that_is_not_true_is_seen(text, message, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=message):
        Page(page, capsys, whole=False).run()
