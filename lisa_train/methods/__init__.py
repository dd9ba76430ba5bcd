"""How a model is trained: a file or folder per method, and `METHODS`, which lists them."""

from lisa_analysis.contract.folder import import_modules
from lisa_train.methods.registry import METHODS as METHODS
from lisa_train.methods.registry import Method as Method
from lisa_train.methods.registry import register as register
from lisa_train.methods.registry import sections as sections

import_modules(__name__, __path__)
