"""The documentation site, built as CI builds it: its links, its pages on a phone, and that its pictures are current."""

import functools
import http.server
import json
import re
import runpy
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import moco_dist.api

pytestmark = pytest.mark.slow

PHONE = 390  # pixels
# Each page is loaded once, in a frame as wide as a phone, and measured when its own scripts have run. A wide table or a
# line of code scrolls in a box of its own, and does not widen the page.
HARNESS = """<!doctype html><body><script>
const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));
async function measured(path) {
    const frame = document.createElement("iframe");
    frame.style = "width: %(width)spx; height: 800px; border: 0";
    frame.src = path;
    const loaded = new Promise(done => { frame.onload = done; });
    document.body.append(frame);
    await loaded;
    await wait(50);
    const inside = frame.contentWindow;
    const result = {
        path, width: inside.document.documentElement.scrollWidth, title: inside.document.title,
        broken: [...inside.document.images].filter(image => !image.naturalWidth).map(image => image.src),
        fetched: inside.performance.getEntriesByType("resource").map(entry => entry.name),
    };
    frame.remove();
    return result;
}
(async () => {
    const results = [];
    for (const path of %(paths)s) results.push(await measured(path));
    await fetch("/results", {method: "POST", body: JSON.stringify(results)});
})();
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder


class _Links(HTMLParser):
    """What a page refers to, the places in it that can be referred to, and the text of its paragraphs."""

    def __init__(self, page):
        super().__init__()
        self.links, self.places, self.paragraphs, self._open = [], set(), [], False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]
        self.places |= {attributes[name] for name in ("id", "name") if name in attributes}
        self._open = tag == "p" or (self._open and tag not in ("ul", "ol", "table", "pre"))
        if tag == "p":
            self.paragraphs.append("")

    def handle_data(self, data):
        if self._open:
            self.paragraphs[-1] += data


def _pages(site):
    return [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]


def test_no_link_is_dead(site):
    found = {page: _Links(page) for page in _pages(site)}
    assert len(found) > 20
    dead, internal = [], 0
    for page, its in found.items():
        for link in its.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            internal += 1
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            place = unquote(parts.fragment)
            if not target.is_file() or (place and target in found and place not in found[target].places):
                dead.append(f"{page.relative_to(site)}: {link}")
    assert internal > 500
    assert not dead, dead


def test_lists_and_tables_are_no_paragraphs(site):
    """GitHub begins a list or a table right after a line of text; here there has to be an empty line between them."""
    wrong = [text[:80] for page in _pages(site) for text in _Links(page).paragraphs
             if re.search(r"\n *([-*] |\d+\. |\|)", text)]  # fmt: skip
    assert not wrong


def test_the_references_have_what_the_program_has(site):
    settings, commands = ((site / f"{name}.html").read_text() for name in ("settings", "commands"))
    for place in ("pretrain.moco.queue_start", "linear.lr", "detect.steps"):
        assert f'id="{place}"' in settings
    for place in ("pretrain", "data-prepare", "launch-slurm", "configs-show"):
        assert f'id="{place}"' in commands
    assert "--partition" in commands
    assert sys.executable not in commands
    names = (site / "api.html").read_text()
    assert [name for name in moco_dist.api.__all__ if name not in names] == []
    assert 'id="moco_dist.api.load_backbone"' in names


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args, harness, results, **more):
        self.harness, self.results = harness, results
        super().__init__(*args, **more)

    def do_GET(self):
        if self.path != "/harness":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.harness.encode())

    def do_POST(self):
        self.results += json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.answered.set()

    def log_message(self, *args):
        pass


def test_pages_on_a_phone(site, tmp_path):
    """In a real browser: nothing is wider than the screen, no picture is missing, and no other host is asked."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium; apt-get install chromium")
    paths = [f"/{page.relative_to(site)}" for page in _pages(site)]
    # Pages that show a file are of one kind: the first two stand for all.
    shown_files = [path for path in paths if path.startswith("/source/")]
    paths = [path for path in paths if path not in shown_files[2:]]
    results = []
    handler = functools.partial(_Handler, directory=site, results=results,
                                harness=HARNESS % {"width": PHONE, "paths": json.dumps(paths)})  # fmt: skip
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.answered = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        origin = f"http://127.0.0.1:{server.server_port}"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                 f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
        browser = subprocess.Popen([chromium, *flags, "--remote-debugging-port=0", f"{origin}/harness"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            assert server.answered.wait(120), f"the browser was at page {len(results)}"
        finally:
            browser.kill()
            browser.wait()
            server.shutdown()
    assert [it["path"] for it in results] == paths
    assert all(it["title"] for it in results)
    assert {it["path"]: it["width"] for it in results if it["width"] > PHONE} == {}
    assert [image for it in results for image in it["broken"]] == []
    assert [name for it in results for name in it["fetched"] if not name.startswith((origin, "data:"))] == []
    assert any(name.endswith("step.svg") for it in results for name in it["fetched"])


def test_pictures_are_what_the_code_does():
    for name, draw in runpy.run_path("docs/draw.py")["PICTURES"].items():
        assert Path(f"docs/pictures/{name}.svg").read_text(encoding="utf-8") == draw(), "python docs/draw.py"
