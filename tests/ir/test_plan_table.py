"""A plan as users see it: print(plan), rich, notebooks."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

import edit_compile as ec
from edit_compile.ir import plan_table
from edit_compile.ir.plan import Given, PositionIds, Refusal, SizesOfInputs
from edit_compile.ir.symbol_names import readable_names

HEIGHT, WIDTH = "(s20//2)", "(s33//2)"
IMAGE = ("image", f"({HEIGHT})*({WIDTH})")
SIZES = SizesOfInputs(expressions=(HEIGHT, WIDTH), symbols={"s20": ("hidden_states", 2), "s33": ("hidden_states", 3)})


def site(path, action="edit", reason="attention between image tokens", queries=(IMAGE,), keys=None, grid=(HEIGHT, WIDTH), **more):
    layout = ec.TokenLayout.of(*queries)
    return ec.SitePlan(
        path=path,
        action=action,
        reason=reason,
        query_layout=layout,
        key_layout=ec.TokenLayout.of(*keys) if keys else layout,
        grid=ec.Grid(grid) if grid else None,
        **more,
    )


def plan(*sites, source=SIZES):
    return ec.Plan(model="Model", sites=sites, grid=source, inputs={})


def shown(renderable, width):
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


BLOCKS = [site(f"transformer_blocks.{i}.attn1") for i in range(28)]
CROSS = [
    site(f"transformer_blocks.{i}.attn2", "keep", "cross-attention: linear in image tokens already", keys=[("text", "s31")])
    for i in range(28)
]


def test_sizes_have_readable_names():
    names = readable_names(plan(*BLOCKS, *CROSS))
    assert names.layout(BLOCKS[0].query_layout) == "image h*w"
    assert names.layout(CROSS[0].key_layout) == "text t"
    assert names.grid(BLOCKS[0].grid) == "h x w"
    assert names.meanings == {
        "h": "rows of image tokens, hidden_states.shape[2] // 2",
        "w": "columns of image tokens, hidden_states.shape[3] // 2",
        "t": "text tokens",
    }


@pytest.mark.parametrize(
    ("queries", "grid", "source", "expected"),
    [
        ([("text", "s31"), ("image", "s87")], None, PositionIds(input="img_ids"), "text t, image h*w"),
        ([("text", "s31"), ("image", "s87")], None, Given(), "text t, image n"),
        ([("other", "5"), ("image", "196")], ("14", "14"), Given(), "other 5, image 196"),
        ([("image", "s3*s7"), ("text", "s31 + s77")], ("s7", "s3"), Given(), "image h*w, text t + t2"),
        ([("image", "s2*s7*s3")], ("s2", "s7", "s3"), Given(), "image f*h*w"),
        ([("image", "(s20//2)**2")], ("s20//2", "s20//2"), Given(), "image h ** 2"),
        ([("image", "?"), ("text", "s1 + 1")], None, Given(), "image ?, text t + 1"),
    ],
)
def test_names_of_other_layouts(queries, grid, source, expected):
    odd = site("blocks.0.attn", queries=queries, grid=grid)
    assert readable_names(plan(odd, source=source)).layout(odd.query_layout) == expected


def test_sites_on_other_grids_have_names_of_their_own():
    """The model's finest grid is h x w, whatever grid comes first."""
    coarse = site("middle.attn", queries=[("image", "(s20//4)*(s33//4)")], grid=("(s20//4)", "(s33//4)"))
    names = readable_names(plan(coarse, *BLOCKS))
    assert names.layout(BLOCKS[0].query_layout) == "image h*w"
    assert names.layout(coarse.query_layout) == "image h2*w2"
    assert names.meanings["h2"] == "rows of image tokens, hidden_states.shape[2] // 4"


def test_str_is_the_folded_table():
    assert str(plan(*BLOCKS, *CROSS)).splitlines() == [
        "Model: 28 of 56 attention sites rewritten",
        "sites  path                              tokens                    action  reason",
        "   28  transformer_blocks.{0..27}.attn1  image h*w                 edit    attention between image tokens",
        "   28  transformer_blocks.{0..27}.attn2  image h*w (keys: text t)  keep    cross-attention: linear in image tokens already",
        "h: rows of image tokens, hidden_states.shape[2] // 2; w: columns of image tokens, hidden_states.shape[3] // 2; t: text tokens",
    ]


@pytest.mark.parametrize("width", [80, 120, 160])
def test_plan_is_readable_at_any_width(width):
    text = shown(plan(*BLOCKS, *CROSS), width)
    assert max(map(len, text.splitlines())) <= width
    assert "28 of 56 attention sites rewritten" in text
    assert "transformer_blocks.{0..27}.attn1" in text  # in one piece
    assert "image h*w (keys: text t)" in text
    assert "cross-attention: linear in image tokens already" in text
    assert ("reason" in text) == (width == 160)
    assert "h: rows of image tokens" in text


