import base64
import csv
import getpass
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys

import matplotlib.pyplot as plt
import nbformat
import pytest
from made_runs import make_run
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from sdnb.errors import RunError
from sdnb.metrics.results import PAGE_MIME, RESULTS_MIME
from sdnb.report import redaction
from sdnb.report.page import export_of, write_and_print, write_page
from sdnb.report.redaction import Redaction
from sdnb.report.sanitizer import clean
from sdnb.run import files
from sdnb.run import folder as run_folder

ROWS = [
    dict(name="images/s per GPU", text="14.30 (14.20 to 14.40)", how="measured", value=14.3),
    dict(name="peak memory", text="20 GiB", how="allocator", value=20.0, unit="GiB"),
]


@pytest.fixture
def executed(tmp_path):
    figure, _ = plt.subplots()
    figure.savefig(tmp_path / "figure.png")
    plt.close(figure)
    png = base64.b64encode((tmp_path / "figure.png").read_bytes()).decode()
    cells = [
        new_markdown_cell("# A title\n\nProse with <b>mark-up</b>."),
        new_code_cell("secret_code = 1", outputs=[new_output("display_data", {"image/png": png})]),
        new_code_cell("table", outputs=[new_output("execute_result", {RESULTS_MIME: ROWS, "text/plain": "a table"})]),
        new_code_cell("print()", outputs=[new_output("stream", text="<script>alert(1)</script>")]),
    ]
    path = tmp_path / "train.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "3"}}), path)
    return path


