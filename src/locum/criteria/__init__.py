"""Scores of experts: one number per expert of a layer, higher means keep. A file of this folder holds criteria of one kind."""

import sys

from ..registry import import_modules

import_modules(sys.modules[__name__])
