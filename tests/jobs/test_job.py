"""Job files: what they mean, and what is said of those that are wrong."""

import json
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from featurepipe.errors import UsageError
from featurepipe.jobs.job import BaseTable, FeaturesTable, Job, LimitsTable, SourceTable, TrainTable
from featurepipe.jobs.validation import read_job

LEAST = """
store = "features"
[source]
path = "photos"
[[features]]
"""
FULL = """
name = "nights"
store = "../features"
dataset = "photos-2026"

[source]
path = "s3://bucket/photos"
labels = "labels.csv"
retries = 3
first_wait = "30s"
longest_wait = "1h30m"
moved_from = "/mnt/photos"
only_under = ["photos", "s3://bucket/photos"]
path_column = "photo"
box = "x,y,w,h"
box_unit = "share"
box_margin = 0.25
images = "pics"
frames = "all"

[[features]]
backbone = "resnet50"
nodes = ["layer3", "bottleneck"]
precision = "fp32"

[[features]]
backbone = "timm/vit"
weights = "mine.safetensors"
nodes = "blocks.2:gmp"
dtype = "float32"

[machine]
device = "cuda:1"
batch_size = 64
workers = 4

[limits]
max_rejects = 10
time_budget = "6h"
min_free = "20GB"
max_gone = "2.5%"

[forget]
ids = "withdrawn.csv"
at_most = 20
look_in = ["reports", "/srv/pages"]

[[train]]
out = "bundles/a"
nodes = ["layer3:gap", "bottleneck"]
head = "linear-svm"
params = { C = 0.1 }
pca = 64
when = "always"

[[predict]]
bundle = "bundles/a"
to = "predictions/{job}/{date}-{run}.parquet"

[drift]
reference = "first"
columns = ["bottleneck"]
bundle = "bundles/a"
fail = 1e-6

[compact]

[keep]
snapshots = 10

[depth]
backbone = "resnet50"
heads = ["logistic", "knn"]
report = "/srv/depth.html"

[report]
to = "nights.html"

[metrics]
prometheus = "~/featurepipe.prom"
"""


@pytest.fixture
def read(tmp_path):
    def reading(text, name="nightly.toml"):
        (tmp_path / name).write_text(text)
        return read_job(tmp_path / name)

    return reading


@pytest.fixture
def problems(tmp_path, read):
    """The lines of the message, each without the file's name, which begins it."""

    def reading(text, name="nightly.toml"):
        with pytest.raises(UsageError) as caught:
            read(text, name)
        start = f"{tmp_path / name}: "
        lines = str(caught.value).split("\n")
        assert all(line.startswith(start) for line in lines), lines
        return [line.removeprefix(start) for line in lines]

    return reading


def test_defaults(read, tmp_path):
    job = read(LEAST)
    assert job.file == tmp_path / "nightly.toml"
    assert job.model_dump() == Job(
        name="nightly", store=tmp_path / "features", source=SourceTable(path=str(tmp_path / "photos")),
        features=(FeaturesTable(),),
    ).model_dump()  # fmt: skip
    assert (job.dataset, job.train, job.predict, job.export) == (None, (), (), ())
    assert (job.forget, job.drift, job.depth, job.compact, job.keep, job.report, job.metrics) == (None,) * 7
    assert (job.source.retries, job.source.first_wait, job.source.longest_wait) == (5, 10, 600)
    assert job.features[0].nodes == ("bottleneck",)
    assert job.limits == LimitsTable(max_rejects="1%", time_budget=None, min_free=None, max_gone="50%")


