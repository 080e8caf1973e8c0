"""How fast a run was, over time: bytes of the target in slices of the time in which units were made.

A unit's bytes are spread evenly over the time that it took, which is exact enough: the units of a run that lasts are many, and each is
short. Times are the driver's, as it heard of each unit, so the clocks of hosts are never compared.
"""

from collections.abc import Mapping, Sequence

from shardconv.run import Finished

SLICES = 100  # as many as a plot shows, so that a report does not grow with the model


def throughput(finished: Sequence[tuple[float, Finished]], sizes: Mapping[int, int]) -> dict[str, object]:
    """Slices of equal length and the bytes made in each; none for a run that made no unit.

    `finished` are units with the seconds at which they ended, `sizes` bytes of the target by unit.

    >>> done = Finished(0, "u0", 0, 0, 0, seconds=1.0, peak_rss=0, pid=1, host="a")
    >>> throughput([(2.0, done)], {0: 500})["bytes"][48:52]
    [0, 0, 10, 10]
    """
    length = max((end for end, _ in finished), default=0.0)
    if length <= 0:
        return {"slice_seconds": 0.0, "bytes": []}
    width = length / SLICES
    made = [0.0] * SLICES
    for end, done in finished:
        begin = max(0.0, end - max(done.seconds, width))  # a unit that took no time is spread over one slice
        rate = sizes[done.unit] / (end - begin) if end > begin else 0.0
        for number in range(int(begin / width), min(int(end / width) + 1, SLICES)):
            made[number] += rate * max(0.0, min(end, (number + 1) * width) - max(begin, number * width))
    return {"slice_seconds": width, "bytes": [round(nbytes) for nbytes in made]}