def test_the_page_is_one_file_that_loads_nothing(executed):
    page, headline, _ = write_page(executed)
    html = page.read_text()
    assert page == executed.with_suffix(".html")
    assert [row["name"] for row in headline] == ["images/s per GPU", "peak memory"]
    assert (
        '<span class="number">14.30</span>' in html
        and "95 % interval 14.20 to 14.40" in html
        and "<dd>20 <small>GiB</small></dd>" in html
        and "A title" in html
    )
    assert 'src="data:image/png;base64,' in html
    assert not re.search(r"<link|@import|url\((?!#)|(src|href)=\"?(http|//)", html)
    assert html.count("<script") == 1 and "addEventListener" in html, "its own, that sorts tables"
    (policy,) = re.findall(r'content="(default-src[^"]*)"', html)
    script = re.search(r"<script>(.*?)</script>", html, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert "&lt;script&gt;alert(1)" in html, "what a run printed is text"


def test_code_is_folded_away(executed):
    html = write_page(executed)[0].read_text()
    folded = re.findall(r"<details class=\"code\">.*?</details>", html, re.S)
    assert any("secret_code" in block for block in folded)
    assert "secret_code" not in re.sub(r"<details.*?</details>", "", html, flags=re.S)


def test_a_section_about_nothing_is_left_out(tmp_path):
    shown = new_output("stream", text="shown")
    cells = [
        new_markdown_cell("# Look here", metadata={"tags": ["not-in-report"]}),
        new_markdown_cell("## Pictures"), new_code_cell("draw()"),
        new_markdown_cell("## Loss"), new_code_cell("loss()", outputs=[shown]),
        new_markdown_cell("## Settings", metadata={"tags": ["appendix"]}), new_code_cell("a = 1"),
        new_code_cell("b = 2"),
    ]  # fmt: skip
    path = tmp_path / "out.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    html = re.sub(r"<[^>]*span[^>]*>", "", write_page(path)[0].read_text())
    assert "Pictures" not in html and "Loss" in html and "Settings" in html
    assert "a = 1\n\nb = 2" in html
    assert "<title>Look here: out" in html
    html = write_page(path, besides={"title": "Mine", "reproduce": ["do it"]})[0].read_text()
    assert "<title>Mine" in html and '<pre class="command">do it' in html


def test_code_that_shows_nothing_is_with_the_next(tmp_path):
    shown = new_output("stream", text="shown")
    cells = [
        new_code_cell("first = 1"), new_code_cell("second = 2"), new_code_cell("third = 3", outputs=[shown]),
        new_code_cell("fourth = 4"), new_markdown_cell("## Next"), new_code_cell("fifth = 5", outputs=[shown]),
    ]  # fmt: skip
    path = tmp_path / "out.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    html = re.sub(r"<[^>]*span[^>]*>", "", write_page(path)[0].read_text())
    folded = re.findall(r"<details class=\"code\">.*?</details>", html, re.S)
    assert (
        len(folded) == 2
        and "first = 1\n\nsecond = 2\n\nthird = 3" in folded[0]
        and "fourth = 4\n\nfifth = 5" in folded[1]
    )


def test_from_the_command_line(executed, tmp_path):
    command = [sys.executable, "-m", "sdnb.report"]
    done = subprocess.run([*command, executed, tmp_path / "page.html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "14.30 (14.20 to 14.40)" in done.stdout and str(tmp_path / "page.html") in done.stdout
    missing = subprocess.run([*command, tmp_path / "none.ipynb"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert "none.ipynb: cannot be read" in missing.stderr and "Traceback" not in missing.stderr


def test_what_is_no_executed_notebook(tmp_path):
    file = tmp_path / "train.ipynb"
    file.write_text("{")
    with pytest.raises(RunError, match="is not a notebook"):
        write_page(file)
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), file)
    with pytest.raises(RunError, match="has no outputs"):
        write_page(file)


@pytest.mark.parametrize(
    "content", ["[]", '"x"', "{}", '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [1]}']
)
def test_json_that_is_no_notebook(tmp_path, content):
    (tmp_path / "train.ipynb").write_text(content)
    with pytest.raises(RunError, match=r"train\.ipynb"):
        write_page(tmp_path / "train.ipynb")


def test_the_notebook_is_not_written_over(executed):
    before = executed.read_bytes()
    with pytest.raises(RunError, match="this is the notebook"):
        write_page(executed, executed)
    assert executed.read_bytes() == before


def test_a_page_that_cannot_be_written(executed, tmp_path):
    with pytest.raises(RunError, match="cannot be written"):
        write_page(executed, tmp_path / "nowhere" / "page.html")


def test_a_token_does_not_reach_the_page(tmp_path):
    """Not from a cell that somebody wrote, nor from what it printed."""
    source = tmp_path / "with-token.ipynb"
    cell = nbformat.v4.new_code_cell("hub_token = 'secret-of-mine'\nother = \"hf_abcdefghijklmnop\"")
    cell.outputs = [nbformat.v4.new_output("stream", text="logged in with hf_abcdefghijklmnop\n")]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), source)
    page = write_page(source)[0].read_text()
    assert "secret-of-mine" not in page and "hf_abc" not in page
    assert "logged in with …" in page and "hub_token" in page


def page_of(tmp_path, *cells):
    path = tmp_path / "out.ipynb"
    nbformat.write(new_notebook(cells=list(cells)), path)
    return write_page(path)[0]


def printed(text):
    return new_code_cell("1", outputs=[new_output("stream", text=text)])


def test_no_home_folder_and_no_user_name_reaches_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "li")
    paths = "/home/li/data, /root/.cache/x, /Users/Ann/y, /scratch/li/z, /root, /rooted, /data/lively"
    html = page_of(tmp_path, printed(paths)).read_text()
    assert "~/data, ~/.cache/x, ~/y, /scratch/…/z, ~, /rooted, /data/lively" in html


