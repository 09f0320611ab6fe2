"""A Markdown report as one HTML file: pictures inside, nothing loaded from elsewhere, light and dark."""

import base64
import re
from pathlib import Path

from slm.report.render import fill


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
    return fill("page.html", title=markdown.splitlines()[0].lstrip("# "), heads=heads, body=body)
