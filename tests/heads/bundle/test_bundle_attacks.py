"""Bundles made to do harm: every payload here runs when skops is told to trust it, and never through ``read_bundle``."""

import contextlib
import io
import json
import os
import pickle
import signal
import sys
import time
import warnings
import zipfile

import numpy as np
import pytest
import skops.io
from sklearn.svm import SVC

from featurepipe.errors import BundleError
from featurepipe.heads.bundle import head as bundle_head
from featurepipe.heads.bundle.audit import ForgedTrees, check_trees, join_trees, split_trees
from featurepipe.heads.bundle.bundle import read_bundle, write_bundle
from featurepipe.heads.bundle.files import read_manifest
from featurepipe.heads.multilabel import MultilabelTrees
from featurepipe.heads.neighbours import BlockNeighbours
from featurepipe.heads.trees.boosted import BoostedTrees


def node(loader, name, **more):
    module, _, kind = name.rpartition(".")
    return {"__class__": kind, "__module__": module, "__loader__": loader, **more}


def json_node(value):
    return node("JsonNode", "builtins.str", content=json.dumps(value), is_json=True)


def items(kind, *values):
    return node(f"{kind.capitalize()}Node", f"builtins.{kind}", content=list(values))


def dict_of(name="builtins.dict", key_type="builtins.str", **values):
    key_types = items("list", *[node("TypeNode", key_type) for _ in values])
    return node("DictNode", name, key_types=key_types, content=values)


def call(name, *arguments):
    return node("ConstructorFromReduceNode", name, content=items("tuple", *map(json_node, arguments)))


# Each takes the sentinel's path and gives a node that creates the file when skops builds it.
LIVE = {
    "os.system": lambda path: call("os.system", f"touch {path}"),
    "posix.system": lambda path: call("posix.system", f"touch {path}"),
    "builtins.eval": lambda path: call("builtins.eval", f"open({path!r}, 'w').close()"),
    "builtins.exec": lambda path: call("builtins.exec", f"open({path!r}, 'w').close()"),
    "subprocess.call": lambda path: call("subprocess.call", ["touch", path]),
    "subprocess.check_call": lambda path: (
        items("list", json_node("touch"), json_node(path)) | {"__module__": "subprocess", "__class__": "check_call"}
    ),
    "subprocess.check_output": lambda path: (
        items("set", json_node("touch"), json_node(path))
        | {"__module__": "subprocess", "__class__": "check_output", "__loader__": "ListNode"}
    ),
    "key type": lambda path: dict_of(key_type="builtins.eval", **{f"open({path!r}, 'w').close()": json_node(1)}),
    "operator.call": lambda path: node(
        "OperatorFuncNode",
        "operator.call",
        attrs=items("tuple", node("FunctionNode", "os.system"), json_node(f"touch {path}")),
    ),
    "loss": lambda path: node(
        "LossNode", "os.system", __reduce__={"args": items("tuple", json_node(f"touch {path}"))}, content=dict_of()
    ),
    "scalar": lambda path: node("NdArrayNode", "subprocess.call", type="numpy", file="attack.npy", __id__=77),
    "import by object": lambda path: node("ObjectNode", "evil_module.Evil"),
    "import by type": lambda path: node("TypeNode", "evil_module.Evil"),
    "import by function": lambda path: node("FunctionNode", "evil_module.evil"),
    "import by dict": lambda path: dict_of("evil_module.Evil"),
    "import by list": lambda path: node("ListNode", "evil_module.Evil", content=[]),
    "import by method": lambda path: node(
        "MethodNode", "evil_module.Evil", content={"func": "run", "obj": node("ObjectNode", "evil_module.Evil")}
    ),
    "import by old function": lambda path: node(
        "FunctionNode", "x.y", content={"module_path": "evil_module", "function": "evil"}
    ),
    "setstate": lambda path: node("ObjectNode", "evil_module.Stateful", content=json_node("state")),
}
# Each names something that must not get in, though building it alone does nothing.
QUIET = {
    "partial": lambda path: node(
        "PartialNode",
        "functools.partial",
        content={
            "func": node("FunctionNode", "os.system"),
            "args": items("tuple", json_node(f"touch {path}")),
            "kwds": dict_of(),
            "namespace": json_node(None),
        },
    ),
    "ufunc": lambda path: node("FunctionNode", "numpy.exp"),
    "generator": lambda path: node(
        "RandomGeneratorNode",
        "numpy.random._generator.Generator",
        content={"bit_generator": dict_of(bit_generator=json_node("seed")), "seed_seq": dict_of()},
    ),
    "default dict": lambda path: node(
        "DefaultDictNode",
        "collections.defaultdict",
        content={"main": dict_of(), "default_factory": node("TypeNode", "builtins.list")},
    ),
    "tree": lambda path: node(
        "TreeNode", "sklearn.tree._tree.Tree", __reduce__={"args": items("tuple")}, content=dict_of()
    ),
    "cached": lambda path: node("CachedNode", "builtins.str", __id__=5),
    "constructor of ours": lambda path: call("featurepipe.heads.trees.boosted.BoostedTrees"),
    "dotted class": lambda path: {
        "__module__": "sklearn.utils",
        "__class__": "_testing.os.system",
        "__loader__": "ObjectNode",
    },
    "no estimator of scikit-learn": lambda path: node("ObjectNode", "sklearn.utils._bunch.Bunch"),
    "unknown kind": lambda path: node("SomethingNode", "builtins.str"),
    "nothing": lambda path: {"__loader__": None},
}


