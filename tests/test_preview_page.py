"""The page of `burnish preview --html`: parsed as HTML here, and loaded in a real browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import partial
from html.parser import HTMLParser

import pytest
from transformers import AutoTokenizer

from burnish.chat.template import load_template
from burnish.data.arguments import DataArguments
from burnish.data.preview import About, make_preview, with_rows_worth_a_look
from burnish.data.preview_data import look
from burnish.data.preview_page import make_page
from burnish.data.sources import get_dataset

HOSTILE = '</script><script>document.title="owned"</script><!-- <b>&amp;\u2028 "{{title}}" \\u003c'


class Page(HTMLParser):
    """Every tag with its attributes, and what stands in scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[dict[str, str | None], str]] = []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._open = False

    def handle_data(self, data):
        if self._open:
            self.inside.append((self.tags[-1][1], data))

    @property
    def data(self):
        (text,) = [text for attributes, text in self.inside if attributes.get("id") == "data"]
        return json.loads(text)


@pytest.fixture(scope="module")
def page(tmp_path_factory, fixture_path):
    """A page of rows of every kind: cut, bad, equal, shared with evaluation, and one that would like to be HTML."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer = AutoTokenizer.from_pretrained(fixture_path("smollm2"))
    rows = [{"instruction": f"问题 {n}", "output": f"答案 {n} 𠮷"} for n in range(40)]
    rows += [rows[3], {"instruction": "long", "output": "word " * 900}, {"instruction": HOSTILE, "output": HOSTILE}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows] + ["{broken <b>"]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "more.jsonl").write_text("\n".join(lines[:2]), encoding="utf-8")
    args = DataArguments(dataset=["rows.jsonl"], eval_dataset=["more.jsonl"], dataset_dir=str(folder), cutoff_len=512)
    get = partial(get_dataset, stage="sft", tokenizer=tokenizer, template=load_template(tokenizer, None), seed=42)
    looked = look(get, args, rows=0)
    about = About("sft", ("rows <i>",), "model", "of the tokenizer", 512, False)
    preview = with_rows_worth_a_look(make_preview(looked, tokenizer, about), looked, tokenizer, 100, 42)
    return preview, make_page(preview), tokenizer


def test_the_data_of_the_page_is_json_that_no_row_can_end(page):
    preview, text, tokenizer = page
    parsed = Page(text)
    data = parsed.data
    assert [tag for tag, _ in parsed.tags].count("script") == 2 and "b" not in [tag for tag, _ in parsed.tags]
    assert len(data["shown"]) == len(preview.shown) and data["refused"] == list(preview.refused)
    (hostile,) = [row for row in data["shown"] if row["part"] == "train" and row["place"].endswith(":43")]
    texts = "".join(piece or "" for run in hostile["runs"] for piece in run["t"])
    assert texts.count(HOSTILE) == 2
    for row in data["shown"]:
        ids = [token for run in row["runs"] for token in run["i"]]
        assert "".join(piece or "" for run in row["runs"] for piece in run["t"]) == tokenizer.decode(ids)
        assert all(len(run["t"]) == len(run["i"]) for run in row["runs"])


def test_the_page_loads_nothing_from_elsewhere(page):
    _, text, _ = page
    parsed = Page(text)
    policy = [a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0].startswith("default-src 'none'")
    links = [value for _, a in parsed.tags for name, value in a.items() if name in ("src", "href")]
    assert links == ["data:,"]
    own = "".join(inside for attributes, inside in parsed.inside if attributes.get("id") != "data")
    assert not re.search(r"https?://|@import|url\(|fetch\(|innerHTML", own)


def test_figures_of_the_page_are_those_of_the_preview(page):
    preview, text, _ = page
    data = Page(text).data
    assert [part["samples"] for part in data["parts"]] == [43, 2]
    assert data["parts"][1]["shared"]["count"] == 2 and data["parts"][0]["repeated"]["count"] == 1
    assert {reason["tag"] for reason in data["reasons"]} == {
        "bad: is not valid JSON: a key stands without double quotes",
        "cut: end of the answer",
    }
    assert data["reasons"][0]["excerpt"] == "{broken <b>"
    assert data["parts"][0]["cutoff"] == preview.parts[0].cutoff > 512


# ---- a real browser ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browse(page, tmp_path_factory):
    """What the browser makes of the page, in one string, after a script of the test's own has run in it."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium here: apt-get install chromium")

    def shown_after(script=""):
        folder = tmp_path_factory.mktemp("browser")
        text = page[1].replace("</body>", f"<script>{script}</script></body>")
        (folder / "page.html").write_text(text, encoding="utf-8")
        how = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile", "--dump-dom"]
        words = [browser, *how, f"file://{folder}/page.html"]
        run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
        assert run.returncode == 0, run.stderr[-2000:]
        opening = run.stdout[: run.stdout.index("<head>")]
        assert 'data-ready="yes"' in opening and "data-error" not in opening, opening
        return run.stdout

    return shown_after


@pytest.fixture(scope="module")
def dom(browse):
    return browse()


def test_the_page_runs_without_an_error_and_shows_tokens_figures_and_reasons(dom):
    assert dom.count('<article class="sheet row">') == 10  # a screen of rows
    assert len(re.findall(r'<span class="t y[ b m]*" data-id="\d+"', dom)) >= 10
    assert "Training would refuse this data" in dom and "is not valid JSON" in dom and "in train and evaluation" in dom
    assert (
        "<title>rows &lt;i&gt; · burnish preview</title>" in dom
        and 'title="owned"</script>' not in dom.split("<script")[0]
    )


def test_an_error_of_the_page_would_be_seen(browse):
    with pytest.raises(AssertionError, match="data-error"):
        browse("nothing.here()")


def test_rows_are_chosen_unfolded_and_turned_over_by_clicks(browse):
    """A reason leads to its row; its folded tokens come when asked for; words are found; the next screen is another."""
    dom = browse(
        """
        const click = what => document.querySelector(what).click(), told = [];
        const tokens = () => document.querySelectorAll("#rows .t").length;
        click("td button.link"); told.push(document.querySelectorAll("#rows article").length, tokens());
        click("#rows button.fold"); told.push(tokens());
        click('#filters button[data-tag=""]'); click("#next"); told.push(document.querySelector("#where").textContent);
        at("find").value = "owned"; at("find").dispatchEvent(new Event("input"));
        told.push(document.querySelectorAll("#rows article").length);
        click("#ids"); told.push(at("rows").className); click("#theme"); told.push(root.dataset.theme);
        document.body.dataset.told = JSON.stringify(told);
        """
    )
    (told,) = re.findall(r'data-told="([^"]*)"', dom)
    one, folded, whole, where, found, ids, theme = json.loads(told.replace("&quot;", '"'))
    assert (one, whole, found, ids) == (1, 512, 1, "ids") and folded < 300
    assert where.startswith("11–20 of ") and theme in ("light", "dark")


def test_pages_are_turned_and_words_looked_for_from_the_keyboard(browse):
    dom = browse(
        """
        const press = (key, on = document.body) => on.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        const told = [], where = () => told.push(at("where").textContent);
        press("ArrowRight"); where(); press("ArrowLeft"); where(); press("ArrowLeft"); where();
        press("/"); told.push(document.activeElement.id); press("ArrowRight", at("find")); where();
        document.body.dataset.told = JSON.stringify(told);
        """
    )
    (told,) = re.findall(r'data-told="([^"]*)"', dom)
    after, back, still, focus, typing = json.loads(told.replace("&quot;", '"'))
    assert after.startswith("11–20 of ") and back == still == typing and back.startswith("1–10 of ")
    assert focus == "find"
