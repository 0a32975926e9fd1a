"""Events, statistics and their sums. What is counted is registered; files of definitions hold statistics of one kind."""

import sys

from ..registry import import_modules

import_modules(sys.modules[__name__])
