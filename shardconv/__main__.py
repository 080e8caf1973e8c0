"""`python -m shardconv`; Ctrl-C while the command line is being imported is as quiet as `door` makes it afterwards."""

import sys


def main() -> None:
    """The program; never returns."""
    try:
        from shardconv.cli import main as enter_cli
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")  # what `door` says, which may not be there yet
        sys.exit(5)
    enter_cli()


if __name__ == "__main__":
    main()
