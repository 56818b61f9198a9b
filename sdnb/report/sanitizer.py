"""What a notebook's outputs and texts may put on a page: mark-up that shows something. No script, no style sheet,
nothing that loads, nothing that leads the reader elsewhere without a click, nothing that lies over the page."""

import re

import nh3

_HTML = """
    a abbr b blockquote br caption code col colgroup dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6
    hr i img ins kbd li mark ol p pre q s samp small span strong sub summary sup table tbody td tfoot th thead tr u
    ul var
"""
_SVG = """
    circle clipPath defs desc ellipse g image line linearGradient marker mask path pattern polygon polyline
    radialGradient rect stop svg symbol text title tspan use
"""
_ATTRIBUTES = """
    alt class clip-path clip-rule colspan cx cy d dir dominant-baseline dx dy fill fill-opacity fill-rule
    font-family font-size font-weight gradientTransform gradientUnits height href id lang marker-end marker-mid
    marker-start mask offset opacity open patternTransform patternUnits points preserveAspectRatio r role rotate
    rowspan rx ry scope src start stop-color stop-opacity stroke stroke-dasharray stroke-linecap stroke-linejoin
    stroke-opacity stroke-width style text-anchor title transform version viewBox width x x1 x2 xlink:href y y1 y2
"""
_PROPERTIES = """
    align-items background background-color border border-bottom border-collapse border-color border-left
    border-radius border-right border-top border-width clip-path clip-rule color column-gap display
    dominant-baseline fill fill-opacity fill-rule flex flex-wrap font font-family font-size font-style font-variant
    font-weight gap height justify-content line-height list-style margin margin-bottom margin-left margin-right
    margin-top max-height max-width min-width opacity overflow-wrap padding padding-bottom padding-left
    padding-right padding-top stroke stroke-dasharray stroke-dashoffset stroke-linecap stroke-linejoin
    stroke-miterlimit stroke-opacity stroke-width text-align text-anchor text-decoration vertical-align white-space
    width word-break
"""
_ADDRESSES = {"href", "src", "xlink:href"}
_CLICKED = re.compile(r"(?i)(https?|mailto):|#")  # where a link may lead
_ELSEWHERE = re.compile(r"(?i)(url|image|image-set|src)\s*\((?!\s*['\"]?#)|\\")  # a style that loads, also in escapes
_TEXTS = ("alt", "title", "aria-", "data-")


def _attribute(tag: str, name: str, value: str) -> str | None:
    if name in _ADDRESSES:
        if tag == "a":
            return value if _CLICKED.match(value) else None
        return value if value.startswith("#" if tag == "use" else ("#", "data:image/")) else None
    return None if _ELSEWHERE.search(value) and not name.startswith(_TEXTS) else value


_cleaner = nh3.Cleaner(
    tags={*_HTML.split(), *_SVG.split()},
    clean_content_tags={"iframe", "noscript", "object", "script", "style", "template"},
    attributes={"*": {*_ATTRIBUTES.split()}},
    generic_attribute_prefixes={"aria-", "data-"},
    attribute_filter=_attribute,
    filter_style_properties={*_PROPERTIES.split()},
    url_schemes={"http", "https", "mailto", "data"},
)


def clean(html: str) -> str:
    """HTML, or an SVG element, without all that a page does not need."""
    return _cleaner.clean(html)
