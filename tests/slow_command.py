"""The command `shardconv`, with units as small as the model of the tests, each of which takes a third of a second more."""

from shardconv import units
from shardconv.__main__ import main
from shardconv.run import driver

units.UNIT_LEAST = 1 << 14
driver.WORK = "slow_units:run"

if __name__ == "__main__":
    main()
