"""What a night says names the keys of the job file, which its reader can change, and not options of a command line."""

import pytest

from featurepipe.errors import SourceError, UsageError
from featurepipe.jobs.validation import in_keys

TWO = '[[features]]\nbackbone = "lenet5"\nnodes = ["c3"]\n'


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        ("extract", "gone on purpose: --max-gone 100%", 'gone on purpose: [limits] max_gone = "100%"'),
        ("extract", "more than --max-gone 50% allows", 'more than [limits] max_gone = "50%" allows'),
        ("extract", "on purpose: --max-gone 1,200", "on purpose: [limits] max_gone = 1200"),
        ("extract", "less than the 20 GB of --min-free; all", "less than the 20 GB of [limits] min_free; all"),
        ("extract", "add --workers or use --decode gpu", 'add [machine] workers or use [[features]] decode = "gpu"'),
        ("extract", "another name: --dataset NAME", 'another name: dataset = "NAME"'),
        ("extract", "--weights none --seed N", '[[features]] weights = "none" [[features]] seed = "N"'),
        ("train", "a column with --node", "a column with [[train]] nodes"),
        ("train", "--labels FILE.csv", '[[train]] labels = "FILE.csv"'),
        ("train", "accept them with --min-class-size 1", "accept them with [[train]] min_class_size = 1"),
        ("train", "allow more with --memory, or", "allow more with [[train]] memory, or"),
        ("train", "--memory 4.0 GB is too little", '[[train]] memory = "4.0 GB" is too little'),
        ("depth", "give --labels FILE.csv", 'give [depth] labels = "FILE.csv"'),
        ("depth", "more than --max-width 9,000 allows", "more than [depth] max_width = 9000 allows"),
    ],
)
def test_options_become_keys(step, text, expected):
    assert in_keys(text, step) == expected


@pytest.mark.parametrize(
    "text",
    [
        "run: featurepipe extract SOURCE --store 'my store' --dataset photos --node c3",
        "run: pip install --upgrade featurepipe",
        "know who made the bundle: --trust-code, or trust_code=True in Python",
        "a--max-gone 3 is no option, nor is -- or a dash - or photos/--max.png",
        "",
    ],
)
def test_what_is_to_be_typed_or_has_no_key_stays(text):
    assert in_keys(text, "extract") == text


def errors(record):
    return "\n".join(entry["error"] for entry in record["steps"] if "error" in entry)


def test_limits_are_named_by_their_keys(pile):
    pile.fill(6)
    pile.run()
    for path in sorted(pile.root.iterdir())[:4]:
        path.unlink()
    gone = errors(pile.run())
    assert (
        'more than [limits] max_gone = "50%" allows. If they were deleted or renamed on purpose: [limits] max_gone = 4'
        in gone
    )
    with pytest.raises(SourceError, match=r"on purpose: \[limits\] max_gone = 4"):
        pile.run(dry_run=True)
    pile.fill(4)
    pile.write("bad.png", b"no image")
    assert 'more than [limits] max_rejects = "1%" allows' in errors(pile.run())
    pile.job('[limits]\nmin_free = "1000TB"\nmax_rejects = 1')
    assert "of [limits] min_free; everything" in errors(pile.run())


def test_networks_without_weights_are_told_of_their_keys(pile):
    pile.fill(1)
    pile.file.write_text(pile.file.read_text().replace('weights = "none"\n', ""))
    with pytest.raises(UsageError, match=r"features\[0\]\.weights: lenet5 has no pretrained weights") as told:
        pile.run()
    assert 'use [[features]] weights = "none"' in str(told.value)


def test_what_training_needs_is_named_by_its_keys(pile):
    pile.fill(3)
    pile.job('[[train]]\nout = "bundles/head"')
    told = errors(pile.run())
    assert 'give a CSV with the columns id and label: [[train]] labels = "FILE.csv"' in told