def test_narrow_terminals_fold_cells():
    lines = shown(plan(*BLOCKS), 40).splitlines()
    assert max(map(len, lines)) <= 40
    heading = next(line for line in lines if line.startswith("sites"))
    column = slice(heading.index("path"), heading.index("tokens"))
    table = lines[lines.index(heading) + 1 : next(i for i, line in enumerate(lines) if line.startswith("edit:"))]
    assert len(table) > 1
    assert "".join(line[column].strip() for line in table) == "transformer_blocks.{0..27}.attn1"


def test_reasons_below_the_table_are_told_apart():
    kept = [site("a", "keep", "causal attention"), site("b", "keep", "no image tokens take part")]
    text = shown(plan(*kept, *BLOCKS), 60)
    assert "keep (1): causal attention" in text
    assert "keep (2): no image tokens take part" in text
    assert "edit: attention between image tokens" in text


def test_only_equal_sites_are_folded():
    odd = [site(f"blocks.{i}.attn") for i in (0, 1, 3)]
    twice = [site("one.0.attn", index=index) for index in range(2)]
    rows = plan_table.rows(plan(*odd, *twice, site("alone")))
    assert [(row.sites, row.path) for row in rows] == [(3, "blocks.{0,1,3}.attn"), (2, "one.0.attn"), (1, "alone")]


def test_options_are_shown_where_they_differ():
    options = [{"reduction": 4, "eta": "exact"}, {"reduction": 2, "eta": "exact"}, {"reduction": 4, "eta": "exact"}]
    rows = plan_table.rows(plan(*(site(f"blocks.{i}.attn", options=options[i]) for i in range(3))))
    assert [(row.path, row.action) for row in rows] == [("blocks.{0,2}.attn", "edit reduction=4"), ("blocks.1.attn", "edit reduction=2")]


def test_refusals_name_the_operation_and_the_models_line():
    def refused(block):
        refusal = Refusal(reason="a mask of queries", node=f"softmax_{block}", source="package/model.py:12 (x[i].softmax(-1))")
        return site(f"blocks.{block}.attn", "keep", refusal.reason, refusal=refusal)

    for width in (60, 160):
        text = " ".join(shown(plan(*map(refused, range(3))), width).split())
        assert "blocks.{0..2}.attn: refused at softmax_0, package/model.py:12 (x[i].softmax(-1))" in text
    assert "refused" not in str(plan(*BLOCKS))


def test_feed_forward_networks_are_listed_where_they_matter():
    kept = [site(f"blocks.{i}.ff", "keep", "no rule is for it", kind="feed_forward") for i in range(3)]
    assert "ff" not in str(plan(*BLOCKS, *kept))
    assert "28 of 28 attention sites rewritten" in str(plan(*BLOCKS, *kept))
    refused = site("blocks.3.ff", "keep", "has no grid", kind="feed_forward", refusal=Refusal(reason="has no grid", node="linear"))
    assert "blocks.3.ff" in str(plan(*BLOCKS, *kept, refused))
    rewritten = site("blocks.4.ff", "mix-ffn", "over image tokens", kind="feed_forward")
    text = str(plan(*BLOCKS, *kept, rewritten))
    assert "Model: 28 of 28 attention sites, 1 of 4 feed-forward networks rewritten" in text
    assert "blocks.4.ff" in text


def test_a_grid_that_must_be_given_is_asked_for():
    assert "the grid must be given: with edit_compile.grid(model, ...)" in str(plan(BLOCKS[0], source=Given()))
    assert "must be given" in shown(plan(BLOCKS[0], source=Given()), 80)
    assert "must be given" not in str(plan(CROSS[0], source=Given()))
    assert "must be given" not in str(plan(*BLOCKS))


def test_where_sizes_are_read_is_left_out_where_it_is_not_known():
    text = str(plan(site("a.attn", "keep", "left out by include and exclude"), source=Given()))
    assert "h: rows of image tokens; w: columns of image tokens" in text
    assert "s20" not in text


def test_notebooks_show_a_table():
    class Text(HTMLParser):
        def __init__(self):
            super().__init__()
            self.cells, self.all = [], ""

        def handle_data(self, data):
            self.all += data
            if self.get_starttag_text().startswith("<td"):
                self.cells.append(data)

    page = Text()
    page.feed(plan(site("a<b>", reason="x & y"), source=Given())._repr_html_())
    assert page.cells == ["1", "a<b>", "image h*w", "edit", "x & y"]
    assert "Model: 1 of 1 attention sites rewritten" in page.all
    assert "the grid must be given" in page.all


def test_what_looks_like_markup_is_shown_as_it_is():
    odd = plan(site("blocks[bold]", reason="masks[i] [/] and a backslash \\"))
    assert "blocks[bold]" in shown(odd, 160)
    assert "masks[i] [/] and a backslash \\" in shown(odd, 160)


def test_an_empty_plan_has_a_table_too():
    assert str(plan()).splitlines() == ["Model: 0 of 0 attention sites rewritten", "sites  path  tokens  action  reason"]
    assert shown(plan(), 20)
