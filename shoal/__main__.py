"""``python -m shoal``: the command, where no script of that name is on the path."""

from shoal.cli import main

main()
