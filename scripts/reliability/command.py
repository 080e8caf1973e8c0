"""The command that is killed: `shardconv`, with units and patience as small as the model.

Units of at least 32 MiB would make one unit of it, and ten minutes of patience with a process that hangs would make one harness of a day.
"""

from shardconv import units
from shardconv.__main__ import main
from shardconv.run import Patience, driver

units.UNIT_LEAST = 1 << 16
driver.PATIENCE = Patience(name_after=2.0, give_up_after=8.0)

if __name__ == "__main__":
    main()
