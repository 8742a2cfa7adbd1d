"""Requests to stop: by signal, by deadline, at once or at the next safe place."""

import os
import signal
import threading
import time

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
