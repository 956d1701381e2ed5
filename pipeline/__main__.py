"""`python -m pipeline` is the command `nightshift`."""

from importlib import import_module

import_module("jobs.nightshift").main()
