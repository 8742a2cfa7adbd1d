"""Requests to stop: by signal, by deadline, at once or at the next safe place."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from featurepipe.errors import Interrupted, UsageError
from featurepipe.interrupt import StopRequest, stop_on_signals, stopping


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0)  # the handler runs between two instructions


def test_nothing_stops_a_request_that_nobody_made():
    request = StopRequest()
    assert (request(), request.out_of_time, request.name, request.signal_number) == (False, False, "", None)
    assert StopRequest.after(None).deadline is None


def test_a_deadline_passes():
    request = StopRequest.after(60)
    assert not request()
    request.deadline = time.monotonic()
    assert request()
    assert request.out_of_time
    assert (request.name, request.signal_number) == ("", None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_set_the_request_that_was_given(number):
    mine, before = StopRequest.after(60), signal.getsignal(number)
    with stop_on_signals(mine) as request:
        assert request is mine
        send(number)
        assert request()
        assert not request.out_of_time
        assert (request.name, request.signal_number) == (number.name, number)
    assert signal.getsignal(number) is before


def test_a_second_sigterm_is_noted_and_a_second_sigint_raises():
    with stop_on_signals() as request:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert request.name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_at_once_a_signal_raises_and_elsewhere_it_does_not():
    with stop_on_signals() as request:
        with request.at_once(before="lunch"):
            pass
        with pytest.raises(Interrupted, match="stopped by SIGTERM before lunch; nothing was changed") as caught:
            wait_for_a_signal(request)
        assert caught.value.exit_code == 143
        send(signal.SIGTERM)
        assert request()


def wait_for_a_signal(request):
    with request.at_once(before="lunch"):
        send(signal.SIGTERM)
        pytest.fail("went on")


def test_at_once_raises_for_a_signal_of_before_and_not_for_a_deadline():
    request = StopRequest(deadline=time.monotonic() - 1)
    with request.at_once(before="it"):
        pass
    request.signalled(signal.SIGINT)
    with pytest.raises(Interrupted) as caught, request.at_once(before="it"):
        pytest.fail("began")
    assert caught.value.exit_code == 130


def test_at_once_keeps_the_number_of_a_signal_that_a_nested_request_met():
    request = StopRequest()
    with pytest.raises(Interrupted, match="stopped by SIGTERM before it") as caught, request.at_once(before="it"):
        raise Interrupted("stopped by SIGTERM", signal.SIGTERM)
    assert caught.value.exit_code == 143


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def elsewhere():
        with stop_on_signals(StopRequest.after(0)) as request:
            seen.append((signal.getsignal(signal.SIGTERM), request()))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(before, True)]


def test_the_callers_request_is_taken_as_it_is():
    mine, before = StopRequest(), signal.getsignal(signal.SIGTERM)
    with stopping(mine, None) as request:
        assert request is mine
        assert signal.getsignal(signal.SIGTERM) is before
    with stopping(None, 60) as request:
        assert 50 < request.deadline - time.monotonic() <= 60
        assert signal.getsignal(signal.SIGTERM) is not before
    with pytest.raises(UsageError, match="give the request its own deadline"):
        stopping(mine, 60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_code_that_turns_every_error_of_an_item_into_a_reject_does_not_go_on(number):
    with stop_on_signals() as request, pytest.raises(Interrupted, match="before lunch") as caught:
        reject_a_signal(request, number)
    assert caught.value.exit_code == 128 + number


def reject_a_signal(request, number):
    with request.at_once(before="lunch"):
        try:
            send(number)
        except Exception:  # noqa: BLE001  # what is tested
            pytest.fail("took the signal for an item's error")


class Deaf:
    def __del__(self):
        send(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_is_raised_again_where_python_drops_its_exception(monkeypatch):
    monkeypatch.setattr("featurepipe.interrupt.AGAIN", 0.05)
    monkeypatch.setattr("featurepipe.interrupt.PATIENCE", 600)
    with stop_on_signals() as request, pytest.raises(Interrupted, match="stopped by SIGTERM before lunch"):
        drop_a_signal(request)


def drop_a_signal(request):
    with request.at_once(before="lunch"):
        Deaf()
        for _ in range(600):
            time.sleep(0.05)
        pytest.fail("went on")


def test_the_programs_own_handler_is_back_and_hears_of_the_signal():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: heard.append(number))
    try:
        with stop_on_signals():
            send(signal.SIGTERM)
            assert heard == []
        assert heard == [signal.SIGTERM]
        send(signal.SIGTERM)
        assert heard == [signal.SIGTERM, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.set_wakeup_fd(-1) == -1


def test_a_block_around_another_hears_of_its_signal():
    with stop_on_signals() as outer:
        with stop_on_signals() as inner:
            send(signal.SIGTERM)
        assert (inner.name, outer.name) == ("SIGTERM", "SIGTERM")
        with stop_on_signals() as next_one:
            assert not next_one()


def test_no_thread_and_no_descriptor_is_left():
    def held():
        return threading.active_count(), len(list(Path("/proc/self/fd").glob("*")))

    before = held()
    for _ in range(3):
        with stop_on_signals():
            send(signal.SIGINT)
    assert held() == before


# One call into compiled code, which takes many minutes and comes to no step of Python, as a fit may.
IN_COMPILED_CODE = """
    import hashlib, sys
    import featurepipe.interrupt
    from featurepipe.interrupt import StopRequest, ends_on_ctrl_c, stop_on_signals

    featurepipe.interrupt.PATIENCE, featurepipe.interrupt.AGAIN = 0.2, 0.1

    def stay():
        print("in", file=sys.stderr, flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

    {block}
        stay()
"""


@pytest.mark.parametrize(
    ("block", "number"),
    [
        ('with stop_on_signals() as stop, stop.at_once(before="lunch"):', signal.SIGTERM),
        ('with stop_on_signals() as stop, stop.at_once(before="lunch"):', signal.SIGINT),
        ("with ends_on_ctrl_c():", signal.SIGINT),
    ],
)
def test_compiled_code_does_not_hold_up_the_end(launcher, block, number):
    process = launcher.start(IN_COMPILED_CODE.format(block=block))
    deadline = time.monotonic() + 60
    while "in" not in process.err():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    process.send(number)
    ended = process.wait()
    assert ended.code == 128 + number
    assert f"stopped by {number.name}: what was under way did not come to an end" in ended.err
