"""XLA's flags for the tests: most of their time would go to optimising programs that run for a moment."""

import importlib.metadata

# XLA ends the process at a flag that it does not know, so those of one release are given to that release alone.
_OF_JAXLIB = {"0.10": " --xla_cpu_use_fusion_emitters=false"}
_VERSION = ".".join(importlib.metadata.version("jaxlib").split(".")[:2])
FLAGS = "--xla_backend_optimization_level=0" + _OF_JAXLIB.get(_VERSION, "")
