"""What every answer says of the column that was asked for."""

from functools import partial

import pytest

import featurepipe
from featurepipe.curation.next_to_label import select, select_text
from featurepipe.curation.outliers import outliers, outliers_text
from featurepipe.curation.similar import similar, similar_text
from featurepipe.curation.suspects import labels, labels_text, plan_text
from featurepipe.evaluation.text import text as evaluation_text
from featurepipe.monitoring.duplicates import duplicates
from featurepipe.monitoring.text import duplicates_text
from featurepipe.training.text import cost_text

NAMED = "bottleneck (f6.1:gap)"


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (partial(similar, query_ids=["flat/0.png"]), similar_text),
        (outliers, outliers_text),
        (labels, labels_text),
        (partial(select, budget=3, labels={"flat/0.png": "flat"}), select_text),
    ],
    ids=["similar", "outliers", "labels", "select"],
)
def test_what_was_asked_for_as_the_bottleneck_is_called_so(kept, stripes, tmp_path, capsys, ask, text):
    found = ask(kept, to=tmp_path / "page.html", source=stripes[0] / "seen")
    assert (found["column"], found["bottleneck"]) == ("f6.1:gap", "f6.1")
    assert NAMED in text(found)
    assert NAMED in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert NAMED in capsys.readouterr().err


def test_plans_copies_and_heads_call_it_so_as_well(kept, tmp_path):
    assert NAMED in plan_text(labels(kept, dry_run=True, silent=True))
    assert f"by {NAMED}:" in duplicates_text(duplicates(kept, near="auto", silent=True))
    bundle = tmp_path / "bundle"
    assert f"seen, {NAMED}:" in cost_text(featurepipe.train(kept, out=bundle, dry_run=True, silent=True))
    featurepipe.train(kept, out=bundle, silent=True)
    assert f"lenet5 {NAMED}," in evaluation_text(featurepipe.evaluate(bundle, kept, split="all", silent=True))
    assert f"columns  {NAMED}: 84 values" in kept.features("seen").describe()
