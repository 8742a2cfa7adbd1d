"""Every kind of cluster as far as one machine can tell: real processes, a stand-in for SLURM, an SSH server of our own."""

import json
import os
import re
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from featurepipe.errors import ClusterError
from featurepipe.execution import connect
from featurepipe.execution.launchers import pbs, pod_spec, queue_options, read_spec, slurm


def in_a_process(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=cwd, check=False)


OPTIONS = {"cores": 8, "memory": "32GB", "queue": "gpu", "walltime": "01:00:00"}


@pytest.mark.slow
def test_processes_here_share_the_machine_out_and_are_reached_from_nowhere_else() -> None:
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    with connect("local:2", say=print) as dask_executor:
        workers = dask_executor.workers()
        for worker in workers:
            assert worker.address.startswith("tcp://127.0.0.1:")
            assert worker.threads == max(1, CPU_COUNT // 2)
            assert worker.memory_limit == MEMORY_LIMIT // 2
        assert len({worker.pid for worker in workers} - {os.getpid()}) == 2
        assert dask_executor.address.startswith("tcp://127.0.0.1:")
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker.pid, 0)


@pytest.mark.slow
def test_each_process_here_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    with connect("local", say=print) as dask_executor:
        seen = dask_executor.each(lambda: os.environ["CUDA_VISIBLE_DEVICES"], dask_executor.addresses())
        assert sorted(seen.values()) == ["4", "GPU-7"]
        assert [worker.gpus for worker in dask_executor.workers()] == [1, 1]


@pytest.mark.slow
def test_a_cluster_grows_with_its_work_and_shrinks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featurepipe.execution.worker_pool.TOLD_SECONDS", 120.0)

    def work(_context, n: int, _worker, stop, _report) -> int:
        time.sleep(0.5)
        return os.getpid()

    table = {"kind": "local", "minimum": 0, "maximum": 3, "options": {"threads_per_worker": 4}}
    said: list[str] = []
    with connect(table, say=said.append) as dask_executor:
        assert dask_executor.addresses() == []
        assert len(dask_executor.check()) == 1
        pids: set[int] = set()
        with closing(dask_executor.map(work, range(2000))) as answers:  # enough for the slowest start
            while len(pids) < 3:
                pids.add(next(answers)[1])
        deadline = time.monotonic() + 120
        while dask_executor.addresses():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert said == []


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH, with stand-ins for a queue's commands: a submitted job runs here at once."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "sbatch": f'cp "$1" {tmp_path}/job.sh; bash {tmp_path}/job.sh > {tmp_path}/job.log 2>&1 & echo "Submitted batch job $!"',
        "scancel": 'kill "$@"',
        "qsub": "exit 1",
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.slow
def test_slurm_jobs_are_submitted_and_their_workers_used(commands: Path, tmp_path: Path) -> None:
    options = {"cores": 1, "memory": "1GB", "scheduler_options": {"host": "127.0.0.1", "dashboard_address": ":0"}}
    with connect({"kind": "slurm", "workers": 1, "wait": 60, "options": options}, say=print) as dask_executor:
        assert len(dask_executor.check(tmp_path)) == 1
        assert list(dask_executor.map(lambda _c, n, *_: n + 1, [3])) == [(3, 4)]
        (worker,) = dask_executor.workers()
    deadline = time.monotonic() + 120
    while Path(f"/proc/{worker.pid}").exists():
        assert time.monotonic() < deadline, "the job was not cancelled"
        time.sleep(0.1)


def test_a_slurm_job_is_one_process_with_a_gpu(commands: Path) -> None:
    table = read_spec({"kind": "slurm", "minimum": 0, "maximum": 8, "gpus": True, "options": OPTIONS})
    with slurm(table) as cluster:
        script = cluster.job_script()
    assert "#SBATCH --gres=gpu:1" in script
    assert "#SBATCH --cpus-per-task=8" in script
    assert "#SBATCH --mem=30G" in script
    assert "#SBATCH -p gpu" in script
    assert "--nthreads 8" in script
    assert "--nworkers" not in script  # one


def test_a_users_own_directives_stay() -> None:
    table = read_spec(
        {"kind": "slurm", "workers": 2, "gpus": True, "options": {"job_extra_directives": ["--exclusive"]}}
    )
    found = queue_options(table, {"job_extra_directives": ["--gres=gpu:1"]})
    assert found["job_extra_directives"] == ["--exclusive", "--gres=gpu:1"]
    assert found["processes"] == 1


