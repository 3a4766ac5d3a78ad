"""Draw the diagrams beside this file: run as `python docs/assets/draw.py`.

Each stands on a light card of its own, so that it reads the same on a light and on a dark page.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

Point = tuple[float, float]

HERE = Path(__file__).parent
LINE = 17
"""Pixels between two lines of text."""

STYLE = """\
text { font: 13px 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif; fill: #1c2b33 }
.title { font-weight: bold }
.code { font-family: 'DejaVu Sans Mono', Menlo, Consolas, monospace; font-size: 12px }
.note { fill: #4a5a63; font-size: 12px }
.card { fill: #fbfaf6; stroke: #c9c5b8 }
.box { fill: #ffffff; stroke: #54656e; stroke-width: 1.2 }
.core { fill: #d9efec; stroke: #00695c; stroke-width: 1.4 }
.trained { fill: #ffe9c7; stroke: #a35c00; stroke-width: 1.4 }
.region { fill: #f1efe7; stroke: #a9a594; stroke-dasharray: 4 3 }
.line { fill: none; stroke: #37474f; stroke-width: 1.4 }
.query { fill: none; stroke: #00695c; stroke-width: 2 }
.prompt { fill: none; stroke: #a35c00; stroke-width: 1.8 }
.dashed { fill: none; stroke: #8a3324; stroke-width: 1.2; stroke-dasharray: 5 3 }"""

HEAD = {"line": "#37474f", "query": "#00695c", "prompt": "#a35c00", "dashed": "#8a3324"}


class Drawing:
    """An SVG in the making: what is drawn later lies above what was drawn before."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        heads = "".join(
            f'<marker id="{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            f'markerHeight="8" markerUnits="userSpaceOnUse" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
            for kind, colour in HEAD.items()
        )
        self.parts = [
            '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="title description"',
            f' viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="description">{escape(description)}</desc>',
            f"<style>\n{STYLE}\n</style>",
            f"<defs>{heads}</defs>",
            f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>',
        ]

    def text(
        self, at: Point, lines: Sequence[str], *, kind: str = "", anchor: str = "middle"
    ) -> None:
        """Write lines below each other; the first one's baseline is at a point."""
        x, y = at
        for number, line in enumerate(lines):
            self.parts.append(
                f'<text class="{kind}" x="{x:g}" y="{y + number * LINE:g}" text-anchor="{anchor}">'
                f"{escape(line)}</text>"
            )

    def box(
        self,
        corner: Point,
        size: Point,
        title: str = "",
        lines: Sequence[str] = (),
        *,
        kind: str = "box",
        text_kind: str = "note",
    ) -> None:
        """Draw a box with a title and lines in its middle."""
        (x, y), (width, height) = corner, size
        self.parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'
        )
        # From the middle of the box to the baseline of the first line.
        num_lines = len(lines) + bool(title)
        top = y + height / 2 - LINE * (num_lines - 1) / 2 + 5
        if title:
            self.text((x + width / 2, top), [title], kind="title")
            top += LINE
        self.text((x + width / 2, top), lines, kind=text_kind)

    def region(self, corner: Point, size: Point, title: str) -> None:
        """Draw what several boxes lie in, with its name in the upper left corner."""
        self.box(corner, size, kind="region")
        self.text((corner[0] + 10, corner[1] + 18), [title], kind="note", anchor="start")

    def arrow(self, *points: Point, kind: str = "line", head: bool = True) -> None:
        """Draw a line through points that ends in an arrow head."""
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        end = f' marker-end="url(#{kind})"' if head else ""
        self.parts.append(f'<path class="{kind}" d="{path}"{end}/>')

    def joint(self, at: Point, sign: str, *, kind: str = "box") -> None:
        """Draw a circle with the sign of what is done to what arrives there."""
        x, y = at
        self.parts.append(f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="15"/>')
        self.text((x, y + 5), [sign], kind="title")

    def svg(self) -> str:
        """Return the file's text."""
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def data_flow() -> str:
    """Draw the way from a recipe to an edited model and back."""
    drawing = Drawing(
        *(900, 440),
        "The way of the data",
        "A recipe, plugins and a live model are planned; the plan is applied in one transaction; what "
        "was applied is verified, saved and reverted. A saved record is planned again.",
    )
    sources = {
        46: ("recipe, or rules", ["YAML, TOML, JSON or Python"]),
        148: ("plugins", ["operations, by entry point"]),
        250: ("live model", ["nn.Module, torch.fx graph"]),
    }
    for y, (title, lines) in sources.items():
        drawing.box((20, y), (190, 60), title, lines)
        drawing.arrow((210, y + 30), (240, y + 30), (240, 178), head=False)
    drawing.arrow((240, 178), (270, 178))
    stages = {
        270: ("plan", ["Plan, ModelPlan", "pure: nothing is written"]),
        485: ("apply", ["one transaction:", "all of it, or nothing"]),
        700: ("edited model", ["Surgery, EditedModel", "its variants swap"]),
    }
    for x, (title, lines) in stages.items():
        drawing.box((x, 134), (180, 88), title, lines, kind="core")
    drawing.arrow((450, 178), (485, 178))
    drawing.arrow((665, 178), (700, 178))

    drawing.arrow((360, 134), (360, 84), kind="dashed")
    drawing.text(
        (360, 54), ["no match, conflict, broken", "promise: an error that says where"], kind="note"
    )
    drawing.arrow((575, 134), (575, 84), kind="dashed")
    drawing.text((575, 54), ["a write fails: those before", "it are taken back"], kind="note")
    drawing.text((790, 106), ["an adapter that was not", "trained changes no bit"], kind="note")

    # One trunk below the edited model, from which its three uses hang.
    drawing.arrow((790, 222), (790, 330))
    drawing.arrow((790, 296), (575, 296), (575, 330))
    drawing.arrow((575, 296), (405, 296), (405, 330))
    drawing.box(
        (270, 330),
        (180, 88),
        "save: a record",
        ["surgery.json", "surgery.safetensors"],
        text_kind="code",
    )
    drawing.box((485, 330), (180, 88), "verify", ["structure, identity,", "revert, gradients"])
    drawing.box((700, 330), (180, 88), "revert", ["the same objects", "in the same places"])
    drawing.arrow((315, 330), (315, 222))
    drawing.text((322, 250), ["load: compared,", "then planned anew"], kind="note", anchor="start")
    return drawing.svg()


def attention() -> str:
    """Draw one adapted attention module."""
    drawing = Drawing(
        *(900, 490),
        "Attention with the prompt term",
        "The query of the base attention, normed and rotated, also attends to the keys and values of "
        "the prompt. The gated result is added to the base's before the output projection.",
    )
    drawing.region((186, 20), (500, 216), "base attention, unchanged")
    drawing.box((20, 100), (130, 56), "hidden states x", ["(tokens, hidden)"])
    drawing.region((186, 268), (500, 150), "prompt term")
    drawing.box((20, 326), (130, 56), "prompt P", ["(K, hidden)"], kind="trained")
    for y, name in {50: "q_proj", 108: "k_proj", 166: "v_proj"}.items():
        drawing.box((206, y), (90, 40), lines=[name], text_kind="code")
        drawing.arrow((150, 128), (170, 128), (170, y + 20), (206, y + 20))
    for y, name in {304: "k_proj", 358: "v_proj"}.items():
        drawing.box((206, y), (90, 40), lines=[name], text_kind="code")
        drawing.arrow((150, 354), (170, 354), (170, y + 20), (206, y + 20), kind="prompt")
    drawing.text((386, 286), ["the same weights as above"], kind="note")
    drawing.box((340, 50), (110, 40), lines=["norm, rotation"])
    drawing.box((340, 108), (110, 40), lines=["norm, rotation"])
    drawing.arrow((296, 70), (340, 70), kind="query")
    drawing.arrow((296, 128), (340, 128))
    drawing.box((520, 50), (150, 156), "attention", ["softmax(q kᵀ · scaling", "+ mask) v"])
    drawing.arrow((450, 70), (520, 70), kind="query")
    drawing.arrow((450, 128), (520, 128))
    drawing.arrow((296, 186), (520, 186))
    for y, name in {64: "q", 122: "k", 180: "v"}.items():
        drawing.text((506, y), [name], kind="code")
    drawing.box(
        (520, 300), (150, 102), "own softmax", ["softmax(q kᵀ ·", "scaling) v", "over K, no mask"]
    )
    # The very query that the base attention used.
    drawing.arrow((476, 70), (476, 346), (520, 346), kind="query")
    drawing.arrow((296, 324), (520, 324), kind="prompt")
    drawing.arrow((296, 378), (520, 378), kind="prompt")
    drawing.text((386, 318), ["no rotation, no norm"], kind="note")
    for y, name in {318: "k", 341: "q", 372: "v"}.items():
        drawing.text((508, y), [name], kind="code")
    drawing.joint((740, 351), "\N{MULTIPLICATION SIGN}", kind="trained")
    drawing.arrow((670, 351), (725, 351), kind="prompt")
    drawing.box((675, 430), (130, 46), "gate, activated", ["zero at the start"], kind="trained")
    drawing.arrow((740, 430), (740, 366), kind="prompt")
    drawing.joint((740, 128), "+", kind="core")
    drawing.arrow((670, 128), (725, 128))
    drawing.arrow((740, 336), (740, 143), kind="prompt")
    drawing.box((785, 108), (90, 40), lines=["o_proj"], text_kind="code")
    drawing.arrow((755, 128), (785, 128))
    drawing.arrow((830, 108), (830, 60))
    drawing.text((830, 50), ["output"], kind="title")
    drawing.text(
        (752, 222),
        ["exactly zero while", "the gate is zero, so", "no bit changes"],
        kind="note",
        anchor="start",
    )
    drawing.text(
        (20, 452),
        ["Trained: prompt and gate.", "Frozen: everything else."],
        kind="note",
        anchor="start",
    )
    return drawing.svg()


def _panel(
    drawing: Drawing, x: float, title: str, held: Sequence[str], stored: Sequence[str]
) -> None:
    """Draw the model and the store at one time."""
    drawing.text((x + 100, 36), [title], kind="title")
    drawing.region((x, 50), (200, 150), "model")
    for number, name in enumerate(held):
        top = 78 + number * 58
        drawing.text((x + 100, top + 12), [f"layers.{number + 2}.self_attn"], kind="code")
        drawing.box(
            (x + 16, top + 18),
            (168, 28),
            lines=[name],
            kind="box" if name == "original" else "trained",
        )
    drawing.region((x, 224), (200, 118), "store, outside of the model")
    for number, name in enumerate(stored):
        drawing.box((x + 16, 252 + number * 42), (168, 32), lines=[name], kind="trained")


def swap_state() -> str:
    """Draw what `SwapState` moves, and when."""
    drawing = Drawing(
        *(900, 420),
        "The swap state",
        "Three moments of two variants. With none active the model holds its originals and both are "
        "stored. With french active its modules are in the model; with legal active, which wants one "
        "layer only, the other layer holds its original again.",
    )
    french = ["french (layer 2)", "french (layer 3)"]
    _panel(
        drawing, 20, "base", ["original", "original"], ["french (2 modules)", "legal (1 module)"]
    )
    _panel(drawing, 350, "french is active", french, ["legal (1 module)"])
    _panel(drawing, 680, "legal is active", ["original", "legal (layer 3)"], ["french (2 modules)"])
    for x, there, back in (
        (220, 'set("french")', "disable()"),
        (550, 'set("legal")', 'set("french")'),
    ):
        drawing.text((x + 65, 106), [there], kind="code")
        drawing.arrow((x + 8, 116), (x + 122, 116))
        drawing.arrow((x + 122, 150), (x + 8, 150))
        drawing.text((x + 65, 168), [back], kind="code")
    drawing.text((285, 186), ["enable() again"], kind="note")
    drawing.text((285, 272), ["add() stores what", "a plan builds"], kind="note")
    drawing.text(
        (450, 376),
        [
            "Each arrow is one transaction: every slot that differs is written once, or none is.",
            "The active variant is never in the store, so no state exists twice. What is stored follows .to().",
        ],
        kind="note",
    )
    return drawing.svg()


def drawings() -> dict[str, str]:
    """Return each diagram's text by the name of its file."""
    return {
        "data-flow.svg": data_flow(),
        "attention.svg": attention(),
        "swap-state.svg": swap_state(),
    }


if __name__ == "__main__":
    for name, text in drawings().items():
        (HERE / name).write_text(text)
