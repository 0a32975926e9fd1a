"""Number formats: how the numbers of a weight lie in a checkpoint. Every kind of format is a file of this folder."""

import sys

from ..registry import import_modules

import_modules(sys.modules[__name__])
