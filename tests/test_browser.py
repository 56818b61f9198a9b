"""In a real browser: the pages with the network cut off, and JupyterLab as a user works in it. Without a browser they
are skipped. SDNB_SCREENSHOTS=folder keeps what they saw."""

import contextlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import nbformat
import pytest
from executed import papermill
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from processes import ROOT, end_with_parent, free_port, none_left, wait_for
from training import small_data, small_model

import sdnb
from sdnb.report.in_process import executed
from sdnb.report.page import write_page
from sdnb.run import folder as run_folder

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

HOSTILE = "<script>document.title = 'taken over'</script> <img src=x onerror=alert(1)> & \"red\" heart"
DESKTOP, PHONE = dict(width=1280, height=900), dict(width=390, height=844)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        names = ("chromium", "chromium-browser", "google-chrome")
        own = Path(driver.chromium.executable_path)
        found = next(filter(None, map(shutil.which, names)), own if own.exists() else None)
        if found is None:
            pytest.skip("no browser here: `apt-get install chromium`, or `playwright install chromium`")
        launched = driver.chromium.launch(executable_path=str(found), args=["--no-sandbox"])
        yield launched
        launched.close()


def screenshot(page, name):
    folder = os.environ.get("SDNB_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


@contextlib.contextmanager
def opened(browser, path, size=DESKTOP, scheme="light"):
    """A page opened from its file without any network; at the end it must have asked for nothing, and have had no
    error."""
    context = browser.new_context(offline=True, viewport=size, color_scheme=scheme)
    page = context.new_page()
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.resolve().as_uri())
    yield page
    context.close()
    assert [url for url in asked if not url.startswith("data:")] == [path.resolve().as_uri()]
    assert said == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on images whose captions are mark-up, its notebook and its page, and a comparison with the published."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pages")
    images = folder / "images"
    images.mkdir()
    lines = []
    for index in range(12):
        Image.new("RGB", (64, 64), (index * 20, 90, 128)).save(images / f"{index:02}.png")
        lines.append(json.dumps({"file_name": f"{index:02}.png", "text": f"{HOSTILE} {index}"}))
    (images / "metadata.jsonl").write_text("\n".join(lines))
    settings = dict(
        pretrained_model_name_or_path=small_model(), train_data_dir=str(images), train_batch_size=2,
        gradient_accumulation_steps=2, steps=12, resolution=64,
        validation_prompts=[HOSTILE, "sun"], output_dir=str(folder / "a-run"), validation_loss_steps=0,
    )  # fmt: skip
    done = papermill(folder / "out.ipynb", "-y", json.dumps(settings))
    assert done.returncode == 0, done.stderr[-3000:]
    listed = json.dumps(["published", str(folder / "a-run")])
    done = papermill(folder / "compared.ipynb", "-p", "runs", listed, notebook="notebooks/compare.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def pages(folder):
    return {name: write_page(folder / f"{name}.ipynb")[0] for name in ("out", "compared")}


def test_the_pages_say_what_they_are_of(pages, browser):
    assert pages["out"].name == "a-run.html", "named after the run"
    assert pages["compared"].name == "sd-v1-4-8-gpus-2024-beside-a-run.html"
    with opened(browser, pages["out"]) as page:
        assert page.title().startswith(f"{Path(small_model()).name} on images, 64×64, 12 steps, ")
        text = page.inner_text("body")
        assert "<script>document.title" in text, "what captions say is text"
        for heading in ("Loss", "Time", "Results", "Settings", "Machine and versions", "How to reproduce", "Method"):
            assert page.get_by_role("heading", name=heading, exact=True).count() == 1
        assert re.match(r"\d+\.\d\d\s+images/s per CPU rank\s+95 % interval \d", page.locator(".lead").inner_text())
        parts = page.locator("figure.time li").all_inner_texts()
        assert len(parts) >= 4 and parts[0].startswith("start ") and any(part.startswith("train ") for part in parts)
        for link in page.locator("nav a").all():
            assert page.locator(link.get_attribute("href")).count() == 1, "each entry of the contents is on the page"
        assert "████" not in text, "no progress bar of a run that is over"
        command = page.locator("pre.command").inner_text()
        assert "sdnb train" in command and "--max_train_steps=12" in command
    with opened(browser, pages["compared"]) as page:
        assert page.title().startswith("sd-v1-4-8-gpus-2024 beside a-run")
        assert "It is unknown whether" in page.inner_text("body")


def test_images_have_words_and_code_is_a_click_away(pages, browser):
    with opened(browser, pages["out"]) as page:
        charts = page.locator("figure.chart [role=img]:visible")
        said = charts.evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
        assert len(said) == 5 and all(len(one) > 40 for one in said)
        assert any(one.startswith("Loss of each optimizer step. The running mean ends at") for one in said)
        assert page.locator("img:not([alt])").count() == 0
        code = page.locator("details.code").first
        assert not code.locator("pre").is_visible()
        code.locator("summary").click()
        assert code.locator("pre").is_visible()


def test_tables_sort(pages, browser):
    with opened(browser, pages["out"]) as page:
        page.locator("details.all summary").click()
        table = page.locator("details[open] table")
        first = table.locator("tbody tr th").first
        button = table.get_by_role("button", name="Setting")
        button.click()
        assert first.inner_text() == "adam_beta1"
        assert table.locator("thead th").first.get_attribute("aria-sort") == "ascending"
        button.click()
        assert first.inner_text() == "without_xformers"
        table.get_by_role("button", name="Value").click()
        numbers = [text for text in table.locator("tbody td").all_inner_texts() if re.fullmatch(r"-?[\d.e-]+", text)]
        assert [float(number) for number in numbers] == sorted(map(float, numbers)), "numbers by their size"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", ["out", "compared"])
def test_it_can_be_read(pages, browser, name, size, scheme):
    with opened(browser, pages[name], size, scheme) as page:
        screenshot(page, f"{name}-{'phone' if size is PHONE else 'desktop'}-{scheme}")
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "nothing sticks out"
        whole = "tables => tables.every(one => one.scrollWidth <= one.clientWidth)"
        drawn_for = "narrow" if size is PHONE else "wide"
        assert (
            page.locator("figure.chart svg:visible").count()
            == page.locator(f"figure.chart .{drawn_for} svg").count()
            > 0
        )
        right_edges = "all => all.map(one => one.getBoundingClientRect().right)"
        assert max(page.eval_on_selector_all("figure.chart svg", right_edges)) <= size["width"]
        assert name == "compared" or page.eval_on_selector_all("table.results", whole), "no scrolling"
        ground, ink, drawn = page.evaluate(
            """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
            getComputedStyle([...document.querySelectorAll("figure.chart svg *")]
                .find(one => (one.getAttribute("style") || "").includes("--ink"))).fill]"""
        )
        light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ground, ink))
        assert (light - dark) * (1 if scheme == "light" else -1) > 400, "ink stands out from the page"
        assert drawn == ink, "in the figures, too"


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_of_an_audit_can_be_read(tmp_path, browser, size):
    audited = sdnb.audit("published", ["17.88 images/s per GPU"], gpus=8)
    page_path, *_ = write_page(tmp_path, notebook=executed("audit", {"audited": audited}))
    with opened(browser, page_path, size) as page:
        screenshot(page, f"audit-{'phone' if size is PHONE else 'desktop'}")
        assert page.title().startswith("Audit of sd-v1-4-8-gpus-2024: 17.88 images/s per GPU")
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "nothing sticks out"
        assert "✗ does not hold" in page.locator("table.audit").inner_text()
        assert page.eval_on_selector_all("table.audit", "all => all.every(one => one.scrollWidth <= one.clientWidth)")
        for link in page.locator("nav a").all():
            assert page.locator(link.get_attribute("href")).count() == 1


