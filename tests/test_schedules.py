"""What starts the nightly job is accepted by what would start it: systemd, cron, Kubernetes."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCHEDULE = Path(__file__).parents[1] / "pipelines" / "schedule"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("spoilt", ["", "ExecStart", "OnCalendar"])
def test_systemd_accepts_the_units(tmp_path: Path, spoilt: str) -> None:
    """Also that the check finds what is wrong: a program that is not there, a time that is none."""
    service = (SCHEDULE / "featurepipe-nightly.service").read_text()
    timer = (SCHEDULE / "featurepipe-nightly.timer").read_text()
    program = "/nowhere/featurepipe" if spoilt == "ExecStart" else sys.executable
    service = re.sub(r"^ExecStart=\S+", f"ExecStart={program}", service, flags=re.MULTILINE)
    timer = timer.replace("02:00:00", "26:00:00") if spoilt == "OnCalendar" else timer
    units = [tmp_path / "featurepipe-nightly.service", tmp_path / "featurepipe-nightly.timer"]
    for unit, text in zip(units, (service, timer), strict=True):
        unit.write_text(text)
    command = ["systemd-analyze", "--man=no", "verify", *map(str, units)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if "featurepipe-nightly" in line]
    assert bool(complaints) == bool(spoilt), done.stderr


def test_the_crontab_has_five_fields_and_a_command() -> None:
    lines = [line for line in (SCHEDULE / "featurepipe.crontab").read_text().splitlines() if re.match(r"[\d*]", line)]
    [line] = lines
    minute, hour, day, month, weekday, command = line.split(None, 5)
    assert int(minute) in range(60)
    assert int(hour) in range(24)
    assert (day, month, weekday) == ("*", "*", "*")
    assert "%" not in command  # cron takes it for the end of the line
    assert "featurepipe run nightly.toml" in command


def cron_job() -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((SCHEDULE / "featurepipe-cronjob.yaml").read_text())


def test_kubernetes_schema_accepts_the_cron_job() -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    job = cron_job()
    schemas.validate(job, schemas.latest_version(), strict=True)
    job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["restartPolicies"] = "Never"
    with pytest.raises(schemas.ValidationError):
        schemas.validate(job, schemas.latest_version(), strict=True)


def container_script() -> str:
    """What the container's shell runs, the night replaced by ``$NIGHT``."""
    [container] = cron_job()["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    [script] = container["args"]
    night = re.compile(r"^featurepipe run \S+ --log-format json &", re.MULTILINE)
    assert len(night.findall(script)) == 1
    return night.sub("$NIGHT &", script)


@pytest.mark.parametrize(("code", "seen"), [(0, 0), (1, 1), (3, 0), (4, 4), (75, 0)])
def test_the_container_ends_as_the_night_did(tmp_path: Path, code: int, seen: int) -> None:
    night = tmp_path / "night.sh"
    night.write_text(f"exit {code}\n")
    done = subprocess.run(["sh", "-c", container_script()], env={"NIGHT": f"/bin/sh {night}"}, check=False)
    assert done.returncode == seen


def test_the_container_passes_sigterm_on_and_waits(tmp_path: Path) -> None:
    night, committed = tmp_path / "night.sh", tmp_path / "committed"
    night.write_text(
        f"trap '/bin/sleep 0.3; : > {committed}; exit 143' TERM\n: > {tmp_path}/begun\n"
        "for i in $(/usr/bin/seq 400); do /bin/sleep 0.05; done\n"
    )
    shell = subprocess.Popen(["sh", "-c", container_script()], env={"NIGHT": f"/bin/sh {night}"})
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    shell.send_signal(signal.SIGTERM)
    assert shell.wait(timeout=120) == 143
    assert committed.exists()
