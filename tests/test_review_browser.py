"""The review queue in JupyterLab, in a real browser: keys decide, rows are shown as text, decisions reach the disk."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
CODE = """from slm.curate.review import review
from slm.notebook import start
from task.contract import contract

settings = start("project.yaml", "default", "dev", {})
review(settings, contract).widget()"""
PLANT = "<img src=x onerror=\"document.title='owned'\"> <b>bold</b> مرحبا, my order is TL-40213"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed"),
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("playwright", "anywidget", "jupyterlab"))),
        reason="playwright, anywidget or jupyterlab is not installed",
    ),
]


@pytest.fixture(scope="module")
def project(bake):
    """A project whose last run of 04 accepted six rows, the planted one first in the queue."""
    folder = bake()
    sys.path.insert(0, str(folder))
    lines = [json.loads(line) for line in (folder / "data/raw/seed.jsonl").read_text().splitlines()]
    rows = [r for r in lines if json.loads(r["messages"][-1]["content"])["order_id"] is None][:5]
    planted = json.loads(json.dumps(lines[0]))
    planted["id"], planted["messages"][0]["content"] = "planted", PLANT
    text = "".join(json.dumps(row) + "\n" for row in [*rows, planted])
    (folder / "data/accepted/all.jsonl").write_text(text)
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": [], "source": CODE}
    meta = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    notebook = {"cells": [cell], "metadata": meta, "nbformat": 4, "nbformat_minor": 5}
    (folder / "queue.ipynb").write_text(json.dumps(notebook))
    return folder


@pytest.fixture(scope="module")
def page(project, tmp_path_factory):
    """JupyterLab with the notebook open and run."""
    from playwright.sync_api import sync_playwright

    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
               "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url="]  # fmt: skip
    runtime = home / "runtime"
    env = {**os.environ, "HOME": str(home), "JUPYTER_RUNTIME_DIR": str(runtime), "JUPYTER_CONFIG_DIR": str(home / "config")}
    log = (home / "lab.log").open("w")
    server = subprocess.Popen(command, cwd=project, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = wait_for(lambda: address(runtime), 60)
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"{url}lab/tree/queue.ipynb?reset")
            page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
            page.wait_for_function("jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
                                   timeout=60_000)  # fmt: skip
            page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
            page.wait_for_selector(".slm .turn.user", timeout=60_000)
            yield page
            browser.close()
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def address(runtime):
    """The running server's address, once it answers."""
    for file in runtime.glob("jpserver-*.json"):
        url = json.loads(file.read_text())["url"]
        urllib.request.urlopen(f"{url}api", timeout=2).read()
        return url


def wait_for(look, seconds=10):
    """What `look()` gives, as soon as it is true."""
    end = time.time() + seconds
    while time.time() < end:
        try:
            if found := look():
                return found
        except (OSError, ValueError):
            pass
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s in vain")


def test_review_by_keyboard(project, page):
    """Keys that JupyterLab takes for its own; a row's markup that runs; an edit that breaks the contract; a decision
    that is only in the browser's memory."""
    file = project / "data/raw/decisions.jsonl"

    def kept():
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def shot(name):
        if folder := os.environ.get("SLM_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/{name}.png")

    card = page.locator(".slm")
    cells = page.locator(".jp-Notebook .jp-Cell").count()
    assert PLANT in card.locator(".turn.user").inner_text()
    assert card.locator("img").count() == 0 and page.title() != "owned"
    assert "high risk: order_id" in card.inner_text()

    shot("1_queue")
    card.locator(".turn.user").click()
    page.keyboard.press("a")
    page.wait_for_selector(".slm .error:has-text('your name')")
    assert not kept()
    page.locator(".slm .reviewer").fill("Ada")
    page.keyboard.press("Enter")
    page.keyboard.press("a")
    wait_for(lambda: len(kept()) == 1)
    assert (kept()[0]["id"], kept()[0]["decision"], kept()[0]["reviewer"]) == ("planted", "accept", "Ada")

    page.wait_for_selector(".slm:has-text('1 decided')")
    page.keyboard.press("n")
    page.wait_for_selector(".slm b:has-text('3 of 6')")  # a card that is still on its way would clear the note below
    page.keyboard.press("k")
    page.wait_for_selector(".slm b:has-text('2 of 6')")
    page.locator(".slm .note").fill("nobody would write this")
    page.keyboard.press("Enter")
    page.keyboard.press("r")
    wait_for(lambda: len(kept()) == 2)
    assert (kept()[1]["decision"], kept()[1]["reason"]) == ("reject", "nobody would write this")

    page.wait_for_selector(".slm:has-text('2 decided')")
    page.keyboard.press("e")
    right = page.locator(".slm textarea").input_value()
    page.locator(".slm textarea").fill(right.replace('"priority": "', '"priority": "very '))
    shot("2_edit")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".slm .error:has-text('priority')")
    assert len(kept()) == 2 and "very " in page.locator(".slm textarea").input_value()
    shot("3_error")
    page.locator(".slm textarea").fill(right.replace('"refund_requested": false', '"refund_requested": true'))
    page.keyboard.press("Control+Enter")
    wait_for(lambda: len(kept()) == 3)
    assert kept()[2]["decision"] == "edit" and json.loads(kept()[2]["answer"])["refund_requested"] is True
    assert kept()[2]["time"]

    page.wait_for_selector(".slm:has-text('3 decided')")
    shot("4_after")
    page.locator(".slm button.accept").click()
    wait_for(lambda: len(kept()) == 4)
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells, "a key reached JupyterLab"
