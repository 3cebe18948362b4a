"""`python -m tiered`, and what the script `tiered` calls."""

from typing import NoReturn

from tiered.process import catch_interrupts, end_at_once, quiet_libraries, restart_in_utf8


def run() -> NoReturn:
    """Run the command of this process's arguments, and end with its exit code."""
    restart_in_utf8()
    # Before the command line is imported: an interrupt meanwhile would end in a traceback.
    catch_interrupts()
    quiet_libraries()
    try:
        from tiered.cli import main

        main()
    except KeyboardInterrupt:
        end_at_once()


if __name__ == "__main__":
    run()
