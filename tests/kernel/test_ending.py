# SPDX-License-Identifier: MIT
"""How a restore ends other than well: bad restorers, signals, unreadable images; and what is said of it."""

from __future__ import annotations

import os
import signal
import time

import pytest
from kernel_harness import BASE, PAGE, PID, full, hand_over, memory, sparse, task_state, wait_until

VMAS = [full(BASE, 512)]
OPENED = [*memory(VMAS), "open", "connect"]
NO_FILL = ("--fill", "off")


def refused(stage, steps, *, tasks=None, zombies=()):
    """Let a restorer do wrong; return what the daemon said of it in its one line of error."""
    stage.build(tasks or {PID: VMAS}, zombies=zombies)
    daemon = stage.start_daemon()
    skeleton = stage.start_skeleton(*steps, "await")
    assert daemon.wait(10) == 1
    errors = [line for line in daemon.output.splitlines() if "Error: " in line]
    assert len(errors) == 1, daemon.output
    assert not (stage.work / "lazy-pages.socket").exists()
    skeleton.close()
    return errors[0]


def test_garbage_is_refused(stage):
    assert "came without a userfaultfd" in refused(stage, ["connect", "raw", "474554202f"])


def test_a_pid_of_zero_is_refused(stage):
    assert "0 came where a pid was due" in refused(stage, ["connect", "pid", "0"])


def test_an_unknown_pid_is_refused(stage):
    assert "task 77 was announced: no such task" in refused(stage, [*OPENED, "pid", "77", "rights", "1"])


def test_a_task_without_a_descriptor_is_refused(stage):
    assert f"task {PID} came without a userfaultfd" in refused(stage, [*OPENED, "pid", str(PID), "byte"])


def test_a_task_with_several_descriptors_is_refused(stage):
    steps = [*OPENED, "pid", str(PID), "rights", "3"]
    assert f"task {PID} came with 3 descriptors" in refused(stage, steps)


def test_a_descriptor_in_place_of_a_pid_is_refused(stage):
    assert "descriptors came where a pid was due" in refused(stage, [*OPENED, "rights", "1"])


def test_a_task_announced_twice_is_refused(stage):
    steps = [*OPENED, "pid", str(PID), "rights", "1", "pid", str(PID), "rights", "1"]
    assert f"task {PID} was announced twice" in refused(stage, steps)


def test_a_zombie_announced_as_a_task_is_refused(stage):
    steps = [*OPENED, "pid", "101", "rights", "1"]
    assert "not a task in" in refused(stage, steps, zombies=[101])


def test_a_task_announced_as_a_zombie_is_refused(stage):
    assert "not a zombie in" in refused(stage, ["connect", "pid", str(-PID)])


def test_hanging_up_at_once_fails_the_restore(stage):
    assert "hung up before it had finished, 0 of 1 task" in refused(stage, ["connect", "hangup"])


def test_hanging_up_inside_a_pid_fails_the_restore(stage):
    assert "inside a pid, after 2 bytes" in refused(stage, ["connect", "raw", "6400", "hangup"])


def test_hanging_up_before_the_descriptor_fails_the_restore(stage):
    steps = [*OPENED, "pid", str(PID), "hangup"]
    assert f"before the userfaultfd of task {PID}" in refused(stage, steps)


def test_a_hang_up_after_one_of_two_tasks_leaves_it_no_zeros(stage):
    stage.build({PID: VMAS, PID + 1: VMAS})
    daemon = stage.start_daemon()
    bus = ["await", "bus", hex(BASE), "512", "sweep", "random", "1"]
    skeleton = stage.start_skeleton(*hand_over(VMAS, PID), "hangup", *bus)
    assert daemon.wait(10) == 1
    assert "1 of 2 tasks" in daemon.output
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n")


def test_finishing_without_a_task_serves_the_others_and_fails(stage):
    stage.build({PID: VMAS, PID + 1: VMAS})
    daemon = stage.start_daemon()
    skeleton = stage.start_skeleton(*hand_over(VMAS, PID), "finish", "hangup", "sweep", "random", "2")
    assert skeleton.wait() == (0, "ok\n")
    assert daemon.wait(10) == 1
    assert f"without handing over task {PID + 1}" in daemon.output


