"""A profile turned into the configuration of other tools: one file of this folder per kind."""

from lisa_analysis.contract.folder import import_modules
from lisa_analysis.plans.exports.plan import Layer as Layer
from lisa_analysis.plans.exports.plan import Plan as Plan
from lisa_analysis.plans.exports.registry import EXPORTS as EXPORTS
from lisa_analysis.plans.exports.registry import Content as Content
from lisa_analysis.plans.exports.registry import Export as Export
from lisa_analysis.plans.exports.registry import Exporter as Exporter
from lisa_analysis.plans.exports.registry import export as export
from lisa_analysis.plans.exports.registry import exporter as exporter

import_modules(__name__, __path__)
