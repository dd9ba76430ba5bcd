"""A profile turned into the configuration of other tools: one file per kind, in a registry."""

from lisa_analysis.plans.exports import axolotl as axolotl
from lisa_analysis.plans.exports import freeze as freeze
from lisa_analysis.plans.exports import llamafactory as llamafactory
from lisa_analysis.plans.exports import lr as lr
from lisa_analysis.plans.exports import mergekit as mergekit
from lisa_analysis.plans.exports import peft_layers as peft_layers
from lisa_analysis.plans.exports import peft_rank as peft_rank
from lisa_analysis.plans.exports import probabilities as probabilities
from lisa_analysis.plans.exports.plan import Layer as Layer
from lisa_analysis.plans.exports.plan import Plan as Plan
from lisa_analysis.plans.exports.registry import EXPORTS as EXPORTS
from lisa_analysis.plans.exports.registry import Content as Content
from lisa_analysis.plans.exports.registry import Export as Export
from lisa_analysis.plans.exports.registry import Exporter as Exporter
from lisa_analysis.plans.exports.registry import export as export
from lisa_analysis.plans.exports.registry import exporter as exporter