def test_a_tree_with_a_zombie(stage):
    others = [[full(BASE + (number + 1) * 1000 * PAGE, 100)] for number in range(20)]
    stage.build({PID: VMAS, **{PID + 1 + n: vmas for n, vmas in enumerate(others)}}, zombies=[999])
    daemon = stage.start_daemon("--stats", str(stage.folder / "stats.json"))
    steps = ["connect"]
    for number, vmas in enumerate(others):
        pid = str(PID + 1 + number)
        steps += ["child", *memory(vmas), "open", "announce", pid, "ready", "sweep", "random", "2", "end"]
    steps += [*memory(VMAS), "open", "announce", str(PID), "pid", "-999", "finish", "sweep", "random", "1"]
    skeleton = stage.start_skeleton(*steps)
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    assert daemon.wait() == 0, daemon.output
    assert len(stage.statistics()["tasks"]) == 21


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_first_task_ends_the_daemon(stage, number):
    stage.build({PID: VMAS})
    daemon = stage.start_command()
    daemon.wait_for_line("to serve lazily")
    time.sleep(0.02)
    daemon.kill(number)
    assert daemon.wait(5) in (1, -number)
    assert "Traceback" not in daemon.output


@pytest.mark.parametrize("words", [NO_FILL, ("--fill-rate", "64K")])
def test_the_first_signal_finishes_the_fill(stage, words):
    stage.build({PID: VMAS})
    daemon = stage.start_daemon(*words)
    steps = [*hand_over(VMAS, PID), "finish", "hangup", "say", "restored", "await", "sweep", "random", "1"]
    skeleton = stage.start_skeleton(*steps)
    skeleton.heard("restored")
    daemon.wait_for_line("restore finished")
    assert daemon.poll() is None
    daemon.kill(signal.SIGTERM)
    assert daemon.wait() == 0, daemon.output
    assert "finishing the fill first" in daemon.output
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n")


def test_a_signal_before_the_restore_is_finished_waits_for_it(stage):
    stage.build({PID: VMAS})
    daemon = stage.start_daemon(*NO_FILL)
    skeleton = stage.start_skeleton(
        *hand_over(VMAS, PID), "say", "announced", "await", "finish", "hangup", "sweep", "random", "1"
    )
    skeleton.heard("announced")
    wait_until(lambda: daemon.poll() is None, "the daemon")
    time.sleep(0.05)
    daemon.kill(signal.SIGTERM)
    daemon.wait_for_line("finishing the fill first")
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    assert daemon.wait() == 0, daemon.output


def test_a_hangup_of_the_terminal_does_not_end_the_serving(stage):
    stage.build({PID: VMAS})
    daemon = stage.start_daemon(*NO_FILL)
    steps = [*hand_over(VMAS, PID), "finish", "hangup", "say", "restored", "await", "sweep", "random", "1"]
    skeleton = stage.start_skeleton(*steps)
    skeleton.heard("restored")
    daemon.wait_for_line("restore finished")
    daemon.kill(signal.SIGHUP)
    daemon.wait_for_line("it carries on")
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    assert daemon.wait() == 0, daemon.output


def stop_twice(daemon):
    """Send the two signals that are meant; two at once would be one stop, told to a whole process group."""
    daemon.kill(signal.SIGTERM)
    daemon.wait_for_line("finishing the fill first")
    time.sleep(0.4)
    daemon.kill(signal.SIGTERM)
    assert daemon.wait(10) == 1, daemon.output


def start_own_pid(stage, vmas, *steps):
    """Start a skeleton that is in the images under the pid it has, up to its word "announced"."""
    memory_steps = [*memory(vmas), "open", "connect", "announce", "0"]
    skeleton = stage.start_skeleton("await", *memory_steps, "say", "announced", *steps)
    stage.build({skeleton.pid: vmas})
    # Never "finish": so there is no fill that the first signal could complete before the second.
    daemon = stage.start_daemon("--stats", str(stage.folder / "stats.json"))
    skeleton.go_on()
    skeleton.heard("announced")
    return skeleton, daemon


def test_a_second_signal_stops_the_task_and_leaves_it_no_zeros(stage):
    bus = ["await", "bus", hex(BASE), "512", "sweep", "random", "1"]
    skeleton, daemon = start_own_pid(stage, VMAS, *bus)
    stop_twice(daemon)
    wait_until(lambda: task_state(skeleton.pid) == "T", "the task to stop")
    assert f"stopped: {skeleton.pid};" in daemon.output
    statistics = stage.statistics()
    assert statistics["exit_code"] == 1
    assert statistics["pages"]["poisoned"] == 512
    assert statistics["tasks"][0]["pid"] == skeleton.pid
    skeleton.go_on()
    os.kill(skeleton.pid, signal.SIGCONT)
    assert skeleton.wait() == (0, "ok\n")


