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
PACKAGE = Path(__file__).parents[1] / "featurepipe"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("spoilt", ["", "ExecStart", "OnCalendar"])
def test_systemd_accepts_the_units(tmp_path: Path, spoilt: str) -> None:
    """Also that the check finds what is wrong: a program that is not there, a time that is none."""
    units = []
    for file in sorted(SCHEDULE.glob("featurepipe-*.[st][ei][rm]*")):
        text = file.read_text()
        program = "/nowhere/featurepipe" if spoilt == "ExecStart" else sys.executable
        text = text.replace("# ExecStart=", "ExecStart=")  # a recipe after the night
        text = re.sub(r"^ExecStart=/opt/\S+", f"ExecStart={program}", text, flags=re.MULTILINE)
        units.append(tmp_path / file.name)
        units[-1].write_text(text.replace(" 02:00:00", " 26:00:00") if spoilt == "OnCalendar" else text)
    assert len(units) == 5
    command = ["systemd-analyze", "--man=no", "verify", *map(str, units)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if "featurepipe-" in line]
    assert bool(complaints) == bool(spoilt), done.stderr


def cron_lines() -> list[tuple[str, str]]:
    """When each line of the crontab is due, and its command."""
    lines = [line for line in (SCHEDULE / "featurepipe.crontab").read_text().splitlines() if re.match(r"[\d*]", line)]
    return [(" ".join(fields[:5]), fields[5]) for fields in (line.split(None, 5) for line in lines)]


def test_the_crontab_has_five_fields_and_a_command() -> None:
    (nightly, run), (weekly, verify), (monthly, clean) = cron_lines()
    assert (nightly, weekly, monthly) == ("0 2 * * *", "0 12 * * 0", "0 1 1 * *")
    assert "featurepipe run nightly.toml " in run
    assert "featurepipe verify out/features " in verify
    assert not {command for command in (run, verify, clean) if "%" in command}  # cron takes it for the end of the line


@pytest.mark.parametrize(("line", "code", "told"), [
    (0, 0, False), (0, 3, False), (0, 75, False), (0, 1, True), (0, 2, True), (0, 4, True), (0, 143, True), (1, 0, False),
    (1, 1, True),
])  # fmt: skip
def test_cron_mails_failures_and_nothing_else(tmp_path: Path, line: int, code: int, told: bool) -> None:
    """What cron would mail is what the line prints, run by sh as cron does."""
    program = tmp_path / "featurepipe"
    program.write_text(f"#!/bin/sh\necho said $1; echo warned >&2; exit {code}\n")
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PLACE": str(tmp_path)}
    done = subprocess.run(
        ["sh", "-c", cron_lines()[line][1]], env=environment, capture_output=True, text=True, check=False
    )
    what = ("run", "verify")[line]
    assert bool(done.stdout) == told
    assert done.stderr == ""
    if told:
        assert f": exit code {code}; the end of {tmp_path}/logs/" in done.stdout
        assert done.stdout.endswith(f"said {what}\nwarned\n")
        assert done.returncode == code
    (log,) = (tmp_path / "logs").iterdir()
    assert log.read_text() == f"said {what}\nwarned\n"


@pytest.mark.parametrize(("code", "after", "ends"), [(0, 0, 0), (3, 0, 0), (75, 0, 0), (3, 1, 1), (4, 0, 4), (4, 1, 4)])
def test_cron_runs_what_is_to_run_after_any_night(tmp_path: Path, code: int, after: int, ends: int) -> None:
    """The commented line of the crontab, with a recipe's command: it runs after nights with rejects, and its failure is told."""
    [named] = re.findall(r"^# AFTER=(.+)$", (SCHEDULE / "featurepipe.crontab").read_text(), flags=re.MULTILINE)
    for name, ending in (("featurepipe", code), ("python", after)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"; exit {ending}\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PLACE": str(tmp_path), "AFTER": named}
    done = subprocess.run(
        ["sh", "-c", cron_lines()[0][1]], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr, bool(done.stdout)) == (ends, "", ends != 0)
    if ends:
        assert f": exit code {code}, and {after} of {named}; the end of {tmp_path}/logs/" in done.stdout
    (log,) = (tmp_path / "logs").iterdir()
    assert log.read_text() == f"featurepipe run nightly.toml --log-format json\n{named}\n"