def test_it_prints(pages, browser):
    with opened(browser, pages["out"]) as page:
        pdf = page.pdf(format="A4")
        count = len(re.findall(rb"/Type\s*/Page\b", pdf))
        assert 2 <= count <= 9
        if os.environ.get("SDNB_SCREENSHOTS"):
            (Path(os.environ["SDNB_SCREENSHOTS"]) / "out.pdf").write_bytes(pdf)


# What a notebook's outputs and texts might do to a reader; SPY is an address that nobody may ask for.
VECTORS = """\
<meta http-equiv="refresh" content="0;url=SPY">
<META HTTP-EQUIV=refresh CONTENT="0.1; URL='SPY'">
<svg><foreignObject><meta http-equiv="refresh" content="0;url=SPY"></foreignObject></svg>
<script>document.title = 'taken over'; fetch('SPY')</script>
<script src="SPY"></script>
<img src="SPY">
<img src=x onerror="document.title = 'taken over'">
<img srcset="SPY 1x, SPY 2x">
<picture><source srcset="SPY"><img></picture>
<link rel="stylesheet" href="SPY">
<link rel="prefetch" href="SPY"><link rel="dns-prefetch" href="SPY"><link rel="preconnect" href="SPY">
<style>@import url(SPY);</style>
<style>body { background: url(SPY); } main { display: none; }</style>
<div style="background-image: url(SPY)">a</div>
<div style="background: u\\72l(SPY)">a</div>
<div style="list-style: url('SPY') inside">a</div>
<div style="position: fixed; inset: 0; background: red; z-index: 9">forged</div>
<iframe src="SPY"></iframe>
<iframe srcdoc="<script>parent.document.title = 'taken over'</script>"></iframe>
<iframe src="javascript:parent.document.title='taken over'"></iframe>
<object data="SPY"></object>
<embed src="SPY">
<video src="SPY" autoplay></video>
<audio src="SPY" autoplay></audio>
<video poster="SPY"></video>
<track src="SPY"><source src="SPY">
<form action="SPY"><input name="a" autofocus onfocus="document.title = 'taken over'"></form>
<input type="image" src="SPY">
<body onload="document.title = 'taken over'" background="SPY">
<base href="SPY/">
<table background="SPY"><tr><td background="SPY">a</td></tr></table>
<svg onload="document.title = 'taken over'"></svg>
<svg><script>document.title = 'taken over'</script></svg>
<svg><image href="SPY" width="9" height="9"></image></svg>
<svg><use href="SPY#a"></use></svg>
<svg><a><animate attributeName="href" values="javascript:alert(1)"></animate></a></svg>
<svg><rect fill="url(SPY#a)" width="9" height="9"></rect></svg>
<svg><style>@import 'SPY';</style></svg>
<math><mtext><img src="SPY"></mtext></math>
<a href="javascript:document.title='taken over'" id="click">click</a>
<details open ontoggle="document.title = 'taken over'"><summary>a</summary></details>
<marquee onstart="document.title = 'taken over'">a</marquee>
<template><img src="SPY"></template><noscript><img src="SPY"></noscript>
<!--[if true]><img src="SPY"><![endif]--><!-- --!><img src="SPY">
<p title="</title><script>document.title = 'taken over'</script>">a</p>
<svg style="overflow:visible"><a href="SPY"><rect x="-5000" y="-5000" width="20000" height="20000"/></a></svg>
<a href="SPY"><div style="margin-top:-900px;height:1800px;background:#fff;opacity:0.999">forged</div></a>
<a ping="SPY" href="#x">a</a><blockquote cite="SPY">a</blockquote>
""".splitlines()


