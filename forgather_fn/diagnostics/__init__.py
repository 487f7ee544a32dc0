"""Seeing inside a training: pure functions of what happened, and observers that ask for no more than they show."""

from forgather_fn.diagnostics.activations import Activation as Activation
from forgather_fn.diagnostics.activations import activation_statistics as activation_statistics
from forgather_fn.diagnostics.activations import activations as activations
from forgather_fn.diagnostics.flops import flops_per_token as flops_per_token
from forgather_fn.diagnostics.flops import peak_flops as peak_flops
from forgather_fn.diagnostics.histograms import histograms as histograms
from forgather_fn.diagnostics.memory import memory_recorded as memory_recorded
from forgather_fn.diagnostics.norms import by_module as by_module
from forgather_fn.diagnostics.norms import module_norms as module_norms
from forgather_fn.diagnostics.profile import profiled as profiled
from forgather_fn.diagnostics.utilization import utilization as utilization

__all__ = [
    "Activation",
    "activation_statistics",
    "activations",
    "by_module",
    "flops_per_token",
    "histograms",
    "memory_recorded",
    "module_norms",
    "peak_flops",
    "profiled",
    "utilization",
]
