"""Routing policies, one file each. Other packages offer more through the entry point locum.policies."""

import sys

from ...registry import import_modules

import_modules(sys.modules[__name__])