HARMLESS = """[...document.querySelectorAll('main *')].every(one =>
    getComputedStyle(one).position != 'fixed' && ![...one.attributes].some(named => named.name.startsWith('on')))"""


def test_nothing_that_a_notebook_holds_runs_or_loads(browser, tmp_path):
    """Without the page's policy, too: what is shown has nothing in it that a policy must stop."""
    asked = []

    class Spy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Spy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            spy = f"http://127.0.0.1:{server.server_port}"
            vectors = [vector.replace("SPY", f"{spy}/{number}") for number, vector in enumerate(VECTORS)]
            page = write_page(hostile_notebook(tmp_path / "out.ipynb", vectors))[0]
            html = page.read_text()
            open_page = page.with_name("open.html")
            open_page.write_text(re.sub("<meta [^>]*Content-Security-Policy[^>]*>", "", html))
            assert len(open_page.read_text()) < len(html)
            for path in (page, open_page):
                tab = browser.new_page()
                tab.on("request", lambda request: asked.append(request.url) if request.url.startswith(spy) else None)
                tab.goto(path.resolve().as_uri(), wait_until="load")
                for link in tab.locator("#click").all():
                    link.click()
                tab.wait_for_timeout(1500)
                assert tab.url.partition("#")[0] == path.resolve().as_uri()
                assert "taken over" not in tab.title()
                assert tab.locator("main").is_visible()
                assert tab.evaluate(HARMLESS)
                tab.evaluate("scrollTo(0, 0)")
                box = tab.locator("h1").bounding_box()
                above = "([x, y]) => document.elementFromPoint(x, y).tagName"
                assert tab.evaluate(above, [box["x"] + 9, box["y"] + box["height"] / 2]) == "H1", "nothing lies over it"
                assert tab.locator("meta[http-equiv=refresh i], iframe, object, embed, form, base, link").count() == 0
                assert tab.locator("script").count() == 1
                tab.close()
        finally:
            server.shutdown()
    assert asked == []


