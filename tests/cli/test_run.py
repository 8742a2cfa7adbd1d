"""``featurepipe run`` and ``runs``: a job's exit code, what is printed, which records are listed."""

import json

import pytest

from featurepipe.cli import main
from featurepipe.errors import StoreLocked, UsageError
from featurepipe.jobs.job import Job

RUN = "featurepipe.jobs.run:run_job"
TEXT = "featurepipe.jobs.text"


def test_options_reach_the_command(command, call):
    called = command(RUN, {"exit_code": 0})
    assert call("run", "nightly.toml", "--json").code == 0
    assert called.given == {
        "path": "nightly.toml", "dry_run": False, "retry_rejects": False, "log_format": "text", "silent": False,
    }  # fmt: skip
    call("run", "nightly.toml", "--dry-run", "--retry-rejects", "--log-format", "json", "--quiet", "--json")
    assert called.given == {
        "path": "nightly.toml", "dry_run": True, "retry_rejects": True, "log_format": "json", "silent": True,
    }  # fmt: skip


@pytest.mark.parametrize("code", [0, 1, 3, 4, 143])
def test_the_exit_code_is_the_records(code, command, call):
    command(RUN, {"exit_code": code, "status": "x"})
    answer = call("run", "nightly.toml", "--json")
    assert (answer.code, json.loads(answer.out)) == (code, {"exit_code": code, "status": "x"})


def test_a_job_that_is_running_is_75(command, call):
    command(RUN, StoreLocked("job nightly runs already"))
    answer = call("run", "nightly.toml")
    assert (answer.code, answer.out, answer.err) == (75, "", "featurepipe: job nightly runs already\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoreLocked("job nightly runs already"), 75),
        (UsageError("nightly.toml: stor: unknown key\nnightly.toml: x: unknown key"), 2),
        (PermissionError(13, "Permission denied", "features"), 1),
    ],
)
def test_a_log_for_machines_holds_what_ended_the_command(command, call, error, code):
    """Job-file errors and exit code 75, too, are a line of JSON, whatever the number of their lines."""
    command(RUN, error)
    answer = call("run", "jobs/nightly.toml", "--log-format", "json")
    assert (answer.code, answer.out) == (code, "")
    (line,) = answer.err.splitlines()
    said = json.loads(line)
    assert (said["level"], said["event"], said["job"]) == ("error", "failed", "nightly")
    assert (said["text"], said["exit_code"]) == (str(error), code)


def test_a_plan_has_a_text_of_its_own_and_no_exit_code(command, texts, call):
    command(RUN, {"listed": 3})
    texts(f"{TEXT}:plan_text")
    texts(f"{TEXT}:summary_text")
    assert call("run", "nightly.toml", "--dry-run").out == "plan_text of {'listed': 3}\n"
    assert call("run", "nightly.toml").out == "summary_text of {'listed': 3}\n"


def test_a_log_for_machines_is_not_followed_by_a_summary(command, texts, call):
    """Whoever collects standard output and standard error into one log gets JSON only."""
    command(RUN, {"exit_code": 0})
    texts(f"{TEXT}:plan_text")
    assert call("run", "nightly.toml", "--log-format", "json").out == ""
    assert call("run", "nightly.toml", "--log-format", "json", "--dry-run").out == "plan_text of {'exit_code': 0}\n"
    assert call("run", "nightly.toml", "--log-format", "json", "--json").out == '{\n  "exit_code": 0\n}\n'


def test_an_unknown_log_format_is_wrong_usage(command, call):
    called = command(RUN, {})
    assert call("run", "nightly.toml", "--log-format", "xml").code == 2
    assert called.given == {}


@pytest.fixture
def nights(store):
    """Three nights of a job, whose extractions have records too, one night of another job, and an extraction by hand."""
    for number, job in enumerate(["nightly", "weekly", "nightly", None, "nightly"]):
        inside = {"run_id": store.new_run_id(), "command": "extract", "number": f"part of {number}"}
        store.write_run(inside)
        record = {"run_id": store.new_run_id(), "command": "run", "job": job, "extractions": [inside["run_id"]]}
        by_hand = {"run_id": store.new_run_id(), "command": "extract"}
        store.write_run({**(record if job else by_hand), "number": number})
    return store.path


