"""Names in a job file that only the networks, the heads or the store can tell: said at once, with file and key."""

import subprocess
import sys

import pytest

from featurepipe.errors import UsageError
from featurepipe.jobs.plan import check_networks
from featurepipe.jobs.validation import read_job
from featurepipe.store import FeatureStore

SECOND = '[[features]]\nbackbone = "resnet999"\n'
MAIN = """
import sys
from featurepipe.errors import UsageError
from featurepipe.jobs.run import run_job
try:
    run_job(sys.argv[1])
except UsageError as error:
    print(error)
print("torch" in sys.modules)
"""
HEAD = '[[train]]\nout = "b"\nbackbone = "lenet5"\nparams = { depth = 3 }\n'


@pytest.fixture
def lines(pile):
    """The lines of the message, each without the file's name, which begins it."""

    def reading(rest, *, node="c3"):
        pile.file.write_text(pile.job(rest).read_text().replace('"c3"', f'"{node}"'))
        with pytest.raises(UsageError) as caught:
            check_networks(read_job(pile.file))
        found = str(caught.value).split("\n")
        assert all(line.startswith(f"{pile.file}: ") for line in found), found
        return [line.removeprefix(f"{pile.file}: ") for line in found]

    return reading


def test_all_names_at_once(lines):
    node, network, head = lines(SECOND + HEAD, node="botleneck")
    assert node.startswith("features[0].nodes: unknown node 'botleneck' in lenet5; nearest: bottleneck")
    assert network.startswith("features[1].backbone: unknown backbone 'resnet999'; nearest: resnet")
    assert head.startswith("train[0].params: ")
    assert "depth" in head


def test_what_is_wrong_in_the_file_itself_is_said_without_loading_networks(pile):
    """Whoever mends a job file need not wait for torch between two tries; nor does a second run of a job."""
    pile.job(SECOND + '[keep]\nruns = "all"\n')
    found = subprocess.run([sys.executable, "-c", MAIN, pile.file], capture_output=True, text=True, check=True).stdout
    assert found == f"{pile.file}: keep.runs = 'all': must be a whole number\nFalse\n"


def test_a_dry_run_names_the_first_networks_key(pile):
    pile.fill(1)
    pile.file.write_text(pile.file.read_text().replace('"c3"', '"botleneck"'))
    with pytest.raises(UsageError) as caught:
        pile.run(dry_run=True)
    assert str(caught.value).startswith(
        f"{pile.file}: features[0].nodes: unknown node 'botleneck' in lenet5; nearest: bottl"
    )


def misspelt(pile, wrong: str) -> None:
    pile.fill(1)
    lines = pile.file.read_text().splitlines()
    key = wrong.partition(" = ")[0]
    pile.file.write_text("\n".join(wrong if line.startswith(f"{key} = ") else line for line in lines))


def test_a_night_names_the_first_networks_nodes(pile):
    """They are looked up only when its turn comes, so that what is wrong is a step's failure."""
    misspelt(pile, 'nodes = ["c3", "botleneck"]')
    record = pile.run()
    (failed,) = (entry for entry in record["steps"] if entry["status"] == "failed")
    assert failed["error"].startswith(f"{pile.file}: features[0].nodes: unknown node 'botleneck' in lenet5"), failed
    assert (failed["name"], record["exit_code"]) == ("lenet5", 2)


@pytest.mark.parametrize("wrong", ['weights = "efficientnet_lite0.pt"', 'backbone = "timm/nonesuch"'])
def test_a_night_does_not_begin_with_a_first_network_that_there_is_not(pile, wrong):
    misspelt(pile, wrong)
    with pytest.raises(UsageError, match=rf"nightly\.toml: features\[0\]\.{wrong.partition(' = ')[0]}: "):
        pile.run()
    assert pile.records() == []


def test_a_reference_that_the_store_does_not_have(pile, lines):
    drift = '[drift]\nreference = "19990909T090909999999Z-99999999"\n'
    pile.job(drift)
    check_networks(read_job(pile.file))  # no store yet: nobody knows
    pile.fill(2)
    pile.job()
    pile.run()
    (line,) = lines(drift)
    assert line.startswith(
        "drift.reference: unknown snapshot '19990909T090909999999Z-99999999'; choices: previous, first"
    )
    known = FeatureStore(pile.folder / "features").snapshot_ids("pile")
    [night] = [run["run_id"] for run in pile.records() if run["command"] == "run"]
    assert night not in known
    for there in (known[0], night):  # a job's run means the snapshot that it left, as it does for drift
        pile.job(f'[drift]\nreference = "{there}"\n')
        check_networks(read_job(pile.file))


def test_the_night_does_not_begin_with_such_a_reference(pile):
    pile.fill(2)
    pile.job('[drift]\nreference = "19990909T090909999999Z-99999999"\n')
    with pytest.raises(UsageError, match=r"drift\.reference: unknown snapshot"):
        pile.run()
    assert pile.records() == []