def hostile_notebook(path, vectors):
    """Each vector as an output of three types, and as a text."""
    kinds = ("text/html", "image/svg+xml", "text/markdown")
    outputs = [new_output("display_data", {kind: vector}) for vector in vectors for kind in kinds]
    texts = [new_markdown_cell(vector) for vector in vectors]
    nbformat.write(new_notebook(cells=[*texts, new_code_cell("1", outputs=outputs)]), path)
    return path


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a free port, with train.ipynb set up for a small training; its address and its folder."""
    work = tmp_path / "work"
    work.mkdir()
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')  # all cells are in the page
    port = free_port()
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
        "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.password=",
        f"--ServerApp.root_dir={work}",
    ]  # fmt: skip
    places = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    places["JUPYTERLAB_SETTINGS_DIR"] = str(tmp_path / "settings")
    with (tmp_path / "lab.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, preexec_fn=end_with_parent,
            env={**os.environ, **places, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: reached(address), within=60)
        yield address, work
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()


def reached(address):
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"{address}/api/status", timeout=2).status == 200


def prepared(work, steps):
    """train.ipynb with small settings, in JupyterLab's folder."""
    notebook = nbformat.read(ROOT / "notebooks" / "train.ipynb", 4)
    small = dict(
        pretrained_model_name_or_path=small_model(), dataset_name=small_data(), steps=steps, train_batch_size=2,
        gradient_accumulation_steps=2, validation_loss_steps=0, validation_prompts=["sun"],
        output_dir=str(work / "a-run"),
    )  # fmt: skip
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in small.items())
    nbformat.write(notebook, work / "train.ipynb")
    return work / "a-run"


def run_all(browser, address):
    page = browser.new_context(viewport=DESKTOP).new_page()
    page.goto(f"{address}/lab/tree/train.ipynb")
    wait_for(lambda: runs_all(page), within=120)
    return page


def runs_all(page):
    """Whether a cell began after the menu was used: a JupyterLab that is not ready yet ignores what it is asked."""
    page.keyboard.press("Escape")  # a menu that a former try left open
    choose(page, "Run", "Run All Cells", ready=".jp-Notebook .jp-CodeCell")
    began = "[...document.querySelectorAll('.jp-InputPrompt')].some(one => /[*0-9]/.test(one.textContent))"
    try:
        return page.wait_for_function(began, timeout=20_000)
    except playwright.TimeoutError:
        return None


def choose(page, menu, item, ready):
    page.wait_for_selector(ready, timeout=60_000)
    page.wait_for_function("document.querySelector('.jp-NotebookPanel-toolbar')?.innerText.includes('Python 3')")
    page.locator(".lm-MenuBar-itemLabel").get_by_text(menu, exact=True).click()
    page.locator(".lm-Menu-itemLabel").get_by_text(item, exact=True).first.click()


def points(page):
    """How many steps the live figure shows; 0 where there is none."""
    return page.locator("svg[aria-label='seconds a step'] circle").count()


def test_running_all_in_jupyterlab(lab, browser):
    address, work = lab
    folder = prepared(work, 200)
    page = run_all(browser, address)
    first = wait_for(lambda: points(page), within=120)
    page.locator("svg[aria-label='seconds a step']").scroll_into_view_if_needed()
    screenshot(page, "lab-live")
    wait_for(lambda: points(page) > first, within=60)
    line = page.get_by_text(re.compile(r"step \d+/200 · .* left · loss .* images/s · .* GiB"))
    assert line.count() >= 1
    wait_for(lambda: run_folder.RunFolder(folder).summary, within=200)
    page.get_by_role("columnheader", name="How it is measured").wait_for(timeout=60_000)
    wait_for(lambda: page.locator(".jp-InputPrompt", has_text="[*]").count() == 0, within=60)
    screenshot(page, "lab-end")
    assert points(page) == 0, "the figures of the whole run take its place"
    assert page.locator(".jp-OutputArea img").count() >= 5
    assert page.get_by_text("Traceback").count() == 0
    page.keyboard.press("Control+s")
    shown = wait_for(lambda: outputs_of(work / "train.ipynb"), within=30)
    assert len([data for data in shown if "image/svg+xml" in data]) == 5
    assert len([data for data in shown if "step 200/200" in data.get("text/plain", "")]) == 1, "one progress line"


def outputs_of(path):
    try:
        cells = nbformat.read(path, 4).cells
    except nbformat.reader.NotJSONError:  # JupyterLab is writing it
        return []
    return [output.data for cell in cells for output in cell.get("outputs", ()) if "data" in output]


def test_interrupting_in_jupyterlab(lab, browser):
    address, work = lab
    folder = prepared(work, 5000)
    page = run_all(browser, address)
    wait_for(lambda: points(page) > 3, within=120)
    choose(page, "Kernel", "Interrupt Kernel", ready=".jp-Notebook")
    page.get_by_text(re.compile(r"step \d+/\d+ · interrupted; the measurements are in")).first.wait_for(timeout=20_000)
    assert none_left(folder, within=10)
    page.locator("svg[aria-label='seconds a step']").scroll_into_view_if_needed()
    screenshot(page, "lab-interrupted")
    assert points(page) > 3, "what was measured stays in sight"
    assert len(run_folder.RunFolder(folder).steps) > 3