PAGES = ("docs/removing-images.md", "pipelines/into_lancedb.py", "pipelines/into_qdrant.py")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("code", [0, 3, 4])
def test_recipes_run_after_nights_with_rejects_as_pages_have_it(tmp_path: Path, page: str, code: int) -> None:
    """A night ends with 3 as long as one image of the source cannot be used; the lines are run as they stand there."""
    lines = re.findall(r"^ *(featurepipe run .*into_.*)$", (PACKAGE.parent / page).read_text(), flags=re.MULTILINE)
    assert len(lines) == (2 if page.startswith("docs") else 1)
    for name, ending in (("featurepipe", code), ("python", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name}; exit {ending}\n")
        (tmp_path / name).chmod(0o755)
    for line in lines:
        done = subprocess.run(
            ["sh", "-c", line], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=False
        )
        assert done.stdout == "featurepipe\npython\n"


def test_alerts_are_of_figures_that_there_are() -> None:
    yaml = pytest.importorskip("yaml")
    (group,) = yaml.safe_load((SCHEDULE / "featurepipe-alerts.yaml").read_text())["groups"]
    rules = "\n".join(rule["expr"] for rule in group["rules"])
    page = (PACKAGE.parent / "docs" / "operations.md").read_text()
    assert [rule for rule in rules.splitlines() if f"\n{rule}\n" not in page] == []
    sources = "".join((PACKAGE / name).read_text() for name in ("jobs/prometheus.py", "extraction/plan.py"))
    figures = re.findall(r"featurepipe_(\w+)", rules)
    values = re.findall(r'=~?"([^"]+)"', rules)
    assert len(set(figures)) >= 7
    assert [name for name in figures if f'{name}"' not in sources] == []
    values = {one for value in values for one in value.split("|")} - {"listed"}
    assert values == {"failed", "deleted", "corrupted", "new_rejected"}
    assert [value for value in values if f'"{value}"' not in sources] == []


def cron_jobs() -> list[Any]:
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all((SCHEDULE / "featurepipe-cronjob.yaml").read_text()))


def test_kubernetes_schema_accepts_the_cron_jobs() -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    jobs = cron_jobs()
    for job in jobs:
        schemas.validate(job, schemas.latest_version(), strict=True)
    jobs[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["restartPolicies"] = "Never"
    with pytest.raises(schemas.ValidationError):
        schemas.validate(jobs[0], schemas.latest_version(), strict=True)


def container_script() -> str:
    """What the container's shell runs, the night replaced by ``$NIGHT``."""
    [container] = cron_jobs()[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    [script] = container["args"]
    night = re.compile(r"^featurepipe run \S+ --log-format json &", re.MULTILINE)
    assert len(night.findall(script)) == 1
    return night.sub("$NIGHT &", script)


@pytest.mark.parametrize(
    ("code", "after", "seen"), [(0, 0, 0), (3, 0, 0), (75, 0, 0), (3, 1, 1), (4, None, 4), (143, None, 143)]
)
def test_the_container_runs_a_recipe_after_a_night_with_rejects(
    tmp_path: Path, code: int, after: int | None, seen: int
) -> None:
    """The commented line of the script, with a recipe; what was killed or failed ends as it did."""
    [line] = re.findall(r"^# (case .*)$", container_script(), flags=re.MULTILINE)
    (tmp_path / "night.sh").write_text(f"exit {code}\n")
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@"; exit {after}\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", container_script().replace(f"# {line}", line)],
        env={"NIGHT": f"/bin/sh {tmp_path / 'night.sh'}", "PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == seen
    assert ("into_qdrant.py" in done.stdout) == (after is not None)


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
