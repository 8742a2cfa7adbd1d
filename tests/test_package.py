"""The package as others get it: a wheel, its types, systems that lack a module, versions that agree."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import featurepipe
from tests.test_code_blocks import few_clothes

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = ("benchmarks", "docs", "featurepipe", "pipelines", "tests", "tools")
FILES = (
    *("ARCHITECTURE.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"),
    *("MANIFEST.in", "Makefile", "constraints.txt", "pyproject.toml"),
)
TYPED_SCRIPT = """
from pathlib import Path

import featurepipe as fp

record: dict[str, object] = fp.extract("photos", Path("features"), nodes=["bottleneck"], silent=True)
features = fp.FeatureStore("features").features("photos").select(split="train")
rows, width = features.shape
classifier = fp.ImageClassifier.load("bundle")
page: Path = fp.report("features", "page.html")
version: str = fp.__version__
"""
JOB = """
store = "of-the-job"
[source]
path = "data"
[[features]]
backbone = "lenet5"
weights = "none"
nodes = ["bottleneck"]
[[train]]
out = "bundle-of-the-job"
[report]
to = "nights.html"
last = 3
"""
WRONG_SCRIPT = """
import featurepipe as fp

fp.extract("photos", 3)
fp.extract("photos", "features", backbones="resnet50")
"""
OTHER_SYSTEMS = """
import errno, importlib, os, pkgutil, signal, sys
from pathlib import Path
import bokeh.plotting, cleanlab, distributed, faiss, h5py, joblib, lightning_fabric, pyarrow.parquet
import pydicom, sklearn, timm, torchvision, xgboost  # as they are here