def test_all_that_can_be_said(read, tmp_path):
    job = read(FULL)
    assert (job.name, job.store, job.dataset) == ("nights", tmp_path.parent / "features", "photos-2026")
    assert job.source.model_dump() == {
        "path": "s3://bucket/photos", "labels": tmp_path / "labels.csv", "retries": 3, "first_wait": 30.0,
        "longest_wait": 5400.0, "moved_from": ("/mnt/photos",),
            "only_under": (str(tmp_path / "photos"), "s3://bucket/photos"), "path_column": "photo",
            "box": "x,y,w,h", "box_unit": "share", "box_margin": 0.25, "images": str(tmp_path / "pics"),
            "frames": "all",
    }  # fmt: skip
    first, second = job.features
    assert (first.nodes, first.weights, first.precision) == (("layer3", "bottleneck"), "DEFAULT", "fp32")
    assert (second.nodes, second.weights) == (("blocks.2:gmp",), str(tmp_path / "mine.safetensors"))
    assert job.machine.model_dump() == {"device": "cuda:1", "batch_size": 64, "workers": 4, "engine": "auto"}
    assert job.limits.model_dump() == {
        "max_rejects": 10, "time_budget": 21600.0, "min_free": "20GB", "max_gone": "2.5%", "damaged": "reject",
    }  # fmt: skip
    assert job.forget.model_dump() == {
        "ids": tmp_path / "withdrawn.csv", "at_most": 20, "look_in": (str(tmp_path / "reports"), "/srv/pages"),
    }  # fmt: skip
    (train,) = job.train
    assert (train.out, train.head, train.params, train.pca) == (tmp_path / "bundles/a", "linear-svm", {"C": 0.1}, 64)
    assert isinstance(train.pca, int)
    (predict,) = job.predict
    assert predict.bundle == train.out
    assert (
        predict.file(date="2026-11-22", run="r1", job="nights") == tmp_path / "predictions/nights/2026-11-22-r1.parquet"
    )
    assert (job.drift.reference, job.drift.columns, job.drift.warn, job.drift.fail) == (
        "first",
        ("bottleneck",),
        0.01,
        1e-6,
    )
    assert (job.keep.snapshots, job.keep.runs) == (10, 365)
    assert (job.depth.heads, job.depth.report) == (("logistic", "knn"), Path("/srv/depth.html"))
    assert (job.report.to, job.report.last) == (tmp_path / "nights.html", 30)
    assert job.metrics.prometheus == Path("~/featurepipe.prom").expanduser()


def tables_below(table):
    return [one for below in table.__subclasses__() for one in (below, *tables_below(below))]


def test_a_job_never_changes_and_every_key_is_explained(read):
    job = read(FULL)
    with pytest.raises(ValidationError):
        job.name = "other"
    json.dumps(job.model_dump(mode="json"))
    tables = tables_below(BaseTable)
    assert {table.__name__ for table in tables} >= {"Job", "TrainTable", "SelectTable", "MetricsTable"}
    unexplained = [
        f"{table.__name__}.{name}" for table in tables for name, field in table.model_fields.items()
        if not (field.description or "").endswith(".")
    ]  # fmt: skip
    assert unexplained == []


def test_braces_in_the_folder_are_no_placeholders(tmp_path):
    folder = tmp_path / "{date} of {x}"
    folder.mkdir()
    (folder / "job.toml").write_text(LEAST + '[[train]]\nout = "b"\n[[predict]]\nbundle = "b"\nto = "{run}.csv"\n')
    (predict,) = read_job(folder / "job.toml").predict
    assert predict.file(date="d", run="r", job="j") == folder / "r.csv"


def test_columns_and_orders_are_read_as_on_the_command_line(tmp_path):
    lines = (
        '[[train]]\nout = "b"\nmultilabel = "nodule, line"\n[[train]]\nout = "c"\nordered = "mild<moderate<severe"\n'
    )
    (tmp_path / "job.toml").write_text(LEAST + lines)
    labels, grades = read_job(tmp_path / "job.toml").train
    assert labels.multilabel == ("nodule", "line")
    assert grades.ordered == ("mild", "moderate", "severe")


@pytest.mark.parametrize("name", ["nightly.toml", "layer_depth.toml", "train_heads.toml"])
def test_the_jobs_to_copy_can_be_read(name):
    read_job(Path(__file__).parents[2] / "pipelines" / name)


ARCHIVES = Path(__file__).parents[1] / "archives" / "jobs-v1"


def same(then, now):
    """Whether everything that was read then is read now; what came since is beside it. Of nothing there is one kind now."""
    if isinstance(then, dict):
        return (not then and now is None) or all(key in now and same(value, now[key]) for key, value in then.items())
    if isinstance(then, list):
        return (not then and now is None) or (
            len(then) == len(now) and all(same(*pair) for pair in zip(then, now, strict=True))
        )
    return then == now