def test_a_second_signal_stops_forked_children_too(stage):
    bus = ["bus", hex(BASE), "512", "sweep", "random", "1"]
    family = ["child", "child", "ready", "pause", *bus, "end", "ready", "pause", *bus, "end"]
    skeleton, daemon = start_own_pid(stage, VMAS, *family, "say", "forked", "await", *bus)
    skeleton.heard("forked")
    pids = [skeleton.pid]
    for _ in range(2):
        pids.append(int(open(f"/proc/{pids[-1]}/task/{pids[-1]}/children").read()))  # noqa: PTH123, SIM115
    stop_twice(daemon)
    for pid in pids:
        wait_until(lambda pid=pid: task_state(pid) == "T", f"task {pid} to stop")
    skeleton.go_on()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
        if pid != skeleton.pid:
            os.kill(pid, signal.SIGUSR1)
    assert skeleton.wait() == (0, "ok\n")


def test_a_second_signal_leaves_other_children_alone(stage):
    """A process that was forked before the restore has nothing of us, whoever its parent is."""
    memory_steps = [*memory(VMAS), "open", "connect", "announce", "0"]
    steps = ["await", "child", "ready", "pause", "end", *memory_steps, "say", "announced", "await"]
    skeleton = stage.start_skeleton(*steps)
    stage.build({skeleton.pid: VMAS})
    daemon = stage.start_daemon()
    skeleton.go_on()
    skeleton.heard("announced")
    child = int(open(f"/proc/{skeleton.pid}/task/{skeleton.pid}/children").read())  # noqa: PTH123, SIM115
    stop_twice(daemon)
    wait_until(lambda: task_state(skeleton.pid) == "T", "the task to stop")
    assert task_state(child) != "T"


def test_two_signals_far_apart_are_two_first_ones(stage, monkeypatch):
    monkeypatch.setattr("lazyd.session.SECOND_SIGNAL_S", 0.3)
    bus = ["await", "finish", "sweep", "random", "1"]
    skeleton, daemon = start_own_pid(stage, VMAS, *bus)
    daemon.kill(signal.SIGTERM)
    daemon.wait_for_line("finishing the fill first")
    time.sleep(0.5)
    daemon.kill(signal.SIGTERM)
    wait_until(lambda: daemon.output.count("finishing the fill first") == 2, "the second answer")
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    assert daemon.wait() == 0


# Images that go bad


@pytest.mark.parametrize("words", [(), NO_FILL])
def test_pages_that_are_cut_off_raise_sigbus_and_the_rest_is_right(stage, words):
    stage.build({PID: VMAS})
    daemon = stage.start_daemon("--stats", str(stage.folder / "stats.json"), *words)
    steps = ["await", "finish", "bus", hex(BASE + 300 * PAGE), "212", "sweep", "random", "2"]
    skeleton = stage.start_skeleton(*hand_over(VMAS, PID), "say", "announced", *steps)
    skeleton.heard("announced")
    os.truncate(stage.images / "pages-1.img", 300 * PAGE)
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    assert daemon.wait() == 1, daemon.output
    assert "pages-1.img" in daemon.output
    statistics = stage.statistics()
    assert statistics["pages"]["poisoned"] == 212
    assert statistics["reason"] is not None


def test_pages_that_are_cut_off_and_nobody_touches_do_not_keep_the_fill_going(stage):
    vmas = [full(BASE, 4096)]
    stage.build({PID: vmas})
    daemon = stage.start_daemon("--stats", str(stage.folder / "stats.json"))
    steps = ["await", "finish", "hangup", "await"]
    skeleton = stage.start_skeleton(*hand_over(vmas, PID), "say", "announced", *steps)
    skeleton.heard("announced")
    os.truncate(stage.images / "pages-1.img", 2048 * PAGE)
    skeleton.go_on()
    assert daemon.wait(10) == 1, daemon.output
    assert stage.statistics()["pages"]["poisoned"] == 2048


def test_an_image_that_is_written_again_is_not_served(stage):
    vmas = [full(BASE, 512)]
    stage.build({PID: vmas})
    daemon = stage.start_daemon()
    steps = ["await", "finish", "bus", hex(BASE), "512", "sweep", "random", "1"]
    skeleton = stage.start_skeleton(*hand_over(vmas, PID), "say", "announced", *steps)
    skeleton.heard("announced")
    (stage.images / "pages-1.img").write_bytes(b"x" * 512 * PAGE)
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    assert daemon.wait() == 1, daemon.output


