"""The READMEs are true: their commands parse, their files are there, and both say the same."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh.md")
SECTIONS = {  # where in README.md the tables stand
    "files": "## What a run leaves",
    "settings": "## Settings that burnish adds",
}


def text_of(readme: str = "README.md") -> str:
    return (ROOT / readme).read_text(encoding="utf-8")


def blocks(readme: str = "README.md", language: str | None = None) -> list[tuple[str, str]]:
    """The code blocks: (language, content)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(readme), re.MULTILINE | re.DOTALL)
    return [block for block in found if language in (None, block[0])]


def commands(program: str) -> list[list[str]]:
    """The words of every command of README.md that starts this program."""
    lines = [line for _, block in blocks(language="bash") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and Path(line[0]).name == program]


def first_column(section: str) -> list[str]:
    """What stands in backquotes in the first column of the table of a section."""
    part = text_of().partition(SECTIONS[section])[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def files_a_run_leaves() -> set[str]:
    return {name.rstrip("/") for name in first_column("files")}


def test_both_readmes_have_the_same_code_and_the_same_names_in_their_tables():
    assert blocks("README.md") == blocks("README.zh.md")
    tables = [
        [line.split("|")[1].strip() for line in text_of(readme).splitlines() if line.startswith("| `")]
        for readme in READMES
    ]
    assert tables[0] == tables[1]
    assert [text_of(readme).count("\n## ") for readme in READMES] == [text_of().count("\n## ")] * 2


PAGES = [
    *READMES,
    "data/README.md",
    "examples/README.md",
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_or_a_heading(page):
    here = [target for target in re.findall(r"\]\(([^)]+)\)", text_of(page)) if "://" not in target]
    assert [target for target in here if not leads_somewhere(page, target)] == []


def leads_somewhere(page: str, target: str) -> bool:
    path, _, heading = target.partition("#")
    place = (ROOT / page).parent / path if path else ROOT / page
    return place.exists() and (not heading or heading in anchors(place.read_text(encoding="utf-8")))


def anchors(text: str) -> list[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings]


def test_every_place_of_the_tree_is_there():
    (tree,) = [content for language, content in blocks() if not language]
    folder, named = "", []
    for line in tree.splitlines():
        name = line.split()[0]
        named.append(folder + name if line.startswith("  ") else name)
        folder = folder if line.startswith("  ") else name
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_setting_of_the_table_is_one():
    from burnish.arguments.fields import known_fields

    assert len(first_column("settings")) > 4
    assert [name for name in first_column("settings") if name not in known_fields()] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("words", commands("make"), ids=" ".join)
def test_every_make_command_names_a_target_and_variables_of_the_makefile(words):
    variables = [word.partition("=")[0] for word in words[1:] if "=" in word]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [name for name in variables if f"$({name})" not in makefile] == []
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# The commands of burnish, in a folder that holds what the README lets the reader write.


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The checkout as a reader has it after `make model`: run.yaml and my_rows.json written, a model in models/."""
    for name in ("examples", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    ((_, recipe),) = blocks(language="yaml")
    ((_, rows),) = blocks(language="json")
    (tmp_path / "run.yaml").write_text(recipe, encoding="utf-8")
    (tmp_path / "my_rows.json").write_text(rows, encoding="utf-8")
    model = tmp_path / "models" / "SmolLM2-135M-Instruct"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_burnish_are_accepted_as_they_stand(desk):
    from burnish.arguments.parse import parse_command

    run = [words for words in commands("burnish") if "quickstart/identity.yaml" not in words]
    assert {words[1] for words in run} == {"train", "chat", "api", "export"}
    assert len(run) == 9
    for words in run:
        parse_command(words[1], words[2:])


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_commands_of_launchers_start_a_script_that_is_there_with_settings_that_are_accepted(desk, launcher):
    from burnish.arguments.parse import parse_command

    ((*_, script), given) = split_at_script(commands(launcher))
    assert (ROOT / script).is_file()
    parse_command("train", given)


def split_at_script(found: list[list[str]]) -> tuple[list[str], list[str]]:
    """The one command of a launcher: its own words with the script, and what the script is given."""
    (words,) = found
    (place,) = [number for number, word in enumerate(words) if word.endswith(".py")]
    return words[: place + 1], words[place + 1 :]


def test_the_yaml_is_a_whole_run_and_the_command_line_wins_over_it(desk):
    from burnish.arguments.parse import parse_command

    settings = parse_command("train", ["run.yaml", "learning_rate=1e-4"])
    assert settings.value("learning_rate") == 1e-4
    assert settings.value("num_train_epochs") == 3
    assert settings.data.dataset == ["pinyin_hanzi"]


def test_the_quickstarts_own_recipe_is_accepted(desk):
    import quickstart

    from burnish.arguments.parse import parse_command

    quickstart.FOLDER.mkdir()
    (quickstart.FOLDER / "data").mkdir()
    (quickstart.FOLDER / "data" / "dataset_info.json").write_text('{"identity": {"file_name": "identity.json"}}')
    (quickstart.FOLDER / "data" / "identity.json").write_text("[]")
    quickstart.write_recipe("models/SmolLM2-135M-Instruct")
    for command in ("train", "chat"):
        parse_command(command, [str(quickstart.CONFIG)])


def test_the_rows_of_the_readme_are_rows_that_burnish_reads(desk):
    from burnish.data.arguments import DataArguments
    from burnish.data.catalog import get_dataset_list
    from burnish.data.formats import align_dataset, detect_formatting
    from burnish.data.rows import read_rows

    (attr,) = get_dataset_list(DataArguments(dataset=["my_rows.json"]))
    rows = [row.value for row in read_rows("my_rows.json") if row.value]
    examples = [align_dataset(row, detect_formatting(row, attr)) for row in rows]
    assert [example.messages[0]["content"] for example in examples] == [
        "When do you open?",
        "Translate into Spanish:\nGood night",
    ]


def test_the_shipped_data_sets_hold_the_rows_that_their_readme_counts():
    table = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \| ([\d,]+) \|", text_of("data/README.md"), re.MULTILINE)
    listed = json.loads((ROOT / "data" / "dataset_info.json").read_text(encoding="utf-8"))
    assert {name: {"file_name": file} for name, file, _ in table} == {
        name: {"file_name": entry["file_name"]} for name, entry in listed.items()
    }
    for _, file, count in table:
        text = (ROOT / "data" / file).read_text(encoding="utf-8")
        rows = json.loads(text) if file.endswith(".json") else [json.loads(line) for line in text.splitlines()]
        assert len(rows) == int(count.replace(",", "")), file