@pytest.mark.parametrize("name", ["every_key.toml", "layer_depth.toml", "nightly.toml", "train_heads.toml"])
def test_job_files_written_before_executors_came_are_read_as_then(name, tmp_path):
    """`as_read.json` is what the code of then (the parent of commit a815eb6) read, paths from FOLDER on."""
    shutil.copytree(ARCHIVES, folder := tmp_path / "jobs-v1")
    now = json.dumps(read_job(folder / name).model_dump(mode="json"))
    now = json.loads(now.replace(str(folder), "FOLDER").replace(str(tmp_path), "FOLDER/.."))
    then = json.loads((ARCHIVES / "as_read.json").read_text())[name]
    different = {key: (value, now.get(key)) for key, value in then.items() if not same(value, now.get(key))}
    assert different == {}


def test_what_cannot_be_read(problems, tmp_path):
    with pytest.raises(UsageError, match=r"no\.toml: cannot be read: No such file"):
        read_job(tmp_path / "no.toml")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_job(tmp_path)
    (tmp_path / "latin.toml").write_bytes('store = "\xe9"'.encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8"):
        read_job(tmp_path / "latin.toml")
    (line,) = problems('store = "a"\nstore = "b"\n')
    assert line.startswith("not TOML: ")
    assert "line 2" in line
    (line,) = problems("[source\npath = 1")
    assert "line 1" in line


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('[[train]]\nout = "b"\nhed = "knn"', "train[0].hed: unknown key; nearest: head"),
        ('[limits]\nmin_fre = "1GB"', "limits.min_fre: unknown key; nearest: min_free"),
        ("[drifd]", "drifd: unknown key; nearest: drift"),
        ('[machine]\ntime_budget = "6h"', "machine.time_budget: unknown key; it belongs to [limits]"),
        ('[limits]\ndataset = "x"', "limits.dataset: unknown key; it belongs to the top of the file, before the first table"),
        ("[keep]\ndays = 3", "keep.days: unknown key; choices: snapshots, runs"),
        ('[forget]\nids = "gone.txt"', "forget.at_most: is missing: the most images that may leave the store in a night"),
        ('[forget]\nids = "gone.txt"\nat_most = 0', "forget.at_most = 0: must be at least 1"),
        ('[forget]\nids = "x.csv"\nat_most = 1\n[[outliers]]\nto = "x.csv"', "forget.ids = "),
        ('[[export]]\nto = "x"', "export[0].node: is missing: the column, `NODE` or `NODE:POOLING`"),
        ("[compact]\nparts = 3", "compact.parts: unknown key; this table has none"),
        ("[report]", "report.to: is missing: the HTML file"),
        ("[metrics]", "metrics.prometheus: is missing: the text file for Prometheus' node exporter, `.prom`"),
        ("[[train]]", "train[0].out: is missing: folder of the bundle; the last one is replaced once the new one is complete"),
        ('[train]\nout = "b"', "train: write [[train]], with double brackets: there may be several"),
        ("[[drift]]", "drift: write [drift], with single brackets: there is only one"),
        ('[machine]\nworkers = "4"', "machine.workers = '4': must be a whole number"),
        ("[machine]\nworkers = 0", "machine.workers = 0: must be at least 1"),
        ("[depth]\njobs = 99999", "depth.jobs = 99999: must be at most 1024"),
        ('[[train]]\nout = "b"\njobs = 99999', "train[0].jobs = 99999: must be at most 1024"),
        ("[machine]\nworkers = true", "machine.workers = true: must be a whole number"),
        ("[machine]\nbatch_size = 2.5", "machine.batch_size = 2.5: must be 'auto' or a number from 1"),
        ("[machine]\nbatch_size = true", "machine.batch_size = true: must be 'auto' or a number from 1"),
        ("[machine]\ndevice = 1", "machine.device = 1: must be text"),
        ('[limits]\nmax_gone = "half"', "limits.max_gone = 'half': must be a number of images such as 10, or a share"),
        ("[limits]\nmin_free = -1", "limits.min_free = -1: is no amount of space; give bytes or text such as '500MB'"),
        ("[drift]\nwarn = 1", "drift.warn = 1: must be a p-value between 0 and 1"),
        ("[drift]\nwarn = 0", "drift.warn = 0: must be a p-value between 0 and 1"),
        ('[[train]]\nout = "b"\nhead = "logistik"', "train[0].head = 'logistik': unknown head 'logistik'; nearest: logistic"),
        ('[[train]]\nout = "b"\nwhen = "sundays"', "train[0].when = 'sundays': unknown value 'sundays'; choices: labels changed, "
                                                  "always"),
        ('[[train]]\nout = "b"\ntune = "yes"', "train[0].tune = 'yes': must be true or false"),
        ('[[train]]\nout = "b"\nparams = 3', "train[0].params = 3: must be a table"),
        ('[[train]]\nout = "b"\nlabel = "a"\ntarget = "b"', "train[0]: label and target are two kinds of target"),
        ('[depth]\nlabel = "a"\nsplit_column = 3', "depth.split_column = 3: must be the name of a column"),
        ('[[train]]\nout = "b"\nnodes = []', "train[0].nodes = []: must not be empty"),
        ('[[train]]\nout = ""', "train[0].out = '': must not be empty"),
        ('[[train]]\nout = "~nouser/x"', "train[0].out = '~nouser/x': this machine has no home folder for '~nouser'; write"),
        ('[[train]]\nout = "a\\u0000b"', "train[0].out = 'a\\x00b': cannot be a path: it has a NUL character"),
        ('[[train]]\nout = "b"\npca = inf', "train[0].pca = inf: must be a whole number of components from 1, or a share of the"),
        ('[[train]]\nout = "b"\npca = nan', "train[0].pca = nan: must be a whole number of components from 1"),
        ('[[train]]\nout = "b"\npca = 2.7', "train[0].pca = 2.7: must be a whole number of components from 1"),
        ('[[train]]\nout = "b"\npca = true', "train[0].pca = true: must be a whole number of components from 1"),
        ('[drift]\nreference = "yesterday"', "drift.reference = 'yesterday': unknown reference 'yesterday'; choices: previous, "
                                             "first; or the run id of a snapshot, such as 2026"),
        ("[drift]\ncolumns = []", "drift.columns = []: must not be empty"),
        ('nodes = ["layer3", "bottleneck"]\n[depth]\ntarget = "age"\nmultilabel = ["a"]',
         "depth: target and multilabel are two kinds of target"),
        ('nodes = ["layer3", "bottleneck"]\n[depth]\ntarget = "age"\nheads = ["logistic"]',
         "depth: head 'logistic' learns multiclass and multilabel"),
        ('[routes]\nroutes = ["tale"]', "routes.routes = ['tale']: unknown route 'tale'; nearest: tail"),
        ('[routes]\ntarget = "age"\nmultilabel = ["a"]', "routes: target and multilabel are two kinds of target"),
        ('[[finetune]]\nout = "b"\nfrom_node = ["layer3", "images"]',
         "finetune[0].from_node = ['layer3', 'images']: cannot be images beside nodes"),
        ('[depth]\nheads = ["logistic", "tree"]', "depth.heads = ['logistic', 'tree']: unknown head 'tree'; choices: "),
    ],
)  # fmt: skip
def test_one_problem(problems, lines, problem):
    (line,) = problems(LEAST + lines)
    assert line.startswith(problem)
    assert len(line) < 250