def test_a_pbs_job_is_one_process_with_a_gpu(commands: Path) -> None:
    table = read_spec({"kind": "pbs", "minimum": 0, "maximum": 2, "gpus": True, "options": OPTIONS})
    with pbs(table) as cluster:
        script = cluster.job_script()
    assert "#PBS -l select=1:ncpus=8:ngpus=1:mem=32GB" in script
    assert "#PBS -l walltime=01:00:00" in script
    assert "--nthreads 8" in script


@pytest.mark.slow
def test_a_job_that_is_not_taken_is_an_error_at_once(commands: Path) -> None:
    (commands / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition: gpu' >&2; exit 1\n")
    code = f"""
from featurepipe.execution import connect
with connect({{"kind": "slurm", "workers": 1, "options": {OPTIONS}}}):
    pass
"""
    done = in_a_process(code, cwd=commands)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("featurepipe.errors.ClusterError: workers of kind 'slurm' cannot be started: ")
    assert last.endswith("stderr: sbatch: error: invalid partition: gpu")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "slurm", "options": OPTIONS}, "sbatch is not on this machine; start this where jobs are submitted"),
        ({"kind": "local", "workers": 1, "options": {"n_threads": 1}}, "'n_threads'"),
    ],
)
def test_what_cannot_be_started_is_said_in_a_line(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ClusterError, match=re.escape(message)) as caught, connect(table, say=print):
        pass
    assert "\n" not in str(caught.value)


def test_kubernetes_that_cannot_be_reached(tmp_path: Path) -> None:
    code = """
import os
os.environ["KUBECONFIG"] = "none"
from featurepipe.execution import connect
with connect({"kind": "kubernetes", "workers": 1}):
    pass
"""
    lines = in_a_process(code, cwd=tmp_path).stderr.splitlines()
    assert any(
        line.startswith("featurepipe.errors.ClusterError: a cluster of kind 'kubernetes' cannot be") for line in lines
    )


def test_a_library_that_takes_ctrl_c_as_it_is_imported_does_not_keep_it(tmp_path: Path) -> None:
    (tmp_path / "dask_jobqueue.py").write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit())\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit())\n"
        "class SLURMCluster: pass\n"
    )
    code = f"""
import signal
from featurepipe.execution import connect
from featurepipe.errors import ClusterError
for number in (signal.SIGINT, signal.SIGTERM):  # a shell may have had SIGINT ignored
    signal.signal(number, lambda *_: None)
own = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
try:
    with connect({{"kind": "slurm", "options": {OPTIONS!r}}}):
        pass
except ClusterError as error:
    print(error)
assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == own
"""
    ran = in_a_process(code, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "a cluster of kind 'slurm'" in ran.stdout


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with (
        pytest.raises(ClusterError, match=r"dask_jobqueue is not installed; pip install 'featurepipe\[slurm\]'"),
        connect({"kind": "slurm", "options": OPTIONS}),
    ):
        pass


def test_pods_have_a_gpu_each_and_the_scheduler_none() -> None:
    pytest.importorskip("dask_kubernetes")
    options = {
        "image": "site/featurepipe:1",
        "env": {"A": "b"},
        "resources": {"limits": {"memory": "16Gi"}},
        "namespace": "n",
    }
    spec = pod_spec(read_spec({"kind": "kubernetes", "workers": 4, "gpus": True, "options": options}))["spec"]
    (worker,), (scheduler,) = (spec[role]["spec"]["containers"] for role in ("worker", "scheduler"))
    assert spec["worker"]["replicas"] == 4
    assert worker["resources"]["limits"] == {"nvidia.com/gpu": 1, "memory": "16Gi"}
    assert scheduler["resources"]["limits"] == {"memory": "16Gi"}
    assert worker["image"] == "site/featurepipe:1"
    assert worker["env"] == [{"name": "A", "value": "b"}]


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "pipelines" / "clusters").glob("*.toml")), ids=lambda f: f.stem
)
def test_the_files_to_copy_say_what_their_kind_takes(file: Path, commands: Path) -> None:
    table = read_spec(file)
    assert table.kind == file.stem
    if table.kind == "slurm":
        with slurm(table) as cluster:
            assert "#SBATCH --gres=gpu:1" in cluster.job_script()
    elif table.kind == "pbs":
        with pbs(table) as cluster:
            assert "ngpus=1:mem=32GB" in cluster.job_script()
    elif table.kind == "kubernetes":
        pytest.importorskip("dask_kubernetes")
        pod = pod_spec(table)["spec"]["worker"]["spec"]
        assert pod["volumes"] == [{"name": "volume-0", "persistentVolumeClaim": {"claimName": "featurepipe-data"}}]
        assert pod["containers"][0]["volumeMounts"] == [{"name": "volume-0", "mountPath": "/data"}]
        assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 1, "memory": "32Gi"}


