"""What is on the page, found by parsing it; that it asks for nothing from outside; that it is there whole or not at all."""

import copy
import itertools
import json
import math
import re

import numpy as np
import pytest

import featurepipe.reporting.report as report_module
from featurepipe.errors import UsageError
from featurepipe.reporting.blocks import Table, TableCell
from featurepipe.reporting.report import Features, write_report

COLUMN = "blocks.14:avg5x5"
HEADS = ["logistic", "xgboost", "knn"]  # of the document
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>'",
    "a & b &amp; c",
    "$$x^2$$",
    "</script><b>",
    "名前 🙂 é",
    "x" * 300,
)


def page_of(document, folder, **options):
    return write_report(document, folder / "page.html", silent=True, **options).read_text("utf-8")


def without_library(html: str) -> str:
    """The page but for Bokeh's own script, whose text has addresses in it."""
    return re.sub(r"/\* BEGIN bokeh.min.js \*/.*?/\* END bokeh.min.js \*/", "", html, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """t-SNE takes seconds; where it matters a test undoes this."""
    import featurepipe.reporting.images as projection

    monkeypatch.setattr(projection, "_tsne", lambda components, seed: components[:, :2] * 2.0)


@pytest.fixture(scope="module")
def plain(new_document, tmp_path_factory) -> str:
    """The page of the document alone."""
    return page_of(new_document(), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def whole(new_document, read_image, features, tmp_path_factory) -> str:
    """The page with images and a map."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featurepipe.reporting.images._tsne", lambda components, seed: components[:, :2] * 2.0)
        return page_of(new_document(), tmp_path_factory.mktemp("whole"), images=read_image, features=features)


def test_the_answer_and_every_number_of_the_nodes(plain, parsed):
    page = parsed(plain)
    assert page.texts["title"] == page.texts["h1"] == ["Which layer of efficientnet_lite0 transfers best to fashion?"]
    assert page.texts["p"][1] == (  # the first is for those without JavaScript
        "Take blocks.10:avg5x5 with a logistic head: 91.3\u00a0% accuracy (95\u00a0% interval 91.1 to 91.6\u00a0% "
        "over folds and seeds). Stopping the network there saves 38\u00a0% of its operations. "
        "The most accurate node, blocks.14:avg5x5, reaches 91.8\u00a0%."
    )
    nodes = next(k for k, row in enumerate(page.cells) if "share of cost" in row)
    groups, header, rows = page.cells[nodes - 1], page.cells[nodes], page.cells[nodes + 1 : nodes + 8]
    assert groups == ["", "Accuracy", "Cost", "Without fitting", "Difference to best", "Accuracy, random weights"]
    costs = ["share of cost", "ms per image", "width", "bytes"]
    assert header == ["Node", *HEADS, *costs, "LogME", *HEADS, *HEADS]  # accuracy first: a phone shows three columns
    chosen = [" ".join(cell.split()) for cell in rows[3]]
    assert chosen[0] == "blocks.10:avg5x5 ★ recommended"
    assert chosen[1] == "91.3 %91.1 to 91.6 %"
    assert chosen[4:9] == ["62 %", "16.4", "2,800", "5.6 kB", "0.710"]
    assert chosen[9] == "−0.48−0.68 to −0.28"
    assert [cell.split("%")[0].strip() for cell in chosen[12:]] == ["76.3", "75.2", "71.6"]
    assert [row[0].split()[-1] for row in rows].count("recommended") == 1
    assert rows[4][9] == "–"  # the best has no difference to itself


def test_the_other_source_has_its_table_and_where_known_its_errors(document, plain, tmp_path, read_image, parsed):
    page = parsed(plain)
    assert "On emoji-outlined" in page.texts["h2"]
    there = next(k for k, row in enumerate(page.cells) if "Accuracy there" in row)
    assert page.cells[there + 1] == ["Node", *HEADS, *HEADS]
    row = [" ".join(cell.split()) for cell in page.cells[there + 2 + 3]]
    assert [cell[:4] for cell in row[1:4]] == ["72.3", "71.2", "67.6"]
    assert row[4:] == ["−19.00"] * 3  # what a head loses there
    asked = []
    metrics = copy.deepcopy(document["details"]["metrics"])
    for mistake in metrics["mistakes"]["most_confident"]:
        mistake |= {"id": f"other/{mistake['id']}", "true": "Bag", "predicted": "Coat"}
    metrics["accuracy"]["value"] = 0.5678
    document["details_shifted"] = {"metrics": metrics}
    document["recommended"]["elsewhere"] = {
        "dataset": "emoji-outlined", "images": 360, "of_equal_id": 69, "accuracy": 0.72, "low": 0.7, "high": 0.74,
        "best": COLUMN, "best_accuracy": 0.73,
    }  # fmt: skip
    document["timing"] = {"device": "cpu", "precision": "fp32", "waited": 0.41}
    html = page_of(document, tmp_path, elsewhere=lambda id_: asked.append(id_) or read_image(id_))
    page = parsed(html)
    told = (
        "On emoji-outlined it has 72.0\u00a0% right (95\u00a0% interval 70.0 to 74.0\u00a0% over images); the best node there is "
        f"{COLUMN} with 73.0\u00a0%. 360 images were tested, each by every fold's head, 69 of them only by those that have "
        "not seen the image of equal id; this is the mean over those heads."
    )
    assert page.texts["p"].count(told) == 2  # in the answer, and where the other source is
    assert "per image on cpu, fp32, while 41\u00a0% of the time was waiting for a core" in html
    assert page.texts["caption"].count("Each class") == page.texts["h3"].count("Confusion matrix") == 2
    assert "56.8\u00a0%" in html
    assert asked == [f"other/test/{17 * k}" for k in range(20)]  # its own pictures, not those of equal ids here
    assert [image["alt"][:16] for image in page.all("img")] == ["Image other/test"] * 20
    del document["details_shifted"], document["test_dataset"]
    document["results"] = [row for row in document["results"] if row["tested_on"] == "source"]
    assert not any(title.startswith("On ") for title in parsed(page_of(document, tmp_path)).texts["h2"])


def test_points_have_names_for_those_who_do_not_see_them(plain, parsed):
    html = plain
    labels = [a["aria-label"] for a in parsed(html).all("div") if a.get("class") == "plot"]
    scores = next(label for label in labels if label.startswith("LogME"))
    assert "blocks.10:avg5x5, xgboost: LogME 0.710, accuracy 90.2\u00a0%" in scores
    assert scores.count("accuracy ") == 21
    assert "3\u00a0blocks.7:avg6x6, 4\u00a0blocks.10:avg5x5" in html  # the numbers beside the points
    assert re.search(r'"number",\["1","2","3","4","5","6","7"\]', html)


def test_accuracy_over_cost_has_every_point(document, plain, tmp_path, parsed):
    html = plain
    labels = [a["aria-label"] for a in parsed(html).all("div") if a.get("class") == "plot"]
    shares, times = (next(label for label in labels if label.startswith(t)) for t in ("Share of the", "Milliseconds"))
    assert "blocks.4:avg6x6, knn: 82.0\u00a0% at 33\u00a0%;" in shares
    assert "blocks.4:avg6x6, knn: 82.0\u00a0% at 8.20 ms;" in times
    assert shares.index("blocks.2") < shares.index("blocks.4") < shares.index("bottleneck")
    assert "logistic: 88.9\u00a0% with half of the operations or less (blocks.7:avg6x6), 91.8\u00a0% at most" in html
    for column in document["columns"]:
        column["ms_per_image"] = None  # a network that could not be timed
    html = page_of(document, tmp_path)
    labels = [a["aria-label"] for a in parsed(html).all("div") if a.get("class") == "plot"]
    assert any(label.startswith("Share of the operations") for label in labels)
    assert not any(label.startswith("Milliseconds") for label in labels)


def test_concatenations_similarity_scores_and_provenance(document, plain, parsed):
    html = plain
    page = parsed(html)
    joined = [row for row in page.cells if row[0].startswith("blocks.10:avg5x5 +\N{NO-BREAK SPACE}")]
    assert [row[3] for row in joined] == ["yes", "no difference shown"]
    assert "Most alike are blocks.2:avg6x6 and blocks.4:avg6x6 (0.70), least alike are" in html
    assert "logistic: Spearman 0.96, Kendall 0.90" in html
    for text in ("featurepipe depth photos", "2026-11-22T09:00:00+00:00", "300.25", "3.11.2", document["protocol"]):
        assert text in html


def test_two_intervals_of_one_accuracy_say_of_what_they_are(plain, document, tmp_path, parsed):
    page = parsed(plain)
    assert any("91.1 to 91.6\u00a0% over folds and seeds" in text for text in page.texts["dd"])
    assert any("The interval under Measures says less" in text for text in page.texts["p"])
    assert ["Measure", "Value", "95\u00a0% interval over test images"] in page.cells
    document["settings"] |= {"folds": None, "split": True}
    document["backbone"]["description"] = {"bottleneck": "flatten"}
    split = page_of(document, tmp_path)
    assert "flatten is the network&#39;s bottleneck." in split
    assert "(95\u00a0% interval 91.1 to 91.6\u00a0% over test images)" in split
    assert "The interval under Measures says less" not in split


def test_measures_of_grouped_images_say_of_how_many_groups(document, tmp_path, parsed):
    document["groups"] = document["details"]["metrics"]["groups"] = 143
    html = page_of(document, tmp_path)
    assert ["Measure", "Value", "95\u00a0% interval over groups"] in parsed(html).cells
    assert "Measures on 1,180 images, 143 groups" in html
    assert "in 143 groups, which count in intervals instead of images" in html
    assert "how far it may move with other test groups" in html


def test_two_accuracies_elsewhere_say_what_each_is(document, tmp_path):
    there = {"dataset": "away", "images": 91, "of_equal_id": 0, "accuracy": 0.5363, "low": 0.44, "high": 0.63,
             "best": COLUMN, "best_accuracy": 0.5363}  # fmt: skip
    document["recommended"]["elsewhere"] = there
    document["test_dataset"], document["details_shifted"] = "away", document["details"]
    html = page_of(document, tmp_path)
    assert "91 images were tested, each by every fold&#39;s head; this is the mean over those heads." in html
    assert "Counted below is one answer for each image, by one head" in html


def test_confusions_classes_and_mistakes(whole, parsed):
    html = whole
    page = parsed(html)
    assert (
        "1,079 of 1,180 images (91.4\u00a0%) are classified correctly. Most often mistaken: Shirt for T-shirt (8)"
        in html
    )
    pictures = page.all("img")
    assert len(pictures) == 20
    assert all(image["src"].startswith("data:image/") for image in pictures)
    assert pictures[1]["alt"] == "Image test/17: Trouser, taken for Sneaker with probability 99.6\u00a0%"
    assert page.row("Shirt")[1:4] == ["8", "1", "5"]


def test_a_bundle_has_the_same_page(bundle_document, tmp_path, read_image, features, parsed):
    html = page_of(bundle_document, tmp_path, images=read_image, features=features)
    page = parsed(html)
    assert page.texts["h1"] == ["How good is logistic on fashion, from blocks.10:avg5x5?"]
    assert page.texts["p"][1].startswith(
        "It classifies 91.4\u00a0% of 1,180 images correctly, 95\u00a0% interval 91.0 to 91.8\u00a0%"
    )
    assert "7 of these images (1.2\u00a0%) were trained on; without them the accuracy is 88.8\u00a0%." in html
    assert "3 images are there more than once, with different labels: a.png (Bag) = b.png (Coat); ...." in html
    titles = page.texts["h2"]
    assert titles[0] == "Answer"
    assert titles[-1] == "How this was measured"
    assert "Map of the images" in titles


def test_it_is_well_formed_and_accessible(whole, parsed):
    html = whole
    page = parsed(html)
    assert page.all("html")[0]["lang"] == "en"
    assert [len(page.all(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    levels = page.headings()
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    identities = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(identities) == len(set(identities))
    assert {link["href"][1:] for link in page.all("a")} <= set(identities)
    plots = [a for a in page.all("div") if a.get("class") == "plot"]
    assert len(plots) == 9  # two of curves, two over cost, CKA, scores, confusions, PCA and t-SNE
    assert all(a["role"] == "img" and len(a["aria-label"]) > 40 for a in plots)
    assert len(page.all("table")) == len(page.texts["caption"])
    assert all(a.get("scope") in {"col", "row", "colgroup"} for a in page.all("th"))
    assert all(image["alt"] for image in page.all("img"))
    assert all(a.get("aria-pressed") in {"true", "false"} for a in page.all("button"))


def test_nothing_is_asked_of_the_network(whole, parsed):
    html = whole
    own = without_library(html)
    assert len(html) - len(own) > 1_000_000  # the library is in the page
    for tag, attributes in parsed(html).elements:
        for name in ("src", "href", "data", "poster", "action", "srcset"):
            value = attributes.get(name)
            assert not value or value.startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"https?://|@import|url\(", own)
    policy = next(a["content"] for a in parsed(html).all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "http" not in policy


@pytest.fixture(scope="module")
def plain_tags():
    """The elements of a page of harmless names, once they are known."""
    return []


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["a", HOSTILE[1], *(pytest.param(text, marks=SLOW) for text in HOSTILE[2:] + HOSTILE[:1])]
)
def test_everything_from_the_document_is_escaped(document, tmp_path, plain_tags, text, read_image, features, parsed):
    changed = replaced(document, text)
    ids, values, labels, _ = features
    ids = [text, *ids[1:]]
    labels = [text if label == "Shirt" else label for label in labels]
    html = page_of(changed, tmp_path, images=read_image, features=Features(ids, values, labels))
    page = parsed(html)
    tags = [tag for tag, _ in page.elements if tag != "wbr"]  # ids may break behind a slash
    plain_tags[:] = plain_tags or tags
    assert tags == plain_tags  # no element more or less
    assert len(page.all("script")) == 4 + 1  # the library (two), the plots, ours, and the colours
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert any(text in heading for heading in page.texts["h1"])
    assert any(text in cell for row in page.cells for cell in row)
    assert any(text in (image["alt"] or "") for image in page.all("img"))
    if "<" in text:
        assert text not in html


def replaced(document, text):
    """A document in which dataset, one head, one node, one class, ids and the command are all ``text``."""
    changed = copy.deepcopy(document)
    changed["dataset"] = text
    changed["provenance"]["command"] = text
    for mistake in changed["details"]["metrics"]["mistakes"]["most_confident"]:
        mistake["id"] = text
    names = {"blocks.7:avg6x6": text, "knn": f"{text} head", "Shirt": f"{text} class"}

    def walk(value):
        if isinstance(value, dict):
            return {names.get(key, key): walk(part) for key, part in value.items()}
        if isinstance(value, list):
            return [walk(part) for part in value]
        return names.get(value, value) if isinstance(value, str) else value

    return walk(changed)


def test_text_in_plots_is_never_taken_for_formulas(document, tmp_path):
    """Bokeh loads MathJax from the network for an axis label between dollars."""
    html = page_of(replaced(document, "$$x$$"), tmp_path)
    labels = re.findall(r'"name":"PlainText","id":"p\d+","attributes":{"text":"\$\$x\$\$"}', html)
    assert len(labels) >= 4  # two panels of curves, and two sides of the similarities
    assert '"major_label_overrides":{"type":"map"' in html
    assert not re.search(r'"major_label_overrides":{"type":"map","entries":\[\[\d+,"', html)


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        "results",
        "columns",
        "rest",
        *(
            pytest.param(part, marks=SLOW)
            for part in ("concatenations", "recommended", "similarity", "transferability", "details", "provenance")
        ),
    ],
)
def test_what_is_missing_is_left_out(document, tmp_path, part, parsed):
    if part == "rest":
        for name in ("settings", "classes", "control", "test_dataset", "protocol", "images", "counts", "space"):
            document[name] = None
    elif part in {"results", "similarity", "details"}:
        document[part] = None
    else:
        del document[part]
    page = parsed(page_of(document, tmp_path))
    gone = {
        "results": "Accuracy over depth",
        "columns": "All nodes",
        "concatenations": "Nodes side by side",
        "recommended": "Answer",
        "similarity": "Similarity of nodes",
        "transferability": "Transferability without fitting",
        "details": "Most confident mistakes",
    }
    assert gone.get(part) not in page.texts["h2"]
    assert len(page.texts["h2"]) >= 6


def test_a_document_with_nothing_in_it_is_a_page(tmp_path, parsed):
    for kind in ("depth", "bundle"):
        html = page_of({"kind": kind, "version": 1}, tmp_path)
        assert len(parsed(html).texts["h1"]) == 1
        assert len(html) < 50_000  # no library for no plot


def test_numbers_that_are_none_become_dashes(document, tmp_path, parsed):
    document["columns"][0] |= {"ms_per_image": math.nan, "width": None, "bytes_per_image": math.inf}
    document["results"][0] |= {"low": None, "high": math.nan, "train_accuracy": math.nan}
    document["similarity"]["cka"][0][1] = None
    document["transferability"]["scores"]["blocks.2:avg6x6"] = math.nan
    html = page_of(document, tmp_path)
    page = parsed(html)
    row = next(row for row in page.cells if row[0] == "blocks.2:avg6x6" and len(row) > 10)
    assert row[1] == "84.2\u00a0%"
    assert [cell.strip() for cell in row[4:9]] == ["21\u00a0%", "–", "–", "–", "–"]
    assert "nan" not in " ".join(cell for row in page.cells for cell in row).lower()


@pytest.mark.slow
def test_an_existing_page_stays_until_the_new_one_is_complete(document, tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    target.write_text("old")

    def broken(*_):
        raise RuntimeError("stop")

    with monkeypatch.context() as patch:
        patch.setattr("featurepipe.reporting.page.render", broken)
        with pytest.raises(RuntimeError, match="stop"):
            write_report(document, target, silent=True)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: broken())
        with pytest.raises(RuntimeError, match="stop"):
            write_report(document, target, silent=True)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert write_report(document, str(target), silent=True) == target
    assert target.read_text("utf-8").endswith("</html>\n") or target.read_text("utf-8").endswith("</html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_other_documents_are_refused(document, tmp_path):
    with pytest.raises(
        UsageError, match=r"kind 'runs' has no page; kinds: depth, networks, routes, bundle, nights, images"
    ):
        write_report({"kind": "runs"}, tmp_path / "page.html")
    with pytest.raises(UsageError, match="version 1, not 2"):
        write_report(document | {"version": 2}, tmp_path / "page.html")
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere"):
        write_report(document, tmp_path / "nowhere" / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_the_map_takes_at_most_two_thousand_images_and_bounded_bytes(document, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (200, 200, 3), np.uint8)  # compresses badly
    n = 2100
    features = Features([f"i{k}" for k in range(n)], rng.normal(size=(n, 8)).astype(np.float32), ["a"] * n)
    monkeypatch.setattr(report_module, "_MAP_CHARACTERS", 1_500_000)
    asked = []
    path = write_report(document, tmp_path / "p.html", images=lambda id_: asked.append(id_) or noise, features=features)
    size = path.stat().st_size
    assert 2_500_000 < size < 1_500_000 + 1_268_000 + 700_000
    assert len(set(asked) - {f"test/{17 * k}" for k in range(20)}) == 2000
    assert "placing 2,000 of 2,100 images on a map" in capsys.readouterr().err


def test_the_page_can_be_drawn_without_images_features_or_labels(document, tmp_path, features, parsed):
    ids, values, *_ = features
    html = page_of(document, tmp_path, features=Features(ids, values, None))
    page = parsed(html)
    assert page.all("img") == []
    assert "no picture" in html
    assert "placed so that images with similar features are near each other" in html


def test_a_map_of_a_sample_says_of_how_many_images(document, tmp_path, features):
    html = page_of(document, tmp_path, features=features._replace(total=70_000))
    assert "600 of 70,000 images, drawn at random, placed so that" in html
    assert "All 600 images, placed so that" in page_of(document, tmp_path, features=features)


def test_many_classes_share_the_legend(document, tmp_path, parsed):
    rng = np.random.default_rng(0)
    labels = [f"class {k % 300}" for k in range(900)]
    features = Features([str(k) for k in range(900)], rng.normal(size=(900, 4)).astype(np.float32), labels)
    names = sorted(set(labels))
    counts = np.eye(300, dtype=int) * 3
    counts[5, 7] = 9
    metrics = document["details"]["metrics"]
    metrics["confusion"] = {"classes": names, "counts": counts.tolist()}
    metrics["confused"] = [{"true": names[5], "predicted": names[7], "count": 9}]
    html = page_of(document, tmp_path, features=features)
    keys = [a for a in parsed(html).all("button") if a.get("data-row") is not None]
    assert len(keys) == 25
    assert "other classes" in html
    assert "The 24 most frequent of 300 classes are told apart by colour and marker." in html
    assert "Shown are the 30 of 300 classes with the most mistakes; left out: " in html
    assert "The stronger a cell&#39;s colour, the larger its share of the images of its true class" in html
    assert "Numbers are per cent of the images of a true class" not in html  # there is no room for them
    assert 'class="panel dense"' in html
    assert "Classes most often mistaken for one another" in html  # all of them
    counts[8, 9] = 1
    metrics["confusion"]["counts"] = counts.tolist()
    fewer = page_of(document, tmp_path)
    assert "Classes most often mistaken for one another, the first 1 of 2 pairs" in fewer
    assert len(html) < 4_500_000


def test_few_nodes_are_named_in_two_lines_and_rejects_by_their_kind(document, tmp_path):
    document["similarity"] = None
    reason = "not-an-image: starts with GIF9; known are: JPEG"
    document["rejects"] = {"count": 2, "images": [{"id": "a.png", "reason": reason}, {"id": "b", "reason": "empty"}]}
    html = page_of(document, tmp_path)
    axis = html.split('"major_label_overrides":{"type":"map","entries":[', 1)[1].split("]]", 1)[0]
    lines = [re.split(r"\\+n", name) for name in re.findall(r'"text":"([^"]+)"', axis)]
    assert lines[3:] == [
        ["blocks.10:", "avg5x5"],
        ["blocks.14:", "avg5x5"],
        ["blocks.15:", "avg5x5"],
        ["bottleneck:", "gap"],
    ]
    assert html.count('"tags":["level where it fits"]') == 2  # here and elsewhere
    shown = html.split('<section id="rejects"', 1)[1].split("</section>", 1)[0]
    spans = re.findall(r"<span[^>]*>(.*?)</span>", shown)
    assert spans == ["not-an-image", "starts with GIF9; known are: JPEG", "a.png", "empty", "b"]


def test_what_was_asked_for_as_the_bottleneck_is_called_so_wherever_it_stands(document, tmp_path, parsed):
    """In sentences, tables, keys, on axes and in tooltips; not where a class has its name."""
    own, shown = "bottleneck:gap", "bottleneck (flatten:gap)"
    document = json.loads(json.dumps(document).replace(own, "flatten:gap"))
    document["backbone"]["description"] = {"bottleneck": "flatten"}
    document["recommended"]["not_told_apart"] = ["flatten:gap", "blocks.4:avg5x5"]
    document["details"]["metrics"]["per_class"][0]["class"] = "flatten:gap"
    document["details"]["column"] = "blocks.2:gap+flatten:gap"
    html = page_of(document, tmp_path)
    page = parsed(html)
    assert f": {shown}, blocks.4:avg5x5." in html
    assert f">logistic on blocks.2:gap + {shown} in detail<" in html
    assert f"On emoji-outlined at most 77.5\u00a0%, logistic at {shown}." in html
    firsts = [row[0] for row in page.cells]
    assert firsts.count("flatten:gap") == 1  # the class
    assert firsts.count(shown) > 10
    assert any(shown in row[1:] for row in page.cells)  # the header of the table of similarities
    axis = html.split('"major_label_overrides":{"type":"map","entries":[', 1)[1].split("]]", 1)[0]
    assert re.findall(r'"text":"([^"]+)"', axis)[-1].replace("\\\\n", " ").replace("\\n", " ") == shown


def test_a_bundles_figures_say_of_what_their_bounds_are(bundle_document, tmp_path, parsed):
    page = parsed(page_of(bundle_document, tmp_path))
    values = [text.replace("\u00a0", " ") for text in page.texts["dd"]]
    assert "91.4 % 95 % interval 91.0 to 91.8 %" in values
    bundle_document["evaluation"]["leakage"]["across_splits"]["examples"] = [
        [{"id": "a.png", "split": "test"}, {"id": "b.png", "split": "train"}]
    ]
    html = page_of(bundle_document, tmp_path)
    assert "id a.png, split test; id b.png, split train" in html


def test_a_confusion_matrix_of_short_names_has_them_level(document, tmp_path):
    document["similarity"] = None
    slants = r'"major_label_orientation":[\d.]+'
    slanted = len(re.findall(slants, page_of(document, tmp_path)))
    metrics = document["details"]["metrics"]
    metrics["confusion"]["classes"] = [str(k) for k in range(len(metrics["confusion"]["classes"]))]
    assert len(re.findall(slants, page_of(document, tmp_path))) == slanted - 1


def test_a_curve_says_what_it_was_tested_on_and_its_parameters_plainly(document, tmp_path, parsed):
    document["results"][0] |= {"params": [{"C": 100.0, "n_neighbors": 3}], "accuracy": 0.0}
    html = page_of(document, tmp_path)
    page = parsed(html)
    assert {"Tested on fashion", "Tested on emoji-outlined"} < set(page.texts["p"])
    first = next(place for place, row in enumerate(page.cells) if "Tested on" in row)
    header, every = page.cells[first], page.cells[first + 1 : first + 1 + len(document["results"])]
    assert header[:4] == ["Node", "Head", "Weights", "Tested on"]
    assert {row[3] for row in every} == {"fashion", "emoji-outlined"}
    assert sum(row[header.index("Parameters")] == "C 100, n neighbors 3" for row in every) == 1
    assert any(row[4].startswith("0.0\u00a0%") for row in every)  # nothing right is a result, too
    assert "On emoji-outlined at most 77.5\u00a0%, logistic at bottleneck:gap." in html


def test_long_tables_of_few_columns_stand_side_by_side_on_paper():
    def looks(columns: int, rows: int, *, sortable: bool = True) -> str:
        cells = tuple(TableCell(str(k)) for k in range(columns))
        return Table("", tuple(map(str, range(columns))), (cells,) * rows, sortable=sortable).looks

    assert looks(5, 13) == "sortable narrow"
    assert looks(3, 13, sortable=False) == "narrow narrower"
    assert looks(3, 12, sortable=False) == looks(6, 40, sortable=False) == ""
    assert looks(11, 1) == "many"


def test_records_leave_room_for_values_however_deep_they_are(bundle_document, tmp_path):
    bundle_document["bundle"]["metrics"] = {
        "calibration": {"ece": {"value": 0.25, "low": None}, "of": [{"a": 1}, {"b": {"c": {"d": 2}}}]},
        "test": {"accuracy": {"value": 0.98765}},
    }
    html = page_of(bundle_document, tmp_path)
    assert "<dd>value 0.25, low \N{EN DASH}</dd>" in html
    assert "<div>a 1</div>" in html
    assert "<dd>d 2</dd>" in html
    assert "0.98765" not in html  # what the training measured: the page measures now


def test_lines_do_not_end_inside_options(document, tmp_path):
    document["protocol"] = "Again with --retry-rejects <b>, or not--so"
    told = '<p>Again with <span class="option">--retry-rejects</span> &lt;b&gt;, or not--so</p>'
    assert told in page_of(document, tmp_path)


def test_many_nodes_have_few_labels_which_can_be_told_apart(document, tmp_path):
    names = [f"features.denseblock1.denselayer{k}.conv2.something:avg2x2" for k in range(40)]
    document["columns"] = [document["columns"][0] | {"column": name} for name in names]
    document["results"] = [document["results"][0] | {"column": name} for name in names]
    document["similarity"] = None
    html = page_of(document, tmp_path)
    axis = html.split('"major_label_overrides":{"type":"map","entries":[', 1)[1].split("]]", 1)[0]
    labels = re.findall(r'"text":"([^"]+)"', axis)
    assert len(labels) == len(set(labels)) == 14  # every third of forty
    assert [int(label.split()[0]) for label in labels] == list(range(1, 41, 3))


def test_colours_of_both_schemes_are_noted(plain):
    html = plain
    notes = json.loads(re.search(r'id="colours">(.*?)</script>', html, re.DOTALL)[1])
    known = set(re.findall(r'"id":"(p\d+)"', html))
    assert len(notes) > 60
    assert {note[0] for note in notes} <= known
    assert all(light != dark for _, _, light, dark in notes)