@pytest.fixture
def sentinel(tmp_path, monkeypatch):
    """A file that does not exist, and a module on the path that makes it when imported."""
    path = tmp_path / "sentinel"
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "evil_module.py").write_text(
        f"open({str(path)!r}, 'w').close()\n"
        "def evil(): pass\n"
        "class Evil(dict):\n    def __init__(self, *a): pass\n    def run(self): pass\n"
        "class Stateful:\n    def __setstate__(self, state): pass\n"
    )
    monkeypatch.syspath_prepend(str(modules))
    sys.modules.pop("evil_module", None)
    yield path
    sys.modules.pop("evil_module", None)


def read_zip(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def infected(folder, bad, protocol=2):
    """The folder's head with one attribute replaced, as the bytes of a skops file."""
    members = read_zip((folder / "head.skops").read_bytes())
    schema = json.loads(members["schema.json"])
    schema["content"]["content"]["verbose"] = bad
    members["schema.json"] = json.dumps(schema | {"protocol": protocol}).encode()
    return zipped(members)


def npy(value):
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def with_array(content, array):
    return zipped(read_zip(content) | {"attack.npy": array})


@pytest.mark.parametrize("name", LIVE)
def test_a_payload_that_works_is_refused_before_it_runs(name, folder, forge, sentinel, monkeypatch):
    protocol = 0 if "old" in name else 2
    content = infected(folder, LIVE[name](str(sentinel)), protocol)
    content = with_array(content, npy(np.array(["touch", str(sentinel)])))
    forge(folder, head_skops=content)
    with pytest.raises(BundleError, match=r"head.skops (holds what no head needs|is of skops protocol 0)") as refused:
        read_bundle(folder)
    assert "do not use this bundle" in str(refused.value).lower()
    assert not sentinel.exists()
    assert "evil_module" not in sys.modules

    monkeypatch.setattr(bundle_head, "audit", lambda content, name: None)  # skops' own list is the second wall
    with pytest.raises(BundleError, match=r"head.skops"):
        read_bundle(folder)
    assert not sentinel.exists()
    assert "evil_module" not in sys.modules

    named = skops.io.get_untrusted_types(data=content)  # and the payload is one
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # what the payload returns may be no parameter
        skops.io.loads(content, trusted=named)
    assert sentinel.exists()


@pytest.mark.parametrize("name", QUIET)
def test_what_no_head_needs_is_refused(name, folder, forge, sentinel):
    forge(folder, head_skops=infected(folder, QUIET[name](str(sentinel))))
    with pytest.raises(BundleError, match=r"head.skops holds (what no head needs|types that bundles do not)"):
        read_bundle(folder)
    assert not sentinel.exists()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_refused(folder, forge, sentinel, protocol):
    attack = pickle.dumps(Payload(sentinel), protocol)
    original = (folder / "head.skops").read_bytes()
    forge(folder, head_skops=attack)
    with pytest.raises(BundleError, match=r"head.skops is not a file of skops.*(looks like a pickle|copy)"):
        read_bundle(folder)
    forge(folder, head_skops=original, head_ubj=attack)
    with pytest.raises(BundleError, match="do not belong together"):
        read_bundle(folder)
    (folder / "head.ubj").unlink()
    forge(folder, record=lambda manifest: manifest["files"].pop("head.ubj"), seen_safetensors=attack)
    with pytest.raises(BundleError, match=r"seen.safetensors is not a safetensors file"):
        read_bundle(folder)
    assert not sentinel.exists()
    pickle.loads(attack)
    assert sentinel.exists()


def test_an_array_with_pickled_objects_is_refused(folder, forge, sentinel):
    content = (folder / "head.skops").read_bytes()
    array = npy(np.array([Payload(sentinel)], object))
    members = {name: array if name.endswith(".npy") else old for name, old in read_zip(content).items()}
    forge(folder, head_skops=zipped(members))
    with pytest.raises(BundleError, match=r"head.skops does not hold a usable head.*pickle"):
        read_bundle(folder)
    assert not sentinel.exists()
    np.load(io.BytesIO(array), allow_pickle=True)
    assert sentinel.exists()


def test_a_zip_that_unpacks_to_more_than_it_is_is_refused(folder, forge):
    members = read_zip((folder / "head.skops").read_bytes())
    bomb = zipped(members | {"bomb.npy": bytes(1 << 26)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1 << 20
    forge(folder, head_skops=bomb)
    with pytest.raises(BundleError, match="compressed, encrypted or overlapping"):
        read_bundle(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in [*members.items(), ("schema.json", b"{}")]:
                archive.writestr(name, content)
    forge(folder, head_skops=buffer.getvalue())
    with pytest.raises(BundleError, match="compressed, encrypted or overlapping"):
        read_bundle(folder)
    forge(folder, head_skops=zipped({}))
    with pytest.raises(BundleError, match="is not a file of skops"):
        read_bundle(folder)
    forge(folder, head_skops=zipped(members | {"schema.json": b"[]"}))
    with pytest.raises(BundleError, match="holds no object"):
        read_bundle(folder)
    forge(folder, head_skops=zipped(members | {"schema.json": b'{"a":' * 100_000 + b"1" + b"}" * 100_000}))
    with pytest.raises(BundleError, match="is not a file of skops"):
        read_bundle(folder)


def test_an_array_read_for_many_objects_is_refused(folder, forge):
    many = items(
        "list", *[node("NdArrayNode", "numpy.ndarray", type="numpy", file="attack.npy", __id__=n) for n in (7, 8)]
    )
    forge(folder, head_skops=with_array(infected(folder, many), npy(np.zeros(3))))
    with pytest.raises(BundleError, match=r"an array without bytes of its own \('attack.npy'\)"):
        read_bundle(folder)
    for file, owner in [("no.npy", 7), ("attack.npy", 0), ("attack.npy", None)]:
        one = node("NdArrayNode", "numpy.ndarray", type="numpy", file=file, __id__=owner)
        forge(folder, head_skops=with_array(infected(folder, one), npy(np.zeros(3))))
        with pytest.raises(BundleError, match="an array without bytes of its own"):
            read_bundle(folder)


def test_objects_inside_themselves_or_doubled_without_end_are_refused(folder, forge):
    again = items("list", items("list") | {"__id__": 9}) | {"__id__": 9}
    doubled = items("list") | {"__id__": 100}
    for number in range(101, 160):  # 2^59 visits for whoever follows the references
        doubled = items("list", doubled, items("list") | {"__id__": number - 1}) | {"__id__": number}
    stub = items("list", {"__id__": 3})
    deep = items("list")
    for _ in range(400):
        deep = items("list", deep)
    started = time.monotonic()
    for bad in (again, doubled, stub, deep):
        forge(folder, head_skops=infected(folder, bad))
        with pytest.raises(BundleError, match=r"head.skops (refers to itself|is not a file of skops|does not hold)"):
            read_bundle(folder)
    assert time.monotonic() - started < 20


def test_every_changed_byte_is_noticed(folder, digits, bundle):
    generator = np.random.default_rng(0)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for place in generator.integers(len(content), size=40):
            changed = bytearray(content)
            changed[place] ^= 1 << int(generator.integers(8))
            file.write_bytes(changed)
            if file.name == "bundle.json" and _same_json(changed, content):
                continue  # white space
            with pytest.raises(BundleError, match=file.name) as refused:
                read_bundle(folder)
            assert "copy" in str(refused.value) or "bundle" in str(refused.value)
        file.write_bytes(content)
    np.testing.assert_array_equal(read_bundle(folder).scores(digits[0]), bundle.scores(digits[0]))


def _same_json(one, other):
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("name", ["head.skops", "seen.safetensors", "bundle.json"])
def test_a_file_that_is_missing_short_or_not_a_plain_file_is_named(folder, tmp_path, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match=rf"{name} (has \d+ bytes, \d+ were written|is not JSON)"):
        read_bundle(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=name):
        read_bundle(folder)
    (tmp_path / "outside").write_bytes(content)
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match=f"{name} is a link"):
        read_bundle(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    signal.alarm(20)
    with pytest.raises(BundleError, match=f"{name} is not a plain file"):
        read_bundle(folder)
    signal.alarm(0)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(BundleError, match=f"{name} is not a plain file"):
        read_bundle(folder)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "sub/file", "..", ".hidden", "bundle.json", "a\0b", ""]
)
def test_names_that_lead_elsewhere_are_refused(folder, forge, tmp_path, name):
    (folder.parent / "outside").write_bytes(b"x")
    forge(folder, record=lambda manifest: manifest["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(BundleError, match=r"bundle.json names a file .* outside the bundle"):
        read_bundle(folder)


def test_files_that_are_not_listed_are_passed_over_and_listed_ones_checked(folder, forge, sentinel):
    (folder / "note.txt").write_text("mine")
    (folder / "head.pkl").write_bytes(pickle.dumps(Payload(sentinel)))
    read_bundle(folder)
    forge(folder, later_bin=b"of a later version")
    read_bundle(folder)
    (folder / "later.bin").write_bytes(b"of a later versiom")
    with pytest.raises(BundleError, match=r"later.bin is not what was written"):
        read_bundle(folder)
    assert not sentinel.exists()


def test_a_newer_version_says_to_upgrade(folder):
    manifest = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(manifest | {"version": 3}))
    with pytest.raises(
        BundleError, match=r"has version 3 of the format, this featurepipe reads up to 2; run: pip install"
    ):
        read_bundle(folder)
    for version in (0, True, "1", None):
        (folder / "bundle.json").write_text(json.dumps(manifest | {"version": version}))
        with pytest.raises(BundleError, match="is damaged: its version"):
            read_bundle(folder)


def test_what_is_no_bundle_is_said_to_be_none(folder, tmp_path):
    with pytest.raises(BundleError, match=r"there is no bundle at .*nowhere \(looked in .*\); give the folder"):
        read_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"is not a bundle: it has no bundle.json"):
        read_bundle(tmp_path)
    with pytest.raises(BundleError, match="is a file, not a bundle"):
        read_bundle(folder / "bundle.json")
    for content, message in {
        b"{}": "is not a bundle: the format",
        b'{"format": "featurepipe-store", "version": 1}': "is not a bundle: the format in bundle.json is 'featurepipe-store'",
        b"[1]": "is not a JSON object",
        b"": "is not JSON",
        b"\xff\xfe": "is not JSON",
        b"[" * 200_000: "is not JSON",
        b'{"format": "featurepipe-bundle", "version": 1, "metrics": {"auc": NaN}}': "NaN is no JSON value",
        b'{"format": "featurepipe-bundle", "version": 1}': "is not what was written",
    }.items():
        (folder / "bundle.json").write_bytes(content)
        with pytest.raises(BundleError, match=message) as refused:
            read_bundle(folder)
        assert "bundle.json" in str(refused.value)


def test_entries_that_are_missing_or_wrong_are_named(folder, forge):
    original = read_manifest(folder)
    for name in ("backbone", "classes", "columns", "files", "space", "temperature", "training", "width"):
        forge(folder, record=lambda manifest, name=name: manifest.pop(name))
        with pytest.raises(BundleError, match=f"'{name}' is missing or of the wrong type"):
            read_bundle(folder)
        forge_back(folder, original)
        forge(folder, record=lambda manifest, name=name: manifest.update({name: True}))
        with pytest.raises(BundleError, match=f"'{name}' is missing or of the wrong type"):
            read_bundle(folder)
        forge_back(folder, original)
    wrong = {
        "'classes' must be distinct text": {"classes": ["a", "a"]},
        "'columns' must be distinct text": {"columns": []},
        "it does not list head.skops": {"files": {}},
        "no SHA-256 of head.skops": {"files": {"head.skops": {"bytes": 3}}},
        "head.skops takes 64 values, the bundle says 65": {"width": 65},
        "head.skops knows the classes": {"classes": ["cat", "dog"]},
    }
    for message, change in wrong.items():
        forge(folder, record=lambda manifest, change=change: manifest.update(change))
        with pytest.raises(BundleError, match=message):
            read_bundle(folder)
        forge_back(folder, original)
    assert read_bundle(folder).width == 64


def forge_back(folder, original):
    from featurepipe.heads.bundle.files import write_manifest

    write_manifest(folder, original)


def test_a_skops_file_of_something_else_is_no_head(folder, forge):
    from sklearn.linear_model import LinearRegression

    for value in ({"classes_": ["a"]}, [1, 2], np.arange(3), LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0])):
        forge(folder, head_skops=skops.io.dumps(value))
        with pytest.raises(BundleError, match=r"head.skops is a \w+, not a fitted classifier"):
            read_bundle(folder)


