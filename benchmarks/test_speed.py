"""test_speed -- forward, backward and inference beside the peers, in groups under the streaming copy.

``python -m pytest benchmarks`` measures what ``python -m fastbn bench`` does, and takes its options in ``--bench``. The
times are pytest-benchmark's, one contender after the other. The multiples of the copy in ``extra_info`` are from all
contenders in turns, and so is ``correct``.
"""

import dataclasses

import pytest

import fastbn


@pytest.mark.benchmark(max_time=0.2)
def test_speed(benchmark, contest, entry, group, tensors):
    benchmark.group = str(contest.case)
    result = group.of(str(entry))
    benchmark.extra_info.update(dataclasses.asdict(result), limit=entry.case.limit)
    with fastbn.num_threads(entry.case.threads):
        entry.peer.set_threads(entry.case.threads)
        benchmark(entry.make(tensors).run)
    assert result.correct is not False