def test_a_user_whose_home_is_the_root(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    importlib.reload(redaction)
    try:
        assert redaction.Redaction().text("<br/> //x /home/li/y /") == "<br/> //x ~/y /"
    finally:
        monkeypatch.undo()
        importlib.reload(redaction)


def test_images_are_left_as_they_are(tmp_path, monkeypatch):
    """Letters that stand for an image may spell a path by chance."""
    monkeypatch.setattr(getpass, "getuser", lambda: "li")
    image = new_code_cell("1", outputs=[new_output("display_data", {"image/png": "AAA/li/BBB/root/CC=="})])
    assert "AAA/li/BBB/root/CC==" in page_of(tmp_path, image).read_text()


# A secret, and what is left of it. Those of known services are in two parts, so that no scanner takes them for real.
SECRETS = {
    'os.environ["WANDB_API_KEY"] = "tell-no-one"': 'os.environ["WANDB_API_KEY"] = "…"',
    "%env WANDB_API_KEY=tell-no-one": "%env WANDB_API_KEY=…",
    "env: MY_SECRET=tellnoone": "env: MY_SECRET=…",
    "!export HF_TOKEN=tell-no-one": "!export HF_TOKEN=…",
    "KEY=tell-no-one": "KEY=…",
    "passwd=tell1": "passwd=…",
    "password: tell-no-one": "password: …",
    "aws_secret_access_key = " + "wJalrXUtnFEMI/K7MDENG/bPxRfiCY": "aws_secret_access_key = …",
    '{"password": "tell no one!"}': '{"password": "…"}',
    "token=&quot;tell-no-one&quot;": "token=&quot;…&quot;",
    '{\\"api_key\\": \\"tell-no-one\\"}': '{\\"api_key\\": \\"…\\"}',
    'os.environ.setdefault("HF_TOKEN", "tell-no-one")': 'os.environ.setdefault("HF_TOKEN", "…")',
    'wandb.login(key="0123456789abcdef0123456789abcdef01234567")': 'wandb.login(key="…")',
    "api_key: 'tell-no-one'": "api_key: '…'",
    "--hub_token=abc --steps=3": "--hub_token=… --steps=3",
    "--hub_token abc --steps 3": "--hub_token … --steps 3",
    "https://me:tell@host/x": "https://…@host/x",
    "postgresql://me:tell@host:5432/x": "postgresql://…@host:5432/x",
    "curl -u me:tell-no-one https://host": "curl -u me:… https://host",
    'curl -H "X-Api-Key: tell-no-one"': 'curl -H "X-Api-Key: …"',
    "Authorization: Bearer tell-no-one": "Authorization: Bearer …",
    '{"Authorization": f"Basic dGVsbDpubyBvbmU="}': '{"Authorization": f"Basic …"}',
    "Bearer 0123456789abcdef": "Bearer …",
    "http://127.0.0.1:8888/lab?token=0123456789abcdef": "http://127.0.0.1:8888/lab?token=…",
    "hf_" + "abcdefghijklmnop": "…",
    "ghp_" + "abcdefgh1234": "…",
    "github_pat_" + "11ABCDEFG0123456789_abcdefghijklmnop": "…",
    "sk-" + "abcdefgh1234": "…",
    "sk-proj-" + "abcd_efgh-0123456789": "…",
    "sk-ant-" + "api03-abcd_efgh-0123456789": "…",
    "AIza" + "SyA-abcdefghijklmnopqrstuvwxyz12345": "…",
    "AKIA" + "IOSFODNN7EXAMPLE": "…",
    "xoxb-" + "123456789012-1234567890123-abcdefghijklmnopqrstuvwx": "…",
    "https://hooks.slack.com/services/" + "T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX": "…",
    "glpat-" + "abcdefghij0123456789": "…",
    "npm_" + "abcdefghijklmnopqrstuvwxyz0123456789": "…",
    "sk_live_" + "abcdefghijklmnopqrstuvwx": "…",
    "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N": "…",
    'token: str = "tell-no-one"': 'token: str = "…"',
    'os.getenv("HF_TOKEN") or "tell-no-one"': 'os.getenv("HF_TOKEN") or "…"',
    "['--hub_token', 'tell-no-one']": "['--hub_token', '…']",
    "%set_env HF_TOKEN tell-no-one": "%set_env HF_TOKEN …",
    "!wandb login 0123456789abcdef0123456789abcdef01234567": "!wandb login …",
    "docker run -e HF_TOKEN=tell-no-one image": "docker run -e HF_TOKEN=… image",
    "COMET_API_KEY=12345678-1234-4abc-8def-0123456789ab": "COMET_API_KEY=…",
    "DB_PASSWORD=a&b(c,d": "DB_PASSWORD=…",
    "token=&#34;tell-no-one&#34;": "token=&#34;…&#34;",
    "| password | tell-no-one |": "| password | … |",
    "<th>HF_TOKEN</th><td>tell-no-one</td>": "<th>HF_TOKEN</th><td>…</td>",
    "https://host/x?access_token=tellnoone": "https://host/x?access_token=…",
    '\x1b[1mHF_TOKEN\x1b[0m = \x1b[33m"tell-no-one"\x1b[0m': 'HF_TOKEN = "…"',
    "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIB\n-----END RSA PRIVATE KEY-----": "…",
}
NO_SECRETS = [
    "git checkout 5e1f0a3b5e1f0a3b5e1f0a3b5e1f0a3b5e1f0a3b",
    "{'max_token': 77, 'tokens': 'a b c', 'eos_token': '<|endoftext|>'}",
    "def f(token: str, password: str = None, hub_token=None): sorted(x, key='name'); g(token=t.eos_token, key=h)",
    "basic knowledge; a bearer of news; sk-learn-model; ssh://git@github.com/x user@host https://host/a@b",
    "images/s per GPU 14.30 (14.20 to 14.40), monkey=banana, token_count = 77, hotkey: 5",
    "from huggingface_hub import hf_hub_download; hf_transfer; HF_TOKEN=userdata.get('HF_TOKEN')",
    "tokenizer.pad_token = '[PAD]'; placeholder_token = 'cat-toy'; time_per_token: 12ms; image_token: 256x256",
    "df.to_hdf('x.h5', key='training_results_table'); IMAGE_KEY = 'image'; PWD=/srv/main; MONKEY=banana",
    "docker://nvidia@sha256:abc; http://host:80/path@v1; docker run -u 1000:1000; password: Any",
    "</root> ${SCRATCH}/root/x paths[0]/root/x /Users/Shared/x",
    "\x1b[32mgreen\x1b[0m",
    "",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_left_out(secret):
    left = SECRETS[secret]
    for text, expected in ((secret, left), (f"before\n{secret}\nafter", f"before\n{left}\nafter")):
        leaving = Redaction()
        assert leaving.text(text) == expected
        assert leaving.text(expected) == expected
        assert leaving.secrets == 1, "nothing is counted twice"


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_only_looks_like_a_secret_stays(text):
    leaving = Redaction()
    assert leaving.text(text) == text
    assert str(leaving) == "nothing"


def test_what_was_left_out_is_counted_at_the_end(tmp_path):
    cell = printed("/root/x of hf_abcdefghijklmnop\n/root/y")
    cell.source = 'HF_TOKEN = "tell-no-one"'
    assert "Left out: 2 × secret and 2 × home folder or user name." in page_of(tmp_path, cell).read_text()
    assert "Left out: nothing." in page_of(tmp_path, printed("/scratch/root/x")).read_text()


@pytest.mark.timeout(60)
def test_long_lines_are_read_in_a_moment():
    """A pattern that tries all ways to divide a line would take hours."""
    for piece in (
        "-",
        "x-",
        "token ",
        "TOKEN= ",
        "password: ",
        "&quot;",
        "eyJaaaaa-",
        'key="',
        " ",
        "a.",
        "\n",
        "/root/",
    ):
        Redaction().text(f"token{piece * (20_000 // len(piece))}x")


def test_texts_in_figures_settings_and_the_title(tmp_path, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "li")
    (folder := tmp_path / "li").mkdir()
    svg = "<svg><text>/home/li/x hf_abcdefghijklmnop</text></svg>"
    about = {"settings": {"hub_token": "tellnoone"}}
    cell = new_code_cell("1", outputs=[
        new_output("display_data", {"image/svg+xml": svg, PAGE_MIME: about}),
        new_output("display_data", {"image/jpeg": "AA=="}, metadata={"image/jpeg": {
            "alt": "hf_abcdefghijklmnop", "width": "1 onerror=alert(1)", "filenames": {"image/jpeg": "https://host/x"}}}),
    ])  # fmt: skip
    html = page_of(folder, cell).read_text()
    assert "~/x …</text>" in html and "<title>…/out.ipynb" in html
    assert not re.search("hf_abc|tellnoone|onerror|https://host", html)


def test_mark_up_that_shows_something_is_kept():
    for html in (
        '<table class="results"><thead><tr><th style="text-align:left">a</th></tr></thead></table>',
        '<a href="https://host/x" rel="noopener noreferrer">a</a><img src="data:image/png;base64,AA==" alt="a">',
        '<details open=""><summary>a</summary><pre>1 &lt; 2</pre></details>',
        '<svg viewBox="0 0 1 1"><defs><clipPath id="p"><rect width="1"></rect></clipPath></defs><g clip-path="url(#p)">'
        '<use xlink:href="#p" style="fill:var(--ink, #1c2430);stroke-width:2;stroke-opacity:0.3"></use></g></svg>',
    ):
        assert clean(html) == html


@pytest.mark.parametrize("what", ["failed", "not completed"])
def test_a_notebook_that_failed_says_so_first(tmp_path, what):
    error = new_code_cell("1 / 0", outputs=[new_output("error", ename="E", evalue="v", traceback=["E: v"])])
    waiting = new_code_cell("2", metadata={"papermill": {"status": "pending"}})
    page = page_of(tmp_path, new_markdown_cell("# A run"), printed("x"), error if what == "failed" else waiting)
    assert f"<title>{what}: A run: out – sdnb</title>" in page.read_text()
    done = subprocess.run(
        [sys.executable, "-m", "sdnb", "report", str(tmp_path / "out.ipynb")], capture_output=True, text=True
    )
    assert done.returncode == 1 and f"out.ipynb: {what}, as the page's title says" in done.stderr
    assert "report: " in done.stdout


def test_an_error_that_a_notebook_expects_is_none(tmp_path):
    cell = new_code_cell("1 / 0", outputs=[new_output("error", ename="E", evalue="v", traceback=["E: v"])])
    cell.metadata.tags = ["raises-exception"]
    assert "failed" not in page_of(tmp_path, cell).read_text().partition("</title>")[0]


def test_widgets_as_colab_saves_them(tmp_path):
    state = {"application/vnd.jupyter.widget-state+json": {"abc": {"model_name": "HBoxModel"}}}
    notebook = new_notebook(cells=[printed("x")], metadata={"widgets": state})
    nbformat.write(notebook, tmp_path / "out.ipynb")
    assert "HBoxModel" not in write_page(tmp_path / "out.ipynb")[0].read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": None}, {"outputs": [{}]}, {"metadata": {"tags": 5}}, {"metadata": {"papermill": "x"}},
        {"cell_type": None}, {"source": None}, {"outputs": [{"output_type": "display_data", "data": {PAGE_MIME: [1]}}]},
        {"outputs": [{"output_type": "display_data", "data": {RESULTS_MIME: [{"name": "target"}]}}]},
    ],
)  # fmt: skip
def test_a_broken_cell_is_one_line(tmp_path, change):
    notebook = new_notebook(cells=[printed("x")])
    broken = {**notebook.cells[0], **change}
    (tmp_path / "out.ipynb").write_text(json.dumps({**notebook, "cells": [notebook.cells[0], broken]}))
    try:
        write_page(tmp_path / "out.ipynb")
    except RunError as error:
        assert str(error).startswith(f"{tmp_path / 'out.ipynb'}: ") and "\n" not in str(error)