@pytest.mark.parametrize(
    ("attribute", "change"),
    [
        ("_n_support", lambda a: a + np.int32(1000)),
        ("_n_support", lambda a: np.append(a, np.int32(0))),
        ("_dual_coef_", lambda a: a[:, :1]),
        ("_intercept_", lambda a: a[:1]),
        ("support_vectors_", lambda a: a[:, :3]),
        ("_probA", lambda a: np.zeros(2)),
        ("kernel", lambda a: "precomputed"),
        ("_n_support", lambda a: [1, 2]),
    ],
)
def test_a_support_vector_machine_that_would_read_elsewhere_is_refused(
    digits, bundle_of, tmp_path, forge, attribute, change
):
    head = SVC(gamma=0.001).fit(*digits)
    folder = write_bundle(tmp_path / "b", bundle_of(head))
    read_bundle(folder)
    setattr(head, attribute, change(getattr(head, attribute)))
    forge(folder, head_skops=skops.io.dumps(head))
    with pytest.raises(
        BundleError, match=r"head.skops (holds a SVC that does not fit together|does not hold a usable)"
    ):
        read_bundle(folder)


def test_neighbours_that_would_read_elsewhere_are_refused(digits, bundle_of, tmp_path, forge):
    head = BlockNeighbours().fit(*digits)
    folder = write_bundle(tmp_path / "b", bundle_of(head))
    read_bundle(folder)
    for attribute, value in {"_y": head._y + 1000, "_fit_X": head._fit_X[:5], "_fit_method": "kd_tree"}.items():
        before = getattr(head, attribute)
        setattr(head, attribute, value)
        forge(folder, head_skops=skops.io.dumps(head))
        with pytest.raises(BundleError, match="a BlockNeighbours that does not fit together"):
            read_bundle(folder)
        setattr(head, attribute, before)


