"""Settings of Ray Data: those of a job apply to its datasets alone."""

from __future__ import annotations

import threading

import ray.data

from imgcls.cluster.ray_data import own_data_settings


def test_the_settings_of_a_job_are_not_those_of_the_program() -> None:
    program = ray.data.DataContext.get_current()
    before = program.enable_progress_bars, program.raise_original_map_exception
    with own_data_settings() as context:
        context.target_max_block_size = 1
        assert (context.enable_progress_bars, context.raise_original_map_exception) == (False, True)
        assert ray.data.DataContext.get_current() is context
    assert ray.data.DataContext.get_current() is program
    assert (program.enable_progress_bars, program.raise_original_map_exception) == before
    assert program.target_max_block_size != 1


def test_jobs_in_two_threads_do_not_get_each_others_settings() -> None:
    program = ray.data.DataContext.get_current()
    is_inside, may_leave = threading.Event(), threading.Event()
    found: list[object] = []

    def run_first() -> None:
        with own_data_settings() as context:
            context.target_max_block_size = 1
            is_inside.set()
            may_leave.wait(60)

    def run_second() -> None:
        with own_data_settings() as context:
            found.append(context.target_max_block_size)

    first, second = threading.Thread(target=run_first), threading.Thread(target=run_second)
    first.start()
    assert is_inside.wait(60)
    second.start()
    second.join(0.2)  # it would be inside too, and be the last to restore what it has found
    may_leave.set()
    first.join()
    second.join()
    assert found == [program.target_max_block_size]
    assert ray.data.DataContext.get_current() is program