def test_where_features_can_be_handed_on(problems):
    suffix, replaced = problems(
        f'{LEAST}[[export]]\nnode = "a"\nto = "x.csv"\n[[export]]\nnode = "a"\nto = "folder"\nimages = "new"'
    )
    assert suffix.endswith("x.csv': the suffix must be one of .parquet, .h5, .npz, or there is none: a folder")
    assert replaced.startswith("export[1].to = ")
    assert 'put {date} or {run} in, or images = "all"' in replaced


@pytest.mark.parametrize("given", ["'6 parsecs'", "'-6h'", "0", "true", "'6h30'", "''", "[6]"])
def test_time_budgets_that_are_none(problems, given):
    (line,) = problems(f"{LEAST}[limits]\ntime_budget = {given}")
    assert line.startswith("limits.time_budget = ")
    assert "is no duration; give seconds or text such as '90s'" in line


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('[[predict]]\nbundle = "b"\nto = "{day}.csv"\n[[train]]\nout = "b"',
         "predict[0].to = '{day}.csv': unknown placeholder 'day'; nearest: date"),
        ('[[predict]]\nbundle = "b"\nto = "p/{date:>5d}.csv"\n[[train]]\nout = "b"',
         "predict[0].to = 'p/{date:>5d}.csv': a placeholder takes no format; write {date}"),
        ('[[predict]]\nbundle = "b"\nto = "{run!r}.csv"\n[[train]]\nout = "b"',
         "predict[0].to = '{run!r}.csv': a placeholder takes no format; write {run}"),
        ('[[predict]]\nbundle = "b"\nto = "~nouser/{run}.csv"\n[[train]]\nout = "b"',
         "predict[0].to = '~nouser/{run}.csv': this machine has no home folder"),
        ('[[predict]]\nbundle = "b"\nto = "{date.csv"\n[[train]]\nout = "b"', "predict[0].to = '{date.csv': a brace without"),
        ('[[train]]\nout = "b"\n[[predict]]\nbundle = "b"\nto = "{run}.xls"', "predict[0].to = "),
        ('[[train]]\nout = "b"\n[[predict]]\nbundle = "b"\nto = "new.csv"', "predict[0].to = "),
        ('[[predict]]\nbundle = "b"\nto = "{run}.csv"', "predict[0].bundle = "),
        ('[drift]\nbundle = "b"', "drift.bundle = "),
        ('[drift]\ncolumns = ["bottelneck"]',
         "drift.columns = 'bottelneck': unknown column 'bottelneck' in [[features]]; nearest: bottleneck"),
        ('[[train]]\nout = "b"\nnodes = ["layer3"]', "train[0].nodes = 'layer3': unknown column 'layer3' in [[features]]"),
        ('[[train]]\nout = "b"\nbackbone = "resnet5"', "train[0].backbone = 'resnet5': unknown network 'resnet5' in "
                                                       "[[features]]; nearest: resnet50"),
        ('[[train]]\nout = "b"\n[[train]]\nout = "./c/../b"', "train[1].out = "),
        ('[report]\nto = "nights.pdf"', "report.to = "),
        ('[metrics]\nprometheus = "nights.txt"', "metrics.prometheus = "),
        ('nodes = ["layer3", "bottleneck"]\n[report]\nto = "a.html"\n[depth]\nreport = "a.html"', "report.to = "),
        ("[drift]\nfail = 0.1", "drift.fail = 0.1: is above drift.warn, 0.01: it would fail before it warns"),
        ('[[features]]\nnodes = ["layer3"]', "features[1].backbone = 'resnet50': the same network as features[0]"),
    ],
)  # fmt: skip
def test_impossible_combinations(problems, lines, problem):
    (line,) = problems(LEAST + lines)
    assert line.startswith(problem)