def numbers(answer):
    assert answer.code == 0
    return [record["number"] for record in json.loads(answer.out)]


def test_runs_are_listed_oldest_first_without_the_parts_of_jobs(nights, call):
    assert numbers(call("runs", nights, "--json")) == [0, 1, 2, "part of 3", 3, 4]
    assert numbers(call("runs", nights, "--json", "--last", "2")) == [3, 4]


def test_runs_of_one_job(nights, call):
    assert numbers(call("runs", nights, "--json", "--job", "nightly")) == [0, 2, 4]
    assert numbers(call("runs", nights, "--json", "--job", "nightly", "--last", "2")) == [2, 4]
    answer = call("runs", nights, "--job", "nihtly")
    assert (answer.code, answer.out) == (2, "")
    assert f"unknown job 'nihtly' in {nights}; nearest: nightly" in answer.err


def test_runs_as_text(nights, call, texts):
    texts(f"{TEXT}:runs_text")
    said = call("runs", nights, "--last", "1").out
    assert said.startswith("runs_text of [{")
    assert [f"'number': {number}" in said for number in range(5)] == [False, False, False, False, True]


def test_a_store_without_runs(store, call):
    assert json.loads(call("runs", store.path, "--json").out) == []
    assert call("runs", store.path).out == "no runs yet\n"
    assert (
        f"unknown job 'nightly': no job has run with {store.path} yet"
        in call("runs", store.path, "--job", "nightly").err
    )


def test_one_run_by_its_id_its_beginning_or_as_the_last(nights, call):
    first, *_, last = json.loads(call("runs", nights, "--json").out)
    for name in (last["run_id"], last["run_id"][:-3], "last"):
        assert json.loads(call("runs", nights, name, "--json").out) == last
    (part,) = last["extractions"]
    assert json.loads(call("runs", nights, part, "--json").out)["number"] == "part of 4"
    weekly = json.loads(call("runs", nights, "last", "--job", "weekly", "--json").out)
    assert weekly["number"] == 1
    assert call("runs", nights, first["run_id"]).out.startswith(f"nightly: ?\n? UTC, run {first['run_id']}\n")


def test_a_run_that_is_unknown_or_not_the_only_one(nights, call):
    everything = json.loads(call("runs", nights, "--json").out)
    many = call("runs", nights, everything[0]["run_id"][:4])
    assert (many.code, many.out) == (2, "")
    assert many.err.startswith(
        f"featurepipe: 6 runs begin with {everything[0]['run_id'][:4]!r}: {everything[0]['run_id']}, "
    )
    wrong = call("runs", nights, "lsat")
    assert (wrong.code, "unknown run 'lsat'" in wrong.err, "nearest: last" in wrong.err) == (2, True, True)


def test_a_store_without_runs_has_no_last_one(store, call):
    answer = call("runs", store.path, "last")
    assert (answer.code, "nothing has run in" in answer.err) == (2, True)


def test_rejects_of_all_datasets_or_of_one(nights, call, monkeypatch):
    monkeypatch.setattr("featurepipe.store.FeatureStore.datasets", lambda self: ["birds", "cats"])
    monkeypatch.setattr("featurepipe.jobs.text.current_rejects", lambda store, dataset: [{"dataset": dataset}])
    assert json.loads(call("runs", nights, "--rejects", "--json").out) == [{"dataset": "birds"}, {"dataset": "cats"}]
    assert json.loads(call("runs", nights, "--rejects", "--dataset", "cats", "--json").out) == [{"dataset": "cats"}]
    unknown = call("runs", nights, "--rejects", "--dataset", "cat")
    assert (unknown.code, "unknown dataset 'cat'" in unknown.err) == (2, True)
    assert "--dataset belongs to --rejects" in call("runs", nights, "--dataset", "cats").err


def test_all_keys_of_job_files_are_printed_with_their_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", "--keys"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "\n[source]\n\n  path must be given\n" in said
    assert '\n  box_unit = "pixels"\n' in said
    assert "\n[forget]\n\n  ids must be given\n" in said
    for name, field in Job.model_fields.items():
        assert any(f"\n{title}" in said for title in (f"[{name}]\n", f"[[{name}]]\n", f"  {name}")), field
