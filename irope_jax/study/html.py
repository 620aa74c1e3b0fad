"""A Markdown page as one HTML file that opens offline: pictures are inside, and nothing is asked from outside."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }
table { font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #d8d8d8; text-align: left }
thead th { border-bottom: 2px solid #888 }
img { max-width: 100%; height: auto }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto }
code { font-size: .92em }
blockquote { border-left: 4px solid #e8b23a; margin-left: 0; padding-left: 1rem }
@media (prefers-color-scheme: dark) {
  body { background: #16181b; color: #e4e4e4 } pre { background: #24272b } th, td { border-color: #3c4046 }
  img { background: white }
}
"""


def write_html(page: Path) -> Path:
    """Write `PAGE.html` beside a Markdown page; raw HTML in the page is shown, not obeyed.

    Raises:
      OSError: it cannot be written.
    """
    text = page.read_text(encoding="utf-8")
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), page.stem)

    def inside(found: re.Match) -> str:
        path = page.parent / html.unescape(found[1])
        if path.suffix != ".png" or not path.is_file():
            return 'src=""'
        return f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"'

    body = re.sub(r'src="([^"]*)"', inside, body)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    head += '<meta name="viewport" content="width=device-width"><style>' + _STYLE + "</style>"
    out = page.with_suffix(".html")
    out.write_text(f"{head}<body>{body}</body></html>\n", encoding="utf-8")
    return out
