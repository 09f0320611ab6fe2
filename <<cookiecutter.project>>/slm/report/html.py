"""A Markdown report as one HTML file: pictures inside, nothing loaded from elsewhere, light and dark."""

import base64
import re
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1a202c; --soft: #4a5568; --line: #d5dbe3; --head: #f1f4f8;
  --wrong: #fde8e8; --box: #ebf4ff; --edge: #2b6cb0 }
@media (prefers-color-scheme: dark) { :root { --back: #14181f; --text: #e2e8f0; --soft: #a3afc0; --line: #374151;
  --head: #1f2632; --wrong: #4a1f24; --box: #1a2a40; --edge: #63a4e8 } }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem }
h1 + p { padding: .8rem 1rem; background: var(--box); border-left: 4px solid var(--edge); font-size: 1.05rem }
.wide { overflow-x: auto; margin: .6rem 0 } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border: 1px solid var(--line); vertical-align: top; overflow-wrap: break-word }
td { max-width: 26rem } td:first-child, th:first-child { position: sticky; left: 0; background: var(--back) }
table:has(th:nth-child(8)) :is(td, th):first-child { white-space: nowrap } th, th:first-child { background: var(--head); text-align: left }
td[style*=right] { white-space: nowrap } th[style*=right], td[style*=right] { text-align: right }
tr.wrong td, tr.wrong td:first-child { background: var(--wrong) } code { font-size: .9em }
pre { padding: .6rem .8rem; background: var(--head); white-space: pre-wrap } pre code { font-size: .85rem }
img { max-width: 100%; background: #fff; border-radius: 4px } nav { color: var(--soft) } nav a { color: inherit }
"""


def page(markdown: str, folder: Path) -> str:
    """The report as a page. Only PNG files of `folder` become pictures, embedded; every other address and all HTML in
    the text, a customer's message for example, stays text."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.validateLink = lambda url: bool(re.fullmatch(r"[\w.-]+\.png", url)) and (folder / url).is_file()
    parser.normalizeLink = str

    def embed(found: re.Match) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / found[1]).read_bytes()).decode()}"'

    body = re.sub(r'src="([\w.-]+\.png)"', embed, parser.render(markdown))
    body = body.replace("<tr>\n<td>✗</td>", '<tr class="wrong">\n<td>✗</td>')
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    heads = re.findall(r"<h2>(.*?)</h2>", body)
    for i, head in enumerate(heads):
        body = body.replace(f"<h2>{head}</h2>", f'<h2 id="part{i}">{head}</h2>', 1)
    links = " · ".join(f'<a href="#part{i}">{head}</a>' for i, head in enumerate(heads))
    title = escape(markdown.splitlines()[0].lstrip("# "))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n<nav>{links}</nav>\n{body}\n</body></html>\n"
    )