def test_what_can_be_read_all_the_same(tmp_path):
    notebook = json.dumps(new_notebook(cells=[printed("x")])).replace('"x"', '"x \\ud800"')
    (tmp_path / "out.ipynb").write_bytes(b"\xef\xbb\xbf" + notebook.encode())
    assert "x ?" in write_page(tmp_path / "out.ipynb")[0].read_text()
    os.mkfifo(tmp_path / "fifo.ipynb")
    with pytest.raises(RunError, match="fifo.ipynb: is not a file"):
        write_page(tmp_path / "fifo.ipynb")


def test_an_output_that_is_not_what_its_type_says(tmp_path):
    cell = new_code_cell("1", outputs=[new_output("display_data", {"text/html": "a table"})])
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "out.ipynb")
    (tmp_path / "out.ipynb").write_text((tmp_path / "out.ipynb").read_text().replace('"a table"', "{}"))
    with pytest.raises(RunError, match="out.ipynb: cannot be shown: "):
        write_page(tmp_path / "out.ipynb")


def test_sections_go_where_their_tags_say(tmp_path):
    tagged = {"appendix": ["appendix"], "hidden": ["not-in-report"]}
    cells = [new_markdown_cell(f"## {name}\n\nprose", metadata={"tags": tagged.get(name, [])})
             for name in ("appendix", "hidden", "one", "two")]  # fmt: skip
    html = page_of(tmp_path, *cells, printed("x")).read_text()
    assert re.findall(r"<h2[^>]*>(\w+)", html) == ["one", "two", "appendix"]


