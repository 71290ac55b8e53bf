"""``python -m glance_trt``: the command line, where its script is not on the path."""

from glance_trt.cli.main import main

main()