def test_what_the_kubernetes_class_is_given_is_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    operator = pytest.importorskip("dask_kubernetes.operator")
    given: list[dict[str, Any]] = []
    takes = inspect.signature(operator.KubeCluster.__init__)

    class Stand:
        def __init__(self, **options: Any) -> None:
            takes.bind(self, **options)
            given.append(options)

        def adapt(self, minimum: int, maximum: int) -> None:
            given.append({"minimum": minimum, "maximum": maximum})

    monkeypatch.setattr(operator, "KubeCluster", Stand)
    from featurepipe.execution.launchers import kubernetes

    options = {"image": "i", "namespace": "n"}
    kubernetes(read_spec({"kind": "kubernetes", "workers": 2, "options": options}))
    kubernetes(read_spec({"kind": "kubernetes", "minimum": 1, "maximum": 9, "gpus": True, "options": options}))
    assert given[0] == {"n_workers": 2, "quiet": True, "image": "i", "namespace": "n"}
    assert given[1]["namespace"] == "n"
    assert given[1]["custom_cluster_spec"]["spec"]["worker"]["spec"]["containers"][0]["image"] == "i"
    assert given[2] == {"minimum": 1, "maximum": 9}


SSH = """
import asyncio, contextlib, json, os, signal, subprocess, sys, threading
import asyncssh
from featurepipe.execution import connect

class Open(asyncssh.SSHServer):
    def begin_auth(self, username):
        return False

async def run(process):
    pipe = subprocess.PIPE
    child = subprocess.Popen(process.command, shell=True, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    children.append(child)
    await process.redirect(stdin=child.stdin, stdout=child.stdout, stderr=child.stderr)
    code = await asyncio.to_thread(child.wait)
    await process.stdout.drain()
    process.exit(code)

async def serve():
    keys = [asyncssh.generate_private_key("ssh-ed25519")]
    server = await asyncssh.create_server(Open, "127.0.0.1", 0, server_host_keys=keys, process_factory=run)
    return server.sockets[0].getsockname()[1]

children = []
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
port = asyncio.run_coroutine_threadsafe(serve(), loop).result(60)
options = {
    "connect_options": {"port": port, "known_hosts": None, "username": "x"},
    "scheduler_options": {"dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"},
    "worker_options": {"nthreads": 1, "host": "127.0.0.1"},
}
table = {"kind": "ssh", "hosts": ["127.0.0.1"] * 3, "gpus": sys.argv[1] == "True", "options": options}
try:
    with connect(table) as dask_executor:
        dask_executor.wait_for_workers(2)
        good = dask_executor.check(os.getcwd())
        answers = sorted(dask_executor.map(lambda _c, n, *_: n + 1, range(4)))
        seen = dask_executor.each(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"), good)
        print(json.dumps([len(good), answers, sorted(map(str, seen.values()))]), flush=True)
finally:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [False, True])
def test_machines_reached_by_ssh(gpus: bool, tmp_path: Path) -> None:
    """With an SSH server of our own, in a process of its own: such connections are not always closed neatly."""
    pytest.importorskip("asyncssh")
    done = in_a_process(SSH, str(gpus), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    devices = ["0", "1"] if gpus else [str(os.environ.get("CUDA_VISIBLE_DEVICES"))] * 2
    assert json.loads(done.stdout) == [2, [[n, n + 1] for n in range(4)], devices]


@pytest.mark.slow
def test_a_script_without_its_guard_is_told_of_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from featurepipe.execution import connect\nwith connect('local:1'):\n    pass\n")
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 1
    assert 'put what it does under: if __name__ == "__main__":' in ran.stderr
    script.write_text(
        "from featurepipe.execution import connect\n"
        "if __name__ == '__main__':\n    with connect('local:1') as dask_executor:\n        dask_executor.wait_for_workers()\n"
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
