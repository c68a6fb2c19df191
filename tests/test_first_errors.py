"""The ten errors that the documentation shows: each is printed as it says there, in one line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from edit_compile.cli import main
from local_hub import LocalHub, only_hub

PAGE = (Path(__file__).parent.parent / "docs" / "troubleshooting.md").read_text()
SHOWN = re.findall(r"^```console\n\$ (edit-compile [^\n]*)\n([^\n]*)\n```$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as the page has it, and a hub that has nothing."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "sd3.5_medium.safetensors").touch()
    unet = {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [8, 8],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 8,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    files = {"unet/config.json": unet, "converted/dit/edit_compile.json": {}, "runs/mine/edit_compile.json": {"base": "demo/dit"}}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(content))
    with only_hub(LocalHub(), folder / "cache"), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def test_there_are_ten():
    assert len(SHOWN) == 10


@pytest.mark.parametrize(("command", "said"), SHOWN, ids=[command for command, _ in SHOWN])
def test_an_error_is_printed_as_the_page_says(workplace, command, said):
    before = sorted(workplace.rglob("*"))
    result = CliRunner().invoke(main, shlex.split(command)[1:])
    assert result.exit_code != 0
    assert result.stderr.splitlines() == [said]
    assert sorted(workplace.rglob("*")) == before  # nothing was begun
