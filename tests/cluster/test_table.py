"""What names a cluster, and what a [cluster] table may say: mistakes are found before anything is started."""

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from featurepipe.errors import UsageError
from featurepipe.execution.launchers import ClusterTable, read_spec, scale


def test_texts_that_name_a_cluster(tmp_path: Path) -> None:
    assert read_spec("local:3") == ClusterTable(kind="local", workers=3)
    assert read_spec("local") == ClusterTable(kind="local")
    assert read_spec("tls://gate:8786").scheduler == "tls://gate:8786"
    assert read_spec("shared/scheduler.json").scheduler == "shared/scheduler.json"
    file = tmp_path / "night.toml"
    file.write_text('name = "x"\n[cluster]\nscheduler = "shared/scheduler.json"\nwait = "10min"\n')
    assert read_spec(str(file)).scheduler == str(tmp_path / "shared/scheduler.json")
    assert read_spec(file).patience == 600
    assert read_spec({"kind": "slurm", "minimum": 0, "maximum": 64}).most == 64


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gate:8786", r"cluster 'gate:8786' names no cluster; give tcp://HOST:PORT"),
        ("local:0", r"local:0\.workers = 0 is too few; give a number from 1"),
        ({}, r"needs scheduler, .*or kind, what to start: local, ssh, slurm, pbs, kubernetes"),
        ({"kind": "slrum"}, r"cluster\.kind: unknown kind 'slrum'; nearest: slurm"),
        ({"kind": "local", "worker": 2}, r"unknown key 'cluster\.worker'; nearest: workers"),
        ({"kind": "local", "workers": "2"}, r"cluster\.workers = '2': "),
        ({"kind": "local", "scheduler": "tcp://a:1"}, r"names a scheduler that runs, and says how to start one: kind"),
        ({"scheduler": "a:1"}, r"cluster\.scheduler = 'a:1': is no address; write tcp://HOST:PORT"),
        ({"scheduler": "tcp://a"}, r"cluster\.scheduler = 'tcp://a': has no port; write tcp://a:8786"),
        ("tls://[::1]/", r"has no port; write tls://\[::1\]:8786"),
        ({"kind": "pbs", "workers": 2, "maximum": 3}, r"give workers, or minimum and maximum"),
        ({"kind": "pbs", "minimum": 4, "maximum": 3}, r"needs a maximum, no less than minimum"),
        ({"kind": "pbs", "minimum": 4}, r"needs a maximum"),
        ({"kind": "ssh"}, r"ssh needs hosts"),
        ({"kind": "ssh", "hosts": ["a", "b"], "maximum": 2}, r"as many as hosts names"),
        ({"kind": "local", "hosts": ["a"]}, r"no other kind has hosts"),
        ({"kind": "local", "wait": "soon"}, r"'soon' is no duration"),
    ],
)
def test_mistakes_name_the_key_and_what_to_write(spec: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_spec(spec)


def test_files_without_a_table(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    with pytest.raises(UsageError, match=r"cannot read .*No such file"):
        read_spec(file)
    file.write_text("[scheduler]\n")
    with pytest.raises(UsageError, match=r"has no \[cluster\] table; it has: scheduler"):
        read_spec(file)
    file.write_text("[cluster\n")
    with pytest.raises(UsageError, match="is not TOML"):
        read_spec(file)


@pytest.mark.parametrize(
    ("table", "asked"),
    [
        ({"kind": "slurm"}, ("scale", (1,), {})),
        ({"kind": "slurm", "workers": 3}, ("scale", (3,), {})),
        ({"kind": "slurm", "maximum": 64}, ("adapt", (), {"minimum": 0, "maximum": 64})),
        ({"kind": "slurm", "minimum": 2, "maximum": 64}, ("adapt", (), {"minimum": 2, "maximum": 64})),
    ],
)
def test_so_many_workers_are_asked_for(
    table: dict[str, Any], asked: tuple[str, tuple[int, ...], dict[str, int]]
) -> None:
    cluster = Mock()
    scale(cluster, read_spec(table))
    assert [call for call in cluster.mock_calls if call[0] != "sync"] == [asked]


def test_neither_featurepipe_nor_a_job_file_loads_dask() -> None:
    code = (
        "import sys, featurepipe, featurepipe.execution, featurepipe.jobs.job, featurepipe.cli.parser\n"
        "featurepipe.cli.parser.build_parser()\n"
        "sys.exit(int('dask' in sys.modules or 'distributed' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