def test_an_array_with_a_forged_header_is_refused(folder, forge):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    members = read_zip((folder / "head.skops").read_bytes())
    for array in (header.getvalue(), header.getvalue().replace(b"}", b" "), header.getvalue()[:40], b"PK\x03\x04"):
        forge(
            folder, head_skops=zipped({name: array if name.endswith(".npy") else old for name, old in members.items()})
        )
        with pytest.raises(BundleError, match=r"head.skops does not hold a usable head"):
            read_bundle(folder)


@pytest.fixture(scope="module")
def trees(digits):
    x, y = digits
    few = np.isin(y, ["digit 0", "digit 1", "digit 2"])
    return BoostedTrees(2, max_depth=3, n_jobs=1).fit(x[few], y[few])


def patched(raw, key, kind, change):
    """The first array of that name in a booster, changed in place."""
    start = raw.index(key.encode() + b"[$") + len(key) + 5
    count = int.from_bytes(raw[start : start + 8], "big")
    size = np.dtype(kind).itemsize * count
    values = np.frombuffer(raw[start + 8 : start + 8 + size], kind).copy()
    change(values)
    return raw[: start + 8] + values.tobytes() + raw[start + 8 + size :]


FORGED_TREES = {
    "a child far outside": ("left_children", ">i4", lambda a: np.put(a, 0, 10**6), "no tree"),
    "a child before": ("left_children", ">i4", lambda a: np.put(a, 0, -7), "no tree"),
    "a loop": ("right_children", ">i4", lambda a: np.put(a, 0, 0), "no tree"),
    "one child": ("right_children", ">i4", lambda a: np.put(a, 0, -1), "no tree|one child"),
    "another parent": ("parents", ">i4", lambda a: np.put(a, 1, 5), "no tree"),
    "a feature outside": ("split_indices", ">i4", lambda a: np.put(a, 0, 64), "a feature that there is not"),
    "a feature before": ("split_indices", ">i4", lambda a: np.put(a, 0, -1), "a feature that there is not"),
    "categories": ("split_type", ">u1", lambda a: np.put(a, 0, 1), "categories"),
}