def test_waits_and_decoding(problems):
    source = 'store = "s"\n[source]\npath = "p"\nfirst_wait = "1h"\n'
    assert problems(source + '[[features]]\ndecode = "gpu"\n[machine]\ndevice = "cpu"') == [
        "source.first_wait: 3600 s is longer than longest_wait, 600 s",
        "features[0].decode = 'gpu': needs a CUDA device, and machine.device is \"cpu\"",
    ]  # fmt: skip
    (line,) = problems(LEAST + 'intensity = "12"\n[[features]]\nintensity = "window=-160:240"')
    assert line.startswith("features[0].intensity = '12': unknown intensity '12'; choices: declared, full, bits=N")


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (
            '[limits]\ntime_budget = "99999999999999999999d"',
            "limits.time_budget = '99999999999999999999d': '99999999999999999999d' is too long: ",
        ),
        (
            "[machine]\nbatch_size = 1000000000000",
            "machine.batch_size = 1000000000000: must be 'auto' or a number from 1 to 65536",
        ),
        ("[machine]\nworkers = 100000", "machine.workers = 100000: must be at most 1024"),
    ],
)
def test_absurd_values(problems, lines, problem):
    """What no machine can do is refused now, and not by an error from within a library at night."""
    (line,) = problems(LEAST + lines)
    assert line.startswith(problem)