def test_a_page_is_named_after_its_run(tmp_path):
    about = {"kind": "run", "name": "2026 <b>/../x", "title": "a <i>title</i>", "settings": {"a": None}}
    shown = new_code_cell("run", outputs=[new_output("execute_result", {PAGE_MIME: about, "text/plain": "run"})])
    page = page_of(tmp_path, shown)
    assert page == tmp_path / "2026-b-..-x.html"
    assert "<title>a &lt;i&gt;title&lt;/i&gt; – sdnb</title>" in page.read_text()


def test_the_page_of_any_run_folder(tmp_path):
    """The same sections as of its notebook, without those about the start."""
    folder = make_run(tmp_path / "mine")
    files.write(folder / run_folder.SUMMARY, dict(ranks=[dict(peak_memory_gib=1.5)], ended=100.0, total_seconds=90.0))
    page, headline, problem = write_page(folder)
    assert (page, problem) == (folder / "mine.html", "")
    html = page.read_text()
    assert headline[0]["name"] == "images/s per CPU rank" and headline[0]["text"] in html
    sections = re.findall(r"<h2[^>]*>(.*?)<", html)
    assert (
        sections[:5] == ["What was run", "Loss", "Time", "Images", "Results"] and "What will run where" not in sections
    )
    assert html.count("<svg") >= 3 and "sdnb train" in html