@pytest.mark.parametrize("name", FORGED_TREES)
def test_trees_that_would_read_elsewhere_are_refused(name, trees, bundle_of, tmp_path, forge):
    key, kind, change, message = FORGED_TREES[name]
    folder = write_bundle(tmp_path / "b", bundle_of(trees))
    raw = trees.booster_ubjson()
    assert patched(raw, key, kind, lambda values: None) == raw
    forge(folder, head_ubj=patched(raw, key, kind, change))
    with pytest.raises(
        BundleError, match=rf"head.ubj does not hold the trees of this head \((ForgedTrees: )?.*({message})"
    ):
        read_bundle(folder)


def test_trees_of_another_kind_of_file_are_refused(trees, bundle_of, tmp_path, forge, sentinel, digits):
    x, y = digits
    folder = write_bundle(tmp_path / "b", bundle_of(trees))
    raw = trees.booster_ubjson()
    wider = BoostedTrees(2, n_jobs=1).fit(np.hstack([x, x])[:99], y[:99])
    others = [b"", b"{", pickle.dumps(Payload(sentinel)), raw[:-1], raw + b"}", b"[" * 10**5, wider.booster_ubjson()]
    others += [
        raw.replace(b"gbtree", b"dart"),
        raw.replace(b"softprob", b"softmaxx"),
        bytes(trees.booster_.save_raw("json")),
    ]
    for content in others:
        forge(folder, head_ubj=content)
        with pytest.raises(BundleError, match=r"head.ubj does not hold the trees of this head"):
            read_bundle(folder)
    assert not sentinel.exists()
    forge(folder, head_ubj=raw)
    np.testing.assert_array_equal(read_bundle(folder).scores(x), trees.predict_log_proba(x))


