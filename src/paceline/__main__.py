"""What the command ``paceline`` starts. Ctrl-C is minded from here on, before anything slow is loaded."""

import sys


def main() -> int:
    """Carry out the command line; the exit code."""
    try:
        from paceline.launch import cli

        return cli.main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