LINUX = {
    errno: ["EREMOTEIO"],
    os: ["sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "memfd_create", "sendfile"],
}
POSIX = {
    os: ["fork", "forkpty", "register_at_fork", "getuid", "geteuid", "getgid", "setsid", "killpg", "getpgid", "wait4", "uname",
         "sysconf", "pread", "pwrite", "preadv", "nice", "mkfifo", "chown", "fchmod", "getloadavg", "fdatasync", "fchdir",
         "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "O_SYNC"],
    signal: ["SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGCHLD", "SIGSTOP", "SIGCONT", "pthread_sigmask",
             "setitimer", "ITIMER_REAL", "alarm", "SIG_BLOCK", "SIG_SETMASK", "sigwait"],
}
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
for lacking in (LINUX, POSIX):
    for module, names in lacking.items():
        lacking[module] = {name: module.__dict__.pop(name) for name in names if hasattr(module, name)}


def without_proc(event, arguments):  # of our own code alone: psutil must know the memory
    if event == "open" and str(arguments[0]).startswith("/proc/"):
        frame = sys._getframe(1)
        while frame and "featurepipe" not in frame.f_code.co_filename and "pathlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame and f"{os.sep}featurepipe{os.sep}" in frame.f_code.co_filename:
            raise FileNotFoundError(errno.ENOENT, "no such file", arguments[0])


sys.addaudithook(without_proc)
Path.exists = lambda path, exists=Path.exists: not str(path).startswith("/proc/") and exists(path)
import featurepipe as fp
for found in pkgutil.walk_packages(fp.__path__, "featurepipe."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
from featurepipe import doctor
from featurepipe.cli import build_parser, main
names = next(action.choices for action in build_parser()._actions if action.choices)
print("help", all(parser.format_help() for parser in names.values()))
lenet = ["--backbone", "lenet5", "--weights", "none"]
print("nodes", main(["nodes", "lenet5"]))
for line in (" ".join(["extract photos --store kept", *lenet]), "info kept", "predict bundle photos --to predictions.csv"):
    print(line.split()[0], main(line.split()))
print("features", fp.CNNFeatures("lenet5", weights="none").fit_transform(["photos/0.png"]).shape)
print("writable", doctor.writable(Path(".")).status)
for module, there in POSIX.items():  # a macOS without locks
    module.__dict__.update(there)
print("extract", main(["extract", "photos", "--store", "kept", *lenet, "--quiet"]))
print("compact", main(["compact", "kept"]))
"""


def test_versions_agree() -> None:
    assert featurepipe.__version__ == PROJECT["version"]
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## To {PROJECT['version']}" in (ROOT / "docs" / "upgrading.md").read_text(encoding="utf-8")
    pinned = (ROOT / "pipelines").rglob("*.*ml")
    images = [
        line for file in pinned for line in file.read_text(encoding="utf-8").splitlines() if "/featurepipe:" in line
    ]
    assert images
    assert [line for line in images if f"/featurepipe:{PROJECT['version']}" not in line] == []


def test_the_module_is_the_command() -> None:
    (command,) = (one for one in entry_points(group="console_scripts") if one.name == "featurepipe")
    assert command.value == PROJECT["scripts"]["featurepipe"] == "featurepipe.cli:main"
    text = (ROOT / "featurepipe" / "__main__.py").read_text(encoding="utf-8")
    assert "from featurepipe.cli import main" in text
    assert "sys.exit(main())" in text


def test_on_windows_what_works_works_and_the_rest_says_so_and_macos_needs_no_linux(tmp_path: Path, launcher) -> None:
    """With stand-ins: without the modules, names and files that only some systems have."""
    from PIL import Image

    (tmp_path / "photos").mkdir()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("{}", encoding="utf-8")
    Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / "photos" / "0.png")
    done = launcher.start(OTHER_SYSTEMS, cwd=tmp_path).wait()
    assert done.code == 0, done.err
    told = {"help", "nodes", "extract", "info", "predict", "features", "writable", "compact"}
    shown = [line for line in done.out.splitlines() if line.split(" ")[0] in told]
    assert shown[:2] == ["help True", "nodes 0"]
    assert shown[2:5] == ["extract 1", "info 1", "predict 1"]
    assert shown[5:7] == ["features (1, 84)", "writable problem"]
    assert shown[7:] == ["extract 0", "compact 75"]
    assert done.err.count("feature stores need Linux or macOS") == 2
    assert done.err.count("bundles need Linux or macOS") == 1
    assert "Traceback" not in done.err
    assert "has no locks (flock): adding features works, compact and gc do not" in done.err
    assert "cannot rewrite parts of kept" in done.err


def test_a_system_without_posix_files_is_refused_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.O_NOFOLLOW")
    with pytest.raises(featurepipe.errors.StoreError, match="feature stores need Linux or macOS"):
        featurepipe.FeatureStore("features")


@pytest.mark.slow
def test_a_typed_script_of_a_user(tmp_path: Path) -> None:
    for name, text in (("right.py", TYPED_SCRIPT), ("wrong.py", WRONG_SCRIPT)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    kept = (
        ROOT / ".mypy_cache"
    )  # what `make lint` knows of the libraries; featurepipe itself is read as it is installed
    if kept.is_dir():
        shutil.copytree(kept, tmp_path / "cache")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", "cache"]
    command += ["right.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    *errors, last = done.stdout.splitlines()
    assert (done.returncode, last.startswith("Found 2 errors in 1 file (checked 2 source files)")) == (1, True), (
        done.stdout
    )
    assert all("wrong.py:" in line for line in errors)


def python_of(version: str) -> str:
    """An interpreter of this version that has what featurepipe needs: this one, the command, or one of FEATUREPIPE_PYTHONS."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    asked = os.environ.get("FEATUREPIPE_PYTHONS", "").split(os.pathsep)
    for python in filter(None, (*asked, shutil.which(f"python{version}"))):
        probe = "import sys, h5py, pyarrow, skops, torch, torchvision; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return python
    pytest.skip(f"no python{version} here has PyTorch and the rest; name one in FEATUREPIPE_PYTHONS")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist of a checkout, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "out"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(build, capture_output=True, check=True)
    return folder


@pytest.mark.slow
def test_the_sdist_has_the_documentation_and_all_tests(built: Path) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    source = built / "source"
    kept = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert {"CHANGELOG.md", "CITATION.cff", "SECURITY.md", "docs/start.md", "tests/conftest.py"} <= kept
    assert {name for name in kept - names if ".egg-info/" not in name} == set()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_installed_wheel_works_outside_the_checkout(tmp_path: Path, built: Path, version: str) -> None:
    """In an environment of its own, which finds what it needs in another: the script that pip writes, with few images."""
    python = python_of(version)
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
    kept = {path.relative_to(ROOT).as_posix() for path in (ROOT / "featurepipe").rglob("*") if path.is_file()}
    assert {name for name in kept - names if "__pycache__" not in name} == set()

    subprocess.run([python, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    own = tmp_path / "env" / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(own),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        str(file),
    ]
    subprocess.run(install, check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    needed, site = (
        subprocess.run([one, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
        for one in (python, str(own))
    )
    (Path(site) / "needed.pth").write_text(needed, encoding="utf-8")
    shutil.rmtree(Path(site) / "featurepipe" / "data")
    for data in (Path(site) / "featurepipe" / "data", tmp_path / "data"):
        few_clothes(data)
    (tmp_path / "job.toml").write_text(JOB, encoding="utf-8")
    environment = {"PATH": "", "HOME": str(tmp_path), "FEATUREPIPE_CACHE": "", "PYTHONDONTWRITEBYTECODE": "1"}
    place = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    for line in (
        "demo --out demo",
        "extract data --store kept --backbone lenet5 --weights none",
        "train kept --out bundle",
        "report kept --bundle bundle --to page.html",
        "run job.toml",
    ):
        done = subprocess.run([str(own.with_name("featurepipe")), *line.split()], check=False, **place)
        assert done.returncode == 0, (line, done.stderr)
    found = subprocess.run([str(own), "-c", "import featurepipe; print(featurepipe.__file__)"], check=True, **place)
    assert Path(found.stdout.strip()).is_relative_to(tmp_path)
    assert (tmp_path / "demo" / "predictions.png").stat().st_size > 10_000
    for page in ("page.html", "nights.html"):
        assert (tmp_path / page).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
