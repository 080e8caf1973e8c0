"""`python -m shardconv`."""

from shardconv.cli import main

main()