@pytest.mark.parametrize("steps", [True, False])
def test_the_page_of_a_run_that_failed(tmp_path, steps):
    folder = make_run(tmp_path / "mine")
    if not steps:
        (folder / run_folder.STEPS).unlink()
    run_folder.fail(folder, 1, "RuntimeError", "Traceback: it broke")
    (folder / run_folder.LOG).write_text("12:00:00 rank 1 INFO the last line\n")
    page, headline, problem = write_page(folder)
    assert problem == "failed" and bool(headline) == steps
    html = page.read_text()
    assert re.search("<h1>failed: tiny on openmoji", html)
    assert "rank 1 failed: RuntimeError\nTraceback: it broke" in html and "INFO the last line" in html
    assert ("Loss" in re.findall(r"<h2[^>]*>(.*?)<", html)) == steps


def test_the_page_of_a_run_that_is_not_complete(tmp_path, capsys):
    folder = make_run(tmp_path / "mine")
    with run_folder.lock(folder):
        assert write_page(folder)[2] == "running"
    with pytest.raises(SystemExit, match="mine: interrupted, as the page's title says"):
        write_and_print(str(folder))
    assert "images/s per CPU rank" in capsys.readouterr().out


def test_results_for_other_programs_and_to_paste(tmp_path):
    folder = make_run(tmp_path / "mine", target_loss=0.1)
    told = json.loads(export_of(folder, "json"))
    first = told["results"][0]
    assert first["name"] == "images/s per CPU rank" and first["unit"] == "images/s" and first["n"] == 36
    assert first["low"] < first["value"] < first["high"] and "steps 5 to 40" in first["how"]
    assert told["state"] == "interrupted" and told["machine"]["devices"] == "1 × a CPU"
    rows = list(csv.DictReader(export_of(folder, "csv").splitlines()))
    assert float(rows[0]["value"]) == first["value"] and rows[0]["how"] == first["how"]
    assert [row["name"] for row in rows] == [row["name"] for row in told["results"]]
    lines = export_of(folder, "markdown").splitlines()
    assert lines[0].startswith("### tiny on openmoji") and f"**images/s per CPU rank: {first['text']}**" in lines
    assert "| devices | 1 × a CPU |" in lines


def test_no_secret_is_pasted(tmp_path):
    folder = make_run(tmp_path / "mine")
    files.write(folder / run_folder.ENVIRONMENT, {"python": "3.11 hf_abcdefghijklmnopqrstuvwxyzabcdefgh"})
    assert "hf_abc" not in export_of(folder, "json") + export_of(folder, "markdown")