def test_trees_of_several_labels_are_refused_unless_they_are_one_for_each(bundle_of, tmp_path, forge, digits):
    x, y = digits
    truth = np.stack([y == "digit 0", y == "digit 1"], axis=1)
    heads = [
        MultilabelTrees(2, max_depth=2, n_jobs=1, label_names=["0", "1"]).fit(wide, truth) for wide in (x, x[:, 1:])
    ]
    target = {"type": "multilabel", "columns": ["tags"], "calibration": None}
    folder = write_bundle(tmp_path / "b", bundle_of(heads[0], temperature=None, target=target))
    one, other = heads[0].boosters_ubjson()
    good = join_trees([one, other])
    assert split_trees(good) == [one, other]
    for content in (
        b"", b"[#", one, join_trees([one]), join_trees([one, other, one]), good[:-1], good + b"}", join_trees([b"[" * 9999]),
        join_trees([one, heads[1].boosters_ubjson()[1]]), join_trees([one, patched(other, *FORGED_TREES["a loop"][:3])]),
        good.replace(b"binary:logistic", b"binary:hinge..."), b"[#L" + b"\xff" * 8 + one + other,
    ):  # fmt: skip
        forge(folder, head_ubj=content)
        with pytest.raises(BundleError, match=r"head.ubj does not hold the trees of this head"):
            read_bundle(folder)
    forge(folder, head_ubj=good)
    np.testing.assert_array_equal(read_bundle(folder).scores(x), heads[0].decision_function(x))
    missing = heads[0].without_boosters()
    missing.heads_ = missing.heads_[:1]
    forge(folder, head_skops=skops.io.dumps(missing), head_ubj=join_trees([one]))
    with pytest.raises(BundleError, match="there are heads of 1 labels, but 2 names"):
        read_bundle(folder)


def test_trees_with_random_damage_are_refused_or_harmless(trees, digits):
    generator = np.random.default_rng(0)
    raw = trees.booster_ubjson()
    harmless = 0
    for _ in range(300):
        content = bytearray(raw)
        for place in generator.integers(len(raw), size=generator.integers(1, 4)):
            content[place] = generator.integers(256)
        with contextlib.suppress(ForgedTrees, BundleError):
            check_trees(bytes(content), width=64, classes=3)
            harmless += 1
            trees.with_booster(bytes(content)).predict(digits[0])  # a crash would end the tests
    assert 0 < harmless < 300
