"""The command that is killed: `shardconv`, with units and patience as small as the model.

Units of at least 32 MiB would make one unit of it, and ten minutes of patience with a process that hangs would make one harness of a day.
The process that commits has no niceness here: many conversions at once leave no idle time for it.
"""

from shardconv import units
from shardconv.__main__ import main
from shardconv.run import Patience, driver
from shardconv.run.child import Child


def eager(function: str, log: str | None, env: dict[str, str], nice: int) -> Child:  # noqa: ARG001
    """`Child`, but for its niceness."""
    return Child(function, log, env, nice=0)


units.UNIT_LEAST = 1 << 16
driver.PATIENCE = Patience(name_after=3.0, give_up_after=15.0)
driver.Child = eager  # type: ignore[assignment,misc]

if __name__ == "__main__":
    main()
