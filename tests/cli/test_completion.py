"""What the shell offers when somebody presses the tab key."""

from pathlib import Path

import pytest

from featurepipe.heads.families import HEADS

TAB = """
import os, sys
os.environ |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "|", "_ARGCOMPLETE_STDOUT_FILENAME": "offered", "COMP_LINE": sys.argv[1],
               "COMP_POINT": str(len(sys.argv[1])), "_ARGCOMPLETE_SHELL": "bash"}
from featurepipe.cli import main
main([])
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("featurepipe extract photos --precision ", {"auto", "fp32", "bf16", "fp16"}),
        ("featurepipe extract photos --decode s", {"scaled"}),
        ("featurepipe depth photos --heads ", set(HEADS)),
        ("featurepipe train store --head linear", {"linear-svm"}),
        ("featurepipe extract photos --backbone efficientnet_lite", {f"efficientnet_lite{n}" for n in range(3)}),
        ("featurepipe train store --labels ", {"labels.csv"}),
        ("featurepipe verif", {"verify"}),
    ],
)
def test_what_the_shell_offers(line: str, expected: set[str], tmp_path: Path, launcher) -> None:
    pytest.importorskip("argcomplete")
    (tmp_path / "labels.csv").touch()
    launcher.start(TAB, [line], tmp_path).wait()
    offered = {word.strip() for word in (tmp_path / "offered").read_text(encoding="utf-8").split("|")}
    assert offered - {"offered"} == expected
