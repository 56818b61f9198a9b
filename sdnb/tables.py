"""Tables as a notebook and a page show them."""

import pandas as pd


def html_table(frame: pd.DataFrame, css_class: str = "", header: bool = True) -> str:
    """A table of texts as HTML: escaped, complete, and aligned to the left."""
    with pd.option_context("display.max_colwidth", None):
        html = frame.astype(str).to_html(classes=css_class or None, header=header, border=0, justify="left")
    for cell in ("th", "td"):
        html = html.replace(f"<{cell}>", f"<{cell} style='text-align:left'>")
    return html