@pytest.mark.parametrize(("file", "name"), [("my photos.toml", "my-photos"), ("\N{CRESCENT MOON}.toml", "nightly")])
def test_a_file_whose_name_cannot_be_the_jobs(read, file, name):
    with pytest.raises(UsageError) as caught:
        read(LEAST, file)
    assert str(caught.value).endswith(f'cannot be one: write name = "{name}" at the top of the file')
    assert read(f'name = "{name}"\n{LEAST}', file).name == name


def test_keys_at_the_top(problems):
    """A home folder of nobody, and a key with a dot in it, which is not the table before the dot."""
    assert problems(LEAST.replace('"features"', '"~nouser/x"')) == [
        "store = '~nouser/x': this machine has no home folder for '~nouser'; write ./~nouser for a folder of that name"
    ]
    (line,) = problems('"a.b" = 1\n' + LEAST)
    assert line.startswith("a.b: unknown key; choices: name, store")


def test_what_numbers_and_references_may_be(read):
    text = LEAST + '[limits]\ntime_budget = "6 hours"\n[drift]\nreference = "20261122T134738337288Z-06a887b5"\n'
    job = read(text + '[[train]]\nout = "a"\npca = 0.95\n[[train]]\nout = "b"\npca = 64.0')
    assert job.limits.time_budget == 21600
    assert job.drift.reference == "20261122T134738337288Z-06a887b5"
    assert [repr(table.pca) for table in job.train] == ["0.95", "64"]


@pytest.mark.parametrize(
    ("out", "key"),
    [
        ("features", "store"),
        ("features/spaces/b", "store"),
        ("photos/bundle", "source.path"),
        ("photos", "source.path"),
    ],
)
def test_a_bundle_is_not_put_among_images_or_into_the_store(problems, tmp_path, out, key):
    (line,) = problems(f'{LEAST}[[train]]\nout = "{out}"')
    folder = tmp_path / {"store": "features", "source.path": "photos"}[key]
    assert line.startswith("train[0].out = ")
    assert line.endswith(f": a bundle has a folder of its own, apart from {key}, {folder}")


def test_folders_whose_names_begin_alike_are_apart(read, problems):
    read(LEAST + '[[train]]\nout = "features-bundle"')
    assert len(problems(LEAST + '[[train]]\nout = "."')) == 2  # holds the store and the images


def test_one_column_cannot_be_compared(read, problems):
    (line,) = problems(LEAST + "[depth]")
    assert line.startswith("features[0].nodes = ['bottleneck']: [depth] compares two columns or more of a network")
    (line,) = problems(LEAST + 'nodes = ["layer3", "layer3:gap"]\n[depth]')
    assert line.startswith("features[0].nodes = ['layer3', 'layer3:gap']: [depth] compares")
    (line,) = problems(TWO + '[depth]\nbackbone = "resnet50"')
    assert line.startswith("features[0].nodes = ['bottleneck']: [depth] compares")
    read(TWO + '[depth]\nbackbone = "resnet18"')


TWO = LEAST + '[[features]]\nbackbone = "resnet18"\nnodes = ["bottleneck", "layer2"]\n'


