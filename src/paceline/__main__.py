"""What the command ``paceline`` starts. Ctrl-C is minded from here on, before anything slow is loaded."""

import os
import sys

INTERRUPTED = 130


def main() -> int:
    """Carry out the command line; the exit code."""
    try:
        from paceline.launch import cli

        code = cli.main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    if code == INTERRUPTED:
        # Python remembers a Ctrl-C that hit code made from text, as dataclasses are, and would end itself by a signal.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                pass  # nobody reads any more
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
