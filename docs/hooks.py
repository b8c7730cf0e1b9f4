"""What the site shows otherwise than GitHub does (named in mkdocs.yml)."""

import re


# To files of the repository that are not documentation.
LEAVES_DOCS = re.compile(r"\[([^\]]+)\]\((?:\.\./[^)]*|figures|figures/[^)]*\.json)\)")
# transformers' own docs make a link of [`~module.Class`]; here it is the name.
CLASS_NAME = re.compile(r"\[<code>~?(?:[\w]+\.)*(\w+)</code>\]")
# The type of an argument: its default has a column of its own.
TYPE = re.compile(r"<code>`([^`<]+)`(?: or `([^`<]+)`)?, \*optional\*[^<]*</code>")
# The docstrings' formulas, as transformers writes them.
FORMULA = re.compile(r"\\+\((.+?)\\+\)", re.DOTALL)
SYMBOLS = {
    r"\alpha": "α",
    r"\lambda": "λ",
    r"\theta": "θ",
    r"\nabla": "∇",
    r"\lVert ": "‖",
    r"\lVert": "‖",
    r"\rVert": "‖",
    r"\, ": " ",
    "_1": "₁",
    "_2": "₂",
}


def on_page_markdown(markdown: str, **_: object) -> str:
    return LEAVES_DOCS.sub(r"`\1`", markdown)


def on_page_content(html: str, **_: object) -> str:
    def plain(match: re.Match) -> str:
        formula = match.group(1)
        for command, symbol in SYMBOLS.items():
            formula = formula.replace(command, symbol)
        return f"<em>{formula}</em>"

    def names(match: re.Match) -> str:
        return " or ".join(f"<code>{name}</code>" for name in match.groups() if name)

    return FORMULA.sub(plain, CLASS_NAME.sub(r"<code>\1</code>", TYPE.sub(names, html)))
