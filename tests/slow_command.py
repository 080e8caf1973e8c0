"""The command `shardconv`, with units as small as the model of the tests, each of which takes a third of a second more.

Nothing is changed for those who import it, as pytest does when it looks for examples.
"""

from shardconv import units
from shardconv.__main__ import main
from shardconv.run import driver

if __name__ == "__main__":
    units.UNIT_LEAST = 1 << 14
    driver.WORK = "slow_units:run"
    main()