def test_a_page_that_is_cut_in_its_middle_is_not_read_as_half_zeros(stage):
    stage.build({PID: VMAS})
    daemon = stage.start_daemon()
    steps = ["await", "finish", "bus", hex(BASE + 300 * PAGE), "212", "sweep", "forward", "1"]
    skeleton = stage.start_skeleton(*hand_over(VMAS, PID), "say", "announced", *steps)
    skeleton.heard("announced")
    os.truncate(stage.images / "pages-1.img", 300 * PAGE + 100)
    skeleton.go_on()
    assert skeleton.wait() == (0, "ok\n"), daemon.output
    assert daemon.wait() == 1, daemon.output


def test_bad_images_are_refused_before_anyone_may_connect(stage):
    stage.build({PID: VMAS})
    os.truncate(stage.images / "pages-1.img", 300 * PAGE)
    daemon = stage.start_daemon(listening=False)
    assert daemon.wait() == 1
    assert len(daemon.output.splitlines()) == 1
    assert "pages-1.img" in daemon.output
    assert not (stage.work / "lazy-pages.socket").exists()


# The fill


def test_without_fill_it_serves_until_the_task_exits(stage):
    stage.build({PID: VMAS})
    daemon = stage.start_daemon(*NO_FILL)
    skeleton = stage.start_skeleton(*hand_over(VMAS, PID), "finish", "hangup", "await", "vanish")
    time.sleep(0.3)
    assert daemon.poll() is None
    skeleton.go_on()
    assert skeleton.wait() == (-signal.SIGKILL, "")
    assert daemon.wait(5) == 0


def test_the_fill_rate_holds(stage):
    vmas = [full(BASE, 2048)]
    stage.build({PID: vmas})
    statistics = str(stage.folder / "stats.json")
    daemon = stage.start_daemon("--fill-rate", "16M", "--stats", statistics)
    skeleton = stage.start_skeleton(*hand_over(vmas, PID), "finish", "hangup", "await")
    assert daemon.wait() == 0
    skeleton.close()
    seconds = stage.statistics()["seconds"]
    # 8 MiB at 16 MiB a second, less the first burst.
    assert 0.35 < seconds["full"] - seconds["restored"] < 0.8


def test_a_killed_task_ends_the_daemon_well(stage):
    stage.build({PID: [sparse(BASE, 100_000, 10)]})
    daemon = stage.start_daemon("--fill-rate", "1M")
    steps = [*hand_over([sparse(BASE, 100_000, 10)], PID), "finish", "hangup", "vanish"]
    skeleton = stage.start_skeleton(*steps)
    assert skeleton.wait() == (-signal.SIGKILL, "")
    assert daemon.wait(5) == 0, daemon.output


# The command


def test_daemon_mode(stage):
    stage.build({PID: VMAS})
    daemon = stage.start_command("--daemon", "--pidfile", "lazy.pid", "-o", "lazy.log")
    assert daemon.wait() == 0
    assert daemon.output == ""
    pid = int((stage.work / "lazy.pid").read_text())
    assert (stage.work / "lazy.pid").read_text() == str(pid)
    assert "lazy-pages.socket" in (stage.work / "lazy.log").read_text()
    skeleton = stage.start_skeleton(*hand_over(VMAS, PID), "finish", "hangup", "sweep", "random", "1")
    assert skeleton.wait() == (0, "ok\n")
    wait_until(lambda: task_state(pid) in ("", "Z"), "the daemon to end")
    assert "tasks: 1" in (stage.work / "lazy.log").read_text()


def test_daemon_mode_fails_in_the_foreground(stage):
    stage.images.mkdir()
    daemon = stage.start_command("--daemon", "--pidfile", "lazy.pid", listening=False)
    assert daemon.wait() == 1
    assert len(daemon.output.splitlines()) == 1
    assert str(stage.images) in daemon.output


def test_the_log_names_the_socket_at_any_verbosity(stage):
    stage.build({PID: VMAS})
    for verbosity in ("-v0", "-v1", "-v4"):
        daemon = stage.start_daemon("-o", "lazy.log", verbosity)
        daemon.kill(signal.SIGTERM)
        daemon.wait()
        assert "lazy-pages.socket" in (stage.work / "lazy.log").read_text()