def test_which_of_two_networks(read, problems):
    assert problems(TWO + '[[train]]\nout = "b"\n[depth]') == [
        "train[0].backbone: is missing: which network? choices: resnet50, resnet18",
        "depth.backbone: is missing: which network? choices: resnet50, resnet18",
    ]
    read(TWO + '[[train]]\nout = "b"\nnodes = ["layer2"]')  # one of them has it
    read(TWO + '[[train]]\nout = "b"\nbackbone = "resnet18"\n[depth]\nbackbone = "resnet18"')
    read(TWO + '[[train]]\nout = "b"\nbackbone = "resnet18-0123abcd"')  # a feature space by its name
    read(TWO + '[[train]]\nout = "b"\nnodes = "recommended"')
    read(TWO + '[[train]]\nout = "b"\nnodes = "all"\nselect = "auto"')
    read(TWO + '[[train]]\nout = "b"\nnodes = "all"\nbackbone = "resnet18"\nselect = 0.05')
    (line,) = problems(TWO + '[[train]]\nout = "b"\nbackbone = "resnet50"\nnodes = ["layer2", "bottleneck"]')
    assert line == (
        "train[0].nodes = ['layer2', 'bottleneck']: [[features]] has not all of these of resnet50; choices: bottleneck"
    )


def test_two_of_one_network(read, problems):
    two = LEAST + '[[features]]\nweights = "none"\nnodes = ["bottleneck", "layer2"]\n'
    (line,) = problems(two + '[[train]]\nout = "b"\nbackbone = "resnet50"')
    assert line.startswith(
        "train[0].backbone = 'resnet50': several [[features]] are of this network; name the feature space"
    )
    read(two + '[[train]]\nout = "b"\nbackbone = "resnet50-0123"')
    read(two + '[[train]]\nout = "b"\nbackbone = "resnet50"\nnodes = "layer2"')


def test_all_blocks_and_shares_of_their_values(read, problems):
    job = LEAST + 'nodes = "all"\n'
    read(job + '[depth]\n[[train]]\nout = "b"\nnodes = "all"\nselect = "auto"')
    read(job + '[[train]]\nout = "b"\nnodes = ["layer1.0:avg4x4", "layer2.1:avg4x4"]')  # the night will tell
    (line,) = problems(job + '[[train]]\nout = "b"\nselect = 1.5')
    assert line.startswith("train[0].select")
    assert "above 0 and at most 1" in line


def test_columns_with_and_without_pooling(read):
    job = LEAST + 'nodes = ["layer3:gap", "layer2", "layer2:gmp"]\n'
    read(job + '[[train]]\nout = "b"\nnodes = ["layer3", "layer2:gap", "layer2:gmp"]')


def test_a_bundle_that_is_there(read, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/bundle.json").write_text("{}")
    job = read(LEAST + '[[predict]]\nbundle = "old"\nto = "{date}.jsonl"\n[drift]\nbundle = "old"')
    assert job.drift.bundle == tmp_path / "old"


def test_everything_is_said_at_once(problems):
    found = problems("""
stor = "features"
time_budget = "6h"
[source]
path = 7
[[features]]
nodes = ["layer3", "bottleneck"]
precison = "fp32"
[limits]
max_rejects = -1
[[train]]
out = "b"
[[predict]]
bundle = "c"
to = "{run}.csv"
[drift]
columns = ["bottleneck:gmp"]
fail = 0.5
[report]
to = "a.txt"
""")
    keys = [line.partition(" ")[0].rstrip(":") for line in found]
    assert keys == [
        "store", "source.path", "features[0].precison", "limits.max_rejects", "stor", "time_budget",
        "predict[0].bundle", "drift.fail", "report.to",
    ]  # fmt: skip
    assert not any("bottleneck:gmp" in line for line in found)  # the nodes are not known for sure


def test_a_name_that_cannot_be_one(problems):
    (line,) = problems('name = "my job"' + LEAST)
    assert line.startswith("name = 'my job': cannot be a name; use letters")


def test_tables_can_be_made_without_a_file():
    assert TrainTable(out=Path("b")).nodes == ("bottleneck",)
    assert SourceTable(path="photos").path == "photos"


@pytest.mark.parametrize("text", ["a = " + "[" * 5000 + "]" * 5000, f"a = {'9' * 5000}"])
def test_nesting_and_numbers_beyond_pythons_limits_are_one_line(text, tmp_path):
    from featurepipe.execution.launchers import _from_file

    (tmp_path / "nightly.toml").write_text(text)
    with pytest.raises(UsageError, match="not TOML: "):
        read_job(tmp_path / "nightly.toml")
    with pytest.raises(UsageError, match="is not TOML: "):
        _from_file(tmp_path / "nightly.toml")
